"""A list of prompts completed at once, by an engine made for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.generate.engine import Engine, EngineConfig
from nemojax.generate.jobs import Job
from nemojax.generate.sampling import SamplingConfig
from nemojax.model.llama import Compute, Params

_MULTIPLE = 16  # lengths are rounded up to a multiple of this
# nobody waits for single tokens, and the same prompts give the same bits
BATCH = EngineConfig(decode_steps=64, interleave=False, elastic=False, reuse=0)


@dataclass(frozen=True)
class Completion:
    """New tokens (the stop id included when there is one) and the log-probability of each under the
    distribution it was drawn from. `finished` is False when the length limit cut it."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


def generate(
    params: Params,
    arch: ArchSpec,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    sampling: SamplingConfig | Sequence[SamplingConfig] = SamplingConfig(),
    eos_ids: Collection[int] = (),
    *,
    max_batch: int = 64,
    compute: Compute = Compute(),
    mesh: jax.sharding.Mesh | None = None,
    new_capacity: int = 0,
    cfg: EngineConfig = BATCH,
    only: Sequence[int] | None = None,
) -> list[Completion]:
    """A completion for each prompt, in order.

    Prompt i draws from `fold_in(fold_in(key, i), position)`: what else is in the batch changes nothing
    within a set of shapes. `sampling`: one for all, or one for each. New tokens are limited by its
    `max_new_tokens` and by the context. Equal prompts are read once. `new_capacity`: room for at least so
    many, so that calls with different limits share their programs. `cfg`: the engine's, less its size.
    `only`: numbers of the prompts that are completed, with the keys that they have among all.
    ValueError for an empty prompt, one that fills the context, an id outside the vocabulary, or another
    number of samplings than of prompts.
    """
    if not prompts or (only is not None and not only):
        return []
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
    if len(each) != len(prompts):
        raise ValueError(f"sampling: expected one for each of the {len(prompts)} prompts, got {len(each)}")
    new = max(new_capacity, *(s.max_new_tokens for s in each))
    capacity = _round_up(max(map(len, prompts)) + min(new, arch.context), _MULTIPLE)
    numbers = range(len(prompts)) if only is None else only
    slots = min(max_batch, _round_up(len(numbers), 8))
    cfg = dataclasses.replace(cfg, slots=slots, context=min(capacity, arch.context))
    keys = jax.random.key_data(jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(numbers)))
    stops = tuple(sorted(eos_ids))
    jobs = [
        Job(tuple(prompts[i]), each[i], (high, low), stops)
        for i, (high, low) in zip(numbers, np.asarray(keys).tolist(), strict=True)
    ]
    engine = Engine(params, arch, cfg, compute=compute, mesh=mesh)
    for i, job in zip(numbers, jobs, strict=True):
        try:
            engine.check(job)
        except ValueError as error:
            raise ValueError(str(error).replace("prompt:", f"prompt {i}:", 1)) from error
    return complete(engine, jobs)


def complete(engine: Engine, jobs: Sequence[Job]) -> list[Completion]:
    """The completions of jobs, in order, by an engine that has nothing else to do."""
    place = {engine.submit(job): i for i, job in enumerate(jobs)}
    out = [Completion([], [], False) for _ in jobs]
    while engine.has_work:
        for event in engine.step():
            i = place[event.job]
            out[i].tokens.extend(event.tokens)
            out[i].logprobs.extend(event.logprobs)
            if event.finish:
                out[i] = dataclasses.replace(out[i], finished=event.finish == "stop")
    return out


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
