"""Contenders measured in alternating subprocesses of one script, each in an environment of its own.

A script hands `compare` its contenders. They take turns, round by round, so that a machine that slows down
slows all of them; what is printed are medians over rounds, and medians of the ratios of neighbouring runs.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# memory in large pages, as the command line has it, for everybody
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
Numbers = dict[str, float]


@dataclass(frozen=True)
class Contender:
    """`measure(arguments)` runs in a process of its own, of `python`; `packages` are those whose versions
    are printed. `missing` says why it cannot run, then it is left out."""

    measure: Callable[[argparse.Namespace], Numbers]
    packages: Sequence[str]
    python: str = sys.executable
    missing: str = ""


def make_parser(doc: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each (default: %(default)s)")
    parser.add_argument("--only", help="measure one contender in this process, and print it as JSON")
    return parser


def compare(
    script: str,
    args: argparse.Namespace,
    contenders: Mapping[str, Contender],
    metrics: Sequence[str],
    extra: Sequence[str] = (),
) -> None:
    """Lets the contenders take turns and prints what came out; `metrics` are those that are compared with
    the first one's. `extra`: arguments for the children beside those of this process."""
    if args.only:
        if args.only not in contenders:
            raise SystemExit(f"--only: expected one of {', '.join(contenders)}, got {args.only!r}")
        one = contenders[args.only]
        numbers = one.measure(args)
        print(json.dumps({"numbers": numbers, "versions": {p: _version(p) for p in one.packages}}))
        return
    for name, one in contenders.items():
        if one.missing:
            print(f"{name}: left out, {one.missing}")
    ready = {name: one for name, one in contenders.items() if not one.missing}
    results: dict[str, list[Numbers]] = {name: [] for name in ready}
    for turn in range(args.rounds):
        for name, one in ready.items():
            answer = _child([one.python, script, *sys.argv[1:], *extra, f"--only={name}"])
            results[name].append(answer["numbers"])
            if not turn:
                versions = " ".join(f"{p} {v}" for p, v in answer["versions"].items())
                print(f"{name}: Python {answer['python']}, {versions}", flush=True)
    print(f"{os.cpu_count()} cores, {platform.machine()}; medians of {args.rounds} rounds")
    _print_results(results, metrics)


def timed(once: Callable[[], Any], repeats: int, warm_up: int = 1) -> Numbers:
    """Median wall seconds of a call, and the mean of this process's CPU seconds."""
    for _ in range(warm_up):
        once()
    walls, start_cpu = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        once()
        walls.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(walls),
        "cpu_seconds": (time.process_time() - start_cpu) / repeats,
    }


def _child(command: Sequence[str]) -> dict[str, Any]:
    env = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), *_own_path()])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"python": _python_version(command[0])}


def _own_path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def _python_version(python: str) -> str:
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "(this tree)"


def _print_results(results: Mapping[str, Sequence[Numbers]], metrics: Sequence[str]) -> None:
    names = list(results)
    rows = [("", *names)]
    for metric in results[names[0]][0]:
        medians = (statistics.median(r[metric] for r in results[n] if metric in r) for n in names)
        rows.append((metric, *(f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in medians)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)))
    for other in names[1:]:
        for metric in metrics:
            pairs = zip(results[names[0]], results[other], strict=True)
            ratios = sorted(a[metric] / b[metric] for a, b in pairs)
            middle = statistics.median(ratios)
            print(f"{metric}: {names[0]} / {other} {middle:.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]")
