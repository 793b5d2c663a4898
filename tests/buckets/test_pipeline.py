"""Pipelines in buckets: what a run leaves, what a change replaces, and every place where a kill can fall."""

import json
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from nemojax import buckets, cli, pipeline, stage
from nemojax.arch import load_arch
from nemojax.buckets import UNFINISHED, place
from nemojax.checkpoints import hf, hf_weights, side_files
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.data.shards import open_shards
from nemojax.data.tokenizer import load_tokenizer
from nemojax.model.llama import init_params
from nemojax.pipeline import Selection
from nemojax.stage import read_done
from tests.buckets.made import TEXTS, equal
from tests.test_pipeline import RECIPE, calls

assert calls  # a fixture


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def names_below(root) -> set[str]:
    return {str(file.relative_to(root)) for file in buckets.files_below(place(root))}


def test_it_runs_once_and_what_has_changed_is_replaced(bucket, calls, recipe, capsys):
    root = place(f"{bucket}/toy")
    arguments = ["run", f"--config={recipe}", f"--workdir={root}"]
    assert cli.main([*arguments, "--dry_run"]) == 0 and not root.exists()
    assert f'"source": "{root}/healed/half"' in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert calls == ["pretrain", "distill", "sft", "report"]
    dones = {name: (root / name / "DONE").read_text() for name in ("pretrain", "healed", "sft", "report")}
    assert cli.main(arguments) == 0 and len(calls) == 4
    assert dones == {name: (root / name / "DONE").read_text() for name in dones}

    calls.clear()
    assert cli.main([*arguments, "--config.healed.size=7"]) == 0
    assert calls == ["distill", "sft", "report"]
    assert f"the old one is in {root}/replaced/healed-1" in capsys.readouterr().out
    assert buckets.names_in(root / "replaced") == {"healed-1", "report-1", "sft-1"}
    assert (root / "replaced" / "healed-1" / "half").read_text() == "1"
    assert (root / "replaced" / "healed-1" / "DONE").read_text() == dones["healed"]
    assert (root / "healed" / "half").read_text() == "7"
    pipeline.run(pipeline.load(recipe, ["healed.size=7"]), root, Selection(first="sft", force=True))
    assert calls[3:] == ["sft", "report"] and (root / "replaced" / "sft-2" / "DONE").is_file()
    assert not any(UNFINISHED in name for name in names_below(root))


def test_a_failing_stage_is_named_and_resumed(bucket, calls, recipe, capsys):
    arguments = ["run", f"--config={recipe}", f"--workdir={bucket}/failing"]
    calls.broken = "distill"
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "nemojax: stage healed: size: expected less\n"
    calls.broken = ""
    assert cli.main(arguments) == 0 and calls == ["pretrain", "distill", "sft", "report"]
    assert not place(f"{bucket}/failing/replaced").exists()


def test_what_is_no_pipeline_is_left_alone(bucket, calls, recipe, capsys):
    mine = place(f"{bucket}/mine/thesis.txt")
    mine.write_text("precious")
    assert cli.main(["run", f"--config={recipe}", f"--workdir={mine.parent}"]) == 2
    assert "expected an empty directory or a pipeline's" in capsys.readouterr().err
    url = f"{bucket.partition('://')[0]}://other-bucket"
    assert cli.main(["run", f"--config={recipe}", f"--workdir={url}/run"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"{url}/run: cannot list the bucket {url}" in line
    assert names_below(mine.parent) == {"thesis.txt"} and calls == []


class Killed(BaseException):
    pass


class Changes:
    """Counts what changes a bucket and ends everything before the change of a number."""

    def __init__(self, patch, bucket):
        self.made, self.last = 0, -1
        system = type(buckets._system(bucket))
        for owner, name in (
            (buckets, "write_text"),
            (stage, "write_text"),
            (epath.Path(bucket).__class__, "unlink"),
            (epath.Path(bucket).__class__, "rmtree"),
            (system, "_cp_file"),
        ):
            patch.setattr(owner, name, self.counting(getattr(owner, name)))

    def counting(self, change):
        def counted(*args, **kwargs):
            if self.made == self.last:
                raise Killed
            self.made += 1
            return change(*args, **kwargs)

        return counted


FILES = (
    "config.json",
    "result.json",
    "DONE",
    "checkpoints/1/params/a",
    "checkpoints/1/commit_success.txt",
    "x/b",
)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # copies that a kill forestalls
def test_a_kill_anywhere_in_a_move_leaves_one_of_them_whole(bucket, monkeypatch):
    def whole(directory):
        there = names_below(directory)
        return UNFINISHED not in there and there >= set(FILES)

    changes, number, seen = Changes(monkeypatch, bucket), 0, set()
    while True:
        root = place(f"{bucket}/moves{number}")
        for name in FILES:
            (root / "sft" / name).write_text(name)
        (root / "mine").write_text("precious")
        changes.made, changes.last = 0, number
        ended = False
        try:
            stage.move_aside(root / "sft", root / "replaced")
            ended = True
        except Killed:
            pass
        changes.last = -1
        source, target = root / "sft", root / "replaced" / "sft-1"
        assert whole(source) or whole(target)
        for directory in (source, target):
            there = names_below(directory)
            assert whole(directory) or "DONE" not in there or UNFINISHED in there
            if (
                not there >= set(FILES)
                and directory == target
                and "checkpoints/1/commit_success.txt" in there
            ):
                assert "checkpoints/1/params/a" in there
        seen.add((whole(source), whole(target)))
        if whole(source):  # the next run moves it, over what was left of the first move
            moved = stage.move_aside(source, root / "replaced")
            assert whole(moved)
        assert not [name for name in names_below(root / "replaced") if UNFINISHED in name]
        assert (root / "mine").read_text() == "precious"
        if ended:
            break
        number += 1
    assert number > 10 and seen >= {(True, False), (False, True)} and not source.exists()


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_pipeline_killed_while_it_replaces_goes_on(bucket, calls, recipe, monkeypatch):
    """Before each change of the move in turn: the stage is run anew, and the old one is kept."""
    changes = Changes(monkeypatch, bucket)
    root, number, size = place(f"{bucket}/killed"), 0, 2
    steps = pipeline.load(recipe)
    pipeline.run(steps, root, Selection(only="pretrain"))
    while True:
        size += 1
        changed = pipeline.load(recipe, [f"pretrain.size={size}"])
        before = changes.made
        changes.last = before + number
        try:
            pipeline.run(changed, root, Selection(only="pretrain"))
            ended = True
        except Killed:
            ended = False
        changes.last = -1
        pipeline.run(changed, root, Selection(only="pretrain"))
        assert (root / "pretrain" / "half").read_text() == str(size) and read_done(root / "pretrain")
        kept = {
            (root / "replaced" / name / "half").read_text() for name in buckets.names_in(root / "replaced")
        }
        assert str(size - 1) in kept
        assert not any(UNFINISHED in name for name in names_below(root))
        if ended:
            break
        number += 1
    assert number > 8


@pytest.fixture
def exporting(bucket, model, request):
    """A pipeline whose one stage exports an artifact of the bucket, and its directory."""
    name = request.node.name.partition("[")[0]
    save_params(
        f"{bucket}/{name}/artifact", model.arch, model.params, tokenizer_dir=model.folder / "tokenizer"
    )
    steps = [pipeline.Step("export", "export", {"artifact": f"{bucket}/{name}/artifact"}, ())]
    return steps, place(f"{bucket}/{name}/run")


def weights_of(export) -> bytes:
    return (export / "model-00001-of-00001.safetensors").read_bytes()


def test_an_export(exporting, model, tmp_path):
    """The files of one in a folder; made once, and again when it is taken away; kept when inputs change."""
    import jax

    steps, root = exporting
    results = pipeline.run(steps, root)
    hf.export_hf(model.folder, tmp_path / "hf")
    mine = {str(file.relative_to(root / "export")): file for file in buckets.files_below(root / "export")}
    assert mine.keys() == names_below(tmp_path / "hf") | {pipeline.EXPORTED}
    for name in names_below(tmp_path / "hf"):
        assert mine[name].read_bytes() == (tmp_path / "hf" / name).read_bytes()
    (root / "export" / "note").write_text("mine")
    assert pipeline.run(steps, root) == results and (root / "export" / "note").is_file()
    buckets.remove_tree(root / "export")
    assert pipeline.run(steps, root) == results and not (root / "export" / "note").exists()
    buckets.remove_tree(root / ".export")  # as after a kill before DONE
    (root / "export" / "note").write_text("mine")
    assert pipeline.run(steps, root) == results and (root / "export" / "note").is_file()

    old = weights_of(root / "export")
    save_params(steps[0].config["artifact"], model.arch, init_params(model.arch, jax.random.key(1)))
    pipeline.run(steps, root)
    assert weights_of(root / "export") != old == weights_of(root / "replaced" / "export-1")
    assert buckets.names_in(root / "replaced") == {".export-1", "export-1"}
    buckets.remove_tree(root / "export")
    (root / "export" / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="export: expected nothing, or what this pipeline exported, got something"
    ):
        pipeline.run(steps, root)


def test_an_export_that_fails_or_is_killed_is_made_again(exporting, monkeypatch):
    steps, root = exporting

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "_write_weights", full)
        with pytest.raises(ValueError, match="No space left on device"):
            pipeline.run(steps, root)
    assert not (root / "export").exists()
    monkeypatch.setattr(hf, "_remove", lambda path: None)  # a killed process removes nothing
    for owner, name, killed in (
        (hf_weights, "of_all", lambda *_: True),  # between weights and their index
        (stage, "write_json", lambda path, *_: path.name == pipeline.EXPORTED),
        (side_files, "write_json", lambda path, *_: path == root / "export" / "config.json"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killing(getattr(owner, name), killed))
            with pytest.raises(Killed):
                pipeline.run(steps, root)
        left = buckets.names_in(root / "export")
        assert UNFINISHED in left and "config.json" not in left
        with pytest.raises(ValueError, match="no such file|neither|expected"):
            hf.import_hf(str(root / "export"), root.parent / "imported")
    results = pipeline.run(steps, root)
    assert UNFINISHED not in buckets.names_in(root / "export") and weights_of(root / "export")
    assert not (root / "replaced").exists() and pipeline.run(steps, root) == results


def killing(call, when):
    """The call, but for those at which everything ends."""

    def called(*args):
        if when(*args):
            raise Killed
        return call(*args)

    return called


WORK = """
def get_config():
    tokens = {{"name": "web", "kind": "tokens", "path": "@tokenize/shards/pydoc"}}
    fit = {{"steps": 4, "log_every": 1, "checkpoint_every": 2}}
    shape = {{"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_width": 32, "context": 128}}
    texts = {texts!r}
    return {{"stages": {{
        "tokenizer": {{"config": {{"vocab_size": 300}}}},
        "tokenize": {{"config": {{"tokenizer": "@tokenizer", "workers": 1}}}},
        "pretrain": {{"config": {{"tokenizer": "@tokenizer", "shape": shape, "fit": fit,
                                  "data": {{**texts, "sources": [tokens]}}}}}},
        "cache": {{"config": {{"teacher": "@pretrain", "data": texts, "steps": 2, "top_k": 4}}}},
        "distill": {{"config": {{"student": "@pretrain", "teacher": "@pretrain", "data": texts,
                                 "teaching": {{"cache": "@cache"}}, "loss": {{"top_k": 4, "cosine": 0.0}},
                                 "fit": {{"steps": 2, "log_every": 1}}}}}},
        "export": {{"config": {{"artifact": "@distill"}}}},
        "report": {{"config": {{"pipeline": "@."}}}},
    }}}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_real_stages(bucket, tmp_path):
    """The same models and results as in a folder; a change of the second reaches all that follows."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(WORK.format(texts=TEXTS))
    here, there = tmp_path / "run", place(f"{bucket}/run")

    def neutral(results, root):
        text = json.dumps({name: result for name, result in results.items() if name != "report"})
        return json.loads(text.replace(str(root), "ROOT"))

    steps = pipeline.load(recipe)
    mine, theirs = pipeline.run(steps, here), pipeline.run(steps, there)
    assert neutral(mine, here) == neutral(theirs, there)
    assert theirs["report"]["stages"] == mine["report"]["stages"] == 6
    assert equal(load_params(here / "distill")[1], load_params(there / "distill")[1])
    assert load_arch(there / "distill" / "arch.json") == load_arch(here / "distill" / "arch.json")
    shards = open_shards(there / "tokenize" / "shards" / "pydoc", load_tokenizer(there / "tokenizer"))
    assert len(shards) == theirs["tokenize"]["documents"]
    assert weights_of(there / "export") == weights_of(here / "export")
    assert "<html" in (there / "report.html").read_text(encoding="utf-8")
    dones = {step.name: read_done(pipeline.state_dir(step, there)) for step in steps}
    assert pipeline.run(steps, there) == theirs
    assert dones == {step.name: read_done(pipeline.state_dir(step, there)) for step in steps}

    changed = pipeline.load(recipe, ["pretrain.fit.steps=5"])
    again = pipeline.run(changed, there)
    assert again["pretrain"]["steps"] == 5 and again["tokenize"] == theirs["tokenize"]
    replaced = {f"{name}-1" for name in ("pretrain", "cache", "distill", ".export", "export", "report")}
    assert buckets.names_in(there / "replaced") == replaced
    assert all(read_done(there / "replaced" / name) for name in replaced - {"export-1"})
    assert equal(load_params(there / "replaced" / "pretrain-1")[1], load_params(here / "pretrain")[1])
    assert weights_of(there / "export") != weights_of(here / "export")
    assert weights_of(there / "replaced" / "export-1") == weights_of(here / "export")
    assert not any(UNFINISHED in name for name in names_below(there))
