"""The terms of a distillation: pairs with their ends found, their settings checked, and what joins the shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.diagnostics import Diagnostic, Label, PlanError
from fxcompress.graph.captured import Captured
from fxcompress.graph.distilled import distillations
from fxcompress.graph.ops import module_of
from fxcompress.graph.site import Site
from fxcompress.graph.teacher import Teacher
from fxcompress.nn.distillation import Distillation
from fxcompress.nn.losses import Loss
from fxcompress.passbase import LOSSES
from fxcompress.passes.shared.distill_adapting import Plan, Shape, adapter_for, show
from fxcompress.passes.shared.distill_taps import Missed, find
from fxcompress.passes.shared.distill_teacher import part_of
from fxcompress.policy.model import Pair
from fxcompress.policy.words import TARGETS, quoted

if TYPE_CHECKING:
    from fxcompress.passes.distill import Distill

DEFAULTS: Mapping[str, Any] = {"weight": 1.0, "temperature": None, "adapt": "auto", "alpha": None, "beta": None,
                               "label_smoothing": 0.0, "name": None}


@dataclass(frozen=True)
class Term:
    """One term: `student` is the node it reads, `teacher` the name of the teacher's node (or the keys of a part of its
    result, for one that couldn't be captured), None for one that compares with labels alone."""

    name: str
    pair: Pair
    loss: type[Loss]
    student: fx.Node
    student_shape: Shape
    teacher: str | tuple[str, ...] | None
    teacher_shape: Shape
    adapter: Plan

    def value(self, key: str) -> Any:
        """A setting of the pair."""
        return self.pair.values.get(key, DEFAULTS.get(key))


def unknown_ends(settings: Distill, captured: Captured, site: Site) -> Iterator[Diagnostic]:
    """Ends of pairs that name nothing, in the student and in the teacher, where there is one."""
    for pair in settings.terms:
        found = find(captured, pair.student)
        if isinstance(found, Missed):
            yield _missed(pair, found, "student")
        teacher = site.teacher
        if teacher is not None and teacher.captured is not None and pair.teacher != TARGETS:
            found = find(teacher.captured, pair.teacher)
            if isinstance(found, Missed):
                yield _missed(pair, found, "teacher")


def terms_of(settings: Distill, captured: Captured, site: Site) -> list[Term]:
    """The terms of `settings`. Raises PlanError with everything that is wrong with them, as `Distill.rewrite` says."""
    span = Label(site.span) if site.span is not None else None
    if site.nodes:
        raise PlanError([Diagnostic("FXC0352", "`distill` works on no layers: its pairs say what is compared", span,
                                    help="take the selector out: `distill from teacher { ... }`")])
    if not settings.terms:
        raise PlanError([Diagnostic("FXC0354", "`distill` has no pair", span, help="say what is compared: "
                                    "`pair output <- output { loss = kl }`")])
    if site.teacher is None and any(pair.teacher != TARGETS for pair in settings.terms):
        raise PlanError([Diagnostic("FXC0353", "there is no teacher", span, help="give the model: `teacher=` of "
                                    "`compile` and `plan`, `--teacher` on the command line")])
    taken = {name for node in distillations(captured.graph) if isinstance(found := module_of(node), Distillation)
             for name in found.terms}
    problems: list[Diagnostic] = []
    terms: list[Term] = []
    for pair in settings.terms:
        term = _term(pair, captured, site.teacher)
        if isinstance(term, Diagnostic):
            problems.append(term)
        elif term.name in taken:
            problems.append(Diagnostic("FXC0354", f"there are two terms `{term.name}`", Label(pair.span),
                                       help='give one of them a name: `name = "..."`'))
        else:
            taken.add(term.name)
            terms.append(term)
    if problems:
        raise PlanError(problems)
    return terms


def _term(pair: Pair, captured: Captured, teacher: Teacher | None) -> Term | Diagnostic:
    loss: type[Loss] = LOSSES[str(pair.values["loss"])]
    mine = _settings_problem(pair, loss) or _found(pair, captured, "student")
    if isinstance(mine, Diagnostic):
        return mine
    student, shape = mine
    default = re.sub(r"\W", "_", f"{pair.student}_{pair.values['loss']}")
    name = re.sub(r"\W", "_", str(pair.values.get("name") or default))
    term = Term(name if name.isidentifier() else f"_{name}", pair, loss, student, shape, None, (), Plan(len(shape)))
    if pair.teacher == TARGETS:
        return term
    assert teacher is not None
    other = _in_teacher(pair, teacher)
    if isinstance(other, Diagnostic):
        return other
    end, theirs = other
    adapter = adapter_for(shape, theirs, loss, str(term.value("adapt")))
    if isinstance(adapter, str):
        return Diagnostic(
            "FXC0351", f"`{pair.student}` can't be compared with the teacher's `{pair.teacher}` by "
            f"`{pair.values['loss']}`: {adapter}", Label(pair.span),
            notes=(f"the student's is {show(shape)}, the teacher's {show(theirs)}",),
            help="pair values of like shapes, choose a loss that compares others (`similarity`, `relation`), or "
                 "another `adapt`")
    return replace(term, teacher=end, teacher_shape=theirs, adapter=adapter)


def _in_teacher(pair: Pair, teacher: Teacher) -> tuple[str | tuple[str, ...], Shape] | Diagnostic:
    """The teacher's end of a pair, and its shape."""
    if teacher.captured is None:
        if not (pair.teacher == "output" or pair.teacher.startswith("output.")):
            return _missed(pair, Missed(
                f"`{pair.teacher}` can't be read: this teacher can't be captured, and only gives its result",
                "pair with `output`", (teacher.why,)), "teacher")
        part = part_of(teacher.given, pair.teacher)
        if isinstance(part, str):
            return _missed(pair, Missed(part, "name a part of the result"), "teacher")
        return part[0], tuple(part[1].shape)
    found = _found(pair, teacher.captured, "teacher")
    return found if isinstance(found, Diagnostic) else (found[0].name, found[1])


def _found(pair: Pair, captured: Captured, whose: str) -> tuple[fx.Node, Shape] | Diagnostic:
    """The node of an end of `pair`, and its shape."""
    end = pair.student if whose == "student" else pair.teacher
    found = find(captured, end)
    if isinstance(found, Missed):
        return _missed(pair, found, whose)
    fact = found.meta["fxc"]
    if not (isinstance(fact.dtype, torch.dtype) and fact.dtype.is_floating_point and isinstance(fact.shape, tuple)):
        return _missed(pair, Missed(f"`{end}` is no tensor of floats", "name a layer that gives one"), whose)
    return found, tuple(fact.shape)


def _missed(pair: Pair, missed: Missed, whose: str) -> Diagnostic:
    return Diagnostic("FXC0350", f"{missed.reason} in the {whose}" if missed.reason.startswith("there is no") else
                      f"the {whose}'s end of a pair: {missed.reason}", Label(pair.span), notes=missed.notes,
                      help=missed.help)


def _settings_problem(pair: Pair, loss: type[Loss]) -> Diagnostic | None:
    """A setting, or an end, that means nothing to the loss."""
    name, given = f"`{pair.values['loss']}`", pair.values

    def wrong(what: str, help: str) -> Diagnostic:
        return Diagnostic("FXC0352", what, Label(pair.span), help=help)

    if (pair.teacher == TARGETS) == loss.teacher:
        other = "a teacher, not with labels" if loss.teacher else "labels, not with a teacher"
        return wrong(f"{name} compares with {other}", f"write `pair {pair.student} <- "
                     f"{'output' if loss.teacher else TARGETS} {{ loss = {pair.values['loss']} }}`")
    for key, means in (("temperature", loss.soft), ("label_smoothing", loss.smooths), ("alpha", loss.parts),
                       ("beta", len(loss.parts) > 1), ("adapt", loss.teacher)):
        if given.get(key, DEFAULTS[key]) != DEFAULTS[key] and not means:
            takes = [other for other in LOSSES.names() if _takes(LOSSES[other], key)]
            return wrong(f"`{key}` means nothing to {name}", f"leave it out; it is for {quoted(takes, 'and')}")
    return None


def _takes(loss: type[Loss], key: str) -> bool:
    return bool({"temperature": loss.soft, "label_smoothing": loss.smooths, "adapt": loss.teacher}.get(key, loss.parts))
