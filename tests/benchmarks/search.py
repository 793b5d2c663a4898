"""The search of Puzzle's size: 80 layers of Llama-3.1-70B with 54 choices each, 54^80 models.

    python tests/benchmarks/search.py [--seed=0] [--repeats=3] [--only=mip]

Parameters and memory are this project's own (batch 64, 1024 + 1024 tokens, bf16); milliseconds come from a
roofline of one 8x H100 server with 3% of noise for each choice, and scores from a seeded generator: layers
differ in how sensitive they are, smaller blocks score worse, no-ops worst. Medians of wall and CPU seconds
are printed, with what was found; there are three bounds at once, shares of what the parent costs: one on
memory, and one on the runtime of each of two scenarios.

With --only=mip --repeats=5, on one of two shared cores: 0.62, 1.23 and 0.98 CPU seconds to the proven
optimum at 0.9, 0.7 and 0.5 of the parent.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nemojax.arch import Attention, BlockSpec, Linear, SwiGLU, block_params, load_arch
from nemojax.compress.baselines import METHODS, find
from nemojax.compress.cost import CostConfig, Prices, Scenario, block_costs, fixed_costs, tokens_of
from nemojax.compress.search import Infeasible, Solution, changes
from nemojax.compress.space import Space, choice_name, choices
from nemojax.compress.subblock import part_spec
from nemojax.compress.table import Table

SPACE = Space(kv_heads=(4, 2, 1), attn_linear=True, ffn_linear=True)
SITUATION = CostConfig(
    batch=64,
    context=2048,
    timings=(),
    scenarios=(Scenario("chat", 64, 128, 1024), Scenario("text", 16, 2048, 256)),
)
FLOPS, BYTES = 8 * 600e12, 8 * 2.5e12  # a second, of eight H100 as far as they are reached
HARM = {"kv8": 0.0, "kv4": 0.05, "kv2": 0.12, "kv1": 0.2, "linear": 0.45, "-": 0.6}  # of attention


def roofline(arch: Any, part: Any, sub: Any, step: Any) -> float:
    """Milliseconds of a sub-block: whichever takes longer, its arithmetic or its bytes."""
    params = block_params(arch, part_spec(part, sub))
    tokens = step.batch * step.tokens
    flops, moved = 2.0 * params * tokens, 2.0 * params
    if isinstance(sub, Attention):
        keys = step.cached + step.tokens
        flops += 4.0 * tokens * keys * arch.num_heads * arch.head_dim
        moved += 4.0 * step.batch * keys * sub.num_kv_heads * arch.head_dim
    return 1e3 * max(flops / FLOPS, moved / BYTES)


def outer(arch: Any, step: Any) -> float:
    return 1e3 * 2.0 * arch.vocab_size * arch.dim / BYTES


def harm(block: BlockSpec, width: int) -> tuple[float, float]:
    """How much worse attention and feed-forward become, before a layer's sensitivity."""
    attn = HARM[choice_name(block).split("+")[0]]
    match block.ffn:
        case SwiGLU(width=f):
            return attn, 0.9 * (1 - f / width) ** 2
        case Linear():
            return attn, 1.1
    return attn, 1.4


def make_table(seed: int) -> Table:
    """Every layer of the parent with its 54 choices."""
    rng = np.random.default_rng(seed)
    arch = load_arch("llama_3_1_70b")
    prices = Prices(roofline, outer, "roofline of eight H100")
    options = choices(SPACE, arch)
    costs = block_costs(arch, options, SITUATION, prices)
    depth = np.arange(arch.num_layers) / (arch.num_layers - 1)
    # the ends of a model matter most, and attention less and less towards its end
    attn_harm = (0.02 + 0.3 * np.exp(-8 * depth)) * rng.lognormal(0, 0.6, arch.num_layers)
    ffn_harm = (0.03 + 0.5 * np.exp(-20 * depth) + 0.2 * np.exp(20 * (depth - 1))) * rng.lognormal(
        0, 0.4, arch.num_layers
    )
    layers = []
    for i, row in enumerate(options):
        cells = []
        for block in row:
            attn, ffn = harm(block, 28672)
            score = (attn_harm[i] * attn + ffn_harm[i] * ffn) * rng.lognormal(0, 0.1)
            noise = {n: c * rng.normal(1, 0.03) if n.endswith("_ms") else c for n, c in costs[block].items()}
            cells.append({"name": choice_name(block), "score": 0.0 if block == row[0] else score, **noise})
        layers.append(tuple(cells))
    return Table(tuple(layers), fixed_costs(arch, SITUATION, prices), tokens_of(SITUATION))


def timed(call: Callable[[], list[Solution]], repeats: int) -> tuple[list[Solution], float, float]:
    """(solutions, wall seconds, CPU seconds), medians."""
    walls, cpus, found = [], [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        found = call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return found, statistics.median(walls), statistics.median(cpus)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of scores and noise (default: 0)")
    parser.add_argument("--repeats", type=int, default=3, help="searches of a kind (default: 3)")
    parser.add_argument("--only", default="", help="the search of this name alone")
    args = parser.parse_args()
    table = make_table(args.seed)
    sizes = {len(row) for row in table.layers}
    print(f"{len(table.layers)} layers, {', '.join(map(str, sizes))} choices in each")
    parent = [0] * len(table.layers)
    names = ("memory_mib", "chat_ms", "text_ms")
    kinds: list[tuple[str, dict[str, Any]]] = [(m, {"method": m}) for m in METHODS]
    kinds += [("3 apart by 20", {"num_solutions": 3, "diversity": 20}), ("runs", {"prefer_runs": 0.001})]
    kinds = [kind for kind in kinds if args.only in ("", kind[0])]
    print("share  search         wall s   CPU s    score  gap      changes  apart")
    for share, (label, options) in itertools.product((0.9, 0.7, 0.5), kinds):
        bounds = {name: share * table.total(name, parent) for name in names}
        try:
            found, wall, cpu = timed(lambda b=bounds, o=options: find(table, maximum=b, **o), args.repeats)
        except Infeasible as error:
            print(f"{share:<6} {label:<14} {error}")
            continue
        best = found[0]
        gap = "-" if best.gap is None else f"{best.gap:.1e}"
        apart = min(
            (
                sum(a != b for a, b in zip(x.chosen, y.chosen, strict=True))
                for x, y in itertools.combinations(found, 2)
            ),
            default=0,
        )
        print(
            f"{share:<6} {label:<14} {wall:6.2f} {cpu:7.2f} {best.objective:8.3f}  {gap:<8} "
            f"{changes(table, best.chosen):>6} {apart or '-':>6}"
        )


if __name__ == "__main__":
    main()
