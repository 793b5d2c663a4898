"""The small files that travel with weights: tokenizer, chat template, generation config, token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemojax.buckets import copy_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
)  # what may end a Llama 3 turn, beside the declared EOS


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError when the file is missing, damaged or something else."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a Hugging Face model directory")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_tokenizer(source: Path, target: Path, vocab_size: int) -> bool:
    """Copies the tokenizer files of `source`; True when there is a fast tokenizer among them.

    ValueError when its ids do not fit the `vocab_size` rows of the embedding.
    """
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        return False
    check_vocabulary(source, vocab_size)
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        copy_file(file, target / file.name)
    return (target / "tokenizer.json").is_file()


def check_vocabulary(directory: Path, vocab_size: int) -> None:
    """Raises ValueError when tokenizer.json has an id that the embedding lacks."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return
    vocabulary = _vocabulary(path)
    token, largest = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab_size:
        raise ValueError(
            f"{path}: token {token!r} has id {largest}, expected ids below vocab_size {vocab_size}"
        )


def export_tokenizer(source: Path, out: Path) -> None:
    """Tokenizer files in the spelling that transformers 4.57 and 5.x both read."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            copy_file(source / name, out / name)
    if not (source / "tokenizer.json").is_file():
        return
    path = out / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    portable = dict(config)
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # 5.x writes a list here, 4.x wants a mapping
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    if portable != config:
        write_json(path, portable)


def special_tokens(tokenizer: Path) -> dict[str, Any]:
    """{"bos_token_id": .., "eos_token_id": .., "pad_token_id": ..} of a tokenizer, as far as known."""
    if not (tokenizer / "tokenizer.json").is_file():
        return {}
    vocabulary = _vocabulary(tokenizer / "tokenizer.json")
    path = tokenizer / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    ids: dict[str, Any] = {}
    for name in ("bos", "eos", "pad"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in vocabulary:
            ids[f"{name}_token_id"] = vocabulary[token]
    ends = sorted(
        {vocabulary[t] for t in _ENDS if t in vocabulary} | {ids[k] for k in ("eos_token_id",) if k in ids}
    )
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return ids


def generation_config(artifact: Path, ids: dict[str, Any]) -> dict[str, Any]:
    """The imported generation_config.json, or one with the special token ids."""
    path = artifact / "hf" / "generation_config.json"
    return read_json(path) if path.is_file() else dict(ids)


def _vocabulary(path: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(path.read_bytes()).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise ValueError(f"{path}: not a readable tokenizer ({str(error)[:200]})") from error
