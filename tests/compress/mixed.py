"""A tiny parent that is itself a child of a search: layers of several kinds, one of them empty."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU
from nemojax.losses.tokens import token_logps
from nemojax.model.layout import stack, unstack
from nemojax.model.llama import abstract_params, final_norm, head_weight, hidden
from nemojax.tree import from_paths, paths

MIXED = ArchSpec(
    vocab_size=64,
    dim=16,
    num_heads=4,
    head_dim=4,
    blocks=(
        BlockSpec(Attention(4), SwiGLU(24)),
        BlockSpec(Attention(4), SwiGLU(24)),
        BlockSpec(NoOp(), NoOp()),
        BlockSpec(Attention(2), SwiGLU(16)),
        BlockSpec(Linear(), NoOp()),
        BlockSpec(NoOp(), Linear()),
    ),
    context=32,
    norm_eps=1e-9,
)
TIED = MIXED.replace(tie_embeddings=True)


@functools.cache
def mixed_parent(arch: ArchSpec = MIXED) -> dict:
    """Random weights, norms included, so that nothing is equal by chance; numpy compiles nothing."""
    rng = np.random.default_rng(0)

    def weight(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 0.1 if path.endswith(("norm", "scale", "embed/weight")) else 0.25
        mean = 1.0 if path.endswith(("norm", "scale")) else 0.0
        return jnp.asarray(mean + scale * rng.normal(size=leaf.shape), jnp.float32)

    return from_paths({path: weight(path, leaf) for path, leaf in paths(abstract_params(arch)).items()})


def change(params: dict, arch: ArchSpec, edit) -> dict:
    """The parameters with `edit(layers)` done to their per-layer tree of writable numpy arrays."""
    tree = jax.tree.map(lambda w: np.array(w), unstack(jax.tree.map(np.asarray, params), arch))
    edit(tree)
    return stack(tree, arch)


def mean_loss(params: dict, arch: ArchSpec, data: list[dict]) -> float:
    """LM loss over all target tokens, in nats, by the whole model."""
    total = sum(float(loss_sum(params, arch, batch)) for batch in data)
    return total / sum(float(b["weights"].sum()) for b in data)


@functools.partial(jax.jit, static_argnums=1)
def loss_sum(params: dict, arch: ArchSpec, batch: dict) -> jax.Array:
    x = final_norm(params, arch, hidden(params, arch, batch)[0])
    return -jnp.sum(token_logps(x, head_weight(params), batch["targets"])[0] * batch["weights"])
