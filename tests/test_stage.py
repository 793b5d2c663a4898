import errno
import json
import multiprocessing
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nemojax import stage
from nemojax.arch import load_arch, uniform
from nemojax.config import field
from nemojax.data.tokenizer import train_tokenizer
from nemojax.stage import CONFIG, DONE, OtherRun, fingerprint, locked, read_done, run_stage, write_json


@dataclass(frozen=True)
class Optim:
    lr: float = field(0.1, "learning rate")


@dataclass(frozen=True)
class Config:
    source: str = field("", "artifact")
    steps: int = field(3, "steps")
    optim: Optim = field(Optim(), "optimiser")


class Body:
    """Counts its calls, and fails after leaving something behind when told to."""

    def __init__(self, fail: bool = False):
        self.calls, self.fail = 0, fail

    def __call__(self, workdir: Path) -> dict:
        self.calls += 1
        (workdir / "half").write_text("kept")
        if self.fail:
            raise RuntimeError("killed")
        return {"loss": 1.5, "path": workdir / "half"}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def test_done_is_skipped_and_says_what_ran(tmp_path):
    body = Body()
    first = run_stage("sft", Config(), tmp_path / "run", [], body)
    second = run_stage("sft", Config(), tmp_path / "run", [], body)
    assert first == second and first["loss"] == 1.5 and body.calls == 1
    stored = json.loads((tmp_path / "run" / CONFIG).read_text())
    assert stored["config"] == {"source": "", "steps": 3, "optim": {"lr": 0.1}}
    assert stored["stage"] == "sft" and stored["versions"]["jax"] and stored["format_version"] == 1
    done = read_done(tmp_path / "run")
    assert done and done["fingerprint"] == stored["fingerprint"] and done["wall_seconds"] >= 0
    assert not list((tmp_path / "run").glob("*.partial"))


def test_half_done_is_resumed(tmp_path):
    with pytest.raises(RuntimeError):
        run_stage("sft", Config(), tmp_path, [], Body(fail=True))
    assert not (tmp_path / DONE).exists() and (tmp_path / "half").exists()
    assert run_stage("sft", Config(), tmp_path, [], Body())["loss"] == 1.5


def test_a_run_that_left_nothing_may_be_configured_again(tmp_path):
    def body(_: Path) -> dict:
        raise ValueError("optim.lr: too high")

    with pytest.raises(ValueError, match="too high"):
        run_stage("sft", Config(), tmp_path, [], body)
    run_stage("sft", Config(optim=Optim(0.01)), tmp_path, [], Body())


def test_another_runs_directory_is_left_alone(tmp_path):
    run_stage("sft", Config(), tmp_path, [], Body())
    before = contents(tmp_path)
    with pytest.raises(OtherRun, match=r"another run, which differs in optim\.lr, steps; choose another"):
        run_stage("sft", Config(steps=4, optim=Optim(0.2)), tmp_path, [], Body())
    with pytest.raises(OtherRun, match=r"differs in stage \(sft there, rl here\)"):
        run_stage("rl", Config(), tmp_path, [], Body())
    assert contents(tmp_path) == before


def test_a_directory_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_text("x")
    before = contents(tmp_path)
    with pytest.raises(OtherRun, match="expected an empty directory or a run, got other files"):
        run_stage("sft", Config(), tmp_path, [], Body())
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="expected a directory, got a file"):
        run_stage("sft", Config(), tmp_path / "run", [], Body())


def test_an_address_in_place_of_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = Body()
    with pytest.raises(ValueError, match="http://host/run: expected"):
        run_stage("sft", Config(), "http://host/run", [], body)
    assert not body.calls and not list(tmp_path.iterdir())


def test_another_format_version(tmp_path):
    run_stage("sft", Config(), tmp_path, [], Body())
    stored = json.loads((tmp_path / CONFIG).read_text())
    write_json(tmp_path / CONFIG, stored | {"format_version": 99})
    with pytest.raises(ValueError, match="expected format_version 1, got 99"):
        run_stage("sft", Config(), tmp_path, [], Body())


def test_changed_inputs_are_named(tmp_path):
    parent, child = tmp_path / "parent", tmp_path / "child"
    run_stage("pretrain", Config(), parent, [], Body())
    cfg = Config(source=str(parent))
    run_stage("sft", cfg, child, [parent], Body())
    body = Body()
    run_stage("sft", cfg, child, [parent], body)
    assert body.calls == 0
    shutil.rmtree(parent)
    run_stage("pretrain", Config(steps=9), parent, [], Body())
    with pytest.raises(OtherRun, match=f"differs in input {parent}"):
        run_stage("sft", cfg, child, [parent], Body())
    run_stage("sft", Config(), tmp_path / "two", [parent, tmp_path / "child"], Body())
    with pytest.raises(OtherRun, match=f"differs in input {child}"):
        run_stage("sft", Config(), tmp_path / "two", [parent], Body())


def test_a_moved_pipeline_stays_the_same(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    run_stage("pretrain", Config(), old / "parent", [], Body())
    cfg = Config(source=str(old / "parent"))
    run_stage("sft", cfg, old / "child", [cfg.source], Body())
    old.rename(new)
    monkeypatch.chdir(new)
    body = Body()
    run_stage("sft", replace(cfg, source="parent"), new / "child", ["parent"], body)
    assert body.calls == 0


def test_a_missing_input(tmp_path):
    with pytest.raises(ValueError, match="nowhere: expected an artifact, a directory or a file, got nothing"):
        run_stage("sft", Config(), tmp_path / "run", [tmp_path / "nowhere"], Body())
    assert not (tmp_path / "run").exists()


def test_fingerprints_follow_contents(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("a")
    before = fingerprint(data), fingerprint(tmp_path)
    assert before == (fingerprint(data), fingerprint(tmp_path))
    data.write_text("b")
    after = fingerprint(data), fingerprint(tmp_path)
    assert before[0] != after[0] and before[1] != after[1]


def test_an_artifacts_logs_do_not_count(tmp_path):
    (tmp_path / "arch.json").write_text("{}")
    before = fingerprint(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("x")
    assert fingerprint(tmp_path) == before
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5" / "params").write_text("x")
    assert fingerprint(tmp_path) != before


def _hold(workdir: Path, ready, release) -> None:
    with locked(workdir):
        ready.set()
        release.wait(30)


def test_a_second_process_is_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    owner = context.Process(target=_hold, args=(tmp_path, ready, release))
    owner.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ValueError, match=rf"in use by process {owner.pid} on .*; wait for it or choose"):
            run_stage("sft", Config(), tmp_path, [], Body())
    finally:
        release.set()
        owner.join(30)
    run_stage("sft", Config(), tmp_path, [], Body())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / CONFIG).write_text("{")
    (tmp_path / "half").write_text("")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        run_stage("sft", Config(), tmp_path, [], Body())


@pytest.mark.parametrize("key", ["config", "inputs", "fingerprint"])
@pytest.mark.parametrize("value", [None, 7])
def test_a_config_without_its_parts_is_named(tmp_path, key, value):
    run_stage("sft", Config(), tmp_path, [], Body())
    write_json(tmp_path / CONFIG, json.loads((tmp_path / CONFIG).read_text()) | {key: value})
    for cfg in (Config(), Config(steps=4)):
        with pytest.raises(ValueError, match=rf"config\.json: expected {key}, got {value}; restore it"):
            run_stage("sft", cfg, tmp_path, [], Body())


def test_a_done_without_its_fingerprint_is_named(tmp_path):
    run_stage("sft", Config(), tmp_path, [], Body())
    write_json(tmp_path / DONE, ["sft"])
    with pytest.raises(ValueError, match="DONE: expected a fingerprint, got none; delete the file"):
        run_stage("sft", Config(), tmp_path, [], Body())
    (tmp_path / DONE).unlink()
    assert run_stage("sft", Config(), tmp_path, [], Body())["loss"] == 1.5


@pytest.mark.parametrize(
    "env",
    [
        {"NEMOJAX_NUM_PROCESSES": "2", "NEMOJAX_COORDINATOR": "host:1", "NEMOJAX_PROCESS_ID": "0"},
        {"SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_what_does_not_split_refuses_several_processes(tmp_path, monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"^compress: expected one process, got several; .* start one$"):
        run_stage("compress", Config(), tmp_path / "run", [], Body())
    assert not (tmp_path / "run").exists()


def small_arch(vocab_size: int = 16):
    return uniform(
        vocab_size=vocab_size, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=8, context=16
    )


def test_an_artifact_starts_whole_or_keeps_the_old_arch(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["some text"], 280, tmp_path / "tokenizer")
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    stage.start_artifact(artifact, small_arch(), tokenizer.path)
    assert load_arch(artifact / "arch.json") == small_arch()
    assert (artifact / "tokenizer" / "tokenizer.json").is_file()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        stage.start_artifact(artifact, small_arch(32), tokenizer.path)
    assert load_arch(artifact / "arch.json") == small_arch()
    assert sorted(p.name for p in artifact.iterdir()) == ["arch.json", "tokenizer"]


def test_a_checkpoint_without_its_place_in_the_data_is_not_resumed(tmp_path):
    import jax

    from nemojax.checkpoints import training
    from nemojax.checkpoints.artifact import Checkpoints
    from nemojax.model import llama
    from nemojax.optim import OptimConfig, make_optimizer

    arch = small_arch()
    tx = make_optimizer(OptimConfig(), 4)
    state = training.init_state(llama.init_params(arch, jax.random.key(0)), tx, jax.random.key(1))
    checkpoints = Checkpoints(tmp_path, arch=arch)
    checkpoints.save(3, state.params, {})
    checkpoints.wait()
    with pytest.raises(
        ValueError, match="checkpoint 3: expected the position in the data, got none; .*choose"
    ):
        training.resume(checkpoints, 3, state, None)
    checkpoints.close()
