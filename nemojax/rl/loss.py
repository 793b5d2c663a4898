"""The policy loss of a model: its forward pass, and the objective on its log-probabilities.

Shape letters: B rows, T length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from nemojax.arch import ArchSpec
from nemojax.losses.policy import PolicyLossConfig, grpo_objective
from nemojax.losses.tokens import token_logps
from nemojax.model.llama import Compute, Params, final_norm, head_weight, hidden
from nemojax.train import LossFn


def policy_logps(
    params: Params,
    arch: ArchSpec,
    batch: Mapping[str, jax.Array],
    *,
    temperature: float = 1.0,
    compute: Compute = Compute(),
    chunk: int = 0,
) -> jax.Array:
    """Log-probabilities [B, T] f32 of the batch's targets under the distribution the sampler draws from."""
    h_BTD, _ = hidden(params, arch, batch, compute=compute)
    x_BTD = final_norm(params, arch, h_BTD)
    logps_BT, _ = token_logps(
        x_BTD, head_weight(params), batch["targets"], temperature=temperature, chunk=chunk
    )
    return logps_BT


def grpo_loss(
    arch: ArchSpec,
    cfg: PolicyLossConfig = PolicyLossConfig(),
    *,
    temperature: float = 1.0,
    compute: Compute = Compute(),
    chunk: int = 0,
) -> LossFn:
    """The clipped objective plus KL, a token mean over the global batch; batch keys as `grpo_objective`."""

    def loss_fn(params: Params, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        del frozen, key
        logps_BT = policy_logps(params, arch, batch, temperature=temperature, compute=compute, chunk=chunk)
        return grpo_objective(logps_BT, batch, cfg)

    return loss_fn
