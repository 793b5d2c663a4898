"""The command line: a literal table of commands, so that `nemojax --help` imports nothing heavy.

Every command wraps one Python call. A stage is `module.run(module.Config(...), workdir)`.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

# command -> (module, summary). A stage's module has a dataclass `Config` and `run(cfg, workdir)`.
STAGES = {
    "tokenizer": ("nemojax.data.tokenizer", "train a byte-level BPE tokenizer on a text source"),
    "pretrain": ("nemojax.pretrain", "train a model from scratch, or go on training one"),
    "compress": ("nemojax.compress.run", "score a parent's blocks and search the best child for a budget"),
    "distill": ("nemojax.distill.distill", "heal a child against its parent"),
    "sft": ("nemojax.sft", "fine-tune on conversations, reasoning on and off"),
    "rl": ("nemojax.rl.grpo", "reinforce on tasks whose answers can be checked (GRPO)"),
    "evaluate": ("nemojax.evaluate.run", "held-out loss, and pass@1 with thinking on and off"),
    "report": ("nemojax.report.page", "one self-contained page about a pipeline's results"),
}
# command -> (module, function, summary). The function takes the remaining arguments.
OTHERS = {
    "import": ("nemojax.checkpoints.commands", "import_command", "HF directory or hub name -> artifact"),
    "export": ("nemojax.checkpoints.commands", "export_command", "artifact -> HF directory"),
    "run": ("nemojax.pipeline", "command", "run a whole pipeline of stages"),
}
ORDER = ("import", *STAGES, "export", "run")

STAGE_USAGE = "nemojax {} [--config=FILE.py] --workdir=DIR [--config.a.b=value ...]"
EPILOG = """\
nemojax COMMAND --help lists a command's fields with their defaults and units.
Exit codes: 0 done; 2 bad input, one line says what; 75 stopped by SIGTERM, run again to resume.
NEMOJAX_TRACEBACK=1 adds the traceback to an error."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ValueErrors, so that every command reports them alike."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(args)
        return 0
    except KeyboardInterrupt:
        print("nemojax: interrupted; run again to resume", file=sys.stderr)
        return 130
    except Exception as error:
        line = user_message(error)
        if line is None:
            raise
        if os.environ.get("NEMOJAX_TRACEBACK"):
            traceback.print_exc()
        print(f"nemojax: {line}", file=sys.stderr)
        return 2


def user_message(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for a bug of ours, which keeps its traceback."""
    text = " ".join(str(error).split())
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    # Checkpoint libraries wrap the operating system's error in types of their own.
    if full or "No space left on device" in text or "Disk quota exceeded" in text:
        return f"disk full: {text}; free some space and run again to resume"
    if isinstance(error, ValueError | OSError):
        return text or type(error).__name__
    return None


def split_overrides(extras: Sequence[str], prog: str) -> list[str]:
    """["--config.a.b=1"] -> ["a.b=1"]; ValueError for anything else."""
    overrides = []
    for extra in extras:
        if not extra.startswith("--config."):
            raise ValueError(f"{prog}: unknown argument {extra!r}; fields are set by --config.NAME=VALUE")
        if "=" not in extra:
            raise ValueError(f"{prog}: {extra}: expected {extra}=VALUE, got no value")
        overrides.append(extra.removeprefix("--config."))
    return overrides


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
    elif args[0] == "--version":
        from nemojax import __version__

        print(__version__)
    elif args[0] in STAGES:
        _stage(args[0], args[1:])
    elif args[0] in OTHERS:
        module, function, _ = OTHERS[args[0]]
        getattr(importlib.import_module(module), function)(args[1:])
    else:
        near = difflib.get_close_matches(args[0], ORDER, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"commands are {', '.join(ORDER)}"
        raise ValueError(f"unknown command {args[0]!r}; {hint}")


def _overview() -> str:
    lines = ["usage: nemojax COMMAND [arguments]", "", "commands:"]
    lines += [f"  {name:<10} {({**STAGES, **OTHERS}[name])[-1]}" for name in ORDER]
    return "\n".join([*lines, "", EPILOG])


def _stage(name: str, args: list[str]) -> None:
    module_name, summary = STAGES[name]
    if {"-h", "--help"} & set(args):
        print(stage_help(name, summary, importlib.import_module(module_name).Config))
        return
    parser = Parser(prog=f"nemojax {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--profile_steps")
    known, extras = parser.parse_known_args(args)
    overrides = split_overrides(extras, parser.prog)

    from nemojax import config

    values = config.load_file(known.config) if known.config else {}
    if "stages" in values:
        raise ValueError(f"{known.config}: a pipeline, not a {name} configuration; use `nemojax run`")
    module = importlib.import_module(module_name)
    if known.profile_steps:
        overrides.append(f"{_profile_field(module.Config, parser.prog)}={known.profile_steps}")
    cfg = config.from_dict(module.Config, config.apply_overrides(values, overrides))
    print(summary_line(name, module.run(cfg, known.workdir), known.workdir))


def _profile_field(cls: type, prog: str) -> str:
    """The dotted name of the field that --profile_steps=FIRST:LAST is short for."""
    from nemojax.config import describe

    names = [name for name, _, _ in describe(cls) if name.split(".")[-1] == "profile_steps"]
    if len(names) != 1:
        raise ValueError(f"{prog}: --profile_steps: this command does not train one model; nothing to trace")
    return names[0]


def stage_help(name: str, summary: str, cls: type) -> str:
    """The fields of a stage's configuration, one a line: name, default, meaning and unit."""
    from nemojax.config import describe

    rows = describe(cls)
    left = max((len(row[0]) for row in rows), default=0)
    middle = min(24, max((len(row[1]) for row in rows), default=0))
    lines = [f"usage: {STAGE_USAGE.format(name)}", "", f"{summary}.", "", "fields (--config.NAME=VALUE):"]
    lines += [f"  {field:<{left}}  {default:<{middle}}  {doc}".rstrip() for field, default, doc in rows]
    return "\n".join(lines)


def summary_line(name: str, result: Any, workdir: str | os.PathLike) -> str:
    """What a command prints last: the work directory and the scalar results."""
    items = result.items() if isinstance(result, dict) else ()
    numbers = [f"{k}={v:.5g}" for k, v in items if isinstance(v, int | float) and not isinstance(v, bool)]
    return " ".join([f"{name}: {workdir}", *numbers[:8]])


if __name__ == "__main__":
    sys.exit(main())
