"""Texts from the reference that ships with Python and from local files, and what is wrong with bad ones."""

import bz2
import gzip
import json
import lzma

import pytest

from nemojax.data.examples import text_examples
from nemojax.data.heldout import is_heldout
from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.sources import Source, input_files, load_heldout, load_texts, read_jsonl_rows
from tests.data.tiny import tiny_tokenizer


def test_pydoc_is_split_by_topic():
    train, heldout = load_texts(Source()), load_texts(Source(split="heldout"))
    assert not set(train) & set(heldout)
    assert sum(map(len, train)) + sum(map(len, heldout)) > 400_000
    assert 0.03 < sum(map(len, heldout)) / sum(map(len, train)) < 0.2
    assert load_heldout(Source(limit=3)) == heldout and load_texts(Source(limit=3)) == train[:3]


def test_hash_split_is_a_tenth():
    assert sum(is_heldout(str(i)) for i in range(10_000)) == pytest.approx(1000, abs=120)
    assert is_heldout("42") == is_heldout("42")


def source(path, kind, **changes):
    return Source(name="mine", kind=kind, path=str(path), **changes)


def test_jsonl(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n  \n{"text": "two"}\n{"text": " "}\n')
    with caplog.at_level("WARNING"):
        assert list(load_texts(source(path, "jsonl"))) == ["one", "two"]
    assert "skipped 2 blank lines" in caplog.text
    (tmp_path / "b.jsonl").write_text('{"text": "three"}')
    assert list(load_texts(source(tmp_path / "*.jsonl", "jsonl"))) == ["one", "two", "three"]
    assert list(load_texts(source(tmp_path, "jsonl", limit=1))) == ["one"]
    assert read_jsonl_rows(tmp_path / "b.jsonl") == [(f"{tmp_path / 'b.jsonl'}:1", {"text": "three"})]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": ', "bad.jsonl:3: expected one JSON object a line"),
        ("[1]", "bad.jsonl:3: expected a JSON object, got list"),
        ('{"body": "x"}', "bad.jsonl:3: expected text in field 'text', got body"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=message):
        load_texts(source(tmp_path / "bad.jsonl", "jsonl"))


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="bad.jsonl:1"):
        load_texts(source(tmp_path / "bad.jsonl", "jsonl"))


@pytest.mark.parametrize("opener, ending", [(gzip.open, "gz"), (bz2.open, "bz2"), (lzma.open, "xz")])
def test_packed_jsonl(tmp_path, opener, ending):
    path = tmp_path / f"a.jsonl.{ending}"
    with opener(path, "wt") as out:
        out.write('{"text": "one"}\n\n{"text": "two"}\n')
    assert load_texts(source(path, "jsonl")) == load_texts(source(tmp_path, "jsonl")) == ["one", "two"]
    whole = path.read_bytes()
    for damaged in (whole[:-12], b"not packed at all", whole[:20] + b"\0" * 20):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a.jsonl.{ending}: cannot unpack it"):
            load_texts(source(path, "jsonl"))
    with opener(path, "wt") as out:
        out.write('{"text": "one"}\n{"text"\n')
    with pytest.raises(ValueError, match=rf"a.jsonl.{ending}:2: expected one JSON object"):
        load_texts(source(path, "jsonl"))


def test_patterns_and_directories(tmp_path):
    for name in ("b/x.jsonl", "a/y.jsonl", "a/deep/z.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}))
    (tmp_path / "data" / "dir.jsonl").mkdir()  # a directory is not a file of the pattern
    everything = source(tmp_path / "data" / "**" / "*.jsonl", "jsonl", heldout_share=0.0)
    assert load_texts(everything) == ["a/deep/z.jsonl", "a/y.jsonl", "b/x.jsonl"]
    shallow = source(tmp_path / "data" / "*" / "*.jsonl", "jsonl", heldout_share=0.0)
    assert load_texts(shallow) == ["a/y.jsonl", "b/x.jsonl"]
    assert [str(path.relative_to(tmp_path / "data")) for path in input_files([everything])] == [
        "a/deep/z.jsonl",
        "a/y.jsonl",
        "b/x.jsonl",
    ]
    with pytest.raises(ValueError, match="source mine: expected files at .*nothing.*; check the path"):
        input_files([source(tmp_path / "nothing*.jsonl", "jsonl")])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_text(tmp_path, cache):
    (tmp_path / "a.txt").write_text("first line\n\nsecond line\n")
    (tmp_path / "blank.txt").write_text("\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as out:
        out.write("packed\n")
    texts = load_texts(source(tmp_path, "text"))
    assert [text.strip() for text in texts] == ["first line\n\nsecond line", "packed"]


def test_parquet(tmp_path, cache):
    import datasets

    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"body": ["x", None, " ", "y"], "size": [1, 2, 3, 4]}).to_parquet(path)
    assert list(load_texts(source(path, "parquet", field="body"))) == ["x", "y"]
    assert list(load_texts(source(tmp_path, "parquet", field="body", limit=1))) == ["x"]
    with pytest.raises(ValueError, match="expected column 'text', got body, size"):
        load_texts(source(path, "parquet"))
    with pytest.raises(ValueError, match="expected text in column 'size', got int"):
        load_texts(source(path, "parquet", field="size"))
    datasets.Dataset.from_dict({"body": ["other"]}).to_parquet(path)  # no stale copy of the old contents
    assert list(load_texts(source(path, "parquet", field="body"))) == ["other"]
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="cannot read .*a.parquet as parquet"):
        load_texts(source(path, "parquet"))


@pytest.fixture
def hub(tmp_path, cache):
    """A directory laid out like a data set on the hub: two configurations, two splits."""
    import datasets

    for config, splits in {"en": {"train": 300, "test": 5}, "fr": {"train": 4}}.items():
        for split, count in splits.items():
            texts = [f"{config} {split} {i}" for i in range(count)]
            out = tmp_path / "set" / config / f"{split}-00000-of-00001.parquet"
            out.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict({"text": texts}).to_parquet(out)
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: en, data_files: [{split: train, path: en/train-*}, "
        "{split: test, path: en/test-*}]}\n"
        "- {config_name: fr, data_files: [{split: train, path: fr/train-*}]}\n---\n"
    )
    return tmp_path / "set"


def test_a_data_set_in_hub_layout(hub, tmp_path):
    english = source(f"{hub}:en", "hf")
    texts, heldout = load_texts(english), load_heldout(english)
    assert sorted([*texts, *heldout]) == sorted(f"en train {i}" for i in range(300))
    assert 0 < len(heldout) < 20
    assert load_texts(source(f"{hub}:en", "hf", limit=2))[:] == texts[:2]
    tokenizer = tiny_tokenizer(tmp_path)
    stored, lazy = (text_examples(texts, tokenizer, eager) for eager in (True, False))
    assert len(stored) == len(lazy) == len(texts)
    assert all(lazy[i].ids.tolist() == stored[i].ids.tolist() for i in (0, 100, len(texts) - 1))
    assert set(load_texts(source(f"{hub}:en", "hf", split="test", heldout_share=0.0))) == {
        f"en test {i}" for i in range(5)
    }
    assert len(load_texts(source(f"{hub}:fr", "hf", heldout_share=0.0))) == 4
    assert input_files([source(hub, "hf")]) == [hub]
    with pytest.raises(ValueError, match="cannot load data set .*Config name is missing"):
        load_texts(source(hub, "hf"))
    with pytest.raises(ValueError, match="cannot load data set .*validation"):
        load_texts(source(f"{hub}:en", "hf", split="validation"))
    with pytest.raises(ValueError, match="expected column 'body', got text"):
        load_texts(source(f"{hub}:en", "hf", field="body"))


def test_missing_files_and_splits(tmp_path):
    with pytest.raises(ValueError, match="expected files at"):
        load_texts(source(tmp_path / "none.jsonl", "jsonl"))
    with pytest.raises(ValueError, match="expected split train or heldout, got 'test'"):
        load_texts(Source(split="test"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="expected texts, got none"):
        load_texts(source(tmp_path / "empty.jsonl", "jsonl"))


def test_a_mixture_of_reference_and_problems(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    sums = Source(name="sum2", kind="problems", limit=200, field="both", weight=1.0)
    data = TextData(sources=(Source(weight=2.0), sums), length=64, batch_size=4, heldout_batches=2)
    assert next(train_batches(data, tokenizer))["tokens"].shape == (4, 64)
    heldout = heldout_batches(data, tokenizer)
    assert {name: len(batches) for name, batches in heldout.items()} == {"pydoc": 2, "sum2": 2}
    with pytest.raises(ValueError, match="multiple of 3 processes"):
        train_batches(data, tokenizer, 0, 3)
