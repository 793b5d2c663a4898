"""A training stage killed for real, in the middle of a step and of a save, ends bit-identical."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from nemojax.checkpoints.artifact import load_params
from nemojax.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.slow

RECIPE = """
def get_config():
    return {{
        "tokenizer": {tokenizer!r},
        "shape": {{"dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_width": 64}}
        | {{"context": 64}},
        "data": {{"length": 64, "batch_size": 8, "heldout_batches": 1}},
        "fit": {{"steps": 60, "log_every": 1, "checkpoint_every": 5}},
    }}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    train_tokenizer(["some text to learn bytes from " * 20], 280, folder / "tokenizer")
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(tokenizer=str(folder / "tokenizer")))
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert start(recipe, workdir).wait() == 0
    return load_params(workdir)[1]


def start(recipe: Path, workdir: Path) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-m", "nemojax.cli", "pretrain", f"--config={recipe}", f"--workdir={workdir}"]
    log = open(workdir.parent / "log.txt", "a")  # noqa: SIM115
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def wait_for(process: subprocess.Popen, condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < end, "nothing to kill"
        time.sleep(0.002)


def steps_logged(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saving(workdir: Path) -> bool:
    return any("tmp" in p.name for p in (workdir / "checkpoints").glob("*")) and steps_logged(workdir) > 12


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param([lambda w: steps_logged(w) >= 3], id="before the first checkpoint"),
        pytest.param([lambda w: steps_logged(w) >= 17, lambda w: steps_logged(w) >= 41], id="in steps"),
        pytest.param([saving], id="in a save"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(recipe, uninterrupted, tmp_path, moments):
    workdir = tmp_path / "run"
    for moment in moments:
        process = start(recipe, workdir)
        wait_for(process, lambda moment=moment: moment(workdir))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (workdir / "DONE").exists()
    assert start(recipe, workdir).wait() == 0, (tmp_path / "log.txt").read_text()[-2000:]
    resumed = load_params(workdir)[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), resumed, uninterrupted))
    steps = [line.split(",")[0] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(set(steps)) == 60


def test_sigterm_exits_75_and_resumes(recipe, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = start(recipe, workdir)
    wait_for(process, lambda: steps_logged(workdir) >= 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert start(recipe, workdir).wait() == 0
    resumed = load_params(workdir)[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), resumed, uninterrupted))
