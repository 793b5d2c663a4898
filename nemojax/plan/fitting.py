"""What would fit where a plan does not, and which mesh and batch is best: tried by compiling, not guessed.

Arguments of a program are counted exactly without compiling it; temporaries are taken to grow with the
positions of a device until the compiler has been asked.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from nemojax.backends.topology import Topology, bytes_on_device, open_topology
from nemojax.plan.loads import Shares
from nemojax.plan.planner import Plan, make_plan, plan_mesh, precision
from nemojax.plan.programs import Work, programs_of
from nemojax.sharding import AXES, MeshConfig


@dataclass(frozen=True)
class Change:
    """Another way to do the same work, and how it differs in words."""

    words: str
    work: Work
    topology: Topology
    mesh: MeshConfig
    counted: bool = True  # whether `estimate` sees what it saves


def what_fits(
    plan: Plan, mesh: MeshConfig, *, tries: int = 3, told: Callable[[str], None] = lambda _: None
) -> tuple[Change, Plan] | None:
    """The smallest change with which the step fits, and its plan; None if `tries` compilations find none."""
    for change in _changes(plan, mesh):
        try:
            needed = estimate(change.work, change.topology, change.mesh, plan)
            if change.counted and needed > plan.room:
                continue
            told(f"compiling with {change.words}")
            found = make_plan(change.work, change.topology, change.mesh)
        except ValueError:  # a mesh that does not divide the model or the batch
            continue
        if found.fits:
            return change, found
        tries -= 1
        if not tries:
            break
    return None


def estimate(work: Work, topology: Topology, mesh: MeshConfig, known: Plan | None) -> float:
    """Bytes a device: what is held, exactly, and temporaries as those of a `known` plan would scale.

    ValueError for a mesh that does not fit the model or the machine.
    """
    placed = plan_mesh(mesh, topology)
    with jax.set_mesh(placed):
        programs = programs_of(work, placed)
    temporaries = 0.0
    if known is not None:
        positions = _positions(work, Shares.of(placed))
        before = _positions(known.work, _shares(known))
        temporaries = known.largest.compiled.temporaries * positions / before
    held = [bytes_on_device(p.arguments) + bytes_on_device(p.beside) for p in programs]
    return max(held) + temporaries


def _positions(work: Work, shares: Shares) -> float:
    """Positions at once on a device; those of a generation are one for every sequence."""
    if work.step == "generate":
        return max(work.batch / shares.rows, 1.0)
    rows = work.batch / shares.rows / work.training.accumulate
    return max(rows, 1.0) * work.context / shares.length


def _shares(plan: Plan) -> Shares:
    mesh = plan_mesh(MeshConfig(**{name: plan.mesh[name] for name in AXES}), plan.topology)
    return Shares.of(mesh)


def _changes(plan: Plan, mesh: MeshConfig) -> Iterator[Change]:
    """From the smallest to the largest."""
    work = plan.work

    def change(
        words: str, mesh: MeshConfig = mesh, topology: Topology = plan.topology, **values: Any
    ) -> Change:
        return Change(words, replace(work, **values), topology, mesh)

    def other_training(words: str, **values: Any) -> Change:
        training = replace(work.training, **values)
        return Change(words, replace(work, training=training), plan.topology, mesh, counted=False)

    if work.step in ("train", "distill", "rl"):
        t = work.training
        if t.remat in ("none", "dots"):
            yield other_training("remat=full", remat="full")
        if min(t.loss_chunk or work.context, work.context) > 512:
            yield other_training("loss_chunk=512", loss_chunk=512)
        if "cosine" in t.terms and work.step == "distill" and len(t.terms) > 1:
            terms = tuple(term for term in t.terms if term != "cosine")
            yield other_training(f"terms={','.join(terms)}", terms=terms)
        for count in (t.accumulate * 2**i for i in range(1, 6)):
            if work.batch % count == 0:
                yield change(f"accumulate={count}", training=replace(t, accumulate=count))
        if not t.zero1 and plan.mesh["data"] > 1:
            yield change("zero1", training=replace(t, zero1=True))
    for other in meshes(plan.topology):
        if other != mesh:
            yield change(f"mesh={words_of(other)}", mesh=other)
    trains = work.step in ("train", "distill", "rl")
    if trains and plan.topology.chip.platform == "tpu" and not work.training.offload:
        yield change("offload", training=replace(work.training, offload=True))
    if trains and work.training.weights == "float32":
        yield change("weights=bfloat16", training=replace(work.training, weights="bfloat16"))
    if work.step == "generate":
        for count in (work.batch // 2**i for i in range(1, work.batch.bit_length())):
            yield change(f"batch={count}", batch=count)
        for length in (work.context // 2**i for i in range(1, 6)):
            yield change(f"context={length}", context=length)
    for bigger in _bigger(plan.topology):
        wide = mesh if any(getattr(mesh, name) == -1 for name in AXES) else replace(mesh, fsdp=-1)
        yield change(f"topology={bigger.name}", mesh=wide, topology=bigger)


def _bigger(topology: Topology) -> Iterator[Topology]:
    """The same chips, twice as many, up to 64 times: the shortest side of a torus doubles."""
    chip, dims = topology.chip, list(topology.dims)
    for _ in range(6):
        shortest = min(range(len(dims)), key=lambda i: (dims[i], -i))
        dims[shortest] *= 2
        slices = f"*{topology.slices}" if topology.slices > 1 else ""
        with contextlib.suppress(ValueError):  # there is no such shape
            yield open_topology(f"{chip.name}:{'x'.join(map(str, dims))}{slices}")


def meshes(topology: Topology) -> list[MeshConfig]:
    """Splits of the devices over fsdp, tensor and context, the last two within a host, as stages need it."""
    count = len(topology.devices)
    host = min(count, topology.chip.chips_per_host * topology.chip.devices_per_chip)
    if topology.chip.platform == "cpu":
        host = count
    powers = [2**i for i in range(host.bit_length()) if 2**i <= host and count % 2**i == 0]
    return [
        MeshConfig(fsdp=count // (tensor * context), tensor=tensor, context=context)
        for tensor, context in itertools.product(powers, powers)
        if tensor * context <= host and count % (tensor * context) == 0
    ]


def words_of(mesh: MeshConfig) -> str:
    sizes = {name: getattr(mesh, name) for name in AXES}
    return ",".join(f"{name}:{size}" for name, size in sizes.items() if size != 1) or "fsdp:1"


def sweep(
    work: Work,
    topology: Topology,
    batches: tuple[int, ...],
    *,
    compiled: int = 6,
    told: Callable[[str], None] = lambda _: None,
) -> list[Plan]:
    """Plans of the most promising meshes and batches, the fastest that fits first.

    All whose arguments alone have room are ranked by the roofline without collectives; the best `compiled` of
    them are compiled.
    """
    found: list[tuple[float, Work, MeshConfig]] = []
    for mesh, batch in itertools.product(meshes(topology), batches):
        other = replace(work, batch=batch)
        try:
            if estimate(other, topology, mesh, None) <= topology.hbm_bytes:
                found.append((_rate(other, topology, mesh), other, mesh))
        except ValueError:
            continue
    found.sort(key=lambda one: -one[0])
    plans = []
    for _, other, mesh in found[:compiled]:
        told(f"compiling {words_of(mesh)}, batch {other.batch}")
        plans.append(make_plan(other, topology, mesh))
    return sorted(plans, key=lambda plan: (not plan.fits, -plan.tokens_per_second))


def _rate(work: Work, topology: Topology, mesh: MeshConfig) -> float:
    """Tokens a second if communication cost nothing."""
    placed = plan_mesh(mesh, topology)
    with jax.set_mesh(placed):
        programs = programs_of(work, placed)
    peak = topology.peak(precision(work))
    seconds = math.fsum(p.times * p.load.seconds(peak, topology.hbm_bandwidth) for p in programs)
    return programs[0].tokens / seconds
