"""An NVIDIA GPU: its attention kernels and compiler options."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nemojax.backends.rows import SAVED, Rows, fill_rows

KERNELS: tuple[Any, ...] = ("cudnn", "tokamax")

# what XLA calls the pipelining of collectives, and what turns it on: changed between two versions of jax
_PIPELINED: tuple[str, bool | str] = (
    ("xla_gpu_pipeline", "COLLECTIVE_PIPELINING_MODE_ON")
    if jax.__version_info__ >= (0, 11, 1)
    else ("xla_gpu_enable_pipelined", True)
)

COMPILER_OPTIONS: Mapping[str, bool | str] = {
    # matmuls go to cuBLASLt, which has FP8 and fused epilogues, instead of kernels that XLA writes
    "xla_gpu_enable_triton_gemm": False,
    # collectives run beside the computation that does not wait for them
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_highest_priority_async_stream": True,
    # weights of the next layer of a scan are gathered, and gradients of the last one scattered, meanwhile
    **{f"{_PIPELINED[0]}_{kind}": _PIPELINED[1] for kind in ("all_gather", "reduce_scatter", "all_reduce")},
    # a product that a scan keeps for the backward pass is computed twice otherwise, once into its stack
    "xla_gpu_enable_dynamic_slice_fusion": False,
    # two buffers in turn for what a scan carries, instead of a copy in each of its steps
    "xla_gpu_enable_while_loop_double_buffering": True,
}

# Positions from which on a kernel of its own is taken: at 512 tokamax's is 4 times as fast as `short` (8,192
# tokens of 32 heads of 128 channels on an H200, forwards and backwards: tests/benchmarks/gpu.py)
LEAST = 512

TOKAMAX = "0.0."  # versions whose inner interface is the one below
_BLOCK = 128  # positions that a block of tokamax's kernels has at most, for queries of two warp groups


def decoding_options(devices: int) -> Mapping[str, int | str]:
    """Of programs that decode on so many devices, beside the others."""
    options: dict[str, int | str] = {
        # products of one operand, as for queries, keys and values, stay apart: for one large product XLA
        # would write their weights down side by side in every step
        "xla_gpu_dot_merger_threshold_mb": 0
    }
    if devices == 1:
        # Such products, each too small to keep the memory busy, run at once. Not on a mesh: no two arrays of
        # a program share memory then, and of layers in a stack a step makes copies.
        options["xla_gpu_command_buffer_scheduling_mode"] = "CONCURRENT"
    return options


def refusal(kernel: str, rows: Rows) -> str | None:
    """Why a kernel cannot serve `rows`; None when it can."""
    if kernel == "splash":
        return "it is a kernel for TPUs"
    if jnp.dtype(rows.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16, not in {jnp.dtype(rows.dtype).name}"
    if kernel == "tokamax":
        if rows.head_dim % 64 or rows.head_dim > 256:
            return f"its heads have 64, 128, 192 or 256 channels, not {rows.head_dim}"
        missing = f"tokamax {TOKAMAX}* is not installed (the extras `cuda12` and `cuda13` bring it)"
        return None if tokamax_kernels() else missing
    if rows.packed:
        return "it knows no documents within a row"
    if rows.head_dim % 8 or rows.head_dim > 128:
        return f"its heads have up to 128 channels, a multiple of 8, not {rows.head_dim}"
    return None if cudnn_version() else "cuDNN is not installed (the extras `cuda12` and `cuda13` bring it)"


@functools.cache
def cudnn_version() -> int | None:
    """As 91002 for 9.10.2; None without cuDNN or the CUDA plugin. Asks for no device."""
    from jax._src.lib import cuda_versions  # what `jax.nn.dot_product_attention` asks, too

    try:
        return cuda_versions.cudnn_get_version() if cuda_versions else None
    except RuntimeError:  # the plugin is there, the library is not
        return None


def attend_cudnn(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, window: int | None = None
) -> jax.Array:
    """cuDNN's flash attention over rows of one document each; [B, T, N, H]."""
    before = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=before, implementation="cudnn"
    )


@functools.cache
def tokamax_kernels() -> tuple[Any, Any, Any] | None:
    """(type of a mask, kernel for Hopper and later, kernel for any GPU) of tokamax; None without.

    Where a document begins goes into the mask by its inner interface alone; hence the versions.
    """
    try:
        if not metadata.version("tokamax").startswith(TOKAMAX):
            return None
        # it would read this process's command line as its own, and warn at every size it was not tuned for
        flags = importlib.import_module("absl.flags").FLAGS
        if not flags.is_parsed():
            flags.mark_as_parsed()
        logging.getLogger("absl").addFilter(lambda record: "Autotuning cache miss" not in str(record.msg))
        masks = importlib.import_module("tokamax._src.ops.attention.base")
        kernels = importlib.import_module("tokamax._src.ops.attention.api").IMPLEMENTATIONS
        # programs for a GPU are compiled without one as well
        flags.tokamax_cross_compile = True
        return masks.Mask, kernels["mosaic_gpu"], kernels["triton"]
    except (ImportError, KeyError, AttributeError):
        return None


def attend_tokamax(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int | None = None,
) -> jax.Array:
    """tokamax's flash attention inside each document of packed rows whose columns are in order.

    By the kernel for Hopper on such a device, else (and compiled without a device) by Triton's; [B, T, N, H].
    Blocks before a query's document are left out.
    """
    found = tokamax_kernels()
    assert found is not None, "refused by `refusal`"
    mask_type, *kernels = found
    length = q_BTNH.shape[1]
    full = -(-length // _BLOCK) * _BLOCK
    q_BTNH, k_BTKH, v_BTKH, segments_BT = fill_rows((q_BTNH, k_BTKH, v_BTKH, segments_BT), full)
    first_BT = document_starts(segments_BT)
    if window is not None:
        first_BT = jnp.maximum(first_BT, jnp.arange(full) - window + 1)
    for kernel in kernels:
        try:
            out: Any = _tokamax(q_BTNH, k_BTKH, v_BTKH, first_BT, mask_type, kernel)
            return out[:, :length]
        except NotImplementedError:
            if kernel is kernels[-1]:
                raise
    raise AssertionError("there are kernels")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _tokamax(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, first_BT: jax.Array, mask_type: Any, kernel: Any
) -> jax.Array:
    return kernel(q_BTNH, k_BTKH, v_BTKH, mask=mask_type(is_causal=True, k_start=first_BT[:, None]))


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, first_BT: jax.Array, mask_type: Any, kernel: Any):
    mask = mask_type(is_causal=True, k_start=first_BT[:, None])
    out, sums = kernel(q, k, v, mask=mask, return_residuals=True)
    # by a name, which tokamax gives them not: else rematerialisation would run the kernel a second time
    out, sums = jax.tree.map(lambda x: checkpoint_name(x, SAVED), (out, sums))
    return out, (q, k, v, first_BT, out, sums)


def _backward(mask_type: Any, kernel: Any, saved: tuple[Any, ...], d_BTNH: jax.Array):
    q, k, v, first_BT, out, sums = saved
    bound = kernel.bind(q, k, v, mask=mask_type(is_causal=True, k_start=first_BT[:, None]))
    settings = {name: value for name, value in bound.kwargs.items() if name != "return_residuals"}
    gradients = kernel.vjp(sums, out, d_BTNH, *bound.args, **settings)
    return gradients["q"], gradients["k"], gradients["v"], None


_tokamax.defvjp(_forward, _backward)


def document_starts(segments_BT: jax.Array) -> jax.Array:
    """The column in which each column's document begins, [B, T]."""
    new_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
    return jax.lax.cummax(jnp.where(new_BT, jnp.arange(segments_BT.shape[1]), 0), axis=1)
