"""The page: what it says about a pipeline, what it says about half of one, and that it stands alone."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from nemojax.report import page, tables
from nemojax.report.page import Config
from nemojax.report.read import read_pipeline
from tests.report.toy_pipeline import EVIL, write_pipeline, write_stage

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checker(HTMLParser):
    """Collects tags and what is between them, and fails where they do not match."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text.append(data)


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert not checker.open
    return checker


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = write_pipeline(tmp_path_factory.mktemp("report") / "demo")
    result = page.run(Config(pipeline=str(root)), root / "report")
    return root, result, (root / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone(finished):
    _, result, html = finished
    checker = check(html)
    assert len(checker.ids) == len(set(checker.ids))
    for tag, attributes in checker.tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith("#"), f"<{tag} {key}={attributes[key]}>"
    assert not re.search(r"url\((?!#)|@import|https?:", html)
    assert result["figures"] == html.count("<svg ") and result["figures"] >= 9
    assert result["bytes"] == len(html.encode())


def test_the_page_is_for_everybody(finished):
    _, _, html = finished
    checker = check(html)
    kinds = [tag for tag, _ in checker.tags]
    assert ("html", {"lang": "en"}) in checker.tags and "main" in kinds and "nav" in kinds
    assert any(a.get("name") == "viewport" for tag, a in checker.tags if tag == "meta")
    assert all(a.get("role") == "img" and a.get("aria-label") for tag, a in checker.tags if tag == "svg")
    assert kinds.count("table") == kinds.count("caption")
    assert all("scope" in a for tag, a in checker.tags if tag == "th")
    assert "prefers-color-scheme: dark" in html and "currentColor" in html
    anchors = [a["href"][1:] for tag, a in checker.tags if tag == "a"]
    assert anchors and set(anchors) <= set(checker.ids)


def test_what_models_say_is_text(finished):
    _, _, html = finished
    assert "<script" not in html and EVIL not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert EVIL in "".join(check(html).text)


def test_models_stand_in_the_order_they_were_made(finished):
    root, _, _ = finished
    found = tables.models(read_pipeline(root))
    assert [m.name for m in found] == ["parent", "child", "lm_only", "distilled", "sft", "rl"]
    sizes = {row[0]: row for row in tables.size_table(read_pipeline(root), found).rows}
    assert sizes["parent"][2] == "100.0%"
    assert (
        sizes["parent"][3] == f"{2 * 4 * 4 * 8 * 2:,}"
    )  # K and V, layers, heads, channels, bytes of bfloat16
    assert sizes["lm_only"][4:6] == ("–", "–")
    passes = tables.pass_table(found)
    assert [row[0] for row in passes.rows] == ["parent", "child", "distilled", "sft", "rl"]
    assert passes.rows[-1][1] == "80.0% [71.1, 86.7]"  # Wilson's interval of 80 in 100
    long = tables.long_context_table(found)
    assert long.header == ("model", "task", "512 tokens", "1,024 tokens")
    assert long.rows == [("rl", "single", "25.0%", "100.0%")]


def test_distillation_gains_and_comparisons(finished):
    pipeline = read_pipeline(finished[0])
    rows = {row[0]: row for row in tables.distill_table(pipeline).rows}
    assert rows["distill"][1:3] == ("1 kl + 1 cosine", "2,048") and rows["distill"][-1] == "75.0%"
    assert rows["aaa_lm"][1] == "1 lm"
    assert tables.gain_table(pipeline).rows == [
        ("rl, thinking on", "64", "50.0%", "62.5%", "+12.5 [+8.0, +17.0]")
    ]
    turned = tables.comparison_table(pipeline, tables.models(pipeline)).rows
    assert turned == [("parent → rl", "on", "+80.0 [+70.0, +90.0]")]
    told = {what: value for what, value, _ in tables.headlines(pipeline, tables.models(pipeline))}
    assert told["of the gap closed by distillation"] == "75.0%"
    assert told["of the parent's block parameters kept"] == "50.0%"
    assert tables.block_table(pipeline).rows[2] == ("2", "kv4", "-", "ffn512", "linear", "0.0200")


def test_conversations(finished):
    pipeline = read_pipeline(finished[0])
    groups = page.conversations(pipeline, tables.models(pipeline), 3)
    (sample,) = groups["add, thinking on"]
    assert [a.model for a in sample.answers] == ["parent", "sft", "rl"]
    assert sample.answers[0].verdict == "right" and sample.answers[0].text.startswith("2")
    assert sample.answers[1].thinking == "never ends" and sample.answers[1].text == ""
    assert sample.answers[1].verdict == "not graded"


def test_done_is_skipped_and_a_new_result_is_shown(finished):
    root, result, _ = finished
    stamp = (root / "report.html").stat().st_mtime_ns
    assert page.run(Config(pipeline=str(root)), root / "report") == result
    assert (root / "report.html").stat().st_mtime_ns == stamp


def test_an_empty_pipeline(tmp_path):
    (tmp_path / "pipeline.json").write_text('{"format_version": 1}')
    result = page.run(Config(pipeline=str(tmp_path)), tmp_path / "report")
    html = (tmp_path / "report.html").read_text()
    check(html)
    assert result["stages"] == 0 and html.count("not run") >= 5


@pytest.mark.parametrize("gone", ["pretrain", "compress", "distill", "sft", "rl", "evaluate"])
def test_any_stage_may_be_missing(tmp_path, gone):
    root = write_pipeline(tmp_path / "demo")
    shutil.rmtree(root / gone)
    write_stage(root, "second", "sft", ["sft"])  # half done
    html, _ = page.render(Config(pipeline=str(root)))
    check(html)
    assert "not finished" in html
    assert gone in ("distill", "sft") or re.search(rf"{gone}</th>.*not run", html)


def test_not_a_pipeline(tmp_path):
    with pytest.raises(ValueError, match="expected a pipeline's directory"):
        page.run(Config(pipeline=str(tmp_path)), tmp_path / "report")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_in_a_browser(finished, tmp_path):
    """Nothing is wider than a phone; a browser lays the page out without complaint."""
    browser = next(
        (b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None
    )
    if not browser:
        pytest.skip("no Chromium on this machine")
    probe = tmp_path / "probe.html"
    # a narrow frame, because a headless window has a least width
    probe.write_text(
        f'<iframe id="f" style="width:360px;height:900px" src="file://{finished[0]}/report.html"></iframe>'
        '<p id="out"></p><script>document.getElementById("f").onload = e => { const d = '
        "e.target.contentDocument.documentElement; document.getElementById('out').textContent = "
        "'WIDTH ' + d.scrollWidth + ' OF ' + d.clientWidth; }</script>"
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{probe}"], capture_output=True, text=True, timeout=120)
    found = re.search(r"WIDTH (\d+) OF (\d+)", done.stdout.partition('id="out"')[2])
    assert found, done.stderr[-500:]
    assert int(found[1]) <= int(found[2])
