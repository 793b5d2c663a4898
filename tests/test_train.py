"""The loop: accumulation, schedules, bad steps, averages, and resuming where it stopped."""

import dataclasses
import json
import os
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nemojax.arch import uniform
from nemojax.checkpoints.artifact import Checkpoints
from nemojax.model import llama
from nemojax.optim import OptimConfig, make_optimizer, make_schedule
from nemojax.sharding import MeshConfig, make_mesh, place_batch, use_mesh
from nemojax.train import FitConfig, Preempted, fit, flops_per_token, init_state, lm_loss, make_step

ARCH = uniform(vocab_size=32, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_width=32, context=16)
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2)
QUIET = FitConfig(steps=6, log_every=1, checkpoint_every=2)


class RandomBatches:
    """Batches that depend on their number alone; `poison` is the step whose weights are not finite."""

    def __init__(self, rows=8, length=8, poison=None):
        self.rows, self.length, self.poison, self.number = rows, length, poison, 0
        self.ids = []

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        self.ids = [f"row{i} of batch {self.number}" for i in range(self.rows)]
        rng = np.random.default_rng(self.number)
        tokens = rng.integers(0, 32, (self.rows, self.length + 1)).astype(np.int32)
        weights = (rng.random((self.rows, self.length)) < 0.6).astype(np.float32)
        if self.number == self.poison:
            weights[0, 0] = np.nan
        ones = np.ones((self.rows, self.length), np.int32)
        positions = np.cumsum(ones, 1, dtype=np.int32) - 1
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": weights,
            "segments": ones,
            "positions": positions,
        }

    def state(self):
        return {"number": self.number}

    def restore(self, state):
        self.number = state["number"]


def params():
    return llama.init_params(ARCH, jax.random.key(0))


def run(workdir, cfg=QUIET, batches=None, optim=OPTIM):
    batches = batches or RandomBatches()
    return fit(params(), lm_loss(ARCH), batches, arch=ARCH, optim=optim, cfg=cfg, workdir=workdir)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_equals_the_large_batch(accumulate):
    # rows carry different numbers of counted tokens: only a global weight gives the same mean
    batch, tx = next(RandomBatches()), optax.sgd(1.0)
    outcomes = []
    for parts in (1, accumulate):
        state = init_state(params(), tx, jax.random.key(0))
        state, metrics = jax.jit(make_step(lm_loss(ARCH), tx, parts))(state, None, batch)
        outcomes.append((state.params, metrics["loss"]))
    (whole, loss), (split, other) = outcomes
    assert abs(loss - other) <= 1e-5 * abs(loss)
    start = params()
    for a, b, s in zip(*map(jax.tree.leaves, (whole, split, start)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a - s)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_loss_is_told_how_many_steps_were_taken_before(accumulate):
    def loss_fn(params, frozen, batch, key):
        told = batch["step"].astype(jnp.float32)
        return jnp.sum(params["w"] * told), jnp.float32(1.0), {"told": (told, jnp.float32(1.0))}

    tx = optax.sgd(0.1)
    state = init_state({"w": jnp.ones(())}, tx, jax.random.key(0))
    step = jax.jit(make_step(loss_fn, tx, accumulate))
    for number in range(3):
        state, metrics = step(state, None, next(RandomBatches()))
        assert float(metrics["told"]) == number


def test_z_loss_adds_the_squared_log_normaliser():
    batch = next(RandomBatches())
    plain, weight, _ = lm_loss(ARCH)(params(), None, batch, jax.random.key(0))
    with_z, _, _ = lm_loss(ARCH, z_loss=0.1)(params(), None, batch, jax.random.key(0))
    logits, _ = llama.apply(params(), ARCH, batch)
    expected = 0.1 * jnp.sum(jax.nn.logsumexp(logits, -1) ** 2 * batch["weights"])
    np.testing.assert_allclose(with_z - plain, expected, rtol=1e-4)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    np.testing.assert_allclose(plain, jnp.sum(nll * batch["weights"]), rtol=1e-5)
    assert weight == batch["weights"].sum()


def test_chunked_loss_has_the_same_value_and_gradient():
    batch = next(RandomBatches())

    def value(chunk):
        return jax.value_and_grad(lambda p: lm_loss(ARCH, chunk=chunk)(p, None, batch, jax.random.key(0))[0])(
            params()
        )

    for a, b in zip(jax.tree.leaves(value(0)), jax.tree.leaves(value(2)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_learns_a_fixed_batch(tmp_path, name):
    class Fixed(RandomBatches):
        def __next__(self):
            self.number = 0
            return super().__next__()

    cfg = FitConfig(steps=30, log_every=10)
    optim = OptimConfig(name=name, lr=2e-2, weight_decay=0.0)
    fit(params(), lm_loss(ARCH), Fixed(), arch=ARCH, optim=optim, cfg=cfg, workdir=tmp_path)
    losses = [row["train/loss"] for row in lines(tmp_path)]
    assert losses[0] > 3.0 and losses[-1] < 0.5 * losses[0]


def test_schedules_end_where_they_say():
    base = OptimConfig(lr=1e-2, warmup_steps=10)
    for schedule, last in (("cosine", 1e-3), ("wsd", 1e-3), ("constant", 1e-2)):
        rate: Any = make_schedule(dataclasses.replace(base, schedule=schedule), 100)
        assert 0 < float(rate(0)) < 2e-3
        assert float(rate(10)) == pytest.approx(1e-2)
        assert float(rate(100)) == pytest.approx(last)
    wsd: Any = make_schedule(OptimConfig(lr=1e-2, warmup_steps=10, schedule="wsd", decay_fraction=0.2), 100)
    assert float(wsd(79)) == pytest.approx(1e-2) and float(wsd(90)) < 1e-2


def test_weight_decay_spares_the_norms():
    tx = make_optimizer(OptimConfig(lr=1.0, schedule="constant", weight_decay=0.5), 10)
    start = params()
    updates: Any
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, start), tx.init(start), start)
    assert float(jnp.abs(updates["norm"]["scale"]).max()) == 0
    assert float(jnp.abs(updates["runs"]["000"]["attn"]["norm"]).max()) == 0
    assert float(jnp.abs(updates["runs"]["000"]["ffn"]["up"]).max()) > 0


def test_a_bad_step_stops_with_its_place_and_leaves_a_good_checkpoint(tmp_path):
    with pytest.raises(
        ValueError, match=r"step 4: loss nan.*row0 of batch 4,.*last good checkpoint is step 2"
    ) as error:
        run(tmp_path, batches=RandomBatches(poison=4))
    assert "\n" not in str(error.value)


def test_a_bad_step_can_be_skipped_and_is_counted(tmp_path):
    end = run(tmp_path, FitConfig(steps=6, log_every=1, on_nonfinite="skip"), RandomBatches(poison=4))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(end))
    assert [row["train/skipped"] for row in lines(tmp_path) if "train/skipped" in row] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("ema", "optim"),
    [
        pytest.param(0.0, OPTIM, id="adamw"),
        pytest.param(0.5, dataclasses.replace(OPTIM, name="muon"), id="muon with an average"),
    ],
)
def test_resuming_ends_bit_identical(tmp_path, ema, optim):
    """With an average of the weights both are kept: it is what is returned, the others what is trained."""
    cfg = dataclasses.replace(QUIET, ema_decay=ema)
    whole = run(tmp_path / "whole", cfg, optim=optim)
    batches = RandomBatches()

    class Stop(Exception):
        pass

    class Breaks(RandomBatches):
        def __next__(self):
            if self.number == 5:
                raise Stop
            return super().__next__()

    with pytest.raises(Stop):
        run(tmp_path / "broken", cfg, Breaks(), optim)
    assert Checkpoints(tmp_path / "broken").latest() == 4
    assert same(run(tmp_path / "broken", cfg, batches, optim), whole)
    assert batches.number == 6
    rows = lines(tmp_path / "broken")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    losses = [row["train/loss"] for row in lines(tmp_path / "whole")]
    assert [row["train/loss"] for row in rows] == losses


def test_average_of_the_weights_is_what_is_returned_and_resumed(tmp_path):
    cfg = FitConfig(steps=6, log_every=1, checkpoint_every=3, ema_decay=0.5)
    average = run(tmp_path / "a", cfg)
    assert not same(average, run(tmp_path / "b"))
    assert same(run(tmp_path / "a", cfg), average)  # a finished run restores


def test_sigterm_saves_and_exits_75(tmp_path):
    class Terminated(RandomBatches):
        def __next__(self):
            if self.number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    with pytest.raises(Preempted) as stop:
        run(tmp_path, FitConfig(steps=6, log_every=1), Terminated())
    assert stop.value.code == 75
    whole = run(tmp_path / "whole", FitConfig(steps=6, log_every=1))
    assert same(run(tmp_path, FitConfig(steps=6, log_every=1)), whole)


def test_the_log_says_how_much_of_the_time_waited_for_data(tmp_path):
    class Slow(RandomBatches):
        def __next__(self):
            time.sleep(0.1)
            return super().__next__()

    run(tmp_path, FitConfig(steps=6, log_every=3), Slow())
    waits = [row["performance/data_wait"] for row in lines(tmp_path) if "performance/data_wait" in row]
    assert len(waits) == 3 and all(0 < wait <= 1 for wait in waits)
    assert waits[0] < 0.5 < waits[-1]  # the first line waited for the compiler


def test_profile_writes_a_trace(tmp_path):
    run(tmp_path, FitConfig(steps=4, log_every=1, profile_steps="2:3"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_flops_are_six_for_each_weight_plus_causal_attention():
    length = 16
    attention = 2 * 6 * ARCH.num_heads * ARCH.head_dim * length  # QK and PV, half of them masked
    expected = 6 * (ARCH.num_block_params() + 32 * 16) + attention
    assert flops_per_token(ARCH, length) == pytest.approx(expected)


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
        step = jax.jit(make_step(lm_loss(ARCH), tx, ema_decay=0.9), out_shardings=(places, None))
        batches = RandomBatches()
        with jax.log_compiles():
            for _ in range(3):
                state, _ = step(state, None, place_batch(next(batches), mesh))
    assert sum("XLA compilation of jit(step)" in record.message for record in caplog.records) == 1
