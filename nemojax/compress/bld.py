"""Blockwise local distillation (Puzzle, arXiv 2411.19146, section 3): the training of a library's variants.

Decoupled, an attention variant is trained in front of the parent's frozen feed-forward, a feed-forward
variant behind the parent's attention; coupled, both are variants and trained together. All of them start from
the parent's own activations, and all layers' variants of a kind are stacked and trained by one program from
one parent forward; clipping, step and non-finite handling are per variant, so a stack changes nothing.
Legend: B batch, T tokens, D model, L layers in a stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nemojax.arch import ArchSpec, BlockSpec
from nemojax.checkpoints.artifact import Checkpoints
from nemojax.checkpoints.store import to_host
from nemojax.compress.importance import Importance
from nemojax.compress.space import KvInit, init_sub
from nemojax.compress.subblock import Kind, Part, apply_part, layers_of, sub_of
from nemojax.config import field
from nemojax.hosts import Preempted, Sigterm
from nemojax.losses.hidden import normalised_mse
from nemojax.model.attention import Context
from nemojax.model.block import apply_block, block_axes
from nemojax.model.layout import run_name
from nemojax.model.llama import Compute, batch_context, embed
from nemojax.optim import OptimConfig, make_optimizer
from nemojax.sharding import place_batch, platform, shardings_like, shardings_of, use_mesh

Weights = dict[Part, dict[str, Any]]  # of a variant, or of a stack of them: its parts, their weights
OnStep = Callable[[int, list[np.ndarray]], None]  # (step, losses [L] by kind)


@dataclass(frozen=True)
class Bld:
    """Blockwise local distillation."""

    steps: int = field(64, "training steps for each kind of variant; 0 keeps the first weights")
    tokens: int = field(0, "calibration tokens, padding included, for each kind; 0: `steps` decides")
    coupled: tuple[str, ...] = field(
        (), "blocks trained whole, after their parts: rules such as all:-+* or 0-3:kv1+ffn*"
    )
    together: int = field(0, "kinds trained from one parent forward, and saved together; 0: all of them")
    side_by_side: int = field(0, "variants of a stack in one matmul; 0: one on a CPU, else the whole stack")
    window: int = field(0, "layers of the parent on the devices at once; 0: all of them")
    checkpoint_every: int = field(
        1000, "steps between checkpoints of the variants in training; 0 saves when stopped by SIGTERM only"
    )
    optim: OptimConfig = field(OptimConfig(lr=1e-3, warmup_steps=4, weight_decay=0.0), "its optimiser")

    def __post_init__(self):
        if self.optim.name != "adamw":
            raise ValueError(f"bld.optim.name: expected adamw, got {self.optim.name!r}")
        for name in ("steps", "tokens", "together", "side_by_side", "window", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"bld.{name}: expected at least 0, got {getattr(self, name)}")

    def num_steps(self, batch: Mapping[str, Any] | None) -> int:
        """Steps of the budget; `batch` is the first of the data, this process's rows."""
        if not self.tokens:
            return self.steps
        if batch is None:
            raise ValueError("bld.tokens: expected calibration batches, got none; give more data")
        return math.ceil(self.tokens / (np.size(batch["tokens"]) * jax.process_count()))


def init_kind(
    params: dict,
    arch: ArchSpec,
    kind: Kind,
    importance: Importance,
    kv_init: KvInit = "mean",
    offset: int = 0,
) -> Weights:
    """First weights of all layers' variants of a kind, stacked, f32 numpy; a part of the parent is copied.

    offset: what is added to a layer of `arch` for its number in `importance`.
    """
    variants = [
        {
            part: init_sub(
                part,
                sub_of(kind.parent, part),
                sub_of(kind.block, part),
                p[part],
                importance,
                layer + offset,
                kv_init,
            )
            for part in kind.trained
        }
        for layer, p in layers_of(params, arch, frozenset(kind.layers))
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *variants)


def train(
    params: dict,
    arch: ArchSpec,
    kinds: Sequence[Kind],
    weights: Iterable[Weights],
    batches: Iterator[dict],
    bld: Bld,
    compute: Compute = Compute(),
    *,
    mesh: Mesh | None = None,
    steps: int | None = None,
    before: np.ndarray | None = None,
    saving: Path | None = None,
    on_step: OnStep | None = None,
) -> tuple[list[Weights], list[np.ndarray]]:
    """(trained stacks by kind, loss curves [steps, L] by kind); the stacks stay where they were trained.

    params: the parent's, on the mesh where there is one. batches: packed ones, this process's rows; those
    that are drawn are the next `steps` (default: `bld.steps`). before [steps, B, T, D]: the stream that
    enters the first layer, by batch, in place of embeddings. saving: a folder for the checkpoints of
    `bld.checkpoint_every`; a training that is found there goes on, to the same bits, with `batches` at the
    beginning as before. on_step: told each step's losses, one step late. ValueError for too few batches,
    `Preempted` (exit code 75) after SIGTERM, with everything saved that has a folder to go to.
    """
    steps = bld.steps if steps is None else steps
    if not steps or not kinds:
        return list(weights), [np.zeros((0, len(kind.layers)), np.float32) for kind in kinds]
    with use_mesh(mesh):
        stacks = [place_stack(arch, kind, w, mesh) for kind, w in zip(kinds, weights, strict=True)]
        loop = _Loop(params, arch, tuple(kinds), bld, compute, mesh, steps, before, saving, on_step)
        return loop.run(stacks, batches)


@dataclass
class _Loop:
    params: dict
    arch: ArchSpec
    kinds: tuple[Kind, ...]
    bld: Bld
    compute: Compute
    mesh: Mesh | None
    steps: int
    before: np.ndarray | None
    saving: Path | None
    on_step: OnStep | None

    def run(self, stacks: list[Weights], batches: Any) -> tuple[list[Weights], list[np.ndarray]]:
        tx = make_optimizer(self.bld.optim, self.steps)
        state = [(w, self._init_optimizer(tx, w)) for w in stacks]
        with ExitStack() as held:
            sigterm = held.enter_context(Sigterm())
            saved = None if self.saving is None else Checkpoints(self.saving, keep_last=1)
            if saved is not None:
                held.callback(saved.close)
            first, curves = 0, []
            if saved is not None and (step := saved.latest()) is not None:
                state, curves, batches = self._restore(saved, step, state, batches)
                first = step
            places = self._places(state)
            pending: list[jax.Array] | None = None
            where = "bld.tokens" if self.bld.tokens else "bld.steps"
            for step, batch in enumerate(take(batches, self.steps, where, first), first + 1):
                inputs = batch_inputs(batch, self.before, step - 1, self.mesh)
                state, losses = train_step(
                    self.arch,
                    self.kinds,
                    self.bld.optim,
                    self.steps,
                    self.compute,
                    self.bld.side_by_side,
                    places,
                    state,
                    self.params,
                    inputs,
                )
                # one step late: the host does not wait for the step that it has just started
                self._keep(curves, pending)
                pending = losses
                stop = sigterm.stops_here()
                if saved is not None and self._is_due(step, stop):
                    self._keep(curves, pending)
                    pending = None
                    self._save(saved, step, state, curves, batches)
                if stop:
                    raise Preempted(step)
            self._keep(curves, pending)
        columns = range(len(self.kinds))
        return [w for w, _ in state], [np.stack([losses[i] for losses in curves]) for i in columns]

    def _init_optimizer(self, tx: optax.GradientTransformation, w: Weights) -> Any:
        init = jax.vmap(tx.init)
        places = shardings_like(jax.eval_shape(init, w), w)
        return init(w) if places is None else jax.jit(init, out_shardings=places)(w)

    def _places(self, state: Any) -> tuple[Any, ...] | None:
        """The state stays where it is: left to choose, XLA moves it, and compiles the step once more."""
        on_mesh = self.mesh is not None and self.mesh.size > 1
        return tuple(leaf.sharding for leaf in jax.tree.leaves(state)) if on_mesh else None

    def _keep(self, curves: list[list[np.ndarray]], losses: list[jax.Array] | None) -> None:
        if losses is None:
            return
        curves.append([to_host(loss) for loss in losses])
        if self.on_step is not None:
            self.on_step(len(curves), curves[-1])

    def _is_due(self, step: int, stop: bool) -> bool:
        every = self.bld.checkpoint_every
        return stop or bool(every and step % every == 0 and step < self.steps)

    def _save(self, saved: Checkpoints, step: int, state: Any, curves: list, batches: Any) -> None:
        position = {"batches": batches.state() if hasattr(batches, "state") else None}
        rest = {"opt_state": [o for _, o in state], "curves": _columns(curves)}
        saved.save(step, [w for w, _ in state], rest, position)

    def _restore(self, saved: Checkpoints, step: int, state: Any, batches: Any) -> tuple[Any, list, Any]:
        """The state after `step`, the losses until then, and the batches after those that it has seen."""
        blank = [np.zeros((step, len(kind.layers)), np.float32) for kind in self.kinds]
        stacks = saved.restore_params(step, [w for w, _ in state])
        rest = saved.restore_state(step, {"opt_state": [o for _, o in state], "curves": blank})
        position = (saved.restore_data(step) or {}).get("batches")
        if position is not None:
            batches.restore(position)
        else:
            batches = iter(batches)
            for _ in take(batches, step, "bld: the data of a resumed training"):
                pass
        curves = [[np.asarray(column[i]) for column in rest["curves"]] for i in range(step)]
        return list(zip(stacks, rest["opt_state"], strict=True)), curves, batches


def _columns(curves: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    return [np.stack(column) for column in zip(*curves, strict=True)]


def place_stack(arch: ArchSpec, kind: Kind, weights: Weights, mesh: Mesh | None) -> Weights:
    """A stack of variants on the devices, each weight split as training splits it, the layers kept together.

    ValueError names the variant that the mesh does not divide.
    """
    if mesh is None or mesh.size == 1:
        return jax.tree.map(jnp.asarray, weights)
    axes = block_axes(arch, kind.block)
    stacked = {part: {name: (None, *axes[part][name]) for name in weights[part]} for part in weights}
    places = shardings_of({kind.name: stacked}, {kind.name: weights}, mesh)[kind.name]
    # every process holds the whole of it, and gives its devices their parts
    return jax.tree.map(
        lambda w, place: jax.make_array_from_callback(w.shape, place, lambda index: np.asarray(w)[index]),
        weights,
        places,
    )


def batch_inputs(
    batch: Mapping[str, Any], before: np.ndarray | None, number: int, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """What a program reads of a batch, on the devices: `stream` in place of tokens behind the first layer."""
    inputs = {name: np.asarray(batch[name]) for name in ("tokens", "positions", "segments")}
    if before is not None:
        del inputs["tokens"]
        inputs["stream"] = np.array(before[number])
    return place_batch(inputs, mesh)


def take(batches: Iterable[dict], count: int, where: str, first: int = 0) -> Iterator[dict]:
    """Batches first + 1 ... `count`, from where the iterator stands; ValueError when the data end before."""
    iterator = iter(batches)
    for number in range(first, count):
        batch = next(iterator, None)
        if batch is None:
            raise ValueError(f"{where}: expected {count} calibration batches, got {number}; give more data")
        yield batch


@dataclass(frozen=True)
class Streams:
    """The parent's residual stream around the blocks of one run, each [n, B, T, D]."""

    before: Any
    between: Any
    after: Any


jax.tree_util.register_dataclass(Streams)


def enter(arch: ArchSpec, params: dict, batch: Mapping, compute: Compute) -> tuple[jax.Array, Context]:
    """The stream [B, T, D] before the first layer, and the context of the batch (see `batch_inputs`)."""
    if "stream" not in batch:
        return embed(params, batch["tokens"], compute), batch_context(arch, batch)
    h_BTD = batch["stream"]
    return h_BTD, batch_context(arch, {**batch, "tokens": h_BTD[:, :, 0]})


def parent_streams(
    params: dict, arch: ArchSpec, batch: Mapping, compute: Compute = Compute()
) -> dict[str, Streams]:
    """The stream before, between the halves of, and after every block, by run."""
    h_BTD, ctx = enter(arch, params, batch, compute)
    streams = {}
    for index, run in enumerate(arch.runs()):

        def body(h: jax.Array, p: dict, spec: BlockSpec = run.spec) -> tuple[jax.Array, Streams]:
            seen: dict[str, jax.Array] = {}
            after = apply_block(arch, spec, p, h, ctx, capture=seen)
            return after, Streams(h, seen["between_BTD"], after)

        h_BTD, streams[run_name(index)] = jax.lax.scan(body, h_BTD, params["runs"][run_name(index)])
    return streams


@partial(
    jax.jit,
    static_argnames=("arch", "kinds", "optim", "steps", "compute", "side_by_side", "places"),
    donate_argnames="state",
)
def train_step(
    arch: ArchSpec,
    kinds: tuple[Kind, ...],
    optim: OptimConfig,
    steps: int,
    compute: Compute,
    side_by_side: int,
    places: tuple[Any, ...] | None,
    state: list[tuple[Weights, Any]],
    params: dict,
    batch: dict,
) -> tuple[list[tuple[Weights, Any]], list[jax.Array]]:
    """One step of every variant of every kind from one parent forward; losses [L] by kind."""
    tx = make_optimizer(optim, steps)
    _, ctx = enter(arch, params, batch, compute)
    streams = parent_streams(params, arch, batch, compute)
    out, losses = [], []
    for kind, (weights, opt_state) in zip(kinds, state, strict=True):
        here = _gather(streams, arch, kind.layers)
        frozen = _gather(params["runs"], arch, kind.layers).get("ffn", {}) if kind.part == "attn" else {}
        update = partial(_update_one, arch, kind, tx, ctx)
        weights, opt_state, loss_L = _over_stack(update, side_by_side, (weights, opt_state, frozen, here))
        out.append((weights, opt_state))
        losses.append(loss_L)
    if places is not None:
        leaves = map(jax.lax.with_sharding_constraint, jax.tree.leaves(out), places)
        out = jax.tree.structure(out).unflatten(leaves)
    return out, losses


def _over_stack(fn: Callable[..., Any], side_by_side: int, stacks: tuple) -> Any:
    """fn over the leading axis. A CPU is faster at one plain matmul after another than at batched ones."""
    count = side_by_side or (1 if platform() == "cpu" else jax.tree.leaves(stacks)[0].shape[0])
    return jax.lax.map(lambda one: fn(*one), stacks, batch_size=count if count > 1 else None)


def _update_one(
    arch: ArchSpec,
    kind: Kind,
    tx: optax.GradientTransformation,
    ctx: Context,
    weights: Weights,
    opt_state: Any,
    frozen: dict,
    here: Streams,
) -> tuple[Weights, Any, jax.Array]:
    """One step of one variant; a non-finite loss or gradient leaves this variant as it was."""
    block = kind.block

    def loss_of(w: Weights) -> jax.Array:
        mid_BTD = here.between
        if kind.part != "ffn":
            mid_BTD = apply_part(arch, "attn", block.attn, w.get("attn", {}), here.before, ctx)
        out_BTD = apply_part(arch, "ffn", block.ffn, w.get("ffn", frozen), mid_BTD, ctx)
        return normalised_mse(out_BTD, here.after, (ctx.segments_BT > 0).astype(jnp.float32))

    loss, grads = jax.value_and_grad(loss_of)(weights)
    updates, new_state = tx.update(grads, opt_state, weights)
    new_weights = optax.apply_updates(weights, updates)
    fine = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    keep = partial(jax.tree.map, lambda new, old: jnp.where(fine, new, old))
    return keep(new_weights, weights), keep(new_state, opt_state), loss


def _gather(runs: dict[str, Any], arch: ArchSpec, layers: tuple[int, ...]) -> Any:
    """Stacks of these layers out of stacks by run, layers ascending and of equal blocks."""
    pieces = []
    for index, run in enumerate(arch.runs()):
        inside = [i for i, layer in enumerate(run.layers) if layer in layers]
        if not inside:
            continue
        whole = runs[run_name(index)]
        full = len(inside) == len(run.layers)
        pieces.append(whole if full else jax.tree.map(lambda w, i=tuple(inside): w[jnp.array(i)], whole))
    if len(pieces) == 1:
        return pieces[0]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
