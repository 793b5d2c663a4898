"""A stage in one or several real processes, which meet over loopback: eight virtual CPU devices in all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.environment import QUICK_COMPILATION

STEPS = 20
RECIPE = """
def get_config():
    return {{
        "tokenizer": {tokenizer!r},
        "shape": {{"dim": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "ffn_width": 64}}
        | {{"context": 256}},
        "data": {{"length": 64, "batch_size": 16, "heldout_batches": 1}},
        "optim": {{"schedule": "constant"}},
        "fit": {{"steps": {steps}, "log_every": 1}},
    }}
"""
# The command line, with the rows of every batch written down; process FAILS fails at its third batch.
WORKER = """#!{python}
import os, sys
from nemojax.cli import main
from nemojax.backends.speed import Clock
from nemojax.checkpoints import store

draw, count = Clock.draw, 0
read = store.Reader.read

def listed(self, names):
    found = read(self, names)
    with open(f"{{os.environ['ROWS']}}.read", "a") as file:
        file.writelines(f"{{array.size}}\\n" for array in found.values())
    return found

store.Reader.read = listed

def watched(self, batches):
    global count
    count += 1
    me = os.environ["NEMOJAX_PROCESS_ID"]
    if os.environ.get("FAILS") == me and count == 3:
        raise ValueError("row 3: broken")
    batch = draw(self, batches)
    with open(f"{{os.environ['ROWS']}}.{{me}}", "a") as file:
        file.writelines(row + "\\n" for row in batches.ids)
    return batch

Clock.draw = watched
sys.exit(main())
"""
# Instead of a verifier, so that there is something to learn for a model that knows nothing: what an answer's
# letters add up to. Rollouts are written to, or read from, RECORD.
GRADED = """
import pickle
from nemojax.rewards.problems import Grade
from nemojax.rl import grpo, rollout

rollout.grade = lambda question, text: Grade((sum(map(ord, text)) % 7) / 6, 1.0)
roll_out, rollouts = grpo.roll_out, 0

def recorded(*arguments, **more):
    global rollouts
    rollouts += 1
    path = f"{{os.environ['RECORD']}}.{{rollouts}}"
    if os.environ.get("REPLAY"):
        with open(path, "rb") as file:
            return pickle.load(file)
    found = roll_out(*arguments, **more)
    if "RECORD" in os.environ:
        with open(path, "wb") as file:
            pickle.dump(found, file)
    return found

grpo.roll_out = recorded if "RECORD" in os.environ else roll_out
sys.exit(main())
"""
LAUNCHER = Path(__file__).parents[2] / "launch" / "local_cluster.sh"


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


class Run:
    """A stage in one or several processes that stand in for machines of a cluster: eight devices in all."""

    def __init__(self, stage: str, workdir: Path, recipe: Path, count: int, *extra: str, **env: str):
        program = workdir.parent / "bin" / "nemojax"
        program.parent.mkdir(parents=True, exist_ok=True)
        text = WORKER if stage != "rl" else WORKER.replace("sys.exit(main())\n", GRADED)
        program.write_text(text.format(python=sys.executable))
        program.chmod(0o755)
        self.workdir, self.count = workdir, count
        self.rows_path = workdir.parent / f"{workdir.name}.rows{len(list(workdir.parent.iterdir()))}"
        self.logs = [Path(f"{workdir}.process{i}.log") for i in range(count)]
        self._before = [log.stat().st_size if log.exists() else 0 for log in self.logs]
        self._said: list[str] | None = None
        self._output = Path(f"{self.rows_path}.launcher")
        arguments = [stage, f"--config={recipe}", f"--workdir={workdir}", *extra]
        mine = {"XLA_FLAGS": QUICK_COMPILATION, "ROWS": str(self.rows_path), "NEMOJAX_START_TIMEOUT": "120"}
        with self._output.open("w") as out:
            self.launcher = subprocess.Popen(
                ["bash", str(LAUNCHER), str(count), f"--devices={8 // count}", *arguments],
                env=os.environ | mine | {"NEMOJAX_VENV": str(workdir.parent)} | env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def code(self, seconds: float = 240) -> int:
        """The launcher's exit code; what still runs after `seconds` is killed, and it is -9."""
        try:
            self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            for _ in range(2):  # the second one kills
                self.launcher.terminate()
                time.sleep(1)
            self.launcher.wait()
            return -9
        finally:
            self._said = self.said()
        return self.launcher.returncode

    def finish(self) -> Run:
        assert self.code() == 0, self.text()
        assert self.launched()[-1] == self.last_lines()[0]
        return self

    def launched(self) -> list[str]:
        """What the launcher says."""
        return self._output.read_text().splitlines()

    def signal(self, index: int, number: int) -> None:
        """Sends a signal to one of the processes."""
        line = next(line for line in self.launched() if line.startswith(f"process {index} of {self.count}: "))
        os.kill(int(line.split("pid ")[1].split(",")[0]), number)

    def rows(self) -> list[str]:
        """The documents of every row in the order of the global batches."""
        parts = [Path(f"{self.rows_path}.{i}").read_text().splitlines() for i in range(self.count)]
        return [row for rows in zip(*parts, strict=False) for row in rows]

    def losses(self, name: str = "train/loss") -> np.ndarray:
        lines = map(json.loads, (self.workdir / "metrics.jsonl").read_text().splitlines())
        rows = [row for row in lines if name in row]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return np.array([row[name] for row in rows])

    def said(self) -> list[str]:
        """What each process has written in this run."""
        if self._said is not None:
            return self._said
        return [
            log.read_text()[start:] if log.exists() else ""
            for log, start in zip(self.logs, self._before, strict=True)
        ]

    def text(self) -> str:
        return "\n".join([*self.launched(), *(text[-3000:] for text in self.said())])

    def last_lines(self) -> list[str]:
        return [(text.splitlines() or [""])[-1] for text in self.said()]

    def wait_for_steps(self, number: int) -> None:
        path, end = self.workdir / "metrics.jsonl", time.monotonic() + 240
        begun = Path(f"{self.rows_path}.0")  # what an earlier run has logged too many is gone by then
        while not (begun.is_file() and path.is_file()) or path.read_text().count("\n") < number:
            assert self.launcher.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.005)


def result(run: Run) -> dict:
    return json.loads((run.workdir / "result.json").read_text())
