"""What a run says about itself: metrics.jsonl, TensorBoard, and one progress line."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemojax.buckets import copy_file, files_below, is_bucket, place

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
_SEND_SECONDS = 30
TOKENS_PER_SECOND, MFU = "performance/tokens_per_second", "performance/mfu"


class RunLog:
    """Writes a run's metrics to its work directory and shows progress on standard error.

    total_steps: for the time left; None when unknown. quiet: files only. On a terminal the progress is one
    line that is redrawn, elsewhere one line for each `write`. On resume call `truncate(step)` first.
    A bucket, to which nothing is appended, gets the files anew: at `flush`, at the end, every 30 seconds.
    """

    def __init__(self, workdir: str | os.PathLike, total_steps: int | None = None, quiet: bool = False):
        self._bucket = place(workdir) if is_bucket(workdir) else None
        self._held = tempfile.TemporaryDirectory() if self._bucket else None
        self.workdir = Path(self._held.name) if self._held else Path(workdir)
        self._name, self._sent, self._sent_at = place(workdir).name, dict[Path, int](), time.monotonic()
        if self._bucket is None:
            self.workdir.mkdir(parents=True, exist_ok=True)
        elif (there := self._bucket / METRICS).is_file():
            copy_file(there, self.workdir / METRICS)
        self.total_steps = total_steps
        self._quiet = quiet
        self._board: Any = None
        self._purge: int | None = None
        self._progress: Any = None
        self._first: tuple[int, float] | None = None
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._file = os.open(self.workdir / METRICS, flags, 0o644)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line and shows it. Values that are not finite become null."""
        values = {name: float(value) for name, value in metrics.items()}
        row = {"step": int(step), **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        line = (json.dumps(row) + "\n").encode()
        # One system call, so that a killed process leaves at most one broken line, the last.
        if os.write(self._file, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.workdir / METRICS))
        board = self._tensorboard()
        for name, value in values.items():
            board.add_scalar(name, value, step)
        if time.monotonic() - self._sent_at > _SEND_SECONDS:
            self.flush()
        if not self._quiet:
            self._show(int(step), values)

    def truncate(self, step: int) -> None:
        """Drops the lines after `step`, which a resumed run writes again, and a line cut short by a kill."""
        path = self.workdir / METRICS
        kept = [line for line, row in _lines(path) if row["step"] <= step]
        partial = path.with_name(f"{METRICS}.partial")
        partial.write_text("".join(kept))
        partial.replace(path)
        os.close(self._file)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._purge = step + 1

    def flush(self) -> None:
        """Returns when all that was written is in the work directory. A bucket that does not take it is told
        in a warning, and asked again: it is no reason to end a training."""
        if self._board is not None:
            self._board.flush()
        try:
            self._send()
        except Exception as error:
            logging.getLogger(__name__).warning("%s: metrics are not there yet (%s)", self._bucket, error)
        self._sent_at = time.monotonic()

    def _send(self) -> None:
        if self._bucket is None:
            return
        for path in files_below(self.workdir):
            if self._sent.get(path) != (size := path.stat().st_size):
                copy_file(path, self._bucket / path.relative_to(self.workdir))
                self._sent[path] = size

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._progress is not None:
            self._progress.stop()
        if self._file >= 0:
            os.close(self._file)
        self._board, self._progress, self._file = None, None, -1
        if self._held is not None:
            failing = sys.exc_info()[0] is not None
            try:
                self.flush() if failing else self._send()  # what is failing already is what to tell
            finally:
                self._held.cleanup()
                self._held = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensorboard(self) -> Any:
        if self._board is None:
            self._board = _summary_writer()(str(self.workdir / TENSORBOARD), purge_step=self._purge)
        return self._board

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._first = self._first or (step, now)
        text = describe_progress(self._name, step, self.total_steps, values, self._seconds_left(step, now))
        if not sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)
            return
        if self._progress is None:
            from rich.console import Console
            from rich.live import Live

            self._progress = Live(console=Console(stderr=True), refresh_per_second=4)
            self._progress.start()
        self._progress.update(text)

    def _seconds_left(self, step: int, now: float) -> float | None:
        """From the rate since the second `write` on: the first one has waited for the compiler."""
        first_step, started = self._first or (step, now)
        if self.total_steps is None or step <= first_step:
            return None
        return (now - started) / (step - first_step) * max(0, self.total_steps - step)


def describe_progress(
    name: str, step: int, total: int | None, values: Mapping[str, float], seconds_left: float | None
) -> str:
    """`sft 120/400  train/loss 1.234  5,120 tokens/s  MFU 31%  1:20 left`."""
    parts = [f"{name} {step}" + (f"/{total}" if total else "")]
    shown = [k for k in values if not k.startswith(("performance/", "timing/"))]
    parts += [f"{k} {values[k]:.4g}" for k in shown[:5]]
    if TOKENS_PER_SECOND in values:
        parts.append(f"{values[TOKENS_PER_SECOND]:,.0f} tokens/s")
    if MFU in values:
        parts.append(f"MFU {100 * values[MFU]:.0f}%")
    if seconds_left is not None:
        parts.append(f"{format_seconds(seconds_left)} left")
    return "  ".join(parts)


def format_seconds(seconds: float) -> str:
    """`9:05`, or `1:02:03` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl ({"step": int, name: float or None}); [] when there is none."""
    return [row for _, row in _lines(place(workdir) / METRICS)]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Complete lines with what they say; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    *complete, _ = path.read_text().split("\n")
    rows = []
    for number, line in enumerate(complete, start=1):
        try:
            rows.append((line + "\n", json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}") from error
    return rows


def _summary_writer() -> Any:
    """tensorboardX's, without the torch that it would import, for seconds, wherever there is one."""
    loaded = "torch" in sys.modules
    if not loaded:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # as if it were not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        if not loaded:
            del sys.modules["torch"]
    return SummaryWriter
