"""Stages that work in a bucket: the same as in a folder, killed or not, and in several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nemojax import buckets, cli, pretrain, sft, tokenizer
from nemojax.arch import BlockSpec, NoOp
from nemojax.buckets import place
from nemojax.checkpoints.artifact import finished_steps, load_params, save_params
from nemojax.compress import fuse, prune
from nemojax.compress import run as compress
from nemojax.compress.table import load_table
from nemojax.config import from_dict
from nemojax.data.tokenizer import load_tokenizer
from nemojax.evaluate import run as evaluate
from nemojax.evaluate.tasks import load_records
from nemojax.log import read_metrics
from nemojax.model.llama import init_params
from nemojax.stage import OtherRun, read_done, read_result
from nemojax.study import compare
from tests.buckets.made import TEXTS, equal, pretraining, recipe, wait_until
from tests.environment import QUICK_COMPILATION

LAUNCHER = Path(__file__).parents[2] / "launch" / "local_cluster.sh"


def test_a_training_and_what_follows(bucket, model, tmp_path):
    cfg = pretraining(model.folder)
    here, there = pretrain.run(cfg, tmp_path / "here"), pretrain.run(cfg, f"{bucket}/pretrain")
    assert there == here == read_result(f"{bucket}/pretrain")
    kept = {"step", "train/loss", "train/grad_norm"}
    rows = [
        [{k: r[k] for k in kept & r.keys()} for r in read_metrics(at)]
        for at in (tmp_path / "here", f"{bucket}/pretrain")
    ]
    assert rows[0] == rows[1]
    assert equal(load_params(tmp_path / "here")[1], load_params(f"{bucket}/pretrain")[1])
    done = read_done(f"{bucket}/pretrain")
    assert done == read_done(f"{bucket}/pretrain") and pretrain.run(cfg, f"{bucket}/pretrain") == here
    assert read_done(f"{bucket}/pretrain") == done  # answered from DONE
    traced = pretraining(model.folder, profile_steps="2:3")
    assert pretrain.run(traced, f"{bucket}/traced") == here
    names = [file.name for file in buckets.files_below(place(f"{bucket}/traced/profile"))]
    assert any(name.endswith(".xplane.pb") for name in names)
    with pytest.raises(
        OtherRun, match=r"pretrain: the work directory of another run, which differs in fit.steps"
    ):
        pretrain.run(pretraining(model.folder, steps=5), f"{bucket}/pretrain")
    data = {"sources": [{"name": "sort3", "num": 24}], "length": 128, "batch_size": 8, "heldout_num": 8}
    tuned = {"model": f"{bucket}/pretrain", "data": data, "fit": {"steps": 2, "log_every": 1}}
    sft.run(from_dict(sft.Config, tuned), f"{bucket}/sft")
    assert finished_steps(f"{bucket}/sft") == [2] and load_tokenizer(f"{bucket}/sft").vocab_size == 300
    asked = {"problems": {"families": ["sum2x1"], "count": 1}, "max_new_tokens": 2}
    exam = {
        "models": {"tuned": f"{bucket}/sft"},
        "tasks": asked,
        "data": {"length": 64, "heldout_batches": 1},
    }
    exam["latency"] = {"batch": 1, "prompt": 8, "new_tokens": 2, "repeats": 1}
    evaluate.run(from_dict(evaluate.Config, exam), f"{bucket}/exam")
    ways = {
        "ways": {"one": [f"{bucket}/pretrain"], "other": [str(tmp_path / "here")]},
        "numbers": {"size": "num_params"},
    }
    compared = compare.run(from_dict(compare.Config, ways), f"{bucket}/compare")
    assert compared["ways"]["one"] == {"size": [here["num_params"]]} == compared["ways"]["other"]
    records = load_records(place(f"{bucket}/exam") / "tasks_tuned.jsonl")
    assert records and all(record["family"] == "sum2x1" for record in records)


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_a_compression(bucket, model, tmp_path):
    """Library, scores and child, as in a folder; and what was searched is searched from there."""
    values = {
        "parent": str(model.folder),
        "data": {"length": 64, "batch_size": 8},
        "space": {"attn_noop": False, "ffn_ratios": [0.5], "multiple": 8},
        "bld": {"steps": 2},
        "importance": {"batches": 1},
        "scoring": {"batches": 1},
        "cost": {"timings": []},
        "budget": {"ratio": {"params": 0.8}},
    }
    cfg = from_dict(compress.Config, values)
    here, there = compress.run(cfg, tmp_path / "here"), compress.run(cfg, f"{bucket}/compress")
    assert {**here, "seconds": 0} == {**there, "seconds": 0}
    (arch, child), (other, twin) = load_params(tmp_path / "here"), load_params(f"{bucket}/compress")
    assert arch == other and arch.blocks != model.arch.blocks and equal(child, twin)
    table = place(f"{bucket}/compress") / "table.json"
    assert json.loads(table.read_text()) == json.loads((tmp_path / "here" / "table.json").read_text())
    assert load_table(str(table)).layers
    plot = place(f"{bucket}/front.svg")
    search = ["search", str(table), "--sweep=params:9000,12000,15000", f"--plot={plot}"]
    assert cli.main(search) == 0 and plot.read_text().startswith("<svg")
    windows = from_dict(compress.Config, values | {"bld": {"steps": 2, "window": 1}})
    assert {**compress.run(windows, f"{bucket}/windows"), "seconds": 0} == {**here, "seconds": 0}
    assert equal(load_params(f"{bucket}/windows")[1], child)


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_tokenizer_a_pruning_and_a_fusion(bucket, model, tmp_path):
    cfg = from_dict(tokenizer.Config, {"vocab_size": 300})
    assert tokenizer.run(cfg, tmp_path / "tokenizer") == tokenizer.run(cfg, f"{bucket}/tokenizer")
    files = [
        place(at) / "tokenizer" / "tokenizer.json" for at in (tmp_path / "tokenizer", f"{bucket}/tokenizer")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    values = {
        "parent": str(model.folder),
        "data": TEXTS,
        "targets": {"ffn_width": 16},
        "importance": {"batches": 1},
    }
    found = prune.run(from_dict(prune.Config, values), f"{bucket}/pruned")
    assert found == prune.run(from_dict(prune.Config, values), tmp_path / "pruned")
    assert equal(load_params(tmp_path / "pruned")[1], load_params(f"{bucket}/pruned")[1])
    ffn = model.arch.blocks[0].ffn
    arch = model.arch.replace(blocks=(model.arch.blocks[0], *[BlockSpec(NoOp(), ffn)] * 3))
    save_params(
        f"{bucket}/parent",
        arch,
        init_params(arch, jax.random.key(1)),
        tokenizer_dir=model.folder / "tokenizer",
    )
    fusing = {
        "model": f"{bucket}/parent",
        "data": TEXTS,
        "batches": 1,
        "fusion": {"skip_last": 0, "runs": [[1, 3]]},
    }
    fusing["latency"] = {"batch": 1, "prompt": 8, "new_tokens": 2, "repeats": 1}
    fuse.run(from_dict(fuse.Config, fusing), f"{bucket}/fused")
    assert load_params(f"{bucket}/fused")[0].num_layers == 4
    assert buckets.names_in(place(f"{bucket}/fused")) >= {"dependency.json", "dependency.svg", "DONE"}


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_killed_and_resumed(bucket, model, tmp_path):
    fit = {"steps": 24, "log_every": 1, "checkpoint_every": 8}
    command = [sys.executable, "-m", "nemojax.cli", "pretrain", f"--config={recipe(model, tmp_path, **fit)}"]
    env = os.environ | {"XLA_FLAGS": QUICK_COMPILATION}
    log = tmp_path / "log"
    with log.open("w") as out:
        first = subprocess.Popen([*command, f"--workdir={bucket}/killed"], env=env, stdout=out, stderr=out)
    wait_until(lambda: finished_steps(f"{bucket}/killed"), first, log)
    first.kill()
    first.wait()
    assert read_done(f"{bucket}/killed") is None
    for workdir in (f"{bucket}/killed", str(tmp_path / "whole")):
        done = subprocess.run([*command, f"--workdir={workdir}"], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert read_result(f"{bucket}/killed") == read_result(tmp_path / "whole")
    assert equal(load_params(f"{bucket}/killed")[1], load_params(tmp_path / "whole")[1])
    steps = [row["step"] for row in read_metrics(f"{bucket}/killed") if "train/loss" in row]
    assert steps == list(range(1, 25))


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_two_processes(bucket, model, tmp_path):
    """Each writes its own shards into the bucket; one keeps the books."""
    fit = {"steps": 4, "log_every": 1}
    path = recipe(model, tmp_path, **fit)
    command = ["bash", str(LAUNCHER), "2", "--devices=2", "pretrain", f"--config={path}"]
    env = os.environ | {"XLA_FLAGS": QUICK_COMPILATION, "NEMOJAX_VENV": sys.prefix}
    done = subprocess.run(
        [*command, f"--workdir={bucket}/two", "--config.mesh.fsdp=4"],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pretrain.run(pretraining(model.folder, **fit), tmp_path / "one")
    mine, theirs = (
        [row["train/loss"] for row in read_metrics(at) if "train/loss" in row]
        for at in (tmp_path / "one", f"{bucket}/two")
    )
    assert len(mine) == len(theirs) == 4
    np.testing.assert_allclose(theirs, mine, rtol=1e-5)
    assert load_params(f"{bucket}/two")[0] == load_params(tmp_path / "one")[0]
    for command, source, target in (
        ("export", f"{bucket}/two", f"{bucket}/hf"),
        ("import", f"{bucket}/hf", f"{bucket}/imported"),
    ):
        more = ["--max_shard_bytes=1"] if command == "export" else []
        done = subprocess.run(
            ["bash", str(LAUNCHER), "2", command, source, target, *more],
            env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert buckets.UNFINISHED not in buckets.names_in(place(f"{bucket}/hf"))
    assert equal(load_params(f"{bucket}/imported")[1], load_params(f"{bucket}/two")[1])
