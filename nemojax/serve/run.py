"""The life of a server: model, engine, sockets, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import uvicorn
from prometheus_client import disable_created_metrics

from nemojax.arch import ArchSpec
from nemojax.checkpoints.artifact import load_model
from nemojax.generate import programs
from nemojax.generate.engine import Engine
from nemojax.generate.jobs import Job
from nemojax.generate.local import Model, prepared
from nemojax.model.llama import Params
from nemojax.serve.app import make_app
from nemojax.serve.config import ServeConfig
from nemojax.serve.gate import Keys, make_protocol
from nemojax.serve.metrics import Metrics
from nemojax.serve.service import Service
from nemojax.serve.worker import Worker
from nemojax.sharding import make_mesh

_WARM_TOKENS = 64  # of a short question with its system text
_LAST_SECONDS = 1.0  # for connections to close, when what they were for is done


def run(
    artifact: str | Path, cfg: ServeConfig, listener: socket.socket, keys: Sequence[str], name: str
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what runs, at most `drain_seconds` long.

    Prints one line with the address to standard output when it is ready. ValueError for an artifact that
    lacks something or fields that do not fit it; RuntimeError if the engine breaks for good.
    """
    model = prepared(Model.load(artifact, cfg.compute, make_mesh(cfg.mesh)))
    if not 0 <= cfg.reward_token < model.arch.vocab_size:
        raise ValueError(
            f"reward_token: expected an id below {model.arch.vocab_size} (the vocabulary), got "
            f"{cfg.reward_token}"
        )
    draft = _load_draft(cfg, model.mesh)
    disable_created_metrics()
    metrics = Metrics()

    def make_engine() -> Engine:
        return Engine(
            model.params, model.arch, cfg.engine, compute=model.compute, mesh=model.mesh, draft=draft
        )

    worker = Worker(make_engine, cfg.engine.slots, cfg.limits.queue, metrics)
    metrics.watch(cfg.engine.slots, lambda: worker.running, lambda: max(0, worker.open - worker.running))
    service = Service(name, model, worker, metrics, cfg)
    app = make_app(service, Keys(keys))
    config = uvicorn.Config(
        app,
        http=make_protocol(cfg.limits.io_seconds),
        ws="none",
        lifespan="off",
        log_level="info" if cfg.access_log else "warning",
        access_log=cfg.access_log,
        server_header=False,
        timeout_graceful_shutdown=_LAST_SECONDS,  # pyright: ignore[reportArgumentType]
    )
    server = Server(config, service, listener)
    try:
        server.run([listener])
    finally:
        worker.stop()
    if worker.dead:
        raise RuntimeError(worker.dead)


def _load_draft(cfg: ServeConfig, mesh: jax.sharding.Mesh | None) -> tuple[Params, ArchSpec] | None:
    if cfg.draft is None:
        return None
    if cfg.engine.speculation.kind != "draft":
        raise ValueError(
            "draft: expected engine.speculation.kind to be 'draft' with it, got "
            f"{cfg.engine.speculation.kind!r}"
        )
    ready = functools.partial(programs.prepare_weight, compute=cfg.compute)
    arch, params = load_model(cfg.draft, mesh, finish=ready)
    return params, arch


class Server(uvicorn.Server):
    """Uvicorn, less its signals: on the first one, what runs is finished while new requests get 503; on the
    second one all ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service, listener: socket.socket):
        super().__init__(config)
        self._service, self._listener = service, listener
        self._drain: asyncio.Task | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Connections are taken when the model can answer."""
        service = self._service
        service.worker.on_death = self._exit
        await service.worker.start()
        if service.cfg.warm:
            await _warm(service)
        await super().startup(sockets)
        print(f"nemojax serve: {service.name} at {address(self._listener)}", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        # a handler of Python's own, for it also works while the loop is not running yet
        handle: Any = lambda *_: loop.call_soon_threadsafe(self._stop)  # noqa: E731
        old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._finish())
        else:
            self.force_exit = True
            self._exit()

    async def _finish(self) -> None:
        running = self._service.worker.open
        if running:
            print(f"nemojax serve: finishing {running} sequences", file=sys.stderr, flush=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._service.cfg.limits.drain_seconds):
                await self._service.worker.drained()
        self._exit()

    def _exit(self) -> None:
        self.should_exit = True


async def _warm(service: Service) -> None:
    """Compiles the programs of prompts of usual lengths, alone and in a full batch, before somebody waits for
    them. All others follow when there are some."""
    if service.context < 2:
        return
    engine, vocab = service.cfg.engine, service.model.arch.vocab_size
    room = min(engine.prefill_chunk, service.context - engine.decode_steps - 2)
    lengths = sorted({max(1, min(size, room)) for size in (_WARM_TOKENS, engine.prefill_chunk)})
    loads = [(num, lengths[0]) for num in engine.row_sizes]
    loads += [(num, lengths[-1]) for num in (1, engine.slots)]
    print("nemojax serve: compiling (--config.warm=False starts at once)", file=sys.stderr, flush=True)
    sampling = dataclasses.replace(service.cfg.sampling, max_new_tokens=engine.decode_steps + 2)
    for num, length in loads:
        jobs = [Job((i % vocab, *[length % vocab] * (length - 1)), sampling) for i in range(num)]
        async with service.worker.submit(jobs) as events:
            async for _ in events:
                pass


def address(listener: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
