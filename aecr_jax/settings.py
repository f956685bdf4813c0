"""Settings as dataclass fields with bounds, and a check of their types and values, which dataclasses do not do themselves."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any, Literal, get_args, get_origin, get_type_hints

_WORDS = {bool: "True or False", int: "an integer", float: "a finite number", str: "a string"}


def bounded(default: Any, least: float = -math.inf, most: float = math.inf) -> Any:
    """Return a dataclass field with a default; its value (for a tuple, each element) must lie in [least, most]."""
    return dataclasses.field(default=default, metadata={"least": least, "most": most})


def check_settings(settings: Any) -> None:
    """Check that each field of a dataclass has a value of its annotated type, within its bounds.

    Fields may be `bool`, `int`, `float` (finite; integers count too), `str`, a `Literal`, or a tuple of these; `tuple[str, ...]` has any
    number of elements. Values are not converted: the string "False" is true in Python, so it must not be accepted as a bool.

    Raises:
      ValueError: a value is wrong; the message names the field, its value and what is allowed.
    """
    kinds = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        if not _fits(value, kinds[name]):
            raise ValueError(f"{name} (={value!r}) must be {_describe(kinds[name])}")
        for number in value if isinstance(value, tuple) else (value,):
            if number < (least := field.metadata.get("least", number)):
                raise ValueError(f"{name} (={value}) must be at least {least}")
            if number > (most := field.metadata.get("most", number)):
                raise ValueError(f"{name} (={value}) must be at most {most}")


def parse_value(text: str, kind: Any, name: str) -> Any:
    """Parse the value of a setting from the command line.

    Args:
      text: the value as given.
      kind: the setting's annotation, as for `check_settings`.
      name: what to call the setting in an error.

    Raises:
      ValueError: the text is not a value of that type.
    """
    try:
        if kind is bool:
            return {"True": True, "False": False}[text]
        if get_origin(kind) is Literal:
            return {str(choice): choice for choice in get_args(kind)}[text]
        if get_origin(kind) is tuple:
            parts = text.split(",")
            return tuple(parse_value(part, item, name) for part, item in zip(parts, _element_kinds(kind, len(parts)), strict=True))
        return kind(text)
    except (KeyError, ValueError):
        what = _describe(kind)
        if get_origin(kind) is tuple:
            count = "" if get_args(kind)[-1] is Ellipsis else f"{len(get_args(kind))} "
            what = f"{count}values with commas between them, each {_describe(get_args(kind)[0])}"
        raise ValueError(f"{name} (={text!r}) must be {what}") from None


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) == len(kinds := _element_kinds(kind, len(value))) and all(map(_fits, value, kinds))
    if kind is float:
        # An integer may be too large for a float.
        return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
    return type(value) is kind


def _element_kinds(kind: Any, count: int) -> tuple[Any, ...]:
    """Return the types of the elements of a tuple type; if it allows any number of them, those of `count` elements."""
    kinds = get_args(kind)
    return kinds[:1] * count if kinds[-1] is Ellipsis else kinds


def _describe(kind: Any) -> str:
    if kind is Ellipsis:
        return "..."
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"({', '.join(map(_describe, get_args(kind)))})"
    return _WORDS.get(kind, f"a {kind.__name__}")
