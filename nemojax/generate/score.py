"""Rewards of conversations by a causal reward model.

As nvidia/Llama-3.1-Nemotron-70B-Reward-HF is used: the reward is the logit of one token (id 0) after the
rendered conversation, what the first step of `generate` would score it with. Only that row of the output
matrix is multiplied.

Shape letters: B conversations, T length, D model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.backends.matmul import matmul
from nemojax.model.llama import Compute, Params, final_norm, head_weight, hidden
from nemojax.sharding import use_mesh

_SHORTEST = 16  # lengths are rounded up to a power of two, from here on


def score(
    params: Params,
    arch: ArchSpec,
    sequences: Sequence[Sequence[int]],
    token: int = 0,
    *,
    compute: Compute = Compute(),
    mesh: jax.sharding.Mesh | None = None,
    max_tokens: int = 8192,
) -> list[float]:
    """The logit (f32) of `token` after each sequence of ids, in order.

    Sequences of one length, rounded up, are read together, as many as `max_tokens` allows. ValueError for an
    empty sequence, one longer than the context, or an id outside the vocabulary.
    """
    check_sequences(arch, sequences, token)
    rewards = np.zeros(len(sequences), np.float32)
    with use_mesh(mesh):
        for length, places in _by_length(sequences, arch.context):
            rows = max(1, 2 ** int(np.log2(max(1, max_tokens // length))))
            for first in range(0, len(places), rows):
                group = places[first : first + rows]
                padded = min(rows, 1 << (len(group) - 1).bit_length())
                tokens_BT = np.zeros((padded, length), np.int32)
                last_B = np.zeros(padded, np.int32)
                for row, place in enumerate(group):
                    tokens_BT[row, : len(sequences[place])] = sequences[place]
                    last_B[row] = len(sequences[place]) - 1
                reward_B = _last_logit(params, tokens_BT, last_B, np.int32(token), arch=arch, compute=compute)
                rewards[group] = np.asarray(reward_B)[: len(group)]
    return rewards.tolist()


def check_sequences(arch: ArchSpec, sequences: Sequence[Sequence[int]], token: int = 0) -> None:
    """ValueError if `score` would refuse them."""
    if not 0 <= token < arch.vocab_size:
        raise ValueError(f"token: expected an id below {arch.vocab_size} (the vocabulary), got {token}")
    for number, ids in enumerate(sequences):
        if not ids:
            raise ValueError(f"conversation {number}: expected at least one token, got none")
        if len(ids) > arch.context:
            raise ValueError(
                f"conversation {number}: expected at most {arch.context} tokens (the context), got "
                f"{len(ids)}; shorten it"
            )
        if min(ids) < 0 or max(ids) >= arch.vocab_size:
            raise ValueError(
                f"conversation {number}: expected ids below {arch.vocab_size} (the vocabulary), got "
                f"{max(ids)}; use the tokenizer that belongs to the model"
            )


def _by_length(sequences: Sequence[Sequence[int]], context: int) -> list[tuple[int, list[int]]]:
    """[(rounded length, places of the sequences of that length)], from the shortest up."""
    groups: dict[int, list[int]] = {}
    for place, ids in enumerate(sequences):
        length = min(context, max(_SHORTEST, 1 << (len(ids) - 1).bit_length()))
        groups.setdefault(length, []).append(place)
    return sorted(groups.items())


@functools.partial(jax.jit, static_argnames=("arch", "compute"))
def _last_logit(
    params: Params,
    tokens_BT: jax.Array,
    last_B: jax.Array,
    token: jax.Array,
    *,
    arch: ArchSpec,
    compute: Compute,
) -> jax.Array:
    """What stands behind the last token is seen by no earlier one: the mask is causal."""
    h_BTD, _ = hidden(params, arch, {"tokens": tokens_BT}, compute=compute)
    h_BD = jnp.take_along_axis(h_BTD, last_B[:, None, None], axis=1)[:, 0]
    x_BD = final_norm(params, arch, h_BD[:, None])[:, 0]
    w_D = jnp.take(head_weight(params), token, axis=0).astype(x_BD.dtype)
    return matmul("BD,D->B", x_BD, w_D, jnp.float32)
