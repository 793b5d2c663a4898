"""The library: every sub-block a layer may become, trained to do what the parent's did there.

Blockwise local distillation (Puzzle, arXiv 2411.19146, section 3), decoupled: an attention variant is trained
in front of the parent's frozen feed-forward, a feed-forward variant behind the parent's attention, from the
parent's own activations. All layers' variants of a kind are stacked and trained by one program from one
parent forward; clipping, step and non-finite handling are per variant, so a stack changes nothing.
Legend: B batch, T tokens, D model, L layers in a stack.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nemojax.arch import ArchSpec, BlockSpec, NoOp
from nemojax.compress.importance import Importance
from nemojax.compress.space import KvInit, init_sub
from nemojax.compress.subblock import PARTS, Part, Sub, apply_part, kind_name, layers_of, sub_of
from nemojax.config import field
from nemojax.losses.hidden import normalised_mse
from nemojax.model.attention import Context
from nemojax.model.block import apply_block
from nemojax.model.layout import run_name
from nemojax.model.llama import Compute, batch_context, embed
from nemojax.optim import OptimConfig, make_optimizer


@dataclass(frozen=True)
class Bld:
    """Blockwise local distillation."""

    steps: int = field(64, "training steps for each kind of variant; 0 keeps the first weights")
    together: int = field(0, "kinds trained from one parent forward, and saved together; 0: all of them")
    side_by_side: int = field(0, "variants of a stack in one matmul; 0: one on a CPU, else the whole stack")
    optim: OptimConfig = field(OptimConfig(lr=1e-3, warmup_steps=4, weight_decay=0.0), "its optimiser")

    def __post_init__(self):
        if self.optim.name != "adamw":
            raise ValueError(f"bld.optim.name: expected adamw, got {self.optim.name!r}")


@dataclass(frozen=True)
class Kind:
    """The same replacement in several layers whose parents' blocks are equal."""

    part: Part
    parent: BlockSpec
    child: Sub
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        return kind_name(self.part, self.child)


class Library:
    """Variants on disk, one file each: `<kind>/<layer>.npz` with the sub-block's weights and loss `curve`."""

    def __init__(self, dir: str | os.PathLike):
        self.dir = Path(dir)

    def path(self, part: Part, sub: Sub, layer: int) -> Path:
        return self.dir / kind_name(part, sub) / f"{layer:03d}.npz"

    def has(self, kind: Kind) -> bool:
        return all(self.path(kind.part, kind.child, layer).is_file() for layer in kind.layers)

    def save(self, part: Part, sub: Sub, layer: int, weights: dict, curve: np.ndarray) -> None:
        path = self.path(part, sub, layer)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial")
        with open(partial_path, "wb") as file:
            np.savez(file, curve=curve, **weights)
        os.replace(partial_path, path)

    def load(self, part: Part, sub: Sub, layer: int) -> dict[str, np.ndarray]:
        """Weights of one variant, f32; {} for a no-op. ValueError when it is missing."""
        if isinstance(sub, NoOp):
            return {}
        return {k: v for k, v in self._read(part, sub, layer).items() if k != "curve"}

    def curve(self, part: Part, sub: Sub, layer: int) -> np.ndarray:
        """Normalised MSE of one variant by training step."""
        return self._read(part, sub, layer)["curve"]

    def _read(self, part: Part, sub: Sub, layer: int) -> dict[str, np.ndarray]:
        path = self.path(part, sub, layer)
        if not path.is_file():
            raise ValueError(f"{path}: no such variant; build the library for this space first")
        try:
            with np.load(path) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete it and run again to rebuild it") from error


def kinds_of(choices: Sequence[Sequence[BlockSpec]], arch: ArchSpec) -> tuple[Kind, ...]:
    """Every replacement that has weights, with the layers that may use it."""
    found: dict[tuple[Part, BlockSpec, Sub], list[int]] = {}
    for layer, options in enumerate(choices):
        parent = arch.blocks[layer]
        for part in PARTS:
            for sub in dict.fromkeys(sub_of(option, part) for option in options):
                if sub != sub_of(parent, part) and not isinstance(sub, NoOp):
                    found.setdefault((part, parent, sub), []).append(layer)
    return tuple(Kind(*key, tuple(layers)) for key, layers in found.items())


def build(
    params: dict,
    arch: ArchSpec,
    kinds: Sequence[Kind],
    importance: Importance,
    batches: Callable[[], Iterator[dict]],
    bld: Bld,
    dir: str | os.PathLike,
    *,
    kv_init: KvInit = "mean",
    compute: Compute = Compute(),
) -> Library:
    """Trains the kinds that `dir` lacks and saves them, `bld.together` of them at a time.

    A restart redoes the groups that are not whole. Groups follow from `kinds` alone, not from what is on
    disk, so that a run killed in the middle of a save trains the same program again, to the same bits.
    `batches()` starts the calibration data from the beginning: every kind sees the same tokens.
    """
    library = Library(dir)
    group = bld.together or max(len(kinds), 1)
    for first in range(0, len(kinds), group):
        some = kinds[first : first + group]
        if all(library.has(kind) for kind in some):
            continue
        weights = [init_kind(params, arch, kind, importance, kv_init) for kind in some]
        weights, curves = train(params, arch, some, weights, batches(), bld, compute)
        for kind, stacked, curve in zip(some, weights, curves, strict=True):
            for i, layer in enumerate(kind.layers):
                one = {name: w[i] for name, w in stacked.items()}
                library.save(kind.part, kind.child, layer, one, curve[:, i])
    return library


def init_kind(params: dict, arch: ArchSpec, kind: Kind, importance: Importance, kv_init: KvInit) -> dict:
    """First weights of all layers' variants of a kind, stacked, f32 numpy."""
    parent = sub_of(kind.parent, kind.part)
    variants = [
        init_sub(kind.part, parent, kind.child, p[kind.part], importance, layer, kv_init)
        for layer, p in layers_of(params, arch)
        if layer in kind.layers
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *variants)


def train(
    params: dict,
    arch: ArchSpec,
    kinds: Sequence[Kind],
    weights: Sequence[dict],
    batches: Iterator[dict],
    bld: Bld,
    compute: Compute = Compute(),
) -> tuple[list[dict], list[np.ndarray]]:
    """(trained weights by kind, loss curves [steps, L] by kind), numpy."""
    if not bld.steps or not kinds:
        return list(weights), [np.zeros((0, len(kind.layers)), np.float32) for kind in kinds]
    tx = make_optimizer(bld.optim, bld.steps)
    stacks = [jax.tree.map(jnp.asarray, w) for w in weights]
    state = [(w, jax.vmap(tx.init)(w)) for w in stacks]
    step = jax.jit(partial(_step, arch, tuple(kinds), tx, compute, bld.side_by_side), donate_argnums=0)
    curves = []
    for batch in take(batches, bld.steps, "bld.steps"):
        state, losses = step(state, params, {k: batch[k] for k in ("tokens", "positions", "segments")})
        curves.append(losses)
    trained = [jax.tree.map(np.asarray, w) for w, _ in state]
    return trained, [np.stack([np.asarray(losses[i]) for losses in curves]) for i in range(len(kinds))]


def take(batches: Iterable[dict], count: int, where: str) -> Iterator[dict]:
    """Exactly `count` batches; ValueError when the data end before."""
    iterator = iter(batches)
    for number in range(count):
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


def parent_streams(
    params: dict, arch: ArchSpec, batch: dict, compute: Compute = Compute()
) -> dict[str, Streams]:
    """The stream before, between the halves of, and after every block, by run."""
    ctx = batch_context(arch, batch)
    h_BTD = embed(params, batch["tokens"], compute)
    streams = {}
    for index, run in enumerate(arch.runs()):

        def body(h: jax.Array, p: dict, spec: BlockSpec = run.spec) -> tuple[jax.Array, Streams]:
            seen: dict[str, jax.Array] = {}
            after = apply_block(arch, spec, p, h, ctx, capture=seen)
            return after, Streams(h, seen["between_BTD"], after)

        h_BTD, streams[run_name(index)] = jax.lax.scan(body, h_BTD, params["runs"][run_name(index)])
    return streams


def _step(
    arch: ArchSpec,
    kinds: tuple[Kind, ...],
    tx: optax.GradientTransformation,
    compute: Compute,
    side_by_side: int,
    state: list[tuple[dict, Any]],
    params: dict,
    batch: dict,
) -> tuple[list[tuple[dict, Any]], list[jax.Array]]:
    """One step of every variant of every kind from one parent forward; losses [L] by kind."""
    ctx = batch_context(arch, batch)
    streams = parent_streams(params, arch, batch, compute)
    out, losses = [], []
    for kind, (weights, opt_state) in zip(kinds, state, strict=True):
        here = _gather(streams, arch, kind.layers)
        frozen = _gather(params["runs"], arch, kind.layers).get("ffn", {}) if kind.part == "attn" else {}
        update = partial(_update_one, arch, kind, tx, ctx)
        weights, opt_state, loss_L = _over_stack(update, side_by_side, (weights, opt_state, frozen, here))
        out.append((weights, opt_state))
        losses.append(loss_L)
    return out, losses


def _over_stack(fn: Callable[..., Any], side_by_side: int, stacks: tuple) -> Any:
    """fn over the leading axis. A CPU is faster at one plain matmul after another than at batched ones."""
    count = side_by_side or (1 if jax.default_backend() == "cpu" else jax.tree.leaves(stacks)[0].shape[0])
    return jax.lax.map(lambda one: fn(*one), stacks, batch_size=count if count > 1 else None)


def _update_one(
    arch: ArchSpec,
    kind: Kind,
    tx: optax.GradientTransformation,
    ctx: Context,
    weights: dict,
    opt_state: Any,
    frozen: dict,
    here: Streams,
) -> tuple[dict, Any, jax.Array]:
    """One step of one variant; a non-finite loss or gradient leaves this variant as it was."""

    def loss_of(w: dict) -> jax.Array:
        if kind.part == "attn":
            mid_BTD = apply_part(arch, "attn", kind.child, w, here.before, ctx)
            out_BTD = apply_part(arch, "ffn", kind.parent.ffn, frozen, mid_BTD, ctx)
        else:
            out_BTD = apply_part(arch, "ffn", kind.child, w, here.between, ctx)
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


def curve_summary(library: Library, kinds: Iterable[Kind]) -> dict[str, dict[str, list[float]]]:
    """{kind: {"first": loss by layer, "last": ...}}, for people to read."""
    out: dict[str, dict[str, list[float]]] = {}
    for kind in kinds:
        curves = [library.curve(kind.part, kind.child, layer) for layer in kind.layers]
        row = out.setdefault(kind.name, {"first": [], "last": []})
        for curve in curves:
            if len(curve):
                row["first"].append(float(curve[: max(1, len(curve) // 10)].mean()))
                row["last"].append(float(curve[-max(1, len(curve) // 10) :].mean()))
    return out
