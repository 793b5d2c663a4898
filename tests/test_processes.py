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
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nemojax.checkpoints.artifact import load_params
from nemojax.data.tokenizer import train_tokenizer
from nemojax.sharding import MeshConfig, make_mesh, on_primary, process_arguments, start_processes

HERE = {"NEMOJAX_COORDINATOR": "host:1234", "NEMOJAX_NUM_PROCESSES": "4", "NEMOJAX_PROCESS_ID": "3"}
STEPS = 20


def test_what_the_environment_says():
    assert process_arguments({}) is None
    explicit = process_arguments(HERE)
    assert explicit is not None and explicit["coordinator_address"] == "host:1234"
    assert (explicit["num_processes"], explicit["process_id"]) == (4, 3)
    assert process_arguments(HERE | {"NEMOJAX_NUM_PROCESSES": "1", "NEMOJAX_PROCESS_ID": "0"}) is None
    assert process_arguments({"NEMOJAX_NUM_PROCESSES": "auto"}) == {}
    assert process_arguments({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}) is None  # no step: not under srun
    assert process_arguments({"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert process_arguments({"SLURM_STEP_NUM_TASKS": "16"}) == {"cluster_detection_method": "slurm"}
    assert process_arguments({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
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


def test_a_tensor_axis_stays_within_a_process():
    devices = [SimpleNamespace(process_index=i // 4) for i in range(8)]
    with pytest.raises(ValueError, match="tensor axis within the devices of one process, got tensor=8"):
        make_mesh(MeshConfig(tensor=8), devices)


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
        "fit": {{"steps": 10, "log_every": 1}},
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
# The command line, with the rows of every batch written down; process FAILS fails at its third batch.
WORKER = """
import os, sys
from nemojax.cli import main
from nemojax.data.prefetch import Prefetch

draw, count = Prefetch.__next__, 0

def watched(self):
    global count
    count += 1
    me = os.environ.get("NEMOJAX_PROCESS_ID", "0")
    if os.environ.get("FAILS") == me and count == 3:
        raise ValueError("row 3: broken")
    batch = draw(self)
    with open(f"{os.environ['ROWS']}.{me}", "a") as file:
        file.writelines(row + "\\n" for row in self.ids)
    return batch

Prefetch.__next__ = watched
sys.exit(main())
"""


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


class Run:
    """A stage in one or several processes that stand in for machines of a cluster."""

    def __init__(self, stage: str, workdir: Path, recipe: Path, count: int, *extra: str, **env: str):
        workdir.parent.mkdir(exist_ok=True)
        self.workdir, self.count = workdir, count
        self.rows_path = workdir.parent / f"{workdir.name}.rows{len(list(workdir.parent.iterdir()))}"
        arguments = [stage, f"--config={recipe}", f"--workdir={workdir}", *extra]
        shared = {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}",
            "ROWS": str(self.rows_path),
            "NEMOJAX_START_TIMEOUT": "120",
        }
        if count > 1:
            shared |= {"NEMOJAX_COORDINATOR": free_address(), "NEMOJAX_NUM_PROCESSES": str(count)}
        self.logs = [Path(f"{self.rows_path}.log{i}") for i in range(count)]
        self.processes = []
        for index, log in enumerate(self.logs):
            mine = {"NEMOJAX_PROCESS_ID": str(index)} if count > 1 else {}
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", WORKER, *arguments],
                        env=os.environ | shared | mine | env,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )

    def codes(self, seconds: float = 240) -> list[int]:
        """Exit codes; whatever still runs after `seconds` is killed and counts as -9."""
        end = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return [process.returncode for process in self.processes]

    def finish(self) -> "Run":
        codes = self.codes()
        assert codes == [0] * self.count, self.text()
        return self

    def rows(self) -> list[str]:
        """The documents of every row in the order of the global batches."""
        parts = [Path(f"{self.rows_path}.{i}").read_text().splitlines() for i in range(self.count)]
        return [row for rows in zip(*parts, strict=True) for row in rows]

    def losses(self) -> np.ndarray:
        lines = map(json.loads, (self.workdir / "metrics.jsonl").read_text().splitlines())
        rows = [row for row in lines if "train/loss" in row]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return np.array([row["train/loss"] for row in rows])

    def text(self) -> str:
        return "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in self.logs)

    def last_lines(self) -> list[str]:
        return [(log.read_text().splitlines() or [""])[-1] for log in self.logs]

    def wait_for_steps(self, number: int) -> None:
        path, end = self.workdir / "metrics.jsonl", time.monotonic() + 240
        while not path.is_file() or path.read_text().count("\n") < number:
            assert all(p.poll() is None for p in self.processes), self.text()
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
def test_what_is_done_is_skipped_or_refused_by_all(recipes, double):
    again = Run("pretrain", double.workdir, recipes / "short.py", 2).finish()
    assert not list(again.rows_path.parent.glob(f"{again.rows_path.name}.[01]"))  # nothing was trained
    assert again.last_lines() == double.last_lines()
    other = Run("pretrain", double.workdir, recipes / "short.py", 2, "--config.seed=1")
    assert other.codes() == [2, 2]
    first, second = other.last_lines()
    assert first.startswith("nemojax: ") and "another run, which differs in seed" in first
    assert second == first.replace("nemojax: ", "nemojax: process 0: ")
    assert not any("Traceback" in log.read_text() for log in other.logs)


@pytest.mark.slow
def test_sigterm_to_one_stops_all_after_one_step_and_resumes(recipes, single, tmp_path):
    first = Run("pretrain", tmp_path / "run", recipes / "long.py", 2)
    first.wait_for_steps(5)
    first.processes[1].send_signal(signal.SIGTERM)
    assert first.codes() == [75, 75], first.text()
    stopped = len(first.losses())
    assert 5 <= stopped < 400 and len(first.rows()) == 16 * stopped
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == [str(stopped)]
    second = Run("pretrain", tmp_path / "run", recipes / "long.py", 2)
    second.wait_for_steps(max(STEPS, stopped + 5))
    second.processes[0].send_signal(signal.SIGTERM)
    assert second.codes() == [75, 75], second.text()
    # the short run takes the same steps: neither its data nor its learning rate know how many there are
    assert (first.rows() + second.rows())[: 16 * STEPS] == single.rows()
    np.testing.assert_allclose(second.losses()[:STEPS], single.losses(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_in_one_ends_all(recipes, tmp_path, broken):
    run = Run("pretrain", tmp_path / "run", recipes / "short.py", 2, FAILS=str(broken))
    codes = run.codes(seconds=150)
    assert codes[broken] == 2 and "nemojax: row 3: broken" in run.logs[broken].read_text(), run.text()
    if broken == 1:
        assert codes[0] == 2 and "process 0 of 2: another process has ended (" in run.text()
    else:  # it is the coordinator too: JAX aborts the others, unless they notice the broken step first
        assert codes[1] in (2, -signal.SIGABRT), run.text()
    assert not (tmp_path / "run" / "DONE").exists()


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
    recipe.write_text(SFT.format(model=str(single.workdir)))
    one = Run("sft", tmp_path / "a" / "run", recipe, 1).finish()
    two = Run("sft", tmp_path / "b" / "run", recipe, 2).finish()
    assert two.rows() == one.rows() and len(one.losses()) == 10
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-5)
    assert result(one)["conversations"] == result(two)["conversations"]


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
