"""Machines that are not at hand: their devices, and what their compilers say of a program, without them.

TPU programs are compiled by libtpu, GPU programs by the CUDA plugin of jax, both on any CPU; nothing runs.
Where they are not installed beside jax, NEMOJAX_LIBTPU and NEMOJAX_CUDA_PLUGINS name folders that `pip
install --target` put them into.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nemojax.backends.chips import Chip, chip_names, load_chip
from nemojax.backends.hlo import Collective, collectives, estimated_cycles, kernels
from nemojax.backends.kernels import machine

LIBTPU, CUDA_PLUGINS = "NEMOJAX_LIBTPU", "NEMOJAX_CUDA_PLUGINS"
_ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4", "7x": "tpu7x-8"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are connected. `dims`: chips along each side of a slice's torus, or
    (number of GPUs,); `slices`: of this form, joined by the network alone."""

    name: str
    chip: Chip
    dims: tuple[int, ...]
    slices: int
    devices: tuple[Any, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.dims) * self.slices

    @property
    def hbm_bytes(self) -> int:
        """Of one device."""
        return self.chip.hbm_bytes // self.chip.devices_per_chip

    def peak(self, dtype: str) -> float:
        """FLOP/s of one device."""
        shared = len(self.devices) if self.chip.platform == "cpu" else self.chip.devices_per_chip
        return self.chip.peak(dtype) / shared

    @property
    def hbm_bandwidth(self) -> float:
        """Bytes/s of one device."""
        shared = len(self.devices) if self.chip.platform == "cpu" else self.chip.devices_per_chip
        return self.chip.hbm_bandwidth / shared

    def bandwidth(self, axes: Sequence[str], mesh: Mapping[str, int]) -> float:
        """Bytes/s that one device can send in a collective along these axes of a mesh over this machine.

        On a torus the axes of a mesh take its sides in turn, the last axis the last side, and a collective
        uses the two links of every side that it reaches along. Across hosts of GPUs, and across slices, a
        group has the adapters of its members at each end. Nothing else is assumed to be under way.
        """
        chip = self.chip
        if chip.platform == "cpu":
            return self.hbm_bandwidth
        size = math.prod(mesh[name] for name in axes)
        inner = math.prod(n for name, n in mesh.items() if list(mesh).index(name) > _last(axes, mesh))
        reach = size * inner  # devices that lie between the first and the last of a group
        if chip.torus_dims:
            one_slice = math.prod(self.dims) * chip.devices_per_chip
            if self.slices > 1 and reach > one_slice:
                return chip.network_bandwidth / chip.devices_per_chip * max(1, one_slice // inner)
            sides = _sides(self.dims, inner // chip.devices_per_chip, reach // chip.devices_per_chip)
            return chip.link_bandwidth * min(2 * sides, chip.links)
        host = chip.chips_per_host
        if reach <= host:
            return chip.link_bandwidth
        return min(chip.link_bandwidth, chip.network_bandwidth * max(1, host // inner))


def open_topology(name: str) -> Topology:
    """`v5p:8x8x8`, `v6e:16x16*2` (two slices), `h100:512`, `cpu:8` (devices of this process).

    ValueError for a chip that no file describes, a shape that does not exist, or a missing compiler.
    """
    known = (*chip_names(), "cpu")
    form = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if form is None or form[1] not in known:
        raise ValueError(
            f"topology: expected CHIP:SHAPE with a chip of {', '.join(known)}, such as v5p:4x4x4, "
            f"v6e:16x16*2 for two slices, h100:8 or cpu:8, got {name!r}"
        )
    chip, slices = load_chip(form[1]), int(form[3] or 1)
    dims: tuple[int, ...] = tuple(int(n) for n in form[2].split("x"))
    match chip.platform:
        case "tpu":
            devices = _tpu_devices(chip, form[2], slices, name)
        case "gpu":
            if len(dims) > 1 or slices > 1:
                raise ValueError(f"topology: expected a number of GPUs, such as {chip.name}:16, got {name!r}")
            devices = _gpu_devices(chip, math.prod(dims))
        case "cpu":
            devices = jax.devices("cpu")
            if dims != (len(devices),) or slices > 1:
                raise ValueError(
                    f"topology: expected cpu:{len(devices)}, the devices of this process, got {name!r}; set "
                    "XLA_FLAGS=--xla_force_host_platform_device_count=N for more"
                )
    return Topology(name, chip, dims, slices, tuple(devices))


@dataclass(frozen=True)
class Compiled:
    """What a compiler says of a program, of one device, in bytes. `refused`: its words when it finds no room;
    then `temporaries` are what it asked for, as far as it says so. `cycles` and `loops`: as in
    `hlo.estimated_cycles`, of a TPU."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    compile_seconds: float
    host: int = 0  # bytes of a device in its host's memory, which none of the others count
    collectives: tuple[Collective, ...] = ()
    kernels: Mapping[str, int] | None = None
    cycles: float = 0.0
    loops: tuple[tuple[int, float], ...] = ()
    refused: str = ""

    @property
    def bytes(self) -> int:
        """Most that a device holds at once: what goes in, what comes out in new places, and temporaries."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def expected_seconds(self, topology: Topology) -> float | None:
        """By a TPU's compiler: its cycles, or the time to read what goes in and write what comes out, where
        that is longer; None elsewhere. What it sends is not in it."""
        if not self.cycles or not topology.chip.clock_hz:
            return None
        moved = self.arguments + self.outputs - self.aliased
        return max(self.cycles / topology.chip.clock_hz, moved / topology.hbm_bandwidth)


def compile_for(
    topology: Topology, program: Any, *arguments: Any, mesh: jax.sharding.Mesh | None = None, **static: Any
) -> Compiled:
    """Compiles a jitted `program` of abstract, placed arguments for the topology's devices.

    A program that does not fit is no error: see `Compiled.refused`.
    """
    # in scope also where it has one device: it says for which machine the program is
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        lowered = program.lower(*arguments, **static)
        start = time.perf_counter()
        try:
            options = dict(machine(topology.chip.platform).COMPILER_OPTIONS)
            compiled = lowered.compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            line = " ".join(str(error).split())
            size = bytes_on_device(arguments)
            seconds, host = time.perf_counter() - start, bytes_on_device(arguments, on_host=True)
            return Compiled(size, 0, 0, _asked_for(line), 0, seconds, host, refused=line[:300])
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    sizes = {} if mesh is None else dict(mesh.shape)
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        # a GPU's is in the host's memory until it is loaded, and small; a CPU's is no matter
        memory.generated_code_size_in_bytes if topology.chip.platform == "tpu" else 0,
        seconds,
        bytes_on_device(arguments, on_host=True) + memory.host_temp_size_in_bytes,
        tuple(collectives(text, sizes)) if len(topology.devices) > 1 else (),
        kernels(text),
        *estimated_cycles(text),
    )


def _last(axes: Sequence[str], mesh: Mapping[str, int]) -> int:
    return max((list(mesh).index(name) for name in axes if mesh[name] > 1), default=len(mesh))


def _sides(dims: tuple[int, ...], inner: int, reach: int) -> int:
    """How many sides of a torus a group goes along, whose neighbours are `inner` chips apart in row order and
    which lie within `reach` chips."""
    count, step = 0, 1
    for side in reversed(dims):
        if side > 1 and step * side > inner and step < reach:
            count += 1
        step *= side
    return max(count, 1)


def _tpu_devices(chip: Chip, shape: str, slices: int, name: str) -> Sequence[Any]:
    _find_libtpu(name)
    # there is no metadata server to ask, and other processes may compile as well
    for key, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_ACCELERATOR_TYPE", _ACCELERATORS[chip.name]),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(key, value)
    sides = len(shape.split("x"))
    if sides != chip.torus_dims:
        raise ValueError(f"topology: {chip.name}: expected {chip.torus_dims} sides, got {shape!r}")
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip.name == "v4":
        more["chip_config_name"] = "megacore"  # both cores of a chip as one device, as JAX has them
    asked = f"{'tpu7x' if chip.name == '7x' else chip.name}:{shape}"
    try:
        return _describe(platform="tpu", topology_name=asked, **more)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology: {name}: there is no such shape ({' '.join(str(error).split())})"
        ) from error


def _find_libtpu(name: str) -> None:
    """Says where it is; ValueError where it is not, or is of another version than jax asks for."""
    wanted = next(
        (r.split(";")[0].strip() for r in metadata.requires("jax") or () if "libtpu==" in r), "libtpu"
    )
    advice = f"pip install --no-deps --target=DIR '{wanted}' and set {LIBTPU}=DIR"
    folder = os.environ.get(LIBTPU)
    if folder:
        library = Path(folder, "libtpu", "libtpu.so")
        if not library.is_file():
            raise ValueError(f"{LIBTPU}: expected a folder with libtpu, got {folder}; {advice}")
        os.environ["TPU_LIBRARY_PATH"] = str(library)
    elif not importlib.util.find_spec("libtpu"):
        raise ValueError(f"topology: {name}: expected libtpu, which compiles for TPUs, got none; {advice}")
    version = _version_of("libtpu", folder)
    if version and not f"{version}.".startswith(wanted.partition("==")[2].rstrip("*")):
        raise ValueError(
            f"topology: {name}: expected {wanted} beside jax {jax.__version__}, got {version}; {advice}"
        )


def _version_of(package: str, folder: str | None) -> str:
    """Of a package in a folder, or where Python finds it; nothing where it does not say."""
    places = sys.path if folder is None else [folder]
    return next((d.version for d in metadata.distributions(name=package, path=places)), "")


def _gpu_devices(chip: Chip, count: int) -> Sequence[Any]:
    host = chip.chips_per_host
    if count < 1 or (count > host and count % host):
        raise ValueError(
            f"topology: {chip.name}: expected up to {host} GPUs or a multiple of it, got {count}"
        )
    for folder in filter(None, os.environ.get(CUDA_PLUGINS, "").split(os.pathsep)):
        if folder not in sys.path:
            sys.path.append(folder)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    plugin = _cuda_plugin()
    if plugin is None:
        raise ValueError(
            f"topology: {chip.name}:{count}: expected jax's CUDA plugin, which compiles for GPUs, got none"
            f"{f' in {folders}' if (folders := os.environ.get(CUDA_PLUGINS)) else ''}; "
            "pip install jax-cuda12-plugin and jax-cuda12-pjrt (or both of cuda13) in jax's version, or "
            f"'nemojax[cuda12]' or 'nemojax[cuda13]', or name a folder that has them in {CUDA_PLUGINS}"
        )
    hosts = max(1, count // host)
    grid = f"1x{hosts}x{min(count, host)}"
    how = {"platform": "cuda", "topology": grid, "target_config": _target_config(chip)}
    try:
        return _describe(chip.name, **how)
    except NotImplementedError:  # jax looked for plugins before the folder was named
        plugin.initialize()
        return _describe(chip.name, **how)


def _cuda_plugin() -> Any:
    for name in ("xla_cuda13", "xla_cuda12"):
        try:
            return importlib.import_module(f"jax_plugins.{name}")
        except ImportError:
            continue
    return None


def _describe(*names: str, **how: Any) -> Sequence[Any]:
    from jax.experimental import topologies

    return topologies.get_topology_desc(*names, **how).devices


def _target_config(chip: Chip) -> str:
    """What XLA's GPU compiler wants to know of a device, as a text protocol buffer."""
    target = dict(chip.target or {})
    major, minor = target.pop("compute_capability")
    facts = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "threads_per_core_limit": 2048,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(chip.hbm_bandwidth),
        "device_memory_size": chip.hbm_bytes,
        **target,
    }
    lines = [f"  {name}: {value}" for name, value in facts.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    versions = {"driver": "13.0.0", "runtime": "12.8.0", "compile_time_toolkit": "12.8.0", "dnn": "9.10.0"}
    lines += [f'  {name}_version: "{version}"' for name, version in versions.items()]
    device = f'"{chip.kinds[0]}"'
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"  name: {device}",
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            f"device_description_str: {device}",
        ]
    )


def bytes_on_device(tree: Any, *, on_host: bool = False) -> int:
    """Of abstract, placed arrays, the largest part that one device has; on_host: in its host's memory."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if (getattr(sharding, "memory_kind", None) == "pinned_host") != on_host:
            continue
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        total += math.prod(shape) * (8 if key else leaf.dtype.itemsize)
    return total


def _asked_for(line: str) -> int:
    """Bytes that a compiler wanted for temporaries, by its message."""
    found = re.search(r"(?:temporaries \(|[Uu]sed |required[^\d]*?)([\d.]+)([KMGT]?)i?B?\b", line)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0
