"""The distillation loss of a student against frozen teachers.

Terms between next-token distributions, between hidden states, and the language-model loss, each with a
weight that may change over the steps. The default is Puzzle's global distillation (arXiv:2411.19146): 1 -
cos(student, teacher) of hidden states, averaged over layers, plus KL(teacher || student), and no
language-model loss. Hidden states are matched by global layer index, so a heterogeneous student has no index
of its own.

Shape letters: B batch, T length, D model, K kept outcomes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec, NoOp
from nemojax.config import field, required
from nemojax.losses.divergence import DIVERGENCES, Comparison, Head, TopK, Weighting, top_k_of, vocab_loss
from nemojax.losses.hidden import cosine_distance, matched_layers, relative_error
from nemojax.model import llama
from nemojax.model.llama import Compute, Params, Tap, Taps
from nemojax.train import LossFn

Term = Literal["kl", "reverse_kl", "jsd", "lm", "cosine", "mse", "attention"]
TERMS: tuple[Term, ...] = ("kl", "reverse_kl", "jsd", "lm", "cosine", "mse", "attention")
DISTANCES = {"cosine": cosine_distance, "mse": relative_error, "attention": cosine_distance}
# what a teacher of a smaller vocabulary reads in place of a token that it lacks; nothing is compared there
STAND_IN = 0


@dataclass(frozen=True)
class Ramp:
    """A weight that goes from the term's own value to `to` between two steps."""

    term: Term = required("term of the loss")
    to: float = required("weight from the last step of the ramp on")
    last: int = required("optimiser step at which the ramp ends")
    first: int = field(0, "optimiser step at which it starts")
    shape: Literal["linear", "cosine"] = field("linear", "course between them")

    def __post_init__(self):
        if not 0 <= self.first < self.last:
            raise ValueError(
                f"ramps: expected 0 <= first < last for {self.term}, got {self.first} and {self.last}"
            )

    def at(self, start: float, step: jax.Array) -> jax.Array:
        done = jnp.clip((step - self.first) / (self.last - self.first), 0.0, 1.0)
        if self.shape == "cosine":
            done = (1 - jnp.cos(jnp.pi * done)) / 2
        return start + (self.to - start) * done


@dataclass(frozen=True)
class TokenTerms:
    """Finer points of kl, reverse_kl and jsd."""

    beta: float = field(0.5, "the teacher's share in the mean that jsd compares with; 0: kl, 1: reverse_kl")
    shared: int = field(
        0, "ids compared, the first ones, where only added tokens differ; 0: both vocabularies are the same"
    )
    weighting: Weighting = field(
        "uniform", "a position counts by its weight, times the teacher's entropy or confidence (0 to 1)"
    )

    def __post_init__(self):
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta: expected 0 to 1, got {self.beta}")
        if self.shared < 0:
            raise ValueError(f"shared: expected 0 or more ids, got {self.shared}")


@dataclass(frozen=True)
class DistillWeights:
    kl: float = field(1.0, "weight of KL(teacher || student), in nats a token")
    cosine: float = field(1.0, "weight of 1 - cos of hidden states, averaged over layers")
    lm: float = field(0.0, "weight of the next-token loss on the data, in nats a token")
    temperature: float = field(
        1.0, "softmax temperature of kl, reverse_kl and jsd; its square multiplies them"
    )
    reverse_kl: float = field(0.0, "weight of KL(student || teacher), in nats a token")
    jsd: float = field(0.0, "weight of the generalised Jensen-Shannon divergence, in nats a token")
    mse: float = field(
        0.0, "weight of |student - teacher|^2 / |teacher|^2 of hidden states, averaged over layers"
    )
    attention: float = field(
        0.0, "weight of 1 - cos of attention outputs, averaged over layers that have both"
    )
    top_k: int = field(
        0, "outcomes compared: the teacher's most likely and one of all others; 0: the vocabulary"
    )
    layers: str = field("", "student's layers to teacher's, as 0-3:0-3,4:6; empty: those of the same index")
    tokens: TokenTerms = field(TokenTerms(), "finer points of kl, reverse_kl and jsd")
    ramps: tuple[Ramp, ...] = field((), "weights that change over the steps, one ramp a term")

    def __post_init__(self):
        weights = [*(getattr(self, term) for term in TERMS), *(ramp.to for ramp in self.ramps)]
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(f"{', '.join(TERMS)}: expected weights >= 0, at least one above 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 or more outcomes, got {self.top_k}")
        ramped = [ramp.term for ramp in self.ramps]
        if len(set(ramped)) < len(ramped) or not set(ramped) <= set(TERMS):
            raise ValueError(f"ramps: expected at most one of each of {', '.join(TERMS)}, got {ramped}")

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms that have a weight at some step."""
        ramped = {ramp.term for ramp in self.ramps if ramp.to}
        return tuple(term for term in TERMS if getattr(self, term) or term in ramped)

    @property
    def divergences(self) -> tuple[Term, ...]:
        """Terms that need a teacher's next-token distributions, run or cached."""
        return tuple(term for term in self.terms if term in DIVERGENCES)

    @property
    def hidden(self) -> tuple[Term, ...]:
        """Terms that need a teacher's hidden states, which are never cached."""
        return tuple(term for term in self.terms if term in DISTANCES)

    def at(self, step: jax.Array) -> dict[str, Any]:
        """The weight of each of `terms` after `step` optimiser steps."""
        ramps = {ramp.term: ramp for ramp in self.ramps}
        own = {term: getattr(self, term) for term in self.terms}
        return {t: ramps[t].at(w, step) if t in ramps else w for t, w in own.items()}

    def comparison(self) -> Comparison:
        return Comparison(
            self.temperature, self.top_k, self.tokens.beta, self.tokens.shared, self.tokens.weighting
        )


@dataclass(frozen=True)
class Teacher:
    """One of several teachers: their distributions are mixed, and their hidden terms weighted, by `share`
    over the sum of all shares. `compute`: the student's by default."""

    arch: ArchSpec
    share: float = 1.0
    compute: Compute | None = None

    def __post_init__(self):
        if not (self.share > 0 and math.isfinite(self.share)):
            raise ValueError(f"teacher: expected a share above 0, got {self.share}")


def distill_loss(
    student: ArchSpec,
    teachers: ArchSpec | Sequence[Teacher],
    loss: DistillWeights,
    compute: Compute = Compute(),
    chunk: int = 0,
) -> LossFn:
    """A LossFn whose `frozen` is the teacher's parameters, or a tuple of them in the order of `teachers`.

    The teachers run in the same program, and leave no gradients. Every term counts the positions that
    `batch["weights"]` counts, and the weights are those of step `batch["step"]` (0 without it). `chunk`
    positions of a row have logits at once; 0: all. Where the batch brings `teacher_ids` and
    `teacher_logps` ([B, T, K], better with `teacher_tail` [B, T]: what `teacher_top_k` gives), divergences
    come from these, and `frozen` may be None without hidden terms. ValueError for teachers that do not fit.
    """
    everyone = _teachers(teachers)
    shares = [t.share / sum(t.share for t in everyone) for t in everyone]
    pairs = [_pairs(student, teacher.arch, loss) for teacher in everyone]
    own_taps = _taps([pair for of_one in pairs for pair in of_one], 0)
    how = loss.comparison()
    if loss.divergences:
        _check_vocabularies(student, everyone, how)

    def loss_fn(params: Params, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        coefficients = loss.at(batch.get("step", jnp.zeros((), jnp.int32)))
        weights_BT = batch["weights"]
        h_BTD, taps = llama.hidden(params, student, batch, taps=own_taps, compute=compute)
        compared_BT = weights_BT * _known(batch, everyone)
        cached = "teacher_ids" in batch
        states: list[tuple[Head, Taps]] = []
        if loss.hidden or (loss.divergences and not cached):
            states = [
                _state(t, weights, batch, _taps(of_one, 1), t.compute or compute)
                for t, weights, of_one in zip(everyone, _parameters(frozen, everyone), pairs, strict=True)
            ]
        total, metrics = jnp.zeros(()), {}
        if of_tokens := {t: c for t, c in coefficients.items() if t not in DISTANCES}:
            total, sums = vocab_loss(
                Head(llama.final_norm(params, student, h_BTD), llama.head_weight(params)),
                TopK(batch["teacher_ids"], batch["teacher_logps"])
                if cached
                else [head for head, _ in states],
                of_tokens,
                weights_BT,
                targets_BT=batch["targets"],
                compared_BT=compared_BT,
                how=how,
                shares=shares,
                chunk=chunk,
            )
            metrics |= {k: (s, jnp.sum(weights_BT if k == "lm" else compared_BT)) for k, s in sums.items()}
        for share, of_one, (_, their_taps) in zip(shares, pairs, states, strict=False):
            for term in loss.hidden:
                value = share * _distance(term, of_one, taps, their_taps, compared_BT)
                total += coefficients[term] * value
                before = metrics[term][0] if term in metrics else 0.0
                metrics[term] = (before + value, jnp.sum(compared_BT))
        return total, jnp.sum(weights_BT), metrics

    return loss_fn


def teacher_top_k(
    teachers: ArchSpec | Sequence[Teacher], loss: DistillWeights, compute: Compute = Compute(), chunk: int = 0
) -> Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """(frozen, batch) -> {"teacher_ids" [B, T, K] i32, "teacher_logps" [B, T, K] f32, "teacher_tail" [B, T]
    f32}, K = `loss.top_k`: what `distill_loss` with this loss selects of these teachers, descending, at the
    loss's temperature, and the log of what all other tokens have together."""
    everyone = _teachers(teachers)
    shares = [t.share / sum(t.share for t in everyone) for t in everyone]
    if not loss.top_k:
        raise ValueError("loss.top_k: expected 1 or more outcomes to keep of the teacher, got 0")

    def run(frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        heads = [
            _state(t, weights, batch, (), t.compute or compute)[0]
            for t, weights in zip(everyone, _parameters(frozen, everyone), strict=True)
        ]
        kept = top_k_of(heads, how=loss.comparison(), shares=shares, chunk=chunk)
        return {"teacher_ids": kept.ids_BTK, "teacher_logps": kept.logps_BTK, "teacher_tail": kept.tail()}

    return run


def _teachers(teachers: ArchSpec | Sequence[Teacher]) -> tuple[Teacher, ...]:
    everyone = (Teacher(teachers),) if isinstance(teachers, ArchSpec) else tuple(teachers)
    if not everyone:
        raise ValueError("distill: expected at least one teacher, got none")
    return everyone


def _parameters(frozen: Any, teachers: Sequence[Teacher]) -> tuple[Any, ...]:
    everyone = frozen if isinstance(frozen, tuple) else (frozen,)
    if len(everyone) != len(teachers) or any(params is None for params in everyone):
        given = sum(params is not None for params in everyone)
        raise ValueError(f"distill: expected the parameters of {len(teachers)} teachers, got {given}")
    return jax.lax.stop_gradient(everyone)


def _state(
    teacher: Teacher, params: Any, batch: Mapping[str, jax.Array], taps: tuple[Tap, ...], compute: Compute
) -> tuple[Head, Taps]:
    tokens_BT = batch["tokens"]
    shown = {**batch, "tokens": jnp.where(tokens_BT < teacher.arch.vocab_size, tokens_BT, STAND_IN)}
    h_BTD, tapped = llama.hidden(params, teacher.arch, shown, taps=taps, compute=compute)
    return Head(llama.final_norm(params, teacher.arch, h_BTD), llama.head_weight(params)), tapped


def _cached(batch: Mapping[str, jax.Array]) -> TopK:
    return TopK(batch["teacher_ids"], batch["teacher_logps"], batch.get("teacher_tail"))


def _known(batch: Mapping[str, jax.Array], teachers: Sequence[Teacher]) -> jax.Array:
    """1 where all teachers have the token, [B, T] f32."""
    return (batch["tokens"] < min(t.arch.vocab_size for t in teachers)).astype(jnp.float32)


def _distance(
    term: str, pairs: Sequence[tuple[str, Tap, Tap]], taps: Taps, their_taps: Taps, weights_BT: jax.Array
) -> jax.Array:
    """The term's distance, averaged over layers and summed over weighted positions."""

    # recomputed in the backward pass: of every layer its states stay, not their f32 copies
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(own_BTD: jax.Array, their_BTD: jax.Array) -> jax.Array:
        return jnp.sum(DISTANCES[term](own_BTD, their_BTD) * weights_BT)

    found = [one(taps[own], their_taps[theirs]) for name, own, theirs in pairs if name == term]
    return sum(found, start=jnp.zeros(())) / len(found)


def _pairs(student: ArchSpec, teacher: ArchSpec, loss: DistillWeights) -> tuple[tuple[str, Tap, Tap], ...]:
    """(term, student's tap, teacher's tap) of all that the hidden terms compare."""
    if not loss.hidden:
        return ()
    if teacher.dim != student.dim:
        raise ValueError(
            f"distill: expected a teacher with dim {student.dim} as the student's, got {teacher.dim}; "
            f"or set {', '.join(loss.hidden)} to 0"
        )
    layers = matched_layers(student, teacher, loss.layers)
    attending = tuple(
        (("attn", i), ("attn", j))
        for i, j in layers
        if not any(isinstance(b.attn, NoOp) for b in (student.blocks[i], teacher.blocks[j]))
    )
    found = []
    for term in loss.hidden:
        of_term = attending if term == "attention" else layers
        if not of_term:
            raise ValueError(f"loss.{term}: expected layers to compare, got none; set it to 0")
        found += [(term, own, theirs) for own, theirs in of_term]
    return tuple(found)


def _taps(pairs: Sequence[tuple[str, Tap, Tap]], side: int) -> tuple[Tap, ...]:
    return tuple(dict.fromkeys(taps[side] for _, *taps in pairs))


def _check_vocabularies(student: ArchSpec, teachers: Sequence[Teacher], how: Comparison) -> None:
    smallest = min(student.vocab_size, *(t.arch.vocab_size for t in teachers))
    if how.shared > smallest:
        raise ValueError(
            f"loss.tokens.shared: expected at most the {smallest} ids of the smallest vocabulary, "
            f"got {how.shared}"
        )
    for teacher in teachers:
        if not how.shared and teacher.arch.vocab_size != student.vocab_size:
            raise ValueError(
                f"distill: expected a teacher with vocab_size {student.vocab_size} as the student's, got "
                f"{teacher.arch.vocab_size}; if only added tokens differ, set loss.tokens.shared to the "
                "number of ids that mean the same"
            )
    if how.top_k >= (how.shared or student.vocab_size):
        raise ValueError(
            f"loss.top_k: expected less than the {how.shared or student.vocab_size} ids compared, "
            f"got {how.top_k}"
        )
