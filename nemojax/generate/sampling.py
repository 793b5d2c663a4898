"""From logits to a token and its log-probability under exactly the distribution it was drawn from.

B rows, V vocabulary, E stop ids. Every row has its own controls and its own key, so that one compiled
program serves requests with different settings and no row sees another's randomness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nemojax.config import field

Report = Literal["sampled", "model"]


@dataclass(frozen=True)
class SamplingConfig:
    """How to draw tokens. `temperature` 0 is greedy (its log-probabilities are all 0)."""

    temperature: float = field(1.0, "divides the logits; 0 is greedy")
    top_k: int = field(0, "keep the k likeliest tokens; 0 keeps all")
    top_p: float = field(1.0, "keep the smallest set of likeliest tokens holding this probability")
    max_new_tokens: int = field(64, "tokens generated at most, EOS included")
    min_p: float = field(0.0, "drop tokens less likely than this share of the likeliest; 0 keeps all")
    repetition_penalty: float = field(
        1.0, "divides positive and multiplies negative logits of tokens that occurred, in the prompt too"
    )

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k: expected 0 (off) or more, below 2**31, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected 1 or more, got {self.max_new_tokens}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p: expected a number in [0, 1), got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty: expected a positive number, got {self.repetition_penalty}")

    @property
    def truncates(self) -> bool:
        """Whether the distribution needs sorting (its own program: sorting is slow)."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalises(self) -> bool:
        """Whether the distribution depends on which tokens occurred."""
        return self.repetition_penalty != 1


class Controls(NamedTuple):
    """A `SamplingConfig` for each row, as arrays."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_B: jax.Array


def make_controls(configs: Sequence[SamplingConfig]) -> Controls:
    """The settings of the rows, each its own."""

    def column(name: str, dtype: type) -> jax.Array:
        return jnp.asarray([getattr(config, name) for config in configs], dtype)

    return Controls(
        column("temperature", jnp.float32),
        column("top_k", jnp.int32),
        column("top_p", jnp.float32),
        column("min_p", jnp.float32),
        column("repetition_penalty", jnp.float32),
    )


def log_distribution(
    logits_BV: jax.Array, controls: Controls, truncates: bool, seen_BV: jax.Array | None = None
) -> jax.Array:
    """log-probabilities [B, V] (f32) of the distribution that the controls make of the logits.

    The penalty of what occurred (`seen_BV`; Keskar et al., 2019, section 4.1) first, then temperature, then
    top-k, then top-p and min-p on what is left, then renormalised; a token that is cut has -inf. Rows with
    temperature 0 are not divided: greedy is resolved in `sample`.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if seen_BV is not None:
        penalty_B1 = controls.repetition_B[:, None]
        punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
        logits_BV = jnp.where(seen_BV, punished_BV, logits_BV)
    # from the likeliest down, so that the smallest temperature cannot overflow
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV /= jnp.where(controls.temperature_B > 0, controls.temperature_B, 1.0)[:, None]
    if truncates:
        logits_BV = jnp.where(_kept(logits_BV, controls), logits_BV, -jnp.inf)
    return jax.nn.log_softmax(logits_BV, axis=-1)


class Drawn(NamedTuple):
    """Tokens [B] with their log-probabilities [B], and the likeliest C of each row with theirs [B, C]."""

    tokens_B: jax.Array
    logps_B: jax.Array
    top_ids_BC: jax.Array
    top_logps_BC: jax.Array


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    controls: Controls,
    *,
    truncates: bool = True,
    seen_BV: jax.Array | None = None,
    allowed_BV: jax.Array | None = None,
    top: int = 0,
    report: Report = "sampled",
) -> Drawn:
    """A token for each row; row b uses only `keys_B[b]`, of which it takes one number.

    The number is looked up in the running sum of the probabilities (drawing noise for every token instead
    would cost as much as half the model: tests/benchmarks/generate.py). A grammar (`allowed_BV`) cuts
    tokens before anything else does. `report` "model": log-probabilities are the model's own, before
    penalties, cuts and temperature.
    """
    own_BV = logits_BV
    if allowed_BV is not None:
        logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
    logps_BV = log_distribution(logits_BV, controls, truncates, seen_BV)
    greedy_B = controls.temperature_B <= 0
    u_B = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys_B)
    likeliest_B = jnp.argmax(logps_BV, axis=-1)
    tokens_B = jnp.where(greedy_B, likeliest_B, draw(jnp.exp(logps_BV), u_B)).astype(jnp.int32)
    if report == "model":
        logps_BV = jax.nn.log_softmax(own_BV.astype(jnp.float32), axis=-1)
        greedy_B = jnp.zeros_like(greedy_B)
    logps_B = jnp.take_along_axis(logps_BV, tokens_B[:, None], axis=-1)[:, 0]
    top_logps_BC, top_ids_BC = jax.lax.top_k(logps_BV, top)
    certain_C = jnp.where(jnp.arange(top) == 0, 0.0, -jnp.inf)
    return Drawn(
        tokens_B,
        jnp.where(greedy_B, 0.0, logps_B),
        top_ids_BC,
        jnp.where(greedy_B[:, None], certain_C, top_logps_BC),
    )


def draw(probs_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """The token at which the running sum of the probabilities passes `u_B` (in [0, 1)) of the total, [B].

    Two levels of sums, blocks of about sqrt(V) tokens: quicker and rounded less than one long sum. A token
    of probability 0 is never drawn.
    """
    rows, vocab_size = probs_BV.shape
    size = math.isqrt(vocab_size - 1) + 1
    blocks = -(-vocab_size // size)
    padded_BV = jnp.pad(probs_BV, ((0, 0), (0, blocks * size - vocab_size)))
    block_BJI = padded_BV.reshape(rows, blocks, size)
    sums_BJ = jnp.cumsum(block_BJI.sum(-1), axis=-1)
    wanted_B = u_B * sums_BJ[:, -1]
    block_B = _first_above(sums_BJ, wanted_B, jnp.diff(sums_BJ, axis=-1, prepend=0) > 0)
    before_B = jnp.take_along_axis(sums_BJ, jnp.maximum(block_B - 1, 0)[:, None], axis=-1)[:, 0]
    within_BI = jnp.take_along_axis(block_BJI, block_B[:, None, None], axis=1)[:, 0]
    left_B = wanted_B - jnp.where(block_B > 0, before_B, 0.0)
    inside_B = _first_above(jnp.cumsum(within_BI, axis=-1), left_B, within_BI > 0)
    return block_B * size + inside_B


def _first_above(sums_BI: jax.Array, wanted_B: jax.Array, possible_BI: jax.Array) -> jax.Array:
    """Where the running sum first exceeds what is wanted; the last possible place if rounding hides it."""
    last_B = (possible_BI * jnp.arange(possible_BI.shape[-1])).max(-1)
    return jnp.minimum((sums_BI <= wanted_B[:, None]).sum(-1), last_B)


def _kept(logits_BV: jax.Array, controls: Controls) -> jax.Array:
    """Which tokens top-k, top-p and min-p keep; the likeliest always stays, ties go to the lower id.

    Each keeps a beginning of the tokens in order of likelihood, so the last one kept decides them all.
    """
    ids_BV = jnp.broadcast_to(jnp.arange(logits_BV.shape[-1], dtype=jnp.int32), logits_BV.shape)
    falling_BV, order_BV = jax.lax.sort((-logits_BV, ids_BV), num_keys=1, is_stable=True)
    ranked_BV = -falling_BV
    rank_V = ids_BV[0]
    in_k_BV = (controls.top_k_B[:, None] == 0) | (rank_V < controls.top_k_B[:, None])
    probs_BV = jax.nn.softmax(jnp.where(in_k_BV, ranked_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    # top_p 1 keeps everything: the running sum's rounding must not cut the tail.
    in_p_BV = (before_BV < controls.top_p_B[:, None]) | (controls.top_p_B[:, None] >= 1)
    in_min_BV = probs_BV >= controls.min_p_B[:, None] * probs_BV[:, :1]
    last_B1 = jnp.maximum((in_k_BV & in_p_BV & in_min_BV).sum(-1, keepdims=True) - 1, 0)
    least_B1 = jnp.take_along_axis(ranked_BV, last_B1, axis=-1)
    id_B1 = jnp.take_along_axis(order_BV, last_B1, axis=-1)
    return (logits_BV > least_B1) | ((logits_BV == least_B1) & (ids_BV <= id_B1))
