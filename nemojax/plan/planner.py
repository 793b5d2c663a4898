"""A step compiled for a machine that is not at hand: whether it fits, and how long it takes at least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from nemojax.backends.hlo import Collective
from nemojax.backends.startup import GPU_MEMORY
from nemojax.backends.topology import Compiled, Topology, compile_for
from nemojax.model.attention import kernel_of
from nemojax.plan.loads import held_bytes
from nemojax.plan.programs import Program, Work, programs_of
from nemojax.sharding import MeshConfig, make_mesh


@dataclass(frozen=True)
class Part:
    """One program of a plan, of one device: bytes, and the seconds that each of three things would take."""

    name: str
    held: Mapping[str, int]
    beside: Mapping[str, int]
    compiled: Compiled
    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    times: float
    tokens: int
    model_flops: float
    expected_seconds: float | None = None  # by the compiler of a TPU
    loops: tuple[tuple[int, float], ...] = ()  # (turns, seconds of one) of its loops, the longest first

    @property
    def bytes(self) -> int:
        return self.compiled.bytes + sum(self.beside.values())

    @property
    def seconds(self) -> float:
        """At least: whatever takes longest hides the others."""
        return max(self.compute_seconds, self.memory_seconds, self.collective_seconds)

    def to_json(self) -> dict[str, Any]:
        c = self.compiled
        return {
            "name": self.name,
            "bytes": {**self.held, **self.beside, "temporaries": c.temporaries, "total": self.bytes},
            "host_bytes": c.host,
            "compute_seconds": self.compute_seconds,
            "memory_seconds": self.memory_seconds,
            "collective_seconds": self.collective_seconds,
            "seconds": self.seconds,
            "times": self.times,
            "collectives": [vars(one) | {"axes": list(one.axes)} for one in c.collectives],
            "kernels": dict(c.kernels or {}),
            "compiler_seconds": self.expected_seconds,
            "compiler_loops": [{"turns": n, "seconds": s} for n, s in self.loops],
            "compile_seconds": c.compile_seconds,
            "refused": c.refused,
        }


@dataclass(frozen=True)
class Plan:
    """What a step of `work` needs and costs on a machine, split as `mesh` says."""

    work: Work
    topology: Topology
    mesh: Mapping[str, int]
    parts: tuple[Part, ...]
    attention: str = ""  # the kernel over packed rows; nothing for a step that only generates
    caveat: str = ""  # why no stage would run it yet

    @property
    def room(self) -> int:
        """Bytes of a device that programs can have."""
        share = GPU_MEMORY if self.topology.chip.platform == "gpu" else 1.0
        return int(self.topology.hbm_bytes * share)

    @property
    def largest(self) -> Part:
        return max(self.parts, key=lambda part: part.bytes)

    @property
    def fits(self) -> bool:
        return self.largest.bytes <= self.room and not any(part.compiled.refused for part in self.parts)

    @property
    def step_seconds(self) -> float:
        """At least, of a step: of a rollout also all its tokens."""
        return sum(part.seconds * part.times for part in self.parts)

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the chips could do in the time."""
        flops = sum(part.model_flops * part.times for part in self.parts)
        return flops / (
            self.step_seconds * self.topology.peak(precision(self.work)) * len(self.topology.devices)
        )

    @property
    def tokens_per_second(self) -> float:
        return self.parts[0].tokens / self.step_seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "bytes_per_device": self.largest.bytes,
            "hbm_bytes": self.topology.hbm_bytes,
            "room_bytes": self.room,
            "step_seconds": self.step_seconds,
            "mfu": self.mfu,
            "tokens_per_second": self.tokens_per_second,
            "compile_seconds": sum(part.compiled.compile_seconds for part in self.parts),
            "topology": self.topology.name,
            "devices": len(self.topology.devices),
            "chips": self.topology.num_chips,
            "mesh": dict(self.mesh),
            "step": self.work.step,
            "batch": self.work.batch,
            "context": self.work.context,
            "dtype": self.work.dtype,
            "attention": self.attention,
            "caveat": self.caveat,
            "parts": [part.to_json() for part in self.parts],
        }

    def cost(self, tokens: float, price: float | None) -> dict[str, float]:
        """Hours, chip-hours and, at a price of a chip-hour, money for a number of tokens: at least."""
        hours = tokens / self.tokens_per_second / 3600
        chip_hours = hours * self.topology.num_chips
        out = {"tokens": tokens, "hours": hours, "chip_hours": chip_hours}
        return out if price is None else out | {"cost": chip_hours * price}


def precision(work: Work) -> str:
    return {"bf16": "bfloat16", "fp8": "float8", "f32": "float32"}[work.dtype]


def make_plan(work: Work, topology: Topology, mesh: MeshConfig) -> Plan:
    """Compiles every program of the step. ValueError for a mesh that does not fit model or machine."""
    placed = plan_mesh(mesh, topology)
    with jax.set_mesh(placed):
        programs = programs_of(work, placed)
        kernel = kernel_of(work.context, work.arch.head_dim, work.compute.dtype)
    parts = tuple(_compiled(program, work, topology, placed) for program in programs)
    kernel = "" if work.step == "generate" else kernel
    return Plan(work, topology, dict(placed.shape), parts, kernel, _caveat(work, placed))


def _caveat(work: Work, mesh: Mesh) -> str:
    groups = mesh.devices.reshape(-1, math.prod(mesh.shape[axis] for axis in mesh.axis_names[-2:]))
    shared = any(len({device.process_index for device in group}) > 1 for group in groups)
    if shared and work.step not in ("train", "distill"):
        return f"{work.step} has no rows that several hosts share: keep tensor x context within a host"
    if work.step == "generate" and len({d.process_index for d in mesh.devices.flat}) > 1:
        return f"{work.step} runs on one host"
    return ""


def plan_mesh(config: MeshConfig, topology: Topology) -> Mesh:
    return make_mesh(config, topology.devices, rows="none")


def _compiled(program: Program, work: Work, topology: Topology, mesh: Mesh) -> Part:
    mesh = program.mesh or mesh
    compiled = compile_for(topology, program.jitted, *program.arguments, mesh=mesh, **program.static)
    return Part(
        program.name,
        held_bytes(program.held),
        held_bytes(program.beside),
        compiled,
        program.load.flops / topology.peak(precision(work)),
        program.load.bytes / topology.hbm_bandwidth,
        collective_seconds(compiled.collectives, topology, dict(mesh.shape)),
        program.times,
        program.tokens,
        program.model_flops,
        compiled.expected_seconds(topology),
        tuple((turns, cycles / topology.chip.clock_hz) for turns, cycles in compiled.loops),
    )


def collective_seconds(
    collectives: tuple[Collective, ...], topology: Topology, mesh: Mapping[str, int]
) -> float:
    """One after another, each at what its axes' links carry; where the axes are not known, at all axes'."""
    everything = tuple(name for name, size in mesh.items() if size > 1)
    total = 0.0
    for one in collectives:
        rate = topology.bandwidth(one.axes or everything, mesh)
        total += one.bytes / rate
    return total
