"""The library: every sub-block or block a layer may become, trained to do what the parent's did there.

`build` trains what is missing by blockwise local distillation (`bld`), window by window where the parent does
not fit (`window`), and keeps it on disk (`variants`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nemojax.arch import ArchSpec, BlockSpec, NoOp
from nemojax.buckets import is_bucket, remove_tree
from nemojax.compress.bld import Bld, OnStep, Weights, init_kind, train
from nemojax.compress.bld import take as take  # the stage finds it here
from nemojax.compress.importance import Importance
from nemojax.compress.pattern import excluded
from nemojax.compress.space import KvInit, choice_name
from nemojax.compress.subblock import PARTS, Kind, Part, Place, Sub, kind_name, on_host, sub_of
from nemojax.compress.variants import Library
from nemojax.compress.window import Carry, Parent, Source
from nemojax.config import to_dict
from nemojax.hosts import is_primary, on_primary
from nemojax.log import RunLog
from nemojax.model.llama import Compute
from nemojax.sharding import use_mesh
from nemojax.stage import locked, read_json, write_json

TRAINING, UNIT, LOG = "training", "unit.json", "log"


def kinds_of(
    choices: Sequence[Sequence[BlockSpec]], arch: ArchSpec, coupled: Sequence[str] = ()
) -> tuple[Kind, ...]:
    """Every replacement that has weights, with the layers that may use it; the coupled ones last.

    coupled: rules such as `all:-+*` or `0-3:kv1+ffn*`, layers and a glob of `attention+feed-forward`, that
    choose which blocks are trained whole. ValueError for a rule that no choice matches.
    """
    found: dict[tuple[Place, BlockSpec, Sub | BlockSpec], list[int]] = {}
    for layer, options in enumerate(choices):
        parent = arch.blocks[layer]
        for part in PARTS:
            for sub in dict.fromkeys(sub_of(option, part) for option in options):
                if sub != sub_of(parent, part) and not isinstance(sub, NoOp):
                    found.setdefault((part, parent, sub), []).append(layer)
    if coupled:
        whole = [
            [o for o in options if o != arch.blocks[i] and not o.is_empty]
            for i, options in enumerate(choices)
        ]
        names = [[choice_name(option) for option in options] for options in whole]
        for layer, picked in enumerate(excluded(coupled, names)):
            for index in sorted(picked):
                found.setdefault(("block", arch.blocks[layer], whole[layer][index]), []).append(layer)
    kinds = [Kind(*key, tuple(dict.fromkeys(layers))) for key, layers in found.items()]
    return tuple(sorted(kinds, key=lambda kind: kind.part == "block"))


def build(
    params: Source,
    arch: ArchSpec,
    kinds: Sequence[Kind],
    importance: Importance,
    batches: Callable[[], Iterator[dict]],
    bld: Bld,
    dir: str | os.PathLike,
    *,
    kv_init: KvInit = "mean",
    compute: Compute = Compute(),
    mesh: Mesh | None = None,
) -> Library:
    """Trains what `dir` lacks of the kinds and saves it, `bld.together` kinds at a time, parts before blocks.

    params: the parent's, or the path of its artifact, of which `bld.window` layers are read at a time.
    `batches()` starts the calibration data from the beginning, this process's rows: every kind sees the same
    tokens. Killed and started again it goes on to the same bits, from the last checkpoint of
    `bld.checkpoint_every` or with the kinds that were in training. ValueError for a library of another
    parent, a variant of other settings or data, data that end too soon, and a variant none of whose steps
    was finite (the others are saved).
    """
    parent, library = Parent(params, arch, bld.window, mesh), Library(dir)
    with use_mesh(mesh), TemporaryDirectory() as here:
        # streams are mapped, which nothing in a bucket can be: a run that goes on makes them again
        streams = Path(here) if is_bucket(library.dir) else library.dir / TRAINING
        fingerprint = parent.fingerprint()
        on_primary(lambda: library.claim(fingerprint, arch))
        data = batches() if bld.steps or bld.tokens else iter(())
        first = next(iter(data), None)
        steps = bld.num_steps(first) if first is not None or bld.tokens else bld.steps
        recipe = _recipe(bld, steps, kv_init, compute, importance, data, first)
        rows = np.shape(first["tokens"]) if first is not None else (0, 0)
        carry = Carry(streams, parent, batches, steps, (rows[0], rows[1]), compute)
        builder = _Builder(library, parent, importance, bld, kv_init, recipe, carry)
        for number in range(len(parent.windows())):
            builder.build_window(number, kinds)
        on_primary(lambda: remove_tree(library.dir / TRAINING, ignore_errors=True))
    return library


def _recipe(
    bld: Bld,
    steps: int,
    kv_init: KvInit,
    compute: Compute,
    importance: Importance,
    data: Any,
    first: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that decides what a variant becomes, but for its parent; as JSON has it."""
    ranks = hashlib.sha256()
    for part, scores in (("ffn", importance.ffn), ("kv", importance.kv)):
        for layer in sorted(scores):
            ranks.update(f"{part}{layer}".encode() + np.asarray(scores[layer], np.float32).tobytes())
    recipe: dict[str, Any] = {"steps": steps, "kv_init": kv_init, "importance": ranks.hexdigest()[:16]}
    if first is not None:
        tokens = np.asarray(first["tokens"])
        known = data.state().get("identity") if hasattr(data, "state") else None
        recipe["data"] = known or hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
        recipe["batch"] = [tokens.shape[0] * jax.process_count(), *tokens.shape[1:]]
        recipe |= {"dtype": compute.dtype, **{f"optim.{k}": v for k, v in to_dict(bld.optim).items()}}
    return json.loads(json.dumps(recipe))


@dataclass(frozen=True)
class _Builder:
    library: Library
    parent: Parent
    importance: Importance
    bld: Bld
    kv_init: KvInit
    recipe: dict[str, Any]
    carry: Carry

    def build_window(self, number: int, kinds: Sequence[Kind]) -> None:
        """Everything that the layers of one window lack."""
        window = self.parent.windows()[number]
        inside = [_within(kind, window) for kind in kinds if set(kind.layers) & set(window)]
        plan = on_primary(lambda: self._plan(inside))
        if not plan:
            return
        with ExitStack() as held:
            on_primary(lambda: held.enter_context(self._locked()))
            arch, params = self.parent.arch_of(window), self.parent.params_of(window)
            before = self.carry.before(number) if self.carry.steps else None
            for unit in plan:
                some = [dataclasses.replace(inside[i], layers=tuple(layers)) for i, layers in unit]
                self._build_unit(arch, params, window.start, before, some)

    def _locked(self) -> AbstractContextManager[None]:
        (self.library.dir / TRAINING).mkdir(exist_ok=True)
        return locked(self.library.dir / TRAINING)

    def _plan(self, inside: Sequence[Kind]) -> list[list[list[Any]]]:
        """Units of (index of a kind, layers) that are trained together.

        A unit that a kill interrupted comes first and as it was, whatever it had saved: the same program
        gives the same bits. All else is grouped by what is missing, so nothing is made twice.
        """
        lacking = {i: sorted(set(k.layers) - set(self._checked(k))) for i, k in enumerate(inside)}
        units = []
        begun = read_json(self.library.dir / TRAINING / UNIT) or {}
        if begun.get("recipe") == self.recipe:
            unit = [
                [i, layers]
                for name, layers in begun["kinds"]
                for i, kind in enumerate(inside)
                if kind.name == name and set(layers) <= set(kind.layers)
            ]
            if len(unit) == len(begun["kinds"]) and any(lacking[i] for i, _ in unit):
                units.append(unit)
                for i, layers in unit:
                    lacking[i] = [layer for layer in lacking[i] if layer not in layers]
        for coupled in (False, True):
            rest = [
                [i, layers]
                for i, layers in lacking.items()
                if layers and (inside[i].part == "block") == coupled
            ]
            size = self.bld.together or max(len(rest), 1)
            units += [rest[first : first + size] for first in range(0, len(rest), size)]
        return units

    def _checked(self, kind: Kind) -> tuple[int, ...]:
        """The layers that have their variant; ValueError when one was made in another way."""
        there = self.library.layers(kind.name)
        for layer in set(there) & set(kind.layers):
            made = self.library.about(kind.part, kind.child, layer).get("recipe", {})
            if differ := [k for k in {**made, **self.recipe} if made.get(k) != self.recipe.get(k)]:
                key = differ[0]
                raise ValueError(
                    f"{self.library.dir / kind.name}: layer {layer}: expected a variant made with {key} "
                    f"{self.recipe.get(key)}, got {made.get(key)}; delete the folder to make it again, or "
                    "choose another library"
                )
        return there

    def _build_unit(
        self, arch: ArchSpec, params: dict, offset: int, before: np.ndarray | None, kinds: Sequence[Kind]
    ) -> None:
        """Trains variants of one window, whose parameters are given, and saves them."""
        training = self.library.dir / TRAINING
        record = {"recipe": self.recipe, "kinds": [[kind.name, list(kind.layers)] for kind in kinds]}
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
        on_primary(lambda: write_json(training / UNIT, record))
        local = [dataclasses.replace(k, layers=tuple(i - offset for i in k.layers)) for k in kinds]
        starts: list[list[dict[Part, str]]] = []
        with ExitStack() as held:
            stacks, curves = train(
                params,
                arch,
                local,
                self._first_of_all(params, arch, local, offset, starts),
                self.carry.batches(),
                self.bld,
                self.carry.compute,
                mesh=self.parent.mesh,
                steps=self.carry.steps,
                before=before,
                saving=training / digest,
                on_step=self._progress(kinds, held),
            )
        broken = []
        for kind, stack, curve, start in zip(kinds, stacks, curves, starts, strict=True):
            finite = [not len(losses) or bool(np.isfinite(losses).any()) for losses in curve.T]
            broken += [f"{kind.name} of layer {i}" for i, f in zip(kind.layers, finite, strict=True) if not f]
            self._save(kind, stack, curve, start, finite)
        on_primary(lambda: remove_tree(training / digest, ignore_errors=True))
        on_primary(lambda: (training / UNIT).unlink())
        if broken:
            names = ", ".join(broken[:4]) + (" and more" if len(broken) > 4 else "")
            raise ValueError(
                f"{self.library.dir}: {names}: expected a finite loss in some of {self.carry.steps} steps, "
                "got none; check the parent's weights there, lower bld.optim.lr, or compute in float32"
            )

    def _save(self, kind: Kind, stack: Weights, curve: np.ndarray, starts: list, good: list[bool]) -> None:
        there = on_primary(lambda: self.library.layers(kind.name))
        for i, layer in enumerate(kind.layers):
            if layer in there or not good[i]:
                continue
            about = {"recipe": self.recipe, "start": starts[i]}
            weights = on_host(stack, i)  # all processes hand over their parts, the primary writes
            on_primary(
                lambda at=layer, w=weights, i=i, a=about: self.library.save(
                    kind.part, kind.child, at, w, curve[:, i], a
                )
            )

    def _progress(self, kinds: Sequence[Kind], held: ExitStack) -> OnStep | None:
        """Shows the mean losses by kind, and keeps them under `log/`; in the primary process alone."""
        if not is_primary() or not self.carry.steps:
            return None
        more = f"-and-{len(kinds) - 1}-more" if len(kinds) > 1 else ""
        folder = self.library.dir / LOG / f"{kinds[0].layers[0]:03d}-{kinds[0].name}{more}"
        log, every = held.enter_context(RunLog(folder, self.carry.steps)), -(-self.carry.steps // 50)
        resumed = False

        def on_step(step: int, losses: list[np.ndarray]) -> None:
            nonlocal resumed
            if not resumed:
                log.truncate(step - 1)
                resumed = True
            if step % every == 0 or step == self.carry.steps:
                finite = [(k.name, loss[np.isfinite(loss)]) for k, loss in zip(kinds, losses, strict=True)]
                log.write(step, {f"mse/{name}": float(loss.mean()) for name, loss in finite if loss.size})

        return on_step

    def _first_of_all(
        self, params: dict, arch: ArchSpec, kinds: Sequence[Kind], offset: int, starts: list
    ) -> Iterator[Weights]:
        """First weights of kind after kind, so that the host holds one at a time; fills `starts`."""
        for kind in kinds:
            weights, start = self._first(params, arch, kind, offset)
            starts.append(start)
            yield weights

    def _first(
        self, params: dict, arch: ArchSpec, kind: Kind, offset: int
    ) -> tuple[Weights, list[dict[Part, str]]]:
        """First weights of a kind, stacked, and for each layer and part where they come from.

        A coupled variant starts from its trained parts where the library has them.
        """
        weights = init_kind(params, arch, kind, self.importance, self.kv_init, offset)
        starts: list[dict[Part, str]] = [dict.fromkeys(kind.trained, "parent") for _ in kind.layers]
        if kind.part != "block":
            return weights, starts
        for part in kind.trained:
            sub = sub_of(kind.block, part)
            there = () if sub == sub_of(kind.parent, part) else self.library.layers(kind_name(part, sub))
            for i, layer in enumerate(kind.layers):
                if layer + offset in there:
                    starts[i][part] = "library"
                    for name, weight in self.library.load(part, sub, layer + offset).items():
                        weights[part][name][i] = weight
        return weights, starts


def _within(kind: Kind, window: range) -> Kind:
    return dataclasses.replace(kind, layers=tuple(layer for layer in kind.layers if layer in window))


def curve_summary(library: Library, kinds: Iterable[Kind]) -> dict[str, dict[str, list[float]]]:
    """{kind: {"first": loss by layer, "last": ...}}, for people to read."""
    out: dict[str, dict[str, list[float]]] = {}
    for kind in kinds:
        curves = [library.curve(kind.part, kind.child, layer) for layer in kind.layers]
        row = out.setdefault(kind.name, {"first": [], "last": []})
        for curve in curves:
            finite = curve[np.isfinite(curve)]  # a step that was not changed nothing
            if tenth := max(1, finite.size // 10) if finite.size else 0:
                row["first"].append(float(finite[:tenth].mean()))
                row["last"].append(float(finite[-tenth:].mean()))
    return out
