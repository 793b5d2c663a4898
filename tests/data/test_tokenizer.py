"""Training, files that transformers loads, special tokens, templates, and errors."""

import json

import pytest

from nemojax import tokenizer as stage
from nemojax.arch import uniform
from nemojax.data import tokenizer as tok
from nemojax.data.chat import render
from nemojax.data.sources import Source
from tests.data.tiny import TEXTS, tiny_tokenizer

CHAT = [
    {"role": "user", "content": "Sort 3 1 2."},
    {"role": "assistant", "content": "<think>1 first</think>1 2 3"},
    {"role": "user", "content": "Thanks"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_round_trip_of_any_text(tokenizer):
    for text in [*TEXTS, "\x00\x7f🦙 <b>", " leading", "trailing \n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_digits(tokenizer, tmp_path):
    assert len(tokenizer.encode("4711")) == 4
    grouped = tok.train_tokenizer(["12345 12345 " * 50], 400, tmp_path, digits="groups_of_3")
    assert [grouped.decode([i]) for i in grouped.encode("12345")] == ["123", "45"]


def test_special_tokens(tokenizer):
    assert tokenizer.vocab_size <= 400
    ids = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id, tokenizer.pad_id]
    assert len(set(ids)) == 4 and min(ids) >= tokenizer.vocab_size - 8
    assert tokenizer.eos_ids == (tokenizer.eot_id, tokenizer.eos_id)
    assert tokenizer.encode("<think></think>") == [tokenizer.think_id, tokenizer.end_think_id]
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.think_id, tokenizer.eot_id]) == "<think>"
    for word in ("system", "user", "assistant", "\n\n"):
        assert len(tokenizer.encode(word)) == 1


def test_the_full_set_has_256_in_the_order_of_llama_3():
    names = tok.special_tokens(full=True)
    assert len(names) == len(set(names)) == 256
    assert (names[0], names[1], names[9]) == (tok.BOS, tok.EOS, tok.EOT)
    assert names[2] == "<|reserved_special_token_0|>" and names[11] == "<|reserved_special_token_3|>"


def test_transformers_agrees(tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eot_id,
        tokenizer.pad_id,
    )
    assert len(theirs) == tokenizer.vocab_size
    for text in TEXTS:
        assert theirs(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
    for generation in (False, True):
        text = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation)
        assert text == render(tokenizer, CHAT, generation)
    off = theirs.apply_chat_template(CHAT, tokenize=False, thinking=False)
    assert "detailed thinking off" in off and "detailed thinking on" in text


def test_ids_beyond_the_vocabulary(tokenizer):
    def arch(vocab_size):
        return uniform(
            vocab_size=vocab_size, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=8, context=16
        )

    tok.check_vocab(tokenizer, arch(512))
    with pytest.raises(ValueError, match="at most 128 ids"):
        tok.check_vocab(tokenizer, arch(128))


def test_bad_directories(tmp_path):
    with pytest.raises(ValueError, match=r"expected a fast tokenizer \(tokenizer.json\), got none"):
        tok.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        tok.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="vocab_size: expected at least 264"):
        tok.train_tokenizer(TEXTS, 100, tmp_path)


def test_foreign_tokenizers_name_their_own_tokens(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "x"})
    )
    found = tok.load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id, found.eot_id, found.eos_ids) == (0, 1, 1, (1,))
    assert found.chat_template == "x" and found.think_id is None


def test_the_stage(tmp_path):
    result = stage.run(stage.Config(sources=(Source(),), vocab_size=512), tmp_path)
    assert (tmp_path / "DONE").is_file()
    assert result["vocab_size"] == 512 and result["bytes_per_token"] > 1.5
    copied = tok.load_tokenizer(tmp_path).save(tmp_path / "copy")
    assert tok.load_tokenizer(copied).vocab_size == 512
