"""The student learns on what it writes itself: generalised knowledge distillation (arXiv:2306.13649).

A step is on-policy with probability `share` (lambda there, algorithm 1): the student goes on from prompts,
and the teacher is asked about every token that it wrote. The other steps are the data's. Nothing is
differentiated through the sampling.

Legend: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.config import field
from nemojax.data.chat import encode_prompt, load_conversations
from nemojax.data.examples import Example
from nemojax.data.loader import Shuffled
from nemojax.data.packing import Batch, make_batch
from nemojax.data.tokenizer import Tokenizer
from nemojax.distill.batches import View
from nemojax.generate.sampling import SamplingConfig
from nemojax.generate.shares import generate_together
from nemojax.hosts import of_all
from nemojax.model.llama import Compute, Params
from nemojax.rewards.problems import MODES, ProblemSet, ask, load_problems
from nemojax.sharding import readers

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class OnPolicy:
    share: float = field(0.0, "probability that a step learns on the student's own samples; 0: never")
    prompts: Literal["texts", "problems", "chats"] = field(
        "texts", "what it goes on from: beginnings of the step's texts, questions, or chats up to an answer"
    )
    prompt_tokens: int = field(32, "texts: tokens of a beginning")
    problems: ProblemSet = field(ProblemSet(split="train"), "problems: which ones, each asked in both ways")
    chats: str = field("", "chats: JSONL of conversations, as sft reads it")
    temperature: float = field(1.0, "of the sampling")
    max_new_tokens: int = field(64, "tokens of a sample at most")
    max_batch: int = field(128, "samples generated together")

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected 0 to 1, got {self.share}")
        if min(self.prompt_tokens, self.max_new_tokens, self.max_batch) < 1:
            raise ValueError("prompt_tokens, max_new_tokens, max_batch: expected at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        if (self.prompts == "chats") != bool(self.chats):
            raise ValueError(f"chats: expected a file if and only if prompts are chats, got {self.chats!r}")


class OnPolicyBatches(View):
    """A loader's batches, some of them replaced by the student's own samples in rows of the same shape.

    `batch_size`: rows over all processes, of which each takes its part as the loader does; they share out the
    sampling, and draw what one process would.

    The weights that `bind` gives access to are sampled from when a batch is asked for, with a key of the
    step: the state is the place in the data and three counts, and a resumed run goes on to the same numbers.
    ValueError for prompts too long for a row.
    """

    def __init__(
        self,
        loader: Any,
        cfg: OnPolicy,
        arch: ArchSpec,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        length: int,
        compute: Compute = Compute(),
        mesh: jax.sharding.Mesh | None = None,
        seed: int = 0,
    ):
        super().__init__(loader)
        self._cfg, self._arch, self._tokenizer = cfg, arch, tokenizer
        self._compute, self._mesh, self._seed = compute, mesh, seed
        self._prompts = _load_prompts(cfg, tokenizer, arch)
        longest = max(map(len, self._prompts), default=cfg.prompt_tokens)
        self._window = longest + cfg.max_new_tokens - 1  # positions of a sample: its last token is not read
        if self._window > length:
            raise ValueError(
                f"on_policy: expected prompts and max_new_tokens within data.length = {length}, got "
                f"{longest} + {cfg.max_new_tokens}; raise data.length, or shorten one of them"
            )
        self._rows, self._length, self._per_row = batch_size, length, length // self._window
        share, shares = readers(mesh)
        self._here = slice(share, None, shares)  # of the rows
        self._order = Shuffled(0, max(len(self._prompts), 1), seed)
        self._step, self._own, self._drawn = 0, 0, 0
        self._params: Callable[[], Params] | None = None
        self._metrics: dict[str, float] = {}
        self._ids: list[str] | None = None

    def bind(self, params: Callable[[], Params]) -> None:
        """Gives access to the weights that samples are drawn from."""
        self._params = params

    def __next__(self) -> Batch:
        own = np.random.default_rng([self._seed, self._step]).random() < self._cfg.share
        batch = next(self.loader) if not own or not self._prompts else None
        self._ids, self._metrics = None, {}
        if own and any(prompts := self._draw(batch)):
            batch, self._own = self._sample(prompts), self._own + 1
        assert batch is not None
        self._step += 1
        self._metrics["train/on_policy"] = self._own / self._step
        return batch

    def state(self) -> dict[str, Any]:
        return {"step": self._step, "own": self._own, "drawn": self._drawn, "data": self.loader.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self._step, self._own, self._drawn = state["step"], state["own"], state["drawn"]
        self.loader.restore(state["data"])

    @property
    def rows(self) -> np.ndarray:
        return self.loader.rows if self._ids is None else np.full(len(self._ids), -1)

    @property
    def ids(self) -> list[str]:
        return self.loader.ids if self._ids is None else self._ids

    @property
    def metrics(self) -> dict[str, float]:
        return super().metrics | self._metrics

    def _draw(self, batch: Batch | None) -> list[list[Prompt]]:
        """The prompts of every row of all processes: out of a list of them, or out of rows of texts."""
        if batch is not None:
            found = [self._beginnings(*row) for row in zip(batch["tokens"], batch["segments"], strict=True)]
            everywhere = of_all(found)  # of processes that read the same rows, once
            shares = everywhere[:: len(everywhere) * len(found) // self._rows]
            return [prompts for rows in zip(*shares, strict=True) for prompts in rows]
        places = range(self._drawn, self._drawn + self._rows * self._per_row)
        self._drawn = places.stop
        drawn = [self._prompts[self._order[place][1]] for place in places]
        return [drawn[i : i + self._per_row] for i in range(0, len(drawn), self._per_row)]

    def _beginnings(self, tokens_T: np.ndarray, segments_T: np.ndarray) -> list[Prompt]:
        """In every window of a row the first tokens of the document that fills most of it."""
        found = []
        for first in range(0, self._per_row * self._window, self._window):
            inside = segments_T[first : first + self._window]
            starts = np.flatnonzero(np.diff(inside, prepend=-1))
            sizes = np.diff(starts, append=len(inside)) * (inside[starts] > 0)
            if sizes.max():
                start = first + starts[sizes.argmax()]
                size = min(int(sizes.max()), self._cfg.prompt_tokens)
                found.append(tuple(tokens_T[start : start + size].tolist()))
        return found

    def _sample(self, prompts: Sequence[Sequence[Prompt]]) -> Batch:
        """Rows of prompts and what the student writes after them, which alone is learnt from: those of this
        process."""
        if self._params is None:
            raise ValueError("on_policy: expected access to the weights, got none; call bind first")
        cfg, flat = self._cfg, [prompt for row in prompts for prompt in row]
        completions = generate_together(
            self._params(),
            self._arch,
            flat,
            jax.random.fold_in(jax.random.key(self._seed), self._step),
            SamplingConfig(temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens),
            self._tokenizer.eos_ids,
            max_batch=cfg.max_batch,
            compute=self._compute,
            mesh=self._mesh,
        )
        lengths = [len(c.tokens) for c in completions]
        self._metrics = {
            "train/mean_gen_tokens_per_sample": float(np.mean(lengths)),
            "train/truncation_rate": float(np.mean([not c.finished for c in completions])),
        }
        self._ids = [f"step {self._step}, own row {row}" for row in range(self._rows)][self._here]
        examples = iter(_example(p, c.tokens) for p, c in zip(flat, completions, strict=True))
        rows = [[next(examples) for _ in row] for row in prompts]
        return make_batch(rows[self._here], self._length, self._tokenizer.pad_id)


def _example(prompt: Prompt, answer: Sequence[int]) -> Example:
    weights = np.concatenate([np.zeros(len(prompt), np.float32), np.ones(len(answer), np.float32)])
    return Example(np.asarray([*prompt, *answer], np.int32), weights)


def _load_prompts(cfg: OnPolicy, tokenizer: Tokenizer, arch: ArchSpec) -> list[Prompt]:
    """Questions or chats as ids; none where prompts are beginnings of texts."""
    match cfg.prompts:
        case "texts":
            return []
        case "problems":
            problems = load_problems(cfg.problems)
            return [ask(p, mode, tokenizer, arch).tokens for p in problems for mode in MODES["both"]]
        case "chats":
            prompts = []
            for chat in load_conversations(cfg.chats):
                last = max((i for i, m in enumerate(chat.messages) if m["role"] == "assistant"), default=None)
                messages = chat.messages[:last]
                if messages:
                    prompts.append(tuple(encode_prompt(tokenizer, messages, chat.thinking, tools=chat.tools)))
            if not prompts:
                raise ValueError(f"{cfg.chats}: expected chats with a question, got none")
            return prompts
