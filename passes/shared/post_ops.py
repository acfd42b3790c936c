"""The activations of a graph that kernels apply to what they compute."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxcompress.graph.ops import arguments, kind_of

# Activation -> the name that layers have for it (oneDNN's), and its numbers, or the arguments that hold them.
ACTIVATIONS: Mapping[str, tuple[str, tuple[str | float, ...]]] = {
    "relu": ("relu", ()), "relu6": ("hardtanh", (0.0, 6.0)), "hardtanh": ("hardtanh", ("min_val", "max_val")),
    "hardswish": ("hardswish", ()), "silu": ("swish", ()), "gelu": ("gelu", ()),
}


def post_op(node: fx.Node | None) -> tuple[str, tuple[float, ...]]:
    """The name that layers have for the activation `node`, and its numbers; "none" where there is none."""
    if node is None:
        return "none", ()
    name, numbers = ACTIVATIONS[kind_of(node)]
    values = arguments(node)
    if values.get("approximate", "none") == "tanh":
        name = f"{name}_tanh"
    return name, tuple(float(values[each]) if isinstance(each, str) else each for each in numbers)
