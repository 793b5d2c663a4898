"""Short questions and workings for reasoning-gym entries: entry -> (prompt, working, answer).

Words are spelled with spaces, so that a small vocabulary sees their letters; numbers are read digit by
digit by the tokenizer already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Entry = dict[str, Any]
Asked = tuple[str, str, str]


def _integers(numbers: Iterable[str]) -> list[str]:
    return [str(int(float(number))) for number in numbers]


def _spelled(word: str) -> str:
    return " ".join(word.lower())


def ask_sort(entry: Entry) -> Asked:
    """Selection sort: each step names the next number and what is left."""
    meta = entry["metadata"]
    given, ordered = _integers(meta["original_numbers"]), _integers(meta["sorted_numbers"])
    left, steps = list(given), []
    for number in ordered[:-1]:
        left.remove(number)
        steps.append(f"{number}: {' '.join(left)}")
    way = "up" if meta["direction"] == "ascending" else "down"
    return f"sort {way} {' '.join(given)}", ", ".join(steps), " ".join(ordered)


def ask_filter(entry: Entry) -> Asked:
    """Every number is marked kept (y) or not (n)."""
    meta = entry["metadata"]
    given, kept = _integers(meta["original_numbers"]), _integers(meta["result"])
    bound = _integers([meta["filter_value"]])[0]
    marks = ", ".join(f"{number} {'y' if number in kept else 'n'}" for number in given)
    return (
        f"{meta['operation'].replace('_', ' ')} {bound}: {' '.join(given)}",
        marks,
        " ".join(kept) or "none",
    )


def _columns(a: int, b: int, sign: str) -> str:
    """Column arithmetic from the right: `digit sign digit sign carry = carry digit`; needs a >= b if -."""
    width, carry, steps = max(len(str(a)), len(str(b))), 0, []
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry if sign == "+" else x - y - carry
        after = total // 10 if sign == "+" else int(total < 0)
        steps.append(f"{x}{sign}{y}{sign}{carry}={after}{total % 10}")
        carry = after
    return " ".join(steps)


def _column_step(value: int, sign: str, term: int) -> str:
    """One addition or subtraction by columns of the magnitudes, and its result."""
    result = value + term if sign == "+" else value - term
    if value < 0 and sign == "-":
        return f"{_columns(-value, term, '+')} is {result}"
    if value >= 0 and sign == "+":
        return f"{_columns(value, term, '+')} is {result}"
    large, small = max(abs(value), term), min(abs(value), term)
    return f"{_columns(large, small, '-')} is {result}"


def ask_chain_sum(entry: Entry) -> Asked:
    """Two terms are worked column by column; of more, the running totals are listed."""
    tokens = entry["metadata"]["expression"].split()
    value, steps, totals = int(tokens[0]), [], []
    for sign, term in zip(tokens[1::2], map(int, tokens[2::2]), strict=True):
        steps.append(_column_step(value, sign, term))
        value = value + term if sign == "+" else value - term
        totals.append(str(value))
    return "".join(tokens) + "=", steps[0] if len(steps) == 1 else " ".join(totals[:-1]), entry["answer"]


def ask_product(entry: Entry) -> Asked:
    """The partial products of each digit of the second factor."""
    a, b = (int(factor) for factor in entry["metadata"]["expression"].split(" * "))
    partial = [str(a * int(digit) * 10**place) for place, digit in enumerate(reversed(str(b)))]
    return f"{a}*{b}=", "+".join(partial), entry["answer"]


def ask_spell(entry: Entry) -> Asked:
    """The letters are numbered."""
    word = entry["metadata"]["word"].lower()
    numbered = " ".join(f"{number}{letter}" for number, letter in enumerate(word, 1))
    return f"reverse {_spelled(word)}", numbered, _spelled(word[::-1])


def ask_letters(entry: Entry) -> Asked:
    """The count so far stands behind each letter."""
    meta = entry["metadata"]
    target, word, count, steps = meta["target_letter"].lower(), "".join(meta["span"]).lower(), 0, []
    for letter in word:
        count += letter == target
        steps.append(f"{letter}{count}")
    return f"count {target} in {_spelled(word)}", " ".join(steps), str(count)


def ask_base_conversion(entry: Entry) -> Asked:
    """The number is said in base ten, then divided down digit by digit."""
    meta = entry["metadata"]
    value, base, steps = meta["decimal_value"], meta["target_base"], []
    left = value
    while left:
        left, digit = divmod(left, base)
        steps.append(f"{left}r{digit:x}")
    prompt = f"base {meta['source_base']} to {base}: {meta['source_repr']}"
    return prompt, f"{value}, {' '.join(steps)}", meta["target_repr"]


def ask_caesar(entry: Entry) -> Asked:
    """Each letter beside what it stands for."""
    meta = entry["metadata"]
    cipher, clear = meta["cipher_text"].lower(), meta["clear_text"].lower()
    pairs = " ".join(f"{a}>{b}" for a, b in zip(cipher, clear, strict=True))
    return f"shift back {meta['rotation']}: {_spelled(cipher)}", pairs, _spelled(clear)


def ask_bits(entry: Entry) -> Asked:
    """Three binary digits at a time, with the count so far."""
    digits = entry["metadata"]["binary"].removeprefix("0b")
    count, steps = 0, []
    for start in range(0, len(digits), 3):
        group = digits[start : start + 3]
        count += group.count("1")
        steps.append(f"{group} {count}")
    return f"ones in {digits}", ", ".join(steps), entry["answer"]


def _grid(rows: Sequence[Sequence[int]]) -> str:
    return "/".join("".join(map(str, row)) for row in rows)


def ask_spiral(entry: Entry) -> Asked:
    """The four sides one after another, each stripped from the grid, are spelled out."""
    meta = entry["metadata"]
    rows, sides = [list(row) for row in meta["matrix"]], []
    while rows:
        sides.append("".join(map(str, rows[0])))
        rows = [list(column) for column in zip(*rows[1:], strict=True)][::-1]
    return f"spiral {_grid(meta['matrix'])}", " ".join(sides), "".join(map(str, meta["solution"]))


def ask_rotate(entry: Entry) -> Asked:
    """The grid after each quarter turn."""
    meta = entry["metadata"]
    grid, turns = meta["matrix"], []
    for _ in range(meta["num_rotations"] % 4):
        grid = [list(column) for column in zip(*grid[::-1], strict=True)]
        turns.append(_grid(grid))
    return (
        f"rotate {meta['num_rotations'] % 4}: {_grid(meta['matrix'])}",
        " ".join(turns),
        _grid(meta["solution"]),
    )
