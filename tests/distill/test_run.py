"""The stage end to end: a child of another shape is healed against its parent, or against two of them."""

import json

import jax
import pytest

from nemojax.checkpoints.artifact import load_params
from nemojax.config import from_dict
from nemojax.distill import distill


def config(folder, data, **values) -> distill.Config:
    fit = {"steps": 30, "log_every": 1, "eval_every": 15}
    return from_dict(
        distill.Config,
        {"student": str(folder / "child"), "teacher": str(folder / "parent"), "data": data, "fit": fit}
        | {"optim": {"lr": 4e-3, "warmup_steps": 2, "weight_decay": 0.0}}
        | values,
    )


def log(workdir, name: str) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def test_the_student_comes_nearer_to_its_teachers(folder, data, tmp_path):
    """Two of them, in fewer bits than the student and over tensor alone; some samples are its own."""
    _, teacher = load_params(folder / "parent")
    more = [{"teacher": str(folder / "other"), "share": 0.2}]
    teaching = {"more": more, "dtype": "bfloat16", "split": "tensor"}
    mesh = {"data": 1, "fsdp": 4, "tensor": 2}
    own = {"share": 0.2, "prompt_tokens": 6, "max_new_tokens": 8}
    cfg = config(folder, data, teaching=teaching, mesh=mesh, on_policy=own)
    result = distill.run(cfg, tmp_path / "run")
    assert len(log(tmp_path / "run", "train/kl")) == 30
    assert 0 < log(tmp_path / "run", "train/on_policy")[-1] < 0.5
    assert result["tokens"] == 30 * 8 * 32
    before, after, of_teacher = (
        result[name]["loss"] for name in ("heldout_before", "heldout", "heldout_teacher")
    )
    assert result["gap_nats"] == pytest.approx(before - of_teacher)
    closed = (before - after) / result["gap_nats"] if result["gap_nats"] > 0 else None
    assert result["gap_closed"] == (closed if closed is None else pytest.approx(closed))
    assert result["gap_closed_by_source"] == {"words": result["gap_closed"]}  # there is one source
    assert result["heldout_kl"]["loss"] < 0.7 * result["heldout_kl_before"]["loss"]
    assert result["heldout_kl"]["words"] == pytest.approx(result["heldout_kl"]["loss"])
    validated = log(tmp_path / "run", "validation/kl")
    assert len(validated) == 2 and validated[-1] == pytest.approx(result["heldout_kl"]["loss"], rel=1e-5)
    arch, healed = load_params(tmp_path / "run")
    student_arch, student = load_params(folder / "child")
    assert arch == student_arch and not same(healed, student)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(healed)} == {"float32"}
    assert same(teacher, load_params(folder / "parent")[1])
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()


def test_it_needs_heldout_texts(folder, data, tmp_path):
    sources = [source | {"heldout_share": 0.0} for source in data["sources"]]
    nothing = {"sources": sources, "length": 32, "batch_size": 8}
    with pytest.raises(ValueError, match=r"data\.heldout: expected held-out texts, got none"):
        distill.run(config(folder, nothing), tmp_path / "run")


def test_rows_fit_the_context(folder, data, tmp_path):
    with pytest.raises(ValueError, match=r"data\.length: expected at most the context 128, got 256"):
        distill.run(config(folder, data | {"length": 256}), tmp_path / "run")


def test_the_configuration_is_checked(folder, data):
    with pytest.raises(ValueError, match=r"on_policy\.share: expected 0 beside teaching\.cache"):
        config(folder, data, teaching={"cache": "there"}, on_policy={"share": 0.5})
    with pytest.raises(ValueError, match=r"teaching\.more: expected one teacher beside a cache, got 2"):
        config(folder, data, teaching={"cache": "there", "more": [{"teacher": "there"}]})
    with pytest.raises(ValueError, match=r"loss\.tokens\.shared: expected 0 beside teaching\.cache"):
        config(folder, data, teaching={"cache": "there"}, loss={"tokens": {"shared": 300}})
    with pytest.raises(ValueError, match=r"loss\.lm: expected 0 beside on_policy\.share"):
        config(folder, data, on_policy={"share": 0.5}, loss={"lm": 0.5})
    with pytest.raises(ValueError, match=r"teaching\.more\.0\.share: expected a positive number, got 0"):
        config(folder, data, teaching={"more": [{"teacher": "there", "share": 0.0}]})
