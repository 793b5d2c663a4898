"""What every child of a study is measured by: held-out texts, and problems that have one right answer.

A child is walked through half a block at a time with the programs that the scores use too, so that a hundred
children of as many architectures compile nothing of their own.
Legend: B batch, T tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.compress.subblock import PARTS, layers_of, run_part, sub_of
from nemojax.data.examples import Example
from nemojax.data.mixture import TextData, heldout_batches
from nemojax.data.packing import Batch, row_per_example
from nemojax.data.problems import lines, make_problems
from nemojax.data.tokenizer import Tokenizer
from nemojax.losses.tokens import kl_divergence, token_logps
from nemojax.model.llama import Compute, embed, final_norm, head_weight
from nemojax.rewards.problems import ProblemSet


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
        self.questions = question_batches(tokenizer, problems, data.batch_size, data.length)
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
            wrong_B = np.asarray(_wrong(arch, outer, self._stream(params, arch, batch), batch))
            real_B = batch["weights"].sum(1) > 0
            right, asked = right + float((real_B & (wrong_B == 0)).sum()), asked + float(real_B.sum())
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


def question_batches(tokenizer: Tokenizer, problems: ProblemSet, rows: int, length: int) -> list[Batch]:
    """A problem a row: only its working, its answer and the end of the text have weight.

    Greedy decoding gives exactly these tokens if and only if each is the likeliest after those before it,
    so that one forward pass marks them.
    """
    examples = list(_examples(tokenizer, problems))
    examples = [example for example in examples if example.size <= length]
    blank = Example(examples[0].ids, np.zeros_like(examples[0].weights))
    examples += [blank] * (-len(examples) % rows)
    return [
        row_per_example(examples[i : i + rows], length, tokenizer.pad_id)
        for i in range(0, len(examples), rows)
    ]


def _examples(tokenizer: Tokenizer, problems: ProblemSet) -> Iterator[Example]:
    for name in problems.families:
        for problem in make_problems(name, problems.count, problems.seed, problems.split):
            [text] = lines(problem, "trace")
            ids, asked = tokenizer.encode(text), tokenizer.encode(problem.prompt)
            given = 1 + sum(1 for _ in _same(ids, asked))
            full = np.asarray([tokenizer.bos_id, *ids, tokenizer.eos_id], np.int32)
            yield Example(full, (np.arange(len(full)) >= given).astype(np.float32))


def _same(a: Sequence[int], b: Sequence[int]) -> Iterator[int]:
    """The beginning that two texts share."""
    for x, y in zip(a, b, strict=False):
        if x != y:
            return
        yield x


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


@partial(jax.jit, static_argnames="arch")
def _missed(arch: ArchSpec, outer: dict, h_BTD: jax.Array, batch: dict) -> jax.Array:
    logits_BTV = jnp.einsum("BTD,VD->BTV", final_norm(outer, arch, h_BTD), head_weight(outer))
    missed_BT = jnp.argmax(logits_BTV, axis=-1) != batch["targets"]
    return jnp.sum(missed_BT * batch["weights"], axis=1)


def _wrong(arch: ArchSpec, outer: dict, h_BTD: jax.Array, batch: dict) -> jax.Array:
    """Tokens with weight that are not the likeliest, by row."""
    return _missed(arch.replace(blocks=()), outer, h_BTD, batch)
