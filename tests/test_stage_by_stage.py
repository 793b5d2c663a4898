"""The shipped recipe, one stage at a time, through real command lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "configs" / "quickstart.py"


def run(workdir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemojax.cli", "run", f"--config={RECIPE}:small", f"--workdir={workdir}"]
    env = os.environ | {"XLA_FLAGS": "", "COLUMNS": "120"}
    return subprocess.run([*command, *arguments], env=env, capture_output=True, text=True)


def test_pretrain_follows_tokenizer(tmp_path):
    workdir = tmp_path / "small"
    early = run(workdir, "--only=pretrain")
    assert early.returncode == 2
    assert "tokenizer: not done, and pretrain needs it; run it first" in early.stderr

    first = run(workdir, "--only=tokenizer")
    assert first.returncode == 0, first.stderr[-2000:]
    vocab_size = json.loads((workdir / "tokenizer" / "result.json").read_text())["vocab_size"]
    assert vocab_size == 512 and not (workdir / "pretrain").exists()
    made = (workdir / "tokenizer" / "DONE").read_text()

    second = run(workdir, "--only=pretrain")
    assert second.returncode == 0, second.stderr[-2000:]
    assert (workdir / "tokenizer" / "DONE").read_text() == made  # read, not made again
    assert not (workdir / "replaced").exists() and not (workdir / "compress").exists()
    rows = [json.loads(line) for line in (workdir / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((workdir / "pretrain" / "result.json").read_text())
    assert rows[-1]["step"] == result["steps"] and (workdir / "pretrain" / "DONE").is_file()
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert result["heldout"]["loss"] < 4.5 < losses[0]  # from log 512 = 6.2 nats

    again = run(workdir, "--only=pretrain")
    assert again.returncode == 0 and "pretrain: done before" in again.stdout
