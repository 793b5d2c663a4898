"""The iterative channel contribution against its formula, evaluated channel by channel."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from nemojax.compress import importance
from nemojax.compress.importance import ImportanceConfig
from nemojax.compress.iterative import removal_schedule
from nemojax.compress.subblock import layers_of
from nemojax.model.block import apply_block
from nemojax.model.llama import batch_context, embed
from tests.compress.mixed import MIXED, change, mixed_parent
from tests.compress.tiny import batches

DATA = batches(3, seed=7)


def activations(params, layer):
    """Channel activations of one layer at every real token, by batch: [tokens, F] float64."""
    blocks = dict(layers_of(params, MIXED))
    out = []
    for batch in DATA:
        h, ctx = embed(params, batch["tokens"]), batch_context(MIXED, batch)
        seen = {}
        for i in range(layer + 1):
            if i in blocks:
                h = apply_block(MIXED, MIXED.blocks[i], blocks[i], h, ctx, capture=seen)
        out.append(np.asarray(seen["act_BTF"], np.float64)[batch["segments"] > 0])
    return out, np.asarray(blocks[layer]["ffn"]["down"], np.float64)


def slow_order(acts, down, counts, scaling):
    """Channels in the order of removal; `acts` for each step."""
    gone, total = [], np.zeros(len(down))
    for act, count in zip(acts, counts, strict=True):
        full = act @ down
        left = act.copy()
        left[:, gone] = 0.0
        current = left @ down
        if scaling == "magnitude":
            full *= (np.linalg.norm(current, axis=1) / (np.linalg.norm(full, axis=1) + 1e-8))[:, None]
        for j in range(len(down)):
            without = (full - current) + act[:, j : j + 1] * down[j]
            total[j] += np.inf if j in gone else np.sqrt((without**2).sum(1) + 1e-8).mean()
        if count:
            gone += list(np.argsort(total, kind="stable")[:count])
            total = np.zeros(len(down))
    return gone


@pytest.mark.parametrize("removals, scaling", [(1, "none"), (5, "magnitude"), (20, "none")])
def test_the_order_of_removal_is_the_formulas(removals, scaling):
    """1: several channels a step; 20: more steps than channels, so that some only add up."""
    params = mixed_parent()
    cfg = ImportanceConfig("iterative", batches=3, parts=("ffn",), removals=removals, scaling=scaling)
    got = importance.measure(params, MIXED, iter(DATA), cfg)
    assert set(got.ffn) == {0, 1, 3}
    for layer in (1, 3):
        acts, down = activations(params, layer)
        counts = removal_schedule(len(down), 3 * removals)
        steps = [act for act in acts for _ in range(removals)]
        assert list(np.argsort(got.ffn[layer])) == slow_order(steps, down, counts, scaling)
        assert sorted(got.ffn[layer]) == list(range(len(down)))


def test_two_channels_that_cancel_go_together():
    """Loud alone and worthless together: once one is gone, the other's absence mends the loss."""

    def pair(tree):
        ffn = tree["layers"]["3"]["ffn"]
        for name in ("gate", "up"):
            ffn[name][:, 1] = ffn[name][:, 0]
        ffn["down"] *= 0.1
        ffn["down"][0] *= 10.0
        ffn["down"][1] = -ffn["down"][0]

    params = change(mixed_parent(), MIXED, pair)
    alone = importance.measure(params, MIXED, DATA, ImportanceConfig(batches=1, parts=("ffn",)))
    cfg = ImportanceConfig("iterative", batches=1, parts=("ffn",), removals=16)
    ranks = importance.measure(params, MIXED, DATA, cfg).ffn[3]
    assert set(np.argsort(-alone.ffn[3])[:2]) == {0, 1} and abs(ranks[0] - ranks[1]) == 1


def test_schedules():
    assert list(removal_schedule(10, 4)) == [3, 3, 2, 2]
    assert list(removal_schedule(4, 10)) == [0, 1, 0, 0, 1, 0, 1, 0, 0, 1]
    assert all(removal_schedule(f, s).sum() == f for f in (1, 7, 24) for s in (1, 5, 24, 31))
    assert list(removal_schedule(6, 6)) == [1] * 6


def test_groups_and_embedding_go_by_activation():
    cfg = ImportanceConfig("iterative", batches=1, parts=("ffn", "kv", "embed"), removals=2)
    got = importance.measure(mixed_parent(), MIXED, DATA, cfg)
    same = importance.measure(mixed_parent(), MIXED, DATA, ImportanceConfig(batches=1, parts=("kv", "embed")))
    assert all(np.array_equal(got.kv[i], same.kv[i]) for i in same.kv) and len(got.kv) == 3
    assert got.embed is not None and same.embed is not None and np.array_equal(got.embed, same.embed)


def test_layers_that_overflow_are_named():
    params = mixed_parent()
    params = jax.tree.map(np.array, params)
    params["runs"]["001"]["ffn"]["gate"][0, 0, 0] = np.nan  # layer 3
    cfg = ImportanceConfig("iterative", batches=1, parts=("ffn",))
    with pytest.raises(ValueError, match=r"^importance: layer 3: ffn: expected finite scores, got 16 of 16"):
        importance.measure(params, MIXED, DATA, cfg)
