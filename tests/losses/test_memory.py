"""What the vocabulary losses need on a chip, by its compiler: run as the benchmark that prints it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "vocab_loss.py"


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("NEMOJAX_LIBTPU") or importlib.util.find_spec("libtpu")),
    reason="libtpu is not installed (200 MB; the extra `tpu`)",
)
def test_one_pass_of_chunks_needs_a_tenth_of_the_straightforward_loss():
    env = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NEMOJAX_CUDA_PLUGINS")
    }
    command = [sys.executable, str(BENCHMARK), "--chunks=512", "--heads=bfloat16"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert out.returncode == 0, out.stderr
    found = dict(re.findall(r"bfloat16 +(straightforward|one pass).*? ([0-9.]+) GiB", out.stdout))
    assert float(found["straightforward"]) > 9  # two of three logits in f32 and their gradient
    assert float(found["one pass"]) < float(found["straightforward"]) / 10
