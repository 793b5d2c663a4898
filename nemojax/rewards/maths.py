"""Mathematical equivalence by math-verify, in worker processes that can be killed.

math-verify guards itself with SIGALRM, which works only in a main thread, and SymPy can run for ever or eat
all memory; so it lives in child processes that speak JSON lines, and one that is late is killed and
replaced. A verifier that failed returns None, never 0.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MEMORY_LIMIT = 4 << 30  # bytes of address space for a worker
_START_SECONDS = 120.0  # importing math-verify takes seconds, more on a busy machine


class MathVerifier:
    """A pool of workers; use as a context manager. `timeout`: seconds allowed for one answer."""

    def __init__(self, num_workers: int = 1, timeout: float = 10.0):
        if num_workers < 1 or timeout <= 0:
            raise ValueError(
                f"MathVerifier: expected num_workers >= 1 and timeout > 0, got {num_workers}, {timeout}"
            )
        self._timeout = timeout
        self._workers: list[subprocess.Popen | None] = [None] * num_workers

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for slot in range(len(self._workers)):
            self._stop(slot)

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """For each (reference, answer): 1.0 equal, 0.0 not, None when the worker failed or was late."""
        results: list[float | None] = [None] * len(pairs)
        waiting = list(range(len(pairs)))[::-1]
        running: dict[int, tuple[int, float]] = {}  # slot -> (index of the pair, deadline)
        while waiting or running:
            for slot in range(len(self._workers)):
                if slot not in running and waiting:
                    index = waiting.pop()
                    if self._send(slot, pairs[index]):
                        running[slot] = (index, time.monotonic() + self._timeout)
            self._collect(running, results)
        return results

    def _collect(self, running: dict[int, tuple[int, float]], results: list[float | None]) -> None:
        pipes = {self._stdout(slot): slot for slot in running}
        if not pipes:
            return
        wait = max(0.0, min(deadline for _, deadline in running.values()) - time.monotonic())
        ready, _, _ = select.select(list(pipes), [], [], wait)
        for pipe in ready:
            slot = pipes[pipe]
            results[running.pop(slot)[0]] = self._read(slot)
        now = time.monotonic()
        for slot in [s for s, (_, deadline) in running.items() if deadline <= now]:
            running.pop(slot)
            self._stop(slot)

    def _send(self, slot: int, pair: tuple[str, str]) -> bool:
        try:
            worker = self._workers[slot] or self._start(slot)
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(pair).encode() + b"\n")
            worker.stdin.flush()
        except (OSError, TimeoutError):
            self._stop(slot)
            return False
        return True

    def _read(self, slot: int) -> float | None:
        line = self._stdout(slot).readline()
        if not line:
            self._stop(slot)
            return None
        return json.loads(line)

    def _stdout(self, slot: int) -> Any:
        worker = self._workers[slot]
        assert worker is not None and worker.stdout is not None
        return worker.stdout

    def _start(self, slot: int) -> subprocess.Popen:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        worker = subprocess.Popen(
            [sys.executable, "-m", "nemojax.rewards.maths"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._workers[slot] = worker
        ready, _, _ = select.select([self._stdout(slot)], [], [], _START_SECONDS)
        if not ready or not self._stdout(slot).readline():
            raise TimeoutError("math-verify worker did not start")
        return worker

    def _stop(self, slot: int) -> None:
        worker = self._workers[slot]
        self._workers[slot] = None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                pipe.close()


def _serve() -> None:
    """The worker: reads [reference, answer] lines, writes 1.0, 0.0 or null."""
    import resource

    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # nothing else may write into the protocol
    out.write(b"ready\n")
    for line in sys.stdin:
        reference, answer = json.loads(line)
        try:
            gold = parse(reference, raise_on_error=True)
            score = float(verify(gold, parse(answer), raise_on_error=True)) if gold else None
        except Exception:  # whatever SymPy raises, the sample is masked and counted
            score = None
        out.write(json.dumps(score).encode() + b"\n")


if __name__ == "__main__":
    _serve()
