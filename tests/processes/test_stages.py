"""Stages in two real processes against the same in one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from nemojax import cli
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.evaluate.tasks import load_records
from nemojax.model.llama import init_params
from tests.environment import QUICK_COMPILATION
from tests.processes.run import LAUNCHER, STEPS, Run, result

SFT = """
def get_config():
    return {{
        "model": {model!r},
        "data": {{"sources": [{{"name": "sort3", "num": 40}}], "length": 224, "batch_size": 8}}
        | {{"heldout_num": 8}},
        "fit": {{"steps": {steps}, "log_every": 1}},
    }}
"""
RL = """
def get_config():
    problems = {{"families": ["sort3"], "count": 12, "seed": 1}}
    return {{
        "model": {model!r},
        "problems": problems | {{"split": "train"}},
        "rollout": {{"num_prompts_per_step": 8, "num_generations_per_prompt": 4, "max_new_tokens": 8}}
        | {{"updates": 2, "dump_every": 1}},
        "loss": {{"reference_policy_kl_penalty": 0.1}},
        "validation": {{"problems": problems | {{"count": 3}}, "max_new_tokens": 8}},
        "fit": {{"steps": {steps}, "log_every": 1}},
    }}
"""
DISTILL = """
def get_config():
    return {{
        "student": {student!r},
        "teacher": {teacher!r},
        "data": {{"length": 64, "batch_size": 16, "heldout_batches": 1}},
        "on_policy": {{"share": {share}, "prompt_tokens": 8, "max_new_tokens": 8}},
        "fit": {{"steps": {steps}, "log_every": 1}},
    }}
"""
COMPRESS = """
def get_config():
    return {{
        "parent": {parent!r},
        "data": {{"length": 64, "batch_size": 16}},
        "space": {{"attn_linear": True, "ffn_ratios": [0.5], "multiple": 8}},
        "bld": {{"steps": 4}},
        "importance": {{"batches": 2}},
        "scoring": {{"batches": 2, "also": ["top1"]}},
        "cost": {{"timings": []}},
        "budget": {{"ratio": {{"params": 0.7}}}},
    }}
"""
EVALUATE = """
def get_config():
    return {{
        "models": {{"model": {model!r}}},
        "data": {{"length": 64, "batch_size": 26, "heldout_batches": 1}},
        "tasks": {{"problems": {{"families": ["sort3"], "count": 3, "seed": 1}}, "max_new_tokens": 8}},
        "long_context": {{"lengths": [208], "count": 1, "depths": [0.0, 1.0], "max_new_tokens": 16}}
        | {{"prompts": "raw", "measures": ["generate", "forced"], "tasks": ["single"]}},
        "latency": {{"batch": 2, "prompt": 4, "new_tokens": 4, "repeats": 1}},
    }}
"""


@pytest.mark.slow
def test_fine_tuning_in_two_processes_equals_one(single, tmp_path):
    recipe = tmp_path / "sft.py"
    recipe.write_text(SFT.format(model=str(single.workdir), steps=STEPS))
    one = Run("sft", tmp_path / "a" / "run", recipe, 1).finish()
    two = Run("sft", tmp_path / "b" / "run", recipe, 2).finish()
    assert two.rows() == one.rows() and len(one.losses()) == STEPS
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-5)
    assert result(one)["conversations"] == result(two)["conversations"]


@pytest.mark.slow
def test_reinforcement_learning_in_two_processes(single, tmp_path):
    """On recorded rollouts, the losses of one process; left to themselves, the same first rollout."""
    recipe = tmp_path / "rl.py"
    recipe.write_text(RL.format(model=str(single.workdir), steps=STEPS))
    record = str(tmp_path / "rollout")
    one = Run("rl", tmp_path / "a" / "run", recipe, 1, RECORD=record).finish()
    replayed = Run("rl", tmp_path / "b" / "run", recipe, 2, RECORD=record, REPLAY="1").finish()
    # a policy's loss is all but zero before its second step: advantages sum to nothing
    assert len(one.losses()) == STEPS and np.abs(one.losses()).max() > 1e-2
    np.testing.assert_allclose(replayed.losses(), one.losses(), rtol=1e-5, atol=1e-6)
    norms = [run.losses("train/grad_norm") for run in (replayed, one)]
    np.testing.assert_allclose(*norms, rtol=1e-4)
    assert norms[0].min() > 0.1
    alone = Run("rl", tmp_path / "c" / "run", recipe, 2).finish()
    first = "samples/train_data_rollout1.jsonl"
    for other in (replayed, alone):
        assert (other.workdir / "validation_start.jsonl").read_text() == (
            one.workdir / "validation_start.jsonl"
        ).read_text()
    drawn, again = (
        [json.loads(line) for line in (run.workdir / first).read_text().splitlines()] for run in (one, alone)
    )
    assert [row["token_ids"] for row in drawn] == [row["token_ids"] for row in again] and len(drawn) == 32
    for one_of, other_of in zip(drawn, again, strict=True):
        for name in ("reward", "advantage", "generation_logprobs"):
            np.testing.assert_allclose(one_of[name], other_of[name], rtol=1e-3, atol=1e-4)
    assert result(alone)["before"] == result(one)["before"] and len(alone.losses()) == STEPS


@pytest.fixture(scope="module")
def student(single, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("student") / "artifact"
    arch, _ = load_params(single.workdir)
    params = init_params(arch, jax.random.key(7))
    save_params(folder, arch, params, tokenizer_dir=single.workdir / "tokenizer")
    return str(folder)


@pytest.mark.slow
def test_a_distillation_in_two_processes_equals_one(single, student, tmp_path):
    recipe = tmp_path / "distill.py"
    recipe.write_text(DISTILL.format(student=student, teacher=str(single.workdir), share=0.0, steps=STEPS))
    one = Run("distill", tmp_path / "a" / "run", recipe, 1).finish()
    two = Run("distill", tmp_path / "b" / "run", recipe, 2).finish()
    assert two.rows() == one.rows() and len(one.rows()) == STEPS * 16
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-5)
    for name, value in result(one).items():
        if isinstance(value, float):
            assert result(two)[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.slow
def test_a_student_samples_in_two_processes_what_it_does_in_one(single, student, tmp_path):
    """Going on from texts that each process reads for itself, and from those that both read."""
    recipe = tmp_path / "distill.py"
    recipe.write_text(DISTILL.format(student=student, teacher=str(single.workdir), share=0.7, steps=6))
    one = Run("distill", tmp_path / "a" / "run", recipe, 1).finish()
    two = Run("distill", tmp_path / "b" / "run", recipe, 2).finish()
    shared = Run("distill", tmp_path / "c" / "run", recipe, 2, "--config.mesh.context=8").finish()
    assert 0.4 < one.losses("train/on_policy")[-1] < 1 and two.rows() == one.rows()
    for many in (two, shared):
        for name in ("train/loss", "train/on_policy"):
            np.testing.assert_allclose(many.losses(name), one.losses(name), rtol=1e-5)


@pytest.mark.slow
def test_a_compression_in_two_processes_equals_one(single, tmp_path):
    recipe = tmp_path / "compress.py"
    recipe.write_text(COMPRESS.format(parent=str(single.workdir)))
    one = Run("compress", tmp_path / "a" / "run", recipe, 1).finish()
    two = Run("compress", tmp_path / "b" / "run", recipe, 2).finish()
    tables = [json.loads((run.workdir / "table.json").read_text()) for run in (one, two)]
    names, scores = (
        [[choice[key] for layer in table["layers"] for choice in layer] for table in tables]
        for key in ("name", "score")
    )
    assert names[0] == names[1] and len(names[0]) > 2
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-5)
    assert result(one)["num_params"] == result(two)["num_params"]
    (arch, child), (other, twin) = (load_params(run.workdir) for run in (one, two))
    assert arch == other and arch.blocks != load_params(single.workdir)[0].blocks
    for a, b in zip(jax.tree.leaves(child), jax.tree.leaves(twin), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_an_evaluation_in_two_processes_equals_one(single, tmp_path):
    """Which also read the same rows, by half each; 26 rows of 64 give 8 of 208 on either mesh."""
    recipe = tmp_path / "evaluate.py"
    recipe.write_text(EVALUATE.format(model=str(single.workdir)))
    one = Run("evaluate", tmp_path / "a" / "run", recipe, 1).finish()
    two = Run("evaluate", tmp_path / "b" / "run", recipe, 2, "--config.mesh.context=8").finish()
    for name in ("tasks_model.jsonl", "conversations.jsonl"):
        assert (two.workdir / name).read_text() == (one.workdir / name).read_text()
    questions, others = (load_records(run.workdir / "long_context_model.jsonl") for run in (one, two))
    assert len(questions) == len(others) == 2
    for a, b in zip(questions, others, strict=True):
        assert b.pop("logprob") == pytest.approx(a.pop("logprob"), rel=1e-4) and a == b
    rows = [result(run)["models"]["model"] for run in (one, two)]
    assert rows[1]["heldout"] == pytest.approx(rows[0]["heldout"], rel=1e-5)
    assert rows[1]["tasks"] == rows[0]["tasks"] and rows[1]["latency"]["prefill_ms"] > 0
    by_position = [row["by_position"].values() for row in rows]
    for a, b in zip(*([cell for group in by for cell in group] for by in by_position), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.slow
def test_importing_and_exporting_in_two_processes_equals_one(single, tmp_path):
    """Files of one tensor each, so that both processes have some; of an import each reads its own."""
    command = ["export", str(single.workdir), str(tmp_path / "one"), "--max_shard_bytes=1"]
    assert cli.main(command) == 0
    for what, source, target in (
        ("export", single.workdir, tmp_path / "two"),
        ("import", tmp_path / "two", tmp_path / "artifact"),
    ):
        more = ["--max_shard_bytes=1"] if what == "export" else []
        done = subprocess.run(
            ["bash", str(LAUNCHER), "2", what, str(source), str(target), *more],
            env=os.environ | {"XLA_FLAGS": QUICK_COMPILATION, "NEMOJAX_VENV": sys.prefix},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert len(files) > 10 and files == {
        path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()
    }
    parts = sorted(
        path.name for path in (tmp_path / "artifact" / "checkpoints" / "0" / "params").glob("ocdbt.process_*")
    )
    assert parts == ["ocdbt.process_0", "ocdbt.process_1"]
    (arch, params), (other, twin) = load_params(single.workdir), load_params(tmp_path / "artifact")
    assert arch == other
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(twin), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["artifact", "one", "two"]  # nothing half written


@pytest.mark.slow
def test_prompts_answered_in_two_processes_equal_one(single, tmp_path):
    """Chunks of two prompts. What a kill cut short, or SIGTERM to one process, goes on in both."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "sort up " + "1 2 3 "[: 2 * (i % 4)]} for i in range(801)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [f"--prompts={prompts}", "--n=2", "--max_new_tokens=64", "--logprobs", "--config.chunk=2"]

    def start(count: int, out: Path) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(LAUNCHER), str(count), "generate", str(single.workdir), *more, f"--out={out}"],
            env=os.environ | {"XLA_FLAGS": QUICK_COMPILATION, "NEMOJAX_VENV": sys.prefix},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def answered_by(count: int, out: Path) -> str:
        said, _ = (process := start(count, out)).communicate(timeout=240)
        assert process.returncode == 0, said
        return said.splitlines()[-1]

    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert "rows=1602 rows_before=0" in answered_by(1, one)
    whole = one.read_text()
    process = start(2, two)
    assert process.stdout is not None
    while not two.is_file() or not two.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    line = next(line for line in process.stdout if line.startswith("process 1 of 2: pid "))
    os.kill(int(line.split("pid ")[1].split(",")[0]), signal.SIGTERM)
    process.communicate(timeout=240)
    assert process.returncode == 75 and 0 < two.read_text().count("\n") < 1602
    answered_by(2, two)
    assert two.read_text() == whole
    two.write_text("".join(whole.splitlines(keepends=True)[:5]))
    assert "rows=1602 rows_before=4" in answered_by(2, two)
    assert two.read_text() == whole
    assert {path.name for path in tmp_path.glob("two*")} == {
        "two.jsonl", "two.jsonl.config.json", "two.jsonl.process0.log", "two.jsonl.process1.log"
    }  # fmt: skip
