"""The thinking tags: `<think>…</think>` before the answer when thinking is on, no tag at all when off."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def think_format(text: str, thinking: bool) -> float:
    """1.0 when the completion has the form that the toggle asks for, else 0.0.

    On: exactly one `<think>…</think>`, at the start (an empty one is legal), then an answer. Off: no tag.
    A template that already opened the tag in the prompt must have it put back before calling this.
    """
    if not thinking:
        return float(OPEN not in text and CLOSE not in text)
    text = text.strip()
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or not text.startswith(OPEN):
        return 0.0
    return float(bool(text.partition(CLOSE)[2].strip()))


def split_thinking(text: str) -> tuple[str | None, str]:
    """(thinking or None, answer). Unclosed thinking has no answer; without tags all is answer."""
    if OPEN not in text and CLOSE not in text:
        return None, text.strip()
    head, closed, tail = text.partition(CLOSE)
    thought = head.partition(OPEN)[2] if OPEN in head else head
    return thought.strip(), tail.strip() if closed else ""
