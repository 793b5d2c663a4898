"""Policy-gradient losses on sampled tokens (GRPO, arXiv:2402.03300; clip-higher, DAPO, arXiv:2503.14476).

Three distributions meet here, and each has its name: `sampler` drew the tokens, `old` is the trainer's own
forward before the update, and the current policy is what is differentiated. With one update per rollout
old equals current, and a batch without `old_logps` means that.

Shape letters: B rows, T length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from nemojax.config import field

_MAX_LOG_RATIO, _MAX_KL = 20.0, 10.0


@dataclass(frozen=True)
class PolicyLossConfig:
    """Names follow NeMo-RL's `loss_fn` section."""

    ratio_clip_min: float = field(0.2, "the ratio is clipped at 1 - this")
    ratio_clip_max: float = field(0.2, "the ratio is clipped at 1 + this; 0.28 is DAPO's clip-higher")
    ratio_clip_c: float = field(
        0.0, "dual clip: bound of the ratio where the advantage is negative; 0 is off"
    )
    reference_policy_kl_penalty: float = field(
        0.0, "weight of the KL to the starting policy; 0 needs no reference"
    )
    kl_importance_weight: bool = field(
        True, "weight the KL by policy / sampler, which makes its gradient unbiased"
    )
    truncated_importance_sampling_ratio: float = field(
        2.0, "bound of old / sampler, which corrects for the sampler's own numerics; 0 is off"
    )

    def __post_init__(self):
        if not 0 < self.ratio_clip_min <= 1 or self.ratio_clip_max <= 0:
            raise ValueError(
                f"ratio_clip_min, ratio_clip_max: expected (0, 1] and > 0, got "
                f"{self.ratio_clip_min}, {self.ratio_clip_max}"
            )
        if self.ratio_clip_c and self.ratio_clip_c <= 1 + self.ratio_clip_max:
            raise ValueError(
                f"ratio_clip_c: expected 0 or more than 1 + ratio_clip_max, got {self.ratio_clip_c}"
            )


def k3(log_ratio: jax.Array) -> jax.Array:
    """exp(r) - 1 - r with r = log(q / p): over samples of p its mean is KL(p || q); never negative."""
    r = jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jnp.clip(jnp.exp(r) - 1 - r, 0.0, _MAX_KL)


def clipped_objective(
    logps_BT: jax.Array, old_BT: jax.Array, advantages_BT: jax.Array, cfg: PolicyLossConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, ratio, clipped ratio) of every token, each [B, T]."""
    ratio_BT = jnp.exp(jnp.clip(logps_BT - old_BT, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    clamped_BT = jnp.clip(ratio_BT, 1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max)
    loss_BT = jnp.maximum(-advantages_BT * ratio_BT, -advantages_BT * clamped_BT)
    if cfg.ratio_clip_c:
        bounded_BT = jnp.minimum(loss_BT, -advantages_BT * cfg.ratio_clip_c)
        loss_BT = jnp.where(advantages_BT < 0, bounded_BT, loss_BT)
    return loss_BT, ratio_BT, clamped_BT


def policy_terms(
    logps_BT: jax.Array, rows: Mapping[str, jax.Array], cfg: PolicyLossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, {metric: value}) of every token, each [B, T], from the current log-probabilities.

    Rows: weights, advantages, sampler_logps, old_logps (absent: on-policy), ref_logps (needed when the
    KL penalty is on), all [B, T] f32.
    """
    # masked positions hold whatever follows a prompt; they must not meet exp
    mask_BT = rows["weights"] > 0
    logps_BT = jnp.where(mask_BT, logps_BT, 0.0)
    sampler_BT = jnp.where(mask_BT, rows["sampler_logps"], 0.0)
    old_BT = jnp.where(mask_BT, rows.get("old_logps", jax.lax.stop_gradient(logps_BT)), 0.0)
    loss_BT, ratio_BT, clamped_BT = clipped_objective(logps_BT, old_BT, rows["advantages"], cfg)
    drift_BT = jnp.exp(old_BT - sampler_BT)
    if cfg.truncated_importance_sampling_ratio:
        loss_BT = loss_BT * jnp.minimum(drift_BT, cfg.truncated_importance_sampling_ratio)
    metrics = _sampler_metrics(logps_BT, old_BT, sampler_BT, cfg)
    metrics |= {"probs_ratio": ratio_BT, "probs_ratio_clamped": clamped_BT}
    metrics["clip_fraction"] = (ratio_BT != clamped_BT).astype(jnp.float32)
    if cfg.reference_policy_kl_penalty:
        kl_BT = k3(jnp.where(mask_BT, rows["ref_logps"], 0.0) - logps_BT)
        if cfg.kl_importance_weight:
            kl_BT = kl_BT * jnp.exp(jnp.clip(logps_BT - sampler_BT, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
        metrics["kl_penalty"] = kl_BT
        loss_BT = loss_BT + cfg.reference_policy_kl_penalty * kl_BT
    return loss_BT, metrics


def _sampler_metrics(
    logps_BT: jax.Array, old_BT: jax.Array, sampler_BT: jax.Array, cfg: PolicyLossConfig
) -> dict[str, jax.Array]:
    """How far sampler and trainer disagree about the same tokens; all [B, T]."""
    half_BT = jnp.logaddexp(old_BT, sampler_BT) - jnp.log(2.0)
    drift_BT = jnp.exp(old_BT - sampler_BT)
    bound = cfg.truncated_importance_sampling_ratio or jnp.inf
    return {
        "token_mult_prob_error": jnp.exp(jnp.abs(old_BT - sampler_BT)),
        "gen_kl_error": k3(old_BT - sampler_BT),
        "policy_kl_error": k3(sampler_BT - old_BT),
        "js_divergence_error": 0.5 * (k3(half_BT - sampler_BT) + drift_BT * k3(half_BT - old_BT)),
        "sampling_importance_ratio": drift_BT,
        "is_oob_ratio": (drift_BT > bound).astype(jnp.float32),
        "approx_entropy": -jnp.exp(logps_BT - sampler_BT) * logps_BT,
    }
