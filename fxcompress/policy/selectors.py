"""From written selectors to checked ones: names resolved, predicates typed, patterns compiled once, as a test."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from ..diagnostics import Fix, Label, Sink, nearest
from ..source import Span
from . import ast, selector
from .convert import Given, fill_in
from .kinds import DTYPES, EQUALITY, HELPERS, KINDS, ORDER, PREDICATES, TEXT_OPERATORS
from .typebase import describe
from .units import UNITS, canonical, to_base
from .values import Unset
from .words import quoted

MAX_PATTERN = 200  # characters of a glob or a regular expression
COMPARABLE = {"count": ("count",), "bytes": ("bytes", "count")}
WANTED = {"count": "a number such as `64` or `1.5M`", "bytes": "a size such as `6 MiB`", "bool": "`true` or `false`",
          "text": "a text such as `\"layer1.*\"`"}


@dataclass
class Scope:
    """The names that an expression may use, which of them were used, and where errors go."""

    sink: Sink
    lets: Mapping[str, ast.Let] = field(default_factory=dict)
    given: Mapping[str, Given] = field(default_factory=dict)
    broken: frozenset[str] = frozenset()  # words of statements that could not be read
    used: set[str] = field(default_factory=set)


def read_selector(expr: ast.Expr, scope: Scope) -> selector.Selector | None:
    """The checked selector that `expr` means, or None after errors, which go to the scope's sink."""
    reader = _READERS.get(type(expr))
    if reader is None:
        scope.sink.error("FXC0139", f"expected a selector, found {describe(expr)}", expr.span, "selects nothing",
                         help='a selector is a kind (`conv2d`), a path (`"layer1.*"`), a `let`, or made of these')
        return None
    return reader(expr, scope)


def _star(expr: ast.Star, _scope: Scope) -> selector.Selector:
    return selector.Everything(expr.span)


def _group(expr: ast.Group, scope: Scope) -> selector.Selector | None:
    return read_selector(expr.inner, scope)


def _path(expr: ast.String, scope: Scope) -> selector.Selector | None:
    return selector.Path(expr.value, expr.span) if _glob(expr.value, expr.span, scope) else None


def _name(expr: ast.Name, scope: Scope) -> selector.Selector | None:
    name = expr.text
    scope.used.add(name)
    if name in scope.lets:
        return selector.Ref(name, expr.span)
    if name in scope.given:
        return _parameter(expr, scope.given[name], scope)
    if name in KINDS:
        return selector.Kind(name, expr.span)
    if name not in scope.broken:
        _unknown(expr, scope)
    return None


def _parameter(expr: ast.Name, given: Given, scope: Scope) -> selector.Selector | None:
    """A policy parameter of type text stands for a path."""
    if given.type == "text":
        glob = "*" if isinstance(given.value, Unset) else str(given.value)
        return selector.Path(glob, expr.span) if _glob(glob, expr.span, scope) else None
    scope.sink.error("FXC0139", f"expected a selector, found the parameter `{expr.text}`", expr.span, "selects nothing",
                     secondary=(Label(given.declared.span, f"a {given.type}"),),
                     help="only a parameter of type `text` can stand for a module path")
    return None


def _unknown(expr: ast.Name, scope: Scope) -> None:
    if expr.text in HELPERS:
        scope.sink.error("FXC0114", f"`{expr.text}` is a function of selectors", expr.span, "without its argument",
                         help=f"write `{expr.text}(...)`")
        return
    known = nearest(expr.text, [*scope.lets, *sorted(KINDS)])
    scope.sink.error("FXC0107", f"unknown name `{expr.text}`", expr.span, "neither a `let` nor an operator kind",
                     notes=(f'a module path is written as a text: `"{expr.text}"`',),
                     help=f"did you mean {quoted(known)}?" if known else f"define it: `let {expr.text} = ...`",
                     fixes=(Fix(expr.span, known[0]),) if known else ())


def _flow(expr: ast.FlowOf, scope: Scope) -> selector.Selector | None:
    parts = [read_selector(part, scope) for part in expr.parts]
    return selector.Flow(tuple(part for part in parts if part), expr.span) if all(parts) else None


def _set_of(expr: ast.SetOf, scope: Scope) -> selector.Selector | None:
    parts = [read_selector(part, scope) for part in expr.parts]
    first = expr.operators[0]
    other = next((i for i, operator in enumerate(expr.operators) if operator.text != first.text), None)
    if other is not None:
        left = expr.parts[0].span.to(expr.parts[other].span)
        scope.sink.error("FXC0015", f"`{first.text}` and `{expr.operators[other].text}` are mixed without parentheses",
                         expr.operators[other].span, "which of the two comes first?",
                         secondary=(Label(first.span),), help=f"if from left to right: `({left.text})`",
                         fixes=(Fix(left, f"({left.text})"),))
        return None
    if not all(parts):
        return None
    return selector.SetOp(first.text, tuple(part for part in parts if part), expr.span)  # type: ignore[arg-type]


def _call(expr: ast.Call, scope: Scope) -> selector.Selector | None:
    name = expr.name.text
    if name not in HELPERS:
        known = nearest(name, HELPERS, 1)
        scope.sink.error("FXC0114", f"unknown function of selectors `{name}`", expr.name.span, "not a function",
                         notes=(f"functions: {quoted(HELPERS, 'and')}",),
                         help=f"did you mean `{known[0]}`?" if known else "write one of the functions",
                         fixes=(Fix(expr.name.span, known[0]),) if known else ())
        return None
    wanted = HELPERS[name][0]
    least = sum(not kind.endswith("?") for kind in wanted)
    keyword = next((arg for arg in expr.args if isinstance(arg, ast.Keyword)), None)
    if keyword is not None or not least <= len(expr.args) <= len(wanted):
        shape = ", ".join("selector" if kind == "selector" else "count" for kind in wanted)
        scope.sink.error("FXC0114", f"`{name}` takes {_counted(least, len(wanted))}, found {len(expr.args)}"
                         if keyword is None else f"`{name}` takes no named arguments",
                         expr.span if keyword is None else keyword.span, "",
                         help=f"write `{name}({shape})`" + (" or leave the count out" if least < len(wanted) else ""))
        return None
    args = [_argument(name, kind, cast("ast.Expr", arg), scope)
            for kind, arg in zip(wanted, expr.args, strict=False)]
    found = tuple(arg for arg in args if arg is not None)
    return selector.Helper(name, found, expr.span) if len(found) == len(args) else None


def _counted(least: int, most: int) -> str:
    number = str(least) if least == most else f"{least} or {most}"
    return f"{number} argument{'s' if number != '1' else ''}"


def _argument(name: str, kind: str, arg: ast.Expr, scope: Scope) -> selector.Selector | int | None:
    if kind == "selector":
        return read_selector(arg, scope)
    filled, met = fill_in(arg, scope.given)
    scope.used.update(item.declared.name.text for item in met)
    if isinstance(filled, ast.Number) and isinstance(filled.value, int) and filled.value > 0:
        return filled.value
    scope.sink.error("FXC0114", f"`{name}` wants a whole number above 0 as its count, found {describe(arg)}", arg.span,
                     "",
                     help=f"write `{name}(..., 3)`")
    return None


def _where(expr: ast.Where, scope: Scope) -> selector.Selector | None:
    base = read_selector(expr.base, scope)
    predicates = [_predicate(condition, scope) for condition in expr.conditions]
    if base is None or not all(predicates):
        return None
    return selector.Where(base, tuple(item for item in predicates if item), expr.span)


def _predicate(condition: ast.Expr, scope: Scope) -> selector.Predicate | None:
    if isinstance(condition, ast.Name) and PREDICATES.get(condition.text) == "bool":
        return selector.Predicate(condition.text, "==", True, condition.span)
    if not isinstance(condition, ast.Compare) or not isinstance(condition.left, ast.Name):
        _no_condition(condition, scope)
        return None
    key, operator = condition.left, condition.operator
    if key.text not in PREDICATES:
        known = nearest(key.text, PREDICATES, 1)
        scope.sink.error("FXC0111", f"unknown fact `{key.text}`", key.span, "no operator has it",
                         notes=(f"facts: {', '.join(PREDICATES)}",),
                         help=f"did you mean `{known[0]}`?" if known else "write one of the facts",
                         fixes=(Fix(key.span, known[0]),) if known else ())
        return None
    type_ = PREDICATES[key.text]
    allowed = TEXT_OPERATORS if type_ == "text" else EQUALITY if type_ == "bool" else (*EQUALITY, *ORDER)
    if operator.text not in allowed:
        scope.sink.error("FXC0112", f"`{key.text}` can't be compared by `{operator.text}`", operator.span,
                         f"`{key.text}` is compared by {quoted(allowed)}", help=f"write `{key.text} {allowed[0]} ...`")
        return None
    return _compared(key.text, condition, scope)


def _no_condition(condition: ast.Expr, scope: Scope) -> None:
    """A condition that compares no fact, or with the fact on the right."""
    flipped = isinstance(condition, ast.Compare) and isinstance(condition.right, ast.Name)
    fixes: tuple[Fix, ...] = ()
    help_ = "write a fact, a comparison and a value: `out_channels >= 64`"
    if isinstance(condition, ast.Compare) and flipped:
        turned = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(condition.operator.text, condition.operator.text)
        text = f"{condition.right.span.text} {turned} {condition.left.span.text}"
        help_, fixes = f"write the fact first: `{text}`", (Fix(condition.span, text),)
    elif isinstance(condition, ast.Name) and condition.text in PREDICATES:
        help_ = f"compare it: `{condition.text} == ...`"
    elif isinstance(condition, ast.Name):
        known = nearest(condition.text, PREDICATES, 1)
        help_ = f"did you mean `{known[0]}`?" if known else help_
    scope.sink.error("FXC0111", f"{describe(condition)} is not a condition", condition.span,
                     "says nothing of an operator",
                     help=help_, fixes=fixes)


def _compared(key: str, condition: ast.Compare, scope: Scope) -> selector.Predicate | None:
    """The predicate, with its value in base units."""
    filled, met = fill_in(condition.right, scope.given)
    scope.used.update(item.declared.name.text for item in met)
    is_regex = isinstance(filled, ast.Regex) and condition.operator.text == "~"
    value: float | str | bool | None = None
    type_ = PREDICATES[key]
    if type_ == "text":
        value = _text(key, condition.operator.text, filled)
    elif type_ == "bool":
        value = filled.text == "true" if isinstance(filled, ast.Name) and filled.text in ("true", "false") else None
    elif isinstance(filled, ast.Number):
        value = filled.value
    elif isinstance(filled, ast.Quantity) and UNITS[canonical(filled.unit)].measure in COMPARABLE[type_]:
        value = to_base(filled.value, filled.unit)
    if value is None:
        scope.sink.error("FXC0112", f"`{key}` is compared with {WANTED[type_]}, found {describe(condition.right)}",
                         condition.right.span, "of another type", help=f"write {WANTED[type_]}")
        return None
    span = condition.right.span
    if condition.operator.text == "~" and not (_regex(str(value), span, scope) if is_regex else
                                               _glob(str(value), span, scope)):
        return None
    return selector.Predicate(key, condition.operator.text, value, condition.span, is_regex)  # type: ignore[arg-type]


def _text(key: str, operator: str, value: ast.Expr) -> str | None:
    if isinstance(value, ast.String):
        return value.value
    if isinstance(value, ast.Regex) and operator == "~":
        return value.pattern
    return value.text if key == "dtype" and isinstance(value, ast.Name) and value.text in DTYPES else None


def _glob(text: str, span: Span, scope: Scope) -> bool:
    if text and len(text) <= MAX_PATTERN and text.isprintable():
        return True
    scope.sink.error("FXC0113", "this pattern can't match a module path", span,
                     "is empty" if not text else "is too long" if text.isprintable() else "has unprintable characters",
                     help=f"write 1 to {MAX_PATTERN} printable characters, such as `layer*.**`")
    return False


def _regex(text: str, span: Span, scope: Scope) -> bool:
    """Whether the regular expression compiles, without even a warning of Python's."""
    if len(text) > MAX_PATTERN:
        return _glob(text, span, scope)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(text)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        scope.sink.error("FXC0113", f"this regular expression is wrong: {error}", span, "does not compile",
                         help="the syntax is that of Python's `re`; a dot in a path is written `\\.`")
        return False
    return True


_READERS: Mapping[type, Callable[[Any, Scope], selector.Selector | None]] = {
    ast.Star: _star, ast.Group: _group, ast.String: _path, ast.Name: _name, ast.FlowOf: _flow, ast.SetOf: _set_of,
    ast.Call: _call, ast.Where: _where,
}
