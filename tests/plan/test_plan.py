"""Plans of tiny steps on this machine's eight virtual devices: what they count is what is there."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.backends.topology import Topology, bytes_on_device, open_topology
from nemojax.checkpoints.training import init_state
from nemojax.cli import main
from nemojax.model import llama
from nemojax.optim import OptimConfig, make_optimizer
from nemojax.plan.commands import as_text, table
from nemojax.plan.fitting import estimate, meshes, sweep, what_fits
from nemojax.plan.planner import Plan, make_plan, plan_mesh
from nemojax.plan.programs import STEPS, Training, Work, programs_of
from nemojax.sharding import MeshConfig, place_batch, use_mesh

ARCH = uniform(vocab_size=256, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=64, context=64)
MESH = MeshConfig(fsdp=4, tensor=2)


@pytest.fixture(scope="module")
def here() -> Topology:
    return open_topology("cpu:8")


def work(step: str = "train", **values) -> Work:
    values = {"batch": 8, "context": 32, "teacher": ARCH if step == "distill" else None} | values
    return Work(ARCH, step, **values)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def plan(here) -> Plan:
    return make_plan(work(), here, MESH)


def test_the_program_is_the_one_that_trains(here):
    """Lowered from abstract arguments or from real ones, the text is the same."""
    mesh = plan_mesh(MESH, here)
    with jax.set_mesh(mesh):
        [planned] = programs_of(work(), mesh)
        abstract = planned.jitted.lower(*planned.arguments).as_text()
    shardings = llama.param_shardings(ARCH, mesh)
    params = jax.jit(lambda key: llama.init_params(ARCH, key), out_shardings=shardings)(jax.random.key(0))
    ids = np.ones((8, 32), np.int32)
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), ids)
    with use_mesh(mesh):
        state = init_state(params, make_optimizer(OptimConfig(), 1000), jax.random.key(0))
        rows = place_batch(batch | {"weights": ids.astype(np.float32)}, mesh)
        real = planned.jitted.lower(state, None, rows).as_text()
    assert real == abstract


def test_bytes_are_those_of_the_shards(plan):
    [part] = plan.parts
    counted = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(llama.abstract_params(ARCH)))
    norms = (2 * ARCH.num_layers + 1) * ARCH.dim  # on every device
    assert part.held["parameters"] == ((counted - norms) // 8 + norms) * 4
    assert part.held["optimiser"] == 2 * part.held["parameters"] + 2 * 4
    assert part.held["batch"] == 8 // 4 * 32 * 4 * 5
    held = sum(part.held.values())
    assert held <= part.compiled.arguments <= held + 32
    assert part.bytes == part.compiled.bytes and part.compiled.temporaries > 0
    # the state is updated in place
    assert part.compiled.aliased >= part.held["parameters"] + part.held["optimiser"]


def test_what_is_said_of_a_plan(plan):
    out = plan.to_json()
    assert json.loads(json.dumps(out)) == out
    assert out["fits"] is True and out["bytes_per_device"] == plan.parts[0].bytes
    assert out["hbm_bytes"] == plan.topology.hbm_bytes and out["compile_seconds"] > 0
    assert out["tokens_per_second"] == pytest.approx(8 * 32 / out["step_seconds"])
    assert 0 < out["mfu"] < 1
    axes = {tuple(c["axes"]) for c in out["parts"][0]["collectives"]}
    assert {("fsdp",), ("tensor",)} <= axes
    # nothing goes between both: an activation that a device would hold for all rows
    assert axes <= {("fsdp",), ("tensor",)}, axes
    text = as_text(plan, 1e9, 2.5)
    for word in (
        "parameters",
        "optimiser",
        "all-gather",
        "fits         yes",
        "chip-hours",
        "at 2.5 a chip-hour",
    ):
        assert word in text
    cost = plan.cost(3600 * plan.tokens_per_second, 2.0)
    assert cost == {"tokens": pytest.approx(3600 * plan.tokens_per_second)} | {
        "hours": pytest.approx(1), "chip_hours": pytest.approx(8), "cost": pytest.approx(16)
    }  # fmt: skip


def test_what_would_fit(here, plan):
    """A chip with less room than the plan needs: the change that is named has been compiled, and fits."""
    room = plan.largest.bytes - plan.largest.compiled.temporaries // 10
    small = dataclasses.replace(here, chip=dataclasses.replace(here.chip, hbm_bytes=room))
    tight = dataclasses.replace(plan, topology=small)
    assert not tight.fits and "fits         no, by" in as_text(tight, None, None)
    said: list[str] = []
    found = what_fits(tight, MESH, tries=4, told=said.append)
    assert found is not None and said
    change, other = found
    assert other.fits and other.largest.bytes <= room and change.words in said[-1]
    nothing = dataclasses.replace(here, chip=dataclasses.replace(here.chip, hbm_bytes=1000))
    assert what_fits(dataclasses.replace(plan, topology=nothing), MESH) is None


def test_estimates_scale_with_what_a_device_has(here, plan):
    twice = estimate(work(batch=16), here, MESH, plan) - estimate(work(), here, MESH, plan)
    more = bytes_on_device(programs(here, work(batch=16))) - bytes_on_device(programs(here, work()))
    assert twice == pytest.approx(plan.largest.compiled.temporaries + more)


def programs(here: Topology, what: Work) -> tuple:
    mesh = plan_mesh(MESH, here)
    with jax.set_mesh(mesh):
        return programs_of(what, mesh)[0].arguments


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_its_programs(here, step):
    """They trace, with places for all that is large; their loads and what they hold add up."""
    mesh = plan_mesh(MESH, here)
    what = work(step)
    with jax.set_mesh(mesh):
        found = programs_of(what, mesh)
        for program in found:
            program.jitted.lower(*program.arguments, **program.static)
    for program in found:
        assert program.load.flops > 0 and program.load.bytes > 0 and program.model_flops > 0
        for leaf in jax.tree.leaves((program.held, program.beside)):
            big = np.prod(leaf.shape) > 4 * ARCH.dim
            assert not big or leaf.sharding.shard_shape(leaf.shape) != leaf.shape, leaf
    names = [program.name for program in found]
    assert names[0] == {
        "train": "training step", "distill": "distillation step", "generate": "decoding step",
        "rl": "policy step", "bld": "training step of variants", "score": "layers behind",
    }[step]  # fmt: skip
    if step == "rl":
        assert names[1:] == ["decoding step", "prefill"] and found[1].times == 16
        assert set(found[1].beside) == {"trained weights", "optimiser"}


def test_a_cache_is_counted(here):
    mesh = plan_mesh(MeshConfig(fsdp=4, tensor=2), here)
    with jax.set_mesh(mesh):
        decode, _ = programs_of(work("generate", context=64), mesh)
    assert bytes_on_device(decode.held["cache"]) == ARCH.kv_elements_per_token() * 8 * 64 * 2 // 8
    assert jax.tree.leaves(decode.held["parameters"])[0].dtype == jnp.bfloat16


def test_meshes_stay_within_a_host():
    pod = Topology("h100:16", open_topology("cpu:8").chip, (16,), 1, tuple(range(16)))
    pod = dataclasses.replace(pod, chip=dataclasses.replace(pod.chip, platform="gpu", chips_per_host=8))
    found = meshes(pod)
    assert MeshConfig(fsdp=2, tensor=8) in found and MeshConfig(fsdp=4, tensor=2, context=2) in found
    assert all(m.tensor * m.context <= 8 and m.fsdp * m.tensor * m.context == 16 for m in found)


def test_a_sweep_puts_the_fastest_that_fits_first(here):
    plans = sweep(work(), here, (8,), compiled=2)
    assert len(plans) == 2 and all(p.fits for p in plans)
    assert plans[0].tokens_per_second >= plans[1].tokens_per_second
    assert len(table(plans).splitlines()) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v9:2"], "topology: expected CHIP:SHAPE"),
        (["--topology=cpu:8", "--step=fly"], "--step: expected one of train, distill"),
        (["--topology=cpu:8", "--mesh=fsdp"], "--mesh: expected AXIS:SIZE of .*, got 'fsdp'"),
        (["--topology=cpu:8", "--mesh=fsdp:3"], "mesh: expected axes that multiply to 8 devices"),
        (["--topology=cpu:8", "--step=distill"], "teacher: expected the architecture of a teacher"),
        (["--topology=cpu:8", "--context=999999"], "context: expected at most the model's 131072"),
        (["--topology=cpu:8", "--batch=9", "--context=64"], "batch: expected a multiple of 8"),
        (["--topology=cpu:8", "--terms=kl,foo"], "--terms: expected some of kl, .*, got 'foo'"),
        (["--topology=cpu:8", "--sweep", "--batches=8,a"], "--batches: expected whole numbers.*'8,a'"),
        (["--topology=cpu:8", "--batch=0"], "batch: expected at least 1"),
        (["--topology=cpu:8", "--accumulate=2"], "accumulate: expected a divisor of the batch 1"),
    ],
)
def test_bad_input(capsys, arguments, message):
    assert main(["plan", "--arch=llama_3_2_1b", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("nemojax: ")
    import re

    assert re.search(message, line), line


def test_the_command(tmp_path, capsys):
    path = tmp_path / "arch.json"
    path.write_text(ARCH.dumps())
    arguments = [f"--arch={path}", "--topology=cpu:8", "--mesh=tensor:2", "--batch=8", "--context=32"]
    assert main(["plan", *arguments, "--json", "--tokens=1e6"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["fits"] and out["mesh"]["fsdp"] == 4 and out["cost"]["tokens"] == 1e6
    assert {"bytes_per_device", "hbm_bytes", "step_seconds", "mfu", "compile_seconds"} <= set(out)
    assert Training().weights == "float32"
