"""The policy loss of a model: its forward pass, and the objective on its log-probabilities.

Shape letters: B rows, T length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec
from nemojax.losses.divergence import Comparison, Head, Policy, vocab_loss
from nemojax.losses.policy import PolicyLossConfig
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
    """The clipped objective plus KL, a token mean over the global batch, with its metrics.

    Batch keys are those of `policy_terms`. `chunk` positions of a row have logits at once; 0: all.
    """
    names = ["sampler_logps", "advantages", "old_logps"]
    names += ["ref_logps"] if cfg.reference_policy_kl_penalty else []

    def loss_fn(params: Params, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        del frozen, key
        h_BTD, _ = hidden(params, arch, batch, compute=compute)
        head = Head(final_norm(params, arch, h_BTD), head_weight(params))
        policy = Policy(cfg, {name: batch[name] for name in names if name in batch})
        loss, sums = vocab_loss(
            head, (), {"policy": 1.0}, batch["weights"],
            targets_BT=batch["targets"], policy=policy, how=Comparison(temperature), chunk=chunk,
        )  # fmt: skip
        weight = jnp.sum(batch["weights"])
        return loss, weight, {name: (total, weight) for name, total in sums.items() if name != "policy"}

    return loss_fn
