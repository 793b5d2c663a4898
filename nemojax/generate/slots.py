"""Who has which slot of the cache, and what lies in it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nemojax.generate.sequence import Sequence


class _Left(NamedTuple):
    """What a former owner left in a slot from position 0 on, and when."""

    held: np.ndarray
    used: int


class SlotTable:
    """`owners`: {slot: sequence}."""

    def __init__(self, slots: int):
        self.slots = slots
        self.owners: dict[int, Sequence] = {}
        self._left = [_Left(np.zeros(0, np.int32), 0)] * slots

    @property
    def full(self) -> bool:
        return len(self.owners) == self.slots

    def occupy(self, sequence: Sequence, slot: int) -> None:
        sequence.slot = slot
        self.owners[slot] = sequence

    def free(self, sequence: Sequence, now: int) -> None:
        self._left[sequence.slot] = _Left(sequence.held(), now)
        del self.owners[sequence.slot]

    def unused(self) -> int:
        """The free slot that was left longest ago."""
        free = (slot for slot in range(self.slots) if slot not in self.owners)
        return min(free, key=lambda slot: self._left[slot].used)

    def choose(self, prompt: tuple[int, ...], least: int) -> tuple[int, int, int]:
        """(slot to take, slot that begins most like the prompt, tokens that they share).

        Fewer than `least` shared tokens count as none. A free slot that goes on from where its owner ended
        is taken as it is; from one that holds much more, and from a busy one, a copy is to be made.
        """
        source, shared = self._longest_shared(np.asarray(prompt, np.int32)) if least else (-1, 0)
        if source < 0 or shared < least:
            slot = self.unused()
            return slot, slot, 0
        if source not in self.owners and 2 * shared >= len(self._left[source].held):
            return source, source, shared
        return self.unused(), source, shared

    def _longest_shared(self, prompt: np.ndarray) -> tuple[int, int]:
        """The prompt's last token is not shared: its output is what the answer begins with."""
        best, longest = -1, 0
        for slot in range(self.slots):
            owner = self.owners.get(slot)
            held = self._left[slot].held if owner is None else owner.held()
            most = min(len(held), len(prompt) - 1)
            if most <= longest:
                continue
            differs = held[:most] != prompt[:most]
            shared = int(differs.argmax()) if differs.any() else most
            if shared > longest:
                best, longest = slot, shared
        return best, longest
