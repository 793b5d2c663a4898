"""How far a GPU's kernels are from plain formulas in f32: norm of the difference over the formula's.

Rounding to bf16 leaves some 0.003, to e4m3 some 0.04; a wrong mask or a wrong place, 0.1 and more. Attention
over packed rows and over one document is compared with its gradients, over a cache for each of its dtypes.
Each distance is told as soon as it is known, on standard error.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any


def distances(arch: Any, length: int) -> dict[str, Any]:
    """Of every kernel, for heads as `arch` has them and rows of `length` positions; or an "error"."""
    cases = {**packed(arch, length), **cached(arch), **products(arch)}
    found = {}
    with ThreadPoolExecutor() as pool:  # nearly all of the time goes into compiling
        running = {pool.submit(measured, *case): name for name, case in cases.items()}
        for done in as_completed(running):
            found[running[done]] = done.result()
            print(f"{running[done]}: {done.result()}", file=sys.stderr, flush=True)
    return {name: found[name] for name in cases}


def measured(function: Callable[..., Any], formula: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
    import jax
    import jax.numpy as jnp

    def distance(got: Any, exact: Any) -> float:
        got, exact = (jnp.ravel(x.astype(jnp.float32)) for x in (got, exact))
        return float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact))

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    try:
        found, exact = jax.jit(function)(*arrays), jax.jit(formula)(*wide)
    except Exception as error:  # the others are of use without it
        return {"error": " ".join(str(error).split())[:160]}
    return max(map(distance, jax.tree.leaves(found), jax.tree.leaves(exact)))


def random(seed: int, *shape: int) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def packed(arch: Any, length: int, rows: int = 4) -> dict[str, Any]:
    """Three documents of uneven lengths and padding in each row, or one document; forwards and backwards."""
    import jax
    import jax.numpy as jnp

    from nemojax.arch import Attention
    from nemojax.model.attention import attend_packed, make_context

    kv_heads = arch.blocks[0].attn.num_kv_heads
    ends = jnp.array([0, length // 3, length // 3 + 7, length - 5])
    segments = jnp.tile(jnp.searchsorted(ends, jnp.arange(length), side="right"), (rows, 1))
    segments = segments.at[:, -5:].set(0)
    shapes = [(rows, length, n, arch.head_dim) for n in (arch.num_heads, kv_heads, kv_heads, arch.num_heads)]
    q, k, v, d = (random(i, *shape) for i, shape in enumerate(shapes))
    d *= (segments > 0)[..., None, None]  # what padding gets is of no use

    def both(q: Any, k: Any, v: Any, d: Any, *, kernel: Any, window: int | None) -> Any:
        positions = jnp.tile(jnp.arange(length), (rows, 1))
        ctx = make_context(arch, positions, None if kernel[0] == "cudnn" else segments, kernel[-1])
        attend = functools.partial(attend_packed, ctx=ctx, spec=Attention(kv_heads, window))
        out, vjp = jax.vjp(attend, q, k, v)
        return out * (d != 0), vjp(d)

    return {
        f"{name}, window {window}": (
            functools.partial(both, kernel=(name,), window=window),
            functools.partial(both, kernel=(name, "short"), window=window),
            (q, k, v, d),
        )
        for name, window in (("tokamax", None), ("tokamax", length // 4), ("cudnn", None))
    }


def cached(arch: Any, capacity: int = 512, slots: int = 6) -> dict[str, Any]:
    """One token, a few, and a piece of a prompt in each of three rows, out of order, over the second layer of
    a cache that is full everywhere."""
    import jax.numpy as jnp

    from nemojax.arch import Attention
    from nemojax.backends.cached import attend_slots
    from nemojax.model.attention import attend_read, make_context
    from nemojax.model.cache import View, Window, init_cache, write

    kv_heads, rows_B = arch.blocks[0].attn.num_kv_heads, jnp.array([4, 0, 3])
    cases: dict[str, Any] = {}
    for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
        [cache] = init_cache(arch, slots, capacity, jnp.dtype(dtype)).values()
        everywhere = jnp.tile(jnp.arange(capacity), (slots, 1))
        for layer in (0, 1):
            shape = (slots, capacity, kv_heads, arch.head_dim)
            new = {name: random(10 * layer + i, *shape) for i, name in enumerate("kv")}
            cache = write(cache, new, jnp.arange(slots), everywhere, jnp.int32(layer))
        view = View(cache, Window({}, capacity, rows_B), jnp.int32(1))
        for tokens, window in ((1, None), (4, 100), (64, None)):
            positions = jnp.array([[0], [300], [capacity - tokens]]) + jnp.arange(tokens)

            def kernel(q: Any, view: Any = view, positions: Any = positions, window: Any = window) -> Any:
                return attend_slots(q, positions, view.slots(3), keys=capacity, window=window)

            def formula(q: Any, view: Any = view, positions: Any = positions, window: Any = window) -> Any:
                ctx, (keys, values) = make_context(arch, positions), view.read(3, q.dtype)
                return attend_read(q, keys, values, ctx, Attention(kv_heads, window))

            name = f"cache of {dtype}, {tokens} tokens, window {window}"
            cases[name] = kernel, formula, (random(7, 3, tokens, arch.num_heads, arch.head_dim),)
    return cases


def products(arch: Any) -> dict[str, Any]:
    from nemojax.backends.matmul import matmul

    def product(x: Any, w: Any, kind: Any = "default") -> Any:
        return matmul("TD,DF->TF", x, w, kind=kind)

    return {
        f"product of {tokens} tokens, {kind}": (
            functools.partial(product, kind=kind),
            product,
            (random(1, tokens, arch.dim), random(2, arch.dim, 1024)),
        )
        for tokens in (1, 64)
        for kind in ("default", "fp8")
    }
