"""Whether two tokenizers, or the weights of two files, are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemojax.arch import ArchSpec
from nemojax.checkpoints import store
from nemojax.data.tokenizer import Tokenizer

CUTS = ("normalizer", "pre_tokenizer", "model")  # what decides how a text is cut, but for added tokens
MIXERS = (2654435761, 2246822519)  # odd, so that a product with one of them loses no bit


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """A digest of what decides the ids of a text, whoever wrote the file."""
    spec = _spec(tokenizer)
    return _digest([[spec[name] for name in CUTS], _added(spec)])


def shared_vocab(one: Tokenizer, other: Tokenizer) -> int:
    """How many first ids mean the same to both: all of them for equal ones, 0 if they cut texts otherwise."""
    specs = _spec(one), _spec(other)
    if any(specs[0][name] != specs[1][name] for name in CUTS):
        return 0
    added = _added(specs[0]), _added(specs[1])
    differ = [int(i) for i in added[0].keys() | added[1].keys() if added[0].get(i) != added[1].get(i)]
    shared = min(differ, default=max(one.vocab_size, other.vocab_size))
    return shared if shared > max(_inner_ids(specs[0]), default=-1) else 0


def weights_digest(arch: ArchSpec, params: Mapping[str, Any]) -> str:
    """A digest of an architecture and of every bit of its weights, the same on any mesh."""
    sums = {path: store.to_host(_mixed(leaf)).tolist() for path, leaf in store.flat_paths(params).items()}
    return _digest([arch.to_json(), sums])


@jax.jit
def _mixed(leaf: jax.Array) -> jax.Array:
    """[2] u32: each element's bits times an odd number that depends on its place, added modulo 2**32.

    Whole numbers are added to the same sum in any order, so a mesh changes nothing.
    """
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.stack([jnp.sum(bits * (2 * place * np.uint32(m) + 1), dtype=jnp.uint32) for m in MIXERS])


def _spec(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as its library writes it, which does not depend on who wrote the file."""
    import tokenizers

    return json.loads(tokenizers.Tokenizer.from_file(str(tokenizer.path / "tokenizer.json")).to_str())


def _added(spec: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{id: what is recognised as it}; whether a token is `special` changes no ids."""
    keys = ("content", "single_word", "lstrip", "rstrip", "normalized")
    return {str(token["id"]): [token[key] for key in keys] for token in spec["added_tokens"]}


def _inner_ids(spec: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that were not added."""
    vocab, added = spec["model"]["vocab"], _added(spec)
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return [i for i in ids if str(i) not in added]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
