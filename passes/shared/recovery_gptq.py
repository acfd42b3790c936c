"""`gptq`: columns are rounded one after the other, and those that are still to come make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022, algorithm 1:
H = 2·X·Xᵀ + λI, and with U the upper Cholesky factor of H⁻¹, column q is rounded and the error, divided by U_qq, is
taken off the columns behind it in proportion to U's row; the columns behind a block are updated in one product. Columns
with much weight in H come first. Scales are those of the weight as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.nn.pairs import partners
from fxcompress.passes.shared.recovery import Layer
from fxcompress.passes.shared.recovery_patches import Places, Product
from fxcompress.passes.shared.recovery_walk import Sight

BLOCK = 128  # columns
DAMPING = 0.01  # of the mean of H's diagonal: λ
_PATCHES, _PART = 2**13, 2**10  # that are looked at, and at a time


def gptq(layer: Layer, sight: Sight, seed: int = 0) -> tuple[float, float]:
    """Write what GPTQ rounds the weight of `layer` to, so that its quantizer gives it exactly. Returns the mean squared
    error of rounding to nearest and of this."""
    product = Product.of(layer)
    assert product is not None
    patches = Places(layer, product, sight.gives, _PATCHES, seed).of(sight.rounded)
    hessian = 2 * _square(patches)
    weight, (scale, zero) = product.rows(layer.weight()), (product.rows(part) for part in layer.grid())
    scheme = layer.quantizer.scheme
    beside = partners(layer.weight().shape[1:]).to(weight.device) if scheme.pairs else None
    found = solve(weight, hessian, scale, zero, scheme.low, scheme.high, beside=beside)
    nearest = product.rows(layer.rounded())
    before, after = (torch.bmm(patches, (rows - weight).transpose(1, 2)).square().mean(1) for rows in (nearest, found))
    best = torch.where((after < before)[..., None], found, nearest)
    layer.write(best.reshape(layer.weight().shape))
    return float(before.mean()), float(torch.minimum(before, after).mean())


def _square(patches: Tensor) -> Tensor:
    """The mean of x·xᵀ over the patches, [groups, inputs, inputs] in float64; a part of them at a time."""
    groups, count, inputs = patches.shape
    total = torch.zeros(groups, inputs, inputs, dtype=torch.float64, device=patches.device)
    for part in torch.split(patches, _PART, dim=1):
        total += part.double().transpose(1, 2) @ part.double()
    return total / count


def solve(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, low: int, high: int,
          block: int = BLOCK, beside: Tensor | None = None) -> Tensor:
    """The rounded weight. `weight`, `scale` and `zero` are [groups, outputs, inputs], `hessian` is [groups, inputs,
    inputs] in float64. Weights that are zero stay so. With `beside` [inputs, n], the neighbours of each input, no two
    integers of one sign sum to more than `high` + 1."""
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    across = order[:, None].expand_as(weight)
    w, free, scale, zero = (part.gather(2, across) for part in (weight.double(), weight != 0, scale.double(), zero))
    upper = _factor(hessian.gather(1, order[..., None].expand_as(hessian)).gather(
        2, order[:, None].expand_as(hessian)))
    found, taken = torch.zeros_like(w), torch.zeros_like(w)  # `taken`: integers in the order of the weight
    for first in range(0, w.shape[-1], block):
        last = min(first + block, w.shape[-1])
        errors = torch.zeros_like(w[..., first:last])
        for column in range(first, last):
            s, z, now = scale[..., column], zero[..., column], w[..., column]
            integers = ((now / s).round() + z).clamp(low, high)
            if beside is not None:
                integers = _beside(integers * free[..., column], taken, order[:, column], beside, high + 1)
            rounded = (integers - z) * s * free[..., column]
            found[..., column] = rounded
            error = (now - rounded) / upper[:, column, column][:, None]
            w[..., column:last] -= error[..., None] * upper[:, None, column, column:last]
            errors[..., column - first] = error
        w[..., last:] -= errors @ upper[:, first:last, last:]
    return torch.zeros_like(found).scatter_(2, across, found).to(weight.dtype)


def _beside(integers: Tensor, taken: Tensor, places: Tensor, beside: Tensor, most: int) -> Tensor:
    """The integers [groups, outputs] at one of the `places` [groups] of each group, so that with none of their
    neighbours among those `taken` they sum to more than `most`; written into `taken`."""
    others = taken.gather(2, beside[places][:, None].expand(-1, taken.shape[1], -1))
    above, below = others.clamp(min=0).amax(-1), others.clamp(max=0).amin(-1)
    integers = torch.minimum(torch.maximum(integers, -most - below), most - above)
    at = places[:, None, None].expand(-1, taken.shape[1], 1)
    taken.scatter_(2, at, integers[..., None])
    return integers


def _factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse: U with UᵀU = H⁻¹. Inputs that are always zero are left alone."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    damping = (DAMPING * diagonal.mean(-1, keepdim=True)).clamp(min=torch.finfo(torch.float64).tiny) + dead.double()
    lower = torch.linalg.cholesky(hessian + torch.diag_embed(damping))
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper
