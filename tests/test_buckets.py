"""Work directories and artifacts in buckets, over HTTP from emulators of Google Cloud Storage and S3."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from nemojax import buckets, cli, pretrain, sft, tokenizer
from nemojax.arch import ArchSpec, BlockSpec, NoOp, uniform
from nemojax.buckets import place
from nemojax.checkpoints.artifact import Checkpoints, finished_steps, load_model, load_params, save_params
from nemojax.checkpoints.hf import export_hf, import_hf
from nemojax.compress import fuse, prune
from nemojax.compress import run as compress
from nemojax.compress.table import load_table
from nemojax.config import from_dict
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer
from nemojax.evaluate import run as evaluate
from nemojax.evaluate.tasks import load_records
from nemojax.log import RunLog, read_metrics
from nemojax.model.llama import init_params
from nemojax.stage import OtherRun, fingerprint, read_done, read_result, run_stage
from nemojax.study import compare
from tests.environment import QUICK_COMPILATION

ROOT = Path(__file__).parent.parent
LAUNCHER = ROOT / "launch" / "local_cluster.sh"
SERVERS = {
    "gs": "tests.gcs_server start --host=127.0.0.1 --in-memory --default-bucket=bucket --port={}",
    "s3": "moto.server -H 127.0.0.1 -p {}",
}


def environment(scheme: str, address: str) -> dict[str, str]:
    """What gcsfs, s3fs and tensorstore look up."""
    if scheme == "gs":
        hns = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address} | hns
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": address, **keys}


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request, tmp_path_factory):
    """`scheme://bucket`, empty, of a server that runs as long as the tests of this file do."""
    scheme = request.param
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *SERVERS[scheme].format(port).split()]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(scheme, f"http://127.0.0.1:{port}").items():
            patch.setenv(name, value)
        try:
            wait_until(lambda: answers(port), server, log)
            if scheme == "s3":
                import s3fs

                s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
            yield f"{scheme}://bucket"
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition, process, log, seconds=120.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < limit, Path(log).read_text()[-2000:]
        time.sleep(0.05)


@dataclass(frozen=True)
class Model:
    folder: Path
    arch: ArchSpec
    params: dict


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


def equal(a, b) -> bool:
    same = jax.tree.map(
        lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)), a, b
    )
    return all(jax.tree.leaves(same))


def pretraining(tokenizer, **fit) -> pretrain.Config:
    shape = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_width": 32, "context": 128}
    values = {
        "tokenizer": str(tokenizer),
        "shape": shape,
        "data": {"length": 64, "batch_size": 8, "heldout_batches": 1},
        "fit": {"steps": 4, "log_every": 1, "checkpoint_every": 2} | fit,
    }
    return from_dict(pretrain.Config, values)


# --- files


def test_files(bucket):
    root = place(f"{bucket}/files")
    assert not root.exists() and buckets.names_in(root) == set() and list(buckets.files_below(root)) == []
    buckets.write_text(root / "a.txt", "ä")
    buckets.write_text(root / "deep" / "er" / "b.txt", "b")
    assert buckets.names_in(root) == {"a.txt", "deep"}
    assert {str(f.relative_to(root)) for f in buckets.files_below(root)} == {"a.txt", "deep/er/b.txt"}
    assert (root / "a.txt").read_text(encoding="utf-8") == "ä"
    before = buckets.version(root / "a.txt")
    assert before == buckets.version(root / "a.txt") and before[0] == 2
    digest = fingerprint(str(root))
    buckets.write_text(root / "a.txt", "öx")
    assert buckets.version(root / "a.txt") != before and fingerprint(str(root)) != digest
    buckets.copy_file(root / "a.txt", root / "c.txt")
    buckets.remove_tree(root / "deep")
    assert buckets.names_in(root) == {"a.txt", "c.txt"}


def test_a_log(bucket):
    with RunLog(f"{bucket}/log", quiet=True) as log:
        log.write(1, {"train/loss": 2.0})
        log.flush()
        assert read_metrics(f"{bucket}/log") == [{"step": 1, "train/loss": 2.0}]
        log.write(2, {"train/loss": 1.0})
    with RunLog(f"{bucket}/log", quiet=True) as log:  # a resumed run
        log.truncate(1)
        log.write(2, {"train/loss": 1.5})
    assert [row["train/loss"] for row in read_metrics(f"{bucket}/log")] == [2.0, 1.5]
    assert buckets.names_in(place(f"{bucket}/log/tensorboard"))


# --- artifacts


def test_checkpoints(bucket, model):
    checkpoints = Checkpoints(f"{bucket}/checkpoints", keep_last=1, best="loss:min", arch=model.arch)
    state = {"count": np.arange(3)}
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0)):
        params = jax.tree.map(lambda w, step=step: w + step, model.params)
        checkpoints.save(step, params, state, {"at": step}, {"loss": loss})
    checkpoints.close()
    again = Checkpoints(f"{bucket}/checkpoints", keep_last=1, best="loss:min", arch=model.arch)
    assert again.steps() == finished_steps(f"{bucket}/checkpoints") == [1, 3] and again.best() == 1
    restored = again.restore_params(3, model.params)
    assert equal(restored, jax.tree.map(lambda w: w + 3, model.params))
    assert again.restore_data(3) == {"at": 3}
    again.close()


def test_a_checkpoint_that_was_cut_short_is_none(bucket, model):
    where = f"{bucket}/short"
    save_params(where, model.arch, model.params, step=1)
    save_params(where, model.arch, model.params, step=2)
    assert finished_steps(where) == [2]  # one is kept
    (place(where) / "checkpoints" / "2" / "commit_success.txt").unlink()
    assert finished_steps(where) == []
    with pytest.raises(ValueError, match=rf"{where}: expected checkpoints/<step>, got none"):
        load_params(where)


def test_an_artifact_there_and_back(bucket, model, tmp_path, capsys):
    """Exported, imported into the bucket, exported from there: the same files."""
    export_hf(model.folder, tmp_path / "hf")
    import_hf(tmp_path / "hf", f"{bucket}/imported")
    arch, params = load_model(f"{bucket}/imported")
    assert arch == model.arch and equal(params, model.params)
    assert load_tokenizer(f"{bucket}/imported").encode("sort up") == load_tokenizer(model.folder).encode(
        "sort up"
    )
    assert cli.main(["export", f"{bucket}/imported", str(tmp_path / "again")]) == 0
    names = buckets.names_in(tmp_path / "hf")
    assert {"config.json", "tokenizer.json"} < names == buckets.names_in(tmp_path / "again")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert cli.main(["import", str(tmp_path / "hf"), f"{bucket}/imported"]) == 2
    assert f"{bucket}/imported: already exists; remove it" in capsys.readouterr().err
    assert cli.main(["export", f"{bucket}/imported", f"{bucket}/hf"]) == 2
    assert f"{bucket}/hf: expected a path on this machine" in capsys.readouterr().err


# --- stages


def test_a_training_and_what_follows(bucket, model, tmp_path):
    cfg = pretraining(model.folder)
    here, there = pretrain.run(cfg, tmp_path / "here"), pretrain.run(cfg, f"{bucket}/pretrain")
    assert there == here == read_result(f"{bucket}/pretrain")
    kept = {"step", "train/loss", "train/grad_norm"}
    rows = [
        [{k: r[k] for k in kept & r.keys()} for r in read_metrics(at)]
        for at in (tmp_path / "here", f"{bucket}/pretrain")
    ]
    assert rows[0] == rows[1]
    assert equal(load_params(tmp_path / "here")[1], load_params(f"{bucket}/pretrain")[1])
    done = read_done(f"{bucket}/pretrain")
    assert done == read_done(f"{bucket}/pretrain") and pretrain.run(cfg, f"{bucket}/pretrain") == here
    assert read_done(f"{bucket}/pretrain") == done  # answered from DONE
    with pytest.raises(
        OtherRun, match=r"pretrain: the work directory of another run, which differs in fit.steps"
    ):
        pretrain.run(pretraining(model.folder, steps=5), f"{bucket}/pretrain")
    data = {"sources": [{"name": "sort3", "num": 24}], "length": 128, "batch_size": 8, "heldout_num": 8}
    tuned = {"model": f"{bucket}/pretrain", "data": data, "fit": {"steps": 2, "log_every": 1}}
    sft.run(from_dict(sft.Config, tuned), f"{bucket}/sft")
    assert finished_steps(f"{bucket}/sft") == [2] and load_tokenizer(f"{bucket}/sft").vocab_size == 300
    asked = {"problems": {"families": ["sum2x1"], "count": 1}, "max_new_tokens": 2}
    exam = {
        "models": {"tuned": f"{bucket}/sft"},
        "tasks": asked,
        "data": {"length": 64, "heldout_batches": 1},
    }
    exam["latency"] = {"batch": 1, "prompt": 8, "new_tokens": 2, "repeats": 1}
    evaluate.run(from_dict(evaluate.Config, exam), f"{bucket}/exam")
    ways = {
        "ways": {"one": [f"{bucket}/pretrain"], "other": [str(tmp_path / "here")]},
        "numbers": {"size": "num_params"},
    }
    compared = compare.run(from_dict(compare.Config, ways), f"{bucket}/compare")
    assert compared["ways"]["one"] == {"size": [here["num_params"]]} == compared["ways"]["other"]
    records = load_records(place(f"{bucket}/exam") / "tasks_tuned.jsonl")
    assert records and all(record["family"] == "sum2x1" for record in records)


TEXTS = {"length": 64, "batch_size": 8, "heldout_batches": 1}


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_a_compression(bucket, model, tmp_path):
    """Library, scores and child, as in a folder; and what was searched is searched from there."""
    values = {
        "parent": str(model.folder),
        "data": {"length": 64, "batch_size": 8},
        "space": {"attn_noop": False, "ffn_ratios": [0.5], "multiple": 8},
        "bld": {"steps": 2},
        "importance": {"batches": 1},
        "scoring": {"batches": 1},
        "cost": {"timings": []},
        "budget": {"ratio": {"params": 0.8}},
    }
    cfg = from_dict(compress.Config, values)
    here, there = compress.run(cfg, tmp_path / "here"), compress.run(cfg, f"{bucket}/compress")
    assert {**here, "seconds": 0} == {**there, "seconds": 0}
    (arch, child), (other, twin) = load_params(tmp_path / "here"), load_params(f"{bucket}/compress")
    assert arch == other and arch.blocks != model.arch.blocks and equal(child, twin)
    table = place(f"{bucket}/compress") / "table.json"
    assert json.loads(table.read_text()) == json.loads((tmp_path / "here" / "table.json").read_text())
    assert load_table(str(table)).layers
    with pytest.raises(
        ValueError, match=rf"^bld.window: expected a --workdir on this machine, got {bucket}/w;"
    ):
        compress.run(from_dict(compress.Config, values | {"bld": {"window": 1}}), f"{bucket}/w")


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_tokenizer_a_pruning_and_a_fusion(bucket, model, tmp_path):
    cfg = from_dict(tokenizer.Config, {"vocab_size": 300})
    assert tokenizer.run(cfg, tmp_path / "tokenizer") == tokenizer.run(cfg, f"{bucket}/tokenizer")
    files = [
        place(at) / "tokenizer" / "tokenizer.json" for at in (tmp_path / "tokenizer", f"{bucket}/tokenizer")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    values = {
        "parent": str(model.folder),
        "data": TEXTS,
        "targets": {"ffn_width": 16},
        "importance": {"batches": 1},
    }
    found = prune.run(from_dict(prune.Config, values), f"{bucket}/pruned")
    assert found == prune.run(from_dict(prune.Config, values), tmp_path / "pruned")
    assert equal(load_params(tmp_path / "pruned")[1], load_params(f"{bucket}/pruned")[1])
    ffn = model.arch.blocks[0].ffn
    arch = model.arch.replace(blocks=(model.arch.blocks[0], *[BlockSpec(NoOp(), ffn)] * 3))
    save_params(
        f"{bucket}/parent",
        arch,
        init_params(arch, jax.random.key(1)),
        tokenizer_dir=model.folder / "tokenizer",
    )
    fusing = {
        "model": f"{bucket}/parent",
        "data": TEXTS,
        "batches": 1,
        "fusion": {"skip_last": 0, "runs": [[1, 3]]},
    }
    fusing["latency"] = {"batch": 1, "prompt": 8, "new_tokens": 2, "repeats": 1}
    fuse.run(from_dict(fuse.Config, fusing), f"{bucket}/fused")
    assert load_params(f"{bucket}/fused")[0].num_layers == 4
    assert buckets.names_in(place(f"{bucket}/fused")) >= {"dependency.json", "dependency.svg", "DONE"}


def recipe(model, folder: Path, **fit) -> Path:
    """A recipe file of `pretraining`, for processes of their own."""
    path = folder / "recipe.py"
    cfg = pretraining(model.folder, **fit)
    path.write_text(
        f"from nemojax.config import from_dict\nfrom nemojax.pretrain import Config\n\n\ndef get_config():\n"
        f"    return {{'tokenizer': {cfg.tokenizer!r}, 'shape': {vars(cfg.shape)!r},\n"
        f"        'data': {{'length': 64, 'batch_size': 8, 'heldout_batches': 1}}, 'fit': {fit!r}}}\n"
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_killed_and_resumed(bucket, model, tmp_path):
    fit = {"steps": 24, "log_every": 1, "checkpoint_every": 8}
    command = [sys.executable, "-m", "nemojax.cli", "pretrain", f"--config={recipe(model, tmp_path, **fit)}"]
    env = os.environ | {"XLA_FLAGS": QUICK_COMPILATION}
    log = tmp_path / "log"
    with log.open("w") as out:
        first = subprocess.Popen([*command, f"--workdir={bucket}/killed"], env=env, stdout=out, stderr=out)
    wait_until(lambda: finished_steps(f"{bucket}/killed"), first, log)
    first.kill()
    first.wait()
    assert read_done(f"{bucket}/killed") is None
    for workdir in (f"{bucket}/killed", str(tmp_path / "whole")):
        done = subprocess.run([*command, f"--workdir={workdir}"], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert read_result(f"{bucket}/killed") == read_result(tmp_path / "whole")
    assert equal(load_params(f"{bucket}/killed")[1], load_params(tmp_path / "whole")[1])
    steps = [row["step"] for row in read_metrics(f"{bucket}/killed") if "train/loss" in row]
    assert steps == list(range(1, 25))


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_two_processes(bucket, model, tmp_path):
    """Each writes its own shards into the bucket; one keeps the books."""
    fit = {"steps": 4, "log_every": 1}
    path = recipe(model, tmp_path, **fit)
    command = ["bash", str(LAUNCHER), "2", "--devices=2", "pretrain", f"--config={path}"]
    env = os.environ | {"XLA_FLAGS": QUICK_COMPILATION, "NEMOJAX_VENV": sys.prefix}
    done = subprocess.run(
        [*command, f"--workdir={bucket}/two", "--config.mesh.fsdp=4"],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pretrain.run(pretraining(model.folder, **fit), tmp_path / "one")
    mine, theirs = (
        [row["train/loss"] for row in read_metrics(at) if "train/loss" in row]
        for at in (tmp_path / "one", f"{bucket}/two")
    )
    assert len(mine) == len(theirs) == 4
    np.testing.assert_allclose(theirs, mine, rtol=1e-5)
    assert load_params(f"{bucket}/two")[0] == load_params(tmp_path / "one")[0]


# --- bad input


def test_a_bucket_that_is_not_there(bucket, model, capsys):
    url = bucket.replace("bucket", "other-bucket")
    with pytest.raises(ValueError, match=rf"^{url}/run: cannot list the bucket {url} \(.*\); check its name"):
        run_stage("pretrain", pretraining(model.folder), f"{url}/run", [], lambda path: {}, buckets=True)
    assert cli.main(["export", f"{url}/run", "out"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ftp://a/b", r"^ftp://a/b: expected a path, gs:// or s3://, got ftp://$"),
        ("gs://", r"^gs://: expected gs://BUCKET/PATH, got no bucket$"),
        ("s3://bucket/", r"^s3://bucket/: expected s3://BUCKET/PATH, got no path$"),
    ],
)
def test_what_is_no_place(path, message):
    with pytest.raises(ValueError, match=message):
        place(path)


@pytest.mark.parametrize(("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_without_its_package(scheme, package, extra, monkeypatch):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    buckets._prepare.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=rf"expected the package {package}, got none; .*'nemojax\[{extra}\]'"
        ):
            place(f"{scheme}://bucket/run")
    finally:
        buckets._prepare.cache_clear()


def test_what_a_bucket_s_client_says_is_one_line():
    from botocore.exceptions import NoCredentialsError
    from gcsfs.retry import HttpError

    assert cli.user_message(NoCredentialsError()) == "Unable to locate credentials"
    assert "Forbidden" in (cli.user_message(HttpError({"message": "Forbidden", "code": 403})) or "")


def test_metrics_that_a_bucket_does_not_take_end_no_training(bucket, monkeypatch, caplog):
    def refuse(source, target):
        raise OSError("Forbidden")

    log = RunLog(f"{bucket}/refused", quiet=True)
    log.write(1, {"train/loss": 2.0})
    with monkeypatch.context() as patch:
        patch.setattr("nemojax.log.copy_file", refuse)
        log.flush()
        assert "refused: metrics are not there yet (Forbidden)" in caplog.text
    log.write(2, {"train/loss": 1.0})
    log.close()
    assert [row["step"] for row in read_metrics(f"{bucket}/refused")] == [1, 2]
    last = RunLog(f"{bucket}/refused", quiet=True)
    last.write(3, {"train/loss": 1.0})
    monkeypatch.setattr("nemojax.log.copy_file", refuse)
    with pytest.raises(OSError, match="Forbidden"):
        last.close()
