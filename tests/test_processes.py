"""Runs of several processes: what the environment says, and two real processes against one.

The real ones meet over loopback, with four virtual CPU devices each; one process has eight.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from nemojax import cli
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.data.tokenizer import train_tokenizer
from nemojax.evaluate.tasks import load_records
from nemojax.hosts import on_primary, process_arguments, start_processes
from nemojax.model.llama import init_params
from tests.environment import QUICK_COMPILATION

HERE = {"NEMOJAX_COORDINATOR": "host:1234", "NEMOJAX_NUM_PROCESSES": "4", "NEMOJAX_PROCESS_ID": "3"}
STEPS = 20


def test_what_the_environment_says():
    assert process_arguments({}) is None
    explicit = process_arguments(HERE)
    assert explicit is not None and explicit["coordinator_address"] == "host:1234"
    assert (explicit["num_processes"], explicit["process_id"]) == (4, 3)
    assert process_arguments(HERE | {"NEMOJAX_NUM_PROCESSES": "1", "NEMOJAX_PROCESS_ID": "0"}) is None
    assert process_arguments({"NEMOJAX_NUM_PROCESSES": "auto"}) == {}
    assert process_arguments({"NEMOJAX_NUM_PROCESSES": "1", "TPU_WORKER_HOSTNAMES": "a,b"}) is None
    assert process_arguments({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}) is None  # no step: not under srun
    assert process_arguments({"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert process_arguments({"SLURM_STEP_NUM_TASKS": "16"}) == {"cluster_detection_method": "slurm"}
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}
    assert process_arguments(step) == {
        "cluster_detection_method": "slurm",
        "local_device_ids": list(range(8)),  # a task for each node has all of its GPUs
    }
    each = step | {"SLURM_STEP_NUM_TASKS": "32", "SLURM_STEP_TASKS_PER_NODE": "8(x4)"}
    assert process_arguments(each) == {"cluster_detection_method": "slurm"}  # JAX gives each task one
    assert process_arguments({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert process_arguments({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}) == {}
    assert process_arguments({"TPU_WORKER_HOSTNAMES": "a,b"}) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"NEMOJAX_PROCESS_ID": ""}, r"^NEMOJAX_PROCESS_ID: expected a value beside .*set all three or none"),
        ({"NEMOJAX_COORDINATOR": "", "NEMOJAX_PROCESS_ID": ""}, "NEMOJAX_COORDINATOR and NEMOJAX_PROCESS_ID"),
        ({"NEMOJAX_COORDINATOR": "host"}, r"expected HOST:PORT of process 0, got 'host'"),
        ({"NEMOJAX_NUM_PROCESSES": "two"}, r"NEMOJAX_NUM_PROCESSES: expected a whole number, got 'two'"),
        ({"NEMOJAX_PROCESS_ID": "4"}, r"expected less than NEMOJAX_NUM_PROCESSES = 4, got 4"),
    ],
)
def test_half_an_environment_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        process_arguments(HERE | change)


def test_one_process_starts_nothing(monkeypatch):
    for name in (*HERE, "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    start_processes()
    unserialisable = object()
    assert on_primary(lambda: unserialisable) is unserialisable


# --- real processes

RECIPE = """
def get_config():
    return {{
        "tokenizer": {tokenizer!r},
        "shape": {{"dim": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "ffn_width": 64}}
        | {{"context": 256}},
        "data": {{"length": 64, "batch_size": 16, "heldout_batches": 1}},
        "optim": {{"schedule": "constant"}},
        "fit": {{"steps": {steps}, "log_every": 1}},
    }}
"""
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
# The command line, with the rows of every batch written down; process FAILS fails at its third batch.
WORKER = """#!{python}
import os, sys
from nemojax.cli import main
from nemojax.backends.speed import Clock
from nemojax.checkpoints import store

draw, count = Clock.draw, 0
read = store.Reader.read

def listed(self, names):
    found = read(self, names)
    with open(f"{{os.environ['ROWS']}}.read", "a") as file:
        file.writelines(f"{{array.size}}\\n" for array in found.values())
    return found

store.Reader.read = listed

def watched(self, batches):
    global count
    count += 1
    me = os.environ["NEMOJAX_PROCESS_ID"]
    if os.environ.get("FAILS") == me and count == 3:
        raise ValueError("row 3: broken")
    batch = draw(self, batches)
    with open(f"{{os.environ['ROWS']}}.{{me}}", "a") as file:
        file.writelines(row + "\\n" for row in batches.ids)
    return batch

Clock.draw = watched
sys.exit(main())
"""
# Instead of a verifier, so that there is something to learn for a model that knows nothing: what an answer's
# letters add up to. Rollouts are written to, or read from, RECORD.
GRADED = """
import pickle
from nemojax.rewards.problems import Grade
from nemojax.rl import grpo, rollout

rollout.grade = lambda question, text: Grade((sum(map(ord, text)) % 7) / 6, 1.0)
roll_out, rollouts = grpo.roll_out, 0

def recorded(*arguments, **more):
    global rollouts
    rollouts += 1
    path = f"{{os.environ['RECORD']}}.{{rollouts}}"
    if os.environ.get("REPLAY"):
        with open(path, "rb") as file:
            return pickle.load(file)
    found = roll_out(*arguments, **more)
    if "RECORD" in os.environ:
        with open(path, "wb") as file:
            pickle.dump(found, file)
    return found

grpo.roll_out = recorded if "RECORD" in os.environ else roll_out
sys.exit(main())
"""
LAUNCHER = Path(__file__).parent.parent / "launch" / "local_cluster.sh"


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


class Run:
    """A stage in one or several processes that stand in for machines of a cluster: eight devices in all."""

    def __init__(self, stage: str, workdir: Path, recipe: Path, count: int, *extra: str, **env: str):
        program = workdir.parent / "bin" / "nemojax"
        program.parent.mkdir(parents=True, exist_ok=True)
        text = WORKER if stage != "rl" else WORKER.replace("sys.exit(main())\n", GRADED)
        program.write_text(text.format(python=sys.executable))
        program.chmod(0o755)
        self.workdir, self.count = workdir, count
        self.rows_path = workdir.parent / f"{workdir.name}.rows{len(list(workdir.parent.iterdir()))}"
        self.logs = [Path(f"{workdir}.process{i}.log") for i in range(count)]
        self._before = [log.stat().st_size if log.exists() else 0 for log in self.logs]
        self._said: list[str] | None = None
        self._output = Path(f"{self.rows_path}.launcher")
        arguments = [stage, f"--config={recipe}", f"--workdir={workdir}", *extra]
        mine = {"XLA_FLAGS": QUICK_COMPILATION, "ROWS": str(self.rows_path), "NEMOJAX_START_TIMEOUT": "120"}
        with self._output.open("w") as out:
            self.launcher = subprocess.Popen(
                ["bash", str(LAUNCHER), str(count), f"--devices={8 // count}", *arguments],
                env=os.environ | mine | {"NEMOJAX_VENV": str(workdir.parent)} | env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def code(self, seconds: float = 240) -> int:
        """The launcher's exit code; what still runs after `seconds` is killed, and it is -9."""
        try:
            self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            for _ in range(2):  # the second one kills
                self.launcher.terminate()
                time.sleep(1)
            self.launcher.wait()
            return -9
        finally:
            self._said = self.said()
        return self.launcher.returncode

    def finish(self) -> "Run":
        assert self.code() == 0, self.text()
        assert self.launched()[-1] == self.last_lines()[0]
        return self

    def launched(self) -> list[str]:
        """What the launcher says."""
        return self._output.read_text().splitlines()

    def signal(self, index: int, number: int) -> None:
        """Sends a signal to one of the processes."""
        line = next(line for line in self.launched() if line.startswith(f"process {index} of {self.count}: "))
        os.kill(int(line.split("pid ")[1].split(",")[0]), number)

    def rows(self) -> list[str]:
        """The documents of every row in the order of the global batches."""
        parts = [Path(f"{self.rows_path}.{i}").read_text().splitlines() for i in range(self.count)]
        return [row for rows in zip(*parts, strict=False) for row in rows]

    def losses(self, name: str = "train/loss") -> np.ndarray:
        lines = map(json.loads, (self.workdir / "metrics.jsonl").read_text().splitlines())
        rows = [row for row in lines if name in row]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return np.array([row[name] for row in rows])

    def said(self) -> list[str]:
        """What each process has written in this run."""
        if self._said is not None:
            return self._said
        return [
            log.read_text()[start:] if log.exists() else ""
            for log, start in zip(self.logs, self._before, strict=True)
        ]

    def text(self) -> str:
        return "\n".join([*self.launched(), *(text[-3000:] for text in self.said())])

    def last_lines(self) -> list[str]:
        return [(text.splitlines() or [""])[-1] for text in self.said()]

    def wait_for_steps(self, number: int) -> None:
        path, end = self.workdir / "metrics.jsonl", time.monotonic() + 240
        begun = Path(f"{self.rows_path}.0")  # what an earlier run has logged too many is gone by then
        while not (begun.is_file() and path.is_file()) or path.read_text().count("\n") < number:
            assert self.launcher.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.005)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    train_tokenizer(["sort up 1 2 3, some text to learn bytes from " * 20], 300, folder / "tokenizer")
    for name, steps in (("short", STEPS), ("long", 400)):
        text = RECIPE.format(tokenizer=str(folder / "tokenizer"), steps=steps)
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def single(recipes, tmp_path_factory) -> Run:
    return Run("pretrain", tmp_path_factory.mktemp("one") / "run", recipes / "short.py", 1).finish()


@pytest.fixture(scope="module")
def double(recipes, tmp_path_factory) -> Run:
    return Run("pretrain", tmp_path_factory.mktemp("two") / "run", recipes / "short.py", 2).finish()


def result(run: Run) -> dict:
    return json.loads((run.workdir / "result.json").read_text())


@pytest.mark.slow
def test_two_processes_equal_one(single, double):
    assert double.rows() == single.rows() and len(single.rows()) == STEPS * 16
    assert len(single.losses()) == STEPS
    np.testing.assert_allclose(double.losses(), single.losses(), rtol=1e-5)
    losses = [result(run)["heldout"] for run in (double, single)]
    assert losses[0].keys() == losses[1].keys() and "loss" in losses[0]
    np.testing.assert_allclose(*[list(values.values()) for values in losses], rtol=1e-5)


@pytest.mark.slow
def test_processes_that_share_rows_equal_one(single, recipes, tmp_path):
    """Of four with two devices each, two share every row: they read the same ones."""
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.context=2", "--config.mesh.tensor=2")
    run = Run("pretrain", tmp_path / "run", recipes / "short.py", 4, *mesh).finish()
    parts = [Path(f"{run.rows_path}.{i}").read_text().splitlines() for i in range(4)]
    assert parts[0] == parts[1] != parts[2] == parts[3]
    assert [row for rows in zip(*parts[::2], strict=True) for row in rows] == single.rows()
    np.testing.assert_allclose(run.losses(), single.losses(), rtol=1e-5)
    assert result(run)["heldout"]["loss"] == pytest.approx(result(single)["heldout"]["loss"], rel=1e-5)
    (_, ours), (_, theirs) = load_params(run.workdir), load_params(single.workdir)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


@pytest.mark.slow
def test_each_process_writes_its_own_shards(single, double):
    saved = double.workdir / "checkpoints" / str(STEPS)
    for item in ("params", "state"):
        data = {path.parent.parent.name for path in (saved / item).glob("ocdbt.process_*/d/*")}
        assert data == {"ocdbt.process_0", "ocdbt.process_1"}, data
    (arch, ours), (other, theirs) = (load_params(run.workdir) for run in (double, single))
    assert arch == other
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


@pytest.mark.slow
def test_what_is_done_is_skipped_or_refused_by_all(recipes, double):
    again = Run("pretrain", double.workdir, recipes / "short.py", 2).finish()
    assert not list(again.rows_path.parent.glob(f"{again.rows_path.name}.[01]"))  # nothing was trained
    assert again.last_lines() == double.last_lines()
    other = Run("pretrain", double.workdir, recipes / "short.py", 2, "--config.seed=1")
    assert other.code() == 2
    first, second = other.last_lines()
    assert first.startswith("nemojax: ") and "another run, which differs in seed" in first
    assert second == first.replace("nemojax: ", "nemojax: process 0: ")
    assert "Traceback" not in other.text()


@pytest.mark.slow
def test_sigterm_to_one_stops_all_after_one_step_and_resumes(recipes, single, tmp_path):
    first = Run("pretrain", tmp_path / "run", recipes / "long.py", 2)
    first.wait_for_steps(5)
    first.signal(1, signal.SIGTERM)
    assert first.code() == 75, first.text()
    stopped = len(first.losses())
    assert 5 <= stopped < 400 and len(first.rows()) == 16 * stopped
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == [str(stopped)]
    second = Run("pretrain", tmp_path / "run", recipes / "long.py", 2)
    second.wait_for_steps(max(STEPS, stopped + 5))
    second.launcher.terminate()
    assert second.code() == 75, second.text()
    # the short run takes the same steps: neither its data nor its learning rate know how many there are
    assert (first.rows() + second.rows())[: 16 * STEPS] == single.rows()
    np.testing.assert_allclose(second.losses()[:STEPS], single.losses(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_in_one_ends_all(recipes, tmp_path, broken):
    run = Run("pretrain", tmp_path / "run", recipes / "short.py", 2, FAILS=str(broken))
    assert run.code(seconds=150) == 2, run.text()
    log = run.logs[broken]
    line = f"local_cluster: process {broken} of 2 ended with exit code 2; its log is {log}"
    assert run.launched()[-1] == line and "nemojax: row 3: broken" in run.said()[broken], run.text()
    if broken == 1:  # without its coordinator, JAX may abort process 1 before it can say so
        assert "process 0 of 2: another process has ended (" in run.said()[0]
    assert not (tmp_path / "run" / "DONE").exists()


@pytest.mark.slow
def test_a_killed_process_ends_all_and_any_number_of_processes_resumes(recipes, single, tmp_path):
    every = "--config.fit.checkpoint_every=5"
    first = Run("pretrain", tmp_path / "run", recipes / "long.py", 2, every)
    first.wait_for_steps(12)
    first.signal(1, signal.SIGKILL)
    assert first.code(seconds=150) == 2, first.text()
    _, _, line = first.launched()
    assert line.startswith("local_cluster: process 1 of 2 ended with exit code 137 (SIGKILL); its log is ")
    drawn = first.rows()
    assert drawn[: 16 * STEPS] == single.rows()[: len(drawn)]
    for count in (4, 1):
        saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
        run = Run("pretrain", tmp_path / "run", recipes / "long.py", count, every)
        run.wait_for_steps(saved + 8)
        run.launcher.terminate()
        assert run.code() == 75, run.text()
        if count > 1:  # each process has read its own shards, and as a whole but what lies on every device
            assert max(map(int, Path(f"{run.rows_path}.read").read_text().split())) <= 64
        again = run.rows()
        known = drawn[16 * saved :]
        assert len(again) >= 16 * 8 and again[: len(known)] == known[: len(again)]
        drawn = drawn[: 16 * saved] + again
        assert drawn[: 16 * STEPS] == single.rows()[: len(drawn)]
        both = min(STEPS, len(run.losses()))
        np.testing.assert_allclose(run.losses()[:both], single.losses()[:both], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("index", ["0", "1"])
def test_a_missing_process_is_one_line_in_time(recipes, tmp_path, index):
    env = {"NEMOJAX_COORDINATOR": free_address(), "NEMOJAX_NUM_PROCESSES": "2", "NEMOJAX_PROCESS_ID": index}
    command = [sys.executable, "-m", "nemojax.cli", "pretrain", f"--config={recipes / 'short.py'}"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        env=os.environ | env | {"NEMOJAX_START_TIMEOUT": "3"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    line, *more = done.stderr.splitlines()  # process 0 has JAX's service to stop, which logs more
    assert line.startswith(f"nemojax: process {index} of 2: expected all processes to meet at 127.0.0.1:")
    assert "within 3 s" in line and not (index == "1" and more) and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


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
