"""The settings of a block against the parameters of a verb: unknown, duplicate and missing ones, types and ranges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..diagnostics import Fix, Label, nearest
from ..source import Span
from . import ast
from .convert import read_value
from .selectors import Scope
from .words import quoted

if TYPE_CHECKING:
    from ..passbase import Param


@dataclass
class Values:
    """Checked values with their places; `whole` is False after an error in them."""

    values: dict[str, object] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    whole: bool = True


def read_settings(items: Iterable[ast.Statement], parameters: tuple[Param, ...], owner: str, scope: Scope) -> Values:
    """The values of the settings among `items`. `owner` is how messages call what takes them: "verb `mask`"."""
    known = {parameter.name: parameter for parameter in parameters}
    found = Values()
    for item in items:
        if not isinstance(item, ast.Setting):
            found.whole = found.whole and not isinstance(item, ast.Broken)
            continue
        key = item.key.text
        names = set(_names(item.value))
        scope.used |= names
        if names & scope.broken - set(scope.given):
            found.whole = False  # rests on a statement that could not be read
            found.spans[key] = item.span
        elif key not in known:
            _unknown(item, known, owner, scope)
            found.whole = False
        elif key in found.spans:
            scope.sink.error("FXC0104", f"`{key}` is set twice", item.key.span, "set again",
                             secondary=(Label(found.spans[key], "first set here"),), help="keep one of the two")
        else:
            value = read_value(known[key].type, item.value, scope.given, scope.sink, key)
            found.spans[key] = item.span
            found.whole = found.whole and value is not None
            if value is not None:
                found.values[key] = value
    return found


def _names(value: ast.Expr) -> Iterator[str]:
    """The bare words in a value: choices, and names of the policy's parameters."""
    if isinstance(value, ast.Name):
        yield value.text
    elif isinstance(value, ast.Arrow):
        yield from _names(value.start)
        yield from _names(value.end)
    elif isinstance(value, ast.Call):
        for arg in value.args:
            yield from _names(arg.value if isinstance(arg, ast.Keyword) else arg)


def _unknown(item: ast.Setting, known: Mapping[str, Param], owner: str, scope: Scope) -> None:
    near = nearest(item.key.text, known, 1)
    scope.sink.error("FXC0102", f"unknown parameter `{item.key.text}` of {owner}", item.key.span, "not a parameter",
                     notes=(f"accepted: {', '.join(known)}",) if known else (f"{owner} takes none",),
                     help=f"did you mean `{near[0]}`?" if near else "take it out, or set one of the accepted ones",
                     fixes=(Fix(item.key.span, near[0]),) if near else ())


def missing(values: Mapping[str, object], found: Values, parameters: tuple[Param, ...], owner: str, place: Span,
            scope: Scope) -> bool:
    """Report required parameters without a value; whether there are any."""
    absent = [parameter for parameter in parameters
              if parameter.required and parameter.name not in values and parameter.name not in found.spans]
    if not absent or not found.whole:
        return bool(absent)
    names = quoted([parameter.name for parameter in absent], "and")
    example = absent[0]
    scope.sink.error("FXC0103", f"{owner} needs {names}", place, "not set here",
                     notes=tuple(f"`{parameter.name}`: {parameter.doc}" for parameter in absent),
                     help=f"add `{example.name} = {example.type.example}` to its block")
    return True
