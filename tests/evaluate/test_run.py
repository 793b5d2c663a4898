"""The stage end to end on two tiny models, its numbers against calls made one by one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nemojax.arch import uniform
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.config import from_dict
from nemojax.data.mixture import heldout_batches
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer
from nemojax.evaluate import run as stage
from nemojax.evaluate.tasks import ask_all, load_records, paired_bootstrap, per_prompt, summarise
from nemojax.generate.local import Model
from nemojax.model import llama
from nemojax.sharding import make_mesh

ROW = {"artifact", "num_params", "num_block_params", "kv_elements_per_token", "heldout", "latency"}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> stage.Config:
    """`first` and `second` differ in their weights; only these two are asked, `third` is just measured."""
    folder = tmp_path_factory.mktemp("evaluate")
    texts = ["1 + 2 = 3, and 3 + 4 = 7", "one and two make three"]
    (folder / "heldout.jsonl").write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, 300, folder / "tokenizer")
    arch = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ffn_width=32,
        context=128,
    )
    models = {}
    for seed, name in enumerate(("first", "second", "third")):
        params = llama.init_params(arch, jax.random.key(seed))
        models[name] = str(save_params(folder / name, arch, params, tokenizer_dir=folder / "tokenizer"))
    source = {"name": "sums", "kind": "jsonl", "path": str(folder / "heldout.jsonl")}
    values = {
        "models": models,
        "data": {"sources": [source], "heldout": [source], "length": 64, "batch_size": 2},
        "tasks": {"problems": {"families": ["sum2x1"], "count": 6}, "max_new_tokens": 8, "samples": 2},
        "asked": ["first", "second"],
        "latency": {"batch": 2, "prompt": 8, "new_tokens": 4, "repeats": 2},
        "conversations": 2,
    }
    return from_dict(stage.Config, values)


@pytest.fixture(scope="module")
def workdir(cfg, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "evaluate"
    stage.run(cfg, path)
    return path


@pytest.fixture(scope="module")
def result(workdir):
    return json.loads((workdir / "result.json").read_text())


def test_rows(cfg, result):
    assert set(result) == {"models", "commonest_answer_share", "comparisons"}
    assert list(result["models"]) == ["first", "second", "third"]
    for name, row in result["models"].items():
        assert set(row) == ROW | ({"tasks"} if name in cfg.asked else set())
        arch, _ = load_params(cfg.models[name])
        assert row["artifact"] == cfg.models[name]
        assert row["num_params"] == arch.num_params() > row["num_block_params"] == arch.num_block_params()
        assert row["kv_elements_per_token"] == 2 * 2 * 8  # keys and values, layers, one head of 8
        assert row["latency"].keys() == {"prefill_ms", "decode_tokens_per_second"}
        assert min(row["latency"].values()) > 0


def test_heldout_losses_are_the_models(cfg, result):
    batches = heldout_batches(cfg.data, load_tokenizer(cfg.models["first"]))["sums"]
    for name, row in result["models"].items():
        arch, params = load_params(cfg.models[name])
        total = weight = 0.0
        for batch in batches:
            logits, _ = llama.apply(params, arch, {k: jnp.asarray(v) for k, v in batch.items()})
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            total += float(jnp.sum(nll * batch["weights"]))
            weight += float(batch["weights"].sum())
        assert row["heldout"].keys() == {"sums", "loss"}
        assert row["heldout"]["loss"] == pytest.approx(total / weight, rel=1e-5)
        assert row["heldout"]["sums"] == pytest.approx(row["heldout"]["loss"], rel=1e-12)


def test_answers_and_comparisons(cfg, result, workdir):
    records = {name: load_records(workdir / f"tasks_{name}.jsonl") for name in cfg.asked}
    mesh = make_mesh(cfg.mesh)
    arch, params = stage.load_model(cfg.models["second"], mesh)
    tokenizer = load_tokenizer(cfg.models["second"])
    assert records["second"] == ask_all(Model(arch, tokenizer, params, mesh=mesh), cfg.tasks)
    for name, asked in records.items():
        assert len(asked) == 12 and all(len(r["accuracy"]) == len(r["text"]) == 2 for r in asked)
        assert result["models"][name]["tasks"] == summarise(asked)
    assert not (workdir / "tasks_third.jsonl").exists()
    answers = [r["reference"] for r in records["first"] if r["thinking"]]
    commonest = max(answers.count(a) for a in answers) / len(answers)
    assert result["commonest_answer_share"] == {"sum2x1": commonest}
    assert [(c["before"], c["after"], c["thinking"]) for c in result["comparisons"]] == [
        ("first", "second", "off"),
        ("first", "second", "on"),
    ]
    for row in result["comparisons"]:
        a, b = (per_prompt(records[name], row["thinking"] == "on") for name in cfg.asked)
        expected = paired_bootstrap(a, b, seed=cfg.tasks.seed)
        np.testing.assert_allclose([row["pass@1"], row["low"], row["high"]], expected)


def test_conversations(cfg, workdir):
    rows = load_records(workdir / "conversations.jsonl")
    assert [(r["model"], r["thinking"]) for r in rows] == [
        (name, thinking) for name in cfg.asked for thinking in (True, True, False, False)
    ]
    asked = load_records(workdir / "tasks_first.jsonl")
    assert rows[0]["prompt"] == asked[0]["prompt"] and rows[0]["text"] == asked[0]["text"][0]


def test_refusals(cfg, tmp_path):
    with pytest.raises(ValueError, match="models: expected at least one artifact, got none"):
        stage.run(stage.Config(), tmp_path / "a")
    with pytest.raises(ValueError, match="asked: expected names among models, got 'fourth'"):
        dataclasses.replace(cfg, asked=("fourth",))
    gone = dataclasses.replace(cfg, models={"first": str(tmp_path / "gone")}, asked=())
    with pytest.raises(ValueError, match="gone: expected an artifact"):
        stage.run(gone, tmp_path / "b")
