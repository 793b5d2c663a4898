"""The choices, their first weights, and importance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import Attention, BlockSpec, Linear, NoOp, SwiGLU
from nemojax.compress import importance
from nemojax.compress.importance import Importance
from nemojax.compress.pattern import layers_in
from nemojax.compress.space import Space, choice_name, choices, init_sub
from nemojax.compress.subblock import PARTS, apply_part, layers_of, sub_of
from nemojax.model.attention import make_context
from tests.compress.tiny import ARCH, SPACE, batches, parent

FULL = ARCH.blocks[0]


def some_importance(seed: int = 0) -> Importance:
    rng = np.random.default_rng(seed)
    return Importance({i: rng.random(48) for i in range(3)}, {i: rng.random(2) for i in range(3)})


def test_choices_begin_with_the_parent():
    per_layer = choices(SPACE, ARCH)
    assert len(per_layer) == 3 and all(len(set(c)) == len(c) == 16 and c[0] == FULL for c in per_layer)
    assert BlockSpec(NoOp(), NoOp()) in per_layer[0] and BlockSpec(Attention(1), SwiGLU(24)) in per_layer[0]


def test_widths_are_rounded_and_never_repeat():
    space = Space(ffn_ratios=(0.9, 0.6, 0.5, 0.01), multiple=16)
    widths = {c.ffn.width for c in choices(space, ARCH)[0] if isinstance(c.ffn, SwiGLU)}
    assert widths == {48, 32, 16}


def test_bad_spaces():
    with pytest.raises(ValueError, match="kv_heads: expected positive numbers of KV heads, got 0"):
        Space(kv_heads=(0,))
    with pytest.raises(ValueError, match="ffn_ratios: expected fractions between 0 and 1, got 1.5"):
        Space(ffn_ratios=(1.5,))
    with pytest.raises(ValueError, match="multiple: expected a positive number of channels, got 0"):
        Space(multiple=0)
    with pytest.raises(
        ValueError, match="expected one that leaves a width below the parent's 48 channels, got 256"
    ):
        choices(Space(), ARCH)
    six = ARCH.replace(num_heads=6, blocks=(BlockSpec(Attention(6), SwiGLU(48)),) * 2)
    with pytest.raises(
        ValueError, match="kv_heads: expected a divisor of the 6 KV heads of some layer, got 4"
    ):
        choices(Space(kv_heads=(4, 2), multiple=8), six)
    with pytest.raises(ValueError, match="layers '3': expected ascending layers of 0-2, got '3'"):
        choices(Space(multiple=8, attn_layers="3"), ARCH)
    with pytest.raises(ValueError, match="rule 'all:kv9.': expected a glob of choice names, got no match"):
        choices(Space(multiple=8, exclude=("all:kv9*",)), ARCH)


MIXED = ARCH.replace(
    num_heads=8,
    blocks=(
        BlockSpec(Attention(8), SwiGLU(48)),
        BlockSpec(Attention(4, 16), SwiGLU(16)),
        BlockSpec(Linear(), SwiGLU(24)),
        BlockSpec(NoOp(), Linear()),
        BlockSpec(NoOp(), NoOp()),
        BlockSpec(Attention(1), SwiGLU(8)),
    ),
)


def test_a_child_is_a_parent_again():
    """Every layer becomes only what it can: what does not suit a narrow one still serves a wide one."""
    space = Space(kv_heads=(16, 8, 4, 2), attn_linear=True, ffn_ratios=(0.5,), ffn_linear=True, multiple=8)
    names = [[choice_name(block) for block in row] for row in choices(space, MIXED)]
    attns = [list(dict.fromkeys(name.split("+")[0] for name in row)) for row in names]
    ffns = [list(dict.fromkeys(name.split("+")[1] for name in row)) for row in names]
    assert attns == [
        ["kv8", "kv4", "kv2", "linear", "-"],
        ["kv4/w16", "kv2/w16", "linear", "-"],
        ["linear", "-"],
        ["-"],
        ["-"],
        ["kv1", "linear", "-"],
    ]
    assert ffns == [
        ["ffn48", "ffn24", "linear", "-"],
        ["ffn16", "ffn8", "linear", "-"],
        ["ffn24", "ffn16", "linear", "-"],
        ["linear", "-"],
        ["-"],
        ["ffn8", "linear", "-"],
    ]
    assert [row[0] for row in choices(space, MIXED)] == list(MIXED.blocks)
    three = MIXED.replace(num_heads=24, blocks=(BlockSpec(Attention(6), SwiGLU(48)), *MIXED.blocks))
    kept = [
        {c.attn.num_kv_heads for c in row if isinstance(c.attn, Attention)}
        for row in choices(Space(kv_heads=(3, 4), multiple=8), three)
    ]
    assert kept[:3] == [{6, 3}, {8, 4}, {4}]
    with pytest.raises(ValueError, match="expected a divisor of the 6 or 8 KV heads of some layer, got 5"):
        choices(Space(kv_heads=(5,), multiple=8), three)


def test_layers_by_pattern():
    space = Space(kv_heads=(1,), ffn_ratios=(0.5,), multiple=8, attn_layers="1-", ffn_layers="0,2")
    rows = [{choice_name(block) for block in row} for row in choices(space, ARCH)]
    assert rows[0] == {"kv2+ffn48", "kv2+ffn24", "kv2+-"}
    assert rows[1] == {"kv2+ffn48", "kv1+ffn48", "-+ffn48"}
    assert len(rows[2]) == 9
    none = choices(Space(kv_heads=(1,), multiple=256, attn_layers="none", ffn_layers="none"), ARCH)
    assert none == tuple((block,) for block in ARCH.blocks)
    space = Space(kv_heads=(1,), ffn_ratios=(0.5,), multiple=8, exclude=("0:-+*", "0-1:*+-", "-2:kv2+ffn48"))
    rows = [[choice_name(block) for block in row] for row in choices(space, ARCH)]
    assert rows[0] == ["kv2+ffn48", "kv2+ffn24", "kv1+ffn48", "kv1+ffn24"]  # the parent's own stays
    assert len(rows[1]) == 6 and len(rows[2]) == 9


@pytest.mark.parametrize(
    "pattern, layers",
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("none", ()),
        ("3", (3,)),
        ("1-3", (1, 2, 3)),
        ("0, 2, 4-", (0, 2, 4, 5)),
        ("-2", (0, 1, 2)),
        ("4-5,0-1,1", (0, 1, 4, 5)),
        ("5 - 5", (5,)),
    ],
)
def test_patterns(pattern, layers):
    assert layers_in(pattern, 6) == layers


@pytest.mark.parametrize("pattern", ["", "-", "6", "2-6", "4-2", "a", "1,,2", "1-2-3", "--1", "1.5"])
def test_bad_patterns(pattern):
    with pytest.raises(ValueError, match="expected all, none, or a list|expected ascending layers of 0-5"):
        layers_in(pattern, 6)


def test_full_size_is_the_parent_bitwise():
    for layer, p in layers_of(parent(), ARCH):
        for part in PARTS:
            sub = sub_of(FULL, part)
            got = init_sub(part, sub, sub, p[part], some_importance(), layer)
            assert all(np.array_equal(got[k], p[part][k]) for k in p[part])


def test_dropping_channels_that_say_nothing_changes_nothing():
    layer, p = next(layers_of(parent(), ARCH))
    alive = np.arange(48) % 2 == 0
    ffn = {**p["ffn"], "down": np.where(alive[:, None], p["ffn"]["down"], 0)}
    scores = Importance({0: alive.astype(float)}, {})
    child = init_sub("ffn", SwiGLU(48), SwiGLU(24), ffn, scores, layer)
    h, ctx = stream()
    np.testing.assert_allclose(
        apply_part(ARCH, "ffn", SwiGLU(24), child, h, ctx),
        apply_part(ARCH, "ffn", SwiGLU(48), ffn, h, ctx),
        atol=1e-5,
    )


def test_mean_pooling_equal_heads_is_exact():
    layer, p = next(layers_of(parent(), ARCH))
    attn = {**p["attn"], **{w: np.repeat(p["attn"][w][:, :1], 2, axis=1) for w in ("k", "v")}}
    h, ctx = stream()
    want = apply_part(ARCH, "attn", Attention(2), attn, h, ctx)
    for kv_init in ("mean", "first"):
        child = init_sub("attn", Attention(2), Attention(1), attn, some_importance(), layer, kv_init)
        np.testing.assert_allclose(apply_part(ARCH, "attn", Attention(1), child, h, ctx), want, atol=1e-5)


def test_pruning_keeps_what_the_kept_group_says():
    layer, p = next(layers_of(parent(), ARCH))
    child = init_sub(
        "attn",
        Attention(2),
        Attention(1),
        p["attn"],
        Importance({}, {0: np.array([0.0, 1.0])}),
        layer,
        "prune",
    )
    silent = {**p["attn"], "o": np.concatenate([np.zeros((2, 8, 32)), p["attn"]["o"][2:]]).astype(np.float32)}
    h, ctx = stream()
    np.testing.assert_allclose(
        apply_part(ARCH, "attn", Attention(1), child, h, ctx),
        apply_part(ARCH, "attn", Attention(2), silent, h, ctx),
        atol=1e-5,
    )


def test_linear_attention_is_exact_for_one_token():
    layer, p = next(layers_of(parent(), ARCH))
    child = init_sub("attn", Attention(2), Linear(), p["attn"], some_importance(), layer)
    h, ctx = stream(length=1)
    np.testing.assert_allclose(
        apply_part(ARCH, "attn", Linear(), child, h, ctx),
        apply_part(ARCH, "attn", Attention(2), p["attn"], h, ctx),
        atol=1e-4,
    )


def test_activation_importance_is_the_formula():
    params, data = parent(), batches(2)
    got = importance.measure(params, ARCH, data)
    sums, norms, tokens = np.zeros(48), np.zeros(2), 0
    layer, p = next(layers_of(params, ARCH))
    for batch in data:
        ctx = make_context(ARCH, jnp.asarray(batch["positions"]), jnp.asarray(batch["segments"]))
        h = jnp.asarray(params["embed"]["weight"])[batch["tokens"]]
        real = batch["segments"] > 0
        for g in range(2):
            o = np.where((np.arange(4) // 2 == g)[:, None, None], p["attn"]["o"], 0)
            added = apply_part(ARCH, "attn", Attention(2), {**p["attn"], "o": o}, h, ctx) - h
            norms[g] += float((np.linalg.norm(added, axis=-1) * real).sum())
        mid = apply_part(ARCH, "attn", Attention(2), p["attn"], h, ctx)
        x = np.asarray(mid / np.sqrt((mid**2).mean(-1, keepdims=True) + ARCH.norm_eps)) * p["ffn"]["norm"]
        act = np.asarray(jax.nn.silu(x @ p["ffn"]["gate"])) * (x @ p["ffn"]["up"])
        sums += np.abs(act)[real].sum(0)
        tokens += real.sum()
    np.testing.assert_allclose(
        got.ffn[0], sums / tokens * np.linalg.norm(p["ffn"]["down"], axis=1), rtol=1e-4
    )
    np.testing.assert_allclose(got.kv[0], norms / tokens, rtol=1e-3)


def test_importance_by_magnitude_and_on_disk(tmp_path):
    params = parent()
    got = importance.measure(params, ARCH, [], "magnitude")
    p = dict(layers_of(params, ARCH))[1]["ffn"]
    assert got.ffn[1][3] == pytest.approx(
        np.sqrt((p["gate"][:, 3] ** 2 + p["up"][:, 3] ** 2 + p["down"][3] ** 2).sum())
    )
    assert got.kv[2].shape == (2,)
    importance.save(got, tmp_path / "importance.npz")
    again = importance.load(tmp_path / "importance.npz")
    assert np.array_equal(again.ffn[2], got.ffn[2]) and np.array_equal(again.kv[0], got.kv[0])
    with pytest.raises(ValueError, match="at least one calibration batch"):
        importance.measure(params, ARCH, [])


def stream(length: int = 8):
    positions = jnp.tile(jnp.arange(length), (2, 1))
    return jax.random.normal(jax.random.key(3), (2, length, 32)), make_context(ARCH, positions)
