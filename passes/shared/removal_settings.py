"""Settings of `remove` that don't go together, found before any work. No torch here: `check` reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxcompress.diagnostics import Diagnostic, Label, PlanError
from fxcompress.policy.values import Ramp

if TYPE_CHECKING:
    from fxcompress.graph.site import Site
    from fxcompress.passes.remove import Remove

STRENGTH = 1e-3  # of a penalty, where none is given


def removal_problems(settings: Remove) -> list[Diagnostic]:
    """A ramp that falls or is combined with `sparsify` (FXC0507); settings without what they act on (FXC0508)."""
    ratio, found = settings.ratio, []
    ramp = isinstance(ratio, Ramp)
    if isinstance(ratio, Ramp) and ratio.end < ratio.start:
        found.append(Diagnostic(
            "FXC0507", f"the ratio falls from {100 * ratio.start:.4g}% to {100 * ratio.end:.4g}%, but channels that "
            "have left don't come back",
            help="let the ramp rise, as in `linear(10% -> 50%)`; only `mask` can give back"))
    if ramp and settings.sparsify != "none":
        found.append(Diagnostic(
            "FXC0507", f"`sparsify = {settings.sparsify}` removes at the end of its phase, a ramp removes along it",
            help="give one share, as in `ratio = 50%`; or take `sparsify` out"))
    if settings.every is not None and not ramp and settings.sparsify != "growing":
        found.append(Diagnostic(
            "FXC0508", "`every` has nothing to repeat: the ratio is constant",
            help="let it rise over the phase, as in `ratio = linear(10% -> 50%)`; or take `every` out"))
    if settings.strength is not None and settings.sparsify == "none":
        found.append(Diagnostic(
            "FXC0508", "`strength` has no penalty to act on", help="say which: `sparsify = group_lasso`, or `growing`"))
    if settings.slices == "coupled" and settings.reduce == "first":
        found.append(Diagnostic(
            "FXC0508", "`slices = coupled` has nothing to act on: `reduce = first` sees one layer that makes a channel",
            help="let `reduce` be `mean`, `sum` or `max`; or take `slices` out"))
    return found


def raise_for_slices(settings: Remove, site: Site) -> None:
    """Raise PlanError, FXC0348, where what shall be ranked has no score of every slice that leaves with it."""
    if settings.slices != "coupled":
        return
    from fxcompress.passes.shared.criteria import criterion_of

    reason = "a block is scored by all its weights as it is" if site.what == "blocks" else (
        f"`by = {settings.by}` doesn't score slices of weights" if not criterion_of(settings.by).sums else "")
    if reason:
        raise PlanError([Diagnostic(
            "FXC0348", f"`slices = coupled` has no meaning here: {reason}",
            Label(site.span) if site.span is not None else None,
            help="take `slices` out; or rank channels by `l1`, `l2`, `lamp`, `taylor` or `hessian`")])


def raise_for_time(settings: Remove, site: Site) -> None:
    """Raise PlanError: FXC0507 where whole blocks shall leave step by step, FXC0509 for regularised training where no
    training goes on."""
    place = Label(site.span) if site.span is not None else None
    if site.what == "blocks":
        raise PlanError([Diagnostic(
            "FXC0507", "blocks leave at once: they can't leave along a ramp, or after regularised training", place,
            help="give one share, as in `ratio = 25%`; for several steps, write several phases, one after another")])
    if site.window is None and settings.sparsify != "none":
        raise PlanError([Diagnostic(
            "FXC0509", f"`sparsify = {settings.sparsify}` has no time to train: nothing trains here", place,
            help="put it into a phase with a window of a policy, `phase thin over epochs 0..10`, and train; or take it "
                 "out")])
