"""The quickstart keeps its promises: it is run whole, by the command that the README gives, default seed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "configs" / "quickstart.py"


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path):
    command = [sys.executable, "-m", "nemojax.cli", "run", f"--config={RECIPE}", f"--workdir={tmp_path}"]
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}  # one device, as a reader has
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

    def result(stage: str) -> dict:
        return json.loads((tmp_path / stage / "result.json").read_text())

    compress, distill, lm_only, rl = map(result, ("compress", "distill", "distill_lm", "rl"))
    assert compress["block_params_ratio"] <= 0.7
    assert distill["gap_nats"] >= 0.1 and distill["gap_closed"] >= 2 / 3
    assert distill["tokens"] == lm_only["tokens"] and lm_only["gap_closed"] > 0
    evaluation = result("evaluate")
    spell = evaluation["models"]["sft"]["tasks"]["on"]["spell"]
    assert spell["prompts"] >= 256 and spell["pass@1"] >= 0.8
    assert evaluation["commonest_answer_share"]["spell"] <= 0.25
    assert rl["before"]["on"]["all"]["prompts"] >= 512 and rl["gain"]["all"]["low"] > 0
    assert (tmp_path / "report.html").stat().st_size > 0
    assert json.loads((tmp_path / "export" / "config.json").read_text())["architectures"]
