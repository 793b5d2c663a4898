"""A report about work directories in a bucket, written there: the very page of the same ones in a folder."""

import pytest

from nemojax import buckets
from nemojax.buckets import place
from nemojax.report import page
from nemojax.report.page import Config
from nemojax.stage import read_done, read_result
from tests.report.toy_pipeline import write_pipeline


def test_the_same_page(bucket, tmp_path, monkeypatch):
    root = write_pipeline(tmp_path / "demo")
    there = place(f"{bucket}/demo")
    for file in buckets.files_below(root):
        buckets.copy_file(file, there / file.relative_to(root))
    result = page.run(Config(pipeline=str(root)), root / "report")
    with monkeypatch.context() as patch:

        def refuse(path, data):
            raise OSError("Service Unavailable")

        patch.setattr(page, "write_text", refuse)
        with pytest.raises(OSError, match="Service Unavailable"):
            page.run(Config(pipeline=str(there)), f"{there}/report")
    assert read_done(there / "report") is None and not (there / "report.html").exists()
    assert page.run(Config(pipeline=f"{there}/"), there / "report") == result == read_result(there / "report")
    html = (there / "report.html").read_text(encoding="utf-8")
    assert html == (root / "report.html").read_text(encoding="utf-8")
    done = read_done(there / "report")
    assert page.run(Config(pipeline=str(there)), there / "report") == result
    assert read_done(there / "report") == done  # what was written to the pipeline is none of its inputs
    assert page.run(Config(pipeline=str(there)), tmp_path / "about") == result


def test_no_pipeline(bucket, tmp_path):
    with pytest.raises(
        ValueError, match=f"^{bucket}/none: expected a pipeline's directory, got no pipeline.json"
    ):
        page.run(Config(pipeline=f"{bucket}/none"), tmp_path / "report")
    url = f"{bucket.partition('://')[0]}://other-bucket"
    with pytest.raises(ValueError, match=f"^{url}/run: cannot list the bucket {url}"):
        page.run(Config(pipeline=f"{url}/run"), tmp_path / "report")
