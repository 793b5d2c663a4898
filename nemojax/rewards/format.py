"""The thinking tags: `<think>…</think>` before the answer when thinking is on, no tag at all when off."""

from __future__ import annotations

from nemojax.data.tokenizer import END_THINK, THINK


def think_format(text: str, thinking: bool) -> float:
    """1.0 when the completion has the form that the toggle asks for, else 0.0.

    On: exactly one `<think>…</think>`, at the start (an empty one is legal), then an answer. Off: no tag.
    A template that already opened the tag in the prompt must have it put back before calling this.
    """
    if not thinking:
        return float(THINK not in text and END_THINK not in text)
    text = text.strip()
    if text.count(THINK) != 1 or text.count(END_THINK) != 1 or not text.startswith(THINK):
        return 0.0
    return float(bool(text.partition(END_THINK)[2].strip()))
