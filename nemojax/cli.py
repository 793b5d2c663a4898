"""The command line: literal tables of commands, so that `nemojax --help` imports nothing heavy.

Every command wraps one Python call. A stage is `module.run(module.Config(...), workdir)`.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence

from nemojax.backends.startup import ENVIRONMENT
from nemojax.commands import EXIT_PREEMPTED, STAGES, Parser, split_overrides, summary_line

# command -> (module, function, summary). The function takes the remaining arguments.
OTHERS = {
    "import": ("nemojax.checkpoints.commands", "import_command", "HF directory or hub name -> artifact"),
    "search": ("nemojax.compress.commands", "search_command", "best choice of blocks, out of a table"),
    "generate": ("nemojax.generate.commands", "generate_command", "answer a prompt, or a file of prompts"),
    "serve": (
        "nemojax.serve.commands",
        "serve_command",
        "answer OpenAI's clients over HTTP, and a page to chat",
    ),
    "chat": ("nemojax.generate.commands", "chat_command", "a conversation in the terminal"),
    "export": ("nemojax.checkpoints.commands", "export_command", "artifact -> HF directory"),
    "plan": ("nemojax.plan.commands", "plan_command", "whether a step fits a machine, how fast it can be"),
    "run": ("nemojax.pipeline", "command", "run a whole pipeline of stages"),
}
ORDER = ("import", *STAGES, "search", "generate", "serve", "chat", "export", "plan", "run")

PROGRAMS = "NEMOJAX_COMPILATION_CACHE"  # where compiled programs are kept, or "off"
PROGRAMS_BYTES = 10 << 30  # those unused for longest go first

_BUCKET_CLIENTS = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests"}
STAGE_USAGE = "nemojax {} [--config=FILE.py] --workdir=DIR [--config.a.b=value ...]"
EPILOG = """\
nemojax COMMAND --help lists a command's fields with their defaults and units.
Exit codes: 0 done; 2 bad input, one line says what; 75 stopped by SIGTERM, run again to resume.
NEMOJAX_TRACEBACK=1 adds the traceback to an error. Compiled programs are kept in ~/.cache/nemojax/xla;
NEMOJAX_COMPILATION_CACHE=DIR keeps them elsewhere, =off not at all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if argv is None and args and args[0] in (*STAGES, "run", "generate", "serve", "chat"):
        _set_environment()
        _keep_programs()
    try:
        with _preemptible():
            _dispatch(args)
        return 0
    except SystemExit as stop:
        if stop.code == EXIT_PREEMPTED:
            print("nemojax: stopped by SIGTERM; run again to resume", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("nemojax: interrupted; run again to resume", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `nemojax --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell shows for SIGPIPE
    except Exception as error:
        line = user_message(error)
        if line is None:
            raise
        if os.environ.get("NEMOJAX_TRACEBACK"):
            traceback.print_exc()
        print(f"nemojax: {line}", file=sys.stderr)
        return 2


def _set_environment() -> None:
    """What is to be set before start-up, where nobody has; for glibc, this process starts again, once."""
    again = sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if again:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _keep_programs() -> None:
    """Has JAX keep compiled programs from one run to the next; it reads these variables when it is imported.

    Not for processes that share CPU programs, which hold the addresses of one run. What JAX is told by its
    own variables stands.
    """
    several_on_cpus = os.environ.get("JAX_PLATFORMS") == "cpu" and "NEMOJAX_NUM_PROCESSES" in os.environ
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get(PROGRAMS) or os.path.join(cache, "nemojax", "xla")
    if folder == "off" or several_on_cpus:
        return
    try:
        if "://" not in folder:
            os.makedirs(folder, exist_ok=True)
    except OSError as error:
        print(f"nemojax: {folder}: compiled programs are not kept ({error}); set {PROGRAMS}", file=sys.stderr)
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(PROGRAMS_BYTES))


@contextlib.contextmanager
def _preemptible() -> Iterator[None]:
    """SIGTERM ends the process with 75 wherever it is; while training, `fit` saves a checkpoint first."""

    def stop(*_: object) -> None:
        raise SystemExit(EXIT_PREEMPTED)

    try:
        old = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever owns it decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def user_message(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for a bug of ours, which keeps its traceback."""
    stage = "".join(f"{note}: " for note in getattr(error, "__notes__", []) if note.startswith("stage "))
    text = stage + (" ".join(str(error).split()) or type(error).__name__)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    # Checkpoint libraries wrap the operating system's error in types of their own.
    if full or "No space left on device" in text or "Disk quota exceeded" in text:
        return f"disk full: {text}; free some space and run again"
    # what opens buckets has errors of its own: no network, no credentials, no permission
    of_a_bucket = type(error).__module__.partition(".")[0] in _BUCKET_CLIENTS
    if isinstance(error, ValueError | OSError) or of_a_bucket:
        return text
    return None


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
        near = difflib.get_close_matches(args[0], ORDER, n=1, cutoff=0.5)
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
    result = module.run(cfg, known.workdir)
    if text := getattr(module, "table", lambda _: "")(result):
        print(text)
    print(summary_line(name, result, known.workdir))


def _profile_field(cls: type, prog: str) -> str:
    """The dotted name of the field that --profile_steps=FIRST:LAST is short for."""
    from nemojax.config import describe

    names = [name for name, _, _ in describe(cls) if name.split(".")[-1] == "profile_steps"]
    if len(names) != 1:
        raise ValueError(f"{prog}: --profile_steps: this command does not train one model; nothing to trace")
    return names[0]


def stage_help(name: str, summary: str, cls: type) -> str:
    """The fields of a stage's configuration, one a line: name, default, meaning and unit."""
    from nemojax.config import field_lines

    return "\n".join([f"usage: {STAGE_USAGE.format(name)}", "", f"{summary}.", "", *field_lines(cls)])


if __name__ == "__main__":
    sys.exit(main())
