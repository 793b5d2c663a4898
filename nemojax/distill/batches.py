"""Batches that are changed on their way from the loader to the loop; their place is the loader's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from nemojax.data.packing import Batch
from nemojax.distill.cache_store import TeacherCache, row_hashes


class View:
    """What passes a loader's batches on. `loader`: anything that keeps the loader's protocol."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __iter__(self) -> View:
        return self

    def __next__(self) -> Batch:
        return next(self.loader)

    def state(self) -> dict[str, Any]:
        return self.loader.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.loader.restore(state)

    def bind(self, params: Callable[[], Any]) -> None:
        """Hands on the access to the current weights, for batches that are sampled from them."""
        if hasattr(self.loader, "bind"):
            self.loader.bind(params)

    @property
    def rows(self) -> np.ndarray:
        return self.loader.rows

    @property
    def identity(self) -> str:
        return self.loader.identity

    @property
    def ids(self) -> list[str]:
        return self.loader.ids

    @property
    def metrics(self) -> dict[str, float]:
        return getattr(self.loader, "metrics", {})


class OfflineBatches(View):
    """A loader's batches with `teacher_ids`, `teacher_logps` [B, T, K] and `teacher_tail` [B, T] of a cache,
    for a loss of `top_k` tokens, which takes the first of K.

    What the next `ahead` batches need is read and unpacked meanwhile, in a thread. ValueError for rows that
    the cache does not have or that its teacher read otherwise, and for more tokens than it keeps.
    """

    def __init__(self, loader: Any, cache: TeacherCache, top_k: int, shares: int = 1, ahead: int = 2):
        super().__init__(loader)
        kept = cache.told.top_k
        if not 1 <= top_k <= kept:
            raise ValueError(
                f"{cache.url}: expected loss.top_k from 1 to the {kept} tokens that it keeps, got {top_k}"
            )
        self.cache, self.shares, self.ahead = cache, shares, ahead
        self._reads: dict[bytes, Future[dict[str, np.ndarray]]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __next__(self) -> Batch:
        batch = next(self.loader)
        rows = self.loader.rows
        self.cache.check(rows, row_hashes(batch))
        # rows are dealt out in turn, so those of the next batches are known without asking the loader
        wanted = [rows + n * self.shares * len(rows) for n in range(self.ahead + 1)]
        reads = {r.tobytes(): r for r in wanted if int(r.max()) < self.cache.num_rows}
        self._reads = {key: self._reads.get(key) or self._read(r) for key, r in reads.items()}
        told = self._reads.pop(rows.tobytes()).result()
        return {**batch, **{f"teacher_{name}": array for name, array in told.items()}}

    def _read(self, rows: np.ndarray) -> Future[dict[str, np.ndarray]]:
        return self._thread.submit(self.cache.read(rows))
