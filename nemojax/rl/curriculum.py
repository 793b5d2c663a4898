"""Which problems to practise: a filter by pass rate, then a Gaussian that moves from easy to hard.

The pass rate of a problem is measured once with the starting policy. Problems that are nearly always
solved are dropped (Llama-Nemotron, arXiv:2505.00949, section 5: at or above 0.75); batches are then drawn
with a target distribution over pass rate whose centre falls from `start` to `end` over the run. A bin that
has too few problems is filled from the largest remaining one. The paper gives no width; 0.2 is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemojax.config import field


@dataclass(frozen=True)
class CurriculumConfig:
    """`samples` 0 switches the curriculum off: problems come in shuffled order."""

    samples: int = field(0, "answers per problem to measure its pass rate with the starting policy; 0 is off")
    max_pass_rate: float = field(0.75, "drop problems solved at least this often")
    min_pass_rate: float = field(0.0, "drop problems solved less often than this")
    start: float = field(0.7, "pass rate at the centre of the first batch")
    end: float = field(0.1, "pass rate at the centre of the last batch")
    width: float = field(0.2, "standard deviation of the target over pass rate")
    bins: int = field(8, "pass-rate bins")

    def __post_init__(self):
        if not 0 <= self.min_pass_rate <= self.max_pass_rate <= 1.01:
            raise ValueError(
                f"max_pass_rate: expected min_pass_rate <= max_pass_rate, got "
                f"{self.min_pass_rate}, {self.max_pass_rate}"
            )
        if self.width <= 0 or self.bins < 1 or self.samples < 0:
            raise ValueError("width, bins: expected positive numbers; samples: expected 0 or more")


class Uniform:
    """Problem indices 0..n-1, reshuffled each epoch; the state is the number of indices drawn."""

    def __init__(self, num_problems: int, seed: int):
        if num_problems < 1:
            raise ValueError(
                "rl.problems: expected at least one training problem, got none; raise their number"
            )
        self._n, self._seed, self._drawn = num_problems, seed, 0

    def draw(self, count: int, progress: float) -> list[int]:
        """The next `count` indices; `progress` in [0, 1] is unused here."""
        del progress
        out: list[int] = []
        while len(out) < count:
            epoch, offset = divmod(self._drawn, self._n)
            order = np.random.default_rng([self._seed, epoch]).permutation(self._n)
            take = order[offset : offset + count - len(out)]
            out += [int(i) for i in take]
            self._drawn += len(take)
        return out

    def state(self) -> dict:
        return {"drawn": self._drawn}

    def restore(self, state: dict) -> None:
        self._drawn = int(state["drawn"])


class Gaussian:
    """Indices drawn by pass rate, the target's centre moving with `progress`; the state is the draw count
    and how often each problem was used (a problem returns only when its bin is exhausted)."""

    def __init__(self, pass_rates: np.ndarray, cfg: CurriculumConfig, seed: int):
        rates = np.asarray(pass_rates, np.float64)
        keep = np.flatnonzero((rates < cfg.max_pass_rate) & (rates >= cfg.min_pass_rate))
        if keep.size == 0:
            raise ValueError(
                f"rl.curriculum: expected pass rates in [{cfg.min_pass_rate}, {cfg.max_pass_rate}), "
                f"got none of {rates.size}; widen the band or take harder problems"
            )
        self._cfg, self._seed, self._batches = cfg, seed, 0
        self._uses = np.zeros(rates.size, np.int64)
        edges = np.linspace(rates[keep].min(), rates[keep].max() + 1e-9, cfg.bins + 1)
        where = np.clip(np.digitize(rates[keep], edges) - 1, 0, cfg.bins - 1)
        self._bins = [keep[where == b] for b in range(cfg.bins)]
        self._centres = (edges[:-1] + edges[1:]) / 2

    def targets(self, count: int, progress: float) -> np.ndarray:
        """How many of `count` problems each bin should give, by largest remainder."""
        centre = self._cfg.start + (self._cfg.end - self._cfg.start) * min(max(progress, 0.0), 1.0)
        weight = np.exp(-0.5 * ((self._centres - centre) / self._cfg.width) ** 2)
        weight = weight + 1e-12
        share = count * weight / weight.sum()
        whole = np.floor(share).astype(int)
        rest = np.argsort(-(share - whole), kind="stable")[: count - whole.sum()]
        whole[rest] += 1
        return whole

    def draw(self, count: int, progress: float) -> list[int]:
        """The next `count` indices, shuffled; `progress` in [0, 1] places the centre."""
        rng = np.random.default_rng([self._seed, self._batches])
        chosen: list[int] = []
        want = self.targets(count, progress)
        left = [list(self._freshest(b, rng)) for b in self._bins]
        for b, number in enumerate(want):
            chosen += left[b][:number]
            left[b] = left[b][number:]
        while len(chosen) < count:  # short bins are filled from the largest remaining pool
            largest = max(range(len(left)), key=lambda b: len(left[b]))
            if not left[largest]:
                left = [list(self._freshest(b, rng)) for b in self._bins]
                continue
            chosen.append(left[largest].pop(0))
        rng.shuffle(chosen)
        np.add.at(self._uses, chosen, 1)
        self._batches += 1
        return [int(i) for i in chosen]

    def _freshest(self, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        indices = rng.permutation(indices)
        return indices[np.argsort(self._uses[indices], kind="stable")]

    def state(self) -> dict:
        return {
            "batches": self._batches,
            "uses": {str(i): int(self._uses[i]) for i in np.flatnonzero(self._uses)},
        }

    def restore(self, state: dict) -> None:
        self._batches = int(state["batches"])
        self._uses[:] = 0
        for i, uses in state["uses"].items():
            self._uses[int(i)] = uses
