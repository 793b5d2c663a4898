"""Prices without the chip: how well they rank what a stopwatch measures, and what they change in a search.

    python tests/benchmarks/prices.py                              # roofline:cpu against the stopwatch
    NEMOJAX_LIBTPU=DIR python tests/benchmarks/prices.py --compiled=v5e      # its compiler, and roofline:v5e
    python tests/benchmarks/prices.py --table=TABLE.json --arch=ARCH.json --plot=chips.svg

The first two price the sub-blocks that a layer may become, at several shapes of requests, and print the
rank correlation (Spearman). The third takes a table with scores (of `nemojax compress`, or a study), prices
its choices for each of `--chips`, and searches the child within `--ratio` of the parent's time there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from nemojax.arch import ArchSpec, Attention, BlockSpec, Linear, NoOp, SwiGLU, load_arch, uniform
from nemojax.compress.cost import CostConfig, Scenario, Step, block_costs, fixed_costs, tokens_of
from nemojax.compress.prices import prices_of
from nemojax.compress.search import solve
from nemojax.compress.table import Table, load_table

DIM, FFN, HEADS = 512, 1408, 8
ARCH = uniform(
    vocab_size=4096, dim=DIM, num_layers=1, num_heads=HEADS, num_kv_heads=HEADS, ffn_width=FFN, context=4096
)
SUBS = [
    *(("attn", Attention(k)) for k in (8, 4, 2, 1)),
    ("attn", Linear()),
    *(("ffn", SwiGLU(FFN * n // 8)) for n in (8, 6, 4, 2, 1)),
    ("ffn", Linear()),
]
STEPS = [Step(4, 256), Step(16, 128), Step(1, 1024), Step(16, 1, 1023), Step(64, 1, 255), Step(1, 1, 2047)]


def priced(source: str, dtype: str) -> np.ndarray:
    """Milliseconds of every sub-block in every step."""
    prices = prices_of(source, dtype, 15)
    table: Any = [[prices.sub_ms(ARCH, part, sub, step) for step in STEPS] for part, sub in SUBS]
    return np.array(table)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = np.stack([np.argsort(np.argsort(x.ravel())) for x in (a, b)])
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def compare(one: str, other: str, dtype: str) -> None:
    a, b = priced(one, dtype), priced(other, dtype)
    print(f"{one} against {other}, {dtype}, {a.size} prices")
    print(f"  rank correlation of all     {spearman(a, b):.3f}")
    for i, step in enumerate(STEPS):
        kind = f"decode behind {step.cached}" if step.cached else f"prefill of {step.tokens}"
        ratio = float(np.median(b[:, i] / a[:, i]))
        print(f"  batch {step.batch:>2}, {kind:<20}{spearman(a[:, i], b[:, i]):>7.3f}   ratio {ratio:.2f}")


def searched(args: argparse.Namespace) -> None:
    from nemojax.plots import block_map, standalone

    table, arch = load_table(args.table), load_arch(args.arch)
    batch, tokens, new = (int(n) for n in args.scenario.split(","))
    scenario = Scenario("served", batch=batch, input=tokens, output=new)
    found = {"parent": arch}
    for chip in args.chips.split(","):
        config = CostConfig(
            timings=(), timing_dtype="bfloat16", scenarios=(scenario,), prices=f"roofline:{chip}"
        )
        repriced = with_times(table, arch, config)
        most = args.ratio * repriced.total("served_ms", [0] * len(table.layers))
        [solution] = solve(repriced, minimize=args.minimize, maximum={"served_ms": most})
        names = solution.names(repriced)
        blocks = tuple(block_of(arch.blocks[i], name) for i, name in enumerate(names))
        found[chip] = arch.replace(blocks=blocks)
        print(f"{chip:<6}{args.minimize} {solution.objective:.4f}  {' '.join(names)}")
    if args.plot:
        title = f"{batch} requests, {tokens} tokens in, {new} out, in {args.ratio:.0%} of the parent's time"
        Path(args.plot).write_text(standalone(block_map(found, title=title)))


def with_times(table: Table, arch: ArchSpec, config: CostConfig) -> Table:
    """The table with its choices priced as the configuration says."""
    options = [[block_of(arch.blocks[i], name) for name in row] for i, row in enumerate(table.names())]
    costs = block_costs(arch, options, config)
    layers = tuple(
        tuple({**choice, **costs[block]} for choice, block in zip(row, blocks, strict=True))
        for row, blocks in zip(table.layers, options, strict=True)
    )
    return Table(layers, fixed_costs(arch, config), tokens_of(config))


def block_of(parent: BlockSpec, name: str) -> BlockSpec:
    """`kv2+ffn256`, `-+linear`: a choice's name as the block that it is."""
    attn, ffn = name.split("+")

    def sub(word: str) -> Any:
        if word in ("-", "linear"):
            return NoOp() if word == "-" else Linear()
        return Attention(int(word[2:])) if word.startswith("kv") else SwiGLU(int(word[3:]))

    return BlockSpec(sub(attn), sub(ffn))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--compiled", default="", help="a TPU whose compiler is asked instead of the stopwatch"
    )
    parser.add_argument("--table", default="")
    parser.add_argument("--arch", default="")
    parser.add_argument("--chips", default="v5e,v6e,h100")
    parser.add_argument("--scenario", default="256,512,512", help="requests, tokens in, tokens out")
    parser.add_argument("--ratio", type=float, default=0.6, help="of the parent's time")
    parser.add_argument("--minimize", default="kl")
    parser.add_argument("--plot", default="")
    args = parser.parse_args()
    if args.table:
        searched(args)
    elif args.compiled:
        compare(f"roofline:{args.compiled}", f"compiled:{args.compiled}", "bfloat16")
    else:
        compare("roofline:cpu", "measured", "float32")


if __name__ == "__main__":
    main()
