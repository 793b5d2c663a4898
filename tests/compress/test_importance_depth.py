"""Block influence and perplexity drop against the whole model, with and without the layers."""

from __future__ import annotations

import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.compress import importance
from nemojax.compress.cuts import remove_layers
from nemojax.compress.importance import ImportanceConfig
from nemojax.model.llama import embed, hidden, init_params
from tests.compress.mixed import MIXED, TIED, mean_loss, mixed_parent
from tests.compress.tiny import batches

DATA = batches(2, seed=11)
REAL = (0, 1, 3, 4, 5)


def depth(metric, span, arch=MIXED, params=None):
    cfg = ImportanceConfig(batches=2, parts=("depth",), depth=metric, depth_span=span, chunk=8)
    return importance.measure(params or mixed_parent(arch), arch, iter(DATA), cfg).depth


@pytest.mark.parametrize("span", [1, 2, 5])
def test_influence_is_one_minus_the_mean_cosine(span):
    params, sums, tokens = mixed_parent(), {}, 0
    for batch in DATA:
        _, taps = hidden(params, MIXED, batch, taps=REAL)
        streams = [np.asarray(x) for x in (embed(params, batch["tokens"]), *(taps[i] for i in REAL))]
        real = batch["segments"] > 0
        tokens += real.sum()
        for i in range(len(REAL) - span + 1):
            x, y = streams[i][real], streams[i + span][real]
            cos = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
            sums[REAL[i]] = sums.get(REAL[i], 0.0) + (1 - cos).sum()
    got = depth("influence", span)
    assert set(got) == set(sums)
    for layer, total in sums.items():
        assert got[layer] == pytest.approx(total / tokens, rel=1e-3)


@pytest.mark.parametrize("arch, span", [(MIXED, 1), (TIED, 2)], ids=["one", "two-tied"])
def test_perplexity_drop_is_that_of_the_whole_model(arch, span):
    params = mixed_parent(arch)
    base = mean_loss(params, arch, DATA)
    got = depth("perplexity", span, arch, params)
    assert list(got) == list(REAL[: 6 - span])
    for i, layer in enumerate(got):
        child, weights = remove_layers(params, arch, REAL[i : i + span])
        assert got[layer] == pytest.approx(mean_loss(weights, child, DATA) - base, abs=1e-5)


def test_programs_do_not_grow_with_layers(caplog):
    import jax

    def compiled(num_layers):
        arch = uniform(
            vocab_size=61,
            dim=8,
            num_layers=num_layers,
            num_heads=2,
            num_kv_heads=1,
            ffn_width=16,
            context=32,
        )
        params = init_params(arch, jax.random.key(0))
        caplog.clear()
        with jax.log_compiles():
            depth("perplexity", 1, arch, params)
        return sum("Finished XLA compilation" in record.message for record in caplog.records)

    few = compiled(2)
    assert few > 0 and compiled(5) <= few


def test_spans_that_cannot_be():
    with pytest.raises(ValueError, match=r"importance\.depth_span: expected at most the 5 layers, got 6"):
        depth("influence", 6)
    with pytest.raises(ValueError, match=r"importance\.depth_span: expected 1 with depth taylor, got 2"):
        ImportanceConfig(depth="taylor", depth_span=2)
