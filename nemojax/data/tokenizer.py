"""Byte-level BPE tokenizers in the Llama 3 manner: trained here, or any fast tokenizer on disk.

`Tokenizer` reads `tokenizer.json` with the Rust library directly; importing transformers takes seconds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemojax.buckets import copy_file, place, write_text

if TYPE_CHECKING:
    from nemojax.arch import ArchSpec

BOS, EOS, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
THINK, END_THINK = "<think>", "</think>"
THINKING = {True: "detailed thinking on", False: "detailed thinking off"}
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
ROLES = ("system", "user", "assistant")

# Llama 3's order of special tokens; the reserved names fill the gaps of the full set of 256.
_LLAMA3_PLACES = {
    0: BOS,
    1: EOS,
    4: PAD,
    6: HEADER,
    7: END_HEADER,
    8: "<|eom_id|>",
    9: EOT,
    10: "<|python_tag|>",
}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Digits = Literal["individual", "groups_of_3"]

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set off = thinking is defined and not thinking %}
    {%- set system = 'detailed thinking ' + ('off' if off else 'on') %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system }}
{%- if tools is defined and tools %}
    {{- '\\n\\nYou can call tools. These are there, each with the JSON schema of its parameters:\\n' }}
    {{- '<AVAILABLE_TOOLS>[' }}
    {%- for tool in tools %}
        {{- (', ' if not loop.first else '') + (tool['function'] or tool) | tojson }}
    {%- endfor %}
    {{- ']</AVAILABLE_TOOLS>\\n\\n' }}
    {{- 'To call some, write their names and arguments as JSON between these tags:\\n' }}
    {{- '<TOOLCALL>[{"name": "a_tool", "arguments": {"a_parameter": "a value"}}]</TOOLCALL>\\n\\n' }}
    {{- 'What they return comes back, in the same order, as <TOOL_RESPONSE>[...]</TOOL_RESPONSE>. ' }}
    {{- 'If no tool helps, or the results suffice, answer in words.' }}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in turns %}
    {%- if message['role'] == 'tool' %}
        {%- if loop.first or loop.previtem['role'] != 'tool' %}
            {{- '<|start_header_id|>user<|end_header_id|>\\n\\n<TOOL_RESPONSE>[' }}
        {%- else %}
            {{- ', ' }}
        {%- endif %}
        {{- message['content'] }}
        {%- if loop.last or loop.nextitem['role'] != 'tool' %}
            {{- ']</TOOL_RESPONSE><|eot_id|>' }}
        {%- endif %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if message['tool_calls'] %}
            {{- (message['content'] or '') + '<TOOLCALL>[' }}
            {%- for call in message['tool_calls'] %}
                {%- set call = call['function'] or call %}
                {%- set given = call['arguments'] or {} %}
                {{- (', ' if not loop.first else '') + '{"name": ' + call['name'] | tojson }}
                {{- ', "arguments": ' + (given if given is string else given | tojson) + '}' }}
            {%- endfor %}
            {{- ']</TOOLCALL><|eot_id|>' }}
        {%- else %}
            {{- message['content'] + '<|eot_id|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def special_tokens(full: bool = False) -> list[str]:
    """The special tokens at the end of the vocabulary: the handful in use, or Llama 3's 256 with the
    two thinking tokens in its last two reserved places."""
    if not full:
        return [BOS, EOS, PAD, HEADER, END_HEADER, EOT, THINK, END_THINK]
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(256))
    tokens = [_LLAMA3_PLACES.get(i) or next(reserved) for i in range(254)]
    return [*tokens, THINK, END_THINK]


class Tokenizer:
    """A fast tokenizer with its special ids and chat template.

    `eos_id` ends a document, `eot_id` a turn; `eos_ids` are the ids that stop generation. `vocab_size`
    counts added tokens.
    """

    def __init__(self, path: str | Path):
        import tokenizers

        self.path = place(path)
        source = self.path / "tokenizer.json"
        if not source.is_file():
            raise ValueError(f"{self.path}: expected a fast tokenizer (tokenizer.json), got none")
        try:
            self._rust = tokenizers.Tokenizer.from_buffer(source.read_bytes())
        except Exception as error:
            raise ValueError(f"{source}: not a tokenizer file ({error})") from error
        self.config = _read_json(self.path / "tokenizer_config.json")
        template = self.path / "chat_template.jinja"
        self.chat_template: str | None = self.config.get("chat_template")
        if template.is_file():
            self.chat_template = template.read_text(encoding="utf-8")
        self.vocab_size = self._rust.get_vocab_size(with_added_tokens=True)
        named_eos, named_bos = self._named("eos_token"), self._named("bos_token")
        self.eot_id = self._first(EOT, "<|im_end|>", named_eos)
        self.eos_id = self._first(EOS, named_eos, "</s>", "<|endoftext|>")
        self.bos_id = self._first(BOS, named_bos, "<s>", named_eos)
        self.pad_id = self._first(self._named("pad_token"), PAD, "<unk>", named_eos)
        self.bos_token = self._rust.id_to_token(self.bos_id)
        self.eos_token = self._rust.id_to_token(self.eot_id)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eot_id, self.eos_id)))
        self.think_id, self.end_think_id = self.token_id(THINK), self.token_id(END_THINK)

    def _named(self, key: str) -> str | None:
        value = self.config.get(key)
        return value.get("content") if isinstance(value, dict) else value

    def _first(self, *names: str | None) -> int:
        for name in names:
            found = self.token_id(name) if name else None
            if found is not None:
                return found
        raise ValueError(
            f"{self.path}: expected begin and end tokens, got none of {', '.join(n for n in names if n)}; "
            "name them in tokenizer_config.json"
        )

    def token_id(self, token: str) -> int | None:
        """The id of one token, None if the vocabulary lacks it."""
        return self._rust.token_to_id(token)

    def token(self, index: int) -> str | None:
        """The token of an id as the vocabulary writes it."""
        return self._rust.id_to_token(index)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        added = self._rust.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @functools.cached_property
    def byte_level(self) -> bool:
        """Whether a text is its tokens' bytes one after the other, each byte written as a letter."""
        decoder = self._rust.decoder
        return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written in it are recognised, none are added.

        ValueError for half of a surrogate pair, which JSON can spell but no text holds.
        """
        try:
            return self._rust.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(f"text: expected whole Unicode characters, got {text!r:.80}") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, in parallel."""
        return [e.ids for e in self._rust.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; `<think>` and `</think>` of our tokenizers are text and stay."""
        return self._rust.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, out: str | Path) -> Path:
        """Copies the tokenizer's files to another directory."""
        return copy_tokenizer(self.path, out)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a directory (or of its `tokenizer/` folder); ValueError if there is none."""
    path = place(path)
    return Tokenizer(path if (path / "tokenizer.json").is_file() else path / "tokenizer")


def copy_tokenizer(source: str | Path, out: str | Path) -> Path:
    """Copies the files that make a tokenizer; returns the new directory."""
    source, out = place(source), place(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            copy_file(source / name, out / name)
    return out


def check_vocab(tokenizer: Tokenizer, arch: ArchSpec) -> None:
    """ValueError if the tokenizer can produce an id that the architecture has no embedding for."""
    if tokenizer.vocab_size > arch.vocab_size:
        raise ValueError(
            f"{tokenizer.path}: expected at most {arch.vocab_size} ids (the architecture's vocabulary), got "
            f"{tokenizer.vocab_size}; use the checkpoint's own tokenizer or a larger vocab_size"
        )


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_dir: str | Path,
    digits: Digits = "individual",
    full_reserved: bool = False,
    context: int = 8192,
) -> Tokenizer:
    """Trains a byte-level BPE of `vocab_size` ids, special tokens included, and writes it to `out_dir`.

    The words of the chat template are made frequent in the training text, so that a small vocabulary
    still spells a header in four tokens.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Rust

    special = special_tokens(full_reserved)
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"vocab_size: expected at least {256 + len(special)} (256 bytes, {len(special)} special tokens), "
            f"got {vocab_size}"
        )
    rust = Rust(models.BPE(ignore_merges=False))
    split = Regex(_SPLIT % (1 if digits == "individual" else 3))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), byte_level])
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(_with_template_words(texts), trainer)
    _add_special(rust, special)
    return _write(rust, place(out_dir), context)


def _with_template_words(texts: Iterable[str]) -> Iterable[str]:
    count = 0
    for text in texts:
        count += len(text)
        yield text
    words = "\n\n".join((*ROLES, *THINKING.values()))
    yield from (words for _ in range(max(64, count // 200)))


def _add_special(rust: Any, special: list[str]) -> None:
    from tokenizers import AddedToken, processors

    # transformers keeps tokens that are not `special` when it skips special ones: reasoning stays visible
    text = (THINK, END_THINK)
    for token in special:
        rust.add_tokens([AddedToken(token, special=token not in text, normalized=False)])
    bos = rust.token_to_id(BOS)
    rust.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )


def _write(rust: Any, out: Path, context: int) -> Tokenizer:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "tokenizer.json", rust.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOT,
        "pad_token": PAD,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return load_tokenizer(out)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error


@functools.lru_cache(maxsize=16)
def compile_template(template: str) -> Any:
    """A chat template as transformers compiles it: sandboxed, with its helper functions."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False, **kwargs)
    env.globals["raise_exception"] = raise_exception
    return env.from_string(template)
