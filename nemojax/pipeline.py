"""A whole pipeline in one file and one directory: stages that meet only through their work directories.

A recipe's `get_config()` returns {"stages": {name: {"kind": ..., "config": {...}}}}; `kind` may be left
out where it is the name. In a string, `@name` stands for the work directory of stage `name`, `@name/x` for
something in it, `@.` for the pipeline's own directory. These references decide the order of the stages.
`--config.NAME.a.b=value` overrides a field of one stage.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemojax import config, stage
from nemojax.buckets import (
    MOVED,
    check_bucket,
    clear_unfinished,
    is_bucket,
    is_unfinished,
    normal,
    remove_tree,
)
from nemojax.commands import STAGES, Parser, split_overrides, summary_line
from nemojax.config import field, required

REPLACED = "replaced"
EXPORTED = ".nemojax.json"  # in a directory that a pipeline exported: of which configuration and inputs
_REFERENCE = re.compile(r"@(\.|[\w-]+)(/.*)?", re.DOTALL)


@dataclass(frozen=True)
class ExportConfig:
    """Configuration of a stage of kind `export`."""

    artifact: str = required("artifact to export")
    format: Literal["auto", "llama", "decilm", "anymodel"] = field("auto", "auto: plain Llama if it can be")


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline. `needs`: stages it refers to. `config` still holds the references."""

    name: str
    kind: str
    config: Mapping[str, Any]
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """Which stages to run. `first` starts there, with the earlier ones as they are; `only` runs that one;
    `force` runs the selected ones again, though they are done."""

    first: str | None = None
    only: str | None = None
    force: bool = False


def load(path: str | os.PathLike, overrides: Iterable[str] = ()) -> list[Step]:
    """The stages of a recipe in the order they run; ValueError for an unknown kind, reference or cycle."""
    values = config.load_file(str(path))
    if not isinstance(values.get("stages"), dict) or not values["stages"]:
        raise ValueError(f"{path}: expected a section `stages`, got none; this is not a pipeline")
    if extra := sorted(set(values) - {"stages"}):
        raise ValueError(f"{path}: {extra[0]}: unknown key; a pipeline has only `stages`")
    names = list(values["stages"])
    values = config.apply_overrides(values, [_stage_override(item, names) for item in overrides])
    steps = [_step(name, entry, names) for name, entry in values["stages"].items()]
    return _ordered(steps)


def run(steps: Sequence[Step], workdir: str | os.PathLike, select: Selection = Selection()) -> dict[str, Any]:
    """Runs the stages in turn and returns {name: result}.

    A stage that is done is skipped, a half-done one resumed; one whose configuration or inputs have changed
    is moved to `replaced/` and run afresh. An error names its stage.
    """
    from nemojax import hosts  # jax takes a second to load

    hosts.expect_one_process("run")
    root = normal(workdir)
    check_bucket(root)
    chosen = _chosen(steps, select)
    for step in steps:  # every configuration is checked before the first stage starts
        resolve(step, root)
        if step.kind == "export" and step.name in chosen:
            _read_exported(root / step.name)
    _claim(root)
    with stage.locked(root):
        return _run_all(steps, root, chosen, select)


def _run_all(steps: Sequence[Step], root: Path, chosen: Sequence[str], select: Selection) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for step in steps:
        if step.name in chosen:
            results[step.name] = _run_step(step, root, select.force)
        elif _state(step, root) != "done":
            if any(step.name in s.needs for s in steps if s.name in chosen):
                raise ValueError(f"{step.name}: not done, and {', '.join(chosen)} needs it; run it first")
        else:
            results[step.name] = stage.read_result(state_dir(step, root))
    return results


def resolve(step: Step, root: Path) -> Any:
    """The stage's configuration, a dataclass, with references replaced by paths below `root`."""

    def paths(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: paths(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [paths(v) for v in value]
        if isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
            return str(root / match[1]) + (match[2] or "")
        return value

    cls, _ = _implementation(step.kind)
    return config.from_dict(cls, paths(step.config), f"{step.name}.")


def state_dir(step: Step, root: Path) -> Path:
    """Where a stage keeps its books. What `export` makes is a plain HF directory, so its lie beside it."""
    return root / (f".{step.name}" if step.kind == "export" else step.name)


def command(args: list[str]) -> None:
    """`nemojax run --config=FILE --workdir=DIR [--from=STAGE | --only=STAGE] [--force] [--dry_run]`."""
    parser = _parser()
    if {"-h", "--help"} & set(args):
        print(f"{parser.format_help()}\n{__doc__}")
        return
    known, extras = parser.parse_known_args(args)
    steps = load(known.config, split_overrides(extras, parser.prog))
    select = Selection(known.first, known.only, known.force)
    root = normal(known.workdir)
    check_bucket(root)
    if known.dry_run:
        _print_plan(steps, root, _chosen(steps, select), configurations=True)
        return
    _check_root(root)
    _print_plan(steps, root, _chosen(steps, select))
    run(steps, root, select)


def _parser() -> Parser:
    parser = Parser(prog="nemojax run", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the pipeline's recipe, a Python file")
    parser.add_argument("--workdir", required=True, help="its directory; each stage has its own in it")
    parser.add_argument(
        "--from", dest="first", metavar="STAGE", help="start there; earlier ones must be done"
    )
    parser.add_argument("--only", metavar="STAGE", help="run this one; those it needs must be done")
    parser.add_argument("--force", action="store_true", help="run again what is done (kept in replaced/)")
    parser.add_argument("--dry_run", action="store_true", help="print configuration and plan; write nothing")
    return parser


def _implementation(kind: str) -> tuple[type, Callable[[Any, Path], dict[str, Any]]]:
    if kind == "export":
        return ExportConfig, _run_export
    module = importlib.import_module(STAGES[kind][0])
    return module.Config, module.run


def _run_export(cfg: ExportConfig, workdir: Path) -> dict[str, Any]:
    """Exports to the sibling of `workdir` without the leading dot.

    It is made inside `workdir` and renamed when it is whole, so that what stands in its place is all of one
    export; in a bucket it is made in its place, and unfinished until it is whole. Its mark says which export
    it is: after a kill between that and DONE it is not made again.
    """
    target = workdir.with_name(workdir.name.removeprefix("."))
    if _read_exported(target) is None:
        (workdir / stage.DONE).unlink(missing_ok=True)  # somebody has taken it away

    def body(_: Path) -> dict[str, Any]:
        record = stage.read_json(workdir / stage.CONFIG)
        assert record is not None  # run_stage has just written it
        fingerprint = record["fingerprint"]
        if found := _read_exported(target):
            if found["fingerprint"] == fingerprint:
                return found["result"]
            raise stage.OtherRun(f"{target}: exported from another configuration or other inputs")
        from nemojax.checkpoints.hf import Exported, export_hf

        result: dict[str, Any] = {}

        def mark(written: Path, done: Exported) -> None:
            result.update(path=target.name, format=done.format, tensors=done.num_tensors, bytes=done.size)
            stage.write_json(written / EXPORTED, {"fingerprint": fingerprint, "result": result})

        for left in workdir.glob("*made*"):  # by a kill
            remove_tree(left)
        made = target if is_bucket(target) else workdir / "made"
        export_hf(cfg.artifact, made, format=cfg.format, finish=mark)
        if made != target:
            made.rename(target)
        return result

    return stage.run_stage("export", cfg, workdir, [cfg.artifact], body)


def _read_exported(target: Path) -> dict[str, Any] | None:
    """The mark in an exported directory, None where nothing stands, or what is unfinished; ValueError if
    something else does."""
    if not target.exists() or is_unfinished(target) or (target.is_dir() and not any(target.iterdir())):
        return None
    mark = stage.read_json(target / EXPORTED)
    if mark is None:
        raise ValueError(
            f"{target}: expected nothing, or what this pipeline exported, got something else; move it away"
        )
    return mark


def _run_step(step: Step, root: Path, force: bool) -> dict[str, Any]:
    cfg, workdir = resolve(step, root), state_dir(step, root)
    _, run_stage = _implementation(step.kind)
    clear_unfinished(workdir, MOVED)  # before what a kill has left of it is moved again
    before = _state(step, root)
    if force and before != "new":
        _move_aside(step, root)
    start = time.perf_counter()
    try:
        try:
            result = run_stage(cfg, workdir)
        except stage.OtherRun:
            moved = _move_aside(step, root)
            print(f"{step.name}: configuration or inputs have changed; the old one is in {moved}", flush=True)
            result = run_stage(cfg, workdir)
            before = "new"
    except Exception as error:
        error.add_note(f"stage {step.name}")
        raise
    seconds = time.perf_counter() - start
    skipped = before == "done" and not force
    print(summary_line(step.name, result, "done before" if skipped else f"{seconds:.1f} s"), flush=True)
    return result


def _move_aside(step: Step, root: Path) -> Path:
    """Moves a stage's directory to `replaced/`, and what an export made with it; returns where that went."""
    moved = stage.move_aside(state_dir(step, root), root / REPLACED)
    made = root / step.name
    if step.kind == "export" and made.exists() and not is_unfinished(made):
        moved = stage.move_aside(made, root / REPLACED)
        (moved / stage.LOCK).unlink(missing_ok=True)  # there is none in a bucket
    return moved


def _stage_override(item: str, names: Sequence[str]) -> str:
    name, dot, rest = item.partition(".")
    if name == "stages":
        return item
    if not dot or name not in names:
        raise ValueError(f"--config.{item}: no stage {name!r}{_nearest(name, names)}")
    return f"stages.{name}.config.{rest}"


def _step(name: str, entry: Any, names: Sequence[str]) -> Step:
    if not isinstance(entry, dict) or (set(entry) - {"kind", "config"}):
        raise ValueError(f"stages.{name}: expected `kind` and `config`, got {entry!r}")
    if name not in names:
        raise ValueError(f"stages.{name}: no such stage{_nearest(name, names)}")
    if not re.fullmatch(r"\w[\w-]*", name) or name == REPLACED:
        raise ValueError(
            f"stages.{name}: expected a name of letters, digits, - and _ ({REPLACED!r} is taken)"
        )
    kind = entry.get("kind", name)
    if kind not in (kinds := [*STAGES, "export"]):
        raise ValueError(f"stages.{name}.kind: unknown kind {kind!r}{_nearest(kind, kinds)}")
    needs = tuple(dict.fromkeys(_references(entry.get("config", {}))))
    if unknown := [n for n in needs if n not in (*names, ".")]:
        raise ValueError(f"stages.{name}: @{unknown[0]}: no such stage{_nearest(unknown[0], names)}")
    return Step(name, kind, entry.get("config", {}), needs)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = value.values()
    elif isinstance(value, str):
        if match := _REFERENCE.fullmatch(value):
            yield match[1]
        return
    elif not isinstance(value, list | tuple):
        return
    for child in value:
        yield from _references(child)


def _ordered(steps: list[Step]) -> list[Step]:
    """Each stage after those it needs, otherwise as listed; what refers to `@.` needs all that do not."""
    plain = [s.name for s in steps if "." not in s.needs]
    waiting = [
        Step(s.name, s.kind, s.config, (*plain, *s.needs) if "." in s.needs else s.needs) for s in steps
    ]
    ordered: list[Step] = []
    while waiting:
        done = {s.name for s in ordered} | {"."}
        ready = next((s for s in waiting if set(s.needs) <= done), None)
        if ready is None:
            raise ValueError(
                f"stages {', '.join(s.name for s in waiting)}: each needs another one of them first"
            )
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def _chosen(steps: Sequence[Step], select: Selection) -> list[str]:
    names = [s.name for s in steps]
    if select.first and select.only:
        raise ValueError("--from and --only: expected one of them, got both")
    for wanted in (select.first, select.only):
        if wanted and wanted not in names:
            raise ValueError(f"no stage {wanted!r}{_nearest(wanted, names)}")
    if select.only:
        return [select.only]
    return names[names.index(select.first) :] if select.first else names


def _state(step: Step, root: Path) -> str:
    """`done`, `half done` or `new`, by what lies in the directory."""
    directory = state_dir(step, root)
    made = root / step.name
    taken_away = step.kind == "export" and (is_unfinished(made) or not made.exists())
    if stage.read_done(directory) and not taken_away:
        return "done"
    return "half done" if (directory / stage.CONFIG).is_file() else "new"


def _check_root(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root}: expected a directory, got a file; choose another --workdir")
    if root.is_dir() and any(root.iterdir()) and not (root / stage.PIPELINE).is_file():
        raise ValueError(f"{root}: expected an empty directory or a pipeline's; choose another --workdir")


def _claim(root: Path) -> None:
    _check_root(root)
    root.mkdir(parents=True, exist_ok=True)
    if not (root / stage.PIPELINE).is_file():
        stage.write_json(root / stage.PIPELINE, {"format_version": stage.FORMAT_VERSION})


def _print_plan(
    steps: Sequence[Step], root: Path, chosen: Sequence[str], configurations: bool = False
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "kind", "needs", "state", "plan", title=f"pipeline in {root}")
    for step in steps:
        needs = "all" if "." in step.needs else ", ".join(step.needs)
        resolved = config.to_dict(resolve(step, root))
        if configurations:
            print(f"{step.name} = {json.dumps(resolved, indent=2)}")
        state = _state(step, root)
        plan = {"new": "run", "half done": "resume", "done": "skip if unchanged"}[state]
        table.add_row(step.name, step.kind, needs, state, plan if step.name in chosen else "leave")
    Console().print(table)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
