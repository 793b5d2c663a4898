"""Whether two tokenizers cut a text into the same ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from nemojax.data.tokenizer import Tokenizer

CUTS = ("normalizer", "pre_tokenizer", "model")  # what decides how a text is cut, but for added tokens


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """A digest of what decides the ids of a text, whoever wrote the file."""
    spec = _spec(tokenizer)
    decides = json.dumps([[spec[name] for name in CUTS], _added(spec)], sort_keys=True)
    return hashlib.sha256(decides.encode()).hexdigest()[:32]


def shared_vocab(one: Tokenizer, other: Tokenizer) -> int:
    """How many first ids mean the same to both: all of them for equal ones, 0 if they cut texts otherwise."""
    specs = _spec(one), _spec(other)
    if any(specs[0][name] != specs[1][name] for name in CUTS):
        return 0
    added = _added(specs[0]), _added(specs[1])
    differ = [int(i) for i in added[0].keys() | added[1].keys() if added[0].get(i) != added[1].get(i)]
    shared = min(differ, default=max(one.vocab_size, other.vocab_size))
    return shared if shared > max(_inner_ids(specs[0]), default=-1) else 0


def _spec(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as its library writes it, which does not depend on who wrote the file."""
    import tokenizers

    return json.loads(
        tokenizers.Tokenizer.from_buffer((tokenizer.path / "tokenizer.json").read_bytes()).to_str()
    )


def _added(spec: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{id: what is recognised as it}; whether a token is `special` changes no ids."""
    keys = ("content", "single_word", "lstrip", "rstrip", "normalized")
    return {str(token["id"]): [token[key] for key in keys] for token in spec["added_tokens"]}


def _inner_ids(spec: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that were not added."""
    vocab, added = spec["model"]["vocab"], _added(spec)
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return [i for i in ids if str(i) not in added]
