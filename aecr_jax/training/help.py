"""The help text of `train`: all settings with types, defaults and docstrings, read from the source code without importing JAX."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PACKAGE = Path(__file__).parents[1]
_USAGE = """usage: python train.py --config FILE[:NAME] [--SECTION.KEY VALUE ...]

Trains a network, or resumes the run in run.workdir. FILE is a Python file such as configs/its.py; NAME is one of its configs if it has
several (configs/table2.py:base_dfe). Every setting can be given as --SECTION.KEY VALUE."""


class _Setting(NamedTuple):
    name: str
    kind: str
    default: str
    text: str


def settings_help() -> str:
    """Return the help text."""
    lines = [_USAGE]
    for group, file, name in (
        ("data", "data/sources.py", "DataConfig"),
        ("haze", "data/haze.py", "HazeConfig"),
        ("loss", "training/config.py", "LossConfig"),
        ("optim", "training/config.py", "OptimConfig"),
        ("run", "training/config.py", "RunConfig"),
    ):
        lines += _section(group, _class(file, name))
    common = _class("networks/network.py", "NetworkConfig")
    lines += ["", "model.name selects the network, and with it the other settings of the model."]
    lines += _section("model", common, "every network")
    for path in sorted((_PACKAGE / "networks").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and (network := _network_name(node)):
                lines += _section("model", node, f"--model.name {network}")
    return "\n".join(lines)


def _class(file: str, name: str) -> ast.ClassDef:
    tree = ast.parse((_PACKAGE / file).read_text())
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _network_name(node: ast.ClassDef) -> str:
    """Return the NAME that a network's config class sets, or an empty string for other classes."""
    for item in node.body:
        if isinstance(item, ast.Assign) and getattr(item.targets[0], "id", "") == "NAME":
            return str(ast.literal_eval(item.value))
    return ""


def _section(group: str, node: ast.ClassDef, title: str = "") -> list[str]:
    lines = ["", f"{title or group}:"]
    for setting in _settings(node):
        lines.append(f"  --{group}.{setting.name} {setting.kind}  (default {setting.default})")
        lines += textwrap.wrap(setting.text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _settings(node: ast.ClassDef) -> Iterator[_Setting]:
    for item, after in zip(node.body, [*node.body[1:], None]):
        if not isinstance(item, ast.AnnAssign) or item.value is None or not isinstance(item.target, ast.Name):
            continue
        kind = ast.unparse(item.annotation)
        if kind.startswith("ClassVar"):
            continue
        # The default is the value, or the first argument of bounded(...).
        value = item.value.args[0] if isinstance(item.value, ast.Call) else item.value
        text = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else ""
        default = ast.unparse(value)
        if kind.startswith("tuple["):  # as on the command line, with commas only
            shown = kind.removeprefix("tuple[").removesuffix("]").replace(" ", "").upper()
            default = default.strip("()").replace(" ", "").replace("'", "")
        elif kind.startswith("Literal["):
            shown = kind.removeprefix("Literal[").removesuffix("]").replace("'", "").replace(", ", "|")
        else:
            shown = kind.upper()
        yield _Setting(item.target.id, shown, default, " ".join(str(text).split()))
