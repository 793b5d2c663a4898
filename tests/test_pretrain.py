"""Pre-training on local files, and every other stage that reads the same pattern of files after it."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from nemojax import cli, pretrain
from nemojax.config import from_dict
from nemojax.data.heldout import heldout_side
from nemojax.data.tokenizer import train_tokenizer
from nemojax.stage import read_result

pytestmark = pytest.mark.slow

WORDS = "red green blue one two three and or not then".split()
TEXTS = [" ".join(WORDS[i * (j + 1) % 10] for j in range(20)) + f" {i}" for i in range(300)]
DRIVER = """
import json, sys
from nemojax import cli
for arguments in json.loads(sys.argv[1]):
    if code := cli.main(arguments):
        sys.exit(code)
"""
SHAPE = {"dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "ffn_width": 64, "context": 192}


def write_texts(path, texts):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as out:
        out.write("\n\n".join(json.dumps({"text": text}) for text in texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts in three files of one pattern, one of them packed, and chats in two."""
    folder = tmp_path_factory.mktemp("files")
    for number, name in enumerate(("texts-0.jsonl", "texts-1.jsonl", "texts-2.jsonl.gz")):
        write_texts(folder / name, TEXTS[number::3])
    for part in range(2):
        rows = [{"input": f"say {i}", "output": f"{i}"} for i in range(part, 200, 2)]
        (folder / f"chats-{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipes(folder):
    """{stage: its configuration}, all on the same pattern of files."""
    texts = {"name": "words", "kind": "jsonl", "path": str(folder / "texts-*")}
    data = {"sources": [texts], "length": 64, "batch_size": 4, "heldout_batches": 50}
    chats = {"name": "chats", "path": str(folder / "chats-*.jsonl")}
    fit = {"steps": 4, "log_every": 2}
    runs = {name: str(folder / name) for name in ("tokenizer", "pretrain", "compress", "distill")}
    asked = {"problems": {"families": ["sum2x1"], "count": 1}, "thinking": "off", "max_new_tokens": 2}
    return {
        "tokenizer": {"sources": [texts], "vocab_size": 300},
        "pretrain": {"tokenizer": runs["tokenizer"], "shape": SHAPE, "data": data, "fit": fit},
        "compress": {
            "parent": runs["pretrain"],
            "data": data,
            "space": {"kv_heads": [1], "ffn_ratios": [0.5], "multiple": 8},
            "bld": {"steps": 2},
            "scoring": {"batches": 1},
            "cost": {"timings": []},
        },
        "distill": {"student": runs["compress"], "teacher": runs["pretrain"], "data": data, "fit": fit},
        "sft": {"model": runs["distill"], "data": {"sources": [chats], "length": 192}, "fit": fit},
        "evaluate": {
            "models": {"parent": runs["pretrain"], "distilled": runs["distill"]},
            "data": data,
            "tasks": asked,
            "asked": ["distilled"],
            "latency": {"batch": 0},
        },
    }


def commands(folder):
    """The command line of each stage."""
    for name, recipe in recipes(folder).items():
        config = folder / f"{name}.py"
        config.write_text(f"def get_config():\n    return {recipe!r}\n")
        yield name, [name, f"--config={config}", f"--workdir={folder / name}"]


def test_every_stage_reads_one_pattern_and_holds_the_same_texts_out(folder):
    lines = dict(commands(folder))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(list(lines.values()))],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    for name in ("texts-0.jsonl", "texts-2.jsonl.gz"):  # the count of blank lines reaches the user
        assert f"{folder / name}: skipped 99 blank lines" in done.stderr
    results = {name: read_result(folder / name) for name in lines}

    heldout = [TEXTS[place] for place in heldout_side(TEXTS, 0.02)]
    assert heldout and results["tokenizer"]["documents"] == len(TEXTS) - len(heldout)
    assert results["pretrain"]["heldout"].keys() == {"words", "loss"}
    assert results["sft"]["heldout"].keys() == {"chats", "loss"}
    assert results["sft"]["conversations"]["chats"] < 200
    # the teacher, the parent at its end and the parent in the table are measured on the same texts
    loss = results["pretrain"]["heldout"]["words"]
    assert results["distill"]["heldout_teacher"]["words"] == pytest.approx(loss, rel=1e-5)
    measured = results["evaluate"]["models"]
    assert measured["parent"]["heldout"]["words"] == pytest.approx(loss, rel=1e-5)
    assert measured["distilled"]["heldout"] == pytest.approx(results["distill"]["heldout"], rel=1e-5)

    for name, line in lines.items():
        inputs = json.loads((folder / name / "config.json").read_text())["inputs"]
        kind = "chats" if name == "sft" else "texts"
        read = {os.path.basename(path) for path in inputs if path.endswith(("jsonl", "gz"))}
        assert read == {path.name for path in folder.glob(f"{kind}-*")}, name
        assert cli.main(line) == 0  # done, nothing runs again


def config(tmp_path, sources, **data):
    train_tokenizer(TEXTS[:20], 300, tmp_path / "tokenizer")
    values = {"sources": sources, "length": 64, "batch_size": 8} | data
    recipe = {"tokenizer": str(tmp_path), "shape": SHAPE, "data": values, "fit": {"steps": 2}}
    return from_dict(pretrain.Config, recipe)


def test_validation_is_named_or_left_out_for_a_small_source(tmp_path):
    write_texts(tmp_path / "small.jsonl", ["one two", "red green"])
    write_texts(tmp_path / "other.jsonl", ["blue and three", "not one"])
    small, other = (
        {"name": n, "kind": "jsonl", "path": str(tmp_path / f"{n}.jsonl")} for n in ("small", "other")
    )
    with pytest.raises(
        ValueError, match="source small: expected a held-out document .*name a file in data.held"
    ):
        pretrain.run(config(tmp_path, [small]), tmp_path / "a")
    result = pretrain.run(config(tmp_path, [small], heldout=[other]), tmp_path / "b")
    assert result["heldout"].keys() == {"other", "loss"}
    result = pretrain.run(config(tmp_path, [small | {"heldout_share": 0.0}]), tmp_path / "c")
    assert result["heldout"] == {}
