"""Bodies of requests, checked; what is wrong with one in one line."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError

from nemojax.serve.errors import ApiError

Request = TypeVar("Request", bound=BaseModel)
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
    places = [_path(one, data) for one in found[:_MAX_ERRORS]]
    # of a union, each member says what it would have taken; who came furthest was meant
    field = places[0].partition(".")[0]
    path = max((place for place in places if place.partition(".")[0] == field), key=lambda p: p.count("."))
    here = [one for one, place in zip(found, places, strict=False) if place == path]
    first = next((one for one in here if one["type"] not in ("missing", "extra_forbidden")), here[0])
    message = " or ".join(dict.fromkeys(_wish(one) for one in here if one["type"] == first["type"]))
    message = message.replace(" or expected", " or")
    match first["type"]:
        case "missing":
            message = "expected a value, got none"
        case "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), list(cls.model_fields), n=1, cutoff=0.6)
            message = "unknown field; " + (f"did you mean {near[0]!r}?" if near else "leave it out")
        case "value_error":
            path = path or (
                message.partition(":")[0] if message.partition(":")[0] in cls.model_fields else ""
            )
        case _:
            message += f", got {first['input']!r:.60}"
    return ApiError(
        400,
        message if message.startswith(f"{path}:") else f"{path}: {message}".lstrip(": "),
        param=path or None,
    )


def _wish(error: Any) -> str:
    """What a checker expected, in the words of our other errors."""
    if error["type"].startswith("union_tag"):
        return (
            f"expected {error['ctx']['discriminator']} to be one of {error['ctx'].get('expected_tags', '')}"
        )
    text = error["msg"].removeprefix("Value error, ").partition(" after validation")[0]
    return re.sub(r"^(Input|List|String|Dictionary|Value) should (be|have|match)", "expected", text)


def _path(error: Any, data: Any) -> str:
    """messages.0.content: the place in the body, without the names that the checker gives to alternatives."""
    kept: list[str] = []
    for i, part in enumerate(error["loc"]):
        inside = isinstance(data, dict) and part in data
        if inside or isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
            kept.append(str(part))
        elif error["type"] == "missing" and i == len(error["loc"]) - 1:
            kept.append(str(part))
    return ".".join(kept)
