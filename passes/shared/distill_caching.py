"""`cache` of `distill`: whether what the teacher gives can be kept by sample, and the teacher as a module apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from fxcompress.diagnostics import Diagnostic, Label, PlanError
from fxcompress.graph.captured import Captured
from fxcompress.graph.distilled import FLOAT, distillations
from fxcompress.graph.ops import module_of
from fxcompress.graph.site import Site
from fxcompress.graph.tree import graph_module
from fxcompress.nn.distillation import Cache, Distillation
from fxcompress.passes.shared.distill_adapting import show
from fxcompress.passes.shared.distill_teacher import Prepared, hang
from fxcompress.policy.words import OUTPUT

if TYPE_CHECKING:
    from fxcompress.passes.distill import Distill
    from fxcompress.passes.shared.distill_terms import Term


def cache_of(settings: Distill, terms: Sequence[Term], captured: Captured, site: Site) -> Cache | None:
    """What `settings` ask for. Raises PlanError (FXC0357) where it can't be done."""
    if settings.cache is None and settings.top_k is None:
        return None
    why = _why_not(settings, terms, captured)
    if why is not None:
        raise PlanError([Diagnostic("FXC0357", f"what the teacher gives can't be kept: {why[0]}",
                                    Label(site.span) if site.span is not None else None, help=why[1])])
    return Cache(str(settings.cache), settings.top_k)


def _why_not(settings: Distill, terms: Sequence[Term], captured: Captured) -> tuple[str, str] | None:
    """The reason, and what to do."""
    taught = [term for term in terms if term.teacher is not None]
    inner = [term.pair.teacher for term in taught if term.pair.teacher.split(".")[0] != OUTPUT]
    shape = taught[0].teacher_shape if taught else ()
    other = any(isinstance(found := module_of(node), Distillation) and found.cache is not None
                for node in distillations(captured.graph))
    many = settings.top_k is None or (len(shape) == 2 and settings.top_k <= shape[1] - 2)
    reasons = (
        (settings.cache is None, "`top_k` says how much, and nothing says where",
         "say `cache = memory` or `cache = disk`"),
        (not taught, "no pair reads the teacher", "take `cache` out"),
        (bool(inner), f"`{''.join(inner[:1])}` is a feature of it, and only its output is kept",
         "pair with the teacher's `output`, or take `cache` out"),
        (len({term.teacher for term in taught}) > 1, "pairs read several parts of its output",
         "pair with one part, or take `cache` out"),
        (other, "that of another teacher is kept already", "take `cache` out of one of the actions"),
        (not many, f"`top_k = {settings.top_k}` is not for an output of shape {show(shape)}",
         "take `top_k` out: it is for logits of many classes"),
    )
    return next(((why, help) for wrong, why, help in reasons if wrong), None)


def teacher_apart(prepared: Prepared) -> fx.GraphModule:
    """The prepared teacher as a module that gives its first tap, which all pairs read."""
    graph = prepared.graph
    end = next(iter(reversed(graph.nodes)))
    end.args = (end.args[0][0],)
    for given, source in zip((node for node in graph.nodes if node.op == "placeholder"), prepared.sources, strict=True):
        dtype = source.meta["fxc"].dtype
        given.meta[FLOAT] = isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
    graph.lint()
    tree = nn.Module()  # of what is called alone: norms that were folded still hang in the other
    for path in dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"):
        hang(tree, path, prepared.module.get_submodule(path))
    made = graph_module(tree, graph, "Teacher")
    made.recompile()
    return made
