"""The only training loop: a loss, batches, and a state that survives a kill.

`fit` serves pre-training, distillation, fine-tuning and RL; a stage differs in its loss, its frozen
parameters and where its batches come from. Losses and metrics are sums with weights, divided once per
step by the global weight, so that neither micro-batches nor hosts change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nemojax.arch import ArchSpec
from nemojax.backends.kernels import jit
from nemojax.backends.speed import Clock
from nemojax.buckets import copy_file, files_below, is_bucket, place
from nemojax.checkpoints import training
from nemojax.checkpoints.artifact import Checkpoints
from nemojax.checkpoints.training import TrainState, init_state
from nemojax.config import field
from nemojax.data.reading import SourceUnavailable
from nemojax.hosts import Preempted, Sigterm, is_primary
from nemojax.log import RunLog
from nemojax.losses.divergence import Head, vocab_loss
from nemojax.model import llama
from nemojax.model.llama import Compute, Params
from nemojax.optim import OptimConfig, make_optimizer, make_schedule
from nemojax.sharding import on_devices, place_batch, platform, readers, use_mesh

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (weighted sum, weight)


class LossFn(Protocol):
    """(loss summed over tokens, their weight, metrics) of a batch; `frozen` holds what is not trained.

    In training, batch["step"] (i32) is the number of optimiser steps before this one, for scheduled losses.
    """

    def __call__(
        self, params: Params, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics]: ...


class Batches(Protocol):
    """An endless iterator of batch dicts whose position can be saved and restored."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...
    def __next__(self) -> dict[str, np.ndarray]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class FitConfig:
    steps: int = field(1000, "optimiser steps")
    accumulate: int = field(1, "micro-batches a step; the result equals the large batch's")
    log_every: int = field(10, "steps between lines of metrics.jsonl")
    checkpoint_every: int = field(0, "steps between checkpoints; 0 saves at the end only")
    eval_every: int = field(0, "steps between validations; 0 validates at the end only")
    keep_last: int = field(2, "newest checkpoints kept")
    keep_best: str = field("", "metric whose best checkpoint is kept too, as validation/loss:min")
    on_nonfinite: Literal["stop", "skip"] = field("stop", "a step whose loss or gradient is not finite")
    ema_decay: float = field(0.0, "decay of the exponential moving average of the weights; 0 keeps none")
    profile_steps: str = field("", "first:last step of a profiler trace, as 10:13")
    zero1: bool = field(False, "optimiser moments are split over the data axis of the mesh too (ZeRO-1)")
    offload: bool = field(False, "optimiser moments lie in host memory, and visit the devices in each step")

    def __post_init__(self):
        if self.steps < 1 or self.accumulate < 1 or self.log_every < 1:
            raise ValueError("steps, accumulate and log_every: expected at least 1")


def make_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    places: TrainState | None = None,
) -> Callable[[TrainState, Any, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """A pure (state, frozen, batch) -> (state, metrics). A step that is not finite changes no weights.

    places: the shardings of the state where they are more than one device's memory; the step's out_shardings.
    """

    def step(state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]):
        key = jax.random.fold_in(state.key, state.step)
        grads, loss_sum, weight, sums = _gradients(loss_fn, state, frozen, batch, key, accumulate)
        if places is not None:
            grads = jax.lax.with_sharding_constraint(grads, places.params)
            moved = jax.device_put(state.opt_state, on_devices(places.opt_state))
            state = replace(state, opt_state=moved)
        scale = 1.0 / jnp.maximum(weight, 1e-8)
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss_sum) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        state = TrainState(
            state.step + 1,
            keep(params, state.params),
            keep(opt_state, state.opt_state),
            keep(ema, state.ema),
            state.key,
            state.skipped + (~finite).astype(jnp.int32),
        )
        metrics = {name: total / jnp.maximum(w, 1e-8) for name, (total, w) in sums.items()}
        return state, {
            "loss": loss_sum * scale,
            "grad_norm": norm,
            "finite": finite,
            "weight": weight,
        } | metrics

    return step


def _gradients(loss_fn: LossFn, state: TrainState, frozen: Any, batch: Any, key: jax.Array, accumulate: int):
    """Summed gradients, loss, weight and metric sums over the micro-batches of a batch."""

    def objective(p: Params, part: Any, k: jax.Array):
        loss_sum, weight, metrics = loss_fn(p, frozen, {**part, "step": state.step}, k)
        return loss_sum, (weight, metrics)

    grad_fn = jax.value_and_grad(objective, has_aux=True)

    def one(part: Any, k: jax.Array):
        (loss_sum, (weight, metrics)), grads = grad_fn(state.params, part, k)
        return grads, loss_sum, weight, metrics

    if accumulate == 1:
        return one(batch, key)

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % accumulate:
            raise ValueError(f"accumulate: expected a divisor of the {x.shape[0]} rows, got {accumulate}")
        # rows are dealt out in turn, so that every device keeps its own rows
        return jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1)

    parts = jax.tree.map(split, dict(batch))
    keys = jax.random.split(key, accumulate)
    first = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, first, keys[0]))

    def body(total: Any, x: Any):
        return jax.tree.map(jnp.add, total, one(*x)), None

    total, _ = jax.lax.scan(body, zero, (parts, keys))
    return total


def lm_loss(arch: ArchSpec, compute: Compute = Compute(), *, chunk: int = 0, z_loss: float = 0.0) -> LossFn:
    """Next-token cross-entropy of a packed batch, plus z_loss * log(Z)^2 (PaLM, arXiv:2204.02311, section 5).

    `chunk` positions of a row have logits at once; 0: all.
    """
    coefficients = {"lm": 1.0, "z": z_loss} if z_loss else {"lm": 1.0}

    def loss_fn(params: Params, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        h_BTD, _ = llama.hidden(params, arch, batch, compute=compute)
        outer = Head(llama.final_norm(params, arch, h_BTD), llama.head_weight(params))
        weights_BT = batch["weights"]
        loss, sums = vocab_loss(outer, (), coefficients, weights_BT, targets_BT=batch["targets"], chunk=chunk)
        weight = jnp.sum(weights_BT)
        return loss, weight, {"nll": (sums["lm"], weight)}

    return loss_fn


def fit(
    params: Params,
    loss_fn: LossFn,
    batches: Any,
    *,
    arch: ArchSpec,
    optim: OptimConfig,
    cfg: FitConfig,
    workdir: str | Path,
    frozen: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    evaluate: Callable[[Params], dict[str, float]] | None = None,
    seed: int = 0,
    first: int = 0,
    moments: str | Path | None = None,
) -> Params:
    """Trains to step `cfg.steps`, resuming from the newest checkpoint of `workdir`; returns the parameters.

    first: the step at which this phase of a longer training begins, with the weights of checkpoint `first`
    of `workdir`, a schedule and data of its own; the phase before ended there. moments: the artifact whose
    optimiser goes on where the phase begins, `workdir` for that of the phase before; None: a fresh one.

    Raises ValueError when a step is not finite (with the step and the last good checkpoint) and
    `Preempted` (exit code 75) after SIGTERM, with everything saved. A source that cannot be read any more
    (`SourceUnavailable`) also stops it with everything saved, but for several processes.
    """
    workdir = place(workdir)
    best = _of_phase(cfg.keep_best, first) if cfg.keep_best else None
    with use_mesh(mesh):
        tx = make_optimizer(optim, cfg.steps - first)
        key = jax.random.key(seed)
        state = init_state(params, tx, key, cfg.ema_decay > 0, zero1=cfg.zero1, offload=cfg.offload)
        del params
        checkpoints = Checkpoints(workdir, keep_last=cfg.keep_last, best=best, arch=arch)
        newest = checkpoints.latest()
        if newest is not None and (newest > first or not first):
            state = training.resume(checkpoints, newest, state, batches)
        else:
            state = training.enter_phase(checkpoints, first, state, moments)
        schedule = make_schedule(optim, cfg.steps - first)
        loop = _Loop(
            loss_fn, tx, schedule, state, batches, frozen, cfg, workdir, mesh, evaluate, checkpoints, first
        )
        return loop.run(Clock(arch, readers(mesh)[1]))


@dataclass
class _Loop:
    loss_fn: LossFn
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    state: TrainState
    batches: Any
    frozen: Any
    cfg: FitConfig
    workdir: Path
    mesh: jax.sharding.Mesh | None
    evaluate: Callable[[Params], dict[str, float]] | None
    checkpoints: Checkpoints
    first: int

    def run(self, clock: Clock) -> Params:
        done = int(self.state.step)
        if hasattr(self.batches, "bind"):  # RL: batches are sampled from the current weights
            self.batches.bind(lambda: self.state.params)
        places = self._places()
        step_fn = jit(platform, donate_argnums=0, out_shardings=(places, None))(
            make_step(self.loss_fn, self.tx, self.cfg.accumulate, self.cfg.ema_decay, places)
        )
        profiler = _Profiler(self.cfg.profile_steps, self.workdir)
        log = RunLog(self.workdir, total_steps=self.cfg.steps) if is_primary() else _NoLog()
        log.truncate(done)
        pending: tuple[int, dict[str, jax.Array], list[Any]] | None = None
        # the last save is waited for while SIGTERM is still heard: a second one does not break it off
        with Sigterm() as sigterm, closing(self.checkpoints), closing(log), profiler:
            for step in range(done + 1, self.cfg.steps + 1):
                profiler.at(step)
                batch = self._draw(clock, step, pending)
                self.state, metrics = step_fn(self.state, self.frozen, batch)
                # one step late: the host does not wait for the step that it has just started
                self._check_finite(pending)
                pending = (step, metrics, list(getattr(self.batches, "ids", [])))
                if step % self.cfg.log_every == 0 or step in (done + 1, self.cfg.steps):
                    log.write(step, self._values(step, metrics) | clock.report())
                stop = sigterm.stops_here()
                if self._is_due(step, stop):
                    self._check_finite(pending)  # a bad step is never saved as a good one
                    self._validate_and_save(step, log, stop)
                if stop:
                    raise Preempted(step)
            self._check_finite(pending)
        return self.state.ema if self.state.ema is not None else self.state.params

    def _draw(self, clock: Clock, step: int, pending: Any) -> dict[str, jax.Array]:
        """The next batch. Where a source stays away, what was trained so far is saved and the run stops."""
        try:
            return place_batch(clock.draw(self.batches), self.mesh)
        except SourceUnavailable:
            # several processes could only save together, and the others are in the middle of a step
            if jax.process_count() == 1:
                self._check_finite(pending)
                self.checkpoints.wait()
                if step - 1 > (self.checkpoints.latest() or 0):
                    training.save(self.checkpoints, step - 1, self.state, self.batches, {})
            raise

    def _values(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
        values = {f"train/{name}": float(value) for name, value in metrics.items() if name != "finite"}
        values["train/lr"] = float(jnp.asarray(self.schedule(step - 1 - self.first)))
        return values | {"train/skipped": int(self.state.skipped)} | getattr(self.batches, "metrics", {})

    def _places(self) -> Any:
        """The state stays where it is: left to choose, XLA moves it, and compiles the step once more."""
        several = (self.mesh is not None and self.mesh.size > 1) or self.cfg.offload
        return jax.tree.map(lambda x: x.sharding, self.state) if several else None

    def _is_due(self, step: int, preempted: bool) -> bool:
        every = (self.cfg.checkpoint_every, self.cfg.eval_every)
        return preempted or step == self.cfg.steps or any(n and step % n == 0 for n in every)

    def _check_finite(self, pending: tuple[int, dict[str, jax.Array], list[Any]] | None) -> None:
        if pending is None or self.cfg.on_nonfinite == "skip" or bool(pending[1]["finite"]):
            return
        step, metrics, ids = pending
        self.checkpoints.wait()
        good = self.checkpoints.latest()
        raise ValueError(
            f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}"
            " not finite"
            + (f"; batch {', '.join(map(str, ids[:8]))}" if ids else "")
            + (f"; last good checkpoint is step {good}" if good is not None else "; no checkpoint yet")
            + "; lower the learning rate or set on_nonfinite to skip"
        )

    def _validate_and_save(self, step: int, log: RunLog | _NoLog, preempted: bool) -> None:
        cfg, last = self.cfg, step == self.cfg.steps
        scores: dict[str, float] = {}
        if self.evaluate and (last or (cfg.eval_every and step % cfg.eval_every == 0)):
            weights = self.state.ema if self.state.ema is not None else self.state.params
            scores = {f"validation/{k}": v for k, v in self.evaluate(weights).items()}
            if scores:
                log.write(step, scores)
        if last or preempted or (cfg.checkpoint_every and step % cfg.checkpoint_every == 0):
            scores = {_of_phase(name, self.first): score for name, score in scores.items()}
            log.flush()  # a checkpoint is not further than what is said about the way to it
            training.save(self.checkpoints, step, self.state, self.batches, scores)


def _of_phase(metric: str, first: int) -> str:
    """A metric's name in checkpoints: a phase's best is one of its own, as only these compare."""
    name, colon, mode = metric.partition(":")
    return f"{name}@{first}{colon}{mode}" if first else metric


class _NoLog:
    """The log of a process that keeps no books."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def truncate(self, step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class _Profiler:
    """Writes a trace of steps first:last to workdir/profile; in a bucket it arrives as a whole."""

    def __init__(self, steps: str, workdir: Path):
        self.first, self.last, self.dir = -1, -1, workdir / "profile"
        self.running, self.held = False, TemporaryDirectory() if is_bucket(workdir) and steps else None
        if steps:
            try:
                self.first, self.last = (int(s) for s in steps.split(":"))
            except ValueError:
                raise ValueError(f"profile_steps: expected first:last such as 10:13, got {steps!r}") from None

    def at(self, step: int) -> None:
        if step == self.first:
            jax.profiler.start_trace(self.held.name if self.held else str(self.dir))
            self.running = True
        elif self.running and step > self.last:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self.running = False
        if self.held:
            for file in files_below(Path(self.held.name)):
                copy_file(file, self.dir / file.relative_to(self.held.name))

    def __enter__(self) -> _Profiler:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.running:
            self._stop()
        if self.held:
            self.held.cleanup()
