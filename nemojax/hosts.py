"""The processes of a run: how they meet, what the primary does for all, and how they end together."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nemojax.commands import EXIT_PREEMPTED

COORDINATOR, NUM_PROCESSES, PROCESS_ID = (
    "NEMOJAX_COORDINATOR",
    "NEMOJAX_NUM_PROCESSES",
    "NEMOJAX_PROCESS_ID",
)
START_TIMEOUT = "NEMOJAX_START_TIMEOUT"  # seconds that a process waits for the others, 300 by default
HEARTBEAT_SECONDS = 60  # a process that is silent for so long counts as dead, and the others end
SHUTDOWN_SECONDS = 60  # a process that is done waits so long for the others
FAREWELL_SECONDS = 5  # after an error the primary waits so long for others that have failed likewise


def process_arguments(env: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` by the environment; None for a run of one process.

    Several processes are: NEMOJAX_COORDINATOR=HOST:PORT with NEMOJAX_NUM_PROCESSES and NEMOJAX_PROCESS_ID
    (any machine); NEMOJAX_NUM_PROCESSES=auto alone (JAX detects the cluster), or 1 alone (none, whatever else
    is said); a Slurm step of several tasks; a TPU pod that lists its workers, or slices of it (GKE).
    ValueError for half of the variables or one that makes no sense.
    """
    given = {name: env[name] for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if env.get(name)}
    if given == {NUM_PROCESSES: "auto"}:
        return {}
    if given == {NUM_PROCESSES: "1"}:
        return None
    if given:
        return _explicit_arguments(given)
    if (tasks := env.get("SLURM_STEP_NUM_TASKS", "1")) != "1" and tasks.isdigit():
        return {"cluster_detection_method": "slurm"} | _gpus_of_a_node(env)
    many_slices = env.get("MEGASCALE_NUM_SLICES", "1") != "1"
    return {} if many_slices or "," in env.get("TPU_WORKER_HOSTNAMES", "") else None


def _gpus_of_a_node(env: Mapping[str, str]) -> dict[str, Any]:
    """All of them for the only task of a node: JAX would give a task one GPU, and so no tensor axis."""
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdigit() and re.fullmatch(r"1(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        return {"local_device_ids": list(range(int(gpus)))}
    return {}


def _explicit_arguments(given: Mapping[str, str]) -> dict[str, Any] | None:
    if missing := [name for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if name not in given]:
        raise ValueError(
            f"{' and '.join(missing)}: expected a value beside {' and '.join(given)}, got none; "
            "set all three or none of them"
        )
    host, _, port = given[COORDINATOR].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{COORDINATOR}: expected HOST:PORT of process 0, got {given[COORDINATOR]!r}")
    for name in (NUM_PROCESSES, PROCESS_ID):
        if not given[name].isdigit():
            raise ValueError(f"{name}: expected a whole number, got {given[name]!r}")
    count, index = int(given[NUM_PROCESSES]), int(given[PROCESS_ID])
    if index >= count:
        raise ValueError(f"{PROCESS_ID}: expected less than {NUM_PROCESSES} = {count}, got {index}")
    if count == 1:
        return None
    return {
        "coordinator_address": given[COORDINATOR],
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def start_processes() -> None:
    """Joins the other processes when the environment names some; call it before anything uses a device.

    Does nothing for one process, and when called again. ValueError when they cannot be reached in time.
    """
    if jax.distributed.is_initialized() or (arguments := process_arguments(os.environ)) is None:
        return
    limit = os.environ.get(START_TIMEOUT, "300")
    if not limit.isdigit() or int(limit) < 1:
        raise ValueError(f"{START_TIMEOUT}: expected a whole number of seconds, got {limit!r}")
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                **arguments,
                # JAX aborts the process at its own time limit; ours comes first and is an error
                initialization_timeout=int(limit) + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(int(limit))
    who = f"process {arguments['process_id']} of {arguments['num_processes']}" if arguments else "processes"
    where = arguments.get("coordinator_address", "the coordinator that the cluster names")
    if thread.is_alive():
        raise ValueError(
            f"{who}: expected all processes to meet at {where} within {limit} s, got no answer; start them "
            f"all, check address and port, or raise {START_TIMEOUT}"
        )
    if failures:
        raise ValueError(f"{who}: cannot start at {where} ({_line(failures[0])})") from failures[0]


def expect_one_process(name: str) -> None:
    """ValueError when the environment starts several processes of something that one alone can do."""
    if process_arguments(os.environ) is not None:
        raise ValueError(f"{name}: expected one process, got several; it does not split its work, start one")


def process_count() -> int:
    """How many have joined; asks for no device where none has."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_primary() -> bool:
    """Whether this process keeps the books (logs, configurations, small files) of a run."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def on_primary(make: Callable[[], Any]) -> Any:
    """What `make()`, called in the primary process alone, returns there: the same in every process.

    All processes must call this, and none returns before `make` has. With several the value goes through
    JSON. An error of the primary is raised there as it is, and as a ValueError in the others.
    """
    if process_count() == 1:
        return make()
    value, failure = None, None
    if is_primary():
        try:
            value = make()
        except Exception as error:
            failure = error
    told = _broadcast({"value": value, "error": None if failure is None else _line(failure)})
    if failure is not None:
        raise failure
    if told["error"] is not None:
        raise ValueError(f"process 0: {told['error']}")
    return told["value"]


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Work that several processes do together: an error in one of them ends all within seconds.

    JAX would have the process wait for the others at its exit, and abort when they do not come; they
    cannot, for they wait for this one in the middle of a step. So it leaves without them: then they fail.
    """
    try:
        yield
    except Exception as error:
        if process_count() > 1:
            lost = isinstance(error, jax.errors.JaxRuntimeError) and "Gloo" in str(error)
            atexit.register(_leave, 2 if lost or isinstance(error, ValueError | OSError) else 1)
            if lost:
                raise ValueError(
                    f"process {jax.process_index()} of {jax.process_count()}: another process has ended "
                    f"({_line(error)[:120]}); its log says why; run again to resume"
                ) from error
        raise


def _leave(code: int) -> None:
    if is_primary():  # the others lose their coordinator when it goes
        time.sleep(FAREWELL_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Preempted(SystemExit):
    """SIGTERM arrived: the state is saved; running the same command again resumes."""

    def __init__(self, step: int):
        super().__init__(EXIT_PREEMPTED)
        self.step = step


class Sigterm:
    """Remembers SIGTERM until the step is over; only the main thread can listen.

    With several processes JAX listens in each of them, and stops all at the step after the furthest one. So
    steps are numbered through a process, over all of its loops: the next one comes, whichever loop it is of.
    """

    _steps = itertools.count(1)

    def __enter__(self) -> Sigterm:
        self.received, self.old = False, None
        if process_count() > 1:
            return self
        try:
            self.old = signal.signal(signal.SIGTERM, self._receive)
        except ValueError:  # not the main thread: whoever owns it decides
            pass
        return self

    def stops_here(self) -> bool:
        """Whether to stop after this step, asked once a step; the same answer in every process."""
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        return self.received or reached_preemption_sync_point(next(self._steps))

    def _receive(self, *_: Any) -> None:
        self.received = True

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if self.old is not None:
            signal.signal(signal.SIGTERM, self.old)
            if self.received and error is None:  # after the last step: for whoever listens now
                signal.raise_signal(signal.SIGTERM)


def _broadcast(value: Any) -> Any:
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(broadcast_one_to_all(np.int32(text.size)))
    text = text if is_primary() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(broadcast_one_to_all(text)).astype(np.uint8).tobytes())


def of_all(value: Any) -> list[Any]:
    """The value of every process, in their order and in all of them, through JSON. All must call this."""
    if process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.int32(text.size)))
    room = 1 << int(sizes.max() - 1).bit_length()  # few sizes: each is a program
    texts = np.asarray(process_allgather(np.pad(text, (0, room - text.size))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
