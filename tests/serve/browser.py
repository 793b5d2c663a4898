"""Chromium, and what a person does with the chat page in it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.serve.stub import WAIT

CHROMIUM = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update"]


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def last(page: Any) -> Any:
    return page.locator("article.assistant").last


def answered(page: Any) -> Any:
    """The last answer, when it is complete."""
    page.locator("article.assistant[aria-busy=false]").last.wait_for()
    page.get_by_role("button", name="Send").wait_for()
    return last(page)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips the test where there is none."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS) as browser:
            yield browser


@contextmanager
def opening_pages(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages, and sees to it that no script failed and the page's policy was not in its way."""
    complaints, contexts = [], []

    def open_page(url: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT * 1000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        # a refused request is told on the console as well: that is not the page's doing
        page.on("console", lambda m: complaints.append(m.text) if is_complaint(m) else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def is_complaint(message: Any) -> bool:
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text
