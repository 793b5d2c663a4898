"""Prompts in a bucket, answered into one: the bytes of a file of this machine, cut short or not."""

import json
from pathlib import Path

import pytest

from nemojax import buckets, cli
from nemojax.buckets import place
from nemojax.checkpoints.artifact import save_params
from nemojax.generate import batch, output
from nemojax.generate.batch import GenerateConfig
from nemojax.generate.sampling import SamplingConfig
from nemojax.generate.sources import Artifact

CONFIG = GenerateConfig(n=2, chunk=2, sampling=SamplingConfig(max_new_tokens=4))
ROWS = [{"prompt": "sort up 1 2"}, {"messages": [{"role": "user", "content": "up"}]}, {"prompt": "3"}] * 2


@pytest.fixture(scope="module")
def artifact(bucket, model) -> str:
    save_params(f"{bucket}/model", model.arch, model.params, tokenizer_dir=model.folder / "tokenizer")
    return f"{bucket}/model"


@pytest.fixture(scope="module")
def prompts(bucket):
    path = place(f"{bucket}/prompts.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def whole(artifact, prompts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert batch.run(artifact, prompts, out, CONFIG, quiet=True)["rows"] == 12
    assert buckets.names_in(out.parent) == {"out.jsonl", "out.jsonl.config.json"}
    return out


def same(out, whole):
    assert out.read_bytes() == whole.read_bytes()
    assert output.sidecar(out).read_bytes() == output.sidecar(whole).read_bytes()


def test_the_same_bytes(bucket, artifact, prompts, whole, monkeypatch):
    """Also where every group is sent at once; and what is finished is left alone."""
    out = place(f"{bucket}/out.jsonl")
    monkeypatch.setattr(output, "_SEND_SECONDS", -1)
    counts = batch.run(artifact, str(prompts), str(out), CONFIG, quiet=True)
    assert counts["rows"] == 12 and counts["rows_before"] == 0
    same(out, whole)
    sent, copy = [], output.copy_file
    monkeypatch.setattr(output, "copy_file", lambda a, b: sent.append(b) or copy(a, b))
    again = batch.run(artifact, prompts, out, CONFIG, quiet=True)
    assert again == counts | {"rows_before": 12, "tokens": 0}
    assert sent and not any(buckets.is_bucket(target) for target in sent)


def test_what_has_arrived_is_not_made_again(bucket, artifact, prompts, whole, monkeypatch):
    """A failure in the second group sends the first; a cut in the middle of a row does not show."""
    out, asked = place(f"{bucket}/failing.jsonl"), []
    append = output.append

    def failing(file, rows):
        asked.append(rows)
        if len(asked) == 2:
            raise OSError(5, "Input/output error", file.name)
        append(file, rows)

    with monkeypatch.context() as patch:
        patch.setattr(output, "append", failing)
        with pytest.raises(OSError, match="Input/output error"):
            batch.run(artifact, prompts, out, CONFIG, quiet=True)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert out.read_bytes() == b"".join(lines[:4])
    assert batch.run(artifact, prompts, out, CONFIG, quiet=True)["rows_before"] == 4
    same(out, whole)
    out.write_bytes(b"".join(lines[:9]) + lines[9][:5])
    assert batch.run(artifact, prompts, out, CONFIG, quiet=True)["rows_before"] == 8
    same(out, whole)


def test_errors_name_the_bucket(bucket, artifact, prompts, whole, tmp_path, capsys):
    mine = place(f"{bucket}/mine.jsonl")
    mine.write_text("precious\n")
    for source, out, message in (
        (prompts, mine, f"{mine}: expected mine.jsonl.config.json beside it, got none: not ours"),
        (prompts, prompts, f"{prompts}: expected another file than the prompts, got the same"),
        (
            f"{bucket}/none.jsonl",
            mine,
            f"{bucket}/none.jsonl: expected a JSONL file of prompts, got no such file",
        ),
        (mine, tmp_path / "out.jsonl", f"{mine}:1: expected one JSON object a line"),
    ):
        assert cli.main(["generate", artifact, f"--prompts={source}", f"--out={out}"]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert message in line
    assert mine.read_text() == "precious\n" and not (tmp_path / "out.jsonl").exists()
    assert cli.main(["generate", artifact, "--prompt=sort", "--raw", "--max_new_tokens=2"]) == 0


def test_an_upload_that_fails(bucket, artifact, prompts, whole, monkeypatch):
    """At first it ends the run, before anything is answered; later on it is tried again."""
    out, copy, times = place(f"{bucket}/uploads.jsonl"), output.copy_file, []

    def refusing(which):
        def copied(source, target):
            if buckets.is_bucket(target):
                times.append(target)
                if len(times) in which:
                    raise OSError(5, "try later", str(target))
            copy(source, target)

        return copied

    monkeypatch.setattr(output, "_SEND_SECONDS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(output, "copy_file", refusing({1, 2}))
        patch.setattr(Artifact, "answers", None)
        with pytest.raises(OSError, match="try later"):
            batch.run(artifact, prompts, out, CONFIG, quiet=True)
    assert not out.exists() and len(times) == 2  # at the end, too
    times.clear()
    monkeypatch.setattr(output, "copy_file", refusing({3}))
    batch.run(artifact, prompts, out, CONFIG, quiet=True)
    assert len(times) > 3
    same(out, whole)


def test_a_folder_in_place_of_the_output(bucket, artifact, prompts):
    (place(f"{bucket}/folder.jsonl") / "a.txt").write_text("")
    with pytest.raises(ValueError, match="folder.jsonl: expected a file, got something else"):
        batch.run(artifact, prompts, f"{bucket}/folder.jsonl", CONFIG, quiet=True)
