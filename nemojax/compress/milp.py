"""The integer program of the search, solved by HiGHS: one choice for every layer, sums within bounds."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SLACK = 1e-9  # what HiGHS is granted, relative; solutions are then held to the bounds exactly
MAX_CUTS = 100


@dataclass(frozen=True)
class Row:
    """low <= sum of `values` at the chosen places <= high; `slack` is allowed beyond. values: [choices]."""

    values: np.ndarray
    low: float
    high: float
    slack: float = 0.0

    def holds(self, places: np.ndarray) -> bool:
        total = math.fsum(self.values[places])
        return self.low - self.slack <= total <= self.high + self.slack


@dataclass(frozen=True)
class Link:
    """`gain` is taken from what is minimised when the choice at `one` and the choice at `other` are made."""

    one: int
    other: int
    gain: float


@dataclass(frozen=True)
class Answer:
    """`chosen` index by layer; `bound`: no choice has less than this; `optimal`: proven."""

    chosen: tuple[int, ...]
    value: float
    bound: float
    optimal: bool


class OutOfTime(ValueError):
    """The time limit came before any solution."""


class Program:
    """Choices of all layers side by side: layer i's stand at `starts[i]`, `starts[i]` + 1, ..."""

    def __init__(self, sizes: Sequence[int], rows: Sequence[Row] = ()):
        self.sizes = tuple(sizes)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(int)
        self.count = int(self.starts[-1])
        self.rows = list(rows)

    def differ(self, chosen: Sequence[int], layers: int) -> None:
        """From now on, solutions differ from `chosen` in at least so many layers."""
        self.rows.append(Row(self._indicator(self.places(chosen)), -np.inf, len(self.sizes) - layers))

    def places(self, chosen: Sequence[int]) -> np.ndarray:
        return self.starts[:-1] + np.asarray(chosen, int)

    def minimise(self, weights: np.ndarray, max_seconds: float, links: Sequence[Link] = ()) -> Answer | None:
        """The choice of least weight, or None when there is none. `OutOfTime` when the limit came first.

        HiGHS takes a bound for met within a tolerance; a solution that misses one by a hair is cut off, and
        the next one is asked for.
        """
        rows = len(self.rows)
        try:
            for _ in range(MAX_CUTS):
                answer = self._solve(weights, max_seconds, links)
                if answer is None or all(row.holds(self.places(answer.chosen)) for row in self.rows):
                    return answer
                self.differ(answer.chosen, 1)
        finally:
            del self.rows[rows:]
        raise OutOfTime("search: the bounds are too close to what many choices cost; move one by a little")

    def _solve(self, weights: np.ndarray, max_seconds: float, links: Sequence[Link]) -> Answer | None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        scale = float(np.abs(weights).max()) or 1.0
        gains = np.array([link.gain for link in links])
        matrix, low, high = self._constraints(links)
        options = {
            "mip_rel_gap": 0.0,
            "mip_abs_gap": 0.0,
            "mip_feasibility_tolerance": 1e-9,
            "primal_feasibility_tolerance": 1e-9,
            "time_limit": max_seconds,
        }
        with warnings.catch_warnings(), _silence():
            # SciPy hands options that it does not know to HiGHS, and says so
            warnings.simplefilter("ignore", RuntimeWarning)
            result = milp(
                np.concatenate([weights, -gains]) / scale,
                integrality=np.concatenate([np.ones(self.count), np.zeros(len(links))]),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(matrix, low, high),  # pyright: ignore[reportArgumentType]
                options=options,
            )
        if result.x is None:
            if result.status == 1:
                raise OutOfTime(f"search: no solution within {max_seconds:g} s; raise the time limit")
            if result.status != 2:
                raise RuntimeError(f"HiGHS: {result.message}")
            return None
        chosen = tuple(
            int(np.argmax(result.x[a:b])) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)
        )
        value = self._value(weights, chosen, links)
        if result.status == 0:
            return Answer(chosen, value, value, True)
        return Answer(chosen, value, self._lower(weights, gains, result.mip_dual_bound, scale), False)

    def _value(self, weights: np.ndarray, chosen: Sequence[int], links: Sequence[Link]) -> float:
        places = self.places(chosen)
        made = set(places.tolist())
        gained = [link.gain for link in links if link.one in made and link.other in made]
        return math.fsum(weights[places]) - math.fsum(gained)

    def _lower(self, weights: np.ndarray, gains: np.ndarray, dual: float | None, scale: float) -> float:
        """What HiGHS proved, or what the least of each layer adds up to."""
        least = sum(float(weights[a:b].min()) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True))
        least -= float(gains.sum())
        return max(least, dual * scale) if dual is not None and math.isfinite(dual) else least

    def _constraints(self, links: Sequence[Link]) -> tuple[object, np.ndarray, np.ndarray]:
        """(sparse matrix over the choices and then the links, low, high)."""
        from scipy.sparse import csr_array, hstack, vstack

        owner = np.repeat(np.arange(len(self.sizes)), self.sizes)
        parts = [csr_array((np.ones(self.count), (owner, np.arange(self.count))))]
        low, high = [np.ones(len(self.sizes))], [np.ones(len(self.sizes))]
        for row in self.rows:
            finite = [abs(b) for b in (row.low, row.high) if math.isfinite(b)]
            scale = max(float(np.abs(row.values).max()), *finite, 1e-300)
            slack = max(SLACK * max(max(finite, default=0.0) / scale, 1e-3), row.slack / scale)
            parts.append(csr_array(row.values[None] / scale))
            low.append(np.array([row.low / scale - slack]))
            high.append(np.array([row.high / scale + slack]))
        matrix = vstack(parts)
        if not links:
            return matrix, np.concatenate(low), np.concatenate(high)
        # a link is at most either of its choices, and nothing but its gain holds it up
        number = len(links)
        index = np.arange(number)
        both = []
        for ends in ([link.one for link in links], [link.other for link in links]):
            choice = csr_array((-np.ones(number), (index, ends)), shape=(number, self.count))
            both.append(hstack([choice, csr_array((np.ones(number), (index, index)))]))
            low.append(np.full(number, -np.inf))
            high.append(np.zeros(number))
        wide = hstack([matrix, csr_array((len(self.sizes) + len(self.rows), number))])
        return vstack([wide, *both]), np.concatenate(low), np.concatenate(high)

    def _indicator(self, places: np.ndarray) -> np.ndarray:
        values = np.zeros(self.count)
        values[places] = 1.0
        return values


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """HiGHS prints a line for its makers now and then, past Python, whatever it is told; what
    prints JSON has to stay JSON."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C still holds back goes the same way
        os.dup2(kept, 1)
        os.close(kept)
