"""A TPU: its attention kernel and compiler options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemojax.backends.rows import Rows

KERNELS: tuple[Any, ...] = ("splash",)

# Positions from which on it is taken: two blocks of it. The scores of `short` are by then four times as large
# as the queries (128 channels, bf16), and go through memory several times.
LEAST = 1024

COMPILER_OPTIONS: Mapping[str, bool | str] = {
    # weights are gathered while matrices are multiplied: FSDP's collectives, cut into steps of a fusion
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    # gradients are summed over data-parallel slices one by one, as soon as each is there
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}


def refusal(kernel: str, rows: Rows) -> str | None:
    """Why a kernel cannot serve `rows`; splash serves any length, head dim and dtype."""
    return None if kernel == "splash" else "it is a kernel for GPUs"


def decoding_options(devices: int) -> Mapping[str, int | str]:
    """Of programs that decode, beside the others: none."""
    return {}
