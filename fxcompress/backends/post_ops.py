"""Activations that oneDNN applies to what it computes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ..graph.ops import arguments, kind_of

# Activation -> oneDNN's name for it, and its numbers, or the arguments that hold them.
ACTIVATIONS: Mapping[str, tuple[str, tuple[str | float, ...]]] = {
    "relu": ("relu", ()), "relu6": ("hardtanh", (0.0, 6.0)), "hardtanh": ("hardtanh", ("min_val", "max_val")),
    "hardswish": ("hardswish", ()), "silu": ("swish", ()),
}


def post_op(node: fx.Node | None) -> tuple[str, tuple[float, ...]]:
    """oneDNN's name for the activation `node`, and its numbers; "none" where there is none."""
    if node is None:
        return "none", ()
    name, numbers = ACTIVATIONS[kind_of(node)]
    values = arguments(node)
    return name, tuple(float(values[each]) if isinstance(each, str) else each for each in numbers)
