"""Blockwise local distillation of a parent of several kinds of layers: in a stack, coupled, killed and begun
again, a window of layers at a time, and on a mesh."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nemojax.arch import Attention, BlockSpec, NoOp, SwiGLU
from nemojax.checkpoints.artifact import save_params
from nemojax.compress import importance
from nemojax.compress import library as lib
from nemojax.compress.bld import Bld, Weights, init_kind, place_stack, train
from nemojax.compress.space import Space, choices
from nemojax.compress.subblock import PARTS
from nemojax.compress.window import Parent
from nemojax.model.llama import param_shardings
from nemojax.optim import OptimConfig
from nemojax.sharding import MeshConfig, make_mesh
from nemojax.stage import locked
from tests.compress.mixed import MIXED, change, mixed_parent
from tests.compress.tiny import batches
from tests.environment import QUICK_COMPILATION
from tests.processes.run import free_address

STEPS = 6
BLD = Bld(steps=STEPS, optim=OptimConfig(lr=3e-3, weight_decay=0.0))
SPACE = Space(kv_heads=(1,), ffn_ratios=(0.5,), multiple=4)
OPTIONS = choices(SPACE, MIXED)
KINDS = lib.kinds_of(OPTIONS, MIXED, ("0-1:-+ffn24", "3:kv1+ffn8"))
DATA = batches(2) * (STEPS // 2)
PAIR = (Attention(1), SwiGLU(8))  # layer 3 has them trained together, too


@pytest.fixture(scope="module")
def params():
    return mixed_parent()


@pytest.fixture(scope="module")
def ranks(params):
    return importance.measure(params, MIXED, batches(1), "magnitude")


@pytest.fixture(scope="module")
def whole(params, ranks, tmp_path_factory):
    """The library of an undisturbed run on one device."""
    return build(params, ranks, tmp_path_factory.mktemp("whole"))


def build(params, ranks, dir, bld=BLD, kinds=KINDS, data=lambda: iter(DATA), mesh=None):
    return lib.build(params, MIXED, kinds, ranks, data, bld, dir, mesh=mesh)


def variants(library):
    """{kind/layer/part/weight, or kind/layer/curve: array} of everything in a library."""
    out = {}
    for kind in KINDS:
        for layer in kind.layers:
            for part, weights in library._weights(kind.part, kind.child, layer).items():
                out |= {f"{kind.name}/{layer}/{part}/{name}": w for name, w in weights.items()}
            out[f"{kind.name}/{layer}/curve"] = library.curve(kind.part, kind.child, layer)
    return out


def check_bits(one, other):
    ours, theirs = variants(one), variants(other)
    assert ours.keys() == theirs.keys()
    assert not [name for name, array in ours.items() if not np.array_equal(array, theirs[name])]


def check_close(one, other, atol=1e-5):
    ours, theirs = variants(one), variants(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], atol=atol, rtol=0, err_msg=name)


def test_every_variant_comes_nearer(whole):
    assert [(k.name, k.layers) for k in KINDS] == [
        ("attn-kv1", (0, 1)),
        ("ffn-ffn12", (0, 1)),
        ("attn-kv1", (3,)),
        ("ffn-ffn8", (3,)),
        ("block-none+ffn24", (0, 1)),
        ("block-kv1+ffn8", (3,)),
    ]
    for name, array in variants(whole).items():
        if name.endswith("curve"):
            assert array.shape == (STEPS,) and array[-2] < array[0] and array[-1] < array[1], name


@pytest.mark.parametrize("index", [1, 2, 4, 5], ids=lambda i: f"{KINDS[i].name}@{KINDS[i].layers[-1]}")
def test_a_variant_in_the_stack_equals_it_alone(params, ranks, whole, index):
    kind = KINDS[index]
    layer = kind.layers[-1]
    alone = dataclasses.replace(kind, layers=(layer,))
    first = init_kind(params, MIXED, alone, ranks)
    if kind.name == "block-kv1+ffn8":  # it starts from its trained parts
        for part, sub in zip(PARTS, PAIR, strict=True):
            first[part] = {name: w[None] for name, w in whole.load(part, sub, layer).items()}
    (trained,), (curve,) = train(params, MIXED, [alone], [first], iter(DATA), BLD)
    stored = whole.load_block(kind.parent, kind.block, layer)
    assert trained.keys() == stored.keys()
    for part, weights in trained.items():
        for name, weight in weights.items():
            np.testing.assert_allclose(weight[0], stored[part][name], atol=1e-5)
    np.testing.assert_allclose(curve[:, 0], whole.curve(kind.part, kind.child, layer), atol=1e-5)


def test_a_coupled_variant_starts_from_its_parts_and_wins(params, ranks, whole, tmp_path):
    untrained = build(params, ranks, tmp_path, dataclasses.replace(BLD, steps=0))
    both = untrained.load_block(MIXED.blocks[3], BlockSpec(*PAIR), 3)
    for part, sub in zip(PARTS, PAIR, strict=True):
        alone = untrained.load(part, sub, 3)
        assert both[part].keys() == alone.keys()
        assert all(np.array_equal(both[part][name], weight) for name, weight in alone.items())
    about = whole.about("block", BlockSpec(*PAIR), 3)
    assert about["start"] == {"attn": "library", "ffn": "library"}
    assert not np.array_equal(
        whole.load("ffn", SwiGLU(8), 3)["up"], variants(whole)["block-kv1+ffn8/3/ffn/up"]
    )
    # the feed-forward is the parent's in shape, yet trained to make up for the attention that is gone
    alone = whole.load_block(MIXED.blocks[0], BlockSpec(NoOp(), SwiGLU(24)), 0)
    assert alone.keys() == {"ffn"} and not np.array_equal(
        alone["ffn"]["up"], params["runs"]["000"]["ffn"]["up"][0]
    )
    # where nothing was trained as a whole: changed parts alone
    assert whole.load_block(MIXED.blocks[0], BlockSpec(NoOp(), SwiGLU(12)), 0).keys() == {"ffn"}
    assert whole.load_block(MIXED.blocks[0], BlockSpec(Attention(1), SwiGLU(24)), 0).keys() == {"attn"}
    assert whole.load_block(MIXED.blocks[0], BlockSpec(NoOp(), NoOp()), 0) == {}
    assert whole.load_block(MIXED.blocks[3], MIXED.blocks[3], 3) == {}


def test_a_variant_that_is_not_finite_stays_alone(params, ranks, whole):
    """Its losses show it and its weights stay; all else is trained as if it were not there."""
    decoupled = [kind for kind in KINDS if kind.part != "block"]
    params = Parent(params, MIXED).params_of(range(MIXED.num_layers))
    first = [init_kind(params, MIXED, kind, ranks) for kind in decoupled]
    first[1]["ffn"]["down"][1] = np.inf
    trained, curves = train(params, MIXED, decoupled, first, iter(DATA), BLD)
    assert not np.isfinite(curves[1][:, 1]).any() and np.isinf(trained[1]["ffn"]["down"][1]).all()
    np.testing.assert_array_equal(trained[1]["ffn"]["up"][1], first[1]["ffn"]["up"][1])
    assert np.array_equal(trained[1]["ffn"]["down"][0], whole.load("ffn", SwiGLU(12), 0)["down"])
    assert np.array_equal(trained[0]["attn"]["q"][1], whole.load("attn", Attention(1), 1)["q"])


def test_a_step_that_is_not_finite_changes_nothing(params, ranks):
    """A token whose embedding is not a number: as if its batch had not been drawn, but for the curves."""
    odd = jax.tree.map(lambda w: w, Parent(params, MIXED).params_of(range(MIXED.num_layers)))
    odd["embed"] = {"weight": odd["embed"]["weight"].at[63].set(np.nan)}
    bad = {**DATA[0], "tokens": np.full_like(DATA[0]["tokens"], 63)}
    decoupled = [kind for kind in KINDS if kind.part != "block"]
    results = []
    for order in ([DATA[0], DATA[1], bad, *DATA[2:5]], [*DATA[:5], bad]):
        first = [init_kind(params, MIXED, kind, ranks) for kind in decoupled]
        results.append(train(odd, MIXED, decoupled, first, iter(order), BLD))
    (early, curves), (late, others) = results
    assert jax.tree.all(jax.tree.map(np.array_equal, early, late))
    for curve, other in zip(curves, others, strict=True):
        assert np.isnan(curve[2]).all() and np.isnan(other[5]).all()
        np.testing.assert_array_equal(np.delete(curve, 2, axis=0), np.delete(other, 5, axis=0))


def test_a_variant_that_never_was_finite_is_named_and_the_others_kept(params, ranks, tmp_path):
    def spoil(tree):
        tree["layers"]["1"]["ffn"]["down"][0] = np.nan

    broken = change(params, MIXED, spoil)
    with pytest.raises(
        ValueError, match=r"attn-kv1 of layer 1, ffn-ffn12 of layer 1, .* finite loss in some of 6"
    ):
        build(broken, ranks, tmp_path)
    library = lib.Library(tmp_path)
    assert library.layers("attn-kv1") == (0,) and library.layers("ffn-ffn12") == (0,)
    assert [p.name for p in (tmp_path / "training").iterdir()] == [".lock"]


class Stored:
    """DATA, once; `seen` is told each batch that is drawn, and when it holds `limit` the run is killed."""

    def __init__(self, seen, limit=None):
        self.at, self.seen, self.limit = 0, seen, limit

    def __iter__(self):
        return self

    def __next__(self):
        if len(self.seen) == self.limit:
            raise KeyboardInterrupt
        if self.at == len(DATA):
            raise StopIteration
        self.seen.append(self.at)
        self.at += 1
        return DATA[self.at - 1]


class Restorable(Stored):
    def state(self):
        return {"at": self.at}

    def restore(self, state):
        self.at = state["at"]


@pytest.mark.parametrize(
    ("source", "drawn"), [(Restorable, [4, 5]), (Stored, list(range(STEPS)))], ids=["restored", "drawn again"]
)
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(params, ranks, whole, tmp_path, source, drawn):
    bld, seen = dataclasses.replace(BLD, checkpoint_every=2), []
    with pytest.raises(KeyboardInterrupt):
        build(params, ranks, tmp_path, bld, data=lambda: source(seen, limit=6))
    assert seen == [0, 0, 1, 2, 3, 4] and not lib.Library(tmp_path).names()
    [state] = (tmp_path / "training").glob("*/checkpoints/4")
    del seen[:]
    library = build(params, ranks, tmp_path, bld, data=lambda: source(seen))
    assert seen == [0, *drawn, *range(STEPS)]  # a look at the first, the rest of the parts, the blocks
    check_bits(library, whole)
    assert not state.exists() and not (tmp_path / "training").exists()


class Slow(Restorable):
    """Long enough from step to step that a signal comes in between."""

    def __next__(self):
        time.sleep(0.5)
        return super().__next__()


def build_slowly(dir: str) -> None:
    """In a process of its own, which makes no checkpoint unless it is stopped."""
    params = mixed_parent()
    ranks = importance.measure(params, MIXED, batches(1), "magnitude")
    build(params, ranks, dir, dataclasses.replace(BLD, checkpoint_every=0), data=lambda: Slow([]))


@pytest.mark.slow
def test_sigterm_saves_exits_with_75_and_it_goes_on_to_the_same_bits(params, ranks, whole, tmp_path):
    code = "import sys; from tests.compress import test_bld; test_bld.build_slowly(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as process:
        end = time.monotonic() + 240
        while not any(p.read_text().count("\n") >= 2 for p in tmp_path.glob("log/*/metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 75 and not lib.Library(tmp_path).names()
    [state] = (tmp_path / "training").glob("*/checkpoints/[0-9]*")
    done, seen = int(state.name), []
    assert 3 <= done < STEPS
    bld = dataclasses.replace(BLD, checkpoint_every=0)
    check_bits(build(params, ranks, tmp_path, bld, data=lambda: Restorable(seen)), whole)
    assert seen == [0, *range(done, STEPS), *range(STEPS)]  # a look, the rest of the parts, the blocks


def test_killed_in_the_middle_of_saving_it_trains_the_same_group_again(
    params, ranks, whole, tmp_path, monkeypatch
):
    save, count = lib.Library.save, 0

    def save_three(*args):
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        save(*args)

    groups = []

    def spy(params, arch, kinds, *args, **kwargs):
        groups.append([kind.name for kind in kinds])
        return train(params, arch, kinds, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lib.Library, "save", save_three)
        build(params, ranks, tmp_path)
    assert lib.Library(tmp_path).layers("ffn-ffn12") == (0,)
    monkeypatch.setattr(lib, "train", spy)
    check_bits(build(params, ranks, tmp_path), whole)
    assert groups == [[k.name for k in KINDS[:4]], [k.name for k in KINDS[4:]]]


def test_a_window_of_layers_at_a_time_gives_the_same(params, ranks, whole, tmp_path, monkeypatch):
    """From an artifact, of which no more than the window is read."""
    save_params(tmp_path / "parent", MIXED, params)
    held = []
    read = Parent.params_of

    def spy(self, window):
        params = read(self, window)
        held.append(sum(jax.tree.leaves(run)[0].shape[0] for run in params["runs"].values()))
        return params

    monkeypatch.setattr(Parent, "params_of", spy)
    bld = dataclasses.replace(BLD, window=3)
    library = build(str(tmp_path / "parent"), ranks, tmp_path / "library", bld)
    assert max(held) == 3 and sum(len(run.layers) for run in MIXED.runs()) == 5
    check_close(library, whole, atol=1e-6)
    with pytest.raises(ValueError, match=r"bld.window: expected 0 .all layers. to 6, got 7"):
        build(params, ranks, tmp_path / "other", dataclasses.replace(BLD, window=7))


def test_the_stream_before_a_window_outlives_a_kill(params, ranks, whole, tmp_path, monkeypatch):
    """Killed in the second window it goes on there, and passes through the first no more."""
    bld, seen = dataclasses.replace(BLD, window=3, checkpoint_every=2), []
    with pytest.raises(KeyboardInterrupt):  # a look, the first window's parts and block, its pass, 5 steps
        build(params, ranks, tmp_path, bld, data=lambda: Restorable(seen, 1 + 3 * STEPS + 5))
    stream = tmp_path / "training" / "stream-001-0.bin"
    assert stream.stat().st_size == STEPS * 4 * 16 * MIXED.dim * 4
    entering = []

    def spy(*args, **kwargs):
        entering.append(str(kwargs["before"].filename))
        return train(*args, **kwargs)

    del seen[:]
    monkeypatch.setattr(lib, "train", spy)
    library = build(params, ranks, tmp_path, bld, data=lambda: Restorable(seen))
    assert seen == [0, 4, 5, *range(STEPS)] and entering == [str(stream)] * 2
    check_close(library, whole, atol=1e-6)


def test_on_a_mesh_it_equals_one_device(params, ranks, whole, tmp_path):
    """Eight devices, in windows too: rows over four of them, heads and channels over two."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, param_shardings(MIXED, mesh))
    built = build(placed, ranks, tmp_path, dataclasses.replace(BLD, window=3), mesh=mesh)
    # Adam divides by the size of a gradient, so where that is small the order of a sum shows: it depends on
    # the kind of CPU, and comes to a hundredth of a step at most
    check_close(built, whole, atol=BLD.optim.lr / 100)
    kind = KINDS[1]
    stack = place_stack(MIXED, kind, init_kind(placed, MIXED, kind, ranks), mesh)
    assert stack["ffn"]["up"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    odd = dataclasses.replace(kind, child=SwiGLU(13))
    weights: Weights = {"ffn": {"up": np.zeros((2, 16, 13), np.float32)}}
    with pytest.raises(ValueError, match=r"ffn-ffn13/ffn/up: mlp = 13 does not divide over tensor = 2"):
        place_stack(MIXED, odd, weights, mesh)


def test_two_runs_do_not_build_one_library_at_once(params, ranks, tmp_path):
    (tmp_path / "training").mkdir()
    bld = dataclasses.replace(BLD, steps=0)
    with locked(tmp_path / "training"), pytest.raises(ValueError, match="training: in use by process"):
        build(params, ranks, tmp_path, bld)
    assert build(params, ranks, tmp_path, bld).has(KINDS[0])


def test_bad_settings(params, ranks, tmp_path):
    with pytest.raises(ValueError, match=r"bld\.optim\.name: expected adamw, got 'muon'"):
        Bld(optim=OptimConfig(name="muon"))
    with pytest.raises(ValueError, match=r"bld\.tokens: expected at least 0, got -1"):
        Bld(tokens=-1)
    budget = Bld(steps=1, tokens=130)
    assert budget.num_steps(DATA[0]) == 3 and Bld(steps=7).num_steps(DATA[0]) == 7
    with pytest.raises(
        ValueError, match=r"bld\.tokens: expected calibration batches, got none; give more data"
    ):
        build(params, ranks, tmp_path, budget, data=lambda: iter([]))


WORKER = """
import sys
from nemojax.hosts import failing_together, start_processes
start_processes()
with failing_together():
    from tests.compress import test_bld
    test_bld.build_in_a_process(sys.argv[1])
"""


def build_in_a_process(dir: str) -> None:
    """One of several processes that share a mesh; each has every second row."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.tree.map(
        lambda w, place: jax.make_array_from_callback(w.shape, place, lambda index: np.asarray(w)[index]),
        mixed_parent(),
        param_shardings(MIXED, mesh),
    )
    index, count = jax.process_index(), jax.process_count()
    mine = [{name: rows[index::count] for name, rows in batch.items()} for batch in DATA]
    ranks = importance.measure(params, MIXED, batches(1), "magnitude")
    bld = dataclasses.replace(BLD, window=3, checkpoint_every=4)
    build(params, ranks, dir, bld, data=lambda: iter(mine), mesh=mesh)


@pytest.mark.slow
def test_two_processes_equal_one(whole, tmp_path):
    shared = {
        "XLA_FLAGS": f"{QUICK_COMPILATION} --xla_force_host_platform_device_count=4",
        "NEMOJAX_COORDINATOR": free_address(),
        "NEMOJAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"NEMOJAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    check_close(lib.Library(tmp_path), whole)
    assert json.loads((tmp_path / "library.json").read_text())["arch"] == MIXED.to_json()
