"""A CPU: what runs here is checked here, and compiled programs for other machines are made here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemojax.backends.rows import Rows

KERNELS: tuple[Any, ...] = ()  # loops over blocks that stay in the cache are the best there is
LEAST = 0  # positions from which on a kernel of its own is taken
COMPILER_OPTIONS: Mapping[str, bool | str] = {}  # XLA's own choice


def refusal(kernel: str, rows: Rows) -> str | None:
    """Why a kernel cannot serve `rows`: splash runs in Pallas's interpreter (a check of it, very slow)."""
    return None if kernel == "splash" else "it is a kernel for GPUs"


def decoding_options(devices: int) -> Mapping[str, int | str]:
    """Of programs that decode, beside the others: none."""
    return {}
