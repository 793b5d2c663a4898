"""From logits to a token and its log-probability under exactly the distribution it was drawn from.

B rows, V vocabulary, E stop ids. Every row has its own controls and its own key, so that one compiled
program serves requests with different settings and no row sees another's randomness.
"""

from __future__ import annotations

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

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected 1 or more, got {self.max_new_tokens}")

    @property
    def truncates(self) -> bool:
        """Whether the distribution needs sorting (its own program: sorting is slow)."""
        return self.top_k > 0 or self.top_p < 1


class Controls(NamedTuple):
    """A `SamplingConfig` for each row, as arrays."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array


def make_controls(cfg: SamplingConfig, num_rows: int) -> Controls:
    """The same settings for `num_rows` rows."""
    return Controls(
        jnp.full(num_rows, cfg.temperature, jnp.float32),
        jnp.full(num_rows, cfg.top_k, jnp.int32),
        jnp.full(num_rows, cfg.top_p, jnp.float32),
    )


def log_distribution(logits_BV: jax.Array, controls: Controls, truncates: bool) -> jax.Array:
    """log-probabilities [B, V] (f32) of the distribution that the controls make of the logits.

    Temperature first, then top-k, then top-p on what is left, then renormalised; a token that is cut has
    -inf. Rows with temperature 0 keep the softmax of the raw logits: greedy is resolved in `sample`.
    """
    temperature_B = jnp.where(controls.temperature_B > 0, controls.temperature_B, 1.0)
    logits_BV = logits_BV.astype(jnp.float32) / temperature_B[:, None]
    if truncates:
        logits_BV = jnp.where(_kept(logits_BV, controls), logits_BV, -jnp.inf)
    return jax.nn.log_softmax(logits_BV, axis=-1)


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, controls: Controls, truncates: bool
) -> tuple[jax.Array, jax.Array]:
    """(tokens [B], log-probabilities [B]); row b uses only `keys_B[b]`."""
    logps_BV = log_distribution(logits_BV, controls, truncates)
    vocab_size = logits_BV.shape[-1]
    gumbel_BV = jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,), jnp.float32))(keys_B)
    greedy_B = controls.temperature_B <= 0
    noise_BV = jnp.where(greedy_B[:, None], 0.0, gumbel_BV)
    tokens_B = jnp.argmax(logps_BV + noise_BV, axis=-1).astype(jnp.int32)
    logps_B = jnp.take_along_axis(logps_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B, jnp.where(greedy_B, 0.0, logps_B)


def _kept(logits_BV: jax.Array, controls: Controls) -> jax.Array:
    """Which tokens top-k and top-p keep; the likeliest always stays, ties go to the lower id."""
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    ranked_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    rank_V = jnp.arange(logits_BV.shape[-1])
    in_k_BV = (controls.top_k_B[:, None] == 0) | (rank_V < controls.top_k_B[:, None])
    probs_BV = jax.nn.softmax(jnp.where(in_k_BV, ranked_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    # top_p 1 keeps everything: the running sum's rounding must not cut the tail.
    in_p_BV = (before_BV < controls.top_p_B[:, None]) | (controls.top_p_B[:, None] >= 1)
    keep_BV = (in_k_BV & in_p_BV) | (rank_V == 0)
    back_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.take_along_axis(keep_BV, back_BV, axis=-1)
