"""Nothing that is large lies on a device as a whole: every array of every stage's compiled programs is read.

Dimensions have sizes of their own, so that an array shows what it is: a stack of all layers, all rows of
the batch, the vocabulary in full. On the mesh each of these is split at least in two.
"""

import dataclasses
import math
import re

import jax
import pytest

from nemojax.arch import uniform
from nemojax.backends.topology import open_topology
from nemojax.compress import score
from nemojax.plan.planner import plan_mesh
from nemojax.plan.programs import STEPS, Program, Training, Work, programs_of
from nemojax.sharding import MeshConfig

WIDTH = 224
ARCH = uniform(
    vocab_size=1280, dim=64, num_layers=6, num_heads=8, num_kv_heads=4, ffn_width=WIDTH, context=96
)
ROWS, LENGTH = 40, 96
MESH = MeshConfig(fsdp=4, tensor=2)
_ARRAY = re.compile(r"\b(?:f32|bf16|f16|s32|u32|s8|f8\w+)\[([\d,]+)\]")


def programs(step: str, mesh: jax.sharding.Mesh, **training) -> list[Program]:
    settings = Training(loss_chunk=16, **training)
    teacher = ARCH if step == "distill" else None
    return programs_of(Work(ARCH, step, ROWS, LENGTH, teacher, training=settings), mesh)  # pyright: ignore


def compiled_text(program: Program) -> str:
    return program.jitted.lower(*program.arguments, **program.static).compile().as_text()


def arrays(text: str) -> set[tuple[int, ...]]:
    """The shapes of one device's arrays, of any order of dimensions."""
    shapes = (tuple(int(n) for n in dims.split(",")) for dims in _ARRAY.findall(text))
    return {tuple(sorted(n for n in shape if n > 1)) for shape in shapes}


def largest_that_may_be(streams: int) -> int:
    """Of one device: half of the vocabulary in whole rows, and its part of logits and activations."""
    rows = ROWS // 4
    return max(
        ARCH.vocab_size // 2 * ARCH.dim,
        rows * 16 * ARCH.vocab_size // 2,
        rows * LENGTH * max(ARCH.dim, WIDTH),
        rows * ARCH.num_heads // 2 * LENGTH * LENGTH,  # scores of attention, for short rows
        streams * rows * LENGTH // 2 * ARCH.dim,
        ARCH.num_layers * ARCH.dim // 4 * WIDTH // 2,
    )


def whole(shapes: set[tuple[int, ...]], streams: int = ARCH.num_layers) -> set[tuple[int, ...]]:
    """Those that hold more than a device's part. streams: residual streams kept at once, each split over
    tensor too: by default that before each layer, for the backward pass."""
    stacked = ARCH.num_layers * ARCH.dim * WIDTH // 2  # gathered at once, not by layer
    weights = {ARCH.num_layers, ARCH.dim}
    found = {shape for shape in shapes if math.prod(shape) > largest_that_may_be(streams)}
    found |= {s for s in shapes if weights <= set(s) and ROWS // 4 not in s and math.prod(s) >= stacked}
    found |= {s for s in shapes if ARCH.vocab_size in s and math.prod(s) > ARCH.vocab_size}
    return found | {s for s in shapes if ROWS in s and (LENGTH in s or ARCH.dim in s) and len(s) > 2}


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[] if step == "train" else [pytest.mark.slow]) for step in STEPS]
)
def test_nothing_lies_whole_on_a_device(step):
    mesh = plan_mesh(MESH, open_topology("cpu:8"))
    with jax.set_mesh(mesh):
        for program in programs(step, mesh):
            shapes = arrays(compiled_text(program))
            # those that are scored are gathered for the logits, whose vocabulary is split instead
            streams = 2 * score.TOGETHER if step == "score" else ARCH.num_layers
            assert len(shapes) > 10 and not whole(shapes, streams), program.name


def test_what_would_be_whole_is_found():
    """The same step with parameters and moments on every device."""
    mesh = plan_mesh(MESH, open_topology("cpu:8"))
    alone = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        [program] = programs("train", mesh)
        everywhere = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), program.arguments[0]
        )
        step = jax.jit(program.jitted.__wrapped__)
        replicated = dataclasses.replace(program, jitted=step, arguments=(everywhere, *program.arguments[1:]))
        found = whole(arrays(compiled_text(replicated)))
    assert any(ARCH.num_layers in shape for shape in found) and any(ARCH.vocab_size in s for s in found)
