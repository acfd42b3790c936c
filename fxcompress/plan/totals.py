"""Totals of a live graph, as plans count them."""

from __future__ import annotations

from torch import fx

from ..graph.captured import Captured
from ..graph.ops import ON_WEIGHTS, kind_of, module_of
from ..nn.quantizer import Quantizer, WeightQuantizer
from ..nn.weight_only import PACKED_BITS
from .model import Totals


def totals_of(captured: Captured) -> Totals:
    """Totals of a graph as it will be deployed: masks count nothing, for they are folded away in the end, and weights
    behind quantizers count a byte each (two of up to 4 bits share one, where values stay floats), and four for each
    scale."""
    facts = captured.facts
    less: dict[str, int] = {}
    for node in captured.graph.nodes:
        kind = kind_of(node)
        if kind in ON_WEIGHTS:
            less[str(node.target)] = node.meta["fxc"].bytes
        if kind == "quantizer" and (weight := _weight(node)) is not None:
            fact = weight.meta["fxc"]
            less[f"of {weight.target}"] = fact.bytes - _held(node, fact.params)
    return Totals(facts.params, facts.macs, facts.bytes - sum(less.values()))


def _held(node: fx.Node, weights: int) -> int:
    """The bytes of `weights` integers and their scales, behind the quantizer `node`."""
    quantizer = module_of(node)
    assert isinstance(quantizer, Quantizer)
    scales, scheme = quantizer.scale.numel(), quantizer.scheme
    rounds_inputs = any(kind_of(source) == "quantizer" for user in node.users for source in user.all_input_nodes
                        if source is not node)
    if not isinstance(quantizer, WeightQuantizer) or rounds_inputs:
        return weights + 4 * scales
    return (weights + 1) // 2 * (1 + (scheme.bits > PACKED_BITS)) + scales * (4 + (not scheme.symmetric))


def _weight(node: fx.Node) -> fx.Node | None:
    """The parameter that a quantizer rounds, behind a mask or not; None for one on values."""
    source = node.args[0]
    while isinstance(source, fx.Node) and kind_of(source) == "mask":
        source = source.args[0]
    return source if isinstance(source, fx.Node) and source.op == "get_attr" else None
