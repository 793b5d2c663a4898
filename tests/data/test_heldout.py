"""The held-out share: decided by what a document says, and by nothing else."""

import json
from dataclasses import replace

import numpy as np
import pytest

from nemojax.data.heldout import digest_of, heldout_side, training_side
from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.packing import unpack
from nemojax.data.sources import Source, load_heldout, load_texts
from tests.data.tiny import tiny_tokenizer

TEXTS = [f"document {i} says {i * i}" for i in range(600)]
HELDOUT = [TEXTS[place] for place in heldout_side(TEXTS, 0.02)]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(name="mine", kind="jsonl", path=str(path))


def test_a_share_of_the_texts_the_same_forever():
    many = [str(i) for i in range(20_000)]
    assert len(heldout_side(many, 0.02)) == pytest.approx(400, abs=80)
    assert set(heldout_side(many, 0.01)) < set(heldout_side(many, 0.02))
    assert sorted([*heldout_side(many, 0.02), *training_side(many, 0.02)]) == list(range(20_000))
    assert digest_of("a") == digest_of(" a\n") == bytes.fromhex("27c35e6e9373877f29e562464e46497e")
    assert training_side(many, 0.0) == list(range(20_000)) and not heldout_side(many, 0.0)
    assert training_side(["a", " ", "b", "c"], 0.0, limit=2) == [0, 2]


def test_the_order_and_number_of_files_do_not_matter(tmp_path):
    whole = write(tmp_path / "whole.jsonl", TEXTS)
    assert load_heldout(whole) == HELDOUT and load_texts(whole) == [t for t in TEXTS if t not in HELDOUT]
    (tmp_path / "parts").mkdir()
    shuffled = np.random.default_rng(0).permutation(TEXTS).tolist()
    for part in range(3):
        write(tmp_path / "parts" / f"{part}.jsonl", shuffled[part::3])
    parts = Source(name="mine", kind="jsonl", path=str(tmp_path / "parts" / "*.jsonl"))
    assert load_heldout(parts) == HELDOUT
    assert set(load_texts(parts)) == set(TEXTS) - set(HELDOUT)


def test_a_limit_takes_from_training_only(tmp_path):
    few = Source(name="mine", kind="jsonl", path=write(tmp_path / "a.jsonl", TEXTS).path, limit=7)
    assert load_heldout(few) == HELDOUT
    assert len(load_texts(few)) == 7 and not set(load_texts(few)) & set(HELDOUT)


def test_copies_of_a_text_fall_on_one_side(tmp_path):
    twice = write(tmp_path / "a.jsonl", [*TEXTS, *(f"{text}\n" for text in TEXTS)])
    assert {text.strip() for text in load_heldout(twice)} == set(HELDOUT)
    assert not {text.strip() for text in load_texts(twice)} & set(HELDOUT)


@pytest.mark.parametrize("kind", ["text", "parquet", "hf"])
def test_every_kind_splits_alike(tmp_path, monkeypatch, kind):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    if kind == "text":
        for number, text in enumerate(TEXTS):
            (folder / f"{number:03}.txt").write_text(text)
    else:
        datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "a.parquet")
    source = Source(name="mine", kind=kind, path=str(folder))
    assert list(load_heldout(source)) == HELDOUT
    assert list(load_texts(source)) == [text for text in TEXTS if text not in HELDOUT]


def test_too_small_a_source_says_what_to_do(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    small = write(tmp_path / "a.jsonl", ["one", "two"])
    data = TextData(sources=(small,), length=16, batch_size=2)
    with pytest.raises(
        ValueError, match=r"source mine: expected a held-out document among 2 .*name a file in data.heldout"
    ):
        heldout_batches(data, tokenizer)
    all_of_it = Source(name="mine", kind="jsonl", path=small.path, heldout_share=0.0)
    assert heldout_batches(TextData(sources=(all_of_it,)), tokenizer) == {}
    greedy = Source(name="mine", kind="jsonl", path=small.path, heldout_share=0.9999999)
    with pytest.raises(ValueError, match="got only held-out ones; add more, or lower heldout_share"):
        load_texts(greedy)
    with pytest.raises(ValueError, match="heldout_share from 0 to below 1, got 2"):
        load_texts(Source(name="mine", kind="jsonl", path=small.path, heldout_share=2))


def documents(tokenizer, batches):
    return {tokenizer.decode(tokens) for batch in batches for tokens, _ in unpack(batch)}


def test_what_is_validated_on_is_never_trained_on(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    source = write(tmp_path / "a.jsonl", TEXTS)
    data = TextData(sources=(source,), length=64, batch_size=8, heldout_batches=100)
    heldout = documents(tokenizer, heldout_batches(data, tokenizer)["mine"])
    assert heldout == set(HELDOUT)

    def trained(data, num_batches=120):  # several epochs
        loader = train_batches(data, tokenizer)
        return documents(tokenizer, [next(loader) for _ in range(num_batches)])

    assert trained(data) == set(TEXTS) - heldout
    other = write(tmp_path / "b.jsonl", ["something else", "and more"])
    named = replace(data, heldout=(other,))
    assert trained(named) == set(TEXTS)  # nothing is taken out of the training texts
    assert documents(tokenizer, heldout_batches(named, tokenizer)["mine"]) == {"something else", "and more"}
    with pytest.raises(ValueError, match="data.sources: expected different names, got 'mine' twice"):
        heldout_batches(replace(data, sources=(source, source)), tokenizer)
