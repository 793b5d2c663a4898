"""Pre-training on local files, in phases too, and every other stage that reads the same files after it."""

import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from nemojax import cli, pretrain
from nemojax.arch import Llama3Scaling, Rope, load_arch
from nemojax.checkpoints.artifact import load_params
from nemojax.checkpoints.hf import export_hf
from nemojax.config import from_dict
from nemojax.data.heldout import heldout_side
from nemojax.data.tokenizer import Tokenizer, train_tokenizer
from nemojax.log import read_metrics
from nemojax.optim import make_schedule
from nemojax.stage import read_result
from tests.environment import QUICK_COMPILATION

WORDS = "red green blue one two three and or not then".split()
TEXTS = [" ".join(WORDS[i * (j + 1) % 10] for j in range(20)) + f" {i}" for i in range(300)]
DRIVER = """
import json, sys
from nemojax import cli
for arguments in json.loads(sys.argv[1]):
    if code := cli.main(arguments):
        sys.exit(code)
"""
SHAPE = {"dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "ffn_width": 64, "context": 192}


def write_texts(path, texts):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as out:
        out.write("\n\n".join(json.dumps({"text": text}) for text in texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts in three files of one pattern, one of them packed, and chats in two."""
    folder = tmp_path_factory.mktemp("files")
    for number, name in enumerate(("texts-0.jsonl", "texts-1.jsonl", "texts-2.jsonl.gz")):
        write_texts(folder / name, TEXTS[number::3])
    for part in range(2):
        rows = [{"input": f"say {i}", "output": f"{i}"} for i in range(part, 200, 2)]
        (folder / f"chats-{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipes(folder):
    """{stage: its configuration}, all on the same pattern of files."""
    texts = {"name": "words", "kind": "jsonl", "path": str(folder / "texts-*")}
    data = {"sources": [texts], "length": 64, "batch_size": 4, "heldout_batches": 50}
    chats = {"name": "chats", "path": str(folder / "chats-*.jsonl")}
    fit = {"steps": 4, "log_every": 2}
    runs = {name: str(folder / name) for name in ("tokenizer", "pretrain", "compress", "distill")}
    asked = {"problems": {"families": ["sum2x1"], "count": 1}, "thinking": "off", "max_new_tokens": 2}
    return {
        "tokenizer": {"sources": [texts], "vocab_size": 300},
        "pretrain": {"tokenizer": runs["tokenizer"], "shape": SHAPE, "data": data, "fit": fit},
        "compress": {
            "parent": runs["pretrain"],
            "data": data,
            "space": {"kv_heads": [1], "ffn_ratios": [0.5], "multiple": 8},
            "bld": {"steps": 2},
            "scoring": {"batches": 1},
            "cost": {"timings": []},
        },
        "distill": {"student": runs["compress"], "teacher": runs["pretrain"], "data": data, "fit": fit},
        "sft": {"model": runs["distill"], "data": {"sources": [chats], "length": 192}, "fit": fit},
        "evaluate": {
            "models": {"parent": runs["pretrain"], "distilled": runs["distill"]},
            "data": data,
            "tasks": asked,
            "asked": ["distilled"],
            "latency": {"batch": 0},
        },
    }


def commands(folder):
    """The command line of each stage."""
    for name, recipe in recipes(folder).items():
        config = folder / f"{name}.py"
        config.write_text(f"def get_config():\n    return {recipe!r}\n")
        yield name, [name, f"--config={config}", f"--workdir={folder / name}"]


@pytest.mark.slow
def test_every_stage_reads_one_pattern_and_holds_the_same_texts_out(folder):
    lines = dict(commands(folder))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(list(lines.values()))],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": QUICK_COMPILATION},
    )
    assert done.returncode == 0, done.stderr
    for name in ("texts-0.jsonl", "texts-2.jsonl.gz"):  # the count of blank lines reaches the user
        assert f"{folder / name}: skipped 99 blank lines" in done.stderr
    results = {name: read_result(folder / name) for name in lines}

    heldout = [TEXTS[place] for place in heldout_side(TEXTS, 0.02)]
    assert heldout and results["tokenizer"]["documents"] == len(TEXTS) - len(heldout)
    assert results["pretrain"]["heldout"].keys() == {"words", "loss"}
    assert results["sft"]["heldout"].keys() == {"chats", "loss"}
    assert results["sft"]["conversations"]["chats"] < 200
    # the teacher, the parent at its end and the parent in the table are measured on the same texts
    loss = results["pretrain"]["heldout"]["words"]
    assert results["distill"]["heldout_teacher"]["words"] == pytest.approx(loss, rel=1e-5)
    measured = results["evaluate"]["models"]
    assert measured["parent"]["heldout"]["words"] == pytest.approx(loss, rel=1e-5)
    assert measured["distilled"]["heldout"] == pytest.approx(results["distill"]["heldout"], rel=1e-5)

    for name, line in lines.items():
        inputs = json.loads((folder / name / "config.json").read_text())["inputs"]
        kind = "chats" if name == "sft" else "texts"
        read = {os.path.basename(path) for path in inputs if path.endswith(("jsonl", "gz"))}
        assert read == {path.name for path in folder.glob(f"{kind}-*")}, name
        assert cli.main(line) == 0  # done, nothing runs again


def config(tmp_path, sources, **data):
    train_tokenizer(TEXTS[:20], 300, tmp_path / "tokenizer")
    values = {"sources": sources, "length": 64, "batch_size": 8} | data
    recipe = {"tokenizer": str(tmp_path), "shape": SHAPE, "data": values, "fit": {"steps": 2}}
    return from_dict(pretrain.Config, recipe)


@pytest.mark.slow
def test_validation_is_named_or_left_out_for_a_small_source(tmp_path):
    write_texts(tmp_path / "small.jsonl", ["one two", "red green"])
    write_texts(tmp_path / "other.jsonl", ["blue and three", "not one"])
    small, other = (
        {"name": n, "kind": "jsonl", "path": str(tmp_path / f"{n}.jsonl")} for n in ("small", "other")
    )
    with pytest.raises(
        ValueError, match="source small: expected a held-out document .*name a file in data.held"
    ):
        pretrain.run(config(tmp_path, [small]), tmp_path / "a")
    result = pretrain.run(config(tmp_path, [small], heldout=[other]), tmp_path / "b")
    assert result["heldout"].keys() == {"other", "loss"}
    result = pretrain.run(config(tmp_path, [small | {"heldout_share": 0.0}]), tmp_path / "c")
    assert result["heldout"] == {}


# --- phases

SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 64}
SHORT = {"tokens": 3 * 8 * 32 - 5, "length": 32, "optimizer": "carry"}
LONG = {"tokens": 2 * 8 * 256, "length": 256, "lr": 5e-4, "warmup_steps": 1, "optimizer": "carry"}
LONG |= {"context": 256, "rope_theta": 5e5, "rope_scaling": SCALING, "weights": {"a": 0}}


def phased(folder, phases, data=None, fit=None, **changes) -> pretrain.Config:
    sources = [
        {"name": name, "kind": "jsonl", "path": str(folder / f"{name}.jsonl"), "heldout_share": 0.2}
        for name in "ab"
    ]
    recipe = {
        "tokenizer": str(folder),
        "shape": SHAPE | {"context": 64},
        "data": {"sources": sources, "length": 64, "batch_size": 8, "heldout_batches": 1} | (data or {}),
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "fit": {"steps": 2, "log_every": 1, "phases": phases} | (fit or {}),
    }
    return from_dict(pretrain.Config, recipe | changes)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two files and a tokenizer."""
    folder = tmp_path_factory.mktemp("phases")
    train_tokenizer(TEXTS[:20], 300, folder / "tokenizer")
    for number, name in enumerate("ab"):
        write_texts(folder / f"{name}.jsonl", TEXTS[number::2])
    return folder


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({}, "tokens: expected a value, got none"),
        ({"tokens": 0}, "tokens: expected a positive number, got 0"),
        ({"tokens": 64, "lr": -1.0}, "lr: expected a positive number, got -1.0"),
        ({"tokens": 64, "warmup_steps": -1}, "warmup_steps: expected at least 0, got -1"),
        ({"tokens": 64, "weights": {"a": -0.5}}, "weights.a: expected a number of at least 0, got -0.5"),
        (
            {"tokens": 10**6, "weights": {"a": 0, "b": 0}},
            "weights: expected a positive one, got none for a, b",
        ),
        ({"tokens": 10**6, "weights": {"web": 1}}, "weights: unknown source 'web'; known ones are a, b"),
        (
            {"tokens": 999, "length": 129},
            "length: expected at most the model's context 128, got 129; set fit.phases.1.context",
        ),
        (
            {"tokens": 64, "batch_size": 3},
            "batch_size: expected a multiple of 8 devices of data x fsdp, got 3",
        ),
        ({"tokens": 64, "batch_size": 8}, "batch_size: expected a multiple of 3 micro-batches, got 8"),
        ({"tokens": 64}, "warmup_steps: expected at most the phase's 1 steps, got 2"),
        (
            {"tokens": 64, "rope_scaling": SCALING | {"high_freq_factor": 1.0}},
            "rope_scaling: expected positive numbers, low_freq_factor < high_freq_factor, got Llama3Scaling",
        ),
        ({"tokens": 64, "rope": {}}, "rope: unknown key; did you mean 'rope_theta'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_a_phase_that_cannot_be_trained_is_refused_before_anything_is_written(
    sources, tmp_path, phase, message
):
    first = {"tokens": 10**6, "context": 128}
    with pytest.raises(ValueError, match=re.escape(f"fit.phases.1.{message}")):
        pretrain.run(phased(sources, [first, phase], {"batch_size": 24}, {"accumulate": 3}), tmp_path / "run")
    assert not (tmp_path / "run").exists() or {p.name for p in (tmp_path / "run").iterdir()} <= {
        "config.json",
        ".lock",
    }


def test_the_first_phase_carries_on_with_an_optimiser_of_a_model_only(sources, tmp_path):
    message = r"fit\.phases\.0\.optimizer: expected a model whose optimiser .*, got none; set model, or fresh"
    with pytest.raises(ValueError, match=message):
        pretrain.run(phased(sources, [SHORT]), tmp_path)


def test_a_phase_takes_its_tokens_rounded_up_to_steps_and_the_rest_as_it_is(sources):
    cfg = phased(sources, [SHORT, LONG, {"tokens": 8 * 64}])
    arch = pretrain._from_shape(cfg.shape, Tokenizer(sources / "tokenizer"))
    short, long, last = pretrain._spans(cfg, arch)
    assert [(s.first, s.last) for s in (short, long, last)] == [(0, 3), (3, 5), (5, 6)]
    assert [s.data.seed for s in (short, long, last)] == [0, 1, 2]
    assert (short.arch, short.optim) == (arch, cfg.optim)
    assert long.arch == arch.replace(context=256, rope=Rope(5e5, Llama3Scaling(**SCALING)))
    assert (last.arch, last.optim, last.data.length) == (long.arch, cfg.optim, 64)
    assert [[s.weight for s in span.data.sources] for span in (short, long, last)] == [[1, 1], [0, 1], [1, 1]]
    [only] = pretrain._spans(phased(sources, []), arch)
    assert (only.first, only.last, only.data, only.arch) == (0, 2, cfg.data, arch)


@pytest.mark.slow
def test_phases_are_trainings_one_after_another(sources, tmp_path):
    """In one work directory they end in the same bits as each from the artifact of the one before."""
    start = tmp_path / "start"
    assert pretrain.run(phased(sources, []), start).keys() == {"heldout", "num_params", "steps"}
    result = pretrain.run(phased(sources, [SHORT, LONG], model=str(start)), tmp_path / "both")
    pretrain.run(phased(sources, [SHORT], model=str(start)), tmp_path / "short")
    cfg = phased(sources, [LONG], {"seed": 1}, model=str(tmp_path / "short"))
    alone = pretrain.run(cfg, tmp_path / "long")

    (arch, params), (other, others) = load_params(tmp_path / "both"), load_params(tmp_path / "long")
    assert arch == other and jax.tree.all(jax.tree.map(np.array_equal, params, others))
    fresh = phased(sources, [LONG | {"optimizer": "fresh"}], {"seed": 1}, model=str(tmp_path / "short"))
    pretrain.run(fresh, tmp_path / "fresh")
    assert not np.array_equal(
        load_params(tmp_path / "fresh")[1]["embed"]["weight"], params["embed"]["weight"]
    )

    short, long = result["phases"]
    assert (result["steps"], result["heldout"]) == (5, long["heldout"])
    assert short | {"heldout": 0} == {"tokens": 768, "steps": 3, "length": 32, "batch_size": 8, "heldout": 0}
    assert long == alone["phases"][0] and long["tokens"] == 4096
    assert short["heldout"].keys() == long["heldout"].keys() == {"a", "b", "loss"}
    rows = [row for row in read_metrics(tmp_path / "both") if "train/lr" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    optim = phased(sources, []).optim
    first: Any = make_schedule(optim, 3)
    second: Any = make_schedule(replace(optim, lr=5e-4, warmup_steps=1), 2)
    rates = [*map(first, range(3)), *map(second, range(2))]
    assert [row["train/lr"] for row in rows] == [float(rate) for rate in rates]

    assert arch == load_arch(tmp_path / "both" / "arch.json") and arch.context == 256
    assert arch.rope == Rope(5e5, Llama3Scaling(**SCALING))
    export_hf(tmp_path / "both", tmp_path / "hf")
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (exported["max_position_embeddings"], exported["rope_theta"]) == (256, 5e5)
    assert exported["rope_scaling"]["original_max_position_embeddings"] == 64
    assert exported["rope_scaling"]["factor"] == 4.0
