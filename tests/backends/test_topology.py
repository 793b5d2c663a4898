"""Machines that are not at hand: their names, what their links carry, what is said when one is missing."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from nemojax.backends import topology
from nemojax.backends.chips import load_chip
from nemojax.backends.topology import Topology, compile_for, open_topology
from nemojax.sharding import MeshConfig, make_mesh


def machine(chip: str, *dims: int, slices: int = 1) -> Topology:
    return Topology(chip, load_chip(chip), dims, slices, ())


@pytest.mark.parametrize(
    "where, mesh, axes, links",
    [
        # one side of the torus, its two links
        (machine("v5p", 8, 8, 8), {"fsdp": 64, "tensor": 8}, ("tensor",), 2 * 100e9),
        (machine("v5p", 8, 8, 8), {"fsdp": 64, "tensor": 8}, ("fsdp",), 4 * 100e9),
        (machine("v5p", 8, 8, 8), {"fsdp": 512, "tensor": 1}, ("fsdp",), 6 * 100e9),
        (machine("v6e", 16, 16), {"fsdp": 256, "tensor": 1}, ("fsdp",), 4 * 100e9),
        (machine("v5e", 2, 2), {"fsdp": 2, "tensor": 2}, ("fsdp", "tensor"), 4 * 50e9),
        # two cores of a chip share its links
        (machine("7x", 2, 2, 1), {"fsdp": 2, "tensor": 2}, ("tensor",), 2 * 100e9),
        # inside a host every GPU reaches every other; across hosts each has one adapter
        (machine("h100", 512), {"fsdp": 64, "tensor": 8}, ("tensor",), 450e9),
        (machine("h100", 512), {"fsdp": 64, "tensor": 8}, ("fsdp",), 50e9),
        (machine("h100", 512), {"fsdp": 512, "tensor": 1}, ("fsdp",), 400e9),
        (machine("h100", 4), {"fsdp": 1, "tensor": 4}, ("tensor",), 450e9),
    ],
)
def test_what_a_collective_has(where, mesh, axes, links):
    assert where.bandwidth(axes, mesh) == links


def test_across_slices_there_is_the_network():
    two = machine("v6e", 16, 16, slices=2)
    mesh = {"data": 2, "fsdp": 32, "tensor": 8}
    assert two.bandwidth(("data",), mesh) == load_chip("v6e").network_bandwidth
    assert two.bandwidth(("fsdp",), mesh) == machine("v6e", 16, 16).bandwidth(("fsdp",), mesh)
    # all chips of a slice take part, each with its adapter
    assert two.bandwidth(("data", "fsdp"), mesh) == 32 * load_chip("v6e").network_bandwidth


@pytest.mark.parametrize(
    "name, message",
    [
        ("v9:2x2", "topology: expected CHIP:SHAPE with a chip of .*v5p.*, got 'v9:2x2'"),
        ("v5p", "expected CHIP:SHAPE"),
        ("h100:12", "h100: expected up to 8 GPUs or a multiple of it, got 12"),
        ("h100:2x8", "expected a number of GPUs, such as h100:16"),
        ("cpu:3", "expected cpu:8, the devices of this process"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=message):
        open_topology(name)


@pytest.mark.parametrize(
    "name, module, variable, message",
    [
        ("v5e:2x2", "libtpu", topology.LIBTPU, r"expected libtpu.*libtpu==.*NEMOJAX_LIBTPU=DIR"),
        ("h100:8", "jax_plugins", topology.CUDA_PLUGINS, "jax-cuda12-plugin.*NEMOJAX_CUDA_PLUGINS"),
    ],
)
def test_a_missing_compiler(monkeypatch, name, module, variable, message):
    monkeypatch.delenv(variable, raising=False)
    if importlib.util.find_spec(module) and (module == "libtpu" or _has_cuda()):
        pytest.skip(f"{module} is installed")
    with pytest.raises(ValueError, match=message):
        open_topology(name)


def _has_cuda() -> bool:
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))


def test_a_program_of_the_machine_at_hand():
    here = open_topology("cpu:8")
    mesh = make_mesh(MeshConfig(fsdp=8), here.devices)
    place = jax.NamedSharding(mesh, jax.P("fsdp"))
    x = jax.ShapeDtypeStruct((800, 16), jnp.float32, sharding=place)
    found = compile_for(here, jax.jit(lambda x: x + jnp.sum(x)), x, mesh=mesh)
    assert found.arguments == found.outputs == 100 * 16 * 4 and found.temporaries > 0 and not found.refused
    [one] = found.collectives
    assert (one.kind, one.axes, one.count) == ("all-reduce", ("fsdp",), 1)
    assert here.peak("float32") * 8 == here.chip.peak("float32")
    assert here.bandwidth(("fsdp",), dict(mesh.shape)) == here.hbm_bandwidth


def test_what_a_compiler_asked_for():
    for line, size in (
        (
            "the total memory required for HLO temporaries (33.54G) exceeds available HBM (15.75G).",
            33.54 * 2**30,
        ),
        ("Ran out of memory in memory space hbm. Used 39.95G of 15.75G hbm.", 39.95 * 2**30),
        ("no number", 0),
    ):
        assert topology._asked_for(line) == int(size)


def test_facts_of_a_part_of_a_chip():
    ironwood = machine("7x", 2, 2, 1)
    assert ironwood.hbm_bytes * 2 == ironwood.chip.hbm_bytes and ironwood.num_chips == 4
    assert ironwood.peak("bfloat16") * 2 == 2307e12
    assert dataclasses.replace(ironwood, slices=3).num_chips == 12


def test_a_libtpu_that_is_not_there_or_not_jax_s(monkeypatch, tmp_path):
    monkeypatch.setenv(topology.LIBTPU, str(tmp_path))
    with pytest.raises(ValueError, match=f"NEMOJAX_LIBTPU: expected a folder with libtpu, got {tmp_path}"):
        topology.open_topology("v5e:2x2")
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "libtpu.so").touch()
    (tmp_path / "libtpu-0.0.1.dist-info").mkdir()
    (tmp_path / "libtpu-0.0.1.dist-info" / "METADATA").write_text("Name: libtpu\nVersion: 0.0.1\n")
    with pytest.raises(ValueError, match=r"expected libtpu==.* beside jax .*, got 0\.0\.1; pip install"):
        topology.open_topology("v5e:2x2")
