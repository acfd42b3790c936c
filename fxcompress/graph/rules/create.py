"""Values that come from nowhere: inputs, parameters used directly, constants; and where values leave the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from ..coupling_edit import Edit, resize
from ..coupling_flow import Flow, Value, rule, shape_of, tracked, untracked
from .layout import tuple_of


@rule("input")
def placeholder(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Nothing of an input can be removed."""
    return untracked(getattr(node.meta.get("fxc"), "shape", None))


@rule("output")
def output(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Nothing of an output can be removed."""
    for source in node.all_input_nodes:
        for labels in tracked(flow.values[source]):
            flow.fix(labels, "gives it back as its output")
    return untracked(getattr(node.meta.get("fxc"), "shape", None))


@rule("parameter")
def parameter(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """A parameter or buffer used directly: fresh labels."""
    name = str(node.target)
    return flow.tensor(name) if flow.has(name) else untracked(getattr(node.meta.get("fxc"), "shape", None))


@rule("size", "numel", "getattr", "item")
def number(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Sizes follow the tensors by themselves."""
    return untracked(getattr(node.meta.get("fxc"), "shape", None))


@rule("arange", "linspace", "eye", "tensor", "new_tensor", "affine_grid")
def positions(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Their values are positions, of which none can go."""
    return untracked(getattr(node.meta.get("fxc"), "shape", None))


@rule("zeros", "ones", "empty", "rand", "randn", "full", "new_zeros", "new_ones", "new_empty", "new_full")
def constant(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """One number repeated: a size that is a constant here follows whatever it meets."""
    given = tuple_of(args["size"])
    return tuple(flow.fresh(size, weak=True) if isinstance(known, int) else None
                 for size, known in zip(shape_of(node), given, strict=True))


@resize("zeros", "ones", "empty", "rand", "randn", "full", "new_zeros", "new_ones", "new_empty", "new_full")
def resize_constant(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Sizes follow the labels of the result."""
    new = edit.sizes(node, tuple_of(args["size"]), edit.of(node))
    if new:
        edit.set(node, size=new)
