"""The programs that a step runs, with abstract arguments: the very functions of the stages, and no weights.

Shape letters: B rows or slots, T tokens of a row, D model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as data_field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemojax.arch import ArchSpec, SwiGLU
from nemojax.backends.chips import chip_of
from nemojax.backends.roofline import Load, blocks_load, head_load, outer_load, training_load
from nemojax.backends.startup import GPU_MEMORY
from nemojax.backends.topology import bytes_on_device
from nemojax.checkpoints.training import TrainState
from nemojax.compress import bld, measures, score
from nemojax.compress.subblock import Kind
from nemojax.config import field, required
from nemojax.distill.losses import DistillWeights, Teacher, distill_loss
from nemojax.generate import programs
from nemojax.generate.sampling import SamplingConfig
from nemojax.losses.policy import PolicyLossConfig
from nemojax.model import llama
from nemojax.model.block import block_axes, init_block
from nemojax.model.cache import init_cache
from nemojax.model.layout import run_name, split_layers
from nemojax.model.llama import Compute, Remat
from nemojax.optim import OptimConfig, make_optimizer
from nemojax.plan.loads import Shares, optimiser_load
from nemojax.rl.loss import grpo_loss
from nemojax.sharding import (
    BATCH_AXES,
    HOST_MEMORY,
    RULES,
    MeshConfig,
    make_mesh,
    shardings_like,
    shardings_of,
    spec_of,
)
from nemojax.train import LossFn, lm_loss, make_step

Step = Literal["train", "distill", "generate", "rl", "bld", "score"]
STEPS: tuple[Step, ...] = ("train", "distill", "generate", "rl", "bld", "score")
Dtype = Literal["bf16", "fp8", "f32"]
PREFILL_TOKENS = 512  # of all prompts that the engine reads at once


@dataclass(frozen=True)
class Training:
    """What else a step that trains is decided by."""

    weights: Literal["float32", "bfloat16"] = field("float32", "dtype of trained weights and moments")
    remat: Remat = field("full", "recomputed in the backward pass")
    accumulate: int = field(1, "micro-batches a step")
    loss_chunk: int = field(1024, "positions of a row whose logits exist at once; 0: all")
    terms: tuple[str, ...] = field(("kl", "cosine"), "terms of a distillation's loss, each of weight 1")
    optimizer: Literal["adamw", "muon"] = field("adamw", "optimiser")
    zero1: bool = field(False, "moments are split over the data axis too")
    offload: bool = field(False, "moments lie in host memory")


@dataclass(frozen=True)
class Work:
    """A step on an architecture, over all devices."""

    arch: ArchSpec = required("what is trained or asked")
    step: Step = required(", ".join(STEPS))
    batch: int = required("rows of a step, or sequences generated together")
    context: int = required("tokens of a row, or room for prompt and answer")
    teacher: ArchSpec | None = field(None, "of a distillation")
    dtype: Dtype = field("bf16", "of activations and products")
    training: Training = field(Training(), "of the steps that train")
    answers: int = field(0, "rl: sequences sampled together; 0: `batch`")
    generated: int = field(0, "rl: tokens of an answer; 0: half of `context`")

    def __post_init__(self):
        for name in ("batch", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for arch in filter(None, (self.arch, self.teacher)):
            if self.context > arch.context:
                raise ValueError(f"context: expected at most the model's {arch.context}, got {self.context}")
        if self.step == "distill" and self.teacher is None:
            raise ValueError("teacher: expected the architecture of a teacher for distill, got none")
        if self.batch % self.training.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of the batch {self.batch}, got {self.training.accumulate}"
            )

    @property
    def compute(self) -> Compute:
        """How the stages would compute it."""
        dtype = "float32" if self.dtype == "f32" else "bfloat16"
        remat = self.training.remat if self.step in ("train", "distill", "rl") else "none"
        more: dict[str, Any] = {"matmul": "fp8"} if self.dtype == "fp8" else {}
        return Compute(dtype=dtype, remat=remat, **more)


@dataclass(frozen=True)
class Program:
    """One compiled program of a step. `load`: of one device; `model_flops`: of all, nothing counted twice;
    `tokens`: that it gets done; `times`: runs in a step. `held`: {what: arrays} of its arguments, `beside`:
    what else the devices hold while it runs. `mesh`: where that is another than the plan's."""

    name: str
    jitted: Any
    arguments: tuple[Any, ...]
    load: Load
    model_flops: float
    tokens: int
    times: float = 1.0
    static: Mapping[str, Any] = data_field(default_factory=dict)
    held: Mapping[str, Any] = data_field(default_factory=dict)
    beside: Mapping[str, Any] = data_field(default_factory=dict)
    mesh: Mesh | None = None


def programs_of(work: Work, mesh: Mesh) -> list[Program]:
    """What the devices of the mesh run in one step, what weighs most first; with the mesh in scope.

    ValueError for a mesh that does not divide the model or the batch.
    """
    make: Callable[[Work, Mesh], list[Program]] = {
        "train": _train,
        "distill": _distill,
        "generate": _generate,
        "rl": _rl,
        "bld": _bld,
        "score": _score,
    }[work.step]
    return make(work, mesh)


def abstract_params(arch: ArchSpec, mesh: Mesh, dtype: Any) -> Any:
    """Shapes, dtypes and places of a model's parameters."""
    return _placed(llama.abstract_params(arch, jnp.dtype(dtype)), llama.param_shardings(arch, mesh))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _over(mesh: Mesh, tree: Any, *logical: str | None) -> Any:
    """Every array of a tree with the same logical axes; what does not divide is not split."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        names = (*logical, *[None] * (len(x.shape) - len(logical)))
        spec = spec_of(x.shape, *names[: len(x.shape)])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def _rows(work: Work, mesh: Mesh, names: Mapping[str, Any]) -> dict[str, Any]:
    """A packed batch, placed as `place_batch` does."""
    rows, ways = work.batch, 1
    for axis in BATCH_AXES:
        ways *= mesh.shape[axis]
    if rows % (ways * work.training.accumulate):
        raise ValueError(
            f"batch: expected a multiple of {ways} devices that share the rows"
            + (f" x {work.training.accumulate} micro-batches" if work.training.accumulate > 1 else "")
            + f", got {rows}; choose another batch or mesh"
        )
    place = NamedSharding(mesh, PartitionSpec(BATCH_AXES, RULES["length"]))
    shape = (rows, work.context)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in names.items()}


TEXT = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {"weights": jnp.float32}


def _trained(
    work: Work, mesh: Mesh, loss: LossFn, frozen: Any, batch: Any, held: Mapping[str, Any]
) -> Program:
    t = work.training
    everywhere = NamedSharding(mesh, PartitionSpec())
    if t.offload and everywhere.with_memory_kind(HOST_MEMORY).memory_kind != HOST_MEMORY:
        raise ValueError(
            "offload: expected devices whose host memory jax knows; of GPUs that are not at hand it knows "
            "none, so plan without it: the moments then count as theirs"
        )
    tx = make_optimizer(OptimConfig(name=t.optimizer), 1000)
    params = abstract_params(work.arch, mesh, t.weights)
    moments = jax.eval_shape(tx.init, params)
    moments = _placed(moments, shardings_like(moments, params, over_data=t.zero1, on_host=t.offload))
    count, key = _over(mesh, (jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(jax.random.key, 0)))
    state = TrainState(count, params, moments, None, key, count)
    places = jax.tree.map(lambda x: x.sharding, state)
    places = places if mesh.size > 1 or t.offload else None
    step = jax.jit(
        make_step(loss, tx, t.accumulate, places=places), donate_argnums=0, out_shardings=(places, None)
    )
    passes = Shares.of(mesh).training(
        work.arch, work.batch, work.context, remat=t.remat in ("full", "offload"), accumulate=t.accumulate
    )
    return Program(
        "training step",
        step,
        (state, frozen, batch),
        passes + optimiser_load(params, moments),
        training_load(work.arch, work.batch, work.context, remat=False).flops,
        work.batch * work.context,
        held={"parameters": params, "optimiser": moments, **held, "batch": batch},
    )


def _train(work: Work, mesh: Mesh) -> list[Program]:
    loss = lm_loss(work.arch, work.compute, chunk=work.training.loss_chunk)
    return [_trained(work, mesh, loss, None, _rows(work, mesh, TEXT), {})]


def _distill(work: Work, mesh: Mesh) -> list[Program]:
    assert work.teacher is not None
    weights = DistillWeights(
        **{"kl": 0.0, "cosine": 0.0} | {term: 1.0 for term in work.training.terms}  # pyright: ignore
    )
    compute = replace(work.compute, remat="none", matmul="default")
    teacher = Teacher(work.teacher, compute=compute)
    loss = distill_loss(work.arch, [teacher], weights, work.compute, work.training.loss_chunk)
    frozen = abstract_params(work.teacher, mesh, compute.dtype)
    step = _trained(work, mesh, loss, frozen, _rows(work, mesh, TEXT), {"teacher": frozen})
    theirs = Shares.of(mesh).forward(work.teacher, work.batch, work.context)
    flops = step.model_flops + training_load(work.teacher, work.batch, work.context, remat=False).flops / 3
    return [replace(step, name="distillation step", load=step.load + theirs, model_flops=flops)]


def _generate(work: Work, mesh: Mesh) -> list[Program]:
    return _generation(work, mesh, work.batch, {}, work.context - 1)


def _generation(
    work: Work, mesh: Mesh, slots: int, beside: Mapping[str, Any], cached: float
) -> list[Program]:
    """One token for every slot behind `cached` ones, and a chunk of a prompt read into an empty slot."""
    arch, compute, shares = work.arch, work.compute, Shares.of(mesh)
    weights = abstract_params(work.arch, mesh, compute.dtype)
    if compute.matmul == "fp8":
        places = llama.quantized_shardings(jax.tree.map(lambda w: w.sharding, weights))
        weights = _placed(jax.eval_shape(llama.quantize, weights), places)
    device = mesh.devices.flat[0]
    room = chip.hbm_bytes * GPU_MEMORY if (chip := chip_of(device)) else math.inf
    twice = bytes_on_device((weights, weights["runs"], beside)) <= room
    split = mesh.size == 1 and programs.splits(device.platform, twice)
    if split:
        [weights] = _over(mesh, (jax.eval_shape(split_layers, weights),))
    dtype = jnp.dtype(compute.dtype)
    cache = jax.eval_shape(partial(init_cache, work.arch, slots, work.context, dtype, split))
    cache = _over(mesh, cache, *[None] * (not split), "batch", "kv_heads")
    state, how = programs.State(cache, None), programs.How(work.arch, replace(compute, remat="none"), steps=8)
    one = (5, work.context - 1, 1, SamplingConfig(), (0, 0), ())
    rows = programs.pack([one] * slots, 2)
    chunk = min(PREFILL_TOKENS, work.context)
    prompts = programs.Chunk(np.zeros((1, chunk), np.int32), *(np.zeros(1, np.int32) for _ in range(3)))
    held, static = {"parameters": weights, "cache": cache}, {"how": how, "keys": work.context}
    decode = (weights, state, rows, np.int32(8), np.int32(0))
    one_byte = work.dtype == "fp8"
    of_step = shares.generation(arch, slots, 1, cached, 1 if one_byte else 2)
    of_chunk = shares.generation(arch, 1, chunk, 0, 1 if one_byte else 2)
    step_flops, chunk_flops = (
        blocks_load(arch, batch=n, tokens=t, cached=c).flops + outer_load(arch, batch=n, tokens=t).flops
        for n, t, c in ((slots, 1, cached), (1, chunk, 0))
    )
    prefill = (weights, state, prompts, None)
    return [
        Program(
            "decoding step", programs.decode, decode, of_step, step_flops, slots, 1.0, static, held, beside
        ),
        Program("prefill", programs.extend, prefill, of_chunk, chunk_flops, chunk, 0.0, static, held, beside),
    ]


def _rl(work: Work, mesh: Mesh) -> list[Program]:
    """A policy step, and the rollout before it, beside which are the trained weights and their optimiser.

    Each host generates its share of the answers with all the weights on its own devices.
    """
    loss = grpo_loss(work.arch, PolicyLossConfig(), compute=work.compute, chunk=work.training.loss_chunk)
    names = TEXT | dict.fromkeys(("sampler_logps", "advantages"), jnp.float32)
    step = replace(_trained(work, mesh, loss, None, _rows(work, mesh, names), {}), name="policy step")
    beside = {"trained weights": step.held["parameters"], "optimiser": step.held["optimiser"]}
    written, answers = work.generated or work.context // 2, work.answers or work.batch
    hosts = len({device.process_index for device in mesh.devices.flat})
    first = [d for d in mesh.devices.flat if d.process_index == mesh.devices.flat[0].process_index]
    here = make_mesh(MeshConfig(tensor=mesh.shape["tensor"]), first, rows="none") if hosts > 1 else mesh
    with jax.set_mesh(here):
        rollout = _generation(work, here, -(-answers // hosts), beside, work.context - written / 2)
    decode, prefill = (
        replace(p, mesh=here, tokens=p.tokens * hosts, model_flops=p.model_flops * hosts) for p in rollout
    )
    return [step, replace(decode, times=float(written)), prefill]


def _bld(work: Work, mesh: Mesh) -> list[Program]:
    """Feed-forwards of half the width for all layers of the commonest block, trained together."""
    block = max(work.arch.runs(), key=lambda run: len(run.layers)).spec
    if not isinstance(block.ffn, SwiGLU):
        raise ValueError(
            "arch: expected a commonest block with a feed-forward to train variants of, got none"
        )
    layers = tuple(i for i, spec in enumerate(work.arch.blocks) if spec == block)
    kind = Kind("ffn", block, SwiGLU(max(1, block.ffn.width // 2)), layers)
    optim = OptimConfig(weight_decay=0.0)
    tx = make_optimizer(optim, 1000)
    params = abstract_params(work.arch, mesh, work.compute.dtype)
    one = jax.eval_shape(lambda: init_block(work.arch, kind.block, jax.random.key(0)))["ffn"]
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(layers), *x.shape), jnp.float32), one)
    axes = {name: (None, *a) for name, a in block_axes(work.arch, kind.block)["ffn"].items()}
    weights = {"ffn": _placed(stack, shardings_of(axes, stack, mesh))}
    moments = jax.eval_shape(jax.vmap(tx.init), weights)
    moments = _placed(moments, shardings_like(moments, weights))
    state = [(weights, moments)]
    places = tuple(leaf.sharding for leaf in jax.tree.leaves(state))
    batch = _rows(work, mesh, dict.fromkeys(("tokens", "positions", "segments"), jnp.int32))
    static = (work.arch, (kind,), optim, 1000, work.compute, 0, places)
    held = {"parameters": params, "variants": weights, "optimiser": moments, "batch": batch}
    shares, whole = Shares.of(mesh), (work.batch, work.context)
    trained = work.arch.replace(blocks=(kind.block,) * len(layers))
    passes = shares.forward(work.arch, *whole, head=False) + shares.forward(trained, *whole, head=False) * 3
    counted = (blocks_load(a, batch=work.batch, tokens=work.context).flops for a in (work.arch, trained))
    return [
        Program(
            "training step of variants",
            bld.train_step,
            (*static, state, params, batch),
            passes + optimiser_load(weights, moments),
            sum(flops * times for flops, times in zip(counted, (1, 3), strict=True)),
            math.prod(whole),
            held=held,
        )
    ]


def _score(work: Work, mesh: Mesh) -> list[Program]:
    """What is behind a replacement: the parent's longest run, and the measures of several finals at once."""
    arch, dtype = work.arch, work.compute.dtype
    params = abstract_params(arch, mesh, dtype)
    shape = jax.ShapeDtypeStruct((work.batch, work.context, arch.dim), jnp.dtype(dtype))
    h_BTD = _over(mesh, shape, "batch", "length")
    batch = _rows(work, mesh, TEXT)
    index = max(range(len(arch.runs())), key=lambda i: len(arch.runs()[i].layers))
    spec, others = arch.runs()[index].spec, dict(params["runs"])
    stacked = others.pop(run_name(index))
    suffix = (arch, spec, stacked, h_BTD, np.int32(0), batch["positions"], batch["segments"])
    outer = {name: tree for name, tree in params.items() if name != "runs"}
    finals = (h_BTD,) * score.TOGETHER
    answers = {name: batch[name] for name in ("targets", "weights", "segments")}
    measured = (arch, ("kl",), work.training.loss_chunk, outer, finals, h_BTD, answers)
    # of every calibration batch the stream before the layer and the parent's last one stay; here of one
    kept = {"streams": [h_BTD, h_BTD]}
    behind = {"other parameters": {"runs": others, **outer}, **kept}
    shares, whole = Shares.of(mesh), (work.batch, work.context)
    run = arch.replace(blocks=(spec,) * len(arch.runs()[index].layers))
    flops = blocks_load(run, batch=work.batch, tokens=work.context).flops
    # the parent's logits are made once for the finals that are measured together
    positions = math.prod(whole) * (score.TOGETHER + 1)
    of_head = head_load(arch, positions) * (1 / math.prod(mesh.shape.values()))
    return [
        Program(
            "layers behind",
            score.suffix,
            suffix,
            shares.forward(run, *whole, head=False) * 0.5,
            flops / 2,
            math.prod(whole),
            held={"parameters": stacked},
            beside=behind,
        ),
        Program(
            "measures",
            measures.sums_of,
            measured,
            of_head,
            head_load(arch, positions).flops,
            math.prod(whole),
            1 / score.TOGETHER,
            held={"embedding and head": outer},
            beside={"other parameters": params["runs"], **kept},
        ),
    ]
