"""One transformer block built from its BlockSpec: Flax NNX modules in tree style.

A module is made abstractly, split once per kind of block, and merged with its weights inside a pure
function, so that parameters stay plain nested dicts. A no-op sub-block owns nothing and costs nothing.

Shape letters: B batch, T length, D model, N query heads, K KV heads, H head dim, F feed-forward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU, block_shapes
from nemojax.backends.matmul import Kind, matmul
from nemojax.model.attention import Context, attend_cached, attend_packed
from nemojax.model.cache import View
from nemojax.model.rope import rotate
from nemojax.sharding import constrain, gradient_split

# One line a weight: the logical axes of its dimensions, and which of them are summed over (fan-in).
AXES: dict[str, tuple[tuple[str | None, ...], tuple[int, ...]]] = {
    "norm": ((None,), ()),
    "q": (("embed", "heads", None), (0,)),
    "k": (("embed", "kv_heads", None), (0,)),
    "v": (("embed", "kv_heads", None), (0,)),
    "o": (("heads", None, "embed"), (0, 1)),
    "linear": (("embed", None), (0,)),
    "gate": (("embed", "mlp"), (0,)),
    "up": (("embed", "mlp"), (0,)),
    "down": (("mlp", "embed"), (0,)),
}

# Writes the new keys and values of this layer into the cache and gives back a view of all that are seen.
CacheUpdate = Callable[[jax.Array, jax.Array], View]
Capture = dict[str, jax.Array]


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) in f32, cast back, times scale."""
    x32 = x_BTD.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x_BTD.dtype) * scale_D.astype(x_BTD.dtype)


def initial(name: str, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Norms are one; matrices are normal with standard deviation 1 / sqrt(fan-in)."""
    fan_in = math.prod(shape[i] for i in AXES[name][1])
    if not AXES[name][1]:
        return jnp.ones(shape, dtype)
    return (jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype)


class SubBlock(nnx.Module):
    """Declares its weights from the architecture: name, shape, logical axes, initialiser."""

    norm: Any

    def __init__(self, arch: ArchSpec, spec: BlockSpec, kind: str, rngs: nnx.Rngs, dtype: Any):
        for name, shape in block_shapes(arch, spec)[kind].items():
            weight = nnx.Param(initial(name, rngs.params(), shape, dtype), axes=AXES[name][0])
            setattr(self, name, weight)

    def normed(self, arch: ArchSpec, x_BTD: jax.Array) -> jax.Array:
        x_BTD = rms_norm(x_BTD, self.norm.get_value(), arch.norm_eps)
        return constrain(x_BTD, "batch", "length", None)

    def times(self, subscripts: str, x: jax.Array, name: str, kind: Kind) -> jax.Array:
        """The product of activations with the weight called `name`."""
        if kind == "fp8" and subscripts.startswith("BTD"):
            # each product of an input has scales of its own, behind which XLA does not see where its gradient
            # goes; others it adds up first
            x = gradient_split(x)
        return matmul(subscripts, x, getattr(self, name).get_value(), kind=kind)


class AttentionBlock(SubBlock):
    def mix(
        self,
        arch: ArchSpec,
        spec: Attention,
        x_BTD: jax.Array,
        ctx: Context,
        update: CacheUpdate | None,
        kind: Kind,
    ) -> jax.Array:
        """Per-head outputs before the output projection, [B, T, N, H]."""
        x = self.normed(arch, x_BTD)
        q_BTNH = self.times("BTD,DNH->BTNH", x, "q", kind)
        k_BTKH = self.times("BTD,DKH->BTKH", x, "k", kind)
        v_BTKH = self.times("BTD,DKH->BTKH", x, "v", kind)
        q_BTNH = constrain(q_BTNH, "batch", "length", "heads", None)
        q_BTNH = rotate(q_BTNH, ctx.cos_BTP, ctx.sin_BTP)
        k_BTKH = rotate(k_BTKH, ctx.cos_BTP, ctx.sin_BTP)
        if update is None:
            return attend_packed(q_BTNH, k_BTKH, v_BTKH, ctx, spec)
        return attend_cached(q_BTNH, update(k_BTKH, v_BTKH), ctx, spec)

    def project(self, heads_BTNH: jax.Array, kind: Kind) -> jax.Array:
        return constrain(self.times("BTNH,NHD->BTD", heads_BTNH, "o", kind), "batch", "stream", None)


class SwiGLUBlock(SubBlock):
    def mix(self, arch: ArchSpec, x_BTD: jax.Array, kind: Kind) -> jax.Array:
        """Channel activations before the down projection, [B, T, F]."""
        x = self.normed(arch, x_BTD)
        gate_BTF = self.times("BTD,DF->BTF", x, "gate", kind)
        up_BTF = self.times("BTD,DF->BTF", x, "up", kind)
        return constrain(jax.nn.silu(gate_BTF) * up_BTF, "batch", "length", "mlp")

    def project(self, act_BTF: jax.Array, kind: Kind) -> jax.Array:
        return constrain(self.times("BTF,FD->BTD", act_BTF, "down", kind), "batch", "stream", None)


class LinearBlock(SubBlock):
    def __call__(self, arch: ArchSpec, x_BTD: jax.Array, kind: Kind) -> jax.Array:
        return self.times("BTD,DE->BTE", self.normed(arch, x_BTD), "linear", kind)


class Block(nnx.Module):
    """Attention sub-block, then feed-forward sub-block, each added to the residual unless it is a no-op."""

    attn: Any
    ffn: Any

    def __init__(self, arch: ArchSpec, spec: BlockSpec, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        match spec.attn:
            case Attention():
                self.attn = AttentionBlock(arch, spec, "attn", rngs, dtype)
            case Linear():
                self.attn = LinearBlock(arch, spec, "attn", rngs, dtype)
        match spec.ffn:
            case SwiGLU():
                self.ffn = SwiGLUBlock(arch, spec, "ffn", rngs, dtype)
            case Linear():
                self.ffn = LinearBlock(arch, spec, "ffn", rngs, dtype)

    def __call__(
        self,
        arch: ArchSpec,
        spec: BlockSpec,
        h_BTD: jax.Array,
        ctx: Context,
        update: CacheUpdate | None = None,
        capture: Capture | None = None,
        kind: Kind = "default",
    ) -> jax.Array:
        match spec.attn:
            case Attention():
                heads_BTNH = self.attn.mix(arch, spec.attn, h_BTD, ctx, update, kind)
                if capture is not None:
                    capture["heads_BTNH"] = heads_BTNH
                out_BTD = self.attn.project(heads_BTNH, kind)
            case Linear():
                out_BTD = self.attn(arch, h_BTD, kind)
            case NoOp():
                out_BTD = None
        if out_BTD is not None:
            h_BTD = h_BTD + out_BTD
            if capture is not None:
                capture["attn_BTD"] = out_BTD
        h_BTD = constrain(h_BTD, "batch", "stream", None)
        if capture is not None:
            capture["between_BTD"] = h_BTD
        match spec.ffn:
            case SwiGLU():
                act_BTF = self.ffn.mix(arch, h_BTD, kind)
                if capture is not None:
                    capture["act_BTF"] = act_BTF
                h_BTD = h_BTD + self.ffn.project(act_BTF, kind)
            case Linear():
                h_BTD = h_BTD + self.ffn(arch, h_BTD, kind)
            case NoOp():
                pass
        return constrain(h_BTD, "batch", "stream", None)


@functools.cache
def abstract_block(arch: ArchSpec, spec: BlockSpec) -> tuple[Any, Any]:
    """(graph definition, abstract state) of one kind of block, made without allocating."""
    return nnx.split(nnx.eval_shape(lambda: Block(arch, spec, nnx.Rngs(0))))


def init_block(arch: ArchSpec, spec: BlockSpec, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Fresh weights of one block: {"attn": {...}, "ffn": {...}}, a no-op sub-block absent."""
    return nnx.to_pure_dict(nnx.state(Block(arch, spec, nnx.Rngs(key), dtype)))


def block_axes(arch: ArchSpec, spec: BlockSpec) -> dict[str, Any]:
    """Logical axes of one block's weights, in the shape of its parameters."""
    _, state = abstract_block(arch, spec)
    out: dict[str, Any] = {}
    for (sub, name), variable in nnx.to_flat_state(state):
        out.setdefault(str(sub), {})[name] = variable.get_metadata()["axes"]
    return out


def apply_block(
    arch: ArchSpec,
    spec: BlockSpec,
    weights: dict[str, Any],
    h_BTD: jax.Array,
    ctx: Context,
    update: CacheUpdate | None = None,
    capture: Capture | None = None,
    kind: Kind = "default",
) -> jax.Array:
    """The block of kind `spec` on the residual stream; returns [B, T, D]. `kind` of its matmuls.

    `capture`, a dict, receives `heads_BTNH` (before the output projection), `attn_BTD` (what the attention
    sub-block adds), `between_BTD` (after it) and `act_BTF` (before the down projection), where they exist.
    """
    graph, state = abstract_block(arch, spec)
    state = jax.tree.map(lambda v: v, state)
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)(arch, spec, h_BTD, ctx, update, capture, kind)
