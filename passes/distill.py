"""`distill`: learn from a teacher, whose graph becomes part of the student's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fxcompress.diagnostics import Diagnostic
from fxcompress.passbase import Facet, Param, Pass, param
from fxcompress.policy.model import Pair
from fxcompress.policy.types import Boolean, CallOf, Choice, Integer, Number, OneOf, Percent, Registered, Text

if TYPE_CHECKING:
    from fxcompress.graph.captured import Captured
    from fxcompress.graph.site import Outcome, Site

ADAPTERS = ("auto", "none", "conv1x1", "linear", "pool", "interpolate")


@dataclass(frozen=True)
class Distill(Pass):
    """Train the model to give what a teacher gives. Teacher, adapters and loss terms become part of the model's module,
    and go when the phase ends: `module(*inputs, targets=labels, losses=True)` gives the terms. `from original` learns
    from the model as it was before any rewrite. The ends of a pair are `output`, a module's path or a node's name; the
    right one may be `targets`, the labels."""

    verb: ClassVar[str] = "distill"
    facet: ClassVar[Facet] = Facet.LOSS
    takes_teacher: ClassVar[bool] = True
    pairs: ClassVar[bool] = True
    pair_params: ClassVar[tuple[Param, ...]] = (
        Param("loss", Registered("LOSSES"), "how both ends are compared", None, True),
        Param("weight", Number(low=0.0, ramp=True), "what the term is multiplied by", 1.0, False),
        Param("temperature",
              OneOf((Number(low=0.01, ramp=True), CallOf("adaptive", (Choice(("l2",)),)), Choice(("learned",)))),
              "what logits are divided by before they are compared, for losses that soften; `adaptive(l2)` is the L2 "
              "distance of both ends by how many numbers each has, and at least 0.1; `learned` begins at 4 and is "
              "trained against the term. Without it, what the loss's paper has", None, False),
        Param("adapt", Choice(ADAPTERS), "what brings the student's shape to the teacher's: `auto` infers it",
              "auto", False),
        Param("alpha", Number(low=0.0), "the weight of the loss's first part (`decoupled`, `relation`, `dist`)", None,
              False),
        Param("beta", Number(low=0.0), "the weight of its second part", None, False),
        Param("label_smoothing", Percent(), "of `cross_entropy`", 0.0, False),
        Param("name", Text(), "of the term; without it the student's end and the loss: `layer3_mse`", None, False),
    )

    share: bool = param(Boolean(), "compute a stage once where both models have the very same frozen tensors in it",
                        True)
    cache: str | None = param(Choice(("memory", "disk")), "keep what the teacher gives for each training sample, and "
                              "let the teacher go: where samples are the same each time, and only its output is "
                              "compared", None)
    top_k: int | None = param(Integer(low=1), "keep the greatest logits alone, with what the others are worth together",
                              None)
    terms: tuple[Pair, ...] = ()

    def with_pairs(self, pairs: tuple[Pair, ...]) -> Distill:
        """This pass with its pairs."""
        return replace(self, terms=pairs)

    def check(self, graph: Captured, site: Site) -> Iterable[Diagnostic]:
        """Ends of pairs that aren't there: FXC0350."""
        from fxcompress.passes.shared.distill_terms import unknown_ends

        return unknown_ends(self, graph, site)

    def rewrite(self, graph: Captured, site: Site) -> Outcome:
        """Join the teacher to the graph.

        Raises PlanError: FXC0350 (an end that isn't there), FXC0351 (shapes that no adapter joins), FXC0352 (a setting
        that means nothing to the loss), FXC0353 (no teacher, or one that can't be), FXC0354 (two terms of one name, or
        none), FXC0355 (the model has an input called as a distillation's are), FXC0357 (what the teacher gives can't be
        kept).
        """
        from fxcompress.passes.shared.distilling import distill

        return distill(self, graph, site)


def pair(student: str, teacher: str, **settings: object) -> Pair:
    """`pair student <- teacher { settings }` for a pass applied from Python: `Distill(terms=(pair("output", "output",
    loss="kl"),)).apply(captured, teacher=model)`. Raises PolicyError for a setting that is unknown or wrong."""
    from fxcompress.diagnostics import PolicyError
    from fxcompress.policy import coerce
    from fxcompress.source import Source, Span

    known = {parameter.name: parameter for parameter in Distill.pair_params}
    wrong = [name for name in settings if name not in known]
    if wrong or "loss" not in settings:
        raise PolicyError([Diagnostic("FXC0102", f"unknown parameter `{wrong[0]}` of `pair`",
                                      help=f"accepted: {', '.join(known)}") if wrong else
                           Diagnostic("FXC0103", "`pair` needs `loss`", help='add `loss="kl"`')])
    values = {name: coerce(known[name].type, value, name) for name, value in settings.items() if value is not None}
    text = f"pair {student} <- {teacher}"
    return Pair(student, teacher, values, Span(Source("<python>", text), 0, len(text)))
