"""The store of a cache: what is written is read, what is missing, damaged or of others is named."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from nemojax.distill.cache_store import About, TeacherCache, kvstore_spec, location, row_hashes

ABOUT = About(
    teacher="weights",
    artifact="files",
    tokenizer="tokenizer",
    data="data",
    vocab_size=300,
    temperature=1.0,
    top_k=4,
    dtype="float32",
    length=6,
    batch_size=4,
    steps=5,
    steps_per_file=2,
)


def fill(cache: TeacherCache, about: About, steps: int = ABOUT.steps) -> dict[str, np.ndarray]:
    """Writes groups as two processes would, up to `steps`; returns everything."""
    rng = np.random.default_rng(0)
    shape = (about.steps, about.batch_size, about.length)
    logits = rng.normal(size=(*shape, 20)).astype(np.float32) * 3
    logps = np.sort(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[..., ::-1][..., : about.top_k]
    arrays = {
        "ids": rng.integers(0, about.vocab_size, (*shape, about.top_k)).astype(np.uint16),
        "logps": logps.astype(ts.dtype(about.dtype).numpy_dtype),
        "tail": np.log1p(-np.exp(logps).sum(-1)),
    }
    hashes = rng.integers(1, 1 << 63, shape[:2]).astype(np.uint64)
    cache.claim(about)
    for step in range(0, steps, about.steps_per_file):
        group = slice(step, min(step + about.steps_per_file, about.steps))
        for process in (0, 1):
            places = slice(process, None, 2)
            cache.wait(cache.write(step, places, {k: v[group, places] for k, v in arrays.items()}))
        cache.commit(step, hashes[group])
    return {**arrays, "logps": logps, "hash": hashes}


def test_addresses():
    here = f"{Path.cwd()}/some/where/"
    assert kvstore_spec("some/where") == {"driver": "file", "path": here}
    assert kvstore_spec("file:///a/b") == {"driver": "file", "path": "/a/b/"}
    assert kvstore_spec("gs://bucket/a/b/") == {"driver": "gcs", "bucket": "bucket", "path": "a/b/"}
    assert kvstore_spec("s3://bucket") == {"driver": "s3", "bucket": "bucket", "path": ""}
    assert kvstore_spec("memory://a") == {"driver": "memory", "path": "a/"}
    with pytest.raises(ValueError, match=r"ftp://a: expected a path, gs:// or s3://, got ftp://"):
        kvstore_spec("ftp://a")
    with pytest.raises(ValueError, match="got no bucket"):
        kvstore_spec("gs:///a")
    for url in ("gs://bucket/a", "s3://bucket/a"):  # what tensorstore makes of them, nothing asked of anybody
        assert ts.KvStore.Spec(kvstore_spec(url)).url.startswith(url)


@pytest.mark.parametrize("place", ["folder", "memory://there"])
def test_what_is_written_is_read_in_any_batch_size(tmp_path, place):
    url, context = str(tmp_path) if place == "folder" else place, ts.Context()
    wrote = fill(TeacherCache(url, context), ABOUT)
    cache = TeacherCache(url, context)
    assert cache.about == ABOUT and cache.num_rows == 20
    rows = np.array([19, 3, 4, 0, 11, 12])
    cache.check(rows, wrote["hash"].ravel()[rows])
    read = cache.read(rows)()
    assert {name: array.dtype.name for name, array in read.items()} == {
        "ids": "int32",
        "logps": "float32",
        "tail": "float32",
    }
    for name, array in read.items():
        np.testing.assert_array_equal(array, wrote[name].reshape(20, *array.shape[1:])[rows])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fewer_bits_for_what_is_kept_not_for_the_tail(tmp_path, dtype):
    wrote = fill(TeacherCache(str(tmp_path)), dataclasses.replace(ABOUT, dtype=dtype))
    read = TeacherCache(str(tmp_path)).read(np.arange(20))()
    assert read["logps"].dtype.name == dtype
    np.testing.assert_array_equal(read["tail"], wrote["tail"].reshape(20, 6))
    error = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(read["logps"].astype(np.float32), wrote["logps"].reshape(20, 6, 4), rtol=error)


def test_only_whole_groups_count(tmp_path):
    fill(TeacherCache(str(tmp_path)), ABOUT, steps=4)
    cache = TeacherCache(str(tmp_path))
    assert cache.num_rows == 16
    with pytest.raises(
        ValueError, match=r"row 17, got a cache of 16 rows \(16 / 4 = 4 steps\); write a longer"
    ):
        cache.check(np.array([3, 17]), np.ones(2, np.uint64))


def test_rows_of_other_tokens_are_named(tmp_path):
    wrote = fill(TeacherCache(str(tmp_path)), ABOUT)["hash"].ravel()
    hashes = wrote[4:8] + np.array([0, 0, 1, 0], np.uint64)
    with pytest.raises(ValueError, match="row 6: expected the tokens that the teacher read, got others"):
        TeacherCache(str(tmp_path)).check(np.arange(4, 8), hashes)


def test_rows_are_told_apart_by_tokens_and_documents():
    tokens, segments = np.arange(8, dtype=np.int32).reshape(2, 4), np.ones((2, 4), np.int32)
    first = row_hashes({"tokens": tokens, "segments": segments})
    assert first.dtype == np.uint64 and first[0] != first[1] and first.all()
    np.testing.assert_array_equal(first, row_hashes({"tokens": tokens.copy(), "segments": segments}))
    assert (row_hashes({"tokens": tokens, "segments": segments * 2}) != first).all()


def test_a_cache_belongs_to_one_configuration(tmp_path):
    cache = TeacherCache(str(tmp_path))
    with pytest.raises(ValueError, match=r"expected a teacher's cache \(cache.json\), got none"):
        _ = cache.told
    cache.claim(ABOUT)
    TeacherCache(str(tmp_path)).claim(dataclasses.replace(ABOUT, artifact="the same in other files"))
    with pytest.raises(ValueError, match=r"got one with temperature 1.0, not 2.0; choose another place"):
        TeacherCache(str(tmp_path)).claim(dataclasses.replace(ABOUT, temperature=2.0))
    (tmp_path / "cache.json").write_text('{"format_version": 9}')
    with pytest.raises(ValueError, match="expected format_version 1, got 9"):
        TeacherCache(str(tmp_path))
    (tmp_path / "cache.json").write_text('{"format_version')
    with pytest.raises(ValueError, match="expected what a cache holds, got something else"):
        TeacherCache(str(tmp_path))


@pytest.mark.parametrize("name", ["ids", "logps", "tail"])
@pytest.mark.parametrize("damage", ["missing", "cut", "bit"])
def test_damage_is_named(tmp_path, name, damage):
    fill(TeacherCache(str(tmp_path)), ABOUT)
    # place 2 of steps 0 and 1: rows 2 and 6
    file = next(f for f in (tmp_path / name / "c" / "0" / "2").rglob("*") if f.is_file())
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[5] ^= 16
        file.write_bytes(content)
    cache = TeacherCache(str(tmp_path))
    cache.read(np.array([0, 1, 3]))()
    message = "row 2: damaged, a file is missing" if damage == "missing" else "damaged; write the cache again"
    with pytest.raises(ValueError, match=message):
        cache.read(np.array([0, 2]))()


def test_a_user_names_the_folder_or_the_stage(tmp_path):
    TeacherCache(str(tmp_path / "run" / "rows")).claim(ABOUT)
    assert location(str(tmp_path / "run")) == location(str(tmp_path / "run" / "rows"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "result.json").write_text(json.dumps({"cache": "gs://bucket/rows"}))
    assert location(str(tmp_path / "elsewhere")) == "gs://bucket/rows"
    assert location(str(tmp_path / "nothing")) == str(tmp_path / "nothing")
