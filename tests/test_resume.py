"""Every training stage killed for real, in the middle of a step and of a save, ends bit-identical."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.compress.variants import Library
from nemojax.data.tokenizer import train_tokenizer
from nemojax.model.llama import init_params
from tests.environment import QUICK_COMPILATION

pytestmark = pytest.mark.slow

STEPS = 60
FIT = {"steps": STEPS, "log_every": 1, "checkpoint_every": 5}
RL_STEPS = 12
LAYERS = 8
Condition = Callable[[Path], bool]


@dataclass(frozen=True)
class Job:
    """One command with its recipe; `folder` also holds the work directories and what the processes say."""

    stage: str
    recipe: Path

    def start(self, workdir: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "nemojax.cli", self.stage]
        # compiled programs are kept, as users' are, also by those that are killed
        programs = {"NEMOJAX_COMPILATION_CACHE": str(self.recipe.parent / "programs")}
        programs |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with open(f"{workdir}.log", "a") as log:
            return subprocess.Popen(
                [*command, f"--config={self.recipe}", f"--workdir={workdir}"],
                env=os.environ | {"XLA_FLAGS": QUICK_COMPILATION} | programs,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def finish(self, workdir: Path) -> None:
        assert self.start(workdir).wait() == 0, Path(f"{workdir}.log").read_text()[-2000:]

    def kill(self, workdir: Path, moment: Condition) -> None:
        """Starts the stage and kills it as soon as `moment(workdir)` holds."""
        process = self.start(workdir)
        wait_for(process, lambda: moment(workdir))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (workdir / "DONE").exists()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """tokenizer/, two texts, and a parent and a smaller child of random weights."""
    folder = tmp_path_factory.mktemp("resume")
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "one", "two", "three", "and", "or", "not", "then", "1 + 2 = 3"]
    texts = [" ".join(rng.choice(words, 60)) for _ in range(60)]
    for name, rows in (("train", texts[:48]), ("heldout", texts[48:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenizer = train_tokenizer(texts, 320, folder / "tokenizer")
    for seed, (name, width) in enumerate((("parent", 48), ("child", 24))):
        arch = uniform(
            vocab_size=tokenizer.vocab_size,
            dim=32,
            num_layers=LAYERS,
            num_heads=4,
            num_kv_heads=2,
            ffn_width=width,
            context=256,
        )
        params = init_params(arch, jax.random.key(seed))
        save_params(folder / name, arch, params, tokenizer_dir=folder / "tokenizer")
    return folder


def configuration(stage: str, inputs: Path) -> dict[str, Any]:
    texts = {
        "sources": [{"name": "words", "kind": "jsonl", "path": str(inputs / "train.jsonl")}],
        "heldout": [{"name": "words", "kind": "jsonl", "path": str(inputs / "heldout.jsonl")}],
        "length": 64,
        "batch_size": 8,
        "heldout_batches": 1,
    }
    parent, child = str(inputs / "parent"), str(inputs / "child")
    match stage:
        case "pretrain":
            shape = {"dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_width": 64}
            tokenizer = str(inputs / "tokenizer")
            return {"tokenizer": tokenizer, "shape": shape | {"context": 64}, "data": texts, "fit": FIT}
        case "pretrain in phases":
            recipe = configuration("pretrain", inputs)
            third = STEPS // 3
            long = {"tokens": third * 4 * 128, "length": 128, "batch_size": 4, "context": 128}
            phases = [
                {"tokens": third * 8 * 64},
                {"tokens": third * 8 * 32, "length": 32, "optimizer": "carry", "warmup_steps": 2},
                long | {"rope_theta": 5e5, "lr": 5e-4, "warmup_steps": 3},
            ]
            return recipe | {"fit": FIT | {"phases": phases, "ema_decay": 0.9}}
        case "distill":
            return {"student": child, "teacher": parent, "data": texts, "fit": FIT}
        case "sft":
            data = {"sources": [{"name": "sort3", "num": 40}], "length": 192, "batch_size": 8}
            return {"model": child, "data": data | {"heldout_num": 8}, "fit": FIT}
        case "rl":
            problems = {"families": ["sum2x1"], "count": 16}
            # two updates a rollout, and saves after odd steps: half a rollout waits in such a checkpoint
            rollout = {"num_prompts_per_step": 4, "updates": 2, "max_new_tokens": 16, "max_batch": 32}
            return {
                "model": child,
                "problems": problems | {"split": "train"},
                "validation": {"problems": problems | {"split": "heldout"}, "max_new_tokens": 16},
                "rollout": rollout | {"num_generations_per_prompt": 8, "format_weight": 1.0},
                "loss": {"reference_policy_kl_penalty": 0.1},
                "curriculum": {"samples": 2},
                "fit": {"steps": RL_STEPS, "log_every": 1, "checkpoint_every": 3, "eval_every": 6},
            }
        case "compress":
            return {
                "parent": parent,
                "data": texts,
                "space": {"kv_heads": [1], "attn_linear": True, "ffn_ratios": [0.5], "ffn_linear": True}
                | {"multiple": 8},
                "bld": {"steps": 60, "together": 1},
                "scoring": {"batches": 4},
                "cost": {"timings": []},  # a stopwatch never shows the same twice
                "budget": {"ratio": {"params": 0.6}},
            }
    raise AssertionError(stage)


@pytest.fixture(scope="module")
def jobs(inputs, tmp_path_factory) -> Callable[[str], tuple[Job, Path]]:
    """stage -> (its job, the work directory of an uninterrupted run), each run once."""
    made: dict[str, tuple[Job, Path]] = {}

    def get(stage: str) -> tuple[Job, Path]:
        if stage not in made:
            folder = tmp_path_factory.mktemp(stage.replace(" ", "-"))
            recipe = folder / "recipe.py"
            recipe.write_text(f"def get_config():\n    return {configuration(stage, inputs)!r}\n")
            job = Job(stage.split()[0], recipe)
            job.finish(folder / "whole")
            made[stage] = job, folder / "whole"
        return made[stage]

    return get


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < end, "nothing to kill"
        time.sleep(0.002)


def steps_logged(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def after(steps: int) -> Condition:
    return lambda workdir: steps_logged(workdir) >= steps


def in_a_save(after_steps: int) -> Condition:
    def condition(workdir: Path) -> bool:
        unfinished = any("tmp" in p.name for p in (workdir / "checkpoints").glob("*"))
        return unfinished and steps_logged(workdir) > after_steps

    return condition


def at_the_end_of(step: int) -> Condition:
    """A phase is saved and the next one has yet to take its first step."""

    def condition(workdir: Path) -> bool:
        if not (workdir / "checkpoints" / str(step)).is_dir():
            return False
        assert max(losses(workdir)) == step
        return True

    return condition


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    """{step: all that was logged but the speed}; no step may stand there twice."""
    found: dict[int, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        values = {k: v for k, v in row.items() if k != "step" and not k.startswith("performance/")}
        assert not values.keys() & found.get(row["step"], {}).keys(), f"step {row['step']} is there twice"
        found.setdefault(row["step"], {}).update(values)
    return found


def assert_same_model(a: Path, b: Path) -> None:
    (arch, params), (other_arch, others) = load_params(a), load_params(b)
    assert arch == other_arch
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), params, others))


def assert_same_run(a: Path, b: Path) -> None:
    """The same weights, the same numbers on the way, the same result."""
    assert_same_model(a, b)
    assert losses(a) == losses(b)
    assert json.loads((a / "result.json").read_text()) == json.loads((b / "result.json").read_text())


@pytest.mark.parametrize(
    ("stage", "moments"),
    [
        pytest.param("pretrain", [after(3)], id="pretrain, before the first checkpoint"),
        pytest.param("pretrain", [after(17), after(41)], id="pretrain, in steps"),
        pytest.param("pretrain", [in_a_save(12)], id="pretrain, in a save"),
        pytest.param(
            "pretrain in phases",
            [after(7), at_the_end_of(STEPS // 3), after(31), at_the_end_of(STEPS // 3 * 2), in_a_save(52)],
            id="pretrain in phases, in each of them, between them, and in a save",
        ),
        pytest.param("distill", [after(17), in_a_save(32)], id="distill, in a step and in a save"),
        pytest.param("sft", [after(17), in_a_save(32)], id="sft, in a step and in a save"),
        pytest.param("rl", [after(4), in_a_save(6)], id="rl, in a step and in a save"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(jobs, tmp_path, stage, moments):
    job, whole = jobs(stage)
    for moment in moments:
        job.kill(tmp_path / "run", moment)
    job.finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
    assert len(losses(whole)) == (RL_STEPS if stage == "rl" else STEPS)


def test_a_killed_compression_ends_with_the_same_child(jobs, tmp_path):
    job, whole = jobs("compress")
    workdir = tmp_path / "run"
    kinds = len(Library(whole / "library").names())

    def distilling(path: Path) -> bool:
        return len(Library(path / "library").names()) >= kinds // 2

    def scoring(path: Path) -> bool:
        return (path / "scores.json").is_file()

    job.kill(workdir, distilling)
    assert len(Library(workdir / "library").names()) < kinds
    job.kill(workdir, scoring)
    assert 0 < len(json.loads((workdir / "scores.json").read_text())) < LAYERS
    job.finish(workdir)
    assert_same_model(workdir, whole)
    for name in ("scores.json", "table.json", "solution.json", "map.txt"):
        assert (workdir / name).read_text() == (whole / name).read_text()
    results = [json.loads((path / "result.json").read_text()) for path in (workdir, whole)]
    assert all(result.pop("seconds") for result in results) and results[0] == results[1]


def test_sigterm_exits_75_and_resumes(jobs, tmp_path):
    job, whole = jobs("pretrain")
    process = job.start(tmp_path / "run")
    wait_for(process, lambda: steps_logged(tmp_path / "run") >= 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    job.finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
