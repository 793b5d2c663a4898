"""`nemojax generate` and `nemojax chat`: the command-line faces of batch.py and chat.py."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemojax.commands import Parser, split_overrides, summary_line

# flags that are short for a field, as it is written
SHORT = {
    "thinking": "thinking",
    "temperature": "sampling.temperature",
    "max_new_tokens": "sampling.max_new_tokens",
    "n": "n",
    "seed": "seed",
    "thinking_budget": None,  # whose field differs between the commands
    "top_logprobs": "answer.top_logprobs",
}
# and those whose value is text, whatever it looks like
TEXTS = {"model": "remote.model", "system": "system"}


def generate_command(argv: Sequence[str]) -> int:
    """nemojax generate ARTIFACT --prompt=TEXT | --prompts=FILE.jsonl --out=FILE.jsonl [options]."""
    parser = _parser()
    if {"-h", "--help"} & set(argv):
        from nemojax.generate.batch import GenerateConfig

        print(_help(parser, GenerateConfig))
        return 0
    args, extras = parser.parse_known_args(argv)
    overrides = split_overrides(extras, parser.prog)
    _check(args, parser)
    from nemojax.config import apply_overrides, from_dict
    from nemojax.generate import batch

    overrides += _short(args, "answer.thinking_budget")
    if args.stop:
        overrides.append(f"answer.stop={tuple(args.stop)!r}")
    if args.json_schema is not None:
        overrides.append(f"answer.json_schema={_read_schema(args.json_schema)!r}")
    if args.logprobs:
        overrides.append("logprobs=True")
    cfg = from_dict(batch.GenerateConfig, apply_overrides({}, overrides))
    if args.prompts is not None:
        print(summary_line("generate", batch.run(args.artifact, args.prompts, args.out, cfg), args.out))
        return 0
    row = {"prompt": args.prompt} if args.raw else {"messages": [{"role": "user", "content": args.prompt}]}
    rows = batch.answer(args.artifact, [row], cfg)
    for sample in rows:
        print(*[f"[{sample['sample'] + 1}/{len(rows)}]"] * (len(rows) > 1), sample["text"])
    if cut := sum(sample["finish_reason"] == "length" for sample in rows):
        print(f"{cut} of {len(rows)} cut off by max_new_tokens or the context", file=sys.stderr)
    return 0


def chat_command(argv: Sequence[str]) -> int:
    """nemojax chat ARTIFACT|URL [options]."""
    parser = Parser(
        prog="nemojax chat",
        usage="nemojax chat ARTIFACT|URL [--system=TEXT] [--thinking=on|off] [options]",
        description="A conversation in the terminal, with an artifact or an OpenAI-compatible server.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("artifact", metavar="ARTIFACT|URL", help="artifact, or an address up to and with /v1")
    parser.add_argument("--system", help="system text")
    _add_sampling(parser)
    if {"-h", "--help"} & set(argv):
        from nemojax.generate.chat import HELP, ChatConfig

        print(_help(parser, ChatConfig, f"in the conversation:\n{textwrap.indent(HELP, '  ')}\n"))
        return 0
    args, extras = parser.parse_known_args(argv)
    overrides = split_overrides(extras, parser.prog)
    _check_address(args, parser)
    from nemojax.config import apply_overrides, from_dict
    from nemojax.generate import chat

    overrides += _short(args, "thinking_budget")
    chat.run(args.artifact, from_dict(chat.ChatConfig, apply_overrides({}, overrides)))
    return 0


def _short(args: argparse.Namespace, budget: str) -> list[str]:
    """The overrides that flags are short for."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    short = [f"{path or budget}={given[name]}" for name, path in SHORT.items() if name in given]
    return short + [f"{path}={given[name]!r}" for name, path in TEXTS.items() if name in given]


def _read_schema(given: str) -> dict[str, Any]:
    """A JSON schema, written out or in a file."""
    where = "--json_schema" if given.lstrip().startswith("{") else given
    try:
        schema = json.loads(given if where != given else Path(given).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where}: expected a JSON schema, got something else ({error})") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(schema).__name__}")
    return schema


def _add_sampling(parser: Parser) -> None:
    """The flags of both commands."""
    parser.add_argument("--model", help="with a URL: the model's name there; default: the only one")
    parser.add_argument("--thinking", choices=("on", "off", "none"), help="toggle in a chat's system text")
    parser.add_argument("--thinking_budget", help="tokens of reasoning at most; then it is closed")
    parser.add_argument("--temperature", help="divides the logits; 0 is greedy")
    parser.add_argument("--max_new_tokens", help="tokens generated at most")
    parser.add_argument("--seed", help="seed of the sampler")


def _check_address(args: argparse.Namespace, parser: Parser) -> None:
    if args.model is not None and not args.artifact.startswith(("http://", "https://")):
        parser.error("--model goes with a server's address")


def _parser() -> Parser:
    parser = Parser(
        prog="nemojax generate",
        usage="nemojax generate ARTIFACT|URL (--prompt=TEXT | --prompts=FILE --out=FILE) [options]",
        description="Complete one prompt, or a file of prompts; run again to resume.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "artifact",
        metavar="ARTIFACT|URL",
        help="artifact or work directory of a stage, or an address up to and with /v1",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what the user says; the answer goes to standard output")
    what.add_argument(
        "--prompts", metavar="FILE", help='rows {"prompt": text} or {"messages": [...]}, id, sampling fields'
    )
    parser.add_argument("--out", metavar="FILE", help="with --prompts: the rows to write (JSONL)")
    parser.add_argument("--raw", action="store_true", help="with --prompt: continue the text, no chat")
    _add_sampling(parser)
    parser.add_argument("--n", help="samples of each prompt")
    parser.add_argument(
        "--stop", action="append", help="text that ends an answer; may be given several times"
    )
    parser.add_argument(
        "--json_schema", metavar="FILE", help="schema that answers obey, or {} for any object"
    )
    parser.add_argument("--top_logprobs", help="with --prompts: likeliest tokens written with each token")
    parser.add_argument("--logprobs", action="store_true", help="with --prompts: write them too (nats)")
    return parser


def _check(args: argparse.Namespace, parser: Parser) -> None:
    with_file = args.prompts is not None
    if with_file and args.out is None:
        parser.error("--prompts needs --out=FILE.jsonl, where the answers go")
    if args.raw and args.thinking is not None:
        parser.error("--thinking goes with a chat, not with --raw")
    _check_address(args, parser)
    for_file = [(name, not with_file) for name in ("out", "logprobs", "top_logprobs")]
    for name, wrong in (*for_file, ("raw", with_file)):
        if wrong and getattr(args, name):
            parser.error(f"--{name} goes with --prompt{'s' * (not with_file)}")


def _help(parser: Parser, cls: type, more: str = "") -> str:
    from nemojax.config import field_lines

    return "\n".join([parser.format_help() + more, *field_lines(cls)])
