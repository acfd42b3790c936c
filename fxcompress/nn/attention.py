"""Attention whose two products are of rounded values: queries times keys, and weights times values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .integer import Grid


class RoundedAttention(nn.Module):
    """softmax(Q·Kᵀ·scale + mask)·V (Vaswani et al., "Attention Is All You Need", 2017, section 3.2), where Q, K, V and
    the softmax lie each on a grid of integers.

    torch has no product of two tensors of integers for the CPU: here all is computed in floats, unrounded, by torch's
    fused kernel. Files hold the grids, and runtimes multiply integers (`backends/qdq.py`). What those will give is
    computed under `rounding`.
    """

    fxc_kind: ClassVar[str] = "rounded_attention"
    why: ClassVar[str] = "torch has no product of two tensors of integers for the CPU; files hold these in integers"

    def __init__(self, query: Grid, key: Grid, value: Grid, weights: Grid, scale: float, causal: bool) -> None:
        """`scale` multiplies the products of queries and keys; with `causal` no query attends to later keys, and there
        is no mask."""
        super().__init__()
        self.query, self.key, self.value, self.weights = query, key, value, weights
        self.scale, self.causal, self.rounds = scale, causal, False

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries [..., L, E], keys [..., S, E], values [..., S, V] and a mask for [..., L, S], true where a query
        attends or added to the products: [..., L, V]."""
        if not self.rounds:
            return F.scaled_dot_product_attention(query, key, value, mask, is_causal=self.causal, scale=self.scale)
        return attend(_rounded(query, self.query), _rounded(key, self.key), _rounded(value, self.value), mask,
                      self.scale, self.causal, lambda weights: _rounded(weights, self.weights))

    def extra_repr(self) -> str:
        """The scale, and whether it is causal."""
        return f"scale={self.scale:.4g}" + (", causal" if self.causal else "")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool,
           rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The formula written out, `rounded` applied to the weights of the softmax."""
    products = torch.matmul(query, key.transpose(-2, -1)) * scale
    return torch.matmul(rounded(torch.softmax(_masked(products, mask, causal), dim=-1)), value)


def _masked(products: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The products [..., L, S] of queries and keys with the least float32 where a query doesn't attend."""
    least = torch.finfo(torch.float32).min
    if causal:
        later = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).triu(1)
        return products.masked_fill(later, least)
    if mask is None:
        return products
    return products.masked_fill(mask.logical_not(), least) if mask.dtype == torch.bool else products + mask


def _rounded(x: Tensor, grid: Grid) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, grid.low, grid.high)


@contextmanager
def rounding(module: nn.Module) -> Iterator[None]:
    """Attention in `module` computes with rounded values, as files do."""
    found = [part for part in module.modules() if isinstance(part, RoundedAttention)]
    try:
        for part in found:
            part.rounds = True
        yield
    finally:
        for part in found:
            part.rounds = False
