"""The stage end to end: a damaged copy of a tiny model is healed against the whole one."""

import json

import jax
import pytest

from nemojax.arch import BlockSpec, NoOp, uniform
from nemojax.checkpoints.artifact import load_params, save_params
from nemojax.compress.assemble import assemble, child_arch
from nemojax.compress.library import Library
from nemojax.config import from_dict
from nemojax.data.tokenizer import train_tokenizer
from nemojax.distill import distill
from nemojax.model.llama import init_params

ROW = " ".join(["red green blue one two three and or not then"] * 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """teacher/ and student/, which lacks the second feed-forward, and a file of texts."""
    path = tmp_path_factory.mktemp("distill")
    (path / "texts.jsonl").write_text((json.dumps({"text": ROW}) + "\n") * 16)
    tokenizer = train_tokenizer([ROW], 300, path / "tokenizer")
    arch = uniform(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ffn_width=32,
        context=64,
    )
    # larger weights than fresh ones: the feed-forward that goes missing must have done something
    params = jax.tree.map(lambda w: 1.5 * w, init_params(arch, jax.random.key(0)))
    child = child_arch(arch, (arch.blocks[0], BlockSpec(arch.blocks[1].attn, NoOp())))
    save_params(path / "teacher", arch, params, tokenizer_dir=path / "tokenizer")
    healthy = assemble(params, arch, child, Library(path / "none"))
    save_params(path / "student", child, healthy, tokenizer_dir=path / "tokenizer")
    return path


def config(folder, **values) -> distill.Config:
    source = {"name": "words", "kind": "jsonl", "path": str(folder / "texts.jsonl")}
    data = {"sources": [source], "heldout": [source], "length": 32, "batch_size": 8, "heldout_batches": 1}
    fit = {"steps": 30, "log_every": 1}
    return from_dict(
        distill.Config,
        {"student": str(folder / "student"), "teacher": str(folder / "teacher"), "data": data, "fit": fit}
        | {"optim": {"lr": 2e-3, "warmup_steps": 2, "weight_decay": 0.0}}
        | values,
    )


def test_the_student_comes_nearer_to_its_teacher(folder, tmp_path):
    teacher = load_params(folder / "teacher")[1]
    result = distill.run(config(folder), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kl = [row["train/kl"] for row in rows if "train/kl" in row]
    assert len(kl) == 30 and kl[-1] < 0.5 * kl[0]
    assert result["tokens"] == 30 * 8 * 32
    before, after, of_teacher = (
        result[name]["loss"] for name in ("heldout_before", "heldout", "heldout_teacher")
    )
    assert result["gap_nats"] == pytest.approx(before - of_teacher)
    closed = (before - after) / result["gap_nats"] if result["gap_nats"] > 0 else None
    assert result["gap_closed"] == (closed if closed is None else pytest.approx(closed))
    arch, healed = load_params(tmp_path / "run")
    student_arch, student = load_params(folder / "student")
    assert arch == student_arch
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), healed, student))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), teacher, load_params(folder / "teacher")[1])
    assert all(jax.tree.leaves(same))
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()


def test_it_needs_heldout_texts(folder, tmp_path):
    source = {"name": "words", "kind": "jsonl", "path": str(folder / "texts.jsonl")}
    nothing = {"sources": [source | {"heldout_share": 0.0}], "length": 32, "batch_size": 8}
    with pytest.raises(ValueError, match=r"data\.heldout: expected held-out texts, got none"):
        distill.run(config(folder, data=nothing), tmp_path / "run")
