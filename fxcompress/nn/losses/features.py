"""Losses on what both models compute inside: features of equal shapes, or of equal places."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Fit, Loss, exactly, rows, samples, whole


class MSE(Loss):
    """The mean of (s − t)² over all numbers: on logits, Ba and Caruana, "Do Deep Nets Really Need to be Deep?", 2014.
    """

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term."""
        return F.mse_loss(whole(student), whole(teacher))


class Cosine(Loss):
    """The mean over rows of 1 − cos(s, t), the features of a place being a vector: Sanh et al., "DistilBERT", 2019,
    on hidden states."""

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term."""
        return (1 - F.cosine_similarity(rows(student), rows(teacher), 1)).mean()


class Hint(Loss):
    """The mean over samples of ½ ‖t − r(s)‖², r the adapter: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015,
    equation (3). It is `mse` times half the numbers of a sample."""

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term."""
        return (samples(teacher) - samples(student)).square().sum(1).mean() / 2


class Attention(Loss):
    """The mean over samples of ½ ‖Q_s / ‖Q_s‖ − Q_t / ‖Q_t‖‖, Q the map of Σ over channels of a² as a vector:
    Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, equation (2) with F²_sum and p = 2."""

    fits: ClassVar[Fit] = "places"

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term."""
        apart: Tensor = torch.linalg.vector_norm(_attention(student) - _attention(teacher), dim=1)
        return apart.mean() / 2


def _attention(value: Tensor) -> Tensor:
    channels = -1 if value.dim() == 3 else 1
    return F.normalize(whole(value).square().sum(channels).flatten(1), dim=1)


class NST(Loss):
    """MMD² between the channels' maps, each of length 1, with the kernel k(x, y) = (x·y)²: the mean over samples of
    Σ k(t, t') / C_t² + Σ k(s, s') / C_s² − 2 Σ k(s, t) / (C_s C_t). Huang and Wang, "Like What You Like: Knowledge
    Distill via Neuron Selectivity Transfer", 2017, equation (4) with the polynomial kernel (d = 2, c = 0)."""

    fits: ClassVar[Fit] = "places"

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term."""
        s, t = _maps(student), _maps(teacher)
        with exactly(s):
            return _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)


def _maps(value: Tensor) -> Tensor:
    """(N, channels, places), each map of length 1."""
    value = whole(value)
    maps = value.transpose(1, 2) if value.dim() == 3 else value.flatten(2)
    return F.normalize(maps, dim=2)


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other.transpose(1, 2)).square().mean()
