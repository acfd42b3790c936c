"""`adaround`: whether each weight is rounded up or down is learned, on what its layer gives.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020: minimise ‖f(Wx) − f(Ŵx̂)‖² over
Ŵ = s·clip(⌊W/s⌋ + h(V)), h(V) = clip(1.2·σ(V) − 0.1, 0, 1), with a term 1 − |2h − 1|^β that drives h to 0 or 1 as β
falls (equations 21 to 25). Here the squared error of each output is divided by that of rounding to nearest, and the
term is a mean over its inputs, so that one weight of the term fits all layers and few steps do. What is found so is a
local minimum; a descent over single roundings follows (`recovery_descent.py`). Of nearest, learned and descended
rounding each output gets the best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.passes.shared.recovery import Layer
from fxcompress.passes.shared.recovery_descent import descend
from fxcompress.passes.shared.recovery_patches import Places, Product, activation_of, bias_of
from fxcompress.passes.shared.recovery_walk import Sight

STEPS = 200
_PATCHES, _SAMPLE = 2048, 128  # kept of a layer, and looked at in one step
_RATE, _WEIGHT = 0.2, 12.0  # of Adam, and of the term that drives to 0 and 1
_WARM = 0.2  # the share of the steps without that term
_BETA = (20.0, 2.0)
_LOW, _HIGH = -0.1, 1.1  # ends of the stretched sigmoid


@dataclass
class _Problem:
    """A layer's weights as rows [groups, outputs, inputs], and what they are multiplied with: `patches` are [groups,
    patches, inputs], their order is that of chance; `target` and what is given are [groups, patches, outputs]."""

    layer: Layer
    patches: Tensor
    target: Tensor
    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor
    activation: Callable[[Tensor], Tensor]

    def round(self, up: Tensor) -> Tensor:
        """The weight as rounded: `up` in [0, 1] is how far each is rounded up."""
        scheme = self.layer.quantizer.scheme
        q = ((self.weight / self.scale).floor() + up + self.zero).clamp(scheme.low, scheme.high)
        return (q - self.zero) * self.scale

    @property
    def free(self) -> Tensor:
        """1 for a weight that may be rounded either way: not for those on the grid, as masked ones are."""
        steps = self.weight / self.scale
        return ((self.weight != 0) & (steps > steps.floor())).to(self.weight.dtype)

    def nearest(self) -> Tensor:
        """1 where rounding to nearest rounds up (halves to even, as quantizers do), else 0."""
        steps = self.weight / self.scale
        return steps.round() - steps.floor()

    def errors(self, up: Tensor, some: slice = slice(None)) -> Tensor:
        """The mean squared error of each output, [groups, outputs]."""
        given = self.activation(torch.baddbmm(self.bias, self.patches[:, some], self.round(up).transpose(1, 2)))
        return (given - self.target[:, some]).square().mean(1)


def adaround(layer: Layer, sight: Sight, seed: int = 0) -> tuple[float, float]:
    """Write the learned rounding into the weight of `layer`, so that its quantizer gives it exactly. Returns the mean
    squared error of rounding to nearest and of the learned rounding, on the patches that it was learned from."""
    product = Product.of(layer)
    assert product is not None
    places = Places(layer, product, sight.gives, _PATCHES, seed)
    scale, zero = (product.rows(part) for part in layer.grid())
    weight, activation, bias = product.rows(layer.weight()), activation_of(layer), bias_of(layer, product)
    target = activation(torch.baddbmm(bias, places.of(sight.floats), weight.transpose(1, 2)))
    problem = _Problem(layer, places.of(sight.rounded), target, weight, scale, zero, bias, activation)
    best = problem.nearest()
    before = after = problem.errors(best)
    learned = _learned(problem, seed)
    for up in (learned, _descended(problem, learned, places.of(sight.floats))):
        errors = problem.errors(up)
        best = torch.where((errors < after)[..., None], up, best)
        after = torch.minimum(errors, after)
    layer.write(problem.round(best).reshape(layer.weight().shape))
    return float(before.mean()), float(after.mean())


def _descended(problem: _Problem, up: Tensor, floats: Tensor) -> Tensor:
    """`up` after a descent on the squared error before the activation."""
    x, aim = problem.patches, torch.bmm(floats, problem.weight.transpose(1, 2))
    hessian = torch.bmm(x.transpose(1, 2), x)
    gradient = torch.bmm(problem.round(up), hessian) - torch.bmm(aim.transpose(1, 2), x)
    return descend(up, problem.scale, problem.free, hessian, gradient)


def _learned(problem: _Problem, seed: int) -> Tensor:
    """1 for each weight that should be rounded up, else 0."""
    steps = problem.weight / problem.scale
    part = steps - steps.floor()
    free = problem.free
    start = ((part - _LOW) / (_HIGH - _LOW)).clamp(1e-3, 1 - 1e-3)
    v = torch.log(start / (1 - start)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=_RATE)
    size = problem.errors(problem.nearest()).clamp(min=torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(seed)
    last = max(1, problem.patches.shape[1] - _SAMPLE + 1)
    with torch.enable_grad():
        for step in range(STEPS):
            first = int(torch.randint(last, (1,), generator=generator))
            some = slice(first, first + _SAMPLE)
            up = (v.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1) * free
            loss = (problem.errors(up, some) / size).sum()
            done = (step / STEPS - _WARM) / (1 - _WARM)
            if done > 0:
                beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 - done)
                loss = loss + _WEIGHT * (1 - (2 * up - 1).abs().pow(beta)).mean(-1).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return (v.detach() > 0) * free
