"""The state of a training, in memory and in the checkpoints of its work directory.

On disk `params` are what later stages read: the average of the weights where one is kept. All else that
resuming needs is `state`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nemojax.arch import ArchSpec
from nemojax.buckets import absolute
from nemojax.checkpoints import store
from nemojax.checkpoints.artifact import Checkpoints, final_step
from nemojax.model.llama import Params
from nemojax.optim import restart_schedule
from nemojax.sharding import shardings_like


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    step: jax.Array
    params: Params
    opt_state: Any
    ema: Any
    key: jax.Array
    skipped: jax.Array


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    key: jax.Array,
    ema: bool = False,
    *,
    zero1: bool = False,
    offload: bool = False,
) -> TrainState:
    """The state before the first step; optimiser moments take the sharding of their parameters.

    zero1, offload: as in `FitConfig`.
    """
    places = shardings_like(jax.eval_shape(tx.init, params), params, over_data=zero1, on_host=offload)
    opt_state = jax.jit(tx.init, out_shardings=places)(params)
    copy = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, copy, key, jnp.zeros((), jnp.int32))


def save(checkpoints: Checkpoints, step: int, state: TrainState, batches: Any, scores: Any) -> None:
    """A checkpoint of `state` after `step`, of the batches' position, and of metrics that rank it."""
    checkpoints.save(step, *_to_save(state), batches.state(), scores)


def resume(checkpoints: Checkpoints, step: int, state: TrainState, batches: Any) -> TrainState:
    """Checkpoint `step` in the shardings of `state`, and `batches` moved to where they stood."""
    if (position := checkpoints.restore_data(step)) is None:
        raise ValueError(
            f"{checkpoints.dir}: checkpoint {step}: expected the position in the data, got none; it is not a "
            "run to resume, so choose another --workdir"
        )
    state = _restore(checkpoints, step, state, *_to_save(state))
    batches.restore(position)
    return state


def enter_phase(
    checkpoints: Checkpoints, first: int, state: TrainState, moments: str | Path | None
) -> TrainState:
    """The state before a phase that begins after step `first`: that of its checkpoint, but for the optimiser.

    moments: the artifact whose optimiser goes on, with its schedule at the beginning; None: that of `state`.
    """
    if moments is not None:
        reader = moments_reader(moments, state.opt_state, checkpoints.arch)
        found = reader.like({"opt_state": _freed(state.opt_state)}, checkpoints.arch)
        state = replace(state, opt_state=restart_schedule(found["opt_state"]))
    if not first:
        return state
    main, rest = _to_save(state)
    return _restore(checkpoints, first, state, main, {k: v for k, v in rest.items() if k != "opt_state"})


def moments_reader(artifact: str | Path, opt_state: Any, arch: ArchSpec | None) -> store.Reader:
    """Reads the training state of an artifact's newest checkpoint.

    ValueError when it has none, or not all that `opt_state` (abstract or not) has.
    """
    path = absolute(artifact) / "checkpoints" / str(final_step(artifact)) / "state"
    if not path.is_dir():
        raise ValueError(
            f"{artifact}: expected the optimiser of its training, got weights alone; choose optimizer fresh"
        )
    reader = store.Reader(path)
    for name, leaf in store.flat_paths({"opt_state": opt_state}).items():
        shape = tuple(leaf.shape)
        if (where := store.split_run(name, arch)) is not None:
            name, shape = f"{where[0]}layers/{where[2][0]}{where[1]}", shape[1:]
        found = reader.leaves.get(name)
        if found is None or found.shape != shape:
            raise ValueError(
                f"{path}: {name}: expected shape {shape}, got {found and found.shape}; it is of another "
                "optimiser or model, so choose optimizer fresh"
            )
    return reader


def _freed(tree: Any) -> Any:
    """Shapes and places of arrays that give their memory back to those that are read in their stead."""

    def one(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        leaf.delete()
        return shape

    return jax.tree.map(one, tree)


def _to_save(state: TrainState) -> tuple[Params, dict[str, Any]]:
    """(what later stages read, all else that resuming needs): with an average, that is what they read."""
    rest = {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped}
    rest["key"] = jax.random.key_data(state.key)
    if state.ema is None:
        return state.params, rest
    return state.ema, rest | {"raw": state.params}


def _restore(checkpoints: Checkpoints, step: int, state: TrainState, main: Params, rest: Any) -> TrainState:
    """`state` with what `main` and `rest` name (see `_to_save`) as checkpoint `step` has it."""
    main, rest = _freed((main, rest))
    main, rest = checkpoints.restore_params(step, main), checkpoints.restore_state(step, rest)
    params, ema = (main, None) if state.ema is None else (rest["raw"], main)
    key = jax.random.wrap_key_data(rest["key"])
    opt_state = rest.get("opt_state", state.opt_state)
    return TrainState(rest["step"], params, opt_state, ema, key, rest["skipped"])
