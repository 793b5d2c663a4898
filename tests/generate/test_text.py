"""Streams of text: whatever the pieces, their sum is what the whole gives."""

import json
import random

import pytest

from nemojax.data.chat import opens_thinking, split_thinking
from nemojax.data.tokenizer import load_tokenizer, train_tokenizer
from nemojax.generate.protocol import ToolCall
from nemojax.generate.text import (
    ReasoningStream,
    TextStream,
    ToolStream,
    parse_tool_calls,
    thinking_budget,
    token_bytes,
    token_text,
)
from tests.data.tiny import TEXTS, tiny_tokenizer

TEXT = "Grüße, 世界! 👩‍👩‍👧 says\n\n\tπ ≈ 3.14 🦙🦙. <think>né</think> End"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A vocabulary in Llama 2's manner: words with ▁, single bytes for what it lacks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    out = tmp_path_factory.mktemp("pieces")
    rust = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    rust.train_from_iterator([*TEXTS, "<think>"] * 3, trainer)
    config = json.loads(rust.to_str())
    config["added_tokens"] = [t for t in config["added_tokens"] if not t["content"].startswith("<0x")]
    rust = Tokenizer.from_str(json.dumps(config))
    rust.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    rust.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return load_tokenizer(out)


@pytest.fixture(params=["byte_level", "pieces"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def split(ids, rng):
    """The ids in feeds of random lengths, empty ones too."""
    feeds, at = [], 0
    while at < len(ids):
        size = rng.choice((0, 1, 1, 2, 3, 7))
        feeds.append(ids[at : at + size])
        at += size
    return feeds


def cut(text, stop):
    """The text before the stop string that is complete first; the longer one of two that end together."""
    for end in range(len(text) + 1):
        here = [s for s in stop if text[:end].endswith(s)]
        if here:
            return text[: end - max(map(len, here))], True
    return text, False


def stream(tokenizer, feeds, stop=()):
    made = TextStream(tokenizer, stop)
    out = [made.feed(feed) for feed in feeds]
    return made, "".join([*out, made.flush()])


@pytest.mark.parametrize(
    "stop", [(), ("🦙",), ("世界!", "\n\n\t"), ("ays\n", "s", "zzz"), ("End",), ("Grüße",)]
)
def test_pieces_are_the_text_up_to_the_first_stop_string(tokenizer, stop):
    ids, rng = tokenizer.encode(TEXT), random.Random(0)
    whole, stopped = cut(tokenizer.decode(ids), stop)
    for _ in range(20):
        made, text = stream(tokenizer, split(ids, rng), stop)
        assert (text, made.stopped) == (whole, stopped)
        assert made.feed(ids) == made.flush() == "" if stopped else made.kept == len(ids)
    assert stopped == bool(stop)


def test_any_ids_at_all(tokenizer):
    """Ids at random: broken characters, special tokens in the middle of one, ids beyond the vocabulary."""
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size + 5) for _ in range(rng.randrange(40))]
        text = tokenizer.decode(ids)
        stop = tuple(
            text[at : at + rng.randrange(1, 4)] for at in rng.sample(range(len(text)), min(2, len(text)))
        )
        stop = rng.choice(((), tuple(s for s in stop if s)))
        made, got = stream(tokenizer, split(ids, rng), stop)
        assert (got, made.stopped) == cut(text, stop)
        check_kept(tokenizer, made, ids, got)


def check_kept(tokenizer, made, ids, text):
    """The tokens kept spell the text, and no fewer do; without a stop string all are kept."""
    if not made.stopped:
        assert made.kept == len(ids)
        return
    assert tokenizer.decode(ids[: made.kept]).startswith(text.rstrip("\ufffd"))
    assert len(made.offsets) >= made.kept
    assert all(offset < len(text) for offset in made.offsets[: made.kept])
    assert all(offset >= len(text) for offset in made.offsets[made.kept :])


def test_what_could_become_a_stop_string_is_held_back(byte_level):
    made = TextStream(byte_level, ("\n\nUser",))
    assert made.feed(byte_level.encode("two")) == "two"
    count = made.kept
    assert made.feed(byte_level.encode("\n\nUse")) == "" and made.kept == count
    assert made.feed(byte_level.encode("d")) == "\n\nUsed" and made.kept == len(made.offsets)
    assert made.feed(byte_level.encode(".\n\nUsers")) == "." and made.stopped
    ids = [i for text in ("two", "\n\nUse", "d", ".\n\nUsers") for i in byte_level.encode(text)]
    assert byte_level.decode(ids[: made.kept]).startswith("two\n\nUsed.")
    assert not byte_level.decode(ids[: made.kept - 1]).startswith("two\n\nUsed.")


def test_half_a_character_waits_and_then_is_a_replacement(byte_level):
    ids = byte_level.encode("a🦙")
    made = TextStream(byte_level)
    assert made.feed(ids[:-1]) == "a" and made.kept == 1
    assert made.offsets == [0, 1, 1, 1] and len(ids) == 5
    assert made.flush() == "\ufffd" == byte_level.decode(ids[1:-1]) and made.kept == 4


def test_offsets_are_where_tokens_begin(byte_level):
    ids = byte_level.encode(TEXT)
    made, text = stream(byte_level, [ids])
    for token, offset in zip(ids, made.offsets, strict=True):
        own = token_bytes(byte_level, token)
        behind = text[offset:].encode()
        assert own in behind[: len(own) + 4]  # within the character that it shares with its neighbours


@pytest.mark.parametrize("stop", ["end", ("",), (3,)])
def test_bad_stop_strings(byte_level, stop):
    with pytest.raises(ValueError, match="stop: expected strings of at least one character"):
        TextStream(byte_level, stop)


def test_bytes_and_text_of_tokens(tokenizer):
    ids = tokenizer.encode(TEXT)
    joined = b"".join(token_bytes(tokenizer, i) for i in ids).decode()
    assert joined.removeprefix(" " if not tokenizer.byte_level else "") == TEXT
    assert token_bytes(tokenizer, tokenizer.vocab_size + 1) == b""
    name = tokenizer.token(tokenizer.eos_id)
    assert token_text(tokenizer, tokenizer.eos_id) == name and tokenizer.decode([tokenizer.eos_id]) == ""
    if tokenizer.byte_level:
        part = tokenizer.encode("🦙")[0]
        assert token_bytes(tokenizer, part) == b"\xf0" and token_text(tokenizer, part) == "\ufffd"
        assert token_text(tokenizer, tokenizer.think_id) == "<think>"


def test_added_tokens_that_are_no_bytes(tmp_path):
    """An added token with a space or a character beyond Latin-1 stands for itself."""
    from tokenizers import AddedToken, Tokenizer

    made = train_tokenizer(TEXTS, 300, tmp_path)
    rust = Tokenizer.from_file(str(made.path / "tokenizer.json"))
    rust.add_tokens([AddedToken("[a tool]"), AddedToken("→世"), AddedToken("é")])
    rust.save(str(made.path / "tokenizer.json"))
    tokenizer = load_tokenizer(made.path)
    ids = tokenizer.encode("x[a tool]→世y")
    assert len(ids) == 4 and token_text(tokenizer, ids[1]) == "[a tool]"
    ids += [tokenizer.token_id("é"), *tokenizer.encode("b")]  # decoded as the letter of the byte E9
    assert stream(tokenizer, [[i] for i in ids])[1] == tokenizer.decode(ids)


def test_a_token_costs_the_same_at_any_length(tokenizer, monkeypatch):
    """No call to the tokenizer sees more than a window: counted, not timed."""
    longest = 0
    plain = tokenizer.decode

    def decode(ids, *args, **kwargs):
        nonlocal longest
        longest = max(longest, len(list(ids)))
        return plain(ids, *args, **kwargs)

    ids = tokenizer.encode("words and 世界 🦙 " * 200)
    monkeypatch.setattr(tokenizer, "decode", decode)
    made, text = stream(tokenizer, [[i] for i in ids], ("no such thing",))
    assert text == plain(ids) and longest < 40 and len(ids) > 2000


ANSWERS = [
    "<think>a b</think>c",
    "c",
    "",
    "  \n",
    "<think>\n</think>\n\nc \n",
    "\n <think> né \n\n ja </think>\n\n first \n\n second  ",
    "<think>never ends  ",
    "<think>a<think>b</think>c",
    "a < b and <thin and </think",
    "<think>a </thin </think",
]


def pieces_of(text, rng):
    out, at = [], 0
    while at < len(text):
        size = rng.randrange(0, 5)
        out.append(text[at : at + size])
        at += size
    return out


def reasoning_of(text, rng, opened=False):
    made = ReasoningStream(opened)
    found = [*(made.feed(piece) for piece in pieces_of(text, rng)), made.flush()]
    reasoning = "".join(r for r, _ in found)
    assert made.found or not reasoning
    return (reasoning if made.found else None), "".join(c for _, c in found)


@pytest.mark.parametrize("text", ANSWERS)
def test_reasoning_is_split_like_the_whole_text(text):
    rng = random.Random(0)
    for _ in range(30):
        assert reasoning_of(text, rng) == split_thinking(text)
        assert reasoning_of(text, rng, opened=True) == split_thinking("<think>" + text)


def test_reasoning_comes_as_it_is_written():
    made = ReasoningStream()
    assert made.feed("<thi") == ("", "") and not made.found
    assert made.feed("nk>\nso ") == ("so", "") and made.found
    assert made.feed("on</") == (" on", "")
    assert made.feed("think>\n\n4") == ("", "4")
    assert made.feed(" <think>") == ("", " <think>")


@pytest.mark.parametrize(
    "text, streamed",
    [
        ("a</think>c", (None, "a</think>c")),  # the prompt had opened it, and nobody said so
        ("Sure. <think>a</think>b", ("a", "Sure. b")),
        ("<think>a</think>b</think>c", ("a", "b</think>c")),
        ("x<think>y", ("y", "x")),
    ],
)
def test_where_a_stream_differs_from_the_whole_text(text, streamed):
    """It cannot take back what it gave as content. Nothing is lost: only its side differs."""
    for seed in range(10):
        assert reasoning_of(text, random.Random(seed)) == streamed
    assert split_thinking(text) != streamed


def test_a_prompt_that_opens_the_reasoning():
    assert opens_thinking("<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n")
    assert not opens_thinking("what is <think>?<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert not opens_thinking("<think>\n\n</think>\n\n")


CALL = '{"name": "f", "arguments": {"x": 1}}'
CONTENTS = [
    f"<TOOLCALL>[{CALL}]</TOOLCALL>",
    f"Let me see.\n<TOOLCALL>[{CALL}, {CALL}]</TOOLCALL>\n",
    f"one <TOOLCALL>[{CALL}]</TOOLCALL> two <TOOLCALL>{CALL}</TOOLCALL> three",
    '{"name": "f", "parameters": {"x": 1}}',
    ' {"type": "function", "name": "f", "parameters": {}}; {"name": "g", "arguments": {}}\n',
    '{"name": "Ann", "age": 3}',
    '{"answer": [1, 2]}',
    "{",
    "plain <TOOL and </TOOLCALL> text ",
    "the tag <TOOLCALL> is only talked about",
    "<TOOLCALL>[not json]</TOOLCALL> and more",
    f"<TOOLCALL>[{CALL}, 3]</TOOLCALL> <TOOLCALL>[{CALL}]</TOOLCALL>",
    f"<TOOLCALL>[{CALL}",
    f"<TOOLCALL>[{CALL}]",
    f"<TOOLCALL>[{CALL}] </TOOLCALL",
    '<TOOLCALL>[{"name": "f", "arguments": {"x": "</TOOLCALL> <TOOLCALL>"}}]</TOOLCALL>ok',
    f"<TOOLCALL>[] <TOOLCALL>[{CALL}]</TOOLCALL>",
    "",
    " \n",
]


@pytest.mark.parametrize("text", CONTENTS)
def test_calls_are_parsed_like_the_whole_text(text):
    rng = random.Random(0)
    for _ in range(30):
        made = ToolStream()
        found = [*(made.feed(piece) for piece in pieces_of(text, rng)), made.flush()]
        content, calls = "".join(c for c, _ in found), tuple(call for _, some in found for call in some)
        assert (content, calls) == parse_tool_calls(text)


def test_calls_and_content_come_as_soon_as_they_are_whole():
    made = ToolStream()
    assert made.feed("Hm. <TOOL") == ("Hm.", ())
    assert made.feed('CALL>[{"name": "f", "arguments": {"x": 1.50}}]') == ("", ())
    assert made.feed("</TOOLCALL> and") == ("  and", (ToolCall("f", '{"x": 1.50}'),))
    made = ToolStream()
    assert made.feed('{"na') == ("", ()) and made.feed('tion": 1') == ('{"nation": 1', ())


def test_thinking_budget(byte_level, pieces):
    budget = thinking_budget(byte_level, 7)
    assert (budget.tokens, budget.start, budget.end) == (
        7,
        (byte_level.think_id,),
        (byte_level.end_think_id,),
    )
    assert budget.close == budget.end
    spelled = thinking_budget(pieces, 0)
    assert pieces.decode(spelled.start) == "<think>" and pieces.decode(spelled.close).strip() == "</think>"
    assert len(spelled.end) > 1 and spelled.close[-len(spelled.end) :] == spelled.end != spelled.close
    with pytest.raises(ValueError, match="thinking_budget: expected 0 or more tokens, got -1"):
        thinking_budget(byte_level, -1)


def test_a_vocabulary_without_the_tags(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    with pytest.raises(ValueError, match="expected a vocabulary that spells <think>"):
        thinking_budget(load_tokenizer(tmp_path), 3)
