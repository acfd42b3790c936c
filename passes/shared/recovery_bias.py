"""`correct_bias`: what rounding shifts a layer's mean by is taken off its bias.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019, section 4.2, in its
empirical form (appendix D): E[ỹ] − E[y] for each output, over the calibration data, before the activation; layer after
layer, so that each makes up for what those before it have left.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxcompress.graph.ops import kind_of
from fxcompress.passes.shared.integer import role_of
from fxcompress.passes.shared.recovery import Layer
from fxcompress.passes.shared.recovery_walk import Sight, product


def correct_bias(layer: Layer, sight: Sight) -> float:
    """Correct the bias of `layer`. Returns the root mean square of the correction over that of what the layer gives."""
    bias = layer.tensor("bias")
    assert bias is not None and role_of(layer.node) == "product"
    weight = layer.rounded()
    shift = mean_shift(layer, [product(layer, x, weight, bias) for x in sight.rounded], sight.gives)
    layer.write_bias((bias.double() - shift).to(bias.dtype))
    size = sum(float(value.double().square().mean()) for value in sight.gives) / len(sight.gives)
    return math.sqrt(float(shift.square().mean()) / max(size, 1e-30))


def mean_shift(layer: Layer, given: list[Tensor], expected: list[Tensor]) -> Tensor:
    """E[given] − E[expected] of each output, in float64; a tensor for each batch."""
    axis = channels(layer)
    return _means(given, axis) - _means(expected, axis)


def channels(layer: Layer) -> int:
    """The dimension of the outputs in what `layer` gives."""
    return -1 if kind_of(layer.node) == "linear" else 1


def _means(values: list[Tensor], axis: int) -> Tensor:
    """The mean of each output over all batches, in float64."""
    others = [dim for dim in range(values[0].dim()) if dim != axis % values[0].dim()]
    total = sum((value.sum(others, dtype=torch.float64) if others else value.double()) for value in values)
    count = sum(value.numel() // value.shape[axis] for value in values)
    return total / count  # type: ignore[return-value]
