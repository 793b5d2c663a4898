"""How fast a training is: tokens a second, share of the chips' peak, share of time that waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from nemojax.arch import ArchSpec, Attention
from nemojax.backends.chips import peak_flops


class Clock:
    """Watches the batches of a training of `arch` between two reports.

    shares: of a step's rows, each read by a process or by several together; a batch here is one of them.
    """

    def __init__(self, arch: ArchSpec, shares: int = 1):
        self.arch, self.shares, self.peak = arch, shares, peak_flops()
        self.length = 1
        self._start_over()

    def _start_over(self) -> None:
        self.tokens, self.waited, self.start = 0, 0.0, time.perf_counter()

    def draw(self, batches: Iterator[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The next batch, counted with the time that it took."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        self.tokens += batch["tokens"].size
        self.length = batch["tokens"].shape[1]
        return batch

    def report(self) -> dict[str, float]:
        """Numbers since the last report, of all processes: tokens count padding too; shares are of 1."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        rate = self.tokens * self.shares / seconds
        values = {"performance/tokens_per_second": rate, "performance/data_wait": self.waited / seconds}
        if self.peak:
            values["performance/mfu"] = rate * flops_per_token(self.arch, self.length) / self.peak
        self._start_over()
        return values


def flops_per_token(arch: ArchSpec, length: int) -> float:
    """Training FLOPs a token: 6 for every weight in a matmul, and causal attention at `length` tokens."""
    matmul = arch.num_block_params() + arch.vocab_size * arch.dim
    attention = 0
    for block in arch.blocks:
        match block.attn:
            case Attention(window=window):
                seen = min(window or length, length)
                attention += 12 * arch.num_heads * arch.head_dim * (seen - seen * seen / (2 * length))
    return 6.0 * matmul + attention
