"""What is chosen by machine: which kernel computes attention over packed rows, and how programs are compiled.

Each machine's file lists kernels of its own, the best first, and says which rows they cannot serve. Every
machine has `blockwise`, loops that XLA compiles anywhere, and `short` for rows whose scores are small.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax

from nemojax.backends import cpu, gpu, tpu
from nemojax.backends.rows import Rows

Kernel = Literal["short", "blockwise", "splash", "cudnn", "tokamax"]
Asked = Literal["auto", "short", "blockwise", "splash", "cudnn", "tokamax"]


def machine(platform: str) -> ModuleType:
    """The file of a platform as devices call it: its kernels and compiler options."""
    return {"gpu": gpu, "cuda": gpu, "rocm": gpu, "tpu": tpu}.get(platform, cpu)


def attention_kernel(platform: str, rows: Rows, asked: Asked = "auto", *, long: int) -> Kernel:
    """The kernel for `rows` on a platform; `long`: positions from which on `blockwise` beats `short`.

    ValueError when the one that is asked for cannot serve them.
    """
    if asked != "auto":
        if why := _refusal(platform, asked, rows):
            raise ValueError(f"attention: expected a kernel for these rows, got {asked}: {why}; choose auto")
        return asked
    own = machine(platform)
    if rows.length >= own.LEAST:
        for kernel in own.KERNELS:
            if _refusal(platform, kernel, rows) is None:
                return kernel
    return "blockwise" if rows.split or rows.length >= long else "short"


def _refusal(platform: str, kernel: Kernel, rows: Rows) -> str | None:
    """Why a kernel cannot serve these rows; None when it can."""
    if kernel == "blockwise":
        return None
    if rows.split:
        return "it takes columns in their order, and devices that share a row have another"
    return None if kernel == "short" else machine(platform).refusal(kernel, rows)


def jit(
    platform: Callable[[], str], *, decodes: bool = False, **settings: Any
) -> Callable[[Callable[..., Any]], Any]:
    """`jax.jit` with the compiler options of the machine that a program is for and of the mesh in scope, as a
    decorator.

    platform: says which, whenever it is called. decodes: of one that makes a few tokens at a time, and so
    mostly reads weights.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.cache
        def program(name: str, devices: int) -> Any:
            own = machine(name)
            options = {**own.COMPILER_OPTIONS, **(own.decoding_options(devices) if decodes else {})}
            return jax.jit(function, compiler_options=options or None, **settings)

        def here() -> Any:
            mesh = jax.sharding.get_abstract_mesh()
            return program(platform(), 1 if mesh.empty else mesh.size)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return here()(*args, **kwargs)

        call.lower = lambda *args, **kwargs: here().lower(*args, **kwargs)  # pyright: ignore
        return call

    return decorate
