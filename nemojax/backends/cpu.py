"""A CPU: what runs here is checked here, and compiled programs for other machines are made here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemojax.backends.rows import Rows

KERNELS: tuple[Any, ...] = ()  # loops over blocks that stay in the cache are the best there is
COMPILER_OPTIONS: Mapping[str, bool | str] = {}  # XLA's own choice
# glibc gives memory in large pages: XLA takes its temporaries anew for every step, and page faults cost a
# sixth of one. The command line sets it; whoever calls the library sets it before Python starts.
ENVIRONMENT: Mapping[str, str] = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def refusal(kernel: str, rows: Rows) -> str | None:
    """Why a kernel cannot serve `rows`: splash runs in Pallas's interpreter (a check of it, very slow)."""
    return None if kernel == "splash" else "it is a kernel for GPUs"
