"""Totals of a live graph, as plans count them."""

from __future__ import annotations

from ..graph.captured import Captured
from ..graph.ops import kind_of
from .model import Totals


def totals_of(captured: Captured) -> Totals:
    """Totals of a graph; masks count nothing: they are folded away in the end."""
    masks = {str(node.target): node.meta["fxc"].bytes for node in captured.graph.nodes if kind_of(node) == "mask"}
    facts = captured.facts
    return Totals(facts.params, facts.macs, facts.bytes - sum(masks.values()))
