"""Steps in FP8 compiled for H100s that are not there: every product with a block weight is a call of cuBLASLt in
FP8, forwards and backwards.

The test needs a folder with `jax-cuda12-plugin` and `jax-cuda12-pjrt` in the versions that belong to jax
(`pip install --target DIR --no-deps`), named by NEMOJAX_CUDA_PLUGINS.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.h100 import F8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("NEMOJAX_CUDA_PLUGINS"),
        reason="NEMOJAX_CUDA_PLUGINS names no folder with jax-cuda12-plugin and jax-cuda12-pjrt (478 MB)",
    ),
]
WEIGHTS = 7 + 4 + 5  # of the three kinds of block, each compiled once: q k v o gate up down, or one for three
E4M3, E5M2 = "f8e4m3fn", "f8e5m2"


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-m", "tests.backends.h100"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def products(found, *operands: str) -> list[str]:
    """Types of the results of FP8 products of these two operands, in either order."""
    return [
        call[1] for call in found["calls"] if call[0] == F8 and sorted(call[2:4]) == sorted(operands)
    ]


def others(found) -> int:
    return sum("matmul" in call[0] or "gemm" in call[0] for call in found["calls"]) - sum(
        call[0] == F8 for call in found["calls"]
    )


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_training_step(report, remat):
    found, plain = report[f"train fp8 {remat}"], report[f"train default {remat}"]
    forward, backward = products(found, E4M3, E4M3), products(found, E4M3, E5M2)
    passes = 2 if remat == "full" else 1
    assert forward == ["bf16"] * len(forward) and len(forward) == passes * WEIGHTS
    # the gradient of activations in their dtype, that of a weight in the weight's
    assert sorted(backward) == ["bf16"] * WEIGHTS + ["f32"] * WEIGHTS
    assert sum(call[0] == F8 for call in found["calls"]) == len(forward) + len(backward)
    # what is left in bf16 are attention, head and loss
    assert not [call for call in plain["calls"] if call[0] == F8]
    assert others(plain) - others(found) == len(forward) + len(backward)


def test_a_decoding_step(report):
    found = report["decode"]
    assert products(found, E4M3, E4M3) == ["bf16"] * WEIGHTS
    assert found["weights"] <= found["arguments"] < 1.6 * found["weights"]
    print(found["weights"], found["arguments"], found["temporaries"])


def test_devices_that_share_weights_gather_them_as_fp8(report):
    found = report["sharded"]
    assert len(products(found, E4M3, E4M3)) == 4 and len(products(found, E4M3, E5M2)) == 8
    assert found["gathered"].count(E4M3) >= 4
