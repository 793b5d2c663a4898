"""Bodies of requests, checked; what is wrong with one in one line."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError

from nemojax.serve.errors import ApiError

Request = TypeVar("Request", bound=BaseModel)
Place = tuple[str, ...]
_MAX_ERRORS = 200  # of one body: no more are looked at


def parse(cls: type[Request], body: bytes) -> Request:
    """The request of a JSON body. ApiError 400 names the first field that is wrong, and how."""
    try:
        return cls.model_validate_json(body)
    except ValidationError as error:
        raise _explain(cls, error, body) from None


def _explain(cls: type[BaseModel], error: ValidationError, body: bytes) -> ApiError:
    found = error.errors(include_url=False)
    if found[0]["type"] == "json_invalid":
        return ApiError(400, f"expected a body of JSON; {found[0]['msg']}", code="invalid_json")
    data = pydantic_core.from_json(body)
    places = [(_path(one, data), one) for one in found[:_MAX_ERRORS]]
    field = places[0][0][:1]
    path = max(_furthest([place for place in places if place[0][:1] == field], data), key=_progress)
    here = [one for place, one in places if place == path]
    first = next((one for one in here if one["type"] not in ("missing", "extra_forbidden")), here[0])
    message = " or ".join(dict.fromkeys(_wish(one) for one in here)).replace(" or expected", " or")
    name = ".".join(path)
    match first["type"]:
        case "missing":
            message = "expected a value, got none"
        case "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), list(cls.model_fields), n=1, cutoff=0.6)
            message = "unknown field; " + (f"did you mean {near[0]!r}?" if near else "leave it out")
        case "value_error":
            name = name or (
                message.partition(":")[0] if message.partition(":")[0] in cls.model_fields else ""
            )
        case _:
            message += f", got {first['input']!r:.60}"
    text = message if not name or message.startswith(f"{name}:") else f"{name}: {message}"
    return ApiError(400, text, param=name or None)


def _furthest(places: list[tuple[Place, Any]], data: Any) -> list[Place]:
    """Where each alternative of the field stopped, or all places if it has but one: what came furthest was
    meant."""
    field = places[0][0][0] if places[0][0] else ""
    value = data.get(field) if isinstance(data, dict) else None
    stops: dict[Any, Place] = {}
    for place, one in places:
        name = one["loc"][1] if len(one["loc"]) > 1 else None
        if not isinstance(name, str) or isinstance(value, dict) and name in value:
            return [place for place, _ in places]
        stops.setdefault(name, place)
    return list(stops.values())


def _progress(place: Place) -> tuple[tuple[int, ...], int]:
    return tuple(int(part) if part.isdigit() else -1 for part in place), len(place)


def _wish(error: Any) -> str:
    """What a checker expected, in the words of our other errors."""
    if error["type"].startswith("union_tag"):
        return (
            f"expected {error['ctx']['discriminator']} to be one of {error['ctx'].get('expected_tags', '')}"
        )
    text = error["msg"].removeprefix("Value error, ").partition(" after validation")[0]
    return re.sub(r"^(Input|List|String|Dictionary|Value) should (be|have|match)", "expected", text)


def _path(error: Any, data: Any) -> Place:
    """The place in the body, without the names that the checker gives to alternatives."""
    kept: list[str] = []
    for i, part in enumerate(error["loc"]):
        inside = isinstance(data, dict) and part in data
        if inside or isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
            kept.append(str(part))
        elif error["type"] == "missing" and i == len(error["loc"]) - 1:
            kept.append(str(part))
    return tuple(kept)
