"""Runs of several processes: what the environment says, and how two real processes live and end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nemojax import cli
from nemojax.checkpoints.artifact import load_params
from nemojax.hosts import on_primary, process_arguments, start_processes
from tests.processes.run import STEPS, Run, free_address, result

HERE = {"NEMOJAX_COORDINATOR": "host:1234", "NEMOJAX_NUM_PROCESSES": "4", "NEMOJAX_PROCESS_ID": "3"}


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


def test_a_server_is_asked_by_one_process(monkeypatch, tmp_path, capsys):
    for name, value in HERE.items():
        monkeypatch.setenv(name, value)
    out = ["--prompts=p.jsonl", f"--out={tmp_path / 'out.jsonl'}"]
    assert cli.main(["generate", "http://127.0.0.1:1/v1", *out]) == 2
    assert "generate from a server: expected one process, got several" in capsys.readouterr().err


# --- real processes


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
