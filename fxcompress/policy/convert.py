"""From written values to Python values: with policy parameters filled in, and for passes that are built from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..diagnostics import Diagnostic, Fix, Label, PolicyError, Sink, nearest
from ..source import Source, Span
from . import ast
from .numeric import Integer, Number, Percent
from .parsing import parse_expression
from .typebase import Mismatch, ValueType
from .types import Boolean, Text
from .values import Unset

#: the types a policy's parameters may have; `model` has no values in the text, it is given from Python
PARAMETER_TYPES: Mapping[str, ValueType | None] = {
    "percent": Percent(low=float("-inf"), high=float("inf")), "int": Integer(), "number": Number(), "text": Text(),
    "bool": Boolean(), "model": None,
}


@dataclass(frozen=True)
class Given:
    """A policy parameter in scope: its declaration and its value, `Unset` while it has none."""

    declared: ast.Parameter
    type: str
    value: object

    def literal(self, span: Span) -> ast.Expr:
        """The value as if it had been written at `span`; a stand-in of the right kind while it is not known."""
        value = self.value
        known = not isinstance(value, Unset)
        if self.type == "percent":
            return ast.Quantity(span, round(float(value) * 100, 10) if known else 50, "%")  # type: ignore[arg-type]
        if self.type in ("int", "number"):
            return ast.Number(span, value if known else 1)  # type: ignore[arg-type]
        if self.type == "bool":
            return ast.Name(span, "true" if value is True else "false")
        return ast.String(span, str(value) if known else "text")


def fill_in(expr: ast.Expr, given: Mapping[str, Given]) -> tuple[ast.Expr, list[Given]]:
    """`expr` with every name of a policy parameter replaced by its value, and the parameters that were met."""
    if isinstance(expr, ast.Name) and expr.text in given:
        return given[expr.text].literal(expr.span), [given[expr.text]]
    if isinstance(expr, ast.Arrow):
        start, met = fill_in(expr.start, given)
        end, more = fill_in(expr.end, given)
        return replace(expr, start=start, end=end), [*met, *more]
    if isinstance(expr, ast.Call):
        args: list[ast.Expr | ast.Keyword] = []
        met = []
        for arg in expr.args:
            filled, more = fill_in(arg.value if isinstance(arg, ast.Keyword) else arg, given)
            args.append(replace(arg, value=filled) if isinstance(arg, ast.Keyword) else filled)
            met += more
        return replace(expr, args=tuple(args)), met
    return expr, []


def read_value(type_: ValueType, expr: ast.Expr, given: Mapping[str, Given], sink: Sink, what: str) -> object:
    """The checked value of `expr`, `Unset` where it rests on a parameter without a value; None after an error, which
    goes to `sink`. `what` names the parameter in messages."""
    filled, met = fill_in(expr, given)
    used = tuple(dict.fromkeys(item.declared.name.text for item in met if isinstance(item.value, Unset)))
    models = [item for item in met if item.type == "model"]
    if models:
        sink.error("FXC0105", f"`{what}`: a model is no value", expr.span, f"expected {type_.describe()}",
                   secondary=(Label(models[0].declared.span, "a model by its declaration"),),
                   help="a parameter of type `model` stands only behind `from`")
        return None
    try:
        value = type_.convert(filled, ranges=not used)
    except Mismatch as mismatch:
        sink.items.append(_meant(mismatch_diagnostic(mismatch, type_, what, expr.span, met), mismatch.at, given))
        return None
    return Unset(used) if used else value


def _meant(found: Diagnostic, at: ast.Node | None, given: Mapping[str, Given]) -> Diagnostic:
    """`found`, with the policy parameter that a bare word in place of a value may have meant."""
    known = nearest(at.text, given, 1) if isinstance(at, ast.Name) and not found.fixes else []
    if not known or at is None:
        return found
    return replace(found, help=f"did you mean the parameter `{known[0]}`?", fixes=(Fix(at.span, known[0]),))


def mismatch_diagnostic(mismatch: Mismatch, type_: ValueType, what: str, span: Span | None,
                        met: list[Given] | None = None) -> Diagnostic:
    """The diagnostic of a mismatch at `span`, or at the part of the value that is wrong."""
    place = mismatch.at.span if mismatch.at is not None else span
    inside = next((item for item in met or () if place is not None and place.text == item.declared.name.text), None)
    secondary = () if inside is None else (Label(inside.declared.span, f"declared as `{inside.type}`"),)
    fixes = (Fix(place, mismatch.fix),) if mismatch.fix is not None and place is not None and inside is None else ()
    return Diagnostic(mismatch.code, f"`{what}`: {mismatch.reason}",
                      Label(place, f"expected {type_.describe()}") if place is not None else None, secondary,
                      help=mismatch.help if inside is None else "change the parameter's type or value", fixes=fixes)


def coerce(param_type: ValueType, value: object, name: str) -> object:
    """`value` checked and converted for a parameter of `param_type`: a Python value, or a text in the policy's syntax
    (`"60%"`, `"cubic(0% -> 60%)"`, `"100 steps"`). Raises PolicyError; `name` is for its message."""
    try:
        return param_type.accept(value)
    except Mismatch as mismatch:
        if not isinstance(value, str) or mismatch.fix is not None:
            raise PolicyError([mismatch_diagnostic(mismatch, param_type, name, None)]) from None
    source = Source(f"<{name}>", value)
    expr, problems = parse_expression(source)
    if expr is None:
        raise PolicyError(problems)
    try:
        return param_type.convert(expr)
    except Mismatch as mismatch:
        raise PolicyError([mismatch_diagnostic(mismatch, param_type, name, expr.span)]) from None
