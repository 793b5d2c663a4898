"""What channels and KV groups do on calibration data, from forward passes alone.

A feed-forward channel counts mean |a_j| * ||W_down[j]|| (Puzzle, arXiv 2411.19146, App. A), a KV group the
mean norm of what its query heads add to the residual stream, an embedding channel the size of the normed
stream: mean |LN(X)_i| over a row's tokens, L2 over rows, summed over the norms of all sub-blocks (Minitron,
arXiv 2407.14679, section 2; the final norm does not count).
Legend: B batch, T tokens, D model, N query heads, K KV heads, G queries a group, H head dim, F ffn.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec, Attention, BlockSpec, NoOp, SwiGLU
from nemojax.compress.structures import Structure, by_layer, replicated
from nemojax.compress.subblock import PARTS, sub_of
from nemojax.model.attention import Context
from nemojax.model.block import apply_block, rms_norm
from nemojax.model.layout import run_name
from nemojax.model.llama import Compute, batch_context, embed


class ActivationMeter:
    """Adds up sums over tokens, on the device, a batch at a time."""

    def __init__(self, params: dict, arch: ArchSpec, parts: set[Structure], compute: Compute):
        self.params, self.arch, self.parts, self.compute = params, arch, parts, compute
        self.sums: Any = None

    def update(self, batch: Mapping[str, jax.Array]) -> None:
        parts = tuple(sorted(self.parts))
        sums = _batch_sums(self.params, batch, arch=self.arch, parts=parts, compute=self.compute)
        self.sums = sums if self.sums is None else add(self.sums, sums)

    def result(self) -> dict[str, Any]:
        sums = jax.device_get(self.sums)
        scores: dict[str, Any] = {}
        for part in ("ffn", "kv"):
            if part in self.parts:
                found = by_layer(self.arch, sums["runs"], part)
                scores[part] = {layer: value / sums["tokens"] for layer, value in found.items()}
        if "embed" in self.parts:
            norms = [
                np.sqrt(run[f"embed/{part}"])
                for run in sums["runs"]
                for part in PARTS
                if f"embed/{part}" in run
            ]
            scores["embed"] = np.sum([n.sum(axis=0) for n in norms], axis=0) + np.zeros(
                self.arch.dim, np.float32
            )
        return scores


@partial(jax.jit, donate_argnums=0)
def add(total: Any, more: Any) -> Any:
    """Sum of two trees, in the place of the first."""
    return jax.tree.map(jnp.add, total, more)


def token_mask(batch: Mapping[str, jax.Array]) -> jax.Array:
    """[B, T] f32, one where there is a token and zero where a row is padded."""
    return (batch["segments"] > 0).astype(jnp.float32)


@partial(jax.jit, static_argnames=("arch", "parts", "compute"))
def _batch_sums(
    params: dict,
    batch: Mapping[str, jax.Array],
    *,
    arch: ArchSpec,
    parts: tuple[Structure, ...],
    compute: Compute,
) -> dict[str, Any]:
    """Sums over one batch: {"tokens": [], "runs": [{part: [n, ...]}, ...]}."""
    ctx, mask_BT = batch_context(arch, batch), token_mask(batch)
    h_BTD = embed(params, batch["tokens"], compute)
    runs = []
    for index, run in enumerate(arch.runs()):
        body = partial(_layer_sums, arch, run.spec, parts, ctx, mask_BT)
        h_BTD, sums = jax.lax.scan(body, h_BTD, params["runs"][run_name(index)])
        runs.append(sums)
    return replicated({"tokens": mask_BT.sum(), "runs": runs})


def _layer_sums(
    arch: ArchSpec,
    spec: BlockSpec,
    parts: tuple[Structure, ...],
    ctx: Context,
    mask_BT: jax.Array,
    h_BTD: jax.Array,
    p: dict,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    seen: dict[str, jax.Array] = {}
    after_BTD = apply_block(arch, spec, p, h_BTD, ctx, capture=seen)
    sums: dict[str, jax.Array] = {}
    if "kv" in parts and isinstance(spec.attn, Attention):
        norms_BTK = _group_norms(seen["heads_BTNH"], p["attn"]["o"], spec.attn.num_kv_heads)
        sums["kv"] = jnp.sum(norms_BTK * mask_BT[..., None], axis=(0, 1))
    if "ffn" in parts and isinstance(spec.ffn, SwiGLU):
        size_BTF = jnp.abs(seen["act_BTF"].astype(jnp.float32))
        norms_F = jnp.linalg.norm(p["ffn"]["down"].astype(jnp.float32), axis=1)
        sums["ffn"] = jnp.sum(size_BTF * mask_BT[..., None], axis=(0, 1)) * norms_F
    if "embed" in parts:
        for part, x_BTD in zip(PARTS, (h_BTD, seen["between_BTD"]), strict=True):
            if not isinstance(sub_of(spec, part), NoOp):
                normed_BTD = rms_norm(x_BTD, p[part]["norm"], arch.norm_eps).astype(jnp.float32)
                sums[f"embed/{part}"] = _rows_squared(normed_BTD, mask_BT)
    return after_BTD, sums


def _group_norms(heads_BTNH: jax.Array, o_NHD: jax.Array, num_groups: int) -> jax.Array:
    """The norm of what each KV group's query heads add to the stream, [B, T, K] f32."""
    b, t, n, head_dim = heads_BTNH.shape
    # query heads stand next to those that share their KV head
    heads_BTKGH = heads_BTNH.reshape(b, t, num_groups, n // num_groups, head_dim)
    o_KGHD = o_NHD.reshape(num_groups, n // num_groups, *o_NHD.shape[1:]).astype(heads_BTNH.dtype)
    added_BTKD = jnp.einsum("BTKGH,KGHD->BTKD", heads_BTKGH, o_KGHD)
    return jnp.linalg.norm(added_BTKD.astype(jnp.float32), axis=-1)


def _rows_squared(normed_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sum over rows of the square of the mean of |x| over a row's tokens, [D]."""
    tokens_B1 = jnp.maximum(mask_BT.sum(axis=1, keepdims=True), 1.0)
    mean_BD = jnp.sum(jnp.abs(normed_BTD) * mask_BT[..., None], axis=1) / tokens_B1
    return jnp.sum(jnp.square(mean_BD), axis=0)
