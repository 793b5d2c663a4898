"""Pipelines over toy stages: one whose work is a file, so that everything here takes milliseconds."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nemojax import cli, pipeline, stage
from nemojax.checkpoints import hf
from nemojax.checkpoints.artifact import save_params
from nemojax.config import field
from nemojax.pipeline import Selection
from nemojax.stage import run_stage
from tests.checkpoints.toy_models import MIXED, random_params

RECIPE = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({
        "stages": {
            "healed": {"kind": "distill", "config": {"source": "@pretrain"}},
            "pretrain": {"config": {"size": 2}},
            "report": {"config": {"source": "@."}},
            "sft": {"config": {"source": "@healed/half", "size": 5}},
        }
    })
"""


@dataclass(frozen=True)
class Config:
    source: str = field("", "what to read")
    size: int = field(1, "a number")


class Calls(list):
    """Names of the stages that did work; `broken` names one that fails."""

    broken = ""


@pytest.fixture
def calls(monkeypatch) -> Calls:
    made = Calls()

    def module(kind: str) -> Any:
        def run(cfg: Config, workdir: Path) -> dict:
            def body(path: Path) -> dict:
                (path / "half").write_text(str(cfg.size))
                if made.broken == kind:
                    raise ValueError("size: expected less")
                made.append(kind)
                return {"size": cfg.size, "nested": {"read": len(cfg.source)}}

            return run_stage(kind, cfg, workdir, [cfg.source] if cfg.source else [], body)

        fake = ModuleType(f"fake_{kind}")
        fake.__dict__.update(Config=Config, run=run)
        return fake

    for kind in ("pretrain", "distill", "sft", "report"):
        monkeypatch.setitem(sys.modules, f"fake_{kind}", module(kind))
        monkeypatch.setitem(pipeline.STAGES, kind, (f"fake_{kind}", "a toy"))
    return made


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def test_references_decide_the_order(calls, recipe):
    assert [(s.name, s.kind) for s in pipeline.load(recipe)] == [
        ("pretrain", "pretrain"),
        ("healed", "distill"),
        ("sft", "sft"),
        ("report", "report"),
    ]


def test_runs_everything_once(calls, recipe, tmp_path):
    steps, root = pipeline.load(recipe), tmp_path / "run"
    results = pipeline.run(steps, root)
    assert calls == ["pretrain", "distill", "sft", "report"] and results["sft"]["size"] == 5
    assert pipeline.run(steps, root) == results and len(calls) == 4


def test_a_changed_stage_is_moved_aside_and_what_follows_runs_again(calls, recipe, tmp_path, capsys):
    root = tmp_path / "run"
    pipeline.run(pipeline.load(recipe), root)
    calls.clear()
    pipeline.run(pipeline.load(recipe, ["healed.size=7"]), root)
    assert calls == ["distill", "sft", "report"]
    assert (root / "replaced" / "healed-1" / "half").read_text() == "1"
    assert (root / "healed" / "half").read_text() == "7"
    assert "configuration or inputs have changed" in capsys.readouterr().out


def test_a_failing_stage_is_named_and_later_resumed(calls, recipe, tmp_path, capsys):
    calls.broken = "distill"
    args = ["run", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(args) == 2
    assert capsys.readouterr().err == "nemojax: stage healed: size: expected less\n"
    calls.broken = ""
    assert cli.main(args) == 0
    assert calls == ["pretrain", "distill", "sft", "report"] and not (tmp_path / "run" / "replaced").exists()
    out = capsys.readouterr().out
    assert "pretrain: done before size=2" in out and "half done" in out


def test_selections(calls, recipe, tmp_path):
    steps, root = pipeline.load(recipe), tmp_path / "run"
    with pytest.raises(ValueError, match="pretrain: not done, and healed needs it; run it first"):
        pipeline.run(steps, root, Selection(only="healed"))
    pipeline.run(steps, root, Selection(only="pretrain"))
    pipeline.run(steps, root, Selection(first="healed"))
    assert calls == ["pretrain", "distill", "sft", "report"]
    calls.clear()
    pipeline.run(steps, root, Selection(first="sft", force=True))
    assert calls == ["sft", "report"] and (root / "replaced" / "sft-1").is_dir()
    with pytest.raises(ValueError, match="no stage 'stf'; did you mean 'sft'"):
        pipeline.run(steps, root, Selection(only="stf"))
    with pytest.raises(ValueError, match="expected one of them"):
        pipeline.run(steps, root, Selection(only="sft", first="sft"))


def test_earlier_stages_stay_as_they_are_with_from(calls, recipe, tmp_path):
    root = tmp_path / "run"
    pipeline.run(pipeline.load(recipe), root)
    calls.clear()
    pipeline.run(pipeline.load(recipe, ["pretrain.size=3", "sft.size=6"]), root, Selection(first="sft"))
    assert calls == ["sft", "report"]


def test_a_dry_run_says_what_each_stage_would_do(calls, recipe, tmp_path, capsys):
    args = ["run", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", "--dry_run"]
    pipeline.run(pipeline.load(recipe), tmp_path / "run", Selection(only="pretrain"))
    (tmp_path / "run" / "sft").mkdir()
    (tmp_path / "run" / "sft" / stage.CONFIG).write_text("{}")
    assert cli.main([*args, "--from=sft"]) == cli.main(args) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    plans = {(cells[1].strip(), cells[4].strip(), cells[5].strip()) for cells in rows}
    assert {("pretrain", "done", "leave"), ("pretrain", "done", "skip if unchanged")} <= plans
    assert ("sft", "half done", "resume") in plans and any(state == "new" for _, state, _ in plans)


def test_dry_run_writes_nothing(calls, recipe, tmp_path, capsys):
    root = tmp_path / "run"
    args = ["run", f"--config={recipe}", f"--workdir={root}", "--dry_run", "--config.sft.size=8"]
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert '"size": 8' in out and f'"source": "{root}/healed/half"' in out
    assert not root.exists() and calls == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stf.size=1"], r"--config\.stf\.size=1: no stage 'stf'; did you mean 'sft'\?"),
        (["sft.sizes=1"], r"sft\.sizes: unknown key; did you mean 'size'\?"),
        (["sft.size=big"], r"sft\.size: expected int, got 'big'"),
        (["sft.source=@heald"], r"stages\.sft: @heald: no such stage; did you mean 'healed'"),
        (["pretrain.source=@sft"], r"stages healed, pretrain, .*: each needs another one of them first"),
        (["stages.sft.kind=stf"], r"stages\.sft\.kind: unknown kind 'stf'; did you mean 'sft'"),
        (["stages.rl.config.size=1"], r"stages\.rl: no such stage"),
    ],
)
def test_bad_recipes_stop_before_the_first_stage(calls, recipe, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        pipeline.run(pipeline.load(recipe, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists() and calls == []


def test_not_a_pipeline(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("def get_config():\n    return {'steps': 1}\n")
    with pytest.raises(ValueError, match="expected a section `stages`, got none"):
        pipeline.load(path)


def test_a_directory_of_other_files_is_refused(calls, recipe, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert cli.main(["run", f"--config={recipe}", f"--workdir={tmp_path / 'mine'}"]) == 2
    assert "expected an empty directory or a pipeline's" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.fixture
def exporting(tmp_path) -> tuple[list[pipeline.Step], Path]:
    """A pipeline whose one stage exports an artifact beside it, and its directory."""
    save_params(tmp_path / "artifact", MIXED, random_params(MIXED))
    steps = [pipeline.Step("export", "export", {"artifact": str(tmp_path / "artifact")}, ())]
    return steps, tmp_path / "run"


def folders(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in (*root.glob("*/"), *root.glob("replaced/*")))


def weights_of(export: Path) -> bytes:
    return next(export.glob("*.safetensors")).read_bytes()


def test_an_export_is_made_once_and_again_when_it_is_taken_away(exporting):
    steps, root = exporting
    results = pipeline.run(steps, root)
    made = (root / "export" / "config.json").stat().st_mtime_ns
    assert pipeline.run(steps, root) == results
    assert (root / "export" / "config.json").stat().st_mtime_ns == made
    shutil.rmtree(root / "export")
    assert pipeline.run(steps, root) == results
    assert (root / "export" / "config.json").is_file() and folders(root) == [".export", "export"]


def test_an_export_of_other_inputs_is_kept_in_replaced(exporting, tmp_path, capsys):
    steps, root = exporting
    pipeline.run(steps, root)
    old = weights_of(root / "export")
    save_params(tmp_path / "artifact", MIXED, random_params(MIXED, seed=1))
    pipeline.run(steps, root)
    assert weights_of(root / "export") != old == weights_of(root / "replaced" / "export-1")
    assert not (root / "replaced" / "export-1" / stage.LOCK).exists()
    assert f"the old one is in {root}/replaced/export-1" in capsys.readouterr().out
    pipeline.run(steps, root, Selection(force=True))
    assert folders(root)[-4:] == [
        f"replaced/{name}" for name in (".export-1", ".export-2", "export-1", "export-2")
    ]


def test_an_export_without_its_books_is_recognised(exporting):
    """As after a kill between the rename and DONE."""
    steps, root = exporting
    results = pipeline.run(steps, root)
    shutil.rmtree(root / ".export")
    assert pipeline.run(steps, root) == results and folders(root) == [".export", "export"]


def test_an_export_that_fails_leaves_the_old_one_aside_and_nothing_half_written(exporting, monkeypatch):
    steps, root = exporting

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(hf, "_write_weights", full)
        with pytest.raises(ValueError, match="No space left on device"):
            pipeline.run(steps, root)
    assert folders(root) == [".export"] and not list((root / ".export").glob("*made*"))
    pipeline.run(steps, root)
    assert folders(root) == [".export", "export"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_the_pipeline_did_not_export_is_refused_before_the_first_stage(calls, recipe, tmp_path, kind):
    root, steps = tmp_path / "run", pipeline.load(recipe)
    steps.append(pipeline.Step("export", "export", {"artifact": "@sft"}, ("sft",)))
    pipeline.run(steps, root, Selection(only="pretrain"))
    mine = root / "export"
    if kind == "directory":
        mine.mkdir()
        mine = mine / "config.json"
    mine.write_text(json.dumps({"precious": True}))
    with pytest.raises(ValueError, match="export: expected nothing, or what this pipeline exported, got"):
        pipeline.run(steps, root)
    assert calls == ["pretrain"] and json.loads(mine.read_text()) == {"precious": True}
    pipeline.run(steps, root, Selection(only="healed"))
