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
from nemojax.backends.speed import flops_per_token
from nemojax.checkpoints import training
from nemojax.checkpoints.artifact import Checkpoints, save_params
from nemojax.data.reading import SourceUnavailable
from nemojax.hosts import Preempted, Sigterm
from nemojax.model import llama
from nemojax.optim import OptimConfig, make_optimizer, make_schedule, restart_schedule
from nemojax.train import FitConfig, fit, init_state, lm_loss, make_step

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


def distance(params, frozen, batch, key):
    """Of three weights to the mean token of a batch."""
    target, weight = jnp.mean(batch["tokens"].astype(jnp.float32)) / 32, jnp.sum(batch["weights"])
    return weight * jnp.sum((params["w"] - target) ** 2), weight, {}


def run_small(workdir, last, batches, first=0, moments=None, lr=1e-2, **more):
    settings: dict[str, Any] = {"log_every": 1, "checkpoint_every": 2} | more
    cfg = FitConfig(steps=last, **settings)
    optim = OptimConfig(lr=lr, warmup_steps=1)
    start = {"w": jnp.arange(3.0)}
    fixed: dict[str, Any] = {"arch": ARCH, "optim": optim, "cfg": cfg, "workdir": workdir}
    return fit(start, distance, batches, **fixed, first=first, moments=moments)


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

    def by_hand(p):
        z = jax.nn.logsumexp(llama.apply(p, ARCH, batch)[0], -1) ** 2
        return loss(p) + 0.1 * jnp.sum(z * batch["weights"])

    def loss(p, **how):
        return lm_loss(ARCH, **how)(p, None, batch, jax.random.key(0))[0]

    got, expected = jax.grad(lambda p: loss(p, z_loss=0.1, chunk=3))(params()), jax.grad(by_hand)(params())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


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
        run_small(tmp_path, 6, RandomBatches(poison=4))
    assert "\n" not in str(error.value)


def test_a_bad_step_can_be_skipped_and_is_counted(tmp_path):
    end = run_small(tmp_path, 6, RandomBatches(poison=4), on_nonfinite="skip")
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(end))
    assert [row["train/skipped"] for row in lines(tmp_path) if "train/skipped" in row] == [0, 0, 0, 1, 1, 1]


def test_the_log_says_how_much_of_the_time_waited_for_data(tmp_path):
    class Slow(RandomBatches):
        def __next__(self):
            time.sleep(0.1)
            return super().__next__()

    run_small(tmp_path, 6, Slow(), log_every=3)
    waits = [row["performance/data_wait"] for row in lines(tmp_path) if "performance/data_wait" in row]
    assert len(waits) == 3 and all(0 < wait <= 1 for wait in waits) and waits[-1] > 0.5


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


def test_a_checkpoint_without_its_place_in_the_data_is_not_resumed(tmp_path):
    checkpoints = Checkpoints(tmp_path, arch=ARCH)
    checkpoints.save(3, params())
    checkpoints.close()
    with pytest.raises(
        ValueError, match="checkpoint 3: expected the position in the data, got none; .*choose"
    ):
        run(tmp_path)


class Flaky(RandomBatches):
    """Away when batch `away` is asked for."""

    def __init__(self, away):
        super().__init__()
        self.away = away

    def __next__(self):
        if self.number + 1 == self.away:
            raise SourceUnavailable("source web: expected to read it, got 503")
        return super().__next__()


@pytest.mark.parametrize("away", [1, 3, 4])
def test_a_source_that_stays_away_stops_a_run_that_goes_on_later(tmp_path, away):
    with pytest.raises(SourceUnavailable, match="web"):
        run_small(tmp_path / "stopped", 5, Flaky(away), checkpoint_every=2)
    checkpoints = Checkpoints(tmp_path / "stopped", arch=ARCH)
    assert checkpoints.latest() == (away - 1 or None)
    checkpoints.close()
    resumed = run_small(tmp_path / "stopped", 5, RandomBatches(), checkpoint_every=2)
    assert same(resumed, run_small(tmp_path / "whole", 5, RandomBatches(), checkpoint_every=2))
    assert [line["step"] for line in lines(tmp_path / "stopped")] == [1, 2, 3, 4, 5]


def test_average_of_the_weights_is_what_is_returned_and_resumed(tmp_path):
    average = run_small(tmp_path / "a", 6, RandomBatches(), ema_decay=0.5)
    assert not same(average, run_small(tmp_path / "b", 6, RandomBatches()))
    again = run_small(tmp_path / "a", 6, RandomBatches(), ema_decay=0.5)
    assert same(again, average)  # a finished run restores


@pytest.mark.parametrize("number", [2, 5], ids=["in the middle", "in the last step"])
def test_sigterm_saves_and_exits_75(tmp_path, number):
    class Terminated(RandomBatches):
        def __next__(self):
            if self.number == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    with pytest.raises(Preempted) as stop:
        run_small(tmp_path, 6, Terminated())
    assert (stop.value.code, stop.value.step) == (75, number + 1)
    assert Checkpoints(tmp_path).latest() == number + 1
    whole = run_small(tmp_path / "whole", 6, RandomBatches())
    assert same(run_small(tmp_path, 6, RandomBatches()), whole)


def run_phases(workdir, kill=None, ema=0.0):
    """Three phases of three steps, with data and learning rates of their own; `kill` is a step."""

    class Killed(RandomBatches):
        def __next__(self):
            if 1000 * number + self.number == (None if kill is None else 1000 * (kill // 3) + kill % 3):
                raise KeyboardInterrupt
            return super().__next__()

    weights = None
    done = Checkpoints(workdir).latest() or 0
    for number, moments in enumerate((None, workdir, None)):
        first = 3 * number
        if done < first + 3:
            batches = Killed(rows=2 + number)
            weights = run_small(
                workdir, first + 3, batches, first, moments, 0.1 / (1 + number), ema_decay=ema
            )
    return weights


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_phases_killed_anywhere_end_in_the_same_bits(tmp_path, ema):
    whole = run_phases(tmp_path / "whole", ema=ema)
    rates = [row["train/lr"] for row in lines(tmp_path / "whole")]
    for number in range(3):  # in each phase the warm-up begins again
        schedule: Any = make_schedule(OptimConfig(lr=0.1 / (1 + number), warmup_steps=1), 3)
        assert rates[3 * number : 3 * number + 3] == [float(schedule(step)) for step in range(3)]
    for kill in (1, 3, 5, 6):  # steps that are done; 3 and 6 are boundaries
        with pytest.raises(KeyboardInterrupt):
            run_phases(tmp_path / str(kill), kill, ema)
        assert same(run_phases(tmp_path / str(kill), ema=ema), whole)
        rows = lines(tmp_path / str(kill))
        assert [row["step"] for row in rows] == list(range(1, 10))
        assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in lines(tmp_path / "whole")]


def test_the_best_checkpoint_of_a_phase_is_one_of_its_own(tmp_path):
    """A phase's losses are of other rows: an earlier phase's best one is dropped, whatever it had."""
    losses = iter([0.5, 1.0, 1.0, 3.0, 2.0, 2.5, 2.6])

    def evaluate(_):
        return {"loss": next(losses)}

    for first, last in ((0, 3), (3, 7)):
        optim = OptimConfig()
        cfg = FitConfig(
            steps=last, eval_every=1, checkpoint_every=1, keep_last=1, keep_best="validation/loss:min"
        )
        fixed: dict[str, Any] = {"arch": ARCH, "optim": optim, "cfg": cfg, "workdir": tmp_path}
        fit({"w": jnp.arange(3.0)}, distance, RandomBatches(), **fixed, evaluate=evaluate, first=first)
        assert Checkpoints(tmp_path).steps() == ([1, 3] if last == 3 else [5, 7])


def test_a_signal_that_no_step_has_noticed_is_handed_on():
    heard = []
    old = signal.signal(signal.SIGTERM, lambda *_: heard.append("outside"))
    try:
        with Sigterm() as sigterm:
            assert not sigterm.stops_here()
            signal.raise_signal(signal.SIGTERM)
            assert sigterm.stops_here() and not heard
        assert heard == ["outside"]
        with pytest.raises(Preempted), Sigterm():
            signal.raise_signal(signal.SIGTERM)
            raise Preempted(1)
        assert heard == ["outside"]
    finally:
        signal.signal(signal.SIGTERM, old)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_phase_takes_over_everything_but_data_and_schedule(tmp_path, name):
    tx = make_optimizer(dataclasses.replace(OPTIM, name=name), 10)
    fresh = init_state(params(), tx, jax.random.key(1), ema=True)
    later = dataclasses.replace(
        fresh,
        step=jnp.int32(3),
        skipped=jnp.int32(1),
        **{
            part: jax.tree.map(lambda x: x + 2, getattr(fresh, part))
            for part in ("params", "ema", "opt_state")
        },
    )
    checkpoints = Checkpoints(tmp_path, arch=ARCH)
    training.save(checkpoints, 3, later, RandomBatches(), {})
    checkpoints.wait()
    expected = jax.tree.map(np.array, (later.params, later.ema, restart_schedule(later.opt_state)))
    counts = [leaf for leaf in jax.tree.leaves(expected[2]) if leaf.shape == ()]
    assert sorted({int(count) for count in counts}) == [0, 2]  # of the schedule, of the moments
    for moments, opt_state in ((tmp_path, expected[2]), (None, tx.init(params()))):
        state = init_state(params(), tx, jax.random.key(1), ema=True)
        state = training.enter_phase(checkpoints, 3, state, moments)
        assert (int(state.step), int(state.skipped)) == (3, 1)
        assert same(state.params, expected[0]) and same(state.ema, expected[1])
        assert same(state.opt_state, opt_state)
    checkpoints.close()


def test_only_the_state_of_the_same_optimiser_is_carried(tmp_path):
    adamw, muon = (make_optimizer(dataclasses.replace(OPTIM, name=name), 1) for name in ("adamw", "muon"))
    save_params(tmp_path / "weights", ARCH, params())
    with pytest.raises(
        ValueError, match="weights: expected the optimiser .*, got weights alone; choose .* fresh"
    ):
        training.moments_reader(tmp_path / "weights", adamw.init(params()), ARCH)
    checkpoints = Checkpoints(tmp_path / "run", arch=ARCH)
    state = init_state(params(), adamw, jax.random.key(0))
    training.save(checkpoints, 1, state, RandomBatches(), {})
    checkpoints.close()
    with pytest.raises(
        ValueError, match="opt_state/1/.*expected shape .*, got None; .*choose optimizer fresh"
    ):
        training.moments_reader(tmp_path / "run", jax.eval_shape(muon.init, params()), ARCH)
    wider = uniform(
        vocab_size=32, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_width=48, context=16
    )
    other = jax.eval_shape(adamw.init, llama.abstract_params(wider))
    with pytest.raises(ValueError, match=r"layers/0/ffn/.*expected shape \(.*48.*\), got \(.*32.*\)"):
        training.moments_reader(tmp_path / "run", other, wider)


def test_profile_writes_a_trace(tmp_path):
    run(tmp_path, FitConfig(steps=4, log_every=1, profile_steps="2:3"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_flops_are_six_for_each_weight_plus_causal_attention():
    length = 16
    attention = 2 * 6 * ARCH.num_heads * ARCH.head_dim * length  # QK and PV, half of them masked
    expected = 6 * (ARCH.num_block_params() + 32 * 16) + attention
    assert flops_per_token(ARCH, length) == pytest.approx(expected)
