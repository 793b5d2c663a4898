"""Advantages of a group of answers to one prompt (DeepSeekMath, arXiv:2402.03300, section 4.1).

P prompts, G answers to each. A reward of NaN is a failed verifier: the sample takes no part in its
group's statistics, gets advantage 0 and is masked from the loss; it never counts as 0 reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Advantages:
    """`values_PG` are f32, 0 where `used_PG` is False. Fractions are of groups."""

    values_PG: np.ndarray
    used_PG: np.ndarray
    baseline_P: np.ndarray
    metrics: dict[str, float]


def group_advantages(
    rewards_PG: np.ndarray, normalize: bool = True, leave_one_out: bool = False
) -> Advantages:
    """Reward less the group's mean, over its sample standard deviation when `normalize`.

    `leave_one_out`: the baseline of a sample is the mean of the others (RLOO, arXiv:2402.14740); the
    deviation stays that of the whole group, so that a lone success in a group keeps its signal.
    Groups whose valid rewards are all exactly equal carry no signal: filtered and counted.
    """
    rewards_PG = np.asarray(rewards_PG, np.float64)
    valid_PG = np.isfinite(rewards_PG)
    count_P = valid_PG.sum(1)
    filled_PG = np.where(valid_PG, rewards_PG, 0.0)
    sum_P = filled_PG.sum(1)
    mean_P = sum_P / np.maximum(count_P, 1)
    centred_PG = np.where(valid_PG, rewards_PG - mean_P[:, None], 0.0)
    highest_P = np.where(valid_PG, rewards_PG, -np.inf).max(1)
    lowest_P = np.where(valid_PG, rewards_PG, np.inf).min(1)
    signal_P = (count_P >= 2) & (highest_P > lowest_P)
    used_PG = valid_PG & signal_P[:, None]
    scale_P = np.maximum(count_P - 1, 1)
    values_PG = centred_PG
    if leave_one_out:
        values_PG = centred_PG * (count_P / scale_P)[:, None]
    if normalize:
        std_P = np.sqrt((centred_PG**2).sum(1) / scale_P)
        values_PG = values_PG / np.where(signal_P, std_P, 1.0)[:, None]
    values_PG = np.where(used_PG, values_PG, 0.0).astype(np.float32)
    return Advantages(values_PG, used_PG, mean_P, _metrics(values_PG, used_PG, valid_PG, mean_P, signal_P))


def _metrics(values_PG, used_PG, valid_PG, mean_P, signal_P) -> dict[str, float]:
    used = values_PG[used_PG]
    rated_P = valid_PG.any(1)
    reward_P = mean_P[rated_P]
    return {
        "advantages/mean": float(used.mean()) if used.size else 0.0,
        "advantages/min": float(used.min()) if used.size else 0.0,
        "advantages/max": float(used.max()) if used.size else 0.0,
        "baseline_reward/pct_0": float((reward_P == 0).mean()) if reward_P.size else 0.0,
        "baseline_reward/pct_1": float((reward_P == 1).mean()) if reward_P.size else 0.0,
        "baseline_reward/pct_mixed": float(signal_P.mean()),
        "frac_reward_zero_std": float((~signal_P).mean()),
        "verifier_error_rate": float((~valid_PG).mean()),
    }
