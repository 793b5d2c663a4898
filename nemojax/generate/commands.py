"""`nemojax generate`: the command-line face of `batch.answer` and `batch.run`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nemojax.commands import Parser, split_overrides, summary_line

# flags that are short for a field
SHORT = {
    "thinking": "thinking",
    "temperature": "sampling.temperature",
    "max_new_tokens": "sampling.max_new_tokens",
    "n": "n",
    "seed": "seed",
}


def generate_command(argv: Sequence[str]) -> int:
    """nemojax generate ARTIFACT --prompt=TEXT | --prompts=FILE.jsonl --out=FILE.jsonl [options]."""
    parser = _parser()
    if {"-h", "--help"} & set(argv):
        print(_help(parser))
        return 0
    args, extras = parser.parse_known_args(argv)
    overrides = split_overrides(extras, parser.prog)
    _check(args, parser)
    from nemojax.config import apply_overrides, from_dict
    from nemojax.generate import batch

    overrides += [
        f"{path}={getattr(args, name)}" for name, path in SHORT.items() if getattr(args, name) is not None
    ]
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


def _parser() -> Parser:
    parser = Parser(
        prog="nemojax generate",
        usage="nemojax generate ARTIFACT (--prompt=TEXT | --prompts=FILE.jsonl --out=FILE.jsonl) [options]",
        description="Complete one prompt, or a file of prompts; run again to resume.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="artifact or work directory of a stage")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what the user says; the answer goes to standard output")
    what.add_argument(
        "--prompts", metavar="FILE", help='rows {"prompt": text} or {"messages": [...]}, id, sampling fields'
    )
    parser.add_argument("--out", metavar="FILE", help="with --prompts: the rows to write (JSONL)")
    parser.add_argument("--raw", action="store_true", help="with --prompt: continue the text, no chat")
    parser.add_argument("--thinking", choices=("on", "off", "none"), help="toggle in a chat's system text")
    parser.add_argument("--temperature", help="divides the logits; 0 is greedy")
    parser.add_argument("--max_new_tokens", help="tokens generated at most")
    parser.add_argument("--n", help="samples of each prompt")
    parser.add_argument("--seed", help="seed of the sampler")
    parser.add_argument("--logprobs", action="store_true", help="with --prompts: write them too (nats)")
    return parser


def _check(args: argparse.Namespace, parser: Parser) -> None:
    with_file = args.prompts is not None
    if with_file and args.out is None:
        parser.error("--prompts needs --out=FILE.jsonl, where the answers go")
    if args.raw and args.thinking is not None:
        parser.error("--thinking goes with a chat, not with --raw")
    for name, wrong in (("out", not with_file), ("logprobs", not with_file), ("raw", with_file)):
        if wrong and getattr(args, name):
            parser.error(f"--{name} goes with --prompt{'s' * (not with_file)}")


def _help(parser: Parser) -> str:
    from nemojax.config import describe
    from nemojax.generate.batch import GenerateConfig

    rows = describe(GenerateConfig)
    left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"  {name:<{left}}  {default:<{middle}}  {doc}" for name, default, doc in rows]
    return "\n".join([parser.format_help(), "fields (--config.NAME=VALUE):", *lines])
