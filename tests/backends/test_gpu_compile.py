"""Steps in FP8 compiled for H100s that are not there: all products with block weights are FP8 calls of
cuBLASLt, forwards and backwards.

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
# XLA makes one product of small ones that share an operand, forwards of q, k and v and of gate and up, and of
# their weight gradients; the products backwards with the weights themselves share none
MERGED = 4 + 3 + 3
E4M3, E5M2 = "f8e4m3fn", "f8e5m2"
BF16 = "__cublas$lt$matmul"


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-m", "tests.backends.h100"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def products(found, *operands: str) -> list[str]:
    """Types of the results of FP8 products of these two operands, in either order."""
    return [call[1] for call in found["calls"] if call[0] == F8 and sorted(call[2:4]) == sorted(operands)]


def count(found, target: str) -> int:
    return sum(call[0] == target for call in found["calls"])


def test_a_training_step(report):
    """Each weight is in a call forwards and in two backwards, and that many fewer are left in bf16."""
    found, plain = report["train fp8 none"], report["train default none"]
    assert products(found, E4M3, E4M3) == ["bf16"] * MERGED
    # the gradient of activations in their dtype, that of a weight in the weight's
    assert sorted(products(found, E4M3, E5M2)) == ["bf16"] * WEIGHTS + ["f32"] * MERGED
    assert count(found, F8) == WEIGHTS + 2 * MERGED and not count(plain, F8)
    assert count(plain, BF16) - count(found, BF16) == count(found, F8)


def test_a_training_step_that_recomputes_its_blocks(report):
    found = report["train fp8 full"]
    assert len(products(found, E4M3, E5M2)) == WEIGHTS + MERGED
    # forwards twice, but for results that nothing in the backward pass reads
    assert MERGED < len(products(found, E4M3, E4M3)) <= 2 * MERGED


def test_products_of_a_loop_are_kept_and_computed_once(report):
    """In each of the loop's two buffers. Queries, keys and values are one product, but for the gradients of
    their input; those of the head are f32."""
    found = [call for call in report["loop"]["calls"] if call[0] == BF16 and call[1] == "bf16"]
    assert len(found) == 2 * (5 + 7 + 5)


def test_a_decoding_step(report):
    """Every product is in FP8, and the arguments are a byte a block weight beside the cache."""
    found = report["decode"]
    assert products(found, E4M3, E4M3) == ["bf16"] * MERGED
    held = found["weights"] + found["cache"]
    assert held <= found["arguments"] < 1.01 * held


@pytest.mark.parametrize("rows", [1, 64])
def test_a_decoding_step_reads_weights_and_cache_where_they_are(report, rows):
    """The caches of a layer in bf16 are larger than this, and so are its weights, and the head's in f32."""
    found = report[f"decoding {rows}"]
    assert found["temporaries"] < found["matrix"]
    assert count(found, "__gpu$xla.gpu.triton") == 4  # attention over the cache
    assert count(found, BF16) == 4 * 7 + 1


def test_the_kernel_over_a_cache_has_room_for_every_kind_of_heads(report):
    """Of 256 channels, and for prompts, a multiprocessor holds fewer blocks of keys at once."""
    assert len(report["cache kernels"]["compiled"]) == 3 * 2 * 2


def test_devices_that_share_weights_gather_them_as_fp8(report):
    found = report["sharded"]
    assert len(products(found, E4M3, E4M3)) == 4 and len(products(found, E4M3, E5M2)) == 8
    assert found["gathered"].count(E4M3) >= 4
    # gradients of activations, of 2 x 128 x 256 numbers here, arrive in parts; the head's, in f32, as a whole
    assert max(size for kind, size in found["summed"] if kind == "bf16") < 2 * 128 * 256


def test_one_token_does_not_gather_the_embedding(report):
    assert not report["one token"]["gathered"]


def test_layers_that_stand_alone_are_taken_back_one_by_one(report):
    """Left free, a scheduler keeps what all of them have computed again until it sums up their gradients."""
    found = report["layers that stand alone"]
    assert found["held"] < 0.5 * found["free"]
