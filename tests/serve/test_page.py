"""The chat page: that it stands alone, and what a browser makes of streams, refusals and silence.

Most tests write the server's answers themselves (`Stub`); test_page_served.py has the
real one.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

from tests.serve.browser import answered, ask, chromium, last, opening_pages
from tests.serve.stub import MODEL, PAGE, WAIT, Exchange, Stub, say


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def new_page(browser):
    with opening_pages(browser) as open_page:
        yield open_page


@pytest.fixture
def page(new_page, stub):
    return new_page(stub.url)


class Checker(HTMLParser):
    """Collects tags with their attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_stands_alone():
    html = PAGE.read_text(encoding="utf-8")
    tags = Checker(html).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert not [a for tag, a in tags if "src" in a or (tag != "link" and "href" in a)]
    assert [a["href"] for tag, a in tags if tag == "link"] == ["data:,"]
    assert not re.search(r"https?:|url\(|@import|\simport\W", html)
    script = html.partition("<script>")[2]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|localStorage", script)
    assert not [a for _, a in tags if any(name.startswith("on") or name == "style" for name in a)]


@pytest.mark.parametrize("tag", ["style", "script"])
def test_its_policy_allows_what_it_holds_and_nothing_else(tag):
    html = PAGE.read_text(encoding="utf-8")
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    (policy,) = [a["content"] or "" for _, a in Checker(html).tags if "http-equiv" in a]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules[f"{tag}-src"] == f"'sha256-{digest}'", f"the {tag} has changed: write its new digest"


def test_every_control_has_a_name():
    html = PAGE.read_text(encoding="utf-8")
    labels = re.findall(r"<label[^>]*>.*?</label>", html, re.S)
    for tag, attributes in Checker(html).tags:
        if tag in ("input", "select", "textarea"):
            named = "aria-label" in attributes or f'for="{attributes["id"]}"' in html
            assert named or any(f'id="{attributes["id"]}"' in label for label in labels), attributes["id"]
    assert 'lang="en"' in html and 'name="viewport"' in html and 'aria-live="polite"' in html
    assert "prefers-color-scheme: dark" in html and "prefers-reduced-motion" in html


@pytest.mark.slow
def test_a_conversation_with_thinking(page, stub):
    go_on = threading.Event()

    def think(to: Exchange) -> None:
        to.start().delta(role="assistant")
        to.delta(reasoning_content="1w 2o ")
        to.delta(reasoning_content="3r 4d")
        assert go_on.wait(WAIT)
        to.delta(content="d r ")
        to.delta(content="o w")
        details = {"reasoning_tokens": 4}
        to.end(prompt_tokens=9, completion_tokens=12, total_tokens=21, completion_tokens_details=details)

    stub.answers.put(think)
    page.locator("#model", has_text=MODEL).wait_for()
    ask(page, "reverse w o r d")
    summary = page.locator("summary")
    page.get_by_text("Thinking…").wait_for()
    reasoning = last(page).locator("details .text")
    assert not reasoning.is_visible() and last(page).get_attribute("aria-busy") == "true"
    summary.click()
    page.get_by_text("1w 2o 3r 4d").wait_for()
    summary.click()
    assert page.get_by_role("button", name="Stop").is_visible()
    assert not page.get_by_role("button", name="Send").is_visible()
    go_on.set()
    done = answered(page)
    assert done.locator(".answer").inner_text() == "d r o w"
    assert re.fullmatch(r"Thought for \d+\.\d s, 4 tokens", summary.inner_text())
    assert not reasoning.is_visible() and "12 tokens" in done.locator(".foot").inner_text()
    (body,) = stub.bodies
    assert body["messages"] == [{"role": "user", "content": "reverse w o r d"}]
    assert body["thinking"] is True and body["stream"] is True and body["model"] == MODEL
    assert body["stream_options"] == {"include_usage": True}
    assert not {"temperature", "max_tokens"} & set(body) and stub.keys == [None]

    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System text").fill("Be short.")
    page.get_by_label("Temperature").fill("0.6")
    page.get_by_label("Max tokens").fill("40")
    page.get_by_role("switch", name="Reasoning").uncheck()
    stub.answers.put(say("yes"))
    ask(page, "sure?")
    assert answered(page).locator(".answer").inner_text() == "yes"
    assert not last(page).locator("details").is_visible()
    body = stub.bodies[1]
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][0]["content"] == "Be short."
    assert body["messages"][2]["content"] == "d r o w"  # what was thought is not said again
    assert (body["thinking"], body["temperature"], body["max_tokens"]) == (False, 0.6, 40)


@pytest.mark.slow
def test_what_a_model_says_is_text(page, stub):
    evil = '<img src=x onerror="document.title=1"><b>bold</b>'
    stub.answers.put(say(f"{evil}\n\n```python\nif a < b:\n    {evil}\n```\nafter\n````\n```\n"))
    ask(page, evil)
    done = answered(page)
    assert page.locator(".user .text").inner_text() == evil
    assert page.locator("img, b:not(#empty b)").count() == 0 and page.title() == "nemojax chat"
    pieces = done.locator(".answer > *").evaluate_all("all => all.map(e => [e.tagName, e.textContent])")
    assert pieces[:2] == [["DIV", evil], ["PRE", f"if a < b:\n    {evil}"]]
    assert pieces[2:] == [["DIV", "after"], ["PRE", "```"]]  # a fence that never closes runs to the end
    assert done.locator("pre").first.get_attribute("data-language") == "python"


@pytest.mark.slow
def test_events_arrive_in_any_pieces(page, stub):
    def answer(to: Exchange) -> None:
        chunk = {"choices": [{"index": 0, "delta": {"content": "né🙂e"}, "finish_reason": None}]}
        data = json.dumps(chunk, ensure_ascii=False).encode()
        to.start().raw(b": a comment\r\nretry: 5\r\n\r\nevent: x\r\n")
        for byte in b"data:" + data + b"\r\n\r\ndata: " + data + b"\n\n":
            to.raw(bytes([byte]))
        to.end("length")

    stub.answers.put(answer)
    ask(page, "pieces")
    done = answered(page)
    assert done.locator(".answer").inner_text() == "né🙂e" * 2
    assert "cut at the limit of tokens" in done.locator(".foot").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["button", "escape", "new"])
def test_stop_hangs_up_and_keeps_what_came(page, stub, way):
    hung_up = threading.Event()

    def slow(to: Exchange) -> None:
        to.start().delta(reasoning_content="hm")
        to.delta(content="half of ")
        if to.wait_for_disconnect():
            hung_up.set()

    stub.answers.put(slow)
    ask(page, "go on")
    page.get_by_text("half of").wait_for()
    if way == "escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name={"button": "Stop", "new": "New conversation"}[way]).click()
    assert hung_up.wait(WAIT)
    if way == "new":
        assert page.locator("article").count() == 0
        page.get_by_text("Ask something.").wait_for()
        stub.answers.put(say("hello"))
        ask(page, "hi")
        assert answered(page).locator(".answer").inner_text() == "hello"
        assert stub.bodies[-1]["messages"] == [{"role": "user", "content": "hi"}]
        return
    done = answered(page)
    assert done.locator(".answer").inner_text() == "half of"
    assert "stopped" in done.locator(".foot").inner_text() and not done.locator(".error").is_visible()
    assert "Thought for" in done.locator("summary").inner_text()
    stub.answers.put(say("all of it"))
    page.get_by_role("button", name="Regenerate").click()
    assert answered(page).locator(".answer").inner_text() == "all of it"
    assert page.locator("article").count() == 2
    first, second = stub.bodies
    assert first["messages"] == second["messages"] and first["seed"] != second["seed"]


@pytest.mark.slow
def test_a_key_is_asked_for_and_sent(new_page, stub):
    stub.needs_key = "s3cret"
    page = new_page(stub.url)
    page.get_by_text("An API key is needed: Incorrect API key provided.").wait_for()
    field = page.get_by_label("API key")
    assert field.evaluate("e => e === document.activeElement") and field.get_attribute("type") == "password"
    stub.answers.put(lambda to: to.refuse(401, "Incorrect API key provided."))
    ask(page, "hello")
    page.locator("article .error", has_text="An API key is needed").wait_for()
    field.fill("s3cret")
    field.press("Tab")
    page.locator("#model", has_text=MODEL).wait_for()
    assert not page.locator("#problem").is_visible()
    stub.answers.put(say("welcome"))
    page.get_by_role("button", name="Try again").click()
    assert answered(page).locator(".answer").inner_text() == "welcome"
    assert stub.keys == [None, "Bearer s3cret"]
    page.reload()  # the tab still knows it, and nothing that outlives the tab does
    page.locator("#model", has_text=MODEL).wait_for()
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
    assert page.locator("article").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "headers", "shown"),
    [
        (429, {"Retry_After": "7"}, "The server is busy: queue full. Try again in 7 s."),
        (429, {}, "The server is busy: queue full. Try again in a moment."),
        (400, {}, "The server answered 400: queue full."),
        (503, {}, "The server answered 503: queue full."),
    ],
)
def test_refusals_are_shown_and_can_be_tried_again(page, stub, status, headers, shown):
    stub.answers.put(lambda to: to.refuse(status, "queue full", **headers))
    ask(page, "first")
    assert answered(page).locator(".error").inner_text() == shown
    stub.answers.put(say("now"))
    ask(page, "second")
    assert answered(page).locator(".answer").inner_text() == "now"
    assert stub.bodies[-1]["messages"] == [{"role": "user", "content": "second"}]  # nobody answered the first
    assert page.get_by_role("button", name="Try again").count() == 0


@pytest.mark.slow
def test_failures_in_the_middle(page, stub):
    def dies(to: Exchange) -> None:
        to.start().delta(content="so far")
        to.event({"error": {"message": "the engine stopped", "type": "server_error"}})

    def ends(to: Exchange) -> None:
        to.start().delta(content="and")

    for answer, told in ((dies, "the engine stopped"), (ends, "The connection ended before the answer did.")):
        stub.answers.put(answer)
        ask(page, "question")
        assert answered(page).locator(".error").inner_text() == told
    stub.answers.put(lambda to: (to.start(), to.raw(b"data: {]\n\n"), None)[-1])
    page.get_by_role("button", name="Try again").click()
    assert "JSON" in answered(page).locator(".error").inner_text()
    stub.server.shutdown()
    stub.server.server_close()
    ask(page, "anybody?")
    assert "cannot be reached" in answered(page).locator(".error").inner_text()


@pytest.mark.slow
def test_keyboard_and_limits(page, stub):
    box = page.get_by_label("Message")
    assert box.evaluate("e => e === document.activeElement")
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    height = box.bounding_box()["height"]
    box.press("Shift+Enter")
    assert box.bounding_box()["height"] > height and box.input_value() == "one\ntwo\n"
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("3")
    box.press("Enter")  # the browser says what is wrong with 3
    assert page.get_by_label("Temperature").evaluate("e => e === document.activeElement")
    page.get_by_label("Temperature").fill("0")
    stub.answers.put(say("ok"))
    box.press("Enter")
    answered(page)
    assert stub.bodies[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert stub.bodies[0]["temperature"] == 0 and box.input_value() == ""
    box.press("Enter")  # nothing to send
    assert page.locator("article").count() == 2


@pytest.mark.slow
def test_a_choice_of_models_and_a_copy(new_page, stub):
    stub.models = ["parent", "child"]
    page = new_page(stub.url, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Model").select_option("child")
    stub.answers.put(say("**bold** as written"))
    ask(page, "hello")
    answered(page).get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "**bold** as written"
    assert stub.bodies[0]["model"] == "child"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(new_page, stub, scheme):
    page = new_page(stub.url, viewport={"width": 360, "height": 640}, color_scheme=scheme)
    stub.answers.put(say("word " * 300 + "\n```\n" + "x" * 400 + "\n```\n" + "y" * 400))
    page.get_by_role("button", name="Settings").click()
    ask(page, "z" * 400)
    answered(page)
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen
    for name in ("Send", "Settings", "Regenerate"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360, name
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 384) == (scheme == "light")
    scrolled = page.locator("main").evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight")
    assert abs(scrolled) < 2  # what is new is in sight
