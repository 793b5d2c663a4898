"""Where the state of a training lies: over the devices of a mesh, and in the memory of their host."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from nemojax.checkpoints.artifact import Checkpoints
from nemojax.model import llama
from nemojax.model.llama import Compute
from nemojax.optim import make_optimizer, restart_schedule
from nemojax.sharding import MeshConfig, make_mesh, place_batch, use_mesh
from nemojax.train import FitConfig, fit, init_state, lm_loss, make_step
from tests.test_train import ARCH, OPTIM, RandomBatches, same

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def placed(mesh: jax.sharding.Mesh | None) -> Any:
    """The same parameters, on the devices of a mesh or on one."""
    places = llama.param_shardings(ARCH, mesh) if mesh is not None else None
    return jax.jit(lambda key: llama.init_params(ARCH, key), out_shardings=places)(jax.random.key(0))


def trained(workdir, mesh=None, compute=Compute(), steps=4, **settings):
    cfg = FitConfig(steps=steps, log_every=1, checkpoint_every=2, **settings)
    fixed: dict[str, Any] = {"arch": ARCH, "optim": OPTIM, "cfg": cfg, "workdir": workdir, "mesh": mesh}
    return fit(placed(mesh), lm_loss(ARCH, compute), RandomBatches(), **fixed)


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    return jax.device_get(trained(tmp_path_factory.mktemp("plainly")))


@pytest.mark.parametrize(
    "settings, remat",
    [({"zero1": True}, "none"), ({"offload": True}, "offload"), ({"zero1": True, "offload": True}, "full")],
)
def test_the_weights_are_the_same_wherever_moments_lie(tmp_path, plainly, settings, remat):
    mesh = make_mesh(MESH)
    there = trained(tmp_path / "mesh", mesh, Compute(remat=remat), **settings)
    close(there, plainly)
    assert jax.tree.map(lambda w: w.sharding, there) == llama.param_shardings(ARCH, mesh)
    # from its checkpoint of step 2 it goes on to the very same weights
    (tmp_path / "mesh" / "checkpoints" / "4").rename(tmp_path / "4")
    assert Checkpoints(tmp_path / "mesh").latest() == 2
    assert same(trained(tmp_path / "mesh", mesh, Compute(remat=remat), **settings), there)


def test_on_one_device_moments_can_lie_on_the_host(tmp_path, plainly):
    assert same(trained(tmp_path / "moments", offload=True), plainly)
    both = trained(tmp_path / "both", None, Compute(remat="offload"), offload=True)
    close(both, plainly)  # what is computed again may round otherwise


@pytest.mark.parametrize("config, parts", [(MESH, 2), (MeshConfig(data=1, fsdp=8), 1), (None, 1)])
def test_where_moments_lie(config, parts):
    """With ZeRO-1 a device has that part of its weights' moments that the data axis leaves it."""
    mesh = make_mesh(config) if config is not None else None
    with use_mesh(mesh):
        params, tx = placed(mesh), make_optimizer(OPTIM, 4)
        state = init_state(params, tx, jax.random.key(1), zero1=True, offload=True)
    first, *_ = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (2, 16, 32)]  # gate
    weight = params["runs"]["000"]["ffn"]["gate"]
    assert first.sharding.memory_kind == "pinned_host" and weight.sharding.memory_kind == "device"
    assert first.addressable_shards[0].data.size * parts == weight.addressable_shards[0].data.size


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_on_a_mesh_the_optimiser_lies_with_its_parameters_and_a_step_compiles_once(name, caplog):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with use_mesh(mesh):
        init = jax.jit(
            lambda key: llama.init_params(ARCH, key), out_shardings=llama.param_shardings(ARCH, mesh)
        )
        tx = make_optimizer(dataclasses.replace(OPTIM, name=name), 10)
        state = init_state(init(jax.random.key(0)), tx, jax.random.key(1), ema=True)
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 2]  # no norms
        assert moments and not any(leaf.sharding.is_fully_replicated for leaf in moments)
        places = jax.tree.map(lambda x: x.sharding, state)
        restarted = restart_schedule(state.opt_state)
        assert jax.tree.map(lambda x: x.sharding, restarted) == places.opt_state
        step = jax.jit(make_step(lm_loss(ARCH), tx, ema_decay=0.9), out_shardings=(places, None))
        batches = RandomBatches()
        with jax.log_compiles():
            for _ in range(3):
                state, _ = step(state, None, place_batch(next(batches), mesh))
    assert sum("XLA compilation of jit(step)" in record.message for record in caplog.records) == 1
