"""Processes, mesh axes, the rules that map logical axes onto them, and shardings for whole trees.

Axes: `data` replicates parameters, `fsdp` shards them (both split the batch), `context` splits the
positions of a row, `tensor` splits heads, feed-forward channels and the vocabulary. "pjit sharding" is
`jax.jit(in_shardings=, out_shardings=)` under `jax.set_mesh` with Auto axes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nemojax.config import field

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")

# logical axis -> mesh axis; an axis that is absent here is never split
RULES: Mapping[str, str | tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "length": "context",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# fewer KV heads than the tensor axis has devices: every device keeps all of them
REPLICATED_WHEN_UNEVEN = frozenset({"kv_heads"})

COORDINATOR, NUM_PROCESSES, PROCESS_ID = (
    "NEMOJAX_COORDINATOR",
    "NEMOJAX_NUM_PROCESSES",
    "NEMOJAX_PROCESS_ID",
)
START_TIMEOUT = "NEMOJAX_START_TIMEOUT"  # seconds that a process waits for the others, 300 by default
HEARTBEAT_SECONDS = 60  # a process that is silent for so long counts as dead, and the others end
SHUTDOWN_SECONDS = 60  # a process that is done waits so long for the others
FAREWELL_SECONDS = 5  # after an error the primary waits so long for others that have failed likewise


def process_arguments(env: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` by the environment; None for a run of one process.

    Several processes are: NEMOJAX_COORDINATOR=HOST:PORT with NEMOJAX_NUM_PROCESSES and NEMOJAX_PROCESS_ID
    (any machine); NEMOJAX_NUM_PROCESSES=auto alone (JAX detects the cluster); a Slurm step of several
    tasks; a TPU pod that lists its workers. ValueError for half of the variables or one that makes no sense.
    """
    given = {name: env[name] for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if env.get(name)}
    if given == {NUM_PROCESSES: "auto"}:
        return {}
    if given:
        return _explicit_arguments(given)
    if (tasks := env.get("SLURM_STEP_NUM_TASKS", "1")) != "1" and tasks.isdigit():
        return {"cluster_detection_method": "slurm"}
    return {} if "," in env.get("TPU_WORKER_HOSTNAMES", "") else None


def _explicit_arguments(given: Mapping[str, str]) -> dict[str, Any] | None:
    if missing := [name for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if name not in given]:
        raise ValueError(
            f"{' and '.join(missing)}: expected a value beside {' and '.join(given)}, got none; "
            "set all three or none of them"
        )
    host, _, port = given[COORDINATOR].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{COORDINATOR}: expected HOST:PORT of process 0, got {given[COORDINATOR]!r}")
    for name in (NUM_PROCESSES, PROCESS_ID):
        if not given[name].isdigit():
            raise ValueError(f"{name}: expected a whole number, got {given[name]!r}")
    count, index = int(given[NUM_PROCESSES]), int(given[PROCESS_ID])
    if index >= count:
        raise ValueError(f"{PROCESS_ID}: expected less than {NUM_PROCESSES} = {count}, got {index}")
    if count == 1:
        return None
    return {
        "coordinator_address": given[COORDINATOR],
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def start_processes() -> None:
    """Joins the other processes when the environment names some; call it before anything uses a device.

    Does nothing for one process, and when called again. ValueError when they cannot be reached in time.
    """
    if jax.distributed.is_initialized() or (arguments := process_arguments(os.environ)) is None:
        return
    limit = os.environ.get(START_TIMEOUT, "300")
    if not limit.isdigit() or int(limit) < 1:
        raise ValueError(f"{START_TIMEOUT}: expected a whole number of seconds, got {limit!r}")
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                **arguments,
                # JAX aborts the process at its own time limit; ours comes first and is an error
                initialization_timeout=int(limit) + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(int(limit))
    who = f"process {arguments['process_id']} of {arguments['num_processes']}" if arguments else "processes"
    where = arguments.get("coordinator_address", "the coordinator that the cluster names")
    if thread.is_alive():
        raise ValueError(
            f"{who}: expected all processes to meet at {where} within {limit} s, got no answer; start them "
            f"all, check address and port, or raise {START_TIMEOUT}"
        )
    if failures:
        raise ValueError(f"{who}: cannot start at {where} ({_line(failures[0])})") from failures[0]


def is_primary() -> bool:
    """Whether this process keeps the books (logs, configurations, small files) of a run."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def on_primary(make: Callable[[], Any]) -> Any:
    """What `make()`, called in the primary process alone, returns there: the same in every process.

    All processes must call this, and none returns before `make` has. With several the value goes through
    JSON. An error of the primary is raised there as it is, and as a ValueError in the others.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return make()
    value, failure = None, None
    if is_primary():
        try:
            value = make()
        except Exception as error:
            failure = error
    told = _broadcast({"value": value, "error": None if failure is None else _line(failure)})
    if failure is not None:
        raise failure
    if told["error"] is not None:
        raise ValueError(f"process 0: {told['error']}")
    return told["value"]


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Work that several processes do together: an error in one of them ends all within seconds.

    JAX would have the process wait for the others at its exit, and abort when they do not come; they
    cannot, for they wait for this one in the middle of a step. So it leaves without them: then they fail.
    """
    try:
        yield
    except Exception as error:
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            lost = isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" in str(error)
            atexit.register(_leave, 2 if lost or isinstance(error, ValueError | OSError) else 1)
            if lost:
                raise ValueError(
                    f"process {jax.process_index()} of {jax.process_count()}: another process has ended "
                    f"({_line(error)[:120]}); its log says why; run again to resume"
                ) from error
        raise


def _leave(code: int) -> None:
    if is_primary():  # the others lose their coordinator when it goes
        time.sleep(FAREWELL_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _broadcast(value: Any) -> Any:
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(text.size)))
    text = text if is_primary() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(broadcast_one_to_all(text)).astype(np.uint8).tobytes())


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class MeshConfig:
    data: int = field(1, "devices along the data axis (parameters replicated)")
    fsdp: int = field(-1, "devices along the fsdp axis (parameters sharded); -1 takes what is left")
    context: int = field(1, "devices along the context axis (positions of a row split)")
    tensor: int = field(1, "devices along the tensor axis (heads, channels and vocabulary split)")


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all). ValueError when the axes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in AXES]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh: expected at most one axis of -1, got {dict(zip(AXES, sizes, strict=True))}")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and known and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh: expected axes that multiply to {len(devices)} devices, got "
            f"{', '.join(f'{n}={s}' for n, s in zip(AXES, sizes, strict=True))}"
        )
    grid = np.asarray(devices).reshape(sizes)
    shared = math.prod(sizes[len(BATCH_AXES) :])
    if any(len({d.process_index for d in group}) > 1 for group in grid.reshape(-1, shared)):
        # every process reads rows of its own, so the devices that share a row must be of one process
        raise ValueError(
            "mesh: expected a context x tensor axis within the devices of one process, got "
            f"tensor={sizes[3]}, context={sizes[2]} over {jax.process_count()} processes of "
            f"{jax.local_device_count()}; choose smaller ones"
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh on which parameters lie; None for one device, or none yet."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def whole_rows(config: MeshConfig, stage: str) -> MeshConfig:
    """The mesh of a stage that reads arrays back column by column; ValueError for one that splits rows."""
    if config.context != 1:
        raise ValueError(
            f"mesh: expected context=1 for {stage}, whose rows stay whole, got {config.context}; give the "
            "devices to fsdp or tensor"
        )
    return config


def partition_spec(
    logical: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, where: str
) -> PartitionSpec:
    """Mesh axes for one array. ValueError when a split dimension does not divide."""
    entries: list[str | tuple[str, ...] | None] = []
    for name, size in zip(logical, shape, strict=True):
        target = RULES.get(name) if name else None
        ways = _ways(target, mesh)
        if ways == 1:
            entries.append(None)
        elif size % ways == 0:
            entries.append(target)
        elif name in REPLICATED_WHEN_UNEVEN:
            entries.append(None)
        else:
            raise ValueError(
                f"{where}: {name} = {size} does not divide over {target} = {ways}; choose another mesh"
            )
    return PartitionSpec(*entries)


def shardings_of(logical: Mapping[str, Any], abstract: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """NamedShardings for a tree of arrays from the equally shaped tree of logical axes."""

    def one(path: Any, axes: tuple[str | None, ...], leaf: Any) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh, where))

    return jax.tree_util.tree_map_with_path(one, logical, abstract, is_leaf=lambda x: isinstance(x, tuple))


def shardings_like(tree: Any, params: Any) -> Any:
    """A sharding for every leaf of a tree that repeats parameters, such as an optimiser state.

    A leaf goes where the parameter does whose path ends its own and whose shape it has, any other leaf to
    all devices. None where the parameters are on no mesh.
    """
    placed = {
        path: leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if isinstance(leaf.sharding, NamedSharding)
    }
    if not placed:
        return None
    replicated = NamedSharding(next(iter(placed.values())).sharding.mesh, PartitionSpec())

    def one(path: tuple, leaf: Any) -> NamedSharding:
        ends = (placed.get(path[i:]) for i in range(len(path)))
        return next((p.sharding for p in ends if p is not None and p.shape == leaf.shape), replicated)

    return jax.tree_util.tree_map_with_path(one, tree)


def ways_of(logical: str) -> int:
    """Over how many devices of the mesh in scope a logical axis is split; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(RULES.get(logical), mesh)


def platform() -> str:
    """Of the machine that a program is for ("cpu", "gpu", "tpu"): the mesh in scope's, else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def spec_of(shape: Sequence[int], *logical: str | None) -> PartitionSpec:
    """Mesh axes of an activation under the mesh in scope; a dimension that does not divide is not split."""
    mesh = jax.sharding.get_abstract_mesh()
    entries = []
    for name, size in zip(logical, shape, strict=True):
        target = RULES.get(name) if name else None
        entries.append(target if target and size % _ways(target, mesh) == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """A sharding constraint on an activation under the mesh in scope; nothing without a mesh.

    A dimension that does not divide is left to the partitioner.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, *logical))


def place_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh | None, *, shared: bool = False
) -> dict[str, jax.Array]:
    """This process's rows onto the devices: rows split over data and fsdp, positions over context.

    Over several devices of a context axis the columns of every array are put in `column_order`, and
    `positions` are added where there are none: with them and the segments, attention knows its way.
    shared: every process holds all the rows, any number of them, and gives its devices theirs.
    ValueError for rows or positions that do not divide.
    """
    if mesh is None or mesh.size == 1:
        return {k: jax.numpy.asarray(v) for k, v in batch.items()}
    rows, ways = len(next(iter(batch.values()))), _ways(BATCH_AXES, mesh)
    over: tuple[str, ...] | None = BATCH_AXES
    if shared and rows % ways:
        over = None
    elif not shared and rows * jax.process_count() % ways:
        raise ValueError(f"batch: expected rows that divide over data x fsdp = {ways} devices, got {rows}")
    length, batch = _in_column_order(batch, mesh)
    placed = {}
    for name, value in batch.items():
        along = (RULES["length"],) if value.ndim > 1 and value.shape[1] == length else ()
        place = NamedSharding(mesh, PartitionSpec(over, *along))
        if shared:
            placed[name] = jax.make_array_from_callback(value.shape, place, value.__getitem__)
        else:
            placed[name] = jax.make_array_from_process_local_data(place, value)
    return placed


def column_order(length: int, ways: int) -> np.ndarray:
    """Which column of a row stands where when `ways` devices share it, [length].

    Device i of n has chunks i and 2n - 1 - i of 2n, equal work for each in causal attention (Llama 3,
    arXiv:2407.21783, section 3.3.2). ValueError for a length that does not divide into them.
    """
    if ways > 1 and length % (2 * ways):
        raise ValueError(
            f"batch: expected rows of a length that divides into {2 * ways} chunks, two for each of the "
            f"{ways} devices of the context axis, got {length}; choose another length or mesh"
        )
    if ways == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * ways, -1)
    return np.stack([chunks[:ways], chunks[: ways - 1 : -1]], axis=1).reshape(-1)


def _in_column_order(
    batch: Mapping[str, np.ndarray], mesh: Mesh
) -> tuple[int | None, Mapping[str, np.ndarray]]:
    """(length of the rows if a context axis splits them, the batch with its columns in order)."""
    ways = _ways(RULES["length"], mesh)
    known = next((batch[name] for name in ("positions", "tokens") if name in batch), None)
    if ways == 1 or known is None:
        return None, batch
    rows, length = known.shape
    order = column_order(length, ways)
    if "positions" not in batch:
        batch = {**batch, "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1))}
    return length, {
        name: value[:, order] if value.ndim > 1 and value.shape[1] == length else value
        for name, value in batch.items()
    }


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """`jax.set_mesh` when there is a mesh of several devices."""
    if mesh is None or mesh.size == 1:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def _ways(target: str | tuple[str, ...] | None, mesh: Any) -> int:
    names = (target,) if isinstance(target, str) else target or ()
    return math.prod(mesh.shape[n] for n in names)
