"""Texts from the reference that ships with Python and from local files, and what is wrong with bad ones."""

import json

import pytest

from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.sources import Source, is_heldout, load_texts, read_jsonl, report
from tests.data.tiny import tiny_tokenizer


def test_pydoc_is_split_by_topic():
    train, heldout = load_texts(Source()), load_texts(Source(split="heldout"))
    assert not set(train) & set(heldout)
    assert sum(map(len, train)) + sum(map(len, heldout)) > 400_000
    assert 0.03 < sum(map(len, heldout)) / sum(map(len, train)) < 0.2
    assert report(Source(split="heldout"))["documents"] == len(heldout)


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
    assert read_jsonl(tmp_path / "b.jsonl") == [{"text": "three"}]


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


def test_text_and_parquet(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.txt").write_text("first line\n\nsecond line\n")
    assert [t.strip() for t in load_texts(source(tmp_path / "a.txt", "text"))] == [
        "first line\n\nsecond line"
    ]
    datasets.Dataset.from_dict({"body": ["x", "y"]}).to_parquet(tmp_path / "a.parquet")
    parquet = source(tmp_path / "a.parquet", "parquet", field="body")
    assert list(load_texts(parquet)) == ["x", "y"]
    with pytest.raises(ValueError, match="expected column 'text', got body"):
        load_texts(source(tmp_path / "a.parquet", "parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="cannot read .*bad.parquet as parquet"):
        load_texts(source(tmp_path / "bad.parquet", "parquet"))


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


def test_rows_of_a_file_as_text_documents(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5)))
    assert len(load_texts(source(path, "jsonl"))) == 5
