"""Roundings turned round one after the other, as long as the squared error of a product falls."""

from __future__ import annotations

import torch
from torch import Tensor

_PAIRS = 32  # weights of an output, up to which all pairs are tried


def descend(up: Tensor, scale: Tensor, free: Tensor, hessian: Tensor, gradient: Tensor) -> Tensor:
    """`up` (1 for a weight that is rounded up, 0 for one that is rounded down) after as many changes as an output has
    weights, each the best there is while one brings the product nearer to what it should be. A change takes one weight,
    or two, to its other rounding.

    With H = XᵀX and g = WH − TᵀX, the gradient at W, a change of weight i by δ changes the squared error by
    2δgᵢ + δ²Hᵢᵢ. All are [groups, outputs, inputs], `hessian` is [groups, inputs, inputs]; only `free` weights change.
    """
    up, gradient = up.clone(), gradient.clone()
    delta = (1 - 2 * up) * scale * free
    diagonal = hessian.diagonal(dim1=1, dim2=2)[:, None]
    groups = torch.arange(len(hessian), device=up.device)[:, None]
    for _ in range(up.shape[2]):
        gain, *places = _best_change(2 * delta * gradient + delta.square() * diagonal, delta, hessian)
        takes = gain < 0
        if not bool(takes.any()):
            break
        for place, does in ((places[0], takes), (places[1], takes & (places[0] != places[1]))):
            at = place[..., None]
            step = delta.gather(2, at) * does[..., None]
            gradient += step * hessian[groups, place]
            up.scatter_add_(2, at, step.sign())
            delta.scatter_add_(2, at, -2 * step)  # back again from now on
    return up


def _best_change(alone: Tensor, delta: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best change of each output: what it does to the error, and the places of its one or two weights."""
    count = alone.shape[2]
    if count > _PAIRS:
        gain, place = alone.min(2)
        return gain, place, place
    both = alone[..., None] + alone[..., None, :] + 2 * delta[..., None] * delta[..., None, :] * hessian[:, None]
    both.diagonal(dim1=2, dim2=3).copy_(alone)
    gain, place = both.flatten(2).min(2)
    return gain, place // count, place % count
