"""JSON as typed records: the record's type says what a file holds, an error where the file departs from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any


class Misfit(ValueError):
    """A value that is not of its type; the message is one line that names the place, the value and the type."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place or 'the file'} {problem}")
        self.place = place


def load(kind: Any, value: Any, place: str = "") -> Any:
    """A JSON value as an instance of a type.

    Args:
        kind: str, int, float (of which `"inf"` is one), bool, None, Any, a Literal, a union, tuple[...], list[X],
            dict[str, X], a dataclass (which has no other keys), or a TypedDict (which may have others).
        value: as `json.loads` returns it.
        place: of the value in its file, as `cases[0].batch`.

    Raises:
        Misfit: it is none.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(inner, value, place)
    if origin is typing.Literal:
        if any(type(value) is type(choice) and value == choice for choice in inner):
            return value
    elif origin in (tuple, list) and isinstance(value, list):
        if origin is list or inner[-1] is Ellipsis:
            return origin(load(inner[0], one, f"{place}[{i}]") for i, one in enumerate(value))
        if len(value) == len(inner):
            return tuple(load(one, value[i], f"{place}[{i}]") for i, one in enumerate(inner))
    elif origin is dict and isinstance(value, dict):
        return {key: load(inner[1], one, _inside(place, key)) for key, one in value.items()}
    elif _is_object(kind) and isinstance(value, dict):
        return _object(kind, value, place)
    elif kind is float and (value == "inf" or type(value) in (int, float) and math.isfinite(value)):
        return float(value)
    elif value is None if kind is types.NoneType else type(value) is kind and kind is not float:
        return value
    raise Misfit(place, f"is {_short(value)}, not {_name(kind)}")


def to_json(record: Any) -> Any:
    """A dataclass as JSON-ready values: what `load` reads."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: "inf" if value == math.inf else value for name, value in found}

    return dataclasses.asdict(record, dict_factory=pairs)


def _object(kind: Any, value: dict[str, Any], place: str) -> Any:
    hints, record = _hints(kind), dataclasses.is_dataclass(kind)
    if record:
        fields = dataclasses.fields(kind)
        required = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
        for name in value.keys() - hints.keys():
            raise Misfit(_inside(place, name), f"is unknown; there are {', '.join(hints)}")
    else:
        required = kind.__required_keys__
    for name in hints:
        if name in required and name not in value:
            raise Misfit(_inside(place, name), "is missing")
    found = {name: load(hints[name], value[name], _inside(place, name)) for name in hints if name in value}
    return kind(**found) if record else {**value, **found}


def _one_of(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    problems = []
    for kind in kinds:
        try:
            return load(kind, value, place)
        except Misfit as problem:
            problems.append(problem)
    closest = max(problems, key=lambda problem: len(problem.place))
    if closest.place != place:
        raise closest
    raise Misfit(place, f"is {_short(value)}, not {' or '.join(dict.fromkeys(map(_name, kinds)))}")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _is_object(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _name(kind: Any) -> str:
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, inner))
    if typing.get_origin(kind) is tuple and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)}"
    if typing.get_origin(kind) in (tuple, list):
        return "a list"
    if _is_object(kind) or typing.get_origin(kind) is dict:
        return "an object"
    return "null" if kind is types.NoneType else str(kind.__name__)
