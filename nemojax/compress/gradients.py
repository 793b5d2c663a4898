"""What the LM loss would lose with each structure, by Taylor's theorem, from calibration gradients.

First order: a weight counts w g, g the gradient of the mean loss. Second order, as LLM-Pruner's mixed
criterion (arXiv 2305.11627, section 3.2; `param_mix` of its code): w g - 1/2 w G w, G the diagonal of the
Fisher matrix in place of the Hessian's, the mean over calibration rows of the squared gradient of the row's
mean loss. A structure counts the sum of |.| over its weights (`elements`), or |the sum| over the weights that
write to the residual stream (`outputs`): to first order that is how much the loss changes when the structure
falls silent, since the model is linear in those weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec
from nemojax.compress.activation import add
from nemojax.compress.structures import Structure, replicated, scores_of, structure_sums
from nemojax.model.llama import Compute
from nemojax.train import lm_loss

Order = Literal[1, 2]
TaylorSum = Literal["elements", "outputs"]


class TaylorMeter:
    """Adds up gradients, f32 and placed like the parameters, a batch at a time."""

    def __init__(
        self,
        params: dict,
        arch: ArchSpec,
        parts: set[Structure],
        order: Order = 1,
        how: TaylorSum = "elements",
        chunk: int = 0,
        compute: Compute = Compute(),
    ):
        self.params, self.arch, self.parts = params, arch, parts
        self.order, self.how, self.chunk, self.compute = order, how, chunk, compute
        self.sums: Any = None

    def update(self, batch: Mapping[str, jax.Array]) -> None:
        batch = {
            k: v for k, v in batch.items() if k in ("tokens", "targets", "positions", "segments", "weights")
        }
        step = _batch_gradient if self.order == 1 else _row_gradients
        sums = step(self.params, batch, arch=self.arch, chunk=self.chunk, compute=self.compute)
        self.sums = sums if self.sums is None else add(self.sums, sums)

    def result(self) -> dict[str, Any]:
        if not float(self.sums["weight"]):
            raise ValueError("importance: expected calibration data with target tokens, got none; add data")
        parts = tuple(sorted(self.parts))
        sums = _structures(self.params, self.sums, arch=self.arch, parts=parts, outputs=self.how == "outputs")
        return scores_of(self.arch, sums, self.parts)


@partial(jax.jit, static_argnames=("arch", "chunk", "compute"))
def _batch_gradient(
    params: dict, batch: Mapping[str, jax.Array], *, arch: ArchSpec, chunk: int, compute: Compute
) -> dict[str, Any]:
    """{"grads": gradient of the summed loss, "weight": target tokens}."""
    weight, grads = _gradient(params, batch, arch, chunk, compute)
    return {"grads": grads, "weight": replicated(weight)}


@partial(jax.jit, static_argnames=("arch", "chunk", "compute"))
def _row_gradients(
    params: dict, batch: Mapping[str, jax.Array], *, arch: ArchSpec, chunk: int, compute: Compute
) -> dict[str, Any]:
    """`_batch_gradient`, and the sum of squared gradients of every row's mean loss ("squares", "rows").

    The rows go through one by one: a squared gradient of several rows at once would be another number.
    """

    def row(total: dict[str, Any], one: Mapping[str, jax.Array]) -> tuple[dict[str, Any], None]:
        one = {k: v[None] for k, v in one.items()}
        weight, grads = _gradient(params, one, arch, chunk, compute)
        scale = 1.0 / jnp.maximum(weight, 1.0)
        more = {
            "grads": grads,
            "squares": jax.tree.map(lambda g: jnp.square(g * scale), grads),
            "weight": weight,
            "rows": (weight > 0).astype(jnp.float32),
        }
        return jax.tree.map(jnp.add, total, more), None

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
    start = {"grads": zeros, "squares": zeros, "weight": jnp.zeros(()), "rows": jnp.zeros(())}
    total, _ = jax.lax.scan(row, start, dict(batch))
    return {**total, "weight": replicated(total["weight"]), "rows": replicated(total["rows"])}


def _gradient(
    params: dict, batch: Mapping[str, jax.Array], arch: ArchSpec, chunk: int, compute: Compute
) -> tuple[jax.Array, dict]:
    loss_fn = lm_loss(arch, compute, chunk=chunk)

    def summed(p: dict) -> tuple[jax.Array, jax.Array]:
        loss, weight, _ = loss_fn(p, None, batch, jax.random.key(0))
        return loss, weight

    grads, weight = jax.grad(summed, has_aux=True)(params)
    return weight, jax.tree.map(lambda g: g.astype(jnp.float32), grads)


@partial(jax.jit, static_argnames=("arch", "parts", "outputs"))
def _structures(
    params: dict, sums: dict[str, Any], *, arch: ArchSpec, parts: tuple[Structure, ...], outputs: bool
) -> dict[str, Any]:
    scale = 1.0 / sums["weight"]
    change = jax.tree.map(lambda w, g: w.astype(jnp.float32) * g * scale, params, sums["grads"])
    if "squares" in sums:
        half = 0.5 / sums["rows"]
        change = jax.tree.map(
            lambda c, w, s: c - half * jnp.square(w.astype(jnp.float32)) * s, change, params, sums["squares"]
        )
    if outputs:
        return jax.tree.map(jnp.abs, structure_sums(change, arch, parts, outputs=True))
    return structure_sums(jax.tree.map(jnp.abs, change), arch, parts)
