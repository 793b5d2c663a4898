"""The stage end to end on a tiny random parent: from artifact to artifact, resumed and refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.compress.cost import CostConfig
from nemojax.compress.library import Bld
from nemojax.compress.run import Budget, Config, run
from nemojax.compress.score import Scoring
from nemojax.compress.space import Space
from nemojax.config import from_dict, to_dict
from nemojax.data.mixture import TextData
from nemojax.data.sources import Source, load_texts
from nemojax.data.tokenizer import train_tokenizer
from nemojax.model.llama import init_params


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    root = tmp_path_factory.mktemp("compress")
    texts = root / "texts.jsonl"
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "one", "two", "three", "and", "or", "not", "then"]
    texts.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 60))}) + "\n" for _ in range(40)))
    source = Source(name="words", kind="jsonl", path=str(texts))
    tokenizer = train_tokenizer(load_texts(source), 320, root / "tokenizer")
    arch = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        ffn_width=48,
        context=64,
        head_dim=8,
    )
    save_params(root / "parent", arch, init_params(arch, jax.random.key(0)), tokenizer_dir=root / "tokenizer")
    return Config(
        parent=str(root / "parent"),
        data=TextData(sources=(source,), length=32, batch_size=8),
        space=Space(kv_heads=(1,), ffn_ratios=(0.5,), multiple=8),
        bld=Bld(steps=4),
        scoring=Scoring(batches=1),
        cost=CostConfig(timing_batch=4, timing_length=32, repeats=2),
        budget=Budget(ratio={"params": 0.65, "prefill_ms": 2.0}),
    )


def test_run(cfg, tmp_path):
    result = run(cfg, tmp_path)
    assert result["block_params_ratio"] <= 0.65 and result["predicted_score"] > 0
    assert set(result["seconds"]) == {
        "data",
        "importance",
        "library",
        "scores",
        "costs",
        "search",
        "assembly",
    }
    arch, params = load_params(tmp_path)
    parent, parent_params = load_params(cfg.parent)
    assert arch.num_params() == result["num_params"]
    assert np.array_equal(params["embed"]["weight"], parent_params["embed"]["weight"])
    solution = json.loads((tmp_path / "solution.json").read_text())
    assert sum(c["params"] for c in solution["layers"]) == arch.num_block_params()
    assert (tmp_path / "map.txt").read_text().count("\n") == parent.num_layers + 1
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["layers"][0][0]["name"] == "kv2+ffn48" and table["layers"][0][0]["score"] == 0.0
    assert "measured" in table["provenance"]["prefill_ms"]
    assert from_dict(Config, to_dict(cfg)) == cfg


def test_an_interrupted_run_continues_to_the_same_child(cfg, tmp_path, monkeypatch):
    from nemojax.compress import run as stage

    # a stopwatch never shows the same twice, and the search may follow it
    cfg = dataclasses.replace(
        cfg, cost=dataclasses.replace(cfg.cost, timings=()), budget=Budget(ratio={"params": 0.65})
    )
    whole, workdir = tmp_path / "whole", tmp_path / "interrupted"
    expected = run(cfg, whole)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "score_into", stop)
        with pytest.raises(KeyboardInterrupt):
            run(cfg, workdir)
    files = {p: p.stat().st_mtime_ns for p in (workdir / "library").rglob("*") if p.is_file()}
    result = run(cfg, workdir)
    assert files and all(p.stat().st_mtime_ns == t for p, t in files.items())
    assert {**result, "seconds": None} == {**expected, "seconds": None}
    (arch, params), (other, others) = load_params(workdir), load_params(whole)
    assert arch == other and arch.blocks != load_params(cfg.parent)[0].blocks
    assert jax.tree.all(jax.tree.map(np.array_equal, params, others))
    for name in ("scores.json", "table.json", "solution.json"):
        assert (workdir / name).read_text() == (whole / name).read_text()


def test_impossible_budget_and_short_data(cfg, tmp_path):
    none = dataclasses.replace(cfg, bld=Bld(steps=0), cost=dataclasses.replace(cfg.cost, timings=()))
    tight = dataclasses.replace(none, budget=Budget(ratio={}, maximum={"params": 10.0}))
    with pytest.raises(ValueError, match="params max 10 .least possible: "):
        run(tight, tmp_path / "tight")
    unknown = dataclasses.replace(none, budget=Budget(ratio={"price": 0.5}))
    with pytest.raises(ValueError, match="column 'price'"):
        run(unknown, tmp_path / "unknown")
