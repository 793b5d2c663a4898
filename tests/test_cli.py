import errno
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import ModuleType

import pytest

from nemojax import cli
from nemojax.commands import STAGES
from nemojax.config import field


@dataclass(frozen=True)
class Fit:
    steps: int = field(10, "optimiser steps")
    profile_steps: str = field("", "first:last step to trace")


@dataclass(frozen=True)
class Config:
    fit: Fit = field(Fit(), "loop")
    seed: int = field(0, "random seed")


@pytest.fixture
def stage(monkeypatch):
    """A toy stage in place of `sft`: what it was called with, and what it raises."""
    module = ModuleType("fake_sft")
    module.calls, module.error = [], None  # pyright: ignore[reportAttributeAccessIssue]

    def run(cfg, workdir):
        module.calls.append((cfg, workdir))
        if module.error:
            raise module.error
        return {"loss": 1.25}

    module.__dict__.update(Config=Config, run=run)
    monkeypatch.setitem(sys.modules, "fake_sft", module)
    monkeypatch.setitem(STAGES, "sft", ("fake_sft", "fine-tune"))
    return module


def error_of(capsys, *args: str) -> str:
    """The one line that a bad command prints."""
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.strip()


def test_help_has_a_line_for_each_command_and_is_quick(capsys):
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "nemojax.cli", "--help"], capture_output=True, text=True)
    assert time.perf_counter() - start < 1.0
    commands = re.findall(r"^  (\w+)  +\S", done.stdout, re.MULTILINE)
    assert commands == list(cli.ORDER) and set(commands) == set(STAGES) | set(cli.OTHERS)
    assert cli.main([]) == 0


def test_command_help_lists_fields(stage, capsys):
    assert cli.main(["sft", "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"fit\.steps +10 +optimiser steps", out) and re.search(r"seed +0 +random seed", out)


def test_a_stage_is_configured_by_file_then_overrides(stage, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("def get_config():\n    return {'seed': 3, 'fit': {'steps': 20}}\n")
    args = ["sft", f"--config={recipe}", "--workdir=out", "--config.fit.steps=30", "--profile_steps=10:13"]
    assert cli.main(args) == 0
    assert stage.calls == [(Config(Fit(30, "10:13"), seed=3), "out")]
    assert capsys.readouterr().out == "sft: out loss=1.25\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pretran"], "unknown command 'pretran'; did you mean 'pretrain'?"),
        (["sft"], "the following arguments are required: --workdir"),
        (["sft", "--workdir=w", "--config.sed=1"], "sed: unknown key; did you mean 'seed'?"),
        (["sft", "--workdir=w", "--config.fit.steps=many"], "fit.steps: expected int, got 'many'"),
        (["sft", "--workdir=w", "--config.seed"], "--config.seed: expected --config.seed=VALUE"),
        (
            ["sft", "--workdir=w", "--seed=1"],
            "unknown argument '--seed=1'; fields are set by --config.NAME=VALUE",
        ),
        (["sft", "--workdir=w", "--config=nowhere.py"], "nowhere.py: no such configuration file"),
        (["run", "--workdir=w"], "the following arguments are required: --config"),
    ],
)
def test_bad_arguments(stage, capsys, args, message):
    assert message in error_of(capsys, *args)
    assert stage.calls == []


def test_a_pipeline_is_not_a_stage(stage, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("def get_config():\n    return {'stages': {}}\n")
    assert "use `nemojax run`" in error_of(capsys, "sft", f"--config={recipe}", "--workdir=w")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("layer 3: expected\n  4, got 5"), "nemojax: layer 3: expected 4, got 5"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.json"), "x.json"),
        (OSError(errno.ENOSPC, "No space left on device", "w/params"), "disk full: "),
        (RuntimeError("INTERNAL: write failed: No space left on device"), "free some space and run again"),
    ],
)
def test_errors_are_one_line(stage, capsys, error, message):
    stage.error = error
    assert message in error_of(capsys, "sft", "--workdir=w")


def test_our_own_bugs_keep_their_traceback(stage):
    stage.error = KeyError("embed")
    with pytest.raises(KeyError):
        cli.main(["sft", "--workdir=w"])


def test_the_traceback_on_demand(stage, capsys, monkeypatch):
    monkeypatch.setenv("NEMOJAX_TRACEBACK", "1")
    stage.error = ValueError("why")
    assert cli.main(["sft", "--workdir=w"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_exits_with_75(stage, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stage, "run", lambda cfg, workdir: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        cli.main(["sft", "--workdir=w"])
    assert stop.value.code == 75 and "run again to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_section_given_in_part_keeps_the_rest_of_its_own_defaults():
    """The field's, not its class's: the problems that RL practises stay training ones."""
    from nemojax.config import describe, from_dict
    from nemojax.rl.grpo import Config

    cfg = from_dict(Config, {"model": "m", "problems": {"count": 5}, "optim": {"lr": 0.5}})
    assert (cfg.problems.count, cfg.problems.split) == (5, "train")
    assert (cfg.optim.lr, cfg.optim.schedule) == (0.5, "constant")
    shown = {name: default for name, default, _ in describe(Config)}
    assert shown["problems.split"] == "'train'" and shown["model"] == "required"
    assert shown["optim.schedule"] == "'constant'"


def test_a_stage_with_a_table_prints_it_before_its_summary(stage, capsys):
    stage.table = lambda result: f"| loss | {result['loss']} |"
    assert cli.main(["sft", "--workdir=w"]) == 0
    table, summary = capsys.readouterr().out.splitlines()
    assert table == "| loss | 1.25 |" and summary == "sft: w loss=1.25"


def test_one_value_stands_for_a_list_of_one():
    from nemojax.compress.run import Config
    from nemojax.config import apply_overrides, from_dict

    values = apply_overrides(
        {"parent": "p"}, ["scoring.also=top1", "space.kv_heads=1", "space.ffn_ratios=0.5,0.25"]
    )
    cfg = from_dict(Config, values)
    assert (cfg.scoring.also, cfg.space.kv_heads, cfg.space.ffn_ratios) == (("top1",), (1,), (0.5, 0.25))
    with pytest.raises(ValueError, match=r"data.sources: expected a list, got 'x'"):
        from_dict(Config, {"parent": "p", "data": {"sources": "x"}})
    with pytest.raises(ValueError, match=r"space.kv_heads.0: expected int, got 'x'"):
        from_dict(Config, {"parent": "p", "space": {"kv_heads": "x"}})
