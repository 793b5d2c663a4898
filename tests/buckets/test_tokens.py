"""Token shards in buckets: the bytes of those in a folder, and the same rows out of them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemojax import buckets, pretrain, tokenize
from nemojax.buckets import place
from nemojax.config import from_dict
from nemojax.data.examples import Example, StoredExamples
from nemojax.data.mixture import TextData, heldout_batches, train_batches
from nemojax.data.shards import HELDOUT, INDEX, open_heldout, open_shards, write_shards
from nemojax.data.sources import Source, input_files
from nemojax.data.tokenizer import load_tokenizer
from nemojax.stage import OtherRun, read_done, read_result
from tests.buckets.made import pretraining, wait_until
from tests.environment import QUICK_COMPILATION

WORDS = "red green blue one two three and or not then".split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "web.jsonl"
    rows = [" ".join(rng.choice(WORDS, rng.integers(1, 60))) + f" {i}" for i in range(200)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def config(model, texts, **changes) -> tokenize.Config:
    web = Source(name="web", kind="jsonl", path=str(texts), heldout_share=0.1)
    values = {"tokenizer": str(model.folder), "sources": (web,), "workers": 1, "shard_documents": 32}
    return tokenize.Config(**{**values, **changes})


@pytest.fixture(scope="module")
def here(model, texts, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("tokens") / "run"
    tokenize.run(config(model, texts), workdir)
    return workdir


@pytest.fixture(scope="module")
def there(bucket, model, texts) -> str:
    tokenize.run(config(model, texts), f"{bucket}/run")
    return f"{bucket}/run"


def contents(workdir) -> dict[str, bytes]:
    shards = place(workdir) / tokenize.SHARDS
    return {str(file.relative_to(shards)): file.read_bytes() for file in buckets.files_below(shards)}


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_the_same_bytes(here, there, model, texts):
    assert contents(there) == contents(here)
    assert read_result(there) == read_result(here)
    done = read_done(there)
    assert tokenize.run(config(model, texts), there) == read_result(here) and read_done(there) == done
    with pytest.raises(OtherRun, match="differs in shard_documents"):
        tokenize.run(config(model, texts, shard_documents=16), there)


def data_of(workdir) -> TextData:
    tokens = Source(name="web", kind="tokens", path=f"{workdir}/shards/web")
    return TextData(sources=(tokens,), length=32, batch_size=4, heldout_batches=3)


def test_the_same_rows(here, there, model):
    """By the plan, resumed by another number of processes; mixed with texts; and those that are held out."""
    tokenizer = load_tokenizer(model.folder)
    local, remote = (train_batches(data_of(at), tokenizer) for at in (here, there))
    assert local.identity == remote.identity
    for _ in range(20):  # longer than an epoch: what has been checked is read in part
        same(next(local), next(remote))
    parts = [train_batches(data_of(there), tokenizer, process, 2) for process in range(2)]
    for part in parts:
        part.restore(local.state())
    whole = next(local)
    for process, part in enumerate(parts):
        same(next(part), {key: value[process::2] for key, value in whole.items()})
    [mine], [theirs] = (heldout_batches(data_of(at), tokenizer).values() for at in (here, there))
    assert len(mine) == len(theirs) > 1
    for a, b in zip(mine, theirs, strict=True):
        same(a, b)
    problems = Source(name="sum2", kind="problems", limit=20)
    mixed = [replace(d, sources=(*d.sources, problems)) for d in (data_of(here), data_of(there))]
    local, remote = (train_batches(data, tokenizer) for data in mixed)
    for _ in range(3):
        same(next(local), next(remote))
    [*inputs] = input_files(data_of(there).sources)
    assert list(map(str, inputs)) == [f"{there}/shards/web/{INDEX}", f"{there}/shards/web/{HELDOUT}/{INDEX}"]


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_a_training_on_them(bucket, here, there, model, tmp_path):
    values = vars(pretraining(model.folder))
    cfgs = [pretrain.Config(**{**values, "data": replace(data_of(at), batch_size=8)}) for at in (here, there)]
    assert pretrain.run(cfgs[0], tmp_path / "here") == pretrain.run(cfgs[1], f"{bucket}/trained")


def test_loss_weights(bucket, model):
    tokenizer = load_tokenizer(model.folder)
    rng = np.random.default_rng(1)
    examples = [
        Example(rng.integers(0, 300, n, np.int32), rng.integers(0, 2, n).astype(np.float32))
        for n in rng.integers(1, 50, 20)
    ]
    write_shards(f"{bucket}/weighted", StoredExamples(examples), tokenizer, {}, shard_documents=6)
    opened = open_shards(f"{bucket}/weighted", tokenizer)
    assert len(opened) == 20 and len(list(opened)) == 20
    opened.verify()
    for _ in range(2):
        for index, example in enumerate(examples):
            np.testing.assert_array_equal(opened[index].ids, example.ids)
            np.testing.assert_array_equal(opened[index].weights, example.weights)
            part = opened.piece(index, 1, 4)
            np.testing.assert_array_equal(part.ids, example.ids[1:6])
            np.testing.assert_array_equal(part.weights, example.weights[1:6])
    assert open_heldout(f"{bucket}/weighted", tokenizer) is None


def test_an_upload_that_fails_is_made_good(bucket, model, texts, here, monkeypatch):
    """The third shard does not arrive: nothing can be read, and only what is missing is written then."""
    cfg, workdir = config(model, texts), f"{bucket}/failing"
    copy = buckets.copy_file

    def refuse(source, target):
        if target.name == "shard-00002.bin":
            raise OSError("Service Unavailable")
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(buckets, "copy_file", refuse)
        with pytest.raises(OSError, match="Service Unavailable"):
            tokenize.run(cfg, workdir)
    shards = place(workdir) / "shards" / "web"
    assert "shard-00002.bin" not in buckets.names_in(shards) and read_done(workdir) is None
    with pytest.raises(
        ValueError, match="got one without index.json; nemojax tokenize was stopped, so run it"
    ):
        open_shards(shards, load_tokenizer(model.folder))
    written, write = [], tokenize.write_shard
    monkeypatch.setattr(tokenize, "write_shard", lambda f, n, p, t: (written.append(n), write(f, n, p, t)))
    tokenize.run(cfg, workdir)
    assert written == [2, 3, 4, 5] and contents(workdir) == contents(here)


def test_what_has_been_damaged_is_named(bucket, model, texts):
    workdir = f"{bucket}/damaged"
    tokenize.run(config(model, texts), workdir)
    shards, tokenizer = place(workdir) / "shards" / "web", load_tokenizer(model.folder)
    file = shards / "shard-00001.bin"
    whole = file.read_bytes()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    opened = open_shards(shards, tokenizer)
    with pytest.raises(
        ValueError, match=f"^{file}: expected the document 32 as written, got another checksum"
    ):
        list(opened)
    with pytest.raises(ValueError, match=f"^{file}: expected the contents as written"):
        opened.verify()
    file.write_bytes(whole[:-2])
    with pytest.raises(
        ValueError, match=f"^{file}: expected {len(whole)} bytes, got {len(whole) - 2}; restore"
    ):
        open_shards(shards, tokenizer)
    file.unlink()
    with pytest.raises(ValueError, match=f"^{file}: expected {len(whole)} bytes, got no file"):
        open_shards(shards, tokenizer)
    url = f"{bucket.partition('://')[0]}://other-bucket"
    with pytest.raises(ValueError, match=f"^{url}/tokens: cannot list the bucket {url}"):
        open_shards(f"{url}/tokens", tokenizer)
    with pytest.raises(ValueError, match="expected a directory of tokens, got nothing there; make it with"):
        open_shards(f"{bucket}/nothing", tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_killed_and_resumed(bucket, model, tmp_path):
    """SIGKILL once some shards are there: those stay, and the bytes are those of a run that nobody ended."""
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(WORDS, 60)) + f" {i}" for i in range(6000)]
    texts = tmp_path / "web.jsonl"
    texts.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    cfg = config(model, texts, shard_documents=100)
    source = {"name": "web", "kind": "jsonl", "path": str(texts), "heldout_share": 0.1}
    recipe = tmp_path / "recipe.py"
    values = {"tokenizer": cfg.tokenizer, "sources": [source], "workers": 1, "shard_documents": 100}
    recipe.write_text(f"def get_config():\n    return {values!r}\n")
    assert from_dict(tokenize.Config, values) == cfg
    command = [sys.executable, "-m", "nemojax.cli", "tokenize", f"--config={recipe}"]
    env = os.environ | {"XLA_FLAGS": QUICK_COMPILATION}
    with (tmp_path / "log").open("w") as out:
        first = subprocess.Popen([*command, f"--workdir={bucket}/killed"], env=env, stdout=out, stderr=out)
    shards = place(f"{bucket}/killed/shards/web")
    wait_until(lambda: "shard-00003.npz" in buckets.names_in(shards), first, tmp_path / "log")
    first.kill()
    first.wait()
    assert INDEX not in buckets.names_in(shards)
    third: Any = shards / "shard-00003.bin"
    kept = third.stat().mtime
    done = subprocess.run([*command, f"--workdir={bucket}/killed"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert third.stat().mtime == kept
    tokenize.run(cfg, tmp_path / "whole")
    assert contents(f"{bucket}/killed") == contents(tmp_path / "whole")
