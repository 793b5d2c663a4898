"""Configuration: frozen dataclasses are the type, `ml_collections.ConfigDict` is the transport.

A recipe is a Python file with `get_config()`; `--config.a.b=value` overrides it. Whatever the road, the
values end in `from_dict`, which names the nearest key when one is unknown and says what was expected
when a value has the wrong type.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import runpy
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def field(default: Any, doc: str) -> Any:
    """A dataclass field with its one-line description (say the unit) for `nemojax COMMAND --help`."""
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        return dataclasses.field(default_factory=lambda: default, metadata={"doc": doc})
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


def required(doc: str) -> Any:
    """A dataclass field that has no default."""
    return dataclasses.field(metadata={"doc": doc})


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "", base: T | None = None) -> T:
    """The dataclass `cls` from a nested mapping; ValueError for an unknown, missing or mistyped key.

    What is not given is as in `base`, else as the class has it by default: a section that is given in part
    keeps the rest of what its field has.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in fields:
            raise ValueError(f"{where}{key}: unknown key{_nearest(key, fields)}")
    out: dict[str, Any] = {}
    for name, spec in fields.items():
        default = _default(spec) if base is None else getattr(base, name)
        if name in values:
            out[name] = _convert(hints[name], values[name], f"{where}{name}", default)
        elif base is not None:
            out[name] = default
        elif _is_required(spec):
            raise ValueError(f"{where}{name}: expected a value, got none; set it in the configuration")
    try:
        return cls(**out)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def to_dict(value: Any) -> Any:
    """Plain dicts, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def apply_overrides(config: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of the nested dict with `a.b=value` assignments applied; values are Python literals or text."""
    config = to_dict(config)
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"override {item!r}: expected a.b=value")
        *parents, last = path.split(".")
        node = config
        for depth, parent in enumerate(parents):
            if not isinstance(node, dict):
                raise ValueError(f"override {item!r}: {'.'.join(parents[:depth])} is not a section")
            node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"override {item!r}: {'.'.join(parents)} is not a section")
        node[last] = _literal(text)
    return config


def find_file(path: str | Path) -> Path:
    """A recipe's path; a name such as `quickstart` or `configs/quickstart.py` also finds a shipped one."""
    path = Path(path)
    if path.is_file():
        return path
    relative = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    shipped = configs_dir() / relative.with_suffix(".py")
    if not shipped.is_file():
        names = sorted(str(p.relative_to(configs_dir())) for p in configs_dir().rglob("*.py"))
        raise ValueError(f"{path}: no such configuration file{_nearest(str(relative), names)}")
    return shipped


def load_file(path: str | Path) -> dict[str, Any]:
    """The nested dict that a recipe's `get_config()` returns (a ConfigDict or a dict).

    `recipe.py:small,seed=1` passes what follows the colon to it.
    """
    name, colon, argument = str(path).rpartition(":")
    if not colon or Path(path).is_file():
        name, argument = str(path), ""
    found = find_file(name)
    try:
        make = runpy.run_path(str(found)).get("get_config")
        if make is None:
            raise ValueError("expected a function get_config(), got none")
        config = make(argument) if argument else make()
    except SyntaxError as error:
        raise ValueError(f"{found}:{error.lineno}: not valid Python ({error.msg})") from error
    except Exception as error:  # a recipe is the user's program: whatever it raises is theirs to mend
        raise ValueError(f"{found}: {type(error).__name__}: {error}") from error
    return to_dict(config.to_dict() if hasattr(config, "to_dict") else config)


def configs_dir() -> Path:
    """Recipes and architectures: inside an installed package, beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def describe(cls: type, prefix: str = "", instance: Any = None) -> list[tuple[str, str, str]]:
    """(dotted name, default as text, description) of every field, nested dataclasses unfolded.

    `instance`: the defaults, where they are not those of the class.
    """
    rows: list[tuple[str, str, str]] = []
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        name, kind = prefix + spec.name, hints[spec.name]
        default = _default(spec) if instance is None else getattr(instance, spec.name)
        if dataclasses.is_dataclass(kind):
            given = default if isinstance(default, typing.cast(type, kind)) else None
            rows += describe(typing.cast(type, kind), name + ".", given)
            continue
        is_required = instance is None and _is_required(spec)
        rows.append(
            (name, "required" if is_required else repr(to_dict(default)), spec.metadata.get("doc", ""))
        )
    return rows


def field_lines(cls: type) -> list[str]:
    """The fields of a configuration for people, one a line: name, default, meaning and unit."""
    rows = describe(cls)
    left = max((len(name) for name, _, _ in rows), default=0)
    middle = min(24, max((len(default) for _, default, _ in rows), default=0))
    lines = [f"  {name:<{left}}  {default:<{middle}}  {doc}".rstrip() for name, default, doc in rows]
    return ["fields (--config.NAME=VALUE):", *lines]


def _is_required(spec: dataclasses.Field) -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def _default(spec: dataclasses.Field) -> Any:
    """A field's default; None where it has none."""
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return None if spec.default is dataclasses.MISSING else spec.default


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "null": None, "none": None}.get(text.lower(), text)


def _nearest(key: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    if match:
        return f"; did you mean {match[0]!r}?"
    return f"; known ones are {', '.join(known)}"


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: expected one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _first_that_fits([a for a in args if a is not type(None)], value, where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a section, got {value!r}")
        base = default if isinstance(default, typing.cast(type, hint)) else None
        return from_dict(typing.cast(type, hint), value, where + ".", base)
    if origin in (tuple, list):
        return _convert_sequence(origin, args, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a section, got {value!r}")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_sequence(origin: type, args: tuple, value: Any, where: str) -> Any:
    if isinstance(value, str | int | float) and not dataclasses.is_dataclass(args[0]):
        value = [value]  # on a command line `x` is easier to write than a list of one
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: expected a list, got {value!r}")
    if origin is tuple and (len(args) != 2 or args[1] is not Ellipsis):
        if len(args) != len(value):
            raise ValueError(f"{where}: expected {len(args)} values, got {len(value)}")
        return tuple(_convert(a, v, f"{where}.{i}") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    return origin(_convert(args[0], v, f"{where}.{i}") for i, v in enumerate(value))


def _first_that_fits(hints: list[Any], value: Any, where: str) -> Any:
    errors = []
    for hint in hints:
        try:
            return _convert(hint, value, where)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
