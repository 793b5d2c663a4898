"""How much each FFN channel and each KV group of a parent matters.

`activation`: a channel counts mean |a_j| * ||W_down[j]|| over calibration tokens, a KV group the mean norm of
what its query heads add to the residual stream. `magnitude`: the norm of the weights alone.
Legend: B batch, T tokens, D model, N query heads, K kv heads, H head dim, F ffn.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec, Attention, BlockSpec, SwiGLU
from nemojax.compress.subblock import layers_of
from nemojax.config import field
from nemojax.model.attention import Context, make_context
from nemojax.model.block import apply_block
from nemojax.model.layout import run_name
from nemojax.model.llama import Compute, embed

Method = Literal["activation", "magnitude"]


@dataclass(frozen=True)
class ImportanceConfig:
    """How channels and KV groups are ranked before anything is cut."""

    method: Method = field("activation", "activation (calibration data) or magnitude (weights alone)")
    batches: int = field(4, "calibration batches to average over")


@dataclass(frozen=True)
class Importance:
    """Scores by layer, larger matters more: `ffn[layer]` [F], `kv[layer]` [K]; absent where there is none."""

    ffn: dict[int, np.ndarray]
    kv: dict[int, np.ndarray]


def measure(
    params: dict,
    arch: ArchSpec,
    batches: Iterable[dict],
    method: Method = "activation",
    compute: Compute = Compute(),
) -> Importance:
    """Importance of every channel and KV group of `params`; `batches` are read only by `activation`."""
    if method == "magnitude":
        return _by_magnitude(params, arch)
    totals: list[Any] | None = None
    tokens = 0.0
    for batch in batches:
        arrays = (batch["tokens"], batch["positions"], batch["segments"])
        sums = jax.device_get(_batch_sums(params, *arrays, arch=arch, compute=compute))
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        tokens += float((np.asarray(batch["segments"]) > 0).sum())
    if totals is None or tokens == 0:
        raise ValueError("importance: expected at least one calibration batch with tokens, got none")
    result = Importance({}, {})
    for run, sums in zip(arch.runs(), totals, strict=True):
        for part, scores in (("ffn", result.ffn), ("kv", result.kv)):
            if part in sums:
                scores.update({layer: sums[part][i] / tokens for i, layer in enumerate(run.layers)})
    return result


def save(importance: Importance, path: str | Path) -> None:
    """One .npz with arrays `ffn/3`, `kv/3`, written whole or not at all."""
    arrays = {f"{part}/{i}": a for part in ("ffn", "kv") for i, a in getattr(importance, part).items()}
    partial_path = Path(path).with_suffix(".partial")
    with partial_path.open("wb") as file:
        np.savez(file, **arrays)
    partial_path.replace(path)


def load(path: str | Path) -> Importance:
    result = Importance({}, {})
    try:
        with np.load(path) as arrays:
            for name in arrays.files:
                part, layer = name.split("/")
                getattr(result, part)[int(layer)] = arrays[name]
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it and run again to measure it") from error
    return result


@partial(jax.jit, static_argnames=("arch", "compute"))
def _batch_sums(
    params: dict,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    *,
    arch: ArchSpec,
    compute: Compute,
) -> list:
    """Sums over one batch's tokens, a {"ffn": [n,F], "kv": [n,K]} for each run."""
    ctx = make_context(arch, positions, segments)
    mask_BT = (segments > 0).astype(jnp.float32)
    h = embed(params, tokens, compute)
    sums = []
    for index, run in enumerate(arch.runs()):
        body = partial(_layer_sums, arch, run.spec, ctx, mask_BT)
        h, run_sums = jax.lax.scan(body, h, params["runs"][run_name(index)])
        sums.append(run_sums)
    return sums


def _layer_sums(
    arch: ArchSpec, spec: BlockSpec, ctx: Context, mask_BT: jax.Array, h_BTD: jax.Array, p: dict
) -> tuple[jax.Array, dict[str, jax.Array]]:
    seen: dict[str, jax.Array] = {}
    h_BTD = apply_block(arch, spec, p, h_BTD, ctx, capture=seen)
    sums: dict[str, jax.Array] = {}
    if isinstance(spec.attn, Attention):
        grouped = (spec.attn.num_kv_heads, -1)  # query heads stand next to those that share their KV head
        batch, length, _, head_dim = seen["heads_BTNH"].shape
        heads_BTKGH = seen["heads_BTNH"].reshape(batch, length, *grouped, head_dim)
        o_KGHD = p["attn"]["o"].reshape(*grouped, *p["attn"]["o"].shape[1:]).astype(heads_BTKGH.dtype)
        added_BTKD = jnp.einsum("BTKGH,KGHD->BTKD", heads_BTKGH, o_KGHD)
        norms_BTK = jnp.linalg.norm(added_BTKD.astype(jnp.float32), axis=-1)
        sums["kv"] = jnp.einsum("BTK,BT->K", norms_BTK, mask_BT)
    if isinstance(spec.ffn, SwiGLU):
        size_F = jnp.einsum("BTF,BT->F", jnp.abs(seen["act_BTF"]).astype(jnp.float32), mask_BT)
        sums["ffn"] = size_F * jnp.linalg.norm(p["ffn"]["down"].astype(jnp.float32), axis=1)
    return h_BTD, sums


def _by_magnitude(params: dict, arch: ArchSpec) -> Importance:
    result = Importance({}, {})
    for layer, p in layers_of(params, arch):
        spec = arch.blocks[layer]
        if isinstance(spec.ffn, SwiGLU):
            squares = [_squares(p["ffn"][name], axis) for name, axis in (("gate", 1), ("up", 1), ("down", 0))]
            result.ffn[layer] = np.sqrt(sum(squares))
        if isinstance(spec.attn, Attention):
            num_kv = spec.attn.num_kv_heads
            per_query = _squares(p["attn"]["q"], 1) + _squares(p["attn"]["o"], 0)
            per_kv = _squares(p["attn"]["k"], 1) + _squares(p["attn"]["v"], 1)
            result.kv[layer] = np.sqrt(per_kv + per_query.reshape(num_kv, -1).sum(axis=1))
    return result


def _squares(w: np.ndarray, axis: int) -> np.ndarray:
    """Sums of squares along every axis but `axis`."""
    other = tuple(a for a in range(w.ndim) if a != axis)
    return np.square(w.astype(np.float32)).sum(axis=other)
