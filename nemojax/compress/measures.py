"""What a replacement is judged by: Kullback-Leibler divergence, loss, hidden cosine, top-1, right answers.

Legend: B batch, T tokens, C chunk of tokens, D model, S documents, V vocabulary, K replacements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nemojax.arch import ArchSpec
from nemojax.data.chat import chat_examples
from nemojax.data.examples import Example, StoredExamples
from nemojax.data.mixture import rows_of_process
from nemojax.data.packing import Batch, packed_batches
from nemojax.data.problems import Problem, conversation, lines
from nemojax.data.tokenizer import Tokenizer
from nemojax.losses.hidden import cosine_distance
from nemojax.losses.tokens import logits_of, over_chunks
from nemojax.model.llama import final_norm, head_weight

Metric = Literal["kl", "lm_loss", "cosine", "top1", "accuracy"]
Form = Literal["chat", "text", "trace"]  # how a problem is put to a model
Row = dict[str, float]  # one replacement's scores by metric, lower is better
MEANINGS: Mapping[Metric, str] = {
    "kl": "KL(parent || changed), nats a token",
    "lm_loss": "rise of the next-token loss, nats a token",
    "cosine": "1 - cosine of the normed final hidden states, mean over tokens",
    "top1": "share of tokens whose likeliest successor is not the parent's",
    "accuracy": "fall of the share of documents whose every target is the likeliest token",
}
OF_VOCABULARY = ("kl", "lm_loss", "top1", "accuracy")


def in_turn(result: Any, mesh: Mesh | None) -> Any:
    """The result; where devices are threads of one CPU, once it is there.

    Programs that do not depend on each other start on such devices in any order, and each may hold the
    threads that the other's reductions wait for.
    """
    if mesh is not None and mesh.size > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(result)
    return result


@jax.jit
def count(weights_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of weights, documents with any weight)."""
    return jnp.sum(weights_BT), jnp.sum(_per_document(weights_BT > 0, segments_BT) > 0)


def _per_document(flags_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """How many flags each document of each row has, [B, T + 1] i32; 0 is padding."""
    add = partial(jax.ops.segment_sum, num_segments=segments_BT.shape[1] + 1)
    return jax.vmap(add)(flags_BT.astype(jnp.int32), segments_BT)


@partial(jax.jit, static_argnames=("arch", "metrics", "chunk"))
def sums_of(
    arch: ArchSpec,
    metrics: tuple[Metric, ...],
    chunk: int,
    outer: dict,
    finals: tuple[jax.Array, ...],
    parent_BTD: jax.Array,
    batch: dict,
) -> dict[str, jax.Array]:
    """{metric: sums over weighted tokens, for `accuracy` the number of documents got right}, each [K]."""
    weights_BT = batch["weights"]
    x_KBTD = final_norm(outer, arch, jnp.stack(finals))
    teacher_BTD = final_norm(outer, arch, parent_BTD)
    found: dict[str, jax.Array] = {}
    if set(metrics) & set(OF_VOCABULARY):
        measure = partial(_of_vocabulary, metrics, head_weight(outer))
        x_BTKD = jnp.moveaxis(x_KBTD, 0, 2)
        found = over_chunks(measure, chunk, x_BTKD, teacher_BTD, batch["targets"])
    if "cosine" in metrics:
        found["cosine"] = jnp.moveaxis(cosine_distance(x_KBTD, teacher_BTD[None]), 0, 2)
    sums = {m: jnp.sum(v * weights_BT[..., None], axis=(0, 1)) for m, v in found.items() if m != "accuracy"}
    if "accuracy" in found:
        asked_BT = weights_BT > 0
        asked_BS = _per_document(asked_BT, batch["segments"]) > 0

        def solved(hit_BT: jax.Array) -> jax.Array:
            missed_BS = _per_document(asked_BT & ~hit_BT, batch["segments"])
            return jnp.sum(asked_BS & (missed_BS == 0)).astype(jnp.float32)

        sums["accuracy"] = jax.lax.map(solved, jnp.moveaxis(found["accuracy"], 2, 0))
    # an argmax over NaN is a number: what is broken must not look merely wrong
    fine_K = jnp.isfinite(jnp.sum(jnp.abs(x_KBTD.astype(jnp.float32)), axis=(1, 2, 3)))
    return {m: jnp.where(fine_K, total, jnp.nan) for m, total in sums.items()}


def _of_vocabulary(
    metrics: tuple[str, ...],
    w_VD: jax.Array,
    x_BCKD: jax.Array,
    teacher_BCD: jax.Array,
    targets_BC: jax.Array,
) -> dict[str, jax.Array]:
    """What needs logits, at every position, each [B, C, K]; the parent's are made once for all of K."""
    teacher_BCV = jax.nn.log_softmax(logits_of(teacher_BCD, w_VD))  # what is not used is not computed
    p_BCV, best_BC = jnp.exp(teacher_BCV), jnp.argmax(teacher_BCV, axis=-1)

    def one(x_BCD: jax.Array) -> dict[str, jax.Array]:
        logits_BCV = logits_of(x_BCD, w_VD)
        logp_BCV = logits_BCV - jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
        likeliest_BC = jnp.argmax(logits_BCV, axis=-1)
        out: dict[str, jax.Array] = {}
        if "kl" in metrics:
            out["kl"] = jnp.sum(p_BCV * (teacher_BCV - logp_BCV), axis=-1)
        if "lm_loss" in metrics:
            hit_BCV = jnp.arange(logp_BCV.shape[-1]) == targets_BC[..., None]
            out["lm_loss"] = -jnp.sum(jnp.where(hit_BCV, logp_BCV, 0.0), axis=-1)
        if "top1" in metrics:
            out["top1"] = (likeliest_BC != best_BC).astype(jnp.float32)
        if "accuracy" in metrics:
            out["accuracy"] = likeliest_BC == targets_BC
        return out

    found = jax.lax.map(one, jnp.moveaxis(x_BCKD, 2, 0))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2), found)


def answer_batches(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    form: Form = "chat",
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """Packed rows of problems in which the reference answers alone, and their end, carry weight.

    form: a conversation without thinking; or, for a parent that knows no chat, the line `prompt answer`
    (`text`) or `prompt working -> answer` (`trace`, where the working carries weight too).
    Each process gets its rows; ValueError where they do not divide, or for a problem longer than `length`.
    """
    rows_of_process(batch_size, process_count)
    if form == "chat":
        chats = [conversation(problem, thinking=False) for problem in problems]
        examples, _ = chat_examples(chats, tokenizer, length)
    else:
        examples = StoredExamples(_answer_line(problem, tokenizer, form) for problem in problems)
    batches = packed_batches(examples, batch_size, length, tokenizer.pad_id, "error")
    mine = slice(process_index, None, process_count)
    return [{name: rows[mine] for name, rows in batch.items()} for batch in batches]


def _answer_line(problem: Problem, tokenizer: Tokenizer, form: Literal["text", "trace"]) -> Example:
    [line] = lines(problem, form)
    prompt, whole = tokenizer.encode(problem.prompt), tokenizer.encode(line)
    same = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    ids = np.asarray([tokenizer.bos_id, *whole, tokenizer.eos_id], np.int32)
    return Example(ids, (np.arange(len(ids)) > same).astype(np.float32))
