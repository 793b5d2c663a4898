"""Emulators of Google Cloud Storage and S3 over HTTP, and a tiny artifact."""

import contextlib
import functools
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from nemojax.arch import uniform
from nemojax.checkpoints.artifact import save_params
from nemojax.data.tokenizer import train_tokenizer
from nemojax.model.llama import init_params
from tests.buckets.made import Model, answers, wait_until

ROOT = Path(__file__).parents[2]
SERVERS = {
    "gs": "tests.buckets.gcs_server start --host=127.0.0.1 --in-memory --default-bucket=bucket --port={}",
    "s3": "moto.server -H 127.0.0.1 -p {}",
}


def environment(scheme: str, address: str) -> dict[str, str]:
    """What gcsfs, s3fs and tensorstore look up."""
    if scheme == "gs":
        hns = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address} | hns
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": address, **keys}


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """scheme -> address of its server, which runs until the last test; started when it is first asked for.

    Clients keep the address that they began with, so there is one for all files.
    """
    with contextlib.ExitStack() as running:
        yield functools.cache(lambda scheme: start_server(scheme, tmp_path_factory.mktemp("server"), running))


def start_server(scheme: str, folder: Path, running: contextlib.ExitStack) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *SERVERS[scheme].format(port).split()]
    with (folder / "log").open("w") as out:
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    running.callback(end, server)
    wait_until(lambda: answers(port), server, folder / "log")
    return f"http://127.0.0.1:{port}"


def end(server: subprocess.Popen) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request, servers):
    """`scheme://bucket/NAME`, with nothing in it yet, NAME being of the test file."""
    scheme, name = request.param, Path(request.node.path).stem.removeprefix("test_")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment(scheme, servers(scheme)).items():
            patch.setenv(variable, value)
        if scheme == "s3":
            import s3fs

            system = s3fs.S3FileSystem()
            if not system.exists("bucket"):
                system.mkdir("bucket")
        yield f"{scheme}://bucket/{name}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["sort up 1 2 3 " * 10], 300, folder / "tokenizer")
    sizes: dict[str, Any] = {
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "ffn_width": 32,
        "context": 256,
    }
    arch = uniform(vocab_size=tokenizer.vocab_size, **sizes)
    params = init_params(arch, jax.random.key(0))
    save_params(folder, arch, params, tokenizer_dir=folder / "tokenizer")
    return Model(folder, arch, params)
