"""Held-out loss: exact over all tokens, whatever the batches."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.model.llama import Compute, Params
from nemojax.sharding import mesh_of, place_batch, use_mesh
from nemojax.train import lm_loss


def heldout_loss(
    params: Params,
    arch: ArchSpec,
    batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    *,
    compute: Compute = Compute(),
    chunk: int = 0,
) -> dict[str, float]:
    """Mean next-token loss in nats for each source, and `loss` over all tokens; {} without batches.

    Every process holds all the batches; where `params` lie on a mesh, they are split over it. `chunk`:
    positions of a row whose logits exist at once, 0 for all.
    """
    if not batches:
        return {}
    score = _scorer(arch, compute, chunk)
    mesh = mesh_of(params)
    losses: dict[str, float] = {}
    total, weight = 0.0, 0.0
    with use_mesh(mesh):
        for name, group in batches.items():
            placed = (place_batch(batch, mesh, shared=True) for batch in group)
            sums = jax.device_get([score(params, batch) for batch in placed])
            loss_sum, count = sum(float(s) for s, _ in sums), sum(float(w) for _, w in sums)
            losses[name] = loss_sum / max(count, 1e-8)
            total, weight = total + loss_sum, weight + count
    return losses | {"loss": total / max(weight, 1e-8)}


@functools.lru_cache(maxsize=32)
def _scorer(arch: ArchSpec, compute: Compute, chunk: int):
    loss_fn = lm_loss(arch, compute, chunk=chunk)
    return jax.jit(lambda params, batch: loss_fn(params, None, batch, jax.random.key(0))[:2])
