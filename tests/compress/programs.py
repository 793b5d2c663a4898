"""How many programs a call needs."""

from collections.abc import Callable
from typing import Any

import jax


def compiled(call: Callable[[], Any]) -> int:
    """Programs that XLA compiles during a call."""
    count = 0

    def listen(event: str, *_: Any, **__: Any) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count
