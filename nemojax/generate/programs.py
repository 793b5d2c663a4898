"""The compiled programs of the engine: `extend` reads prompts, `decode` steps all sequences, `verify` steps
them over proposals, `propose` makes proposals with a draft model, `fork` copies a sequence.

The device holds the cache and nothing else that outlasts a call; what belongs to a sequence (its last
token, settings, key) comes with every call as two small arrays. So whoever schedules is free to move,
stop and force sequences without a program of its own for it.

Shape letters: B slots or rows of a call, R prompts read together, C tokens of a chunk, M requests they are
for, T tokens verified, K steps of a call, V vocabulary, E stop ids, I integers and F numbers of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.backends.fp8 import Quantized
from nemojax.backends.kernels import jit
from nemojax.generate.sampling import Controls, Drawn, Report, SamplingConfig, sample
from nemojax.model import cache as kv
from nemojax.model.attention import Context, make_context
from nemojax.model.layout import split_layers
from nemojax.model.llama import (
    Compute,
    Params,
    apply_blocks,
    embed,
    head,
    quantize,
    quantized_shardings,
)
from nemojax.sharding import mesh_of, platform
from nemojax.tree import from_paths

FAR = 2**30  # a slot, row or position that no array has: writes there are dropped
_PLACE = 2  # integers of a row before its settings: last token, its position
_SETTINGS = 4  # integers before its stop ids: tokens left, top-k, two words of the key


class State(NamedTuple):
    """What lies on the device between calls. `seen_BV`: tokens that occurred; None where nobody asks."""

    cache: kv.Cache
    seen_BV: jax.Array | None


class How(NamedTuple):
    """What a program is compiled for, beside shapes. `steps`: room for the tokens of one `decode`."""

    arch: ArchSpec
    compute: Compute
    truncates: bool = False
    top: int = 0
    report: Report = "sampled"
    steps: int = 64


class Packed(NamedTuple):
    """Rows of requests: integers [B, I] (last token, its position, tokens left, top-k, key, key, stop ids
    padded with -1) and numbers [B, F] (temperature, top-p, min-p, repetition penalty). A row with no
    tokens left does nothing."""

    ints_BI: Any
    floats_BF: Any


class Chunk(NamedTuple):
    """Right-padded pieces of prompts: `length_R` tokens from position `start_R` on, into slot `slot_R`."""

    tokens_RC: Any
    start_R: Any
    length_R: Any
    slot_R: Any


class First(NamedTuple):
    """The requests whose first token a chunk's end gives: prompt `row_M`, slot `slot_M` (`FAR`: none).
    `allowed_MV` and `seen_MV` (tokens of the prompt) are None where no request needs them."""

    row_M: Any
    slot_M: Any
    requests: Packed
    allowed_MV: Any
    seen_MV: Any


class Emitted(NamedTuple):
    """New tokens, `count_B` for each row, with log-probabilities and the likeliest of each step."""

    count_B: jax.Array
    tokens_KB: jax.Array
    logps_KB: jax.Array
    top_ids_KBC: jax.Array
    top_logps_KBC: jax.Array


def prepare(params: Params, compute: Compute, mesh: jax.sharding.Mesh | None) -> tuple[Params, bool]:
    """(weights as they are used, whether they are split by layer): in the dtype of `compute`, and block
    matrices in e4m3 where it says fp8. What was prepared before stays as it is."""
    params = _as_used(params, compute)
    if any(isinstance(run, tuple) for run in params.get("runs", {}).values()):
        return split_layers(params), True
    split = (mesh is None or mesh.size == 1) and splits(platform(), _fits_twice(params))
    return (split_layers(params), True) if split else (params, False)


def splits(platform: str, fits_twice: bool) -> bool:
    """Whether weights on one device are split by layer, for which the layers are there twice for a moment.

    A product of a GPU reads weights in FP8, and before jax 0.11 any, only where they begin an array: of
    layers in a stack every step would make copies. Others are a few percent faster split, too.
    """
    return platform == "cpu" or (platform in ("gpu", "cuda") and fits_twice)


def _fits_twice(params: Params) -> bool:
    """Whether the device has room for the layers a second time; a device that does not say has."""
    layers = [w for w in jax.tree.leaves(params.get("runs", {})) if isinstance(w, jax.Array)]
    stats = next(iter(layers[0].devices())).memory_stats() if layers else None
    if not stats or "bytes_limit" not in stats:
        return True
    return sum(w.nbytes for w in layers) <= stats["bytes_limit"] - stats["bytes_in_use"]


def prepare_weight(path: str, weight: jax.Array, *, compute: Compute) -> Any:
    """One weight of `prepare`: a model that is prepared while it is read is never there in full precision."""
    [prepared] = jax.tree.leaves(_as_used(from_paths({path: weight}), compute), is_leaf=_is_quantized)
    return prepared


def _as_used(params: Params, compute: Compute) -> Params:
    return cast(_quantized(params) if compute.matmul == "fp8" else params, compute)


def cast(params: Params, compute: Compute) -> Params:
    """Weights in the dtype of `compute`, but for those in eight bits."""
    dtype = jnp.dtype(compute.dtype)
    return jax.tree.map(
        lambda w: w if _is_quantized(w) or w.dtype == dtype else w.astype(dtype),
        params,
        is_leaf=_is_quantized,
    )


def _quantized(params: Params) -> Params:
    if "runs" not in params or any(map(_is_quantized, jax.tree.leaves(params, is_leaf=_is_quantized))):
        return params
    runs, places = {"runs": params["runs"]}, None
    if mesh_of(params) is not None:
        places = quantized_shardings(jax.tree.map(lambda w: w.sharding, runs))
    return {**params, **jax.jit(quantize, out_shardings=places)(runs)}


def _is_quantized(weight: Any) -> bool:
    return isinstance(weight, Quantized)


def pack(
    rows: Sequence[tuple[int, int, int, SamplingConfig, tuple[int, int], Sequence[int]] | None],
    stop_room: int,
) -> Packed:
    """Rows of (last token, its position, tokens left, sampling, key, stop ids); None is an idle row."""
    ints = np.zeros((len(rows), _PLACE + _SETTINGS + stop_room), np.int32)
    ints[:, _PLACE + _SETTINGS :] = -1
    floats = np.ones((len(rows), 4), np.float32)
    for b, row in enumerate(rows):
        if row is None:
            continue
        last, position, left, sampling, key, stops = row
        words = np.asarray(key, np.uint32).view(np.int32)
        ints[b, : _PLACE + _SETTINGS] = (last, position, left, sampling.top_k, *words)
        ints[b, _PLACE + _SETTINGS : _PLACE + _SETTINGS + len(stops)] = stops
        floats[b] = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
    return Packed(ints, floats)


def _controls(rows: Packed) -> Controls:
    floats = rows.floats_BF
    return Controls(floats[:, 0], rows.ints_BI[:, _PLACE + 1], floats[:, 1], floats[:, 2], floats[:, 3])


def _keys_at(rows: Packed, position_B: jax.Array) -> jax.Array:
    """The key with which the token at `position_B` is drawn."""
    words_B2 = rows.ints_BI[:, _PLACE + 2 : _PLACE + 4]
    keys_B = jax.random.wrap_key_data(jax.lax.bitcast_convert_type(words_B2, jnp.uint32))
    return jax.vmap(jax.random.fold_in)(keys_B, position_B)


def _stops(rows: Packed, tokens_B: jax.Array) -> jax.Array:
    return (tokens_B[:, None] == rows.ints_BI[:, _PLACE + _SETTINGS :]).any(-1)


def _through(
    params: Params, h_BTD: jax.Array, ctx: Context, window: kv.Window, how: How
) -> tuple[jax.Array, kv.Cache]:
    """All blocks over a cache: (the stream after them, the cache with what is new)."""
    h_BTD, _, cache = apply_blocks(params, how.arch, h_BTD, ctx, window=window, compute=how.compute)
    assert cache is not None
    return h_BTD, cache


def _draw(
    logits_BV: jax.Array,
    rows: Packed,
    position_B: jax.Array,
    seen_BV: jax.Array | None,
    allowed_BV: Any,
    how: How,
) -> Drawn:
    keys_B = _keys_at(rows, position_B)
    return sample(
        logits_BV,
        keys_B,
        _controls(rows),
        truncates=how.truncates,
        seen_BV=seen_BV,
        allowed_BV=allowed_BV,
        top=how.top,
        report=how.report,
    )


@jit(platform, static_argnames=("how", "keys"), donate_argnames="state")
def extend(
    params: Params, state: State, chunk: Chunk, first: First | None, *, how: How, keys: int
) -> tuple[State, Emitted | None]:
    """Reads a chunk of each prompt into its slot and, for prompts that end, draws the first tokens [1, M]."""
    offset_C = jnp.arange(chunk.tokens_RC.shape[1], dtype=jnp.int32)
    inside_RC = offset_C < chunk.length_R[:, None]
    positions_RC = jnp.where(inside_RC, chunk.start_R[:, None] + offset_C, FAR)
    ctx = make_context(how.arch, positions_RC)
    h_RCD = embed(params, chunk.tokens_RC, how.compute)
    window = kv.Window(state.cache, keys, chunk.slot_R)
    h_RCD, cache = _through(params, h_RCD, ctx, window, how)
    if first is None:
        return State(cache, state.seen_BV), None
    last_R = jnp.maximum(chunk.length_R - 1, 0)
    h_R1D = jnp.take_along_axis(h_RCD, last_R[:, None, None], axis=1)
    logits_MV = head(params, how.arch, h_R1D)[first.row_M, 0]
    position_M = (chunk.start_R + chunk.length_R)[first.row_M]
    drawn = _draw(logits_MV, first.requests, position_M, first.seen_MV, first.allowed_MV, how)
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[first.slot_M].set(_with(first.seen_MV, drawn.tokens_B), mode="drop")
    once_M = jnp.ones_like(drawn.tokens_B)
    return State(cache, seen_BV), Emitted(once_M, *(x[None] for x in drawn))


@jit(platform, decodes=True, static_argnames=("how", "keys"), donate_argnames="state")
def decode(
    params: Params,
    state: State,
    rows: Packed,
    steps: Any,
    leave: Any,
    slot_B: Any = None,
    allowed_BV: Any = None,
    *,
    how: How,
    keys: int,
) -> tuple[State, Emitted]:
    """Up to `steps` tokens for each row, until no more than `leave` rows still run.

    `slot_B`: the slot of each row; None where row b is slot b, which spares gathering them. `allowed_BV`
    holds for one step.
    """
    ints_BI = rows.ints_BI
    num_rows = ints_BI.shape[0]
    shape = (how.steps, num_rows)
    nothing = Emitted(
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, how.top), jnp.int32),
        jnp.zeros((*shape, how.top), jnp.float32),
    )

    def going(carry: tuple) -> jax.Array:
        i, *_, runs_B, _ = carry
        return (i < steps) & (runs_B.sum() > leave)

    def step(carry: tuple) -> tuple:
        i, state, last_B, position_B, runs_B, out = carry
        # an idle row writes nowhere: its slot may hold a prompt that is being read, or one to be used again
        place_B1 = jnp.where(runs_B, position_B, FAR)[:, None]
        ctx = make_context(how.arch, place_B1)
        h_B1D = embed(params, last_B[:, None], how.compute)
        window = kv.Window(state.cache, keys, slot_B)
        h_B1D, cache = _through(params, h_B1D, ctx, window, how)
        logits_BV = head(params, how.arch, h_B1D)[:, 0]
        seen_BV = _seen(state, slot_B, num_rows)
        drawn = _draw(logits_BV, rows, position_B + 1, seen_BV, allowed_BV, how)
        new_B1 = jnp.where(runs_B, drawn.tokens_B, FAR)[:, None]
        seen_BV = _remember(state, slot_B, new_B1)
        count_B = out.count_B + runs_B
        out = Emitted(count_B, *(x.at[i].set(new) for x, new in zip(out[1:], drawn, strict=True)))
        more_B = runs_B & ~_stops(rows, drawn.tokens_B) & (count_B < ints_BI[:, _PLACE])
        last_B = jnp.where(runs_B, drawn.tokens_B, last_B)
        return i + 1, State(cache, seen_BV), last_B, position_B + runs_B, more_B, out

    runs_B = ints_BI[:, _PLACE] > 0
    start = (jnp.int32(0), state, ints_BI[:, 0], ints_BI[:, 1], runs_B, nothing)
    _, state, *_, out = jax.lax.while_loop(going, step, start)
    return state, out


@jit(platform, decodes=True, static_argnames=("how", "keys"), donate_argnames="state")
def verify(
    params: Params,
    state: State,
    rows: Packed,
    proposed_BT: Any,
    num_B: Any,
    slot_B: Any = None,
    *,
    how: How,
    keys: int,
) -> tuple[State, Emitted]:
    """One forward pass over each row's last token and its `num_B` proposals: the tokens that `decode` would
    have drawn one by one, as far as the proposals agree with them, and one more.

    Each position's token is drawn from the model's own distribution with that position's key, and a
    proposal is only ever compared with it: what comes out is what comes without proposals, whatever
    proposed them. For a proposal of one certain token this accepts as often as rejection sampling does
    (Leviathan et al., 2023, arXiv:2211.17192, algorithm 1).
    """
    ints_BI = rows.ints_BI
    num_rows, length = proposed_BT.shape[0], proposed_BT.shape[1] + 1
    tokens_BT = jnp.concatenate([ints_BI[:, :1], proposed_BT], axis=1)
    offset_T = jnp.arange(length, dtype=jnp.int32)
    inside_BT = (offset_T <= num_B[:, None]) & (ints_BI[:, _PLACE : _PLACE + 1] > 0)
    places_BT = ints_BI[:, 1:2] + offset_T
    ctx = make_context(how.arch, jnp.where(inside_BT, places_BT, FAR))
    h_BTD = embed(params, tokens_BT, how.compute)
    window = kv.Window(state.cache, keys, slot_B)
    h_BTD, cache = _through(params, h_BTD, ctx, window, how)
    logits_BTV = head(params, how.arch, h_BTD)
    repeated = Packed(*(jnp.repeat(x, length, axis=0) for x in rows))
    seen_BV = _seen(state, slot_B, num_rows)
    seen_BTV = None if seen_BV is None else _seen_along(seen_BV, proposed_BT)
    flat_seen = None if seen_BTV is None else seen_BTV.reshape(num_rows * length, -1)
    flat_logits = logits_BTV.reshape(num_rows * length, -1)
    drawn = _draw(flat_logits, repeated, (places_BT + 1).ravel(), flat_seen, None, how)
    by_step = [jnp.moveaxis(x.reshape(num_rows, length, *x.shape[1:]), 1, 0) for x in drawn]
    agrees_BT = (by_step[0].T[:, :-1] == proposed_BT) & inside_BT[:, 1:]
    accepted_B = jnp.cumprod(agrees_BT, axis=1).sum(1)
    count_B = jnp.where(inside_BT[:, 0], accepted_B + 1, 0)
    kept_BT = jnp.where(offset_T < count_B[:, None], by_step[0].T, FAR)
    return State(cache, _remember(state, slot_B, kept_BT)), Emitted(count_B, *by_step)


@jit(platform, decodes=True, static_argnames=("how", "keys", "steps"), donate_argnames="state")
def propose(
    params: Params, state: State, rows: Packed, slot_B: Any = None, *, how: How, keys: int, steps: int
) -> tuple[State, jax.Array]:
    """The `steps` tokens [B, T] that a draft model finds likeliest, one after another.

    It reads the last of them too, so that its cache has no hole when all are accepted.
    """
    runs_B = rows.ints_BI[:, _PLACE] > 0
    place_B = jnp.where(runs_B, rows.ints_BI[:, 1], FAR)

    def step(carry: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        cache, last_B = carry
        ctx = make_context(how.arch, (place_B + i)[:, None])
        h_B1D = embed(params, last_B[:, None], how.compute)
        window = kv.Window(cache, keys, slot_B)
        h_B1D, cache = _through(params, h_B1D, ctx, window, how)
        likeliest_B = jnp.argmax(head(params, how.arch, h_B1D)[:, 0], axis=-1).astype(jnp.int32)
        return (cache, likeliest_B), likeliest_B

    (cache, _), tokens_TB = jax.lax.scan(step, (state.cache, rows.ints_BI[:, 0]), jnp.arange(steps + 1))
    return State(cache, state.seen_BV), tokens_TB[:steps].T


@jit(platform, static_argnames="keys", donate_argnames="state")
def fork(state: State, from_M: Any, to_M: Any, *, keys: int) -> State:
    """The first `keys` positions of some slots copied into others."""
    return State(kv.fork(state.cache, from_M, to_M, keys), state.seen_BV)


def _seen(state: State, slot_B: Any, num_rows: int) -> jax.Array | None:
    """What has occurred in the slots of some rows, [B, V]."""
    if state.seen_BV is None:
        return None
    return state.seen_BV[:num_rows] if slot_B is None else state.seen_BV[slot_B]


def _remember(state: State, slot_B: Any, tokens_BT: jax.Array) -> jax.Array | None:
    """What has occurred in all slots, with new tokens of some (`FAR`: none)."""
    if state.seen_BV is None:
        return None
    slot_B = jnp.arange(tokens_BT.shape[0]) if slot_B is None else slot_B
    return state.seen_BV.at[slot_B[:, None], tokens_BT].set(True, mode="drop")


def _with(seen_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    return seen_BV.at[jnp.arange(tokens_B.shape[0]), tokens_B].set(True)


def _seen_along(seen_BV: jax.Array, proposed_BT: jax.Array) -> jax.Array:
    """What has occurred when each of T + 1 tokens is drawn, [B, T + 1, V]."""
    along = [seen_BV]
    for t in range(proposed_BT.shape[1]):
        along.append(_with(along[-1], proposed_BT[:, t]))
    return jnp.stack(along, axis=1)
