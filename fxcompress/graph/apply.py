"""Carrying out one pass: rewrite, record what was done, verify. Plan, engine and `Pass.apply` all come here."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from ..diagnostics import Diagnostic, Label, PlanError, PolicyError, Sink
from ..policy import parse_selector
from ..policy.values import Ramp
from .calibration import Calibration, missing
from .captured import Captured
from .distilled import require_stages
from .ops import kind_of, path_of
from .probe import collecting_later
from .provenance import origins_of, touch
from .select import Selecting, label, quoted
from .site import Outcome, Site
from .teacher import Teachers
from .verify import Before, verify

if TYPE_CHECKING:
    from torch import fx, nn

    from ..passbase import Pass
    from ..policy.selector import Selector


def carry_out(captured: Captured, pass_: Pass, site: Site) -> Outcome:
    """Run `pass_` on `site` of `captured`, in place, and verify what it left.

    Raises what the pass raises, PlanError (FXC0346) where it needs calibration data that the site hasn't, and
    RewriteError (FXC0550 and up) with the pass, the node and the policy line where an invariant doesn't hold; then
    `captured` is not fit for further use.
    """
    if captured.concrete and site.calibration is None and (need := pass_.data_need()):
        raise PlanError([replace(missing(need), primary=Label(site.span) if site.span is not None else None)])
    with collecting_later():
        before = Before.of(captured)
        outcome = pass_.rewrite(captured, site)
        _record(captured, pass_, site, outcome, before)
        verify(captured, before, pass_, site)
        require_stages(captured, pass_.verb, site)
    return outcome


def _record(captured: Captured, pass_: Pass, site: Site, outcome: Outcome, before: Before) -> None:
    """Put the pass's changes into the provenance of the layers it changed, where the pass itself has not."""
    by_name: dict[str, list[fx.Node]] = {}
    for node in captured.module.graph.nodes:
        if len(origins_of(node)) == len(before.origins.get(node.name, ())):
            for name in {node.name, path_of(node)}:
                by_name.setdefault(name, []).append(node)
    for change in outcome.changes:
        for node in by_name.get(change.path, ()):
            if len(origins_of(node)) == len(before.origins.get(node.name, ())):
                touch(node, pass_, site, f"{change.what} {change.before} -> {change.after}")


def fitting(pass_: Pass | type[Pass], selecting: Selecting, selector: Selector,
            nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Those of `nodes` that `pass_` works on. Others are passed over where the selection is by place (`*`, a path); in
    a selection by kind they are an error (FXC0208), as is nothing being left; errors go to the sink of `selecting`."""
    if not pass_.kinds or not nodes:
        return nodes
    fit = tuple(node for node in nodes if kind_of(node) in pass_.kinds)
    others = [node for node in nodes if node not in fit]
    if others and (not fit or not selecting.is_open(selector)):
        kind = kind_of(others[0])
        selecting.sink.error(
            "FXC0208", f"`{pass_.verb}` doesn't work on {kind}", selector.span,
            f"selects `{label(others[0])}`" + (f" and {len(others) - 1} more" if len(others) > 1 else ""),
            notes=(f"it works on {quoted(pass_.kinds, 'and')}",), help="narrow the selection to these kinds")
        return ()
    return fit


TEACHER = "teacher"  # what a pass applied from Python calls the model it learns from


def at_end(pass_: Pass) -> Pass:
    """`pass_` with every ramp at its end, and nothing to repeat on the way there."""
    ends: dict[str, object] = {f.name: value.end for f in fields(pass_)
                               if isinstance(value := getattr(pass_, f.name), Ramp)}
    if ends and any(f.name == "every" for f in fields(pass_)):
        ends["every"] = None
    return replace(pass_, **ends)


def apply_pass(pass_: Pass, captured: Captured, selector: str = "*", what: str | None = None,
               calibration: object = None, teacher: object = None) -> Captured:
    """A copy of `captured` with `pass_` applied to what `selector` selects, ramps at their end, verified.

    Raises PolicyError for a selector that is wrong or selects nothing, what the pass raises, PlanError (FXC0560) where
    a score has seen no gradients, or (FXC0346, FXC0570) calibration data are needed and not there or don't fit, and
    RewriteError if the pass breaks an invariant. `captured` stays as it is.
    """
    parsed = parse_selector(selector)
    copy = captured.copy()
    carry_gradients(captured.module, copy.module)
    sink = Sink()
    selecting = Selecting(copy, {}, sink)
    nodes = selecting.select(parsed)
    nodes = fitting(pass_, selecting, parsed, nodes)
    if pass_.whats and what not in pass_.whats:
        sink.error("FXC0211", f"`{pass_.verb}` wants to be told what of the layers" if what is None else
                   f"`{pass_.verb}` knows no `{what}`", help=f"give `what=`: {quoted(pass_.whats)}")
    sink.raise_if_errors(PolicyError)
    if pass_.takes_teacher and selector == "*":
        nodes = ()  # it works on no layers
    given = Teachers(captured, None, {TEACHER: teacher}).of(TEACHER) if teacher is not None else None
    data = Calibration.of(calibration, copy) if calibration is not None else None
    outcome = carry_out(copy, at_end(pass_), Site(nodes, what, selection=selector, calibration=data,
                                                      teacher=given))
    if copy.concrete:
        _write_ends(pass_, outcome)
    return copy


def carry_gradients(source: nn.Module, copy: nn.Module) -> None:
    """Give the parameters of `copy` the gradients that those of the same names have in `source`: scores by gradient
    read them, and copies have none."""
    found = dict(source.named_parameters())
    for name, parameter in copy.named_parameters():
        if name in found and found[name].grad is not None:
            parameter.grad = found[name].grad.detach().clone()  # type: ignore[union-attr]


def _write_ends(pass_: Pass, outcome: Outcome) -> None:
    """Write the values that move in training, at their ends, where the pass has not."""
    for moving in outcome.scheduled:
        end = moving.ramp.end if isinstance(moving.ramp, Ramp) else moving.ramp
        if not moving.written and not moving.write(end):
            raise PlanError([Diagnostic(
                "FXC0560", f"`{pass_.verb}` can't set {moving.name} yet", notes=(repr(pass_),),
                help="its score wants gradients: run a forward and a backward pass on the module before `apply`")])
