"""Rewards: the logit of one token after a conversation, as a causal reward model is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.arch import uniform
from nemojax.checkpoints.artifact import load_model
from nemojax.data.chat import render
from nemojax.data.tokenizer import load_tokenizer
from nemojax.generate.score import score
from nemojax.model.llama import apply, init_params, param_shardings
from nemojax.sharding import MeshConfig, make_mesh

ARCH = uniform(vocab_size=64, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, ffn_width=32, context=50)
SEQUENCES = [
    np.random.default_rng(length).integers(0, 64, length).tolist()
    for length in (1, 50, 15, 16, 17, 33, 3, 50, 8)
]


def expected(params, arch, sequences, token=0) -> list[float]:
    """From all logits of the training forward."""
    tokens = np.zeros((len(sequences), max(map(len, sequences))), np.int32)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = ids
    logits = jax.jit(lambda p, t: apply(p, arch, {"tokens": t})[0])(params, jnp.asarray(tokens))
    return [float(logits[row, len(ids) - 1, token]) for row, ids in enumerate(sequences)]


@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_the_forwards_logits(tied):
    """Whatever they are read together with, and however long the rounded length is."""
    arch = dataclasses.replace(ARCH, tie_embeddings=tied)
    params = init_params(arch, jax.random.key(1))
    for token, max_tokens in ((0, 1), (63, 64), (0, 8192)):
        wanted = expected(params, arch, SEQUENCES, token)
        got = score(params, arch, SEQUENCES, token, max_tokens=max_tokens)
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        assert np.ptp(wanted) > 0.1
    assert score(params, arch, []) == []


def test_on_a_mesh():
    params = init_params(ARCH, jax.random.key(1))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    placed = jax.device_put(params, param_shardings(ARCH, mesh))
    np.testing.assert_allclose(
        score(placed, ARCH, SEQUENCES, mesh=mesh), score(params, ARCH, SEQUENCES), atol=1e-5
    )


def test_bad_sequences():
    params = init_params(ARCH, jax.random.key(1))
    for bad, match in (
        ([], "conversation 1: expected at least one token"),
        ([1] * 51, "conversation 1: expected at most 50 tokens"),
        ([64], "conversation 1: expected ids below 64"),
        ([-1], "conversation 1: expected ids below 64"),
    ):
        with pytest.raises(ValueError, match=match):
            score(params, ARCH, [[1], bad])
    with pytest.raises(ValueError, match="token: expected an id below 64"):
        score(params, ARCH, [[1]], 64)


def test_over_http(server, artifact):
    """Pairs and conversations, rendered as a whole; vLLM's form of an answer."""
    arch, params = load_model(artifact)
    tokenizer = load_tokenizer(artifact)

    def reward(*turns: str) -> float:
        roles = ("user", "assistant") * len(turns)
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        return expected(params, arch, [tokenizer.encode(render(tokenizer, messages))])[0]

    def ask(**body):
        status, answer, _ = server.request("/v1/score", {"model": "tiny/model", **body})
        assert status == 200 and answer["object"] == "list", answer
        assert [(d["index"], d["object"]) for d in answer["data"]] == [
            (i, "score") for i in range(len(answer["data"]))
        ]
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
        return [d["score"] for d in answer["data"]]

    pair = [reward("one", "two")]
    np.testing.assert_allclose(ask(text_1="one", text_2="two"), pair, atol=1e-4)
    both = [reward("one", "two"), reward("one", "three and more")]
    np.testing.assert_allclose(ask(text_1="one", text_2=["two", "three and more"]), both, atol=1e-4)
    pairs = [reward("one", "two"), reward("make", "three")]
    np.testing.assert_allclose(ask(text_1=["one", "make"], text_2=["two", "three"]), pairs, atol=1e-4)
    chats = [
        [("user", "one"), ("assistant", "two")],
        [("user", "one"), ("assistant", "two"), ("user", "x"), ("assistant", "y")],
    ]
    messages = [[{"role": role, "content": text} for role, text in chat] for chat in chats]
    longer = [reward("one", "two"), reward("one", "two", "x", "y")]
    np.testing.assert_allclose(ask(messages=messages), longer, atol=1e-4)
    np.testing.assert_allclose(ask(messages=messages[1]), longer[1:], atol=1e-4)
    assert both[0] != both[1]
