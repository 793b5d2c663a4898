"""The mesh: which devices stand side by side, the nearest one that works, and where moments lie."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nemojax.arch import uniform
from nemojax.model import llama
from nemojax.optim import OptimConfig, make_optimizer
from nemojax.sharding import (
    AXES,
    MeshConfig,
    logical_sizes,
    make_mesh,
    nearest_mesh,
    place_batch,
    shardings_like,
    shardings_of,
    use_mesh,
)

ARCH = uniform(
    vocab_size=64, dim=24, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=48, context=64, head_dim=8
)
SIZES = {"embed": {24}, "heads": {4}, "kv_heads": {1, 2}, "mlp": {48, 20}, "vocab": {64}}


@dataclasses.dataclass(frozen=True)
class Chip:
    slice_index: int
    process_index: int
    id: int
    platform: str = "tpu"
    device_kind: str = "chip"


def devices(slices: int, hosts: int, chips: int) -> list[Chip]:
    """Of a pod, in the order of their ids, which go across hosts."""
    places = [(s, s * hosts + h) for _ in range(chips) for h in range(hosts) for s in range(slices)]
    return [Chip(*place, id) for id, place in enumerate(places)]


# --- which devices stand side by side


def test_devices_of_a_slice_and_in_it_of_a_process_stand_side_by_side():
    mesh = make_mesh(MeshConfig(slice=2, fsdp=-1, tensor=2), devices(2, 3, 4))
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 6, "context": 1, "tensor": 2}
    for index, group in enumerate(mesh.devices):
        assert {d.slice_index for d in group.flat} == {index}
    for pair in mesh.devices.reshape(-1, 2):
        assert pair[0].process_index == pair[1].process_index
    over_slices = make_mesh(MeshConfig(tensor=4), devices(2, 3, 4)).devices
    assert [d.slice_index for d in over_slices[0, 0, :, 0, 0]] == [0, 0, 0, 1, 1, 1]


def test_devices_of_one_slice_stay_in_the_order_in_which_they_are_given():
    given = jax.devices()[::-1]
    assert [*make_mesh(MeshConfig(), given).devices.flat] == given
    assert make_mesh(MeshConfig(tensor=2)).axis_names == AXES


def test_a_slice_axis_fits_the_slices_there_are():
    for count in (1, 2, 4, 8):
        make_mesh(MeshConfig(slice=count), devices(4, 3, 2))
    with pytest.raises(ValueError, match=r"fits the 4 slices of the devices, got slice=3; choose 4, or 1"):
        make_mesh(MeshConfig(slice=3), devices(4, 3, 2))


def test_only_rows_that_are_shared_or_planned_go_across_processes():
    with pytest.raises(ValueError, match="within the devices of one process, got tensor=8"):
        make_mesh(MeshConfig(tensor=8), devices(1, 2, 4))
    with pytest.raises(ValueError, match="a part or a multiple of the .* devices of a process, got tensor=6"):
        make_mesh(MeshConfig(tensor=6), devices(1, 3, 4), rows="shared")
    assert make_mesh(MeshConfig(tensor=8), devices(1, 4, 4), rows="shared").shape["fsdp"] == 2
    assert make_mesh(MeshConfig(tensor=6), devices(1, 3, 4), rows="none").shape["tensor"] == 6


# --- meshes that do not work


@pytest.mark.parametrize(
    ("asked", "count", "expected"),
    [
        (MeshConfig(tensor=8), 8, MeshConfig(fsdp=2, tensor=4)),  # four heads
        (MeshConfig(fsdp=1, tensor=8), 8, MeshConfig(fsdp=2, tensor=4)),
        (MeshConfig(fsdp=16), 16, MeshConfig(data=2, fsdp=8)),  # a width of 24
        (MeshConfig(fsdp=8, context=2), 16, MeshConfig(fsdp=8, context=2)),
        (MeshConfig(fsdp=1, tensor=3), 12, MeshConfig(fsdp=3, tensor=4)),
        (MeshConfig(fsdp=-1, slice=2, tensor=8), 32, MeshConfig(slice=2, fsdp=4, tensor=4)),
        (MeshConfig(data=-1, fsdp=5), 40, MeshConfig(data=10, fsdp=4)),
    ],
)
def test_the_nearest_mesh_divides_everything(asked, count, expected):
    assert nearest_mesh(asked, SIZES, count) == expected


def test_kv_heads_and_odd_sizes_do_not_stand_in_the_way():
    assert nearest_mesh(MeshConfig(fsdp=1, tensor=4), {"heads": [4], "kv_heads": [1]}, 4).tensor == 4
    assert nearest_mesh(MeshConfig(), {"embed": [7], "vocab": [11]}, 8) == MeshConfig(data=8, fsdp=1)


def test_the_nearest_mesh_of_a_pod():
    sizes = {"embed": [16384], "heads": [128], "mlp": [5376, 10752, 16128, 21504], "vocab": [128256]}
    found = nearest_mesh(MeshConfig(tensor=12), sizes, 4096)
    assert found == MeshConfig(fsdp=256, tensor=16)
    assert nearest_mesh(MeshConfig(fsdp=4096), sizes, 4096) == MeshConfig(fsdp=4096)


def test_a_mesh_that_does_not_multiply_names_the_axis_and_the_nearest():
    message = (
        r"^mesh: expected axes that multiply to 8 devices, got data=1, fsdp=-1, context=1, tensor=3, of "
        r"which tensor cannot divide them; the nearest mesh that does is data=1, fsdp=2, context=1, tensor=4$"
    )
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(tensor=3))
    with pytest.raises(ValueError, match="got data=2, fsdp=2, context=1, tensor=1; the nearest mesh"):
        make_mesh(MeshConfig(data=2, fsdp=2))
    with pytest.raises(
        ValueError, match="which slice cannot divide them; the nearest mesh that does is data"
    ):
        make_mesh(MeshConfig(slice=0))
    with pytest.raises(ValueError, match="at most one axis of -1, got data=-1, fsdp=-1"):
        make_mesh(MeshConfig(data=-1))


def test_a_model_that_does_not_divide_names_weight_axis_and_the_nearest_mesh():
    message = (
        r"^runs/000/attn/\w+: heads = 4 does not divide over tensor = 8; the nearest mesh that works is "
        r"data=1, fsdp=2, context=1, tensor=4$"
    )
    sizes = logical_sizes(llama.logical_axes(ARCH), llama.abstract_params(ARCH))
    assert sizes == {"embed": {24}, "heads": {4}, "kv_heads": {2}, "mlp": {48}, "vocab": {64}}
    with pytest.raises(ValueError, match=message):
        llama.param_shardings(ARCH, make_mesh(MeshConfig(tensor=8)))


# --- optimiser moments


def make_update(tx: optax.GradientTransformation, places: Any) -> Any:
    def loss(params: Any, batch: Any) -> jax.Array:
        h = jax.nn.relu(batch["x"] @ params["up"]) @ params["down"]
        return jnp.mean((h - batch["y"]) ** 2)

    def update(params: Any, moments: Any, batch: Any) -> tuple[Any, Any]:
        grads = jax.lax.with_sharding_constraint(jax.grad(loss)(params, batch), places)
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    return update


def test_moments_are_split_over_data_besides_and_train_to_the_same_weights():
    rng = np.random.default_rng(0)
    data = {name: rng.normal(size=(8, 16)).astype(np.float32) for name in ("x", "y")}
    start = {name: rng.normal(size=shape) for name, shape in (("up", (16, 24)), ("down", (24, 16)))}
    axes = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
    tx = make_optimizer(OptimConfig(lr=1e-2, warmup_steps=0), 4)
    trained = []
    for config, count in (
        (MeshConfig(), 1),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8),
        (MeshConfig(slice=2, data=4, fsdp=1), 8),
    ):
        mesh = make_mesh(config, jax.devices()[:count])
        with use_mesh(mesh):
            arrays = jax.tree.map(lambda x: x.astype(np.float32), start)
            params = jax.device_put(arrays, shardings_of(axes, arrays, mesh))
            places = shardings_like(jax.eval_shape(tx.init, params), params, over_data=True)
            moments = jax.jit(tx.init, out_shardings=places)(params)
            lie = jax.tree.map(lambda x: x.sharding, params)
            step = jax.jit(make_update(tx, lie), out_shardings=(lie, places))
            for _ in range(3):
                params, moments = step(params, moments, place_batch(data, mesh))
        for name in ("mu", "nu"):
            part = bytes_on_a_device(optax.tree.get(moments, name))
            assert part * config.data == bytes_on_a_device(params)
        trained.append(jax.device_get(params))
    for other in trained[1:]:
        for name, weight in trained[0].items():
            np.testing.assert_allclose(other[name], weight, rtol=1e-5, atol=1e-5)
            assert not np.allclose(weight, start[name], atol=1e-3)


def bytes_on_a_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_moments_are_split_where_fsdp_splits_and_never_over_layers():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def place(shape: tuple[int, ...], *spec: str | None) -> PartitionSpec:
        leaf = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
        return shardings_like({"mu": {"w": leaf}}, {"w": leaf}, over_data=True)["mu"]["w"].spec

    assert place((2, 8, 32), None, "fsdp", "tensor") == PartitionSpec(None, ("fsdp", "data"), "tensor")
    assert place((2, 6, 32), None, "fsdp", "tensor") == PartitionSpec(None, "fsdp", ("tensor", "data"))
    assert place((8, 3, 5), None, None, None) == PartitionSpec(None, None, None)
    assert place((8,), None) == PartitionSpec("data")
    assert place((), *()) == PartitionSpec()
    other = jax.ShapeDtypeStruct((3, 4), np.float32)
    leaf = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    assert shardings_like({"w": other}, {"w": leaf}, over_data=True)["w"].spec == PartitionSpec()
    assert shardings_like({"w": leaf}, {"w": leaf})["w"].spec == PartitionSpec("fsdp")
