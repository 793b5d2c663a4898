"""What every child of a study is measured by: held-out texts, and problems that have one right answer.

A child is walked through half a block at a time with the programs that the scores use too, so that a hundred
children of as many architectures compile nothing of their own.
Legend: B batch, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.compress.measures import answer_batches, count, sums_of
from nemojax.compress.subblock import PARTS, layers_of, run_part, sub_of
from nemojax.data.mixture import TextData, heldout_batches
from nemojax.data.tokenizer import Tokenizer
from nemojax.losses.tokens import kl_divergence, token_logps
from nemojax.model.llama import Compute, embed, final_norm, head_weight
from nemojax.rewards.problems import ProblemSet, load_problems


class Exam:
    """Held-out texts and problems, with what the parent says to them."""

    def __init__(
        self,
        params: dict,
        arch: ArchSpec,
        tokenizer: Tokenizer,
        data: TextData,
        problems: ProblemSet,
        compute: Compute = Compute(),
    ):
        self.arch, self.compute = arch, compute
        self.texts = [batch for group in heldout_batches(data, tokenizer).values() for batch in group]
        if not self.texts:
            raise ValueError("data: expected held-out texts, got none as every heldout_share is 0; set one")
        self.questions = answer_batches(
            load_problems(problems), tokenizer, batch_size=data.batch_size, length=data.length, form="trace"
        )
        self.outer = {name: value for name, value in params.items() if name != "runs"}
        self.parents = [self._stream(params, arch, batch) for batch in self.texts]

    def __call__(self, params: dict, arch: ArchSpec) -> dict[str, float]:
        """Of a model with the parent's vocabulary: `kl` (parent || model) and `loss`, nats a token of the
        texts; `accuracy`, the share of problems whose working and answer greedy decoding would give exactly;
        `params` in blocks."""
        outer = {name: value for name, value in params.items() if name != "runs"}
        totals = np.zeros(3)
        for batch, parent_BTD in zip(self.texts, self.parents, strict=True):
            h_BTD = self._stream(params, arch, batch)
            totals += np.array(_losses(arch, self.arch, outer, self.outer, h_BTD, parent_BTD, batch))
        right = asked = 0.0
        for batch in self.questions:
            h_BTD = self._stream(params, arch, batch)
            sums = sums_of(arch.replace(blocks=()), ("accuracy",), 0, outer, (h_BTD,), h_BTD, batch)
            right += float(sums["accuracy"][0])
            asked += float(count(batch["weights"], batch["segments"])[1])
        return {
            "kl": float(totals[0] / totals[2]),
            "loss": float(totals[1] / totals[2]),
            "accuracy": right / asked,
            "params": float(arch.num_block_params()),
        }

    def _stream(self, params: dict, arch: ArchSpec, batch: Mapping[str, Any]) -> jax.Array:
        """The residual stream after the last layer, [B, T, D]."""
        shape = arch.replace(blocks=())  # programs know sub-blocks, not which model they stand in
        h_BTD = embed(params, batch["tokens"], self.compute)
        for layer, weights in layers_of(params, arch):
            for part in PARTS:
                sub = sub_of(arch.blocks[layer], part)
                p = weights.get(part, {})
                h_BTD = run_part(shape, part, sub, p, h_BTD, batch["positions"], batch["segments"])
        return h_BTD


@partial(jax.jit, static_argnames=("arch", "parent_arch"))
def _sums(
    arch: ArchSpec,
    parent_arch: ArchSpec,
    outer: dict,
    parent_outer: dict,
    h_BTD: jax.Array,
    parent_BTD: jax.Array,
    batch: dict,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    weights_BT = batch["weights"]
    x_BTD, teacher_BTD = final_norm(outer, arch, h_BTD), final_norm(parent_outer, parent_arch, parent_BTD)
    kl_BT = kl_divergence(x_BTD, head_weight(outer), teacher_BTD, head_weight(parent_outer))
    nll_BT = -token_logps(x_BTD, head_weight(outer), batch["targets"])[0]
    return jnp.sum(kl_BT * weights_BT), jnp.sum(nll_BT * weights_BT), jnp.sum(weights_BT)


def _losses(arch: ArchSpec, parent_arch: ArchSpec, *rest: Any) -> list[float]:
    """Sums over a batch: KL, loss, tokens."""
    sums = _sums(arch.replace(blocks=()), parent_arch.replace(blocks=()), *rest)
    return [float(s) for s in sums]
