"""Batched generation over a slot cache, with continuous batching: a finished row's slot is refilled.

Two compiled programs: `_prefill` reads a group of prompts and writes their keys and values into chosen
slots, a prompt that several requests share once for all of them; `_decode` steps all slots in a
`while_loop` on the device until enough of them are finished. The host only moves prompts in and
completions out. Lengths are rounded up, so that few shapes occur.

Shape letters: B slots, R prompts prefilled together, M requests that they are for, T prompt length, S cache
capacity, O new tokens at most, V vocabulary, E stop ids.
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
    controls: Controls
    seen_BV: jax.Array | None  # which tokens occurred; None where no request asks for it
    tokens_BO: jax.Array
    logps_BO: jax.Array


class Group(NamedTuple):
    """Right-padded prompts, and the requests for them: prompt `row_M`, slot `slot_M` (`_FAR`: no request)."""

    tokens_RT: jax.Array
    length_R: jax.Array
    row_M: jax.Array
    slot_M: jax.Array
    limit_M: jax.Array
    index_M: jax.Array
    controls: Controls


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
) -> list[Completion]:
    """A completion for each prompt, in order.

    Prompt i draws from `fold_in(fold_in(key, i), position)`: what else is in the batch changes nothing
    within a shape bucket. `sampling`: one for all, or one for each. New tokens are limited by its
    `max_new_tokens` and by the context. Equal prompts that follow each other are read once. `new_capacity`:
    room for at least so many, so that calls with different limits share their programs.
    ValueError for an empty prompt, one that fills the context, an id outside the vocabulary, or another
    number of samplings than of prompts.
    """
    if not prompts:
        return []
    _check(arch, prompts)
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
    if len(each) != len(prompts):
        raise ValueError(f"sampling: expected one for each of the {len(prompts)} prompts, got {len(each)}")
    longest = max(map(len, prompts))
    shape = _Shape(
        slots=min(max_batch, _round_up(len(prompts), 8)),
        prompt=min(_round_up(longest, _BUCKET), arch.context),
        new=_round_up(min(max(new_capacity, *(s.max_new_tokens for s in each)), arch.context), _BUCKET),
    )
    eos_E = jnp.asarray(sorted(eos_ids) or [-1], jnp.int32)
    with use_mesh(mesh):
        return _serve(params, arch, prompts, key, each, eos_E, shape, compute)


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
    sampling: Sequence[SamplingConfig],
    eos_E: jax.Array,
    shape: _Shape,
    compute: Compute,
) -> list[Completion]:
    slots = _empty_slots(arch, shape, key, compute, any(s.penalises for s in sampling))
    static: dict[str, Any] = {
        "arch": arch,
        "compute": compute,
        "truncates": any(s.truncates for s in sampling),
    }
    results: list[Completion | None] = [None] * len(prompts)
    owner: dict[int, int] = {}
    waiting = list(range(len(prompts)))[::-1]
    while waiting or owner:
        free = [s for s in range(shape.slots) if s not in owner]
        while waiting and free:
            placed = _place(prompts, waiting, free, shape.group)
            owner |= placed
            group = _make_group(arch, prompts, placed, shape, sampling)
            slots = _prefill(params, slots, group, key, eos_E, **static)
        wanted = min(shape.group, len(waiting)) if waiting else len(owner)
        slots = _decode(params, slots, wanted + shape.slots - len(owner), eos_E, **static)
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


def _place(
    prompts: Sequence[Sequence[int]], waiting: list[int], free: list[int], most: int
) -> dict[int, int]:
    """{slot: request} of the next requests, as long as there are slots and their prompts differ in `most`."""
    placed: dict[int, int] = {}
    different = 0
    while waiting and free:
        new = not placed or prompts[waiting[-1]] != prompts[next(reversed(placed.values()))]
        if different + new > most:
            break
        different += new
        placed[free.pop()] = waiting.pop()
    return placed


def _make_group(
    arch: ArchSpec,
    prompts: Sequence[Sequence[int]],
    placed: dict[int, int],
    shape: _Shape,
    sampling: Sequence[SamplingConfig],
) -> Group:
    # two sizes, so that a refill of few slots does not write them all
    size = shape.group if len(placed) <= shape.group else shape.slots
    tokens_RT, length_R = np.zeros((shape.group, shape.prompt), np.int32), np.ones(shape.group, np.int32)
    slot_M, index_M = np.full(size, _FAR, np.int32), np.zeros(size, np.int32)
    row_M, limit_M = np.zeros(size, np.int32), np.zeros(size, np.int32)
    row, last = -1, None
    for m, (slot, index) in enumerate(placed.items()):
        prompt = prompts[index]
        if prompt != last:
            row, last = row + 1, prompt
            tokens_RT[row, : len(prompt)], length_R[row] = prompt, len(prompt)
        row_M[m], slot_M[m], index_M[m] = row, slot, index
        limit_M[m] = min(sampling[index].max_new_tokens, arch.context - len(prompt))
    unused = [SamplingConfig()] * (size - len(placed))
    controls = make_controls([*(sampling[i] for i in placed.values()), *unused])
    arrays = (tokens_RT, length_R, row_M, slot_M, limit_M, index_M)
    return Group._make([*map(jnp.asarray, arrays), controls])


def _empty_slots(arch: ArchSpec, shape: _Shape, key: jax.Array, compute: Compute, penalises: bool) -> Slots:
    b = shape.slots
    return Slots(
        cache=init_cache(arch, b, shape.prompt + shape.new, jnp.dtype(compute.dtype)),
        last_B=jnp.zeros(b, jnp.int32),
        position_B=jnp.zeros(b, jnp.int32),
        count_B=jnp.zeros(b, jnp.int32),
        limit_B=jnp.zeros(b, jnp.int32),
        done_B=jnp.ones(b, bool),
        stopped_B=jnp.zeros(b, bool),
        keys_B=jax.random.split(key, b),
        controls=make_controls([SamplingConfig()] * b),
        seen_BV=jnp.zeros((b, arch.vocab_size), bool) if penalises else None,
        tokens_BO=jnp.zeros((b, shape.new), jnp.int32),
        logps_BO=jnp.zeros((b, shape.new), jnp.float32),
    )


@functools.partial(jax.jit, static_argnames=("arch", "compute", "truncates"), donate_argnames=("slots",))
def _prefill(
    params: Params,
    slots: Slots,
    group: Group,
    key: jax.Array,
    eos_E: jax.Array,
    *,
    arch: ArchSpec,
    compute: Compute,
    truncates: bool,
) -> Slots:
    """Reads a group of prompts, writes each into the slots of its requests, and draws their first tokens."""
    rows, length = group.tokens_RT.shape
    positions_RT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    ctx = make_context(arch, positions_RT)
    small = init_cache(arch, rows, length, jnp.dtype(compute.dtype))
    h_RTD = embed(params, group.tokens_RT, compute)
    h_RTD, _, small = apply_blocks(params, arch, h_RTD, ctx, cache=small, compute=compute)
    assert small is not None
    h_R1D = jnp.take_along_axis(h_RTD, (group.length_R - 1)[:, None, None], axis=1)
    logits_MV = head(params, arch, h_R1D)[group.row_M, 0]
    length_M = group.length_R[group.row_M]
    keys_M = jax.vmap(lambda i: jax.random.fold_in(key, i))(group.index_M)
    seen_MV = None if slots.seen_BV is None else _occurring(group, arch.vocab_size)
    tokens_M, logps_M = sample(logits_MV, _at(keys_M, length_M), group.controls, truncates, seen_MV)
    stopped_M = _is_stop(tokens_M, eos_E)

    def put(whole: Any, new: jax.Array) -> jax.Array:
        return whole.at[group.slot_M].set(new, mode="drop")

    return slots._replace(
        # what a former owner left beyond this prompt is never seen: a key's index must not exceed the query's
        cache=jax.tree.map(
            lambda whole, part: whole.at[:, group.slot_M, :length].set(part[:, group.row_M], mode="drop"),
            slots.cache,
            small,
        ),
        last_B=put(slots.last_B, tokens_M),
        position_B=put(slots.position_B, length_M),
        count_B=put(slots.count_B, jnp.ones_like(tokens_M)),
        limit_B=put(slots.limit_B, group.limit_M),
        done_B=put(slots.done_B, stopped_M | (group.limit_M <= 1)),
        stopped_B=put(slots.stopped_B, stopped_M),
        keys_B=put(slots.keys_B, keys_M),
        controls=jax.tree.map(put, slots.controls, group.controls),
        seen_BV=None if seen_MV is None else put(slots.seen_BV, _with(seen_MV, tokens_M)),
        tokens_BO=slots.tokens_BO.at[group.slot_M, 0].set(tokens_M, mode="drop"),
        logps_BO=slots.logps_BO.at[group.slot_M, 0].set(logps_M, mode="drop"),
    )


@functools.partial(jax.jit, static_argnames=("arch", "compute", "truncates"), donate_argnames=("slots",))
def _decode(
    params: Params,
    slots: Slots,
    num_done: int | jax.Array,
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
        keys_B = _at(slots.keys_B, position_B)
        tokens_B, logps_B = sample(logits_BV, keys_B, slots.controls, truncates, slots.seen_BV)
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
            seen_BV=None if slots.seen_BV is None else _with(slots.seen_BV, tokens_B),
            tokens_BO=slots.tokens_BO.at[rows_B, write_B].set(tokens_B, mode="drop"),
            logps_BO=slots.logps_BO.at[rows_B, write_B].set(logps_B, mode="drop"),
        )

    return jax.lax.while_loop(lambda s: s.done_B.sum() < num_done, step, slots)


def _at(keys_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """The key with which the token at `position_B` is drawn."""
    return jax.vmap(jax.random.fold_in)(keys_B, position_B)


def _occurring(group: Group, vocab_size: int) -> jax.Array:
    """Which tokens each request's prompt holds, [M, V]."""
    rows, length = group.tokens_RT.shape
    inside_RT = jnp.arange(length) < group.length_R[:, None]
    tokens_RT = jnp.where(inside_RT, group.tokens_RT, _FAR)
    seen_RV = jnp.zeros((rows, vocab_size), bool)
    return seen_RV.at[jnp.arange(rows)[:, None], tokens_RT].set(True, mode="drop")[group.row_M]


def _with(seen_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    return seen_BV.at[jnp.arange(tokens_B.shape[0]), tokens_B].set(True)


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
