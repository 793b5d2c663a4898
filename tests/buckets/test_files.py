"""Files in buckets, a log that grows in one, and what is no place."""

import pytest

from nemojax import buckets, cli
from nemojax.buckets import place
from nemojax.log import RunLog, read_metrics
from nemojax.stage import fingerprint, run_stage
from tests.buckets.made import pretraining


def test_files(bucket):
    root = place(f"{bucket}/files")
    assert not root.exists() and buckets.names_in(root) == set() and list(buckets.files_below(root)) == []
    buckets.write_text(root / "a.txt", "ä")
    buckets.write_text(root / "deep" / "er" / "b.txt", "b")
    assert buckets.names_in(root) == {"a.txt", "deep"}
    assert {str(f.relative_to(root)) for f in buckets.files_below(root)} == {"a.txt", "deep/er/b.txt"}
    assert (root / "a.txt").read_text(encoding="utf-8") == "ä"
    before = buckets.version(root / "a.txt")
    assert before == buckets.version(root / "a.txt") and before[0] == 2
    digest = fingerprint(str(root))
    buckets.write_text(root / "a.txt", "öx")
    assert buckets.version(root / "a.txt") != before and fingerprint(str(root)) != digest
    buckets.copy_file(root / "a.txt", root / "c.txt")
    buckets.remove_tree(root / "deep")
    assert buckets.names_in(root) == {"a.txt", "c.txt"}


def test_a_file_is_there_whole_or_not_at_all(bucket, tmp_path):
    """Also one that is sent in parts, and one whose writer fails."""
    root = place(f"{bucket}/whole")
    data = bytes(range(256)) * (6 << 12)
    with buckets.whole_file(root / "a.bin") as file:
        file.write(data[: 1 << 20])
        assert not (root / "a.bin").exists()
        file.write(data[1 << 20 :])
    assert buckets.sizes_in(root) == {"a.bin": len(data)}
    assert buckets.read_ranges([(root / "a.bin", 5, 9), (root / "a.bin", 1 << 20, (1 << 20) + 2)]) == [
        bytes(range(5, 9)),
        b"\0\1",
    ]
    with pytest.raises(KeyboardInterrupt), buckets.whole_file(root / "b.bin") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    buckets.copy_file(root / "a.bin", tmp_path / "here.bin")
    buckets.copy_file(root / "a.bin", root / "deep" / "c.bin")
    buckets.copy_file(tmp_path / "here.bin", root / "deep" / "d.bin")
    assert (tmp_path / "here.bin").read_bytes() == (root / "deep" / "c.bin").read_bytes() == data
    assert buckets.sizes_in(root) == {"a.bin": len(data)} and buckets.sizes_in(root / "nothing") == {}
    assert buckets.sizes_in(root / "deep") == {"c.bin": len(data), "d.bin": len(data)}
    assert buckets.sizes_in(tmp_path) == {"here.bin": len(data)} and buckets.read_ranges([]) == []


def test_a_log(bucket):
    with RunLog(f"{bucket}/log", quiet=True) as log:
        log.write(1, {"train/loss": 2.0})
        log.flush()
        assert read_metrics(f"{bucket}/log") == [{"step": 1, "train/loss": 2.0}]
        log.write(2, {"train/loss": 1.0})
    with RunLog(f"{bucket}/log", quiet=True) as log:  # a resumed run
        log.truncate(1)
        log.write(2, {"train/loss": 1.5})
    assert [row["train/loss"] for row in read_metrics(f"{bucket}/log")] == [2.0, 1.5]
    assert buckets.names_in(place(f"{bucket}/log/tensorboard"))


def test_a_bucket_that_is_not_there(bucket, model, capsys):
    url = f"{bucket.partition('://')[0]}://other-bucket"
    with pytest.raises(ValueError, match=rf"^{url}/run: cannot list the bucket {url} \(.*\); check its name"):
        run_stage("pretrain", pretraining(model.folder), f"{url}/run", [], lambda path: {})
    assert cli.main(["export", f"{url}/run", "out"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ftp://a/b", r"^ftp://a/b: expected a path, gs:// or s3://, got ftp://$"),
        ("gs://", r"^gs://: expected gs://BUCKET/PATH, got no bucket$"),
        ("s3://bucket/", r"^s3://bucket/: expected s3://BUCKET/PATH, got no path$"),
    ],
)
def test_what_is_no_place(path, message):
    with pytest.raises(ValueError, match=message):
        place(path)


@pytest.mark.parametrize(("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_without_its_package(scheme, package, extra, monkeypatch):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    buckets._prepare.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=rf"expected the package {package}, got none; .*'nemojax\[{extra}\]'"
        ):
            place(f"{scheme}://bucket/run")
    finally:
        buckets._prepare.cache_clear()


def test_what_a_bucket_s_client_says_is_one_line():
    from botocore.exceptions import NoCredentialsError
    from gcsfs.retry import HttpError

    assert cli.user_message(NoCredentialsError()) == "Unable to locate credentials"
    assert "Forbidden" in (cli.user_message(HttpError({"message": "Forbidden", "code": 403})) or "")


def test_metrics_that_a_bucket_does_not_take_end_no_training(bucket, monkeypatch, caplog):
    def refuse(source, target):
        raise OSError("Forbidden")

    log = RunLog(f"{bucket}/refused", quiet=True)
    log.write(1, {"train/loss": 2.0})
    with monkeypatch.context() as patch:
        patch.setattr("nemojax.log.copy_file", refuse)
        log.flush()
        assert "refused: metrics are not there yet (Forbidden)" in caplog.text
    log.write(2, {"train/loss": 1.0})
    log.close()
    assert [row["step"] for row in read_metrics(f"{bucket}/refused")] == [1, 2]
    last = RunLog(f"{bucket}/refused", quiet=True)
    last.write(3, {"train/loss": 1.0})
    monkeypatch.setattr("nemojax.log.copy_file", refuse)
    with pytest.raises(OSError, match="Forbidden"):
        last.close()


def test_a_file_of_ones_own_that_is_called_unfinished(bucket):
    folder = place(f"{bucket}/thesis")
    (folder / buckets.UNFINISHED).write_text("chapters 4 and 5")
    assert not buckets.is_unfinished(folder)
    buckets.clear_unfinished(folder)
    assert buckets.names_in(folder) == {buckets.UNFINISHED}
