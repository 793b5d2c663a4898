"""What one device of a mesh has to do in a program: FLOPs, and bytes of its own memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from nemojax.arch import ArchSpec
from nemojax.backends.roofline import Load, blocks_load, head_load, outer_load, training_load
from nemojax.backends.topology import bytes_on_device
from nemojax.sharding import BATCH_AXES, RULES


@dataclass(frozen=True)
class Shares:
    """Over how many devices rows, positions of a row, and heads and channels are split."""

    rows: int
    length: int
    tensor: int

    @classmethod
    def of(cls, mesh: Mesh) -> Shares:
        ways = [
            math.prod(mesh.shape[a] for a in axes) for axes in (BATCH_AXES, _axes("length"), _axes("mlp"))
        ]
        return cls(*ways)

    def training(self, arch: ArchSpec, batch: int, length: int, *, remat: bool, accumulate: int = 1) -> Load:
        """Forward and backward passes of a step; weights are read for every micro-batch."""
        part = training_load(arch, batch / self.rows / accumulate, length / self.length, remat=remat)
        whole = training_load(arch, batch, length, remat=remat)
        return Load(whole.flops / self._all, part.bytes * accumulate / self.tensor)

    def forward(self, arch: ArchSpec, batch: int, length: int, *, head: bool = True) -> Load:
        """A forward pass over packed rows, with logits at every position."""
        whole = blocks_load(arch, batch=batch, tokens=length)
        part = blocks_load(arch, batch=batch / self.rows, tokens=length / self.length)
        if head:
            whole += head_load(arch, batch * length)
            part += head_load(arch, batch * length / self.rows / self.length)
        return Load(whole.flops / self._all, part.bytes / self.tensor)

    def generation(
        self,
        arch: ArchSpec,
        batch: int,
        tokens: int,
        cached: float,
        weight_bytes: float,
        cache_bytes: float = 2,
    ) -> Load:
        """`tokens` new ones of every sequence behind `cached` ones, and logits at the last."""
        rows = batch / self.rows if batch % self.rows == 0 else batch
        how: dict[str, Any] = {"batch": rows, "tokens": tokens}
        load = blocks_load(
            arch, cached=cached, weight_bytes=weight_bytes, cache_bytes=cache_bytes, **how
        ) + outer_load(arch, **how)
        return Load(load.flops / self.tensor, load.bytes / self.tensor)

    @property
    def _all(self) -> int:
        return self.rows * self.length * self.tensor


def optimiser_load(weights: Any, moments: Any) -> Load:
    """Weights, gradients and moments read and written once; the arithmetic counts for nothing."""
    moved = bytes_on_device(moments) + bytes_on_device(moments, on_host=True)
    return Load(0.0, 4 * bytes_on_device(weights) + 2 * moved)


def held_bytes(held: Mapping[str, Any]) -> dict[str, int]:
    return {name: bytes_on_device(tree) for name, tree in held.items()}


def _axes(logical: str) -> tuple[str, ...]:
    target = RULES[logical]
    return (target,) if isinstance(target, str) else target
