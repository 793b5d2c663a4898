"""The stages as a literal table, and what every command's arguments and last line have in common.

Nothing heavy is imported here: `nemojax --help` reads this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

EXIT_PREEMPTED = 75  # of sysexits.h, "temporary failure": run again to resume

# command -> (module, summary). A stage's module has a dataclass `Config` and `run(cfg, workdir)`.
STAGES = {
    "tokenizer": ("nemojax.tokenizer", "train a byte-level BPE tokenizer on a text source"),
    "tokenize": ("nemojax.tokenize", "text sources to token shards, once"),
    "pretrain": ("nemojax.pretrain", "train a model from scratch, or go on training one"),
    "compress": ("nemojax.compress.run", "score a parent's blocks and search the best child for a budget"),
    "prune": ("nemojax.compress.prune", "cut a parent evenly by importance, without a search"),
    "fuse": ("nemojax.compress.fuse", "runs of feed-forwards without attention as one wide layer"),
    "distill": ("nemojax.distill.distill", "heal a child against its parent"),
    "cache": ("nemojax.distill.teacher_cache", "a teacher's top-k log-probabilities, kept for distillation"),
    "sft": ("nemojax.sft", "fine-tune on conversations, reasoning on and off"),
    "rl": ("nemojax.rl.grpo", "reinforce on tasks whose answers can be checked (GRPO)"),
    "evaluate": ("nemojax.evaluate.run", "held-out loss, and pass@1 with thinking on and off"),
    "study": ("nemojax.study.run", "ways to compress one parent, compared over several seeds"),
    "compare": ("nemojax.study.compare", "numbers of several stages, mean and spread over seeds"),
    "report": ("nemojax.report.page", "one self-contained page about a pipeline's results"),
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ValueErrors, so that every command reports them alike."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}; see {self.prog} --help")


def split_overrides(extras: Sequence[str], prog: str) -> list[str]:
    """["--config.a.b=1"] -> ["a.b=1"]; ValueError for anything else."""
    overrides = []
    for extra in extras:
        if not extra.startswith("--config."):
            raise ValueError(f"{prog}: unknown argument {extra!r}; fields are set by --config.NAME=VALUE")
        if "=" not in extra:
            raise ValueError(f"{prog}: {extra}: expected {extra}=VALUE, got no value")
        overrides.append(extra.removeprefix("--config."))
    return overrides


def summary_line(name: str, result: Mapping[str, Any], *notes: object) -> str:
    """What a command prints last: its name, notes, and up to eight numbers of its result."""
    numbers = [f"{key}={value:.5g}" for key, value in _numbers(result, "")]
    return " ".join([f"{name}:", *map(str, notes), *numbers[:8]])


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _numbers(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
