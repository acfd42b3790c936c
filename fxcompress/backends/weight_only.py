"""`mode = weight_only`: layers on floats that hold their weights as integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..graph.captured import Captured
from ..graph.ops import arguments, kind_of
from ..nn.quantizer import WeightQuantizer
from ..nn.weight_only import WeightOnlyConv2d, WeightOnlyEmbedding, WeightOnlyLinear
from .float_io import bias_of, layers_of, put_kernel, rounded

if TYPE_CHECKING:
    from .int8 import Lowered


def lower_weight_only(captured: Captured, done: Lowered) -> None:
    """Put layers with integer weights in the place of those whose weights are rounded while their inputs aren't, in
    place; writes into `done`. The caller drops what is dead and refreshes."""
    for node, quantizer in layers_of(captured):
        data = arguments(node)["input"]
        if kind_of(data) == "quantizer":
            continue
        why = _why_not(node)
        if why is not None:
            done.left[node.name] = why
            continue
        done.kernels[node.name] = put_kernel(captured, node, _layer(captured, node, quantizer), data)


def _why_not(node: fx.Node) -> str | None:
    values = arguments(node)
    if kind_of(node) == "embedding" and (values.get("max_norm") is not None or values.get("sparse")):
        return "an embedding that renormalises its weight, or has sparse gradients, keeps floats"
    return None


def _layer(captured: Captured, node: fx.Node,
           quantizer: WeightQuantizer) -> WeightOnlyLinear | WeightOnlyConv2d | WeightOnlyEmbedding:
    values, bias = arguments(node), bias_of(captured, node)
    integers, scale, zero = rounded(captured, node, quantizer)
    scheme = quantizer.scheme
    settings: tuple[torch.Size, bool, int, int, bool] = (
        integers.shape, bias is not None, scheme.bits, quantizer.group, scheme.symmetric)
    made: WeightOnlyLinear | WeightOnlyConv2d | WeightOnlyEmbedding
    if kind_of(node) == "conv2d":
        made = WeightOnlyConv2d(*settings, _pair(values["stride"]), _pair(values["padding"]),
                                _pair(values["dilation"]), int(values["groups"]))
    else:
        made = (WeightOnlyLinear if kind_of(node) == "linear" else WeightOnlyEmbedding)(*settings)
    made.fill(integers, scale, zero, bias)
    return made


def _pair(value: Any) -> Any:
    """Two numbers, or a padding's name."""
    return (value, value) if isinstance(value, int) else value if isinstance(value, str) else tuple(value)
