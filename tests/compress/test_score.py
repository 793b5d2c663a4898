"""Scores: every metric against whole models, on every kind of parent, on devices, resumed, and counted."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU
from nemojax.compress.assemble import assemble, child_arch
from nemojax.compress.measures import MEANINGS, answer_batches
from nemojax.compress.score import TOGETHER, Scoring, score, score_all, score_into
from nemojax.data.problems import make_problems
from nemojax.data.tokenizer import train_tokenizer
from nemojax.model.llama import init_params, param_shardings
from nemojax.sharding import MeshConfig, make_mesh
from tests.compress.made import Made
from tests.compress.numpy_model import forward
from tests.compress.programs import compiled
from tests.compress.tiny import ARCH, batches
from tests.environment import QUICK_COMPILATION

ROOT = Path(__file__).parents[2]
FULL = ARCH.blocks[0]
EVERY = tuple(MEANINGS)
MIXED = ARCH.replace(
    vocab_size=64,
    blocks=(
        BlockSpec(NoOp(), SwiGLU(48)),
        FULL,
        BlockSpec(NoOp(), NoOp()),
        BlockSpec(Attention(4, window=5), SwiGLU(32)),
        BlockSpec(Linear(), Linear()),
        FULL,
    ),
)
SHORT = MIXED.replace(blocks=MIXED.blocks[2:5])
TIED = MIXED.replace(tie_embeddings=True, blocks=(MIXED.blocks[1], MIXED.blocks[3]))


def options_of(arch: ArchSpec) -> list[tuple[BlockSpec, ...]]:
    """The parent's block, then smaller ones of every kind."""
    rows = []
    for block in arch.blocks:
        attns = [block.attn] + [Attention(1)] * isinstance(block.attn, Attention) + [NoOp()]
        ffns = [block.ffn] + [SwiGLU(16), Linear()] * isinstance(block.ffn, SwiGLU) + [NoOp()]
        rows.append(tuple(dict.fromkeys(BlockSpec(a, f) for a in attns for f in ffns)))
    return rows


def parent_of(arch: ArchSpec) -> dict:
    return init_params(arch, jax.random.key(0))


def by_hand(parents, weights, child, data) -> dict[str, float]:
    """The metrics as they are defined, in numpy, from two whole models; `parents`: the parent's `forward`."""
    sums, tokens, documents = dict.fromkeys(EVERY, 0.0), 0.0, 0
    for batch, parent in zip(data, parents, strict=True):
        (t, tp), (s, sp) = (
            [np.asarray(a, np.float64) for a in pair] for pair in (parent, forward(weights, child, batch))
        )
        w, targets = batch["weights"], batch["targets"]
        cosine = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
        rise = np.take_along_axis(tp - sp, targets[..., None], -1)[..., 0]
        sums["kl"] += ((np.exp(tp) * (tp - sp)).sum(-1) * w).sum()
        sums["lm_loss"] += (rise * w).sum()
        sums["cosine"] += ((1 - cosine) * w).sum()
        sums["top1"] += ((tp.argmax(-1) != sp.argmax(-1)) * w).sum()
        for row in range(len(w)):
            for segment in range(1, batch["segments"].max() + 1):
                here = (batch["segments"][row] == segment) & (w[row] > 0)
                if here.any():
                    documents += 1
                    right = [(p[row].argmax(-1) == targets[row])[here].all() for p in (tp, sp)]
                    sums["accuracy"] += float(right[0]) - float(right[1])
        tokens += w.sum()
    return {m: v / (documents if m == "accuracy" else tokens) for m, v in sums.items()}


def easy_batches(params, arch, count: int) -> list[dict]:
    """Batches whose targets are often what the parent says, and whose documents have few of them."""
    out = []
    for batch in batches(count, seed=3):
        says = np.asarray(forward(params, arch, batch)[1]).argmax(-1).astype(np.int32)
        rng = np.random.default_rng(len(out))
        keep = rng.random(says.shape) < 0.9
        weights = batch["weights"] * (rng.random(says.shape) < 0.3)
        out.append({**batch, "targets": np.where(keep, says, batch["targets"]), "weights": weights})
    return out


@pytest.mark.parametrize("arch", [MIXED, TIED], ids=["mixed", "tied"])
def test_every_metric_equals_whole_model_replacement(arch):
    whole = BlockSpec(Attention(1), SwiGLU(16))  # trained as one, so its halves are others than alone
    params, library = parent_of(arch), Made(arch, coupled=(whole, BlockSpec(NoOp(), SwiGLU(16))))
    options, data = options_of(arch), easy_batches(params, arch, 2)
    parents = [forward(params, arch, batch) for batch in data]
    got = score_all(params, arch, options, library, data, Scoring("cosine", EVERY))
    seen: dict[str, set] = {metric: set() for metric in EVERY}
    for layer, row in enumerate(options):
        assert got[layer][0] == dict.fromkeys(EVERY, 0.0) and len(got[layer]) == len(row)
        picked = [choice for choice in row[1:] if choice == whole or row.index(choice) % 3 == 1]
        for choice in picked:
            child = child_arch(arch, (*arch.blocks[:layer], choice, *arch.blocks[layer + 1 :]))
            want = by_hand(parents, assemble(params, arch, child, library), child, data)
            values = got[layer][row.index(choice)]
            assert values == pytest.approx(want, abs=1e-5), (layer, choice)
            for metric, value in values.items():
                seen[metric].add(round(value, 4))
    assert all(len(values) > 2 for values in seen.values()), seen
    alone = score_all(params, arch, options, Made(arch), data, Scoring("cosine", EVERY))
    changed = [
        choice
        for before, after, row in zip(got, alone, options, strict=True)
        for a, b, choice in zip(before, after, row, strict=True)
        if a != b
    ]
    assert set(changed) == set(library.coupled)


def test_chunks_and_a_single_metric_change_nothing():
    params, library = parent_of(TIED), Made(TIED)
    options, data = options_of(TIED), easy_batches(params, TIED, 1)
    whole = score_all(params, TIED, options, library, data, Scoring("kl", EVERY))
    pieces = score_all(params, TIED, options, library, data, Scoring("kl", EVERY, chunk=4))
    assert [[pytest.approx(r, abs=1e-6) for r in row] for row in whole] == pieces
    for metric in EVERY:
        one = score(params, TIED, options, library, data, Scoring(metric))
        assert one == [[pytest.approx(r[metric], abs=1e-6) for r in row] for row in whole]


def test_accuracy_is_that_of_greedy_decoding():
    """Documents are a prompt and what the parent says to it; the replaced model decodes by itself."""
    params, library = parent_of(TIED), Made(TIED)
    rng, rows, prompt, new = np.random.default_rng(0), 24, 5, 3
    prompts = rng.integers(0, 64, (rows, prompt))

    def decode(weights, arch):
        text = np.concatenate([prompts, np.zeros((rows, new), int)], axis=1)
        for i in range(prompt, prompt + new):
            text[:, i] = np.asarray(forward(weights, arch, {"tokens": text})[1])[:, i - 1].argmax(-1)
        return text

    reference = decode(params, TIED)
    shape = (rows, prompt + new - 1)
    batch = {
        "tokens": reference[:, :-1],
        "targets": reference[:, 1:],
        "segments": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (rows, 1)),
        "weights": np.tile((np.arange(shape[1]) >= prompt - 1).astype(np.float32), (rows, 1)),
    }
    options = [(TIED.blocks[0],), options_of(TIED)[1]]
    got = score(params, TIED, options, library, [batch], Scoring("accuracy"))
    want = []
    for choice in options[1]:
        child = child_arch(TIED, (TIED.blocks[0], choice))
        text = decode(assemble(params, TIED, child, library), child)
        want.append(1 - (text == reference).all(-1).mean())
    assert got[1] == pytest.approx(want) and 0 < min(want[1:]) < max(want) <= 1


def test_programs_do_not_grow_with_layers():
    counts = {}
    for times in (2, 5):
        # a vocabulary of its own, so that no program is there already
        arch = ARCH.replace(vocab_size=61 + times, blocks=(FULL, BlockSpec(NoOp(), SwiGLU(48))) * times)
        options = options_of(arch)
        params, library = parent_of(arch), Made(arch)
        data = [{**b, "tokens": b["tokens"] % 61, "targets": b["targets"] % 61} for b in batches(2)]
        counts[times] = compiled(
            lambda a=arch, p=params, o=options, lb=library, d=data: score(p, a, o, lb, d)
        )
    assert 5 < counts[2] == counts[5]


def test_a_mesh_of_eight_devices_equals_one():
    params, library = parent_of(SHORT), Made(SHORT)
    options, data = options_of(SHORT), easy_batches(params, SHORT, 2)
    one = score_all(params, SHORT, options, library, data, Scoring("kl", EVERY))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, param_shardings(SHORT, mesh))
    eight = score_all(placed, SHORT, options, library, data, Scoring("kl", EVERY), mesh=mesh)
    for a, b in zip(one, eight, strict=True):
        assert [pytest.approx(r, abs=1e-5) for r in a] == b
    with pytest.raises(ValueError, match="ffn-ffn15/.*mlp = 15 does not divide over tensor = 2"):
        odd = [(b, BlockSpec(NoOp(), SwiGLU(15))) for b in SHORT.blocks[:1]]
        score_all(placed, SHORT, odd, library, data, mesh=mesh)


def test_more_replacements_than_go_together():
    attns, ffns = (FULL.attn, Attention(1), Linear(), NoOp()), (FULL.ffn, SwiGLU(16), Linear(), NoOp())
    changed = [BlockSpec(a, f) for a in attns for f in (*ffns, SwiGLU(24))][1:]
    assert len(changed) > 2 * TOGETHER and len(changed) % TOGETHER
    arch = TIED.replace(blocks=(FULL,))
    params, library, data = parent_of(arch), Made(arch), batches(1)
    [together] = score(params, arch, [[*changed, FULL, changed[0]]], library, data)
    alone = [score(params, arch, [[choice]], library, data)[0][0] for choice in (changed[0], changed[-1])]
    assert [together[0], together[-3]] == pytest.approx(alone, abs=1e-6)
    assert together[-2] == 0 and together[-1] == together[0] and len(set(together)) == len(changed) + 1


def test_scores_on_disk_are_resumed_by_layer(tmp_path, capfd):
    params, library = parent_of(TIED), Made(TIED)
    options, data, path = options_of(TIED), batches(1), tmp_path / "scores.json"
    config = Scoring("kl", ("top1",))
    full = score_into(path, params, TIED, options, library, data, config)
    shown = capfd.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in shown] == ["scores 1/2", "scores 2/2"] and "kl/most" in shown[0]
    stored = json.loads(path.read_text())
    assert [stored["0"], stored["1"]] == full and set(full[0][1]) == {"kl", "top1"}
    stored["0"][1]["kl"] = 7.0
    del stored["1"]
    path.write_text(json.dumps(stored))
    again = score_into(path, params, TIED, options, library, data, config)
    assert again[0][1]["kl"] == 7.0 and again[1] == full[1]
    assert len((tmp_path / "scores" / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(
        ValueError, match="layer 0: expected cosine of 12 choices, got kl, top1 of 12; delete"
    ):
        score_into(path, params, TIED, options, library, data, Scoring("cosine"))
    with pytest.raises(ValueError, match="layer 0: expected kl, top1 of 2 choices, got kl, top1 of 12"):
        score_into(path, params, TIED, [row[:2] for row in options], library, data, config)


@pytest.mark.parametrize("metric", EVERY)
def test_a_score_that_is_not_finite_names_layer_and_metric(metric):
    arch = TIED.replace(blocks=(FULL, FULL))
    broken = Made(arch).load("ffn", SwiGLU(16), 1)
    broken["down"] = np.full_like(broken["down"], np.nan)
    library = Made(arch, ffn_ffn16_1=broken)
    options = [(FULL, BlockSpec(NoOp(), FULL.ffn), BlockSpec(FULL.attn, SwiGLU(16)))] * 2
    with pytest.raises(ValueError, match=rf"layer 1: the {metric} score of .*width=16.* is not finite"):
        score(parent_of(arch), arch, options, library, batches(1), Scoring(metric))


def test_bad_input():
    params, library = parent_of(TIED), Made(TIED)
    silent = [{**batches(1)[0], "weights": np.zeros((4, 16), np.float32)}]
    for data in ([], silent):
        with pytest.raises(ValueError, match="scoring: expected calibration batches with target tokens"):
            score(params, TIED, options_of(TIED), library, data)
    with pytest.raises(
        ValueError, match="expected metrics of kl, lm_loss, cosine, top1, accuracy, got 'mse'"
    ):
        Scoring("mse")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("form", ["chat", "text"])
def test_only_answers_carry_weight(form, tmp_path):
    problems = make_problems("sum2", 5, 0, "train")
    tokenizer = train_tokenizer([p.prompt for p in problems] * 20, 320, tmp_path)
    [batch] = answer_batches(problems, tokenizer, batch_size=4, length=160, form=form)
    asked = {}
    for row in range(4):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = (batch["segments"][row] == segment) & (batch["weights"][row] > 0)
            ids = batch["targets"][row][here]
            assert ids[-1] in tokenizer.special_ids
            question = tokenizer.decode(batch["tokens"][row][batch["segments"][row] == segment])
            asked[next(p for p in problems if p.prompt in question)] = tokenizer.decode(ids).strip()
    assert asked == {problem: problem.answer for problem in problems}
    halves = [
        answer_batches(
            problems, tokenizer, batch_size=4, length=160, form=form, process_index=i, process_count=2
        )[0]
        for i in (0, 1)
    ]
    assert np.array_equal(halves[1]["tokens"], batch["tokens"][1::2]) and len(halves[0]["tokens"]) == 2


# Scores into a file, each process with its rows of the batches.
WORKER = """
import functools, sys
from pathlib import Path
import jax
from nemojax.compress.measures import MEANINGS
from nemojax.compress.score import Scoring, score_into
from nemojax.model.llama import init_params, param_shardings
from nemojax.hosts import start_processes
from nemojax.sharding import make_mesh
from tests.compress.made import Made
from tests.compress.numpy_model import forward
from tests.compress.test_score import SHORT, options_of
from tests.compress.tiny import batches

start_processes()
mesh, me, count = make_mesh(), jax.process_index(), jax.process_count()
make = functools.partial(init_params, SHORT)
params = jax.jit(make, out_shardings=param_shardings(SHORT, mesh))(jax.random.key(0))
data = [{name: rows[me::count] for name, rows in b.items()} for b in batches(2, rows=8)]
scoring = Scoring("kl", tuple(MEANINGS))
score_into(Path(sys.argv[1]), params, SHORT, options_of(SHORT), Made(SHORT), data, scoring, mesh=mesh)
"""


def scored_by(count: int, path: Path) -> tuple[list, list[str]]:
    """(the rows in the file, what each process said on standard error) of `count` processes, 8 devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {
        "XLA_FLAGS": f"{QUICK_COMPILATION} --xla_force_host_platform_device_count={8 // count}",
        "PYTHONPATH": str(ROOT),
    }
    if count > 1:
        shared |= {"NEMOJAX_COORDINATOR": address, "NEMOJAX_NUM_PROCESSES": str(count)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path)],
            env=os.environ | shared | ({"NEMOJAX_PROCESS_ID": str(index)} if count > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    return list(json.loads(path.read_text()).values()), said


@pytest.mark.slow
def test_two_processes_score_as_one_does(tmp_path):
    one, _ = scored_by(1, tmp_path / "one.json")
    two, said = scored_by(2, tmp_path / "two.json")
    for a, b in zip(one, two, strict=True):
        assert [pytest.approx(r, abs=1e-5) for r in a] == b
    assert "two 3/3" in said[0] and "two" not in said[1]
