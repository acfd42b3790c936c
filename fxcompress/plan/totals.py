"""Totals of a live graph, as plans count them."""

from __future__ import annotations

from torch import fx

from ..graph.captured import Captured
from ..graph.ops import ON_WEIGHTS, kind_of, module_of
from .model import Totals


def totals_of(captured: Captured) -> Totals:
    """Totals of a graph as it will be deployed: masks count nothing, for they are folded away in the end, and weights
    behind quantizers count a byte each, and four for each scale."""
    facts = captured.facts
    less: dict[str, int] = {}
    for node in captured.graph.nodes:
        kind = kind_of(node)
        if kind in ON_WEIGHTS:
            less[str(node.target)] = node.meta["fxc"].bytes
        if kind == "quantizer" and (weight := _weight(node)) is not None:
            scales = 4 * module_of(node).get_buffer("scale").numel()
            less[f"of {weight.target}"] = weight.meta["fxc"].bytes - weight.meta["fxc"].params - scales
    return Totals(facts.params, facts.macs, facts.bytes - sum(less.values()))


def _weight(node: fx.Node) -> fx.Node | None:
    """The parameter that a quantizer rounds, behind a mask or not; None for one on values."""
    source = node.args[0]
    while isinstance(source, fx.Node) and kind_of(source) == "mask":
        source = source.args[0]
    return source if isinstance(source, fx.Node) and source.op == "get_attr" else None
