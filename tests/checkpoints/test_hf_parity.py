"""Our logits against torch on the same files, and generation from an export against our own greedy loop."""

import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemojax.checkpoints import hf
from nemojax.checkpoints.artifact import load_params
from nemojax.model import llama
from tests.checkpoints.toy_models import LLAMAS, MIXED, make_llama

TOLERANCE = 2e-4
TOKENS = np.random.default_rng(0).integers(1, 64, (2, 40))


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def load_exported(directory):
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(directory), trust_remote_code=True, output_loading_info=True, dtype="float32"
    )
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("kind", LLAMAS)
def test_llama_logits(tmp_path, kind):
    """40 tokens: with `scaled`, beyond the original context of 16."""
    model = make_llama(tmp_path / "hf", kind)
    arch = hf.import_hf(tmp_path / "hf", tmp_path / "a")
    _, params = load_params(tmp_path / "a")
    ours, _ = llama.apply(params, arch, {"tokens": jnp.asarray(TOKENS)})
    theirs = torch_logits(model, TOKENS)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, mixed_artifact):
    path = tmp_path_factory.mktemp("parity") / "export"
    hf.export_hf(mixed_artifact, path)
    return path


@pytest.fixture(scope="module")
def our_logits(mixed_artifact):
    _, params = load_params(mixed_artifact)
    forward = jax.jit(lambda tokens: llama.apply(params, MIXED, {"tokens": tokens})[0])
    return lambda tokens: np.asarray(forward(jnp.asarray(tokens)))


def greedy(our_logits, prompt, num_new):
    """Our own cacheless loop; rows are right-padded to one length, so there is one compilation."""
    row = [*prompt]
    for _ in range(num_new):
        padded = np.zeros((1, TOKENS.shape[1] + num_new), int)
        padded[0, : len(row)] = row
        row.append(int(our_logits(padded)[0, len(row) - 1].argmax()))
    return row


def test_decilm_logits(exported, our_logits):
    theirs = torch_logits(load_exported(exported), TOKENS)
    np.testing.assert_allclose(our_logits(TOKENS), theirs, atol=TOLERANCE, rtol=0)


def test_decilm_generates_with_cache_and_left_padding(exported, our_logits):
    import torch

    model = load_exported(exported)
    mask = np.ones_like(TOKENS)
    mask[0, :7] = 0
    new = model.generate(
        torch.tensor(TOKENS),
        attention_mask=torch.tensor(mask),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    assert new[0, 7:].tolist() == greedy(our_logits, TOKENS[0, 7:], 6)
    assert new[1].tolist() == greedy(our_logits, TOKENS[1], 6)


def test_decilm_saves_itself_again(exported, tmp_path):
    model = load_exported(exported)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_decilm.py").is_file()
    assert hf.import_hf(tmp_path / "again", tmp_path / "a") == MIXED
    assert (torch_logits(load_exported(tmp_path / "again"), TOKENS) == torch_logits(model, TOKENS)).all()


def test_tied_decilm(tmp_path):
    from nemojax.checkpoints.artifact import save_params
    from tests.checkpoints.toy_models import random_params

    tied = MIXED.replace(tie_embeddings=True, rope=type(MIXED.rope)(), blocks=MIXED.blocks[:3])
    params = random_params(tied)
    save_params(tmp_path / "a", tied, params)
    hf.export_hf(tmp_path / "a", tmp_path / "out")
    ours, _ = llama.apply(jax.tree.map(jnp.asarray, params), tied, {"tokens": jnp.asarray(TOKENS)})
    theirs = torch_logits(load_exported(tmp_path / "out"), TOKENS)
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=TOLERANCE, rtol=0)


OTHER_VERSION = """
import sys, numpy, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True
)
assert not info["missing_keys"] and not info["unexpected_keys"], info
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<|eot_id|>"
tokens = torch.tensor(numpy.load(sys.argv[2]))
mask = torch.ones_like(tokens)
mask[0, :7] = 0
with torch.no_grad():
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    new = model.eval().generate(tokens, attention_mask=mask, **greedy)
    numpy.savez(sys.argv[3], logits=model(tokens).logits.numpy(), new=new.numpy())
"""


@pytest.mark.slow
def test_decilm_in_transformers_4(exported, our_logits, tmp_path):
    """NEMOJAX_TRANSFORMERS4 names the Python of an environment with transformers 4.57 and torch."""
    python = os.environ.get("NEMOJAX_TRANSFORMERS4")
    if not python or not Path(python).is_file():
        pytest.skip("NEMOJAX_TRANSFORMERS4 names no Python with transformers 4.57")
    np.save(tmp_path / "tokens.npy", TOKENS)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path)}
    paths = [str(exported), str(tmp_path / "tokens.npy"), str(tmp_path / "out.npz")]
    done = subprocess.run([python, "-c", OTHER_VERSION, *paths], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    out = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(our_logits(TOKENS), out["logits"], atol=TOLERANCE, rtol=0)
    assert out["new"][0, 7:].tolist() == greedy(our_logits, TOKENS[0, 7:], 6)
