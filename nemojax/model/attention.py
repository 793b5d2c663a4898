"""Scaled dot-product attention with grouped KV heads, over a packed batch or over a cache.

Shape letters: B batch, T query length, S key length, N query heads, K KV heads, G = N / K queries a
group, H head dim, P = H / 2, n layers of a run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from nemojax.arch import ArchSpec, Attention
from nemojax.backends import cached, gpu
from nemojax.backends.cached import Slots
from nemojax.backends.contract import exact
from nemojax.backends.kernels import Asked, Kernel, attention_kernel
from nemojax.backends.rows import Rows
from nemojax.model import rope
from nemojax.model.blockwise import (
    ACCELERATOR,
    CPU,
    MASKED,
    NOTHING,
    Places,
    Tiles,
    attend_blockwise,
    block_size,
)
from nemojax.model.cache import View
from nemojax.sharding import platform, spec_of, ways_of

QUERY_BLOCKS = 4
SPLIT_LENGTH = 128  # below, a block is too small to be worth a program of its own


# Queries, keys and values of a device with the places of queries and keys; returns [B, T, N, H].
Attend = Callable[[jax.Array, jax.Array, jax.Array, Places, Places], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What attention needs to know of a batch, made once and shared by all layers.

    `packed`: rows may have several documents, or padding. `kernel`: the one asked for.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array
    cos_BTP: jax.Array
    sin_BTP: jax.Array
    packed: bool = field(default=True, metadata={"static": True})
    kernel: Asked = field(default="auto", metadata={"static": True})


def make_context(
    arch: ArchSpec,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    kernel: Asked = "auto",
) -> Context:
    """Context of a batch: positions restart with each document; segments tell documents apart (0 pads).

    Without segments each row is one document. `kernel`: that of attention over packed rows.
    """
    cos_BTP, sin_BTP = rope.tables(arch.rope, arch.head_dim, positions_BT)
    packed = segments_BT is not None
    segments_BT = segments_BT if packed else jnp.ones_like(positions_BT)
    return Context(positions_BT, segments_BT, cos_BTP, sin_BTP, packed, kernel)


def attend_packed(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ctx: Context, spec: Attention
) -> jax.Array:
    """Causal attention inside each document of a packed row, by the kernel of the context's choice;
    returns [B, T, N, H]. What padding gets is of no use, and finite."""
    length, _, head_dim = q_BTNH.shape[1:]
    name = kernel_of(length, head_dim, q_BTNH.dtype, packed=ctx.packed, asked=ctx.kernel)
    if name == "short":
        return attend_short(q_BTNH, k_BTKH, v_BTKH, ctx, spec)
    return _on_devices(_attend_by(name, spec.window), q_BTNH, k_BTKH, v_BTKH, ctx)


def kernel_of(
    length: int, head_dim: int, dtype: Any, *, packed: bool = True, asked: Asked = "auto"
) -> Kernel:
    """The kernel that `attend_packed` takes for rows under the mesh in scope.

    ValueError when the one that is asked for cannot serve them.
    """
    rows = Rows(length, head_dim, dtype, packed, split=ways_of("length") > 1)
    return attention_kernel(platform(), rows, asked, long=tiles().long)


def tiles() -> Tiles:
    """Sizes for the machine of the mesh in scope."""
    return CPU if platform() == "cpu" else ACCELERATOR


def attend_short(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ctx: Context, spec: Attention
) -> jax.Array:
    """In blocks of queries, each with only the keys that it may see: of 4 blocks the scores take 5/8 of the
    work and at most a quarter of the memory at once."""
    length = q_BTNH.shape[1]
    size = -(-length // QUERY_BLOCKS) if length >= SPLIT_LENGTH else length
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if spec.window is None else max(0, start - spec.window + 1)
        # index order equals position order inside a document, and costs no comparison per batch row
        back_TS = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
        mask_TS = back_TS >= 0
        if spec.window is not None:
            mask_TS &= back_TS < spec.window
        same_BTS = ctx.segments_BT[:, start:stop, None] == ctx.segments_BT[:, None, first:stop]
        keys = slice(first, stop)
        blocks.append(
            masked_attention(q_BTNH[:, start:stop], k_BTKH[:, keys], v_BTKH[:, keys], mask_TS & same_BTS)
        )
    return jnp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]


def _attend_by(name: Kernel, window: int | None) -> Attend:
    """A kernel on what one device has."""
    match name:
        case "splash":
            from nemojax.backends.splash import attend_splash  # Pallas takes a second to load

            splash = functools.partial(attend_splash, window=window, interpret=platform() == "cpu")
            return lambda q, k, v, at, _: splash(q, k, v, at.segments)
        case "tokamax":
            return lambda q, k, v, at, _: gpu.attend_tokamax(q, k, v, at.segments, window=window)
        case "cudnn":
            return lambda q, k, v, *_: gpu.attend_cudnn(q, k, v, window=window)
    most = tiles().block

    def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, at: Places, keys_at: Places) -> jax.Array:
        # of a row that several devices share, each has two chunks
        chunk = q.shape[1] if q.shape[1] == k.shape[1] else max(1, q.shape[1] // 2)
        return attend_blockwise(q, k, v, at, keys_at, window=window, block=block_size(chunk, most))

    return blockwise


def _on_devices(
    attend: Attend, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ctx: Context
) -> jax.Array:
    """A kernel on each device of the mesh in scope, with its own rows, heads and queries.

    Devices that share a row gather its keys and values, as Llama 3 was trained (arXiv:2407.21783, section
    3.3.2): with few KV heads that is little beside the activations.
    """
    at_BT = Places(*(jnp.broadcast_to(x, q_BTNH.shape[:2]) for x in (ctx.segments_BT, ctx.positions_BT)))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q_BTNH, k_BTKH, v_BTKH, at_BT, at_BT)
    columns = spec_of(q_BTNH.shape[:2], "batch", "length")
    queries = spec_of(q_BTNH.shape, "batch", "length", "heads", None)
    keys = spec_of(k_BTKH.shape, "batch", "length", "kv_heads", None)
    group = q_BTNH.shape[2] // k_BTKH.shape[2]

    def on_device(q: jax.Array, k: jax.Array, v: jax.Array, at: Places) -> jax.Array:
        if queries[2] and not keys[2]:
            mine = _kv_heads(jax.lax.axis_index(queries[2]), q.shape[2], group)
            k, v = k[:, :, mine], v[:, :, mine]
        seen = (k, v, at)
        if columns[1]:
            gather = functools.partial(jax.lax.all_gather, axis_name=columns[1], axis=1, tiled=True)
            seen = jax.tree.map(gather, seen)
        k, v, keys_at = seen
        return attend(q, k, v, at, keys_at)

    # the check of replication knows no loop that begins with the same zeros everywhere
    one_each = jax.shard_map(
        on_device,
        in_specs=(queries, keys, keys, columns),
        out_specs=queries,
        check_vma=False,
    )
    return one_each(q_BTNH, k_BTKH, v_BTKH, at_BT)


def _kv_heads(device: jax.Array, num_heads: int, group: int) -> jax.Array:
    """The KV heads of a device's `num_heads` query heads, where every device holds all KV heads.

    `group` query heads share one; a head that serves several neighbouring heads here is named once.
    """
    run = math.gcd(num_heads, group)
    return (device * num_heads + jnp.arange(0, num_heads, run)) // group


def attend_cached(q_BTNH: jax.Array, seen: View, ctx: Context, spec: Attention) -> jax.Array:
    """Attention of new tokens over a cache whose key index is its position; returns [B, T, N, H].

    On a GPU by a kernel that reads the cache in place.
    """
    num_rows = q_BTNH.shape[0]
    if platform() in ("gpu", "cuda"):
        slots = seen.slots(num_rows)
        size = _numbers_of_a_device(slots.k)
        if cached.refusal(q_BTNH.shape[3], q_BTNH.dtype, slots, size) is None and _in_place(
            q_BTNH, seen, slots
        ):
            return _attend_slots(q_BTNH, ctx.positions_BT, slots, seen.window.keys, spec.window)
    return attend_read(q_BTNH, *seen.read(num_rows, q_BTNH.dtype), ctx, spec)


def _numbers_of_a_device(cache_nBKSH: jax.Array) -> int:
    mesh, shape = jax.sharding.get_abstract_mesh(), cache_nBKSH.shape
    if mesh.empty or mesh.size == 1:
        return cache_nBKSH.size
    place = jax.NamedSharding(mesh, spec_of(shape, None, "batch", "kv_heads", None, None))
    return math.prod(place.shard_shape(shape))


def _in_place(q_BTNH: jax.Array, seen: View, slots: Slots) -> bool:
    """Whether each device of the mesh in scope has the slots of its rows and the KV heads of its heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return True
    own_rows = seen.window.rows_B is None and q_BTNH.shape[0] == slots.k.shape[1]
    heads, kv_heads = (
        spec_of((n,), name)[0] for n, name in ((q_BTNH.shape[2], "heads"), (slots.k.shape[2], "kv_heads"))
    )
    return (own_rows or ways_of("batch") == 1) and heads == kv_heads


def _attend_slots(
    q_BTNH: jax.Array, positions_BT: jax.Array, slots: Slots, keys: int, window: int | None
) -> jax.Array:
    """The kernel on each device of the mesh in scope."""
    attend = functools.partial(cached.attend_slots, keys=keys, window=window)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q_BTNH, positions_BT, slots)
    rows, _, heads, _ = queries = spec_of(q_BTNH.shape, "batch", None, "heads", None)
    values = jax.P(None, rows, heads)
    scales = None if slots.k_scale is None else values
    parts: Any = Slots(values, values, scales, scales, layer=jax.P(), slot_B=jax.P(rows))  # pyright: ignore

    split = ways_of("batch") > 1

    def on_device(q: jax.Array, positions: jax.Array, slots: Slots) -> jax.Array:
        # of rows that are split, a device's slots are its own
        return attend(q, positions, slots._replace(slot_B=jnp.arange(q.shape[0])) if split else slots)

    one_each = jax.shard_map(
        on_device, in_specs=(queries, jax.P(rows), parts), out_specs=queries, check_vma=False
    )
    return one_each(q_BTNH, positions_BT, slots)


def attend_read(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, ctx: Context, spec: Attention
) -> jax.Array:
    """Attention of new tokens over what was read of a cache; returns [B, T, N, H].

    Written out as two batched products in the cache's own order of dimensions: an einsum would turn the
    scores round, which costs more than they do when there is one query a row. Many queries meet many keys in
    blocks of these.
    """
    b, t, n, h = q_BTNH.shape
    heads, length = k_BKSH.shape[1:3]
    q_BKGTH = (q_BTNH * (h**-0.5)).reshape(b, t, heads, n // heads, h).transpose(0, 2, 3, 1, 4)
    q_BKQH = q_BKGTH.reshape(b, heads, -1, h)  # Q = G x T queries of a KV head
    positions_BQ = jnp.tile(ctx.positions_BT, (1, n // heads))
    many = t >= SPLIT_LENGTH and length > tiles().long and platform() != "cpu"
    attend = functools.partial(_read_in_blocks, block=tiles().block) if many else _read_at_once
    out_BKQH = attend(q_BKQH, k_BKSH, v_BKSH, positions_BQ, spec.window)
    out_BKGTH = out_BKQH.reshape(b, heads, n // heads, t, h)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _read_at_once(
    q_BKQH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_BQ: jax.Array, window: int | None
) -> jax.Array:
    scores_BKQS = _scores(q_BKQH, k_BKSH, positions_BQ, jnp.arange(k_BKSH.shape[2]), window)
    weights_BKQS = jax.nn.softmax(scores_BKQS, axis=-1).astype(v_BKSH.dtype)
    return _per_head(weights_BKQS, v_BKSH, 2, v_BKSH.dtype)


def _read_in_blocks(
    q_BKQH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BQ: jax.Array,
    window: int | None,
    *,
    block: int,
) -> jax.Array:
    """With a softmax that is carried along (arXiv:2205.14135, section 3.1): scores of one block of keys exist
    at a time, from the first that a query sees to the last."""
    length = k_BKSH.shape[2]
    inside_BQ = positions_BQ < length
    first, last = 0, jnp.max(jnp.where(inside_BQ, positions_BQ, 0)) // block
    if window is not None:
        nearest = jnp.min(jnp.where(inside_BQ, positions_BQ, length))
        first = jnp.maximum(nearest - window + 1, 0) // block

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top_BKQ, total_BKQ, sum_BKQH = carry
        start = jnp.minimum(i * block, length - block)  # the last block may reach back into the one before
        k_BKsH, v_BKsH = (jax.lax.dynamic_slice_in_dim(x, start, block, 2) for x in (k_BKSH, v_BKSH))
        keys_s = start + jnp.arange(block)
        keys_s = jnp.where(keys_s >= i * block, keys_s, jnp.iinfo(jnp.int32).max)
        scores_BKQs = _scores(q_BKQH, k_BKsH, positions_BQ, keys_s, window)
        new_BKQ = jnp.maximum(top_BKQ, jnp.max(scores_BKQs, axis=-1))
        weights_BKQs = jnp.exp(scores_BKQs - new_BKQ[..., None])
        shrink_BKQ = jnp.exp(top_BKQ - new_BKQ)
        values_BKQH = _per_head(weights_BKQs.astype(v_BKsH.dtype), v_BKsH, 2, jnp.float32)
        total_BKQ = total_BKQ * shrink_BKQ + jnp.sum(weights_BKQs, axis=-1)
        return new_BKQ, total_BKQ, sum_BKQH * shrink_BKQ[..., None] + values_BKQH

    shape = q_BKQH.shape[:3]
    start = (jnp.full(shape, NOTHING), jnp.zeros(shape), jnp.zeros(q_BKQH.shape, jnp.float32))
    _, total_BKQ, sum_BKQH = jax.lax.fori_loop(first, last + 1, body, start)
    return (sum_BKQH / jnp.where(total_BKQ > 0, total_BKQ, 1.0)[..., None]).astype(v_BKSH.dtype)


def _scores(
    q_BKQH: jax.Array, k_BKSH: jax.Array, positions_BQ: jax.Array, keys_S: jax.Array, window: int | None
) -> jax.Array:
    """Scores in f32 of queries at positions with keys at theirs, [B, K, Q, S]."""
    back_BQS = positions_BQ[:, :, None] - keys_S
    mask_BQS = back_BQS >= 0
    if window is not None:
        mask_BQS &= back_BQS < window
    return jnp.where(mask_BQS[:, None], _per_head(q_BKQH, k_BKSH, 3, jnp.float32), MASKED)


def _per_head(a_BKQx: jax.Array, b_BKSx: jax.Array, axis: int, out_dtype: Any) -> jax.Array:
    """Products of every row's KV heads, summed over the last axis of the one and `axis` of the other."""
    dims, how = (((3,), (axis,)), ((0, 1), (0, 1))), exact(a_BKQx, b_BKSx)
    return jax.lax.dot_general(a_BKQx, b_BKSx, dims, precision=how, preferred_element_type=out_dtype)


def masked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """softmax(q k / sqrt(H)) v with the softmax in f32; a masked score is -inf in effect."""
    b, t, n, h = q_BTNH.shape
    k_heads = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * (h**-0.5)).reshape(b, t, k_heads, n // k_heads, h)
    product = functools.partial(jnp.einsum, precision=exact(q_BTKGH, k_BSKH))
    scores_BKGTS = product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return product("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(b, t, n, h)
