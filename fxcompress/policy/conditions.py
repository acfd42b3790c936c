"""`budget` and `expect`: what is compared, by what, with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..diagnostics import Fix, nearest
from . import ast, model, selector
from .convert import fill_in
from .selectors import Scope, read_selector
from .typebase import describe
from .units import UNITS, Measure, canonical, show_number, to_base
from .values import Unset
from .words import quoted


@dataclass(frozen=True)
class Metric:
    """A figure of a model: what it is measured in, whether it may be a share of the dense model's, and of what."""

    measure: Measure
    relative: bool
    argument: Literal["none", "optional", "selector", "output"]
    budget: bool
    expect: bool
    doc: str
    example: str  # a limit of it


METRICS: Mapping[str, Metric] = {
    "macs": Metric("count", True, "none", True, True, "multiply-accumulates of one sample", "300M"),
    "params": Metric("count", True, "none", True, True, "parameters", "1.5M"),
    "size": Metric("bytes", True, "none", True, True, "bytes of the weights as they are stored", "6 MiB"),
    "latency": Metric("seconds", True, "none", True, False, "time of one forward on the target", "3 ms"),
    "sparsity": Metric("percent", False, "optional", False, True, "share of zero weights, of all or of a selection",
                       "50%"),
    "count": Metric("count", False, "selector", False, True, "number of operators selected", "19"),
    "drift": Metric("percent", False, "output", False, True,
                    "relative distance of the output from the dense model's on the example inputs", "5%"),
    "unchanged": Metric("count", False, "selector", False, True, "whether the weights selected are what they were", ""),
}


def read_budget(budget: ast.Budget, scope: Scope) -> model.Budget | None:
    """The checked budget, or None after errors."""
    known = [name for name, metric in METRICS.items() if metric.budget]
    condition = budget.condition
    if not isinstance(condition, ast.Compare) or not isinstance(condition.left, ast.Name):
        scope.sink.error("FXC0130", "a budget is a figure, `<=` and its limit", condition.span, "is not",
                         help="write `budget macs <= 55% of dense`, or `budget size <= 6 MiB`")
        return None
    name, operator = condition.left, condition.operator
    if name.text not in known:
        _unknown(name, known, "FXC0130", scope)
        return None
    if operator.text not in ("<", "<="):
        scope.sink.error("FXC0130", f"a budget is an upper limit, found `{operator.text}`", operator.span, "",
                         help="write `<=`; a lower limit on the result is an `expect`",
                         fixes=(Fix(operator.span, "<="),))
        return None
    limit = _limit(name.text, condition.right, "FXC0130", scope)
    if limit is None:
        return None
    return model.Budget(name.text, operator.text, limit[0], limit[1], budget.span)  # type: ignore[arg-type]


def read_expect(expect: ast.Expect, scope: Scope) -> model.Expect | None:
    """The checked expectation, or None after errors."""
    condition = expect.condition
    figure = condition.left if isinstance(condition, ast.Compare) else condition
    name = figure.name if isinstance(figure, ast.Call) else figure
    known = [metric for metric in METRICS if METRICS[metric].expect]
    if not isinstance(name, ast.Name):
        scope.sink.error("FXC0131", f"expected a figure of the result, found {describe(figure)}", figure.span, "",
                         help="write `expect drift(output) < 5%`, or `expect count(body) == 19`")
        return None
    if name.text not in known:
        _unknown(name, known, "FXC0131", scope)
        return None
    given = _argument(figure, name, scope)
    why = expect.why.value if expect.why is not None else None
    if name.text == "unchanged":
        if isinstance(condition, ast.Compare):
            scope.sink.error("FXC0131", "`unchanged` is not compared", condition.operator.span, "nothing to compare",
                             help=f"write `expect {figure.span.text}`", fixes=(Fix(condition.span, figure.span.text),))
        return None if given is _WRONG else model.Expect(name.text, _given(given), None, None, expect.span, why)
    if not isinstance(condition, ast.Compare) or condition.operator.text == "~":
        place = condition.operator.span if isinstance(condition, ast.Compare) else condition.span
        scope.sink.error("FXC0131", f"`{name.text}` wants to be compared with a number", place, "",
                         help=f"write `expect {figure.span.text} <= {METRICS[name.text].example}`")
        return None
    limit = _limit(name.text, condition.right, "FXC0131", scope)
    if limit is None or given is _WRONG:
        return None
    operator: Any = condition.operator.text
    return model.Expect(name.text, _given(given), operator, limit[0], expect.span, why, limit[1])


_WRONG = object()


def _given(argument: object) -> Any:
    """What `_argument` gave, which was no error."""
    return argument


def _argument(figure: ast.Expr, name: ast.Name, scope: Scope) -> object:
    """The argument of a figure: a selector, `output` or None; `_WRONG` after an error."""
    wanted = METRICS[name.text].argument
    args = figure.args if isinstance(figure, ast.Call) else ()
    right = {"none": len(args) == 0, "optional": len(args) <= 1}.get(wanted, len(args) == 1)
    if not right or any(isinstance(arg, ast.Keyword) for arg in args):
        shape = {"none": name.text, "output": f"{name.text}(output)"}.get(wanted, f"{name.text}(conv2d)")
        scope.sink.error("FXC0131", f"`{name.text}` takes {'no argument' if wanted == 'none' else 'one argument'}",
                         figure.span, f"found {len(args)}", help=f"write `{shape}`")
        return _WRONG
    if not args or isinstance(args[0], ast.Keyword):
        return None
    if wanted == "output":
        if isinstance(args[0], ast.Name) and args[0].text == "output":
            return "output"
        scope.sink.error("FXC0131", f"`{name.text}` is measured on the output, found {describe(args[0])}", args[0].span,
                         "",
                         help=f"write `{name.text}(output)`", fixes=(Fix(args[0].span, "output"),))
        return _WRONG
    found: selector.Selector | None = read_selector(args[0], scope)
    return _WRONG if found is None else found


def _limit(name: str, expr: ast.Expr, code: str, scope: Scope) -> tuple[float, bool] | None:
    """(the limit in base units or as a fraction, whether it is a share of the dense model's figure)."""
    metric = METRICS[name]
    relative = isinstance(expr, ast.Share)
    if isinstance(expr, ast.Share):
        if expr.whole.text != "dense":
            scope.sink.error(code, f"expected `of dense`, found `of {expr.whole.text}`", expr.whole.span,
                             "the model before the policy is `dense`", help="write `of dense`",
                             fixes=(Fix(expr.whole.span, "dense"),))
            return None
        if not metric.relative:
            scope.sink.error(code, f"`{name}` is no share of the dense model's", expr.span, "",
                             help=f"write `{expr.value.span.text}`", fixes=(Fix(expr.span, expr.value.span.text),))
            return None
    value, met = fill_in(expr.value if isinstance(expr, ast.Share) else expr, scope.given)
    scope.used.update(item.declared.name.text for item in met)
    limit = _number(value, "percent" if relative else metric.measure)
    if limit is None:
        _wrong_limit(name, metric, expr, value, relative, code, scope)
        return None
    if limit < 0 or (limit > 1 and metric.measure == "percent"):
        scope.sink.error(code, f"the limit of `{name}` is out of range", expr.span, "",
                         help="write a limit from 0% to 100%"
                         if metric.measure == "percent" else "write a limit above 0")
        return None
    return (0.0 if any(isinstance(item.value, Unset) for item in met) else limit), relative


def _number(value: ast.Expr, measure: Measure) -> float | None:
    if isinstance(value, ast.Quantity):
        found = UNITS[canonical(value.unit)].measure
        return to_base(value.value, value.unit) if found == measure else None
    return value.value if isinstance(value, ast.Number) and (measure == "count" or value.value == 0) else None


def _wrong_limit(name: str, metric: Metric, expr: ast.Expr, value: ast.Expr, relative: bool, code: str,
                 scope: Scope) -> None:
    fix = None
    if not relative and metric.relative and isinstance(value, ast.Quantity) and value.unit == "%":
        fix = f"{expr.span.text} of dense"
    elif isinstance(value, ast.Number) and (relative or metric.measure == "percent"):
        fix = f"{show_number(value.value)}%{' of dense' if relative else ''}"
    example = "55% of dense" if relative else metric.example
    scope.sink.error(code, f"`{name}` is limited by a number as in `{example}`, found {describe(expr)}", expr.span,
                     "of another unit",
                     help=f"write `{fix}`" if fix else f"write the number with its unit, as in `{example}`",
                     fixes=(Fix(expr.span, fix),) if fix else ())


def _unknown(name: ast.Name, known: list[str], code: str, scope: Scope) -> None:
    near = nearest(name.text, known, 1)
    scope.sink.error(code, f"unknown figure `{name.text}`", name.span, f"expected {quoted(known)}",
                     help=f"did you mean `{near[0]}`?" if near else f"write {quoted(known)}",
                     fixes=(Fix(name.span, near[0]),) if near else ())
