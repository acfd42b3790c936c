"""Losses on how the samples of a batch lie to one another: shapes need not agree but in the batch."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Fit, Loss, exactly, samples


class Similarity(Loss):
    """‖G_t − G_s‖² / N², G the matrix of products of the samples, each row of length 1: Tung and Mori,
    "Similarity-Preserving Knowledge Distillation", 2019, equations (2) to (4)."""

    fits: ClassVar[Fit] = "batch"

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term."""
        return (_similarities(teacher) - _similarities(student)).square().mean()


def _similarities(value: Tensor) -> Tensor:
    flat = samples(value)
    with exactly(flat):
        return F.normalize(flat @ flat.T, dim=1)


class Relation(Loss):
    """α · the mean over pairs of l(d_s, d_t) + β · the mean over triplets of l(a_s, a_t): d is the distance of two
    samples by the mean distance of all pairs of different ones, a the cosine of the angle at the second of three, and l
    Huber's loss with δ = 1. Park et al., "Relational Knowledge Distillation", 2019, equations (5) to (9), as means; a
    pair or triplet that names a sample twice counts as 0. By default α = 1 and β = 2, the paper's ratio."""

    fits: ClassVar[Fit] = "batch"
    parts: ClassVar[tuple[str, ...]] = ("distances", "angles")
    defaults: ClassVar[tuple[float, ...]] = (1.0, 2.0)

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term; memory goes by N³ numbers where angles count."""
        (ds, gs), (dt, gt) = _distances(samples(student)), _distances(samples(teacher))
        total = self.alpha * F.smooth_l1_loss(_by_mean(ds), _by_mean(dt))
        if self.beta:
            total = total + self.beta * F.smooth_l1_loss(_angles(ds, gs), _angles(dt, gt))
        return total


def _distances(flat: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of every two samples, and the products of the samples about their mean."""
    flat = flat - flat.mean(0)  # leaves distances as they are, and makes what is subtracted below small
    with exactly(flat):
        products = flat @ flat.T
    norms = products.diagonal()
    same = torch.eye(len(flat), dtype=torch.bool, device=flat.device)
    squares = (norms[:, None] + norms - 2 * products).clamp_min(0.0).masked_fill(same, 0.0)
    there = squares > 0
    return torch.where(there, squares, 1.0).sqrt() * there, products  # the slope of a root at 0 is endless


def _by_mean(distances: Tensor) -> Tensor:
    pairs = max(1, len(distances) * (len(distances) - 1))
    return distances / (distances.sum() / pairs).clamp_min(1e-12)


def _angles(distances: Tensor, products: Tensor) -> Tensor:
    """cos of the angle at j between i and k, by (j, i, k): (x_i − x_j)·(x_k − x_j) / (d_ij d_kj)."""
    norms = products.diagonal()
    dots = products[None] - products[:, :, None] - products[:, None, :] + norms[:, None, None]
    lengths = distances[:, :, None] * distances[:, None, :]
    there = lengths > 0
    return torch.where(there, dots / torch.where(there, lengths, 1.0), 0.0)
