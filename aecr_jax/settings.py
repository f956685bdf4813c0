"""Checks the values of settings against the annotations of their dataclass, which Python itself does not do."""

from __future__ import annotations

import sys
from typing import Any, Literal, get_args, get_origin, get_type_hints

_WORDS = {bool: "True or False", int: "an integer", float: "a finite number", str: "a string"}


def check_types(settings: Any) -> None:
    """Check that each field of a dataclass has a value of its annotated type.

    Fields may be `bool`, `int`, `float` (finite; integers count too), `str`, a `Literal`, or a tuple of these. No value is converted:
    the string "False" is true in Python, so it must not pass for a bool.

    Raises:
      ValueError: a value has another type; the message names the field, the value and what would be right.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _fits(value, kind):
            raise ValueError(f"{name} (={value!r}) must be {_describe(kind)}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:
        # An integer may be too large for a float.
        return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
    return type(value) is kind


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"({', '.join(map(_describe, get_args(kind)))})"
    return _WORDS.get(kind, f"a {kind.__name__}")
