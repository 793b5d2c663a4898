"""The distillation loss of a child against its frozen parent.

Puzzle's global distillation (arXiv:2411.19146): 1 - cos(child, parent) of hidden states, averaged over
layers, plus KL(parent || child) of the next-token distributions, and no language-model loss. Hidden states
are matched by global layer index, so a heterogeneous child has no index of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec
from nemojax.config import field
from nemojax.losses.hidden import cosine_distance
from nemojax.losses.tokens import kl_divergence, token_logps
from nemojax.model import llama
from nemojax.model.llama import Compute, Params
from nemojax.train import LossFn


@dataclass(frozen=True)
class DistillWeights:
    kl: float = field(1.0, "weight of KL(teacher || student), in nats a token")
    cosine: float = field(1.0, "weight of 1 - cos of hidden states, averaged over layers")
    lm: float = field(0.0, "weight of the next-token loss on the data, in nats a token")
    temperature: float = field(1.0, "softmax temperature of the KL; its square multiplies the KL")

    def __post_init__(self):
        if min(self.kl, self.cosine, self.lm) < 0 or self.kl + self.cosine + self.lm == 0:
            raise ValueError("loss: expected weights >= 0, at least one above 0")
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature: expected a positive number, got {self.temperature}")


def distill_loss(
    student: ArchSpec,
    teacher: ArchSpec,
    weights: DistillWeights,
    compute: Compute = Compute(),
    chunk: int = 0,
) -> LossFn:
    """A LossFn whose `frozen` is the teacher's parameters; the teacher runs in the same program.

    KL and LM loss count the positions that `batch["weights"]` counts. With neither KL nor cosine the
    teacher is not run at all.
    """
    _check_compatible(student, teacher)
    layers = tuple(i for i, b in enumerate(student.blocks) if not b.is_empty) if weights.cosine else ()

    def loss_fn(params: Params, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        frozen = jax.lax.stop_gradient(frozen)
        weights_BT = batch["weights"]
        weight = jnp.sum(weights_BT)
        h_BTD, taps = llama.hidden(params, student, batch, taps=layers, compute=compute)
        x_BTD = llama.final_norm(params, student, h_BTD)
        terms: dict[str, jax.Array] = {}
        if weights.kl or weights.cosine:
            t_BTD, t_taps = llama.hidden(frozen, teacher, batch, taps=layers, compute=compute)
        if weights.kl:
            kl_BT = kl_divergence(
                x_BTD,
                llama.head_weight(params),
                llama.final_norm(frozen, teacher, t_BTD),
                llama.head_weight(frozen),
                temperature=weights.temperature,
                chunk=chunk,
            )
            terms["kl"] = jnp.sum(kl_BT * weights_BT)
        if weights.cosine:
            distances = [jnp.sum(cosine_distance(taps[i], t_taps[i]) * weights_BT) for i in layers]
            terms["cosine"] = sum(distances, start=jnp.zeros(())) / len(layers)
        if weights.lm:
            logps_BT, _ = token_logps(x_BTD, llama.head_weight(params), batch["targets"], chunk=chunk)
            terms["lm"] = -jnp.sum(logps_BT * weights_BT)
        loss = sum((getattr(weights, name) * term for name, term in terms.items()), start=jnp.zeros(()))
        return loss, weight, {name: (term, weight) for name, term in terms.items()}

    return loss_fn


def _check_compatible(student: ArchSpec, teacher: ArchSpec) -> None:
    for name in ("vocab_size", "dim", "num_layers"):
        if getattr(student, name) != getattr(teacher, name):
            raise ValueError(
                f"distill: expected a teacher with {name} {getattr(student, name)} as the student's, "
                f"got {getattr(teacher, name)}"
            )
