"""Next-token distributions of which every device holds a part of the vocabulary.

Inside `jax.shard_map` an array [B, C, V] has this device's rows, positions and ids; what is summed over the
vocabulary crosses devices. Without a mesh the axes are empty, and the one device has it all.

Shape letters: B batch, C positions at once, D model, V vocabulary, K kept outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nemojax.sharding import RULES, spec_of, ways_of

# log-probability of what is left out: finite, so that differences of two and products with 0 are too
NEVER = -1e30
# log-probabilities of kept outcomes sum to 1 within this: less is left of 1 by rounding alone
MIN_TAIL = 2.0**-20


class TopK(NamedTuple):
    """A teacher's most likely next tokens, descending, with log-probabilities at the temperature.

    `tail_BT` is the log of what all others have together. Where it was not kept, it is what the kept ones
    leave of 1: rough when that is little.
    """

    ids_BTK: jax.Array
    logps_BTK: jax.Array
    tail_BT: jax.Array | None = None

    def tail(self) -> jax.Array:
        if self.tail_BT is not None:
            return self.tail_BT
        return jnp.log(jnp.maximum(1 - jnp.sum(jnp.exp(self.logps_BTK), axis=-1), MIN_TAIL))


class Axes(NamedTuple):
    """Mesh axes over which arrays are split, and the partitions of these; none without a mesh."""

    rows: tuple[str, ...] = ()  # batch and length
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()  # of `rows`, those over which the gradient of a matrix ends up split
    of_rows: PartitionSpec = PartitionSpec()
    of_matrix: PartitionSpec = PartitionSpec()
    of_gradient: PartitionSpec = PartitionSpec()

    def sum(self, x_BCV: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.sum(x_BCV, axis=-1), self.vocab)

    def max(self, x_BCV: jax.Array) -> jax.Array:
        """A constant to gradients."""
        return jax.lax.pmax(jnp.max(jax.lax.stop_gradient(x_BCV), axis=-1), self.vocab)

    def logsumexp(self, x_BCV: jax.Array) -> jax.Array:
        top_BC = self.max(x_BCV)
        return top_BC + jnp.log(self.sum(jnp.exp(x_BCV - top_BC[..., None])))

    def log_softmax(self, x_BCV: jax.Array) -> jax.Array:
        return x_BCV - self.logsumexp(x_BCV)[..., None]

    def first_id(self, size: int) -> jax.Array | int:
        """The first of this device's `size` ids."""
        return jax.lax.axis_index(self.vocab) * size if self.vocab else 0

    def only(self, count: int, logits_BCV: jax.Array) -> jax.Array:
        """Logits of which all but the first `count` ids of the vocabulary are impossible."""
        size = logits_BCV.shape[-1]
        if count == size * (ways_of("vocab") if self.vocab else 1):
            return logits_BCV
        return jnp.where(self.first_id(size) + jnp.arange(size) < count, logits_BCV, NEVER)

    def pick(self, x_BCV: jax.Array, ids_BC: jax.Array) -> jax.Array:
        """Every position's value at its id, by a sum over a mask: a gather does not split over ids."""
        hit_BCV = self.first_id(x_BCV.shape[-1]) + jnp.arange(x_BCV.shape[-1]) == ids_BC[..., None]
        return self.sum(jnp.where(hit_BCV, x_BCV, 0.0))

    def top_k(self, logp_BCV: jax.Array, k: int) -> TopK:
        """The k most likely outcomes over all devices; among equals the lower id comes first."""
        size = logp_BCV.shape[-1]
        logps, ids = jax.lax.top_k(logp_BCV, min(k, size))
        if self.vocab:
            here = jax.lax.axis_index(self.vocab)

            def gathered(x: jax.Array) -> jax.Array:
                # a sum of what is nothing elsewhere: every device gets all, and knows that all have the same
                places = jnp.zeros((*x.shape[:2], ways_of("vocab"), x.shape[2]), x.dtype)
                return jax.lax.psum(places.at[:, :, here].set(x), self.vocab).reshape(*x.shape[:2], -1)

            logps, order = jax.lax.top_k(gathered(logps), k)
            ids = jnp.take_along_axis(gathered(ids + self.first_id(size)), order, axis=-1)
        kept = TopK(ids, logps)
        return kept._replace(tail_BT=self.logsumexp(self.others(self.spread(kept, size), logp_BCV)))

    @staticmethod
    def others(kept_BCV: jax.Array, logp_BCV: jax.Array) -> jax.Array:
        """Log-probabilities of all that `spread` has not placed."""
        return jnp.where(kept_BCV > NEVER / 2, NEVER, logp_BCV)

    def spread(self, kept: TopK, size: int) -> jax.Array:
        """Kept log-probabilities in their places of this device's `size` ids, NEVER in all others."""
        places = kept.ids_BTK - self.first_id(size)
        places = jnp.where(places < 0, size, places)  # a negative index would count from the end
        b, c = kept.ids_BTK.shape[:2]
        at = (jnp.arange(b)[:, None, None], jnp.arange(c)[None, :, None], places)
        return jnp.full((b, c, size), NEVER).at[at].set(kept.logps_BTK, mode="drop")


def axes_of(x_BTD: jax.Array) -> Axes:
    """How hidden states are split under the mesh in scope, and what goes with them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return Axes()
    of_rows, vocab = spec_of(x_BTD.shape[:2], "batch", "length"), RULES["vocab"]
    rows, embed = _names(*of_rows), spec_of(x_BTD.shape[2:], "embed")[0]
    embed = embed if set(_names(embed)) <= set(rows) else None
    of_matrix, of_gradient = PartitionSpec(vocab), PartitionSpec(vocab, embed)
    return Axes(rows, _names(vocab), _names(embed), of_rows, of_matrix, of_gradient)


def _names(*entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of a partition's entries."""
    return tuple(name for e in entries for name in ((e,) if isinstance(e, str) else e or ()))


def mixture(logps: Iterable[jax.Array], shares: Sequence[float]) -> jax.Array:
    """Log-probabilities of the arithmetic mean of distributions with these shares, which sum to 1."""
    first, *others = (
        logp_BCV + math.log(share) if share != 1 else logp_BCV
        for logp_BCV, share in zip(logps, shares, strict=True)
    )
    for logp_BCV in others:
        first = jnp.logaddexp(first, logp_BCV)
    return first


def integrand(name: str, p: jax.Array, q: jax.Array, beta: float) -> jax.Array:
    """What sums over outcomes to a divergence, from log-probabilities of teacher and student."""
    if name == "jsd" and beta in (0.0, 1.0):
        name = "reverse_kl" if beta else "kl"
    match name:
        case "kl":
            return jnp.exp(p) * (p - q)
        case "reverse_kl":
            return jnp.exp(q) * (q - p)
        case "jsd":
            m = jnp.logaddexp(math.log(beta) + p, math.log1p(-beta) + q)
            return beta * jnp.exp(p) * (p - m) + (1 - beta) * jnp.exp(q) * (q - m)
        case "entropy":
            return -jnp.exp(p) * p
    raise AssertionError(name)
