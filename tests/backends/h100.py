"""Compiles steps in FP8 for H100s that are not there, and prints what their programs call, as JSON.

    NEMOJAX_CUDA_PLUGINS=DIR python -m tests.backends.h100

A process of its own, because plugin and compiler flags are read when jax starts.
"""

import contextlib
import itertools
import json
import math
import re
from typing import Any

from tests.benchmarks.vocab_loss import prepare

F8 = "__cublas$lt$matmul$f8"


def calls(text: str) -> list[list[str]]:
    """(target, result and operand types...) of every library call of a program."""
    types = dict(re.findall(r"%([\w.-]+) = \(?([a-z0-9]+)\[", text))
    found = []
    for line in text.splitlines():
        if target := re.search(r'custom_call_target="([^"]+)"', line):
            result = re.search(r"%([\w.-]+) = ", line)
            operands = re.search(r"custom-call\(([^)]*)\)", line)
            assert result and operands
            names = [result[1], *re.findall(r"%([\w.-]+)", operands[1])]
            found.append([target[1], *(types.get(name, "?") for name in names)])
    return found


def gathered(text: str) -> list[str]:
    """The types of the matrices that all-gathers bring together, of which one may have several."""
    found = []
    for result, start in re.findall(r"%all-gather[\w.-]* = (.+?) all-gather(-start)?\(", text):
        types = re.findall(r"([a-z]\w*)\[\d+,", result)
        found += types[len(types) // 2 :] if start else types  # what starts one names operands first
    return found


def summed(text: str) -> list[tuple[str, int]]:
    """(type, numbers) of what all-reduces sum up for every device, of which one may have several arrays."""
    results = re.findall(r"%all-reduce[\w.-]* = (.+?) all-reduce(?:-start)?\(", text)
    arrays = [array for result in results for array in re.findall(r"([a-z]\w*)\[([\d,]*)\]", result)]
    return [(kind, math.prod(int(n) for n in dims.split(",") if n)) for kind, dims in arrays]


def layers_that_stand_alone() -> dict[str, float]:
    """Temporaries of a training step whose layers all differ, as it is and with backward passes left free."""
    from unittest import mock

    from nemojax.arch import ArchSpec, Attention, BlockSpec, NoOp, SwiGLU
    from nemojax.backends.topology import open_topology
    from nemojax.model import llama
    from nemojax.plan.planner import make_plan
    from nemojax.plan.programs import Work
    from nemojax.sharding import MeshConfig

    both = (BlockSpec(Attention(2), SwiGLU(1024)), BlockSpec(NoOp(), SwiGLU(1536)))
    arch = ArchSpec(vocab_size=512, dim=512, num_heads=4, head_dim=128, context=2048, blocks=both * 6)

    def temporaries() -> float:
        work = Work(arch, "train", 2, 2048)
        [part] = make_plan(work, open_topology("h100:4"), MeshConfig(fsdp=2, tensor=2)).parts
        return part.compiled.temporaries

    held = temporaries()
    with mock.patch.object(llama, "_one_at_a_time", lambda body, axes: body):
        return {"held": held, "free": temporaries()}


def train_program(arch: Any, compute: Any, place: Any, rows: tuple[int, int], **options: bool | str) -> str:
    """A training step over batches of so many rows and tokens, compiled for where `place` puts arrays."""
    import jax
    import jax.numpy as jnp

    from nemojax.model import llama
    from nemojax.optim import OptimConfig, make_optimizer
    from nemojax.train import TrainState, lm_loss, make_step

    tx = make_optimizer(OptimConfig(), 100)

    def init():
        params = llama.init_params(arch, jax.random.key(0))
        return TrainState(jnp.int32(0), params, tx.init(params), None, jax.random.key(0), jnp.int32(0))

    names = ("tokens", "targets", "segments", "positions")
    batch = {name: jax.ShapeDtypeStruct(rows, jnp.int32) for name in names}
    batch = place(batch | {"weights": jax.ShapeDtypeStruct(rows, jnp.float32)})
    step = jax.jit(make_step(lm_loss(arch, compute), tx), donate_argnums=0)
    lowered = step.lower(place(jax.eval_shape(init)), None, batch)
    return lowered.compile(compiler_options=options or None).as_text() or ""


def layers_in_a_loop(place: Any) -> str:
    """A training step of eight layers as wide as those of 8B, which keeps their products."""
    from nemojax.arch import uniform
    from nemojax.backends.gpu import COMPILER_OPTIONS
    from nemojax.model.llama import Compute

    shape: dict[str, Any] = {"dim": 4096, "num_heads": 32, "num_kv_heads": 8, "ffn_width": 14336}
    arch = uniform(vocab_size=512, **shape, num_layers=8, context=512)
    return train_program(arch, Compute("bfloat16", remat="dots"), place, (8, 512), **COMPILER_OPTIONS)


def cache_kernels(place: Any) -> list[str]:
    """For which heads, caches and numbers of new tokens the kernel over a cache can be compiled."""
    import jax
    import jax.numpy as jnp

    from nemojax.backends.cached import Slots, attend_slots

    def attend(q: Any, positions: Any, *slots: Any) -> Any:
        return attend_slots(q, positions, Slots(*slots), keys=1024)

    found = []
    for head_dim, dtype, tokens in itertools.product((64, 128, 256), ("bfloat16", "int8"), (1, 64)):
        numbers = jax.ShapeDtypeStruct((2, 4, 8, 1024, head_dim), jnp.dtype(dtype))
        scales = None if dtype == "bfloat16" else jax.ShapeDtypeStruct((2, 4, 8, 1024), jnp.float32)
        q = jax.ShapeDtypeStruct((4, tokens, 32, head_dim), jnp.bfloat16)
        positions, layer, slots = (jax.ShapeDtypeStruct(n, jnp.int32) for n in ((4, tokens), (), (4,)))
        lowered = jax.jit(attend).lower(
            *place((q, positions, numbers, numbers, scales, scales, layer, slots))
        )
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            lowered.compile()
            found.append(f"{head_dim} {dtype} {tokens}")
    return found


def decoding(rows: int, capacity: int = 2048) -> dict[str, Any]:
    """A decoding step of four layers of 8B on one device, layers apart as an engine there has them: its
    calls, temporaries, and the bytes of a matrix of a feed-forward."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nemojax.arch import uniform
    from nemojax.backends.topology import open_topology
    from nemojax.generate import programs
    from nemojax.generate.sampling import SamplingConfig
    from nemojax.model import llama
    from nemojax.model.cache import init_cache
    from nemojax.model.layout import split_layers
    from nemojax.sharding import MeshConfig, make_mesh

    shape: dict[str, Any] = {
        "vocab_size": 128256,
        "dim": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "ffn_width": 14336,
    }
    arch = uniform(**shape, num_layers=4, context=capacity)
    mesh = make_mesh(MeshConfig(), open_topology("h100:1").devices[:1])
    place = jax.NamedSharding(mesh, jax.P())

    def on_one(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    weights = on_one(jax.eval_shape(split_layers, llama.abstract_params(arch, jnp.bfloat16)))
    cache = on_one(jax.eval_shape(lambda: init_cache(arch, rows, capacity, jnp.dtype("bfloat16"), True)))
    asked = programs.pack([(5, 16, 8, SamplingConfig(), (0, i), ()) for i in range(rows)], 2)
    how = programs.How(arch, llama.Compute("bfloat16"), steps=8)
    arguments = (weights, programs.State(cache, None), asked, np.int32(8), np.int32(0))
    with jax.set_mesh(mesh):
        compiled = programs.decode.lower(*arguments, how=how, keys=capacity).compile()
    memory: Any = compiled.memory_analysis()
    matrix = 2 * shape["dim"] * shape["ffn_width"]
    return {
        "calls": calls(compiled.as_text()),
        "temporaries": memory.temp_size_in_bytes,
        "matrix": matrix,
    }


def main() -> None:
    prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, SwiGLU
    from nemojax.backends.topology import open_topology
    from nemojax.generate import programs
    from nemojax.generate.sampling import SamplingConfig
    from nemojax.model import llama
    from nemojax.model.cache import init_cache
    from nemojax.sharding import BATCH_AXES, MeshConfig, make_mesh
    from nemojax.train import lm_loss
    from tests.backends.test_tpu_compile import abstract, abstract_batch

    chips = open_topology("h100:4")
    one = jax.sharding.SingleDeviceSharding(chips.devices[0])
    blocks = (
        *(BlockSpec(Attention(4), SwiGLU(512)),) * 2,
        BlockSpec(Linear(), SwiGLU(256)),
        BlockSpec(Attention(2), Linear()),
    )
    arch = ArchSpec(vocab_size=512, dim=256, num_heads=4, head_dim=64, context=256, blocks=blocks)

    def on_one(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)

    programs_of = {}
    ways: Any = (("default", "none"), ("fp8", "none"), ("fp8", "full"))
    for kind, remat in ways:
        compute = llama.Compute("bfloat16", remat=remat, matmul=kind)
        programs_of[f"train {kind} {remat}"] = train_program(arch, compute, on_one, (4, 128))
    programs_of["loop"] = layers_in_a_loop(on_one)

    compute = llama.Compute("bfloat16", matmul="fp8")
    kept = on_one(jax.eval_shape(llama.quantize, llama.abstract_params(arch, jnp.bfloat16)))
    cache = on_one(jax.eval_shape(lambda: init_cache(arch, 16, 256, jnp.dtype("bfloat16"))))
    rows = programs.pack([(5, 16, 8, SamplingConfig(), (0, i), ()) for i in range(16)], 2)
    how = programs.How(arch, compute, steps=8)
    decode = programs.decode.lower(
        kept, programs.State(cache, None), rows, np.int32(8), np.int32(0), how=how, keys=256
    ).compile()
    programs_of["decode"] = decode.as_text()

    # without attention, whose kernel is another matter; parameters over two devices, heads over two
    plain = arch.replace(blocks=(BlockSpec(Linear(), SwiGLU(512)),) * 2)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), chips.devices)
    places = llama.param_shardings(plain, mesh)
    weights = abstract(llama.abstract_params(plain), places)
    words = abstract_batch(mesh, 4, 128, BATCH_AXES, None)
    loss = lm_loss(plain, llama.Compute("bfloat16", matmul="fp8"))
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(lambda p, b: loss(p, None, b, jax.random.key(0))[0]), out_shardings=places)
        programs_of["sharded"] = grad.lower(weights, words).compile().as_text()

    # the embedding of one token, whose table is split over all four
    mesh = make_mesh(MeshConfig(tensor=4), chips.devices)
    table = {"embed": {"weight": jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)}}
    table = abstract(table, {"embed": {"weight": jax.NamedSharding(mesh, jax.P("tensor"))}})
    token = abstract(jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        programs_of["one token"] = jax.jit(llama.embed).lower(table, token).compile().as_text()

    report = {
        name: {"calls": calls(text), "gathered": gathered(text), "summed": summed(text)}
        for name, text in programs_of.items()
    }
    memory: Any = decode.memory_analysis()
    for name, tree in {"weights": kept, "cache": cache}.items():
        report["decode"][name] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    report["decode"]["arguments"] = memory.argument_size_in_bytes
    report["decode"]["temporaries"] = memory.temp_size_in_bytes
    report |= {f"decoding {rows}": decoding(rows) for rows in (1, 64)}
    report["cache kernels"] = {"compiled": cache_kernels(on_one)}
    report["layers that stand alone"] = layers_that_stand_alone()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
