"""Taylor importance and magnitude against gradients and sums written out by hand."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from nemojax.compress import importance
from nemojax.compress.importance import ImportanceConfig
from nemojax.model.layout import unstack
from tests.compress.mixed import MIXED, TIED, change, loss_sum, mean_loss, mixed_parent
from tests.compress.tiny import batches

PARTS = ("ffn", "kv", "embed", "depth")
DATA = batches(2, seed=3)
gradient = jax.jit(jax.grad(loss_sum), static_argnums=1)


def by_hand(values: dict, arch, layer: int) -> dict[str, Any]:
    """Sums of one value a weight over the structures of a layer with attention and SwiGLU."""
    block = values["layers"][str(layer)]
    attn, ffn = block["attn"], block["ffn"]
    groups = arch.blocks[layer].attn.num_kv_heads
    size = arch.num_heads // groups
    kv = []
    for g in range(groups):
        heads = slice(g * size, (g + 1) * size)
        parts = (attn["q"][:, heads], attn["o"][heads], attn["k"][:, g], attn["v"][:, g])
        kv.append(sum(float(w.sum()) for w in parts))
    return {
        "ffn": ffn["gate"].sum(0) + ffn["up"].sum(0) + ffn["down"].sum(1),
        "kv": np.array(kv),
        "depth": sum(w.sum() for sub in block.values() for w in sub.values()),
    }


def embed_by_hand(values: dict, dim: int) -> np.ndarray:
    """Each channel's sum: every entry with index i along the stream, once."""
    total = np.zeros(dim)
    for i in range(dim):
        total[i] = values["embed"]["weight"][:, i].sum() + values["norm"]["scale"][i]
        if "head" in values:
            total[i] += values["head"]["weight"][:, i].sum()
        for block in values["layers"].values():
            for sub in block.values():
                for name, w in sub.items():
                    if name == "linear":
                        total[i] += w[i].sum() + w[:, i].sum() - w[i, i]
                    else:
                        total[i] += (w[..., i] if name in ("o", "down") else w[i]).sum()
    return total


def on_host(params: dict, arch) -> dict:
    return jax.tree.map(lambda w: np.asarray(w, np.float64), unstack(jax.device_get(params), arch))


@pytest.mark.parametrize("arch", [MIXED, TIED], ids=["untied", "tied"])
def test_first_order_is_the_sum_of_weight_times_gradient(arch):
    params = mixed_parent(arch)
    cfg = ImportanceConfig("taylor", batches=2, parts=PARTS, depth="taylor")
    got = importance.measure(params, arch, iter(DATA), cfg)
    weight = sum(b["weights"].sum() for b in DATA)
    grads = jax.tree.map(lambda *g: sum(g), *(gradient(params, arch, b) for b in DATA))
    values = jax.tree.map(lambda w, g: np.abs(w * g / weight), on_host(params, arch), on_host(grads, arch))
    for layer in (0, 1, 3):
        want = by_hand(values, arch, layer)
        np.testing.assert_allclose(got.ffn[layer], want["ffn"], rtol=1e-3)
        np.testing.assert_allclose(got.kv[layer], want["kv"], rtol=1e-3)
        assert got.depth[layer] == pytest.approx(want["depth"], rel=1e-3)
    assert got.embed is not None
    np.testing.assert_allclose(got.embed, embed_by_hand(values, arch.dim), rtol=1e-3)
    assert set(got.ffn) == set(got.kv) == {0, 1, 3} and set(got.depth) == {0, 1, 3, 4, 5}


def test_second_order_has_the_fisher_of_the_rows():
    params, data = mixed_parent(), [dict(batch) for batch in DATA]
    data[1]["weights"] = data[1]["weights"] * np.array(
        [[1], [0], [1], [1]], np.float32
    )  # a row of no targets
    cfg = ImportanceConfig("taylor", batches=2, order=2)
    got = importance.measure(params, MIXED, data, cfg)
    grads, squares, rows, weight = 0.0, 0.0, 0, 0.0
    w = on_host(params, MIXED)
    for batch in data:
        for r in range(4):
            row = {k: v[r : r + 1] for k, v in batch.items()}
            count = row["weights"].sum()
            if count:
                g = on_host(gradient(params, MIXED, row), MIXED)
                grads = g if rows == 0 else jax.tree.map(np.add, grads, g)
                square = jax.tree.map(lambda x, n=count: np.square(x / n), g)
                squares = square if rows == 0 else jax.tree.map(np.add, squares, square)
                rows, weight = rows + 1, weight + count
    assert rows == 7
    values = jax.tree.map(lambda w, g, s: np.abs(w * g / weight - 0.5 * w * w * s / rows), w, grads, squares)
    for layer in (0, 3):
        want = by_hand(values, MIXED, layer)
        np.testing.assert_allclose(got.ffn[layer], want["ffn"], rtol=1e-3)
        np.testing.assert_allclose(got.kv[layer], want["kv"], rtol=1e-3)
    first = importance.measure(params, MIXED, data, ImportanceConfig("taylor", batches=2))
    assert not np.allclose(first.ffn[0], got.ffn[0], rtol=1e-2)


def test_first_order_predicts_the_loss_when_a_quiet_structure_falls_silent():
    """The sum over outputs, on weights so small that a tangent serves."""

    def quieten(tree):
        for block in tree["layers"].values():
            for sub, name in (("ffn", "down"), ("attn", "o")):
                if name in block.get(sub, {}):
                    block[sub][name] *= 0.0005

    params = change(mixed_parent(), MIXED, quieten)
    cfg = ImportanceConfig(
        "taylor", batches=2, parts=("ffn", "kv", "depth"), depth="taylor", taylor_sum="outputs"
    )
    got = importance.measure(params, MIXED, DATA, cfg)
    base = mean_loss(params, MIXED, DATA)

    def silence(layer, *cuts):
        def edit(tree):
            for sub, name, index in cuts:
                tree["layers"][str(layer)][sub][name][index] = 0.0

        return abs(mean_loss(change(params, MIXED, edit), MIXED, DATA) - base)

    checks = []
    for layer in (0, 3):
        j, g = int(np.argmax(got.ffn[layer])), int(np.argmax(got.kv[layer]))
        size = MIXED.num_heads // len(got.kv[layer])
        checks += [
            (got.ffn[layer][j], silence(layer, ("ffn", "down", j))),
            (got.kv[layer][g], silence(layer, ("attn", "o", slice(g * size, (g + 1) * size)))),
            (got.depth[layer], silence(layer, ("ffn", "down", ...), ("attn", "o", ...))),
        ]
    predicted, real = map(np.array, zip(*checks, strict=True))
    assert real.min() > 1e-5
    np.testing.assert_allclose(predicted, real, rtol=0.05)


@pytest.mark.parametrize("arch", [MIXED, TIED], ids=["untied", "tied"])
def test_magnitude_is_the_norm_of_each_structure(arch):
    params = mixed_parent(arch)
    cfg = ImportanceConfig("magnitude", parts=PARTS, depth="magnitude")
    got = importance.measure(params, arch, iter([]), cfg)  # reads no data
    squares = jax.tree.map(np.square, on_host(params, arch))
    for layer in (0, 3):
        want = by_hand(squares, arch, layer)
        np.testing.assert_allclose(got.ffn[layer], np.sqrt(want["ffn"]), rtol=1e-5)
        np.testing.assert_allclose(got.kv[layer], np.sqrt(want["kv"]), rtol=1e-5)
        assert got.depth[layer] == pytest.approx(np.sqrt(want["depth"]), rel=1e-5)
    assert got.embed is not None
    np.testing.assert_allclose(got.embed, np.sqrt(embed_by_hand(squares, arch.dim)), rtol=1e-5)


def test_data_without_targets_are_refused():
    data = [{**DATA[0], "weights": np.zeros_like(DATA[0]["weights"])}]
    with pytest.raises(ValueError, match="importance: expected calibration data with target tokens"):
        importance.measure(mixed_parent(), MIXED, data, ImportanceConfig("taylor", batches=1))
