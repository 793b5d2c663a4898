"""Attention over long rows: in pairs of blocks beside whole rows of scores, and the work of each device.

    python tests/benchmarks/context.py [--lengths=256,512,1024,4096,16384] [--whole-up-to=4096] [--batch=4096]

Forward and backward pass of one layer (8 query heads, 4 KV heads, 32 channels each, f32) over --batch tokens
in rows of one document: the median of --rounds in wall and CPU milliseconds, and the temporaries that the
program was compiled to need. `quarters` is the attention of short rows. Below it the pairs of blocks that
each of n devices visits when it has chunks i and 2n - 1 - i of a row, and when it has a contiguous part.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

HEADS, KV_HEADS, DIM = 8, 4, 32


def measure(attend: Callable, rows: int, length: int, rounds: int) -> str:
    import jax

    shapes = [(rows, length, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]

    def both(q: Any, k: Any, v: Any, d: Any) -> Any:
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(d)

    program = jax.jit(both).lower(*arrays).compile()
    jax.block_until_ready(program(*arrays))
    times = []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(program(*arrays))
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = (1e3 * statistics.median(t[i] for t in times) for i in (0, 1))
    memory = program.memory_analysis()
    mebibytes = memory.temp_size_in_bytes / 2**20 if memory else float("nan")
    return f"{wall:8.0f} ms {cpu:8.0f} CPU ms {mebibytes:7.0f} MiB"


def compare(args: argparse.Namespace) -> None:
    import jax.numpy as jnp

    from nemojax.arch import Attention, uniform
    from nemojax.model.attention import attend_short, make_context, tiles
    from nemojax.model.blockwise import Places, attend_blockwise, block_size

    for length in args.lengths:
        rows = max(1, args.batch // length)
        arch = uniform(
            vocab_size=8,
            dim=HEADS * DIM,
            num_layers=1,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            ffn_width=8,
            context=length,
        )
        at = Places(jnp.ones((rows, length), jnp.int32), jnp.tile(jnp.arange(length), (rows, 1)))
        ctx = make_context(arch, at.positions, at.segments)
        print(f"{rows:3} x {length:5}", flush=True)
        if length <= args.whole_up_to:
            quarters = lambda q, k, v, c=ctx: attend_short(q, k, v, c, Attention(KV_HEADS))  # noqa: E731
            print(f"    quarters    {measure(quarters, rows, length, args.rounds)}", flush=True)
        for block in args.blocks or [tiles().block]:
            if block <= length:
                size = block_size(length, block)
                pairs = lambda q, k, v, a=at, b=size: attend_blockwise(q, k, v, a, a, block=b)  # noqa: E731
                print(f"    blocks {size:4} {measure(pairs, rows, length, args.rounds)}", flush=True)


def balance(length: int, block: int) -> None:
    import jax.numpy as jnp
    import numpy as np

    from nemojax.model.blockwise import Places, visible
    from nemojax.sharding import column_order

    print(f"pairs of blocks of {block} that a device visits, least and most, one row of {length}")
    for ways in (2, 4, 8):
        line = f"    {ways} devices"
        for name, order in (("two chunks", column_order(length, ways)), ("contiguous", np.arange(length))):
            at = Places(jnp.ones((length // block, block), jnp.int32), jnp.asarray(order.reshape(-1, block)))
            work = visible(at, at, 1, None)[0].reshape(ways, -1).sum(1)
            line += f"   {name} {int(work.min())} to {int(work.max())}"
        print(line)


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=numbers, default=[256, 512, 1024, 4096, 16384], help="of rows")
    parser.add_argument(
        "--whole-up-to", type=int, default=4096, help="longest row for the short rows' attention"
    )
    parser.add_argument("--batch", type=int, default=4096, help="tokens of a batch; at least one row")
    parser.add_argument("--blocks", type=numbers, help="sizes to try instead of this machine's")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    compare(args)
    balance(max(args.lengths), 128)


if __name__ == "__main__":
    main()
