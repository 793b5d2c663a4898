"""Whether a model uses a long context: needles and other questions by length and depth, loss by position.

Questions are made in haystack.py. Prompt and answer together take a length that is counted in tokens of the
model's own tokenizer. Answers are graded by the share of the expected strings in them, as RULER does.

Shape letters: B rows, T positions, D model, C chunk, K buckets of positions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.buckets import place
from nemojax.checkpoints.store import to_host
from nemojax.config import field
from nemojax.data.chat import encode_prompt
from nemojax.data.examples import Example
from nemojax.data.packing import make_batch
from nemojax.data.sources import input_files
from nemojax.data.tokenizer import Tokenizer
from nemojax.evaluate.haystack import PLACED, Draft, HaystackConfig, Pieces, Task, draft, largest, load_pieces
from nemojax.generate.local import LocalGenerator, Model, batch_config, prepared
from nemojax.generate.protocol import Generator, Request
from nemojax.generate.sampling import SamplingConfig
from nemojax.generate.shares import answered, share
from nemojax.losses.tokens import logits_of, over_chunks, token_logps
from nemojax.model.llama import Compute, Params, final_norm, head_weight, hidden
from nemojax.sharding import place_batch, use_mesh, ways_of

Record = dict[str, Any]
_CHUNK = 1024  # positions whose logits are held at once


@dataclass(frozen=True)
class LongContextConfig:
    lengths: tuple[int, ...] = field((), "tokens of prompt and answer together; empty: nothing is measured")
    tasks: tuple[Task, ...] = field(
        ("single",),
        "single, multikey, needles, multivalue, multiquery, variables, common_words, frequent_words",
    )
    depths: tuple[float, ...] = field(
        (0.0, 0.25, 0.5, 0.75, 1.0),
        "places in the text (0 its beginning) of the one needle of single, multikey and needles",
    )
    count: int = field(4, "questions a length and task; of single, multikey and needles at each depth")
    haystack: HaystackConfig = field(HaystackConfig(), "what is hidden, and in what")
    prompts: Literal["raw", "chat"] = field(
        "raw", "raw: the model continues the beginning of the answer; chat: thinking is off"
    )
    max_new_tokens: int = field(128, "tokens of an answer at most, for which the length leaves room")
    measures: tuple[Literal["generate", "forced"], ...] = field(
        ("generate",),
        "generate the answer; forced: read the expected one, for its probability (not of servers)",
    )
    cache_tokens: int = field(
        65536, "tokens of all questions that are in memory at once, at least one of them"
    )
    tokenizer: str = field("", "whose tokens are counted for servers; empty: the first artifact's")
    seed: int = field(0, "seed of the questions")

    def __post_init__(self):
        for name in ("count", "max_new_tokens", "cache_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("lengths", "tasks", "depths", "measures"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: expected each once, got {list(given)}")
            if not given and name != "lengths":
                raise ValueError(f"{name}: expected at least one, got none")
        if self.lengths and min(self.lengths) <= self.max_new_tokens:
            raise ValueError(
                f"lengths: expected more than the {self.max_new_tokens} tokens of max_new_tokens, got "
                f"{min(self.lengths)}"
            )
        if outside := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise ValueError(f"depths: expected numbers from 0 to 1, got {outside[0]}")


@dataclass(frozen=True)
class Sample:
    """A question of `length` tokens with its answer. depth: None where there is no one needle.

    Questions of one `index` ask for the same strings, whatever their depth.
    """

    task: Task
    length: int
    depth: float | None
    index: int
    request: Request
    question: str
    expected: tuple[str, ...]


def make_samples(cfg: LongContextConfig, tokenizer: Tokenizer, length: int) -> list[Sample]:
    """The questions of a length, the same for the same configuration and tokenizer. Each prompt is as long as
    it can be by whole words.

    ValueError for a length that a question does not fit in, or an answer longer than `max_new_tokens`.
    """
    pieces = load_pieces(cfg.haystack, tokenizer, length)
    return [
        _make_sample(cfg, tokenizer, pieces, task, length, depth, index)
        for task in cfg.tasks
        for depth in (cfg.depths if task in PLACED else (None,))
        for index in range(cfg.count)
    ]


def _make_sample(
    cfg: LongContextConfig,
    tokenizer: Tokenizer,
    pieces: Pieces,
    task: Task,
    length: int,
    depth: float | None,
    index: int,
) -> Sample:
    budget = length - cfg.max_new_tokens
    needed = budget
    rng = np.random.default_rng([cfg.seed, index, *task.encode()])
    for made in draft(task, rng, pieces, cfg.haystack.values, budget, depth or 0.0):
        answer = len(tokenizer.encode(_answer(cfg, made.expected)))
        if answer > cfg.max_new_tokens:
            raise ValueError(
                f"long_context.max_new_tokens: expected at least {answer}, which the answer to {task} takes, "
                f"got {cfg.max_new_tokens}"
            )

        def size(n: int, made: Draft = made) -> int:
            return len(prompt_ids(tokenizer, _request(cfg, made, n)))

        if (n := largest(size, budget, made.least, made.most)) is not None:
            question = f"{made.ask} {made.cue}" if cfg.prompts == "raw" else made.ask
            return Sample(task, length, depth, index, _request(cfg, made, n), question, made.expected)
        needed = size(made.least) + cfg.max_new_tokens
    raise ValueError(
        f"long_context.lengths: expected at least {needed} tokens for {task}, {cfg.max_new_tokens} of them "
        f"for the answer, got {length}"
    )


def _request(cfg: LongContextConfig, made: Draft, n: int) -> Request:
    text = f"{made.intro}\n\n{made.write(n)}\n\n{made.ask}"
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=cfg.max_new_tokens)
    if cfg.prompts == "raw":
        return Request(prompt=f"{text} {made.cue}", sampling=sampling)
    said = {"role": "user", "content": f"{text} Answer with nothing else."}
    return Request(messages=(said,), thinking=False, sampling=sampling)


def prompt_ids(tokenizer: Tokenizer, request: Request) -> list[int]:
    """Ids of a raw or a chat's prompt, as a generator reads them."""
    if request.prompt is not None:
        return [tokenizer.bos_id, *tokenizer.encode(request.prompt)]
    assert request.messages is not None
    return encode_prompt(tokenizer, request.messages, request.thinking)


def _answer(cfg: LongContextConfig, expected: Sequence[str]) -> str:
    """The expected answer in the words that follow the prompt."""
    return (" " if cfg.prompts == "raw" else "") + ", ".join(expected)


def inputs(cfg: LongContextConfig) -> list[Path]:
    """The files and directories that questions are made of."""
    files = input_files((cfg.haystack.source,)) if cfg.haystack.kind == "source" else []
    return [*files, place(cfg.tokenizer)] if cfg.tokenizer else files


def ask(generator: Generator, samples: Sequence[Sample]) -> list[Record]:
    """What was answered and how good it is: {"recall", "exact" (of one expected string), "text", "tokens",
    "prompt_tokens", "finished"} for each sample."""
    records = []
    given = generator.answer([sample.request for sample in samples])
    for sample, [answer] in zip(samples, given, strict=True):
        record: Record = {"recall": recall(sample.expected, answer.content)}
        if len(sample.expected) == 1:
            record["exact"] = float(is_exact(sample.expected[0], answer.content))
        records.append(
            record
            | {
                "text": answer.text,
                "tokens": answer.num_tokens,
                "prompt_tokens": answer.prompt_tokens,
                "finished": answer.finish_reason != "length",
            }
        )
    return records


def recall(expected: Sequence[str], text: str) -> float:
    """The share of the expected strings that occur in the text, in any case, as words of their own: RULER's
    measure, but that a longer number does not stand for one within it."""
    found = [re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in expected]
    return sum(match is not None for match in found) / len(expected)


def is_exact(expected: str, text: str) -> bool:
    """Whether the first word of the text, marks around it apart, is the expected one."""
    first = re.search(r"\w+", text)
    return first is not None and first[0].lower() == expected.lower()


def ask_all(model: Model, cfg: LongContextConfig, ready: Model | None = None) -> list[Record]:
    """All measures of a model, in one process or several, a record for each question: what it is (as of
    `ask_server`), and `ask`'s results or {"logprob", "forced"} or both. `ready`: the same model as `prepared`
    has it, where that is at hand. ValueError for a length above the context."""
    check_lengths(cfg, model.arch, str(model.tokenizer.path))
    generates = "generate" in cfg.measures
    ready = prepared(model) if generates and ready is None else ready
    records: list[Record] = []
    for length in cfg.lengths:
        samples = make_samples(cfg, model.tokenizer, length)
        found = [_described(sample) for sample in samples]
        slots = max(1, cfg.cache_tokens // length)
        if generates:
            assert ready is not None
            found = [a | b for a, b in zip(found, _shared(ready, samples, slots), strict=True)]
        if "forced" in cfg.measures:
            read = read_answers(model, cfg, samples, slots)
            found = [a | b for a, b in zip(found, read, strict=True)]
        records += found
    return records


def _shared(model: Model, samples: Sequence[Sample], slots: int) -> list[Record]:
    """`ask` of a model whose weights each process has on its own devices, and a share of the samples."""
    local = LocalGenerator(model, batch_config(model, share(len(samples)), samples[0].length, slots))
    return answered(len(samples), 1, lambda mine: ask(local, [samples[i] for i in mine]))


def ask_server(generator: Generator, tokenizer: Tokenizer, cfg: LongContextConfig) -> list[Record]:
    """{"task", "length", "depth", "index", "question", "expected"} of each question, and `ask`'s results."""
    records: list[Record] = []
    for length in cfg.lengths:
        samples = make_samples(cfg, tokenizer, length)
        records += [_described(s) | r for s, r in zip(samples, ask(generator, samples), strict=True)]
    return records


def check_lengths(cfg: LongContextConfig, arch: ArchSpec, name: str) -> None:
    """ValueError for a length that the model was not made for."""
    if cfg.lengths and max(cfg.lengths) > arch.context:
        raise ValueError(
            f"long_context.lengths: expected at most {arch.context} tokens, the context of {name}, got "
            f"{max(cfg.lengths)}; ask shorter questions or extend the model's context"
        )


def _described(sample: Sample) -> Record:
    names = ("task", "length", "depth", "index", "question", "expected")
    return {name: getattr(sample, name) for name in names} | {"expected": list(sample.expected)}


def read_answers(
    model: Model, cfg: LongContextConfig, samples: Sequence[Sample], rows: int
) -> list[dict[str, float]]:
    """{"logprob": of the expected answer after the prompt, in nats, "forced": 1 if each of its tokens is the
    likeliest} for samples of one length, `rows` at a time. Several strings are read in their order in the
    text."""
    out: list[dict[str, float]] = []
    length = samples[0].length
    with use_mesh(model.mesh):
        rows = -(-min(rows, len(samples)) // ways_of("batch")) * ways_of("batch")
        for first in range(0, len(samples), rows):
            group = [_example(model.tokenizer, cfg, sample) for sample in samples[first : first + rows]]
            filled = [[example] for example in group] + [[]] * (rows - len(group))
            rows_of_all = make_batch(filled, length, model.tokenizer.pad_id)
            batch = place_batch(rows_of_all, model.mesh, shared=True)
            logp_B, likeliest_B = _read(model.params, batch, arch=model.arch, compute=model.compute)
            scores = zip(to_host(logp_B), to_host(likeliest_B), strict=True)
            out += [{"logprob": float(p), "forced": float(hit)} for p, hit in scores][: len(group)]
    return out


def _example(tokenizer: Tokenizer, cfg: LongContextConfig, sample: Sample) -> Example:
    """Prompt and expected answer, of which only the answer counts."""
    prompt, answer = prompt_ids(tokenizer, sample.request), tokenizer.encode(_answer(cfg, sample.expected))
    weights = np.repeat(np.array([0.0, 1.0], np.float32), [len(prompt), len(answer)])
    return Example(np.array([*prompt, *answer], np.int32), weights)


@functools.partial(jax.jit, static_argnames=("arch", "compute"))
def _read(
    params: Params, batch: Mapping[str, jax.Array], *, arch: ArchSpec, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """(sum of weighted log-probabilities of the targets, whether all weighted ones are likeliest), [B]."""
    h_BTD, _ = hidden(params, arch, batch, compute=compute)
    x_BTD, w_VD = final_norm(params, arch, h_BTD), head_weight(params)
    logps_BT, _ = token_logps(x_BTD, w_VD, batch["targets"], chunk=_CHUNK)
    likeliest_BT = over_chunks(lambda x_BCD: jnp.argmax(logits_of(x_BCD, w_VD), axis=-1), _CHUNK, x_BTD)
    right_BT = (likeliest_BT == batch["targets"]) | (batch["weights"] == 0)
    return jnp.sum(logps_BT * batch["weights"], axis=1), jnp.all(right_BT, axis=1)


def summarise(records: Sequence[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {length: {"recall", "exact", "logprob", "forced" (what was measured of them), "samples",
    "depths": {depth: recall, or forced without it}}}}; of several tasks also "all", the mean over them."""
    tasks: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        tasks.setdefault(record["task"], {}).setdefault(str(record["length"]), []).append(record)
    out: dict[str, dict[str, dict[str, Any]]] = {
        task: {length: _cell(group) for length, group in lengths.items()} for task, lengths in tasks.items()
    }
    if len(out) > 1:
        lengths = dict.fromkeys(length for cells in out.values() for length in cells)
        out["all"] = {
            length: _means([cells[length] for cells in out.values()], ("recall", "forced"))
            | {"samples": sum(cells[length]["samples"] for cells in out.values())}
            for length in lengths
        }
    return out


def _cell(group: Sequence[Record]) -> dict[str, Any]:
    cell: dict[str, Any] = _means(group, ("recall", "exact", "logprob", "forced")) | {"samples": len(group)}
    by_depth: dict[str, list[float]] = {}
    for record in group:
        if record["depth"] is not None:
            score = record["recall"] if "recall" in record else record["forced"]
            by_depth.setdefault(f"{record['depth']:g}", []).append(score)
    return cell | ({"depths": {d: float(np.mean(v)) for d, v in by_depth.items()}} if by_depth else {})


def _means(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in names if name in rows[0]}


def position_loss(
    params: Params,
    arch: ArchSpec,
    batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    *,
    compute: Compute = Compute(),
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, list[dict[str, float]]]:
    """For each source [{"from", "to": tokens of the document that were read before the one predicted, "loss":
    nats a token, "tokens"}]: 1, 2, 3 to 4, 5 to 8 ..., without those that no token falls in.

    The loss falls from one to the next as long as more context helps.
    """
    out: dict[str, list[dict[str, float]]] = {}
    with use_mesh(mesh):
        for name, group in batches.items():
            placed = (place_batch(batch, mesh, shared=True) for batch in group)
            sums = [_by_position(params, b, arch=arch, compute=compute) for b in placed]
            found_2K = np.asarray(jax.tree.map(to_host, sums), np.float64).sum(axis=0)
            out[name] = [
                {"from": 2**k // 2 + 1, "to": 2**k, "loss": float(loss / weight), "tokens": float(weight)}
                for k, (loss, weight) in enumerate(found_2K.T)
                if weight
            ]
    return out


@functools.partial(jax.jit, static_argnames=("arch", "compute"))
def _by_position(
    params: Params, batch: Mapping[str, jax.Array], *, arch: ArchSpec, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """(weighted losses, weights) summed over positions of k bits, each [K]."""
    h_BTD, _ = hidden(params, arch, batch, compute=compute)
    x_BTD, length = final_norm(params, arch, h_BTD), h_BTD.shape[1]
    logps_BT, _ = token_logps(x_BTD, head_weight(params), batch["targets"], chunk=_CHUNK)
    bits_BT = 32 - jax.lax.clz(batch["positions"])
    here_BTK = bits_BT[..., None] == jnp.arange((length - 1).bit_length() + 1)
    weights_BTK = jnp.where(here_BTK, batch["weights"][..., None], 0.0)
    return -jnp.sum(logps_BT[..., None] * weights_BTK, axis=(0, 1)), jnp.sum(weights_BTK, axis=(0, 1))
