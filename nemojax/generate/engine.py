"""Batched generation over a slot cache, with continuous batching: a finished row's slot is refilled.

Two compiled programs: `_prefill` reads a group of prompts and writes their keys and values into chosen
slots; `_decode` steps all slots in a `while_loop` on the device until enough of them are finished. The
host only moves prompts in and completions out. Lengths are rounded up, so that few shapes occur.

Shape letters: B slots, R prompts prefilled together, T prompt length, S cache capacity, O new tokens at
most, V vocabulary, E stop ids.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.generate.sampling import Controls, SamplingConfig, make_controls, sample
from nemojax.model.attention import make_context
from nemojax.model.cache import Cache, init_cache
from nemojax.model.llama import Compute, Params, apply_blocks, embed, head
from nemojax.sharding import use_mesh

_BUCKET = 32  # lengths are rounded up to a multiple of this
_FAR = 2**30  # a slot or position that no array has: writes there are dropped


@dataclass(frozen=True)
class Completion:
    """New tokens (the stop id included when there is one) and the log-probability of each under the
    distribution it was drawn from. `finished` is False when the length limit cut it."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


class Slots(NamedTuple):
    """The state of every slot. `count_B` tokens were generated, the last one `last_B` at `position_B`."""

    cache: Cache
    last_B: jax.Array
    position_B: jax.Array
    count_B: jax.Array
    limit_B: jax.Array
    done_B: jax.Array
    stopped_B: jax.Array
    keys_B: jax.Array
    tokens_BO: jax.Array
    logps_BO: jax.Array


class Prompts(NamedTuple):
    """A right-padded group of prompts and the slots they go to (`_FAR`: no prompt in this row)."""

    tokens_RT: jax.Array
    length_R: jax.Array
    slot_R: jax.Array
    limit_R: jax.Array
    index_R: jax.Array


def generate(
    params: Params,
    arch: ArchSpec,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    sampling: SamplingConfig = SamplingConfig(),
    eos_ids: Collection[int] = (),
    *,
    max_batch: int = 64,
    compute: Compute = Compute(),
    mesh: jax.sharding.Mesh | None = None,
    new_capacity: int = 0,
) -> list[Completion]:
    """A completion for each prompt, in order.

    Prompt i draws from `fold_in(fold_in(key, i), position)`: what else is in the batch changes nothing
    within a shape bucket. New tokens are limited by `sampling.max_new_tokens` and by the context.
    `new_capacity`: room for at least so many, so that calls with different limits share their programs.
    ValueError for an empty prompt, one that fills the context, or an id outside the vocabulary.
    """
    if not prompts:
        return []
    _check(arch, prompts)
    longest = max(map(len, prompts))
    shape = _Shape(
        slots=min(max_batch, _round_up(len(prompts), 8)),
        prompt=min(_round_up(longest, _BUCKET), arch.context),
        new=_round_up(min(max(sampling.max_new_tokens, new_capacity), arch.context), _BUCKET),
    )
    eos_E = jnp.asarray(sorted(eos_ids) or [-1], jnp.int32)
    with use_mesh(mesh):
        return _serve(params, arch, prompts, key, sampling, eos_E, shape, compute)


class _Shape(NamedTuple):
    slots: int
    prompt: int
    new: int

    @property
    def group(self) -> int:
        """Prompts prefilled together: an eighth of the slots, so that a refill wastes little."""
        return max(1, self.slots // 8)


def _serve(
    params: Params,
    arch: ArchSpec,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    sampling: SamplingConfig,
    eos_E: jax.Array,
    shape: _Shape,
    compute: Compute,
) -> list[Completion]:
    controls = make_controls(sampling, shape.slots)
    slots = _empty_slots(arch, shape, key, compute)
    static: dict[str, Any] = {"arch": arch, "compute": compute, "truncates": sampling.truncates}
    results: list[Completion | None] = [None] * len(prompts)
    owner: dict[int, int] = {}
    waiting = list(range(len(prompts)))[::-1]
    while waiting or owner:
        free = [s for s in range(shape.slots) if s not in owner]
        while waiting and free:
            count = min(shape.group, len(free), len(waiting))
            placed = {free.pop(): waiting.pop() for _ in range(count)}
            owner |= placed
            group = _make_group(arch, prompts, placed, shape, sampling.max_new_tokens)
            slots = _prefill(params, slots, group, key, controls, eos_E, **static)
        wanted = min(shape.group, len(waiting)) if waiting else len(owner)
        slots = _decode(params, slots, wanted + shape.slots - len(owner), controls, eos_E, **static)
        for slot, done in enumerate(_collect(slots)):
            if done is not None and slot in owner:
                results[owner.pop(slot)] = done
    assert all(r is not None for r in results)
    return results  # pyright: ignore[reportReturnType]


def _collect(slots: Slots) -> list[Completion | None]:
    """The completion of each slot that is done, else None. The one device-to-host copy of a round."""
    done, stopped, count, tokens, logps = jax.device_get(
        (slots.done_B, slots.stopped_B, slots.count_B, slots.tokens_BO, slots.logps_BO)
    )
    return [
        Completion(tokens[b, : count[b]].tolist(), logps[b, : count[b]].tolist(), bool(stopped[b]))
        if done[b]
        else None
        for b in range(len(done))
    ]


def _make_group(
    arch: ArchSpec, prompts: Sequence[Sequence[int]], placed: dict[int, int], shape: _Shape, max_new: int
) -> Prompts:
    tokens_RT = np.zeros((shape.group, shape.prompt), np.int32)
    length_R, limit_R = np.ones(shape.group, np.int32), np.zeros(shape.group, np.int32)
    slot_R, index_R = np.full(shape.group, _FAR, np.int32), np.zeros(shape.group, np.int32)
    for row, (slot, index) in enumerate(placed.items()):
        prompt = prompts[index]
        tokens_RT[row, : len(prompt)] = prompt
        length_R[row], slot_R[row], index_R[row] = len(prompt), slot, index
        limit_R[row] = min(max_new, arch.context - len(prompt))
    return Prompts(*map(jnp.asarray, (tokens_RT, length_R, slot_R, limit_R, index_R)))


def _empty_slots(arch: ArchSpec, shape: _Shape, key: jax.Array, compute: Compute) -> Slots:
    b = shape.slots
    cache = init_cache(arch, b, shape.prompt + shape.new, jnp.dtype(compute.dtype))
    return Slots(
        cache=cache,
        last_B=jnp.zeros(b, jnp.int32),
        position_B=jnp.zeros(b, jnp.int32),
        count_B=jnp.zeros(b, jnp.int32),
        limit_B=jnp.zeros(b, jnp.int32),
        done_B=jnp.ones(b, bool),
        stopped_B=jnp.zeros(b, bool),
        keys_B=jax.random.split(key, b),
        tokens_BO=jnp.zeros((b, shape.new), jnp.int32),
        logps_BO=jnp.zeros((b, shape.new), jnp.float32),
    )


@functools.partial(jax.jit, static_argnames=("arch", "compute", "truncates"), donate_argnames=("slots",))
def _prefill(
    params: Params,
    slots: Slots,
    group: Prompts,
    key: jax.Array,
    controls: Controls,
    eos_E: jax.Array,
    *,
    arch: ArchSpec,
    compute: Compute,
    truncates: bool,
) -> Slots:
    """Reads a group of prompts into its slots and draws the first token of each."""
    rows, length = group.tokens_RT.shape
    positions_RT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    ctx = make_context(arch, positions_RT)
    small = init_cache(arch, rows, length, jnp.dtype(compute.dtype))
    h_RTD = embed(params, group.tokens_RT, compute)
    h_RTD, _, small = apply_blocks(params, arch, h_RTD, ctx, cache=small, compute=compute)
    assert small is not None
    # what a former owner left beyond this prompt is never seen: a key's index must not exceed the query's
    cache = jax.tree.map(
        lambda whole, part: whole.at[:, group.slot_R, :length].set(part, mode="drop"), slots.cache, small
    )
    h_R1D = jnp.take_along_axis(h_RTD, (group.length_R - 1)[:, None, None], axis=1)
    logits_RV = head(params, arch, h_R1D)[:, 0]
    keys_R = jax.vmap(lambda i: jax.random.fold_in(key, i))(group.index_R)
    controls_R = jax.tree.map(lambda x: x.at[group.slot_R].get(mode="clip"), controls)
    tokens_R, logps_R = sample(logits_RV, _at(keys_R, group.length_R), controls_R, truncates)

    stopped_R = _is_stop(tokens_R, eos_E)
    put = {
        "last_B": tokens_R,
        "position_B": group.length_R,
        "count_B": jnp.ones_like(tokens_R),
        "limit_B": group.limit_R,
        "done_B": stopped_R | (group.limit_R <= 1),
        "stopped_B": stopped_R,
        "keys_B": keys_R,
    }
    new = {name: getattr(slots, name).at[group.slot_R].set(value, mode="drop") for name, value in put.items()}
    tokens_BO = slots.tokens_BO.at[group.slot_R, 0].set(tokens_R, mode="drop")
    logps_BO = slots.logps_BO.at[group.slot_R, 0].set(logps_R, mode="drop")
    return slots._replace(cache=cache, tokens_BO=tokens_BO, logps_BO=logps_BO, **new)


@functools.partial(jax.jit, static_argnames=("arch", "compute", "truncates"), donate_argnames=("slots",))
def _decode(
    params: Params,
    slots: Slots,
    num_done: int | jax.Array,
    controls: Controls,
    eos_E: jax.Array,
    *,
    arch: ArchSpec,
    compute: Compute,
    truncates: bool,
) -> Slots:
    """Steps all slots until `num_done` of them are done (empty ones count as done)."""

    def step(slots: Slots) -> Slots:
        active_B = ~slots.done_B
        ctx = make_context(arch, slots.position_B[:, None])
        h_B1D = embed(params, slots.last_B[:, None], compute)
        h_B1D, _, cache = apply_blocks(params, arch, h_B1D, ctx, cache=slots.cache, compute=compute)
        logits_BV = head(params, arch, h_B1D)[:, 0]
        position_B = slots.position_B + 1
        tokens_B, logps_B = sample(logits_BV, _at(slots.keys_B, position_B), controls, truncates)
        rows_B = jnp.arange(tokens_B.shape[0])
        write_B = jnp.where(active_B, slots.count_B, _FAR)
        count_B = slots.count_B + active_B
        stop_B = active_B & _is_stop(tokens_B, eos_E)
        return slots._replace(
            cache=cache,
            last_B=jnp.where(active_B, tokens_B, slots.last_B),
            position_B=jnp.where(active_B, position_B, slots.position_B),
            count_B=count_B,
            done_B=slots.done_B | stop_B | (count_B >= slots.limit_B),
            stopped_B=slots.stopped_B | stop_B,
            tokens_BO=slots.tokens_BO.at[rows_B, write_B].set(tokens_B, mode="drop"),
            logps_BO=slots.logps_BO.at[rows_B, write_B].set(logps_B, mode="drop"),
        )

    return jax.lax.while_loop(lambda s: s.done_B.sum() < num_done, step, slots)


def _at(keys_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """The key with which the token at `position_B` is drawn."""
    return jax.vmap(jax.random.fold_in)(keys_B, position_B)


def _is_stop(tokens_B: jax.Array, eos_E: jax.Array) -> jax.Array:
    return (tokens_B[:, None] == eos_E).any(-1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check(arch: ArchSpec, prompts: Sequence[Sequence[int]]) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i}: expected at least one token, got none; start it with BOS")
        if len(prompt) >= arch.context:
            raise ValueError(
                f"prompt {i}: expected fewer than {arch.context} tokens (the context), got "
                f"{len(prompt)}; shorten it"
            )
        if min(prompt) < 0 or max(prompt) >= arch.vocab_size:
            raise ValueError(
                f"prompt {i}: expected ids below {arch.vocab_size} (the vocabulary), got {max(prompt)}; "
                "use the tokenizer that belongs to the model"
            )
