"""The model: four doors that everything goes through.

`embed`, `apply_blocks`, `head`, and `apply` that composes them. Training, scoring, sampling and export
all use these. Blocks of one kind that stand next to each other form a run, whose weights are stacked on
a leading axis and scanned, so that the compiled program grows with runs, not with layers.

Shape letters: B batch, T length, D model, V vocabulary, n layers of a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nemojax.arch import ArchSpec, Run
from nemojax.backends import fp8
from nemojax.backends.contract import SAVED as PRODUCT
from nemojax.backends.kernels import Asked
from nemojax.backends.matmul import Kind, matmul
from nemojax.config import field
from nemojax.model.attention import Context, make_context
from nemojax.model.block import AXES, apply_block, block_axes, init_block, rms_norm
from nemojax.model.blockwise import SAVED
from nemojax.model.cache import Cache, Layer, View, Window, write
from nemojax.model.layout import run_name
from nemojax.sharding import HOST_MEMORY, constrain, shardings_of, ways_of

# matmuls are not computed twice; nor is attention over a long row, which is a loop of them
KEEP_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(SAVED, PRODUCT)
)

# the stream before each block, all that whole blocks are computed again from, waits in host memory
STREAM = "stream"
OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[STREAM],
    offload_src="device",
    offload_dst=HOST_MEMORY,
)

_LOOP = 4  # steps: of fewer, double buffering, which peels one and unrolls two, leaves no loop

Params = dict[str, Any]
Remat = Literal["none", "dots", "full", "offload"]
Tap = int | tuple[Literal["attn"], int]  # the stream after a layer; what its attention sub-block adds to it
Taps = dict[Tap, jax.Array]


@dataclass(frozen=True)
class Compute:
    """How to compute, never what: results agree up to rounding."""

    dtype: Literal["float32", "bfloat16"] = field("float32", "dtype of activations and matmuls")
    remat: Remat = field(
        "none",
        "recomputed in the backward pass: nothing, all but matmuls, whole blocks, or these from what waits "
        "in host memory (offload)",
    )
    unroll: int = field(
        1, "blocks of a run in one step of the scan (more: larger program, often faster on CPU)"
    )
    matmul: Kind = field(
        "default", "matmuls of block weights: in dtype, in fp8 (H100 on), or forwards in int8 (TPU v5e, v6e)"
    )
    attention: Asked = field(
        "auto", "kernel of attention over packed rows; auto: the best that can serve them"
    )


def exact_matmuls(compute: Compute, stage: str) -> None:
    """ValueError where a stage that runs blocks one by one is asked for matmuls of eight bits."""
    if compute.matmul != "default":
        raise ValueError(
            f"compute.matmul: expected default for {stage}, which compares blocks, got {compute.matmul}"
        )


def init_params(arch: ArchSpec, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters, stacked by run. Call it under `jax.jit` with out_shardings to make them sharded."""
    k_embed, k_head, *k_runs = jax.random.split(key, 2 + len(arch.runs()))
    params: Params = {
        "embed": {"weight": (jax.random.normal(k_embed, (arch.vocab_size, arch.dim)) * 0.02).astype(dtype)},
        "runs": {
            run_name(i): jax.vmap(lambda k, s=run.spec: init_block(arch, s, k, dtype))(
                jax.random.split(k_runs[i], len(run.layers))
            )
            for i, run in enumerate(arch.runs())
        },
        "norm": {"scale": jnp.ones((arch.dim,), dtype)},
    }
    if not arch.tie_embeddings:
        head_VD = jax.random.normal(k_head, (arch.vocab_size, arch.dim)) * arch.dim**-0.5
        params["head"] = {"weight": head_VD.astype(dtype)}
    return params


def abstract_params(arch: ArchSpec, dtype: Any = jnp.float32) -> Params:
    """Shapes and dtypes of `init_params`, nothing allocated."""
    # the key is made inside: outside it would be computed, on devices that need not be there
    return jax.eval_shape(lambda: init_params(arch, jax.random.key(0), dtype=dtype))


def logical_axes(arch: ArchSpec) -> Params:
    """A tuple of logical axis names for every parameter."""
    axes: Params = {
        "embed": {"weight": ("vocab", "embed")},
        "runs": {
            run_name(i): jax.tree.map(
                lambda a: (None, *a), block_axes(arch, run.spec), is_leaf=lambda x: isinstance(x, tuple)
            )
            for i, run in enumerate(arch.runs())
        },
        "norm": {"scale": (None,)},
    }
    if not arch.tie_embeddings:
        axes["head"] = {"weight": ("vocab", "embed")}
    return axes


def param_shardings(arch: ArchSpec, mesh: jax.sharding.Mesh, dtype: Any = jnp.float32) -> Params:
    """A NamedSharding for every parameter. ValueError naming the weight that the mesh does not divide."""
    return shardings_of(logical_axes(arch), abstract_params(arch, dtype), mesh)


def quantize(params: Params) -> Params:
    """Block matrices as `fp8.Quantized`, a byte a weight and a scale a layer; what else there is as it is.

    It traces, also over abstract parameters, takes both layouts, and leaves alone what it has made.
    """

    def layer(weights: Params) -> Params:
        return _map_matrices(lambda w, a: w if isinstance(w, fp8.Quantized) else fp8.keep(w, a), weights)

    def run(weights: Any) -> Any:
        return tuple(map(layer, weights)) if isinstance(weights, tuple) else jax.vmap(layer)(weights)

    return {**params, "runs": {name: run(weights) for name, weights in params["runs"].items()}}


def quantized_shardings(shardings: Params) -> Params:
    """Of `quantize(params)`, from those of the parameters: the bytes as the weights, scales everywhere."""

    def one(sharding: jax.sharding.NamedSharding, summed: tuple[int, ...]) -> fp8.Quantized:
        layers, *spec = sharding.spec
        rest = [entry for axis, entry in enumerate(spec) if axis not in summed]
        order = jax.sharding.PartitionSpec(layers, *rest, *(spec[axis] for axis in summed))
        places: Any = [
            jax.sharding.NamedSharding(sharding.mesh, p) for p in (order, jax.sharding.PartitionSpec())
        ]
        return fp8.Quantized(*places)

    return {**shardings, "runs": {name: _map_matrices(one, run) for name, run in shardings["runs"].items()}}


def _map_matrices(one: Callable[[Any, tuple[int, ...]], Any], weights: Params) -> Params:
    """`one(weight, its dimensions that are summed over)` of every matrix of a block."""
    return {
        sub: {name: one(w, AXES[name][1]) if AXES[name][1] else w for name, w in part.items()}
        for sub, part in weights.items()
    }


def head_weight(params: Mapping[str, Any]) -> jax.Array:
    """The output matrix [V, D]: the embedding when they are tied."""
    return params["head"]["weight"] if "head" in params else params["embed"]["weight"]


def embed(params: Mapping[str, Any], tokens_BT: jax.Array, compute: Compute = Compute()) -> jax.Array:
    """Token embeddings [B, T, D].

    On a mesh every device looks up what it has of the vocabulary, in whole rows of the table: were these
    split as they are stored, the partitioner would gather the activations of all devices instead.
    """
    w_VD = constrain(params["embed"]["weight"].astype(compute.dtype), "vocab", None)
    if tokens_BT.size == 1 and ways_of("vocab") > 1:
        # XLA turns the lookup of one token into a slice, for which it gathers the table on GPUs: ask twice
        return w_VD[jnp.repeat(tokens_BT, 2, axis=1)][:, :1]
    h_BTD = constrain(w_VD[tokens_BT], "batch", "length", None)
    return constrain(h_BTD, "batch", "stream", None)


def final_norm(params: Mapping[str, Any], arch: ArchSpec, h_BTD: jax.Array) -> jax.Array:
    return rms_norm(h_BTD, params["norm"]["scale"], arch.norm_eps)


def head(params: Mapping[str, Any], arch: ArchSpec, h_BTD: jax.Array) -> jax.Array:
    """Final norm and output projection: logits [B, T, V] in f32."""
    x_BTD = final_norm(params, arch, h_BTD)
    w_VD = head_weight(params).astype(x_BTD.dtype)
    return matmul("BTD,VD->BTV", x_BTD, w_VD, jnp.float32)


def apply_blocks(
    params: Mapping[str, Any],
    arch: ArchSpec,
    h_BTD: jax.Array,
    ctx: Context,
    *,
    start: int = 0,
    stop: int | None = None,
    taps: tuple[Tap, ...] = (),
    window: Window | None = None,
    compute: Compute = Compute(),
) -> tuple[jax.Array, Taps, Cache | None]:
    """Layers start..stop on the residual stream.

    Returns (h after them, {tap: array} for `taps`, cache). A layer's tap is h after that layer; an empty
    layer's is the stream at that point. The tap ("attn", layer) is the output of a layer's attention
    sub-block, which must not be a no-op. With a window on a cache the tokens are new ones at
    `ctx.positions_BT`; their keys and values are written there. `params` may be split by layer
    (`layout.split_layers`), a cache then is too.
    """
    if compute.attention != "auto":
        ctx = replace(ctx, kernel=compute.attention)
    stop = arch.num_layers if stop is None else stop
    sources = {t: _last_real_layer(arch, t, start) if isinstance(t, int) else t for t in taps}
    outputs: dict[Tap | None, jax.Array] = {None: h_BTD}
    cache = dict(window.cache) if window is not None else None
    for i, run in enumerate(arch.runs()):
        inside = [j for j, layer in enumerate(run.layers) if start <= layer < stop]
        if not inside:
            continue
        name, first, last = run_name(i), inside[0], inside[-1] + 1
        weights = params["runs"][name]
        if (first, last) != (0, len(run.layers)):
            weights = _layers_of(weights, first, last)
        part = Run(run.spec, run.layers[first:last])
        if window is not None and cache is not None and name in cache:
            h_BTD, cache[name] = _run_cached(arch, part, weights, h_BTD, ctx, window, name, first, compute)
        else:
            places: dict[Tap, tuple[str, int]] = {}
            for j, layer in enumerate(part.layers):
                places[layer], places["attn", layer] = ("after", j), ("attn_BTD", j)
            wanted = {tap: place for tap, place in places.items() if tap in sources.values()}
            names = tuple(sorted({name for name, _ in wanted.values()}))
            h_BTD, seen = _run(arch, part, weights, h_BTD, ctx, compute, names)
            outputs |= {tap: seen[name][j] for tap, (name, j) in wanted.items()}
    return h_BTD, {tap: outputs[source] for tap, source in sources.items()}, cache


def apply(
    params: Mapping[str, Any],
    arch: ArchSpec,
    batch: Mapping[str, jax.Array],
    *,
    taps: tuple[Tap, ...] = (),
    compute: Compute = Compute(),
) -> tuple[jax.Array, Taps]:
    """Logits [B, T, V] f32 and taps for a packed batch (`tokens`, and `positions`, `segments` if packed)."""
    h_BTD, tapped = hidden(params, arch, batch, taps=taps, compute=compute)
    return head(params, arch, h_BTD), tapped


def hidden(
    params: Mapping[str, Any],
    arch: ArchSpec,
    batch: Mapping[str, jax.Array],
    *,
    taps: tuple[Tap, ...] = (),
    compute: Compute = Compute(),
) -> tuple[jax.Array, Taps]:
    """Residual stream [B, T, D] after all blocks, before the final norm, and taps."""
    ctx = batch_context(arch, batch)
    h_BTD = embed(params, batch["tokens"], compute)
    h_BTD, tapped, _ = apply_blocks(params, arch, h_BTD, ctx, taps=taps, compute=compute)
    return h_BTD, tapped


def batch_context(arch: ArchSpec, batch: Mapping[str, jax.Array]) -> Context:
    """Attention context of a batch; without `positions` each row is one document."""
    tokens_BT = batch["tokens"]
    positions_BT = batch.get("positions")
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    return make_context(arch, positions_BT, batch.get("segments"))


def _layers_of(weights: Any, first: int, last: int) -> Any:
    if isinstance(weights, tuple):
        return weights[first:last]
    return jax.tree.map(lambda w: w[first:last], weights)


def _run(
    arch: ArchSpec,
    run: Run,
    weights: Any,
    h_BTD: jax.Array,
    ctx: Context,
    compute: Compute,
    wanted: tuple[str, ...],
) -> tuple[jax.Array, dict[str, Any]]:
    """(stream after the run, what is `wanted` of every layer: "after", or a name that a block captures)."""

    def body(h: jax.Array, w: Any, /) -> tuple[jax.Array, dict[str, jax.Array]]:
        seen: dict[str, jax.Array] | None = {} if set(wanted) - {"after"} else None
        h = checkpoint_name(h, STREAM)
        h = apply_block(arch, run.spec, w, h, ctx, capture=seen, kind=compute.matmul)
        return h, {name: h if seen is None or name == "after" else seen[name] for name in wanted}

    if isinstance(weights, tuple):
        layers: list[dict[str, jax.Array]] = []
        for w in weights:
            h_BTD, seen = body(h_BTD, w)
            layers.append(seen)
        return h_BTD, {name: [seen[name] for seen in layers] for name in wanted}
    # what a loop computes in one step is not kept for another; a loop of few steps is none when compiled
    looped = len(run.layers) >= _LOOP * max(compute.unroll, 1)
    again = functools.partial(jax.checkpoint, prevent_cse=not looped)
    match compute.remat:
        case "full":
            body = again(body)
        case "dots":
            body = again(body, policy=KEEP_DOTS)
        case "offload":
            body = again(body, policy=OFFLOAD)
    if compute.remat != "none" and not looped:
        body = _one_at_a_time(body, block_axes(arch, run.spec))
    return jax.lax.scan(body, h_BTD, weights, unroll=min(compute.unroll, len(run.layers)))


def _one_at_a_time(body: Callable[[jax.Array, Any], Any], axes: Params) -> Callable[[jax.Array, Any], Any]:
    """`body` of (stream, weights), whose backward pass ends before that of the layer below begins.

    Otherwise a scheduler may put off the gradients of weights, and keep all that they are computed from: with
    the layers of Nemotron Ultra that stand alone or in twos or threes, a third of a device's memory.
    """

    @jax.custom_vjp
    def joined(h: jax.Array, w: Any) -> tuple[jax.Array, Any]:
        return h, w

    def backward(_: None, grads: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        dh, dw = grads
        # where they belong, for what is still to be summed over devices cannot wait
        return jax.lax.optimization_barrier((dh, jax.tree.map(lambda g, a: constrain(g, *a), dw, axes)))

    joined.defvjp(lambda h, w: ((h, w), None), backward)
    return lambda h, w: body(*joined(h, w))


def _run_cached(
    arch: ArchSpec,
    run: Run,
    weights: Any,
    h_BTD: jax.Array,
    ctx: Context,
    window: Window,
    name: str,
    first: int,
    compute: Compute,
) -> tuple[jax.Array, Any]:
    """A run over its part of the cache: (h after it, that part with the new keys and values)."""
    num_rows = h_BTD.shape[0]
    rows_B = jnp.arange(num_rows) if window.rows_B is None else window.rows_B

    def one(h: jax.Array, w: Any, layer: Layer, index: jax.Array | None) -> tuple[jax.Array, Layer]:
        written: list[Layer] = []

        def update(k_BTKH: jax.Array, v_BTKH: jax.Array) -> View:
            written.append(write(layer, {"k": k_BTKH, "v": v_BTKH}, rows_B, ctx.positions_BT, index))
            return View(written[0], window, index)

        h = apply_block(arch, run.spec, w, h, ctx, update=update, kind=compute.matmul)
        return h, written[0]

    part = window.cache[name]
    if isinstance(weights, tuple):
        layers = list(part)
        for j, w in enumerate(weights):
            h_BTD, layers[first + j] = one(h_BTD, w, part[first + j], None)
        return h_BTD, tuple(layers)

    # the cache is carried, not scanned over: XLA then updates it in place instead of copying it
    def body(carry: tuple, x: tuple) -> tuple[tuple, None]:
        return one(carry[0], x[0], carry[1], x[1]), None

    indices = jnp.arange(first, first + len(run.layers))
    return jax.lax.scan(body, (h_BTD, part), (weights, indices))[0]


def _last_real_layer(arch: ArchSpec, layer: int, start: int) -> int | None:
    """The layer whose output is the stream after `layer`: an empty layer passes on what came before."""
    return next((n for n in range(layer, start - 1, -1) if not arch.blocks[n].is_empty), None)
