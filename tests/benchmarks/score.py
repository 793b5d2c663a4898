"""Replace-one-block scores: prefix reuse beside a whole model for every replacement, on the same CPU.

    python tests/benchmarks/score.py [--rounds=3] [--layers=16] [--rows=4]

A parent of 16 layers, dim 256; every layer may become 12 others; KL on one batch of 4 x 128 tokens, f32.
The straightforward way is one compiled program for each replacement (its architectures differ), with the
parameters as arguments, cut at the layer beforehand, and the parent's probabilities made once beforehand.
The two take turns in one process, both compiled by a first pass, which is counted apart. `ceiling` is the
ratio of their multiplications; norms, softmax and memory are not in it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.benchmarks.alternate import Contender, Numbers, compare, make_parser

VOCAB, DIM, HEADS, KV_HEADS, FFN, LENGTH = 1024, 256, 8, 4, 768, 128


def measure(args: argparse.Namespace) -> Numbers:
    import jax
    import numpy as np

    from nemojax.arch import uniform
    from nemojax.compress.score import score
    from nemojax.model.llama import init_params

    arch = uniform(
        vocab_size=VOCAB, dim=DIM, num_layers=args.layers, num_heads=HEADS, num_kv_heads=KV_HEADS,
        ffn_width=FFN, context=LENGTH,
    )  # fmt: skip
    params = init_params(arch, jax.random.key(0))
    choices, library = make_variants(arch)
    batch = make_batch(args.rows)
    straight = Straightforward(params, arch, choices, library, batch)
    ways: dict[str, Callable[[], Any]] = {
        "reuse": lambda: score(params, arch, choices, library, [batch]),
        "straight": straight,
    }
    first = {name: seconds(way) for name, way in ways.items()}
    scores = [np.asarray(way()) for way in ways.values()]
    rounds = [{name: seconds(way) for name, way in ways.items()} for _ in range(args.rounds)]
    cpu = {name: statistics.median(r[name][0] for r in rounds) for name in ways}
    wall = {name: statistics.median(r[name][1] for r in rounds) for name in ways}
    return {
        "replacements": float(sum(len(row) - 1 for row in choices)),
        **{f"{name}_cpu_seconds": cpu[name] for name in ways},
        **{f"{name}_seconds": wall[name] for name in ways},
        **{f"{name}_compile_cpu_seconds": first[name][0] - cpu[name] for name in ways},
        "cpu_ratio": statistics.median(r["straight"][0] / r["reuse"][0] for r in rounds),
        "least_cpu_ratio": min(r["straight"][0] / r["reuse"][0] for r in rounds),
        "wall_ratio": statistics.median(r["straight"][1] / r["reuse"][1] for r in rounds),
        "ceiling": ceiling(arch, choices),
        "largest_score": float(scores[0].max()),
        "largest_difference": float(np.abs(scores[0] - scores[1]).max()),
    }


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """(CPU, wall) seconds of a call, all threads of this process together."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def make_batch(rows: int) -> dict[str, Any]:
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, LENGTH + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((rows, LENGTH), np.float32),
        "segments": np.ones((rows, LENGTH), np.int32),
        "positions": np.repeat(np.arange(LENGTH, dtype=np.int32)[None], rows, 0),
    }


def make_variants(arch: Any) -> tuple[list[list[Any]], Any]:
    """(13 choices a layer, the parent's first; a library in memory)."""
    import jax
    import numpy as np

    from nemojax.arch import Attention, BlockSpec, NoOp, SwiGLU
    from nemojax.compress.library import Library
    from nemojax.compress.subblock import Part, part_spec
    from nemojax.model.block import init_block

    attns = [Attention(4), Attention(2), Attention(1), NoOp()]
    ffns = [SwiGLU(768), SwiGLU(512), SwiGLU(256)]
    choices = [BlockSpec(a, f) for a in attns for f in ffns] + [BlockSpec(Attention(4), NoOp())]
    stored = {}
    replaced: dict[Part, list[Any]] = {"attn": attns[1:3], "ffn": ffns[1:]}
    for layer in range(arch.num_layers):
        for part, subs in replaced.items():
            for n, sub in enumerate(subs):
                key = jax.random.fold_in(jax.random.key(n), layer)
                made = init_block(arch, part_spec(part, sub), key)[part]
                stored[part, sub, layer] = jax.tree.map(np.asarray, made)

    class Stored(Library):
        def layers(self, name: str) -> tuple[int, ...]:
            return ()

        def load(self, part: Any, sub: Any, layer: int) -> dict:
            return stored.get((part, sub, layer), {})

    return [choices] * arch.num_layers, Stored("nowhere")


class Straightforward:
    """One whole forward for each replacement, each a program of its own."""

    def __init__(self, params: dict, arch: Any, choices: list, library: Any, batch: dict):
        import jax
        import jax.numpy as jnp

        from nemojax.arch import block_shapes
        from nemojax.compress.subblock import PARTS, sub_of
        from nemojax.model.llama import apply

        batch = {k: jnp.asarray(v) for k, v in batch.items()}
        teacher_BTV = jax.jit(lambda p, b: jax.nn.log_softmax(apply(p, arch, b)[0]))(params, batch)
        self.given = (batch, teacher_BTV, jnp.exp(teacher_BTV))
        outer = {name: tree for name, tree in params.items() if name != "runs"}
        [stacked] = params["runs"].values()
        self.programs: list[list[Any]] = []
        for layer, row in enumerate(choices):
            before, own, after = (
                jax.tree.map(lambda w, cut=cut: w[cut], stacked)
                for cut in (slice(layer), layer, slice(layer + 1, None))
            )
            self.programs.append([])
            for choice in row[1:]:
                parts = {p: library.load(p, sub_of(choice, p), layer) for p in PARTS}
                variant = {**own, **{p: jax.tree.map(jnp.asarray, w) for p, w in parts.items() if w}}
                variant = {part: variant[part] for part in block_shapes(arch, choice)}
                program = jax.jit(partial(whole_model, arch, choice))
                self.programs[-1].append(partial(program, outer, before, variant, after))

    def __call__(self) -> list[list[float]]:
        rows = [[run(*self.given) for run in row] for row in self.programs]
        return [[0.0, *(float(value) for value in row)] for row in rows]


def whole_model(
    arch: Any,
    choice: Any,
    outer: Any,
    before: Any,
    variant: Any,
    after: Any,
    batch: Any,
    teacher_BTV: Any,
    p_BTV: Any,
):
    """Mean KL(parent || the parent with `choice` between the layers `before` and `after`)."""
    import jax
    import jax.numpy as jnp

    from nemojax.model.block import apply_block
    from nemojax.model.llama import batch_context, embed, head

    ctx = batch_context(arch, batch)

    def own(h: Any, p: Any) -> tuple[Any, None]:
        return apply_block(arch, arch.blocks[0], p, h, ctx), None

    h_BTD = jax.lax.scan(own, embed(outer, batch["tokens"]), before)[0]
    h_BTD = apply_block(arch, choice, variant, h_BTD, ctx)
    h_BTD = jax.lax.scan(own, h_BTD, after)[0]
    logp_BTV = jax.nn.log_softmax(head(outer, arch, h_BTD))
    kl_BT = jnp.sum(p_BTV * (teacher_BTV - logp_BTV), axis=-1)
    return jnp.sum(kl_BT * batch["weights"]) / jnp.sum(batch["weights"])


def ceiling(arch: Any, choices: list) -> float:
    """Multiplications of the straightforward way over those of prefix reuse, for each token."""
    from nemojax.arch import Attention, block_shapes
    from nemojax.compress.score import TOGETHER
    from nemojax.compress.subblock import part_spec

    def cost(block: Any) -> float:
        shapes = block_shapes(arch, block)
        weights = sum(
            w[0] * w[1] * (w[2] if len(w) > 2 else 1)
            for s in shapes.values()
            for w in s.values()
            if len(w) > 1
        )
        # scores and mixing, over blocks of queries with the keys that they may see: 5/8 of all
        return weights + (2 * arch.num_heads * arch.head_dim * LENGTH * 5 / 8) * isinstance(
            block.attn, Attention
        )

    head = arch.vocab_size * arch.dim
    straight = reuse = 0.0
    for layer, row in enumerate(choices):
        own, changed = row[0], row[1:]
        rest = sum(cost(block) for i, block in enumerate(arch.blocks) if i != layer)
        straight += sum(rest + cost(choice) + head for choice in changed)
        suffix = sum(cost(block) for block in arch.blocks[layer + 1 :])
        halves = sum(cost(part_spec("attn", a)) for a in {choice.attn for choice in changed})
        halves += sum(cost(part_spec("ffn", choice.ffn)) for choice in changed)
        reuse += halves + len(changed) * (suffix + head) + -(-len(changed) // TOGETHER) * head + 2 * cost(own)
    return straight / reuse


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, default=16, help="layers of the parent (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch (default: %(default)s)")
    args = parser.parse_args()
    repeats, args.rounds = args.rounds, 1 if not args.only else args.rounds
    compare(__file__, args, {"scores": Contender(measure, ["nemojax", "jax"])}, [], [f"--rounds={repeats}"])


if __name__ == "__main__":
    main()
