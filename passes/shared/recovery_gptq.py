"""`gptq`: columns are rounded one after the other, and those that are still to come make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022, algorithm 1:
H = 2·X·Xᵀ + λI, and with U the upper Cholesky factor of H⁻¹, column q is rounded and the error, divided by U_qq, is
taken off the columns behind it in proportion to U's row; the rows behind a block are updated in one product. Scales
are those of the weight as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.passes.shared.recovery import Layer
from fxcompress.passes.shared.recovery_patches import Places, Product, multiply
from fxcompress.passes.shared.recovery_walk import Sight

BLOCK = 128  # columns
DAMPING = 0.01  # of the mean of H's diagonal: λ
_PATCHES = 2**14


def gptq(layer: Layer, sight: Sight, seed: int = 0) -> tuple[float, float]:
    """Write what GPTQ rounds the weight of `layer` to, so that its quantizer gives it exactly. Returns the mean squared
    error of rounding to nearest and of this."""
    product = Product.of(layer)
    assert product is not None
    patches = Places(layer, product, sight.gives, _PATCHES, seed).of(sight.rounded)
    x = patches.transpose(0, 1).double()
    hessian = 2 * x.transpose(1, 2) @ x / x.shape[1]
    weight, (scale, zero) = product.rows(layer.weight()), (product.rows(part) for part in layer.grid())
    scheme = layer.quantizer.scheme
    found = solve(weight, hessian, scale, zero, scheme.low, scheme.high)
    nearest = product.rows(layer.rounded())
    before, after = (multiply(patches, rows - weight).square().mean(0) for rows in (nearest, found))
    best = torch.where((after < before)[..., None], found, nearest)
    layer.write(best.reshape(layer.weight().shape))
    return float(before.mean()), float(torch.minimum(before, after).mean())


def solve(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, low: int, high: int,
          block: int = BLOCK) -> Tensor:
    """The rounded weight. `weight`, `scale` and `zero` are [groups, outputs, inputs], `hessian` is [groups, inputs,
    inputs] in float64. Weights that are zero stay so."""
    w, free = weight.double().clone(), weight != 0
    upper = _factor(hessian)
    found = torch.zeros_like(w)
    for first in range(0, w.shape[-1], block):
        last = min(first + block, w.shape[-1])
        errors = torch.zeros_like(w[..., first:last])
        for column in range(first, last):
            s, z, now = scale[..., column].double(), zero[..., column].double(), w[..., column]
            rounded = (((now / s).round() + z).clamp(low, high) - z) * s * free[..., column]
            found[..., column] = rounded
            error = (now - rounded) / upper[:, column, column][:, None]
            w[..., column:last] -= error[..., None] * upper[:, None, column, column:last]
            errors[..., column - first] = error
        w[..., last:] -= errors @ upper[:, first:last, last:]
    return found.to(weight.dtype)


def _factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse: U with UᵀU = H⁻¹. Inputs that are always zero are left alone."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    damping = (DAMPING * diagonal.mean(-1, keepdim=True)).clamp(min=torch.finfo(torch.float64).tiny) + dead.double()
    lower = torch.linalg.cholesky(hessian + torch.diag_embed(damping))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
