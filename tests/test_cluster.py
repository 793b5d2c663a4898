"""The launch scripts, as far as they go without a cluster, and where compiled programs are kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemojax import cli
from nemojax.backends.startup import GPU_MEMORY
from nemojax.hosts import COORDINATOR, NUM_PROCESSES, PROCESS_ID, process_arguments

LAUNCH = Path(__file__).parent.parent / "launch"
JOBSETS = {
    doc["metadata"]["labels"]["hardware"]: doc
    for doc in yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
}


@pytest.mark.parametrize(
    "path", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda p: p.name
)
def test_scripts_are_bash(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert path.name == "environment.sh" or "\n# Usage: " in path.read_text()


@pytest.mark.parametrize("hardware", ["tpu", "gpu"])
def test_jobsets_start_processes_that_meet_and_resume_after_sigterm(hardware):
    spec = JOBSETS[hardware]["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    env = {
        entry["name"]: entry["value"]
        if "value" in entry
        else {index: "3"}[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for entry in container["env"]
    }
    found = process_arguments(env)
    if hardware == "gpu":
        assert job["completionMode"] == "Indexed"
        name = JOBSETS[hardware]["metadata"]["name"]
        assert found == {
            "coordinator_address": f"{name}-{replicated['name']}-0-0.{name}:8476",
            "num_processes": job["completions"] * replicated["replicas"],
            "process_id": 3,
            "cluster_detection_method": "deactivate",
        }
    else:
        assert found == {}
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [75]}}
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert container["args"][0] == "nemojax" and container["args"][1] in cli.STAGES
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "local_cluster: expected a number of processes, got ''"),
        (["two", "pretrain"], "local_cluster: expected a number of processes, got 'two'"),
        (["2", "--devices=0", "sft"], "--devices: expected a number of devices for each process, got '0'"),
        (["2", "sft"], "local_cluster: --workdir: expected --workdir=DIR after the stage, got none"),
    ],
)
def test_a_local_cluster_names_what_is_wrong(arguments, message):
    done = subprocess.run(["bash", LAUNCH / "local_cluster.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def cluster(folder: Path, program: str, *arguments: str) -> subprocess.Popen:
    """A local cluster of three whose `nemojax` is a shell script."""
    path = folder / "bin" / "nemojax"
    path.parent.mkdir()
    path.write_text(f"#!/usr/bin/env bash\n{program}\n")
    path.chmod(0o755)
    return subprocess.Popen(
        [
            "bash",
            LAUNCH / "local_cluster.sh",
            "3",
            "--devices=2",
            "sft",
            f"--workdir={folder / 'runs' / 'x'}",
            *arguments,
        ],
        env=os.environ | {"NEMOJAX_VENV": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_local_cluster_gives_every_process_its_place(tmp_path):
    said = f'echo "$*"; echo "${COORDINATOR} ${NUM_PROCESSES} ${PROCESS_ID} $JAX_PLATFORMS $XLA_FLAGS"'
    run = cluster(tmp_path, said, "--config.seed=3 4")
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0 and not err
    logs = [(tmp_path / "runs" / f"x.process{i}.log").read_text().splitlines() for i in range(3)]
    assert out.splitlines()[-1] == logs[0][-1] and out.count("pid") == 3
    for index, (arguments, env) in enumerate(logs):
        assert arguments == f"sft --workdir={tmp_path / 'runs' / 'x'} --config.seed=3 4"
        address, count, me, platform, *flags = env.split()
        assert (count, me, platform) == ("3", str(index), "cpu") and address == logs[0][1].split()[0]
        assert flags[-1] == "--xla_force_host_platform_device_count=2"


def test_a_local_cluster_names_the_first_that_failed(tmp_path):
    program = f'[ "${PROCESS_ID}" = 1 ] && {{ sleep 0.5; kill -9 $$; }}; sleep 2; exit 2'
    run = cluster(tmp_path, program)
    _, err = run.communicate(timeout=60)
    log = tmp_path / "runs" / "x.process1.log"
    assert run.returncode == 2
    assert err == f"local_cluster: process 1 of 3 ended with exit code 137 (SIGKILL); its log is {log}\n"


def test_a_local_cluster_hands_sigterm_on(tmp_path):
    run = cluster(tmp_path, "trap 'echo heard; exit 75' TERM; echo ready; while true; do sleep 0.1; done")
    assert run.stdout
    for _ in range(3):
        run.stdout.readline()
    logs = [tmp_path / "runs" / f"x.process{i}.log" for i in range(3)]
    while not all(log.exists() and "ready" in log.read_text() for log in logs):
        assert run.poll() is None
    run.terminate()
    assert run.wait(timeout=60) == 75
    assert all(log.read_text().split() == ["ready", "heard"] for log in logs)


# --- compiled programs

PROGRAM = """
import os, sys
from nemojax import cli
from nemojax.backends.startup import GPU_MEMORY
sys.argv[1:] = ["chat"]
cli._dispatch = lambda args: print(os.environ.get({name!r}))
sys.exit(cli.main())
"""


def variable(name: str, home: Path, **env: str) -> str:
    """An environment variable as a command finds it, and what is printed besides."""
    base = {k: v for k, v in os.environ.items() if k not in (cli.PROGRAMS, "XDG_CACHE_HOME", "JAX_PLATFORMS")}
    mine = {"HOME": str(home), "GLIBC_TUNABLES": ""}
    command = [sys.executable, "-c", PROGRAM.format(name=name)]
    done = subprocess.run(command, env=base | mine | env, capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).strip()


def where_programs_go(home: Path, **env: str) -> str:
    return variable("JAX_COMPILATION_CACHE_DIR", home, **env)


def test_what_machines_want_before_start_up_is_set_where_nobody_has(tmp_path):
    assert variable("XLA_PYTHON_CLIENT_MEM_FRACTION", tmp_path) == str(GPU_MEMORY)
    assert variable("XLA_PYTHON_CLIENT_MEM_FRACTION", tmp_path, XLA_PYTHON_CLIENT_MEM_FRACTION=".5") == ".5"
    assert variable("CUDA_DEVICE_MAX_CONNECTIONS", tmp_path) == "1"


def test_programs_are_kept_in_the_users_cache_unless_told_otherwise(tmp_path):
    assert where_programs_go(tmp_path) == str(tmp_path / ".cache" / "nemojax" / "xla")
    assert (tmp_path / ".cache" / "nemojax" / "xla").is_dir()
    other = str(tmp_path / "other")
    assert where_programs_go(tmp_path, XDG_CACHE_HOME=other) == f"{other}/nemojax/xla"
    assert where_programs_go(tmp_path, **{cli.PROGRAMS: other}) == other
    assert where_programs_go(tmp_path, JAX_COMPILATION_CACHE_DIR="/mine") == "/mine"
    assert where_programs_go(tmp_path, **{cli.PROGRAMS: "off"}) == "None"
    assert where_programs_go(tmp_path, JAX_PLATFORMS="cpu", **{NUM_PROCESSES: "2"}) == "None"
    (tmp_path / "file").touch()
    said = where_programs_go(tmp_path, **{cli.PROGRAMS: str(tmp_path / "file" / "x")})
    assert said.startswith("None") and "compiled programs are not kept (" in said
