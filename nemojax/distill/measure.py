"""What distillation did: the held-out loss, the distance to the teacher, and the share of the gap closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.data.packing import Batch
from nemojax.distill.losses import STAND_IN, DistillWeights, TokenTerms
from nemojax.distill.teachers import Teachers
from nemojax.evaluate.perplexity import heldout_loss
from nemojax.model.llama import Compute, Params
from nemojax.sharding import mesh_of, place_batch, use_mesh


class Heldout:
    """Losses on held-out texts in nats a token, for each source and over all of them (`loss`)."""

    def __init__(
        self,
        teachers: Teachers,
        arch: ArchSpec,
        batches: Mapping[str, Sequence[Batch]],
        compute: Compute = Compute(),
        chunk: int = 0,
    ):
        self._teachers, self._arch, self._batches = teachers, arch, batches
        self._compute, self._chunk = compute, chunk
        kl = DistillWeights(kl=1.0, cosine=0.0, tokens=TokenTerms(shared=teachers.shared))
        loss_fn = teachers.loss(arch, kl, compute, chunk)
        key = jax.random.key(0)  # nothing of it is random
        self._score = jax.jit(lambda params, frozen, batch: loss_fn(params, frozen, batch, key)[2]["kl"])

    def loss(self, params: Params) -> dict[str, float]:
        """The student's next-token loss."""
        return heldout_loss(params, self._arch, self._batches, compute=self._compute, chunk=self._chunk)

    def teacher(self, frozen: Any) -> dict[str, float]:
        """The first teacher's next-token loss, on the tokens that it knows."""
        first = frozen[0] if isinstance(frozen, tuple) else frozen
        compute, batches = self._teachers.compute(self._compute), self._batches
        if size := self._teachers.shared:
            batches = {name: [_known(batch, size) for batch in group] for name, group in batches.items()}
        return heldout_loss(first, self._teachers.archs[0], batches, compute=compute, chunk=self._chunk)

    def kl(self, params: Params, frozen: Any) -> dict[str, float]:
        """KL(teachers || student), by the loss that is trained with."""
        mesh, sums = mesh_of(params), {}
        with use_mesh(mesh):
            for name, group in self._batches.items():
                placed = (place_batch(batch, mesh, shared=True) for batch in group)
                sums[name] = jax.device_get([self._score(params, frozen, batch) for batch in placed])
        every = [pair for group in sums.values() for pair in group]
        return {name: _mean(group) for name, group in sums.items()} | {"loss": _mean(every)}


def gap_closed(
    before: Mapping[str, float], after: Mapping[str, float], teacher: Mapping[str, float]
) -> dict[str, float | None]:
    """The part of what the child had lost that it got back, for every key; None where it had lost nothing."""
    gaps = {name: before[name] - teacher[name] for name in before}
    return {name: (before[name] - after[name]) / gap if gap > 0 else None for name, gap in gaps.items()}


def _known(batch: Batch, size: int) -> Batch:
    """A batch that counts positions whose token and target are among the first `size` ids."""
    known = batch["tokens"] < size
    weights = np.where(known & (batch["targets"] < size), batch["weights"], 0)
    return {**batch, "weights": weights, "tokens": np.where(known, batch["tokens"], STAND_IN)}


def _mean(pairs: Sequence[tuple[Any, Any]]) -> float:
    return sum(float(s) for s, _ in pairs) / max(sum(float(w) for _, w in pairs), 1e-8)
