"""Feed-forward channels ranked by removing them: the iterative channel contribution of Puzzle.

Over the calibration data a scheduled number of channels leaves each layer at a time. What channel j would
cost is the mean over tokens of ||(scale * full output - current output) + a_j W_down[j]||: what has been lost
so far, and what it would add to that. Its square is ||s||^2 + 2 a_j (s . w_j) + a_j^2 ||w_j||^2. The channels
that cost least go, and the order in which they go is their rank (NVIDIA Model Optimizer,
modelopt/torch/prune/importance_hooks/base_hooks.py). Every layer is judged on the whole parent's activations.
Legend: B batch, T tokens, D model, F ffn, n layers of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec, BlockSpec, SwiGLU
from nemojax.compress.activation import token_mask
from nemojax.compress.structures import by_layer, replicated
from nemojax.model.attention import Context
from nemojax.model.block import apply_block
from nemojax.model.layout import run_name
from nemojax.model.llama import Compute, batch_context, embed

Scaling = Literal["none", "magnitude"]
State = dict[str, jax.Array]
EPS = 1e-8


def removal_schedule(num_channels: int, steps: int) -> np.ndarray:
    """Channels that go at each step, `num_channels` in all: 10 in 4 is 3 3 2 2, 2 in 5 is 0 1 0 0 1."""
    if num_channels >= steps:
        return num_channels // steps + (np.arange(steps) < num_channels % steps)
    counts = np.zeros(steps, np.int64)
    counts[np.arange(1, num_channels + 1) * steps // num_channels - 1] = 1
    return counts


class IterativeMeter:
    """Removes channels as batches come; `batches` of them, with `removals` steps on each."""

    def __init__(
        self,
        params: dict,
        arch: ArchSpec,
        batches: int,
        removals: int = 1,
        scaling: Scaling = "none",
        compute: Compute = Compute(),
    ):
        self.params, self.arch, self.scaling, self.compute = params, arch, scaling, compute
        widths = [run.spec.ffn.width if isinstance(run.spec.ffn, SwiGLU) else 0 for run in arch.runs()]
        schedules = [removal_schedule(width, batches * removals) if width else None for width in widths]
        self.counts = [
            None if s is None else s.reshape(batches, removals).astype(np.int32) for s in schedules
        ]
        self.batch = 0
        self.state = _start(arch)

    def update(self, batch: Mapping[str, jax.Array]) -> None:
        counts = [None if c is None else c[self.batch] for c in self.counts]
        self.state = _remove(
            self.state, self.params, batch, counts, arch=self.arch, scaling=self.scaling, compute=self.compute
        )
        self.batch += 1

    def result(self) -> dict[str, Any]:
        """Ranks 0, 1, ... in the order of removal: larger matters more; NaN in a layer that had any."""
        runs = [
            {"ffn": np.where(np.asarray(s["bad"])[:, None], np.nan, np.asarray(s["order"]))} if s else {}
            for s in jax.device_get(self.state)
        ]
        return {"ffn": by_layer(self.arch, runs, "ffn")}


@partial(jax.jit, static_argnums=0)
def _start(arch: ArchSpec) -> list[State]:
    """Nothing removed: `order` -1, `total` the cost added up since a removal, `bad` where it is NaN."""
    states = []
    for run in arch.runs():
        shape = (len(run.layers), run.spec.ffn.width) if isinstance(run.spec.ffn, SwiGLU) else None
        states.append(
            {
                "order": jnp.full(shape, -1, jnp.int32),
                "total": jnp.zeros(shape, jnp.float32),
                "bad": jnp.zeros(shape[0], bool),
            }
            if shape
            else {}
        )
    return replicated(states)


@partial(jax.jit, static_argnames=("arch", "scaling", "compute"), donate_argnums=0)
def _remove(
    states: list[State],
    params: dict,
    batch: Mapping[str, jax.Array],
    counts: list[jax.Array | None],
    *,
    arch: ArchSpec,
    scaling: Scaling,
    compute: Compute,
) -> list[State]:
    """All layers' steps on one batch; `counts` [removals] by run is data: one program serves them all."""
    ctx, mask_BT = batch_context(arch, batch), token_mask(batch)
    h_BTD = embed(params, batch["tokens"], compute)
    after = []
    for index, (run, state, count) in enumerate(zip(arch.runs(), states, counts, strict=True)):
        body = partial(_layer, arch, run.spec, ctx, mask_BT, count, scaling)
        h_BTD, state = jax.lax.scan(body, h_BTD, (params["runs"][run_name(index)], state))
        after.append(state)
    return replicated(after)


def _layer(
    arch: ArchSpec,
    spec: BlockSpec,
    ctx: Context,
    mask_BT: jax.Array,
    counts: jax.Array | None,
    scaling: Scaling,
    h_BTD: jax.Array,
    x: tuple[dict, State],
) -> tuple[jax.Array, State]:
    p, state = x
    seen: dict[str, jax.Array] = {}
    h_BTD = apply_block(arch, spec, p, h_BTD, ctx, capture=seen)
    if counts is None:
        return h_BTD, state
    act_BTF = seen["act_BTF"].astype(jnp.float32)
    down_FD = p["ffn"]["down"].astype(jnp.float32)
    step = partial(_step, act_BTF, down_FD, _project(act_BTF, down_FD), mask_BT, scaling)
    return h_BTD, jax.lax.scan(step, state, counts)[0]


def _step(
    act_BTF: jax.Array,
    down_FD: jax.Array,
    full_BTD: jax.Array,
    mask_BT: jax.Array,
    scaling: Scaling,
    state: State,
    count: jax.Array,
) -> tuple[State, None]:
    """Measures every channel that is left and removes the `count` cheapest."""
    gone_F = state["order"] >= 0
    current_BTD = _project(jnp.where(gone_F, 0.0, act_BTF), down_FD)
    if scaling == "magnitude":
        norms_BT1 = jnp.linalg.norm(full_BTD, axis=-1, keepdims=True) + EPS
        full_BTD = full_BTD * jnp.linalg.norm(current_BTD, axis=-1, keepdims=True) / norms_BT1
    lost_BTD = full_BTD - current_BTD
    cross_BTF = jnp.einsum("BTD,FD->BTF", lost_BTD, down_FD)
    squared_BTF = jnp.sum(lost_BTD**2, axis=-1, keepdims=True) + 2 * act_BTF * cross_BTF
    squared_BTF += act_BTF**2 * jnp.sum(down_FD**2, axis=1)
    costs_BTF = jnp.sqrt(jnp.maximum(squared_BTF, 0.0) + EPS) * mask_BT[..., None]
    mean_F = jnp.sum(costs_BTF, axis=(0, 1)) / mask_BT.sum()
    total_F = state["total"] + mean_F
    rank_F = jnp.argsort(jnp.argsort(jnp.where(gone_F, jnp.inf, total_F)))
    leaves_F = (rank_F < count) & ~gone_F
    order_F = jnp.where(leaves_F, jnp.sum(gone_F) + rank_F, state["order"])
    return {
        "order": order_F.astype(jnp.int32),
        "total": jnp.where(count > 0, 0.0, total_F),
        "bad": state["bad"] | ~jnp.all(jnp.isfinite(mean_F)),
    }, None


def _project(act_BTF: jax.Array, down_FD: jax.Array) -> jax.Array:
    return jnp.einsum("BTF,FD->BTD", act_BTF, down_FD)
