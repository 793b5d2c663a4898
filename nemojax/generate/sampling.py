"""From logits to a token and its log-probability under exactly the distribution it was drawn from.

B rows, V vocabulary, E stop ids. Every row has its own controls and its own key, so that one compiled
program serves requests with different settings and no row sees another's randomness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nemojax.config import field


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
    logits_BV /= jnp.where(controls.temperature_B > 0, controls.temperature_B, 1.0)[:, None]
    if truncates:
        logits_BV = jnp.where(_kept(logits_BV, controls), logits_BV, -jnp.inf)
    return jax.nn.log_softmax(logits_BV, axis=-1)


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    controls: Controls,
    truncates: bool,
    seen_BV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(tokens [B], log-probabilities [B]); row b uses only `keys_B[b]`."""
    logps_BV = log_distribution(logits_BV, controls, truncates, seen_BV)
    vocab_size = logits_BV.shape[-1]
    gumbel_BV = jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,), jnp.float32))(keys_B)
    greedy_B = controls.temperature_B <= 0
    noise_BV = jnp.where(greedy_B[:, None], 0.0, gumbel_BV)
    tokens_B = jnp.argmax(logps_BV + noise_BV, axis=-1).astype(jnp.int32)
    logps_B = jnp.take_along_axis(logps_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B, jnp.where(greedy_B, 0.0, logps_B)


def _kept(logits_BV: jax.Array, controls: Controls) -> jax.Array:
    """Which tokens top-k, top-p and min-p keep; the likeliest always stays, ties go to the lower id."""
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    ranked_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    rank_V = jnp.arange(logits_BV.shape[-1])
    in_k_BV = (controls.top_k_B[:, None] == 0) | (rank_V < controls.top_k_B[:, None])
    probs_BV = jax.nn.softmax(jnp.where(in_k_BV, ranked_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    # top_p 1 keeps everything: the running sum's rounding must not cut the tail.
    in_p_BV = (before_BV < controls.top_p_B[:, None]) | (controls.top_p_B[:, None] >= 1)
    in_min_BV = probs_BV >= controls.min_p_B[:, None] * probs_BV[:, :1]
    keep_BV = (in_k_BV & in_p_BV & in_min_BV) | (rank_V == 0)
    back_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.take_along_axis(keep_BV, back_BV, axis=-1)
