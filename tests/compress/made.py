"""A library that needs no training."""

import zlib

import jax
import numpy as np

from nemojax.arch import ArchSpec, BlockSpec
from nemojax.compress.library import Library
from nemojax.compress.subblock import PARTS, Part, Sub, kind_name, part_spec, sub_of
from nemojax.model.block import init_block


class Made(Library):
    """Random variants instead of trained ones; of the blocks in `coupled` as a whole, too."""

    def __init__(self, arch: ArchSpec, coupled: tuple[BlockSpec, ...] = (), **replaced: dict):
        super().__init__("nowhere")
        self.arch, self.coupled, self.replaced = arch, coupled, replaced

    def layers(self, name: str) -> tuple[int, ...]:
        there = name in [kind_name("block", block) for block in self.coupled]
        return tuple(range(self.arch.num_layers)) if there else ()

    def load(self, part, sub, layer: int) -> dict:
        name = f"{kind_name(part, sub)}/{layer}".replace("-", "_").replace("/", "_")
        return self.replaced.get(name) or self._random(name, part_spec(part, sub)).get(part, {})

    def load_block(self, parent: BlockSpec, child: BlockSpec, layer: int) -> dict:
        if child in self.coupled and child != parent:
            return self._random(f"whole {child} {layer}", child)
        subs: dict[Part, Sub] = {p: sub_of(child, p) for p in PARTS if sub_of(child, p) != sub_of(parent, p)}
        return {part: p for part, sub in subs.items() if (p := self.load(part, sub, layer))}

    def _random(self, name: str, block: BlockSpec) -> dict:
        key = jax.random.key(zlib.crc32(name.encode()))
        return jax.tree.map(np.asarray, init_block(self.arch, block, key))
