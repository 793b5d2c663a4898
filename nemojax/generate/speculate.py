"""Proposals for `programs.verify`: by looking up what followed before, or by a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.config import field
from nemojax.generate import programs
from nemojax.generate.programs import Chunk, How, Packed, State
from nemojax.model.cache import init_cache
from nemojax.model.llama import Compute, Params


@dataclass(frozen=True)
class Speculation:
    """Several tokens for one pass over the weights. What comes out is the same as without."""

    kind: Literal["none", "ngram", "draft"] = field(
        "none", "who proposes: nobody, what followed the same tokens before, or a draft model"
    )
    tokens: int = field(4, "tokens proposed at once")
    longest: int = field(3, "of ngram: the longest run of last tokens that is looked up")
    shortest: int = field(1, "of ngram: the shortest")

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens: expected 1 or more, got {self.tokens}")
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"shortest, longest: expected 1 <= shortest <= longest, got "
                f"{self.shortest} and {self.longest}"
            )


class NgramIndex:
    """Where each run of a few tokens last occurred in a sequence (prompt lookup decoding)."""

    def __init__(self, cfg: Speculation, tokens: Sequence[int]):
        self._cfg, self._tokens = cfg, []
        self._after: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # the runs that end before this token are followed by it; those at the very end are not yet known
            end = len(self._tokens)
            for size in range(self._cfg.shortest, min(self._cfg.longest, end) + 1):
                self._after[tuple(self._tokens[end - size : end])] = end
            self._tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the longest known run of last tokens; [] if none is known."""
        for size in range(min(self._cfg.longest, len(self._tokens)), self._cfg.shortest - 1, -1):
            at = self._after.get(tuple(self._tokens[-size:]))
            if at is not None:
                return self._tokens[at : at + most]
        return []


class Draft:
    """A smaller model that reads what the large one reads, into slots of its own."""

    def __init__(
        self,
        params: Params,
        arch: ArchSpec,
        slots: int,
        capacity: int,
        compute: Compute,
        mesh: jax.sharding.Mesh | None,
    ):
        self._params, split = programs.prepare(params, compute, mesh)
        self._how = How(arch, compute)
        cache = init_cache(arch, slots, capacity, jnp.dtype(compute.dtype), split)
        self._state = State(cache, None)

    def extend(self, chunk: Chunk, keys: int) -> None:
        self._state, _ = programs.extend(self._params, self._state, chunk, None, how=self._how, keys=keys)

    def fork(self, from_M: Any, to_M: Any, keys: int) -> None:
        self._state = programs.fork(self._state, from_M, to_M, keys=keys)

    def propose(self, rows: Packed, slot_B: np.ndarray | None, keys: int, tokens: int) -> np.ndarray:
        """The likeliest `tokens` tokens of each row, [B, T]."""
        self._state, proposed_BT = programs.propose(
            self._params, self._state, rows, slot_B, how=self._how, keys=keys, steps=tokens
        )
        return np.asarray(proposed_BT)


def make_draft(
    draft: tuple[Params, ArchSpec] | None,
    arch: ArchSpec,
    cfg: Speculation,
    slots: int,
    capacity: int,
    compute: Compute,
    mesh: jax.sharding.Mesh | None,
) -> Draft | None:
    """ValueError where the configuration wants a draft model and none fits."""
    if cfg.kind != "draft":
        return None
    if draft is None:
        raise ValueError("speculation.kind: expected a draft model with 'draft', got none; name one")
    params, draft_arch = draft
    if draft_arch.vocab_size != arch.vocab_size:
        raise ValueError(
            f"draft: expected the model's vocabulary of {arch.vocab_size}, got {draft_arch.vocab_size}; "
            "use a draft model with the same tokenizer"
        )
    # beyond its own context the draft proposes nonsense, which is verified like anything else
    return Draft(params, draft_arch, slots, capacity, compute, mesh)
