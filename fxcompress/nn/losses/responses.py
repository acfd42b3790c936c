"""Losses on what both models give: logits and probabilities.

Below, s and t are the logits of student and teacher, p = softmax(t / T), q = softmax(s / T), and means are over rows
(samples; places or tokens where there are such).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Fit, Loss, rows, samples


def softened_kl(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """T² · mean over rows of Σ p (log p − log q), of (rows, classes)."""
    p, q = F.log_softmax(teacher / temperature, 1), F.log_softmax(student / temperature, 1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature.square()


class KL(Loss):
    """T² · mean Σ p (log p − log q): Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015."""

    soft: ClassVar[bool] = True
    fits: ClassVar[Fit] = "logits"

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term; classes are the features of `rows`."""
        return softened_kl(rows(student), rows(teacher), temperature)


class SoftCrossEntropy(Loss):
    """−T² · mean Σ p log q, the objective of Hinton, Vinyals and Dean, 2015: its gradient is that of `kl`, its least
    value the entropy of the teacher."""

    soft: ClassVar[bool] = True
    fits: ClassVar[Fit] = "logits"

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term."""
        p = F.softmax(rows(teacher) / temperature, 1)
        q = F.log_softmax(rows(student) / temperature, 1)
        return -(p * q).sum(1).mean() * temperature.square()


class CrossEntropy(Loss):
    """−mean Σ y log softmax(s), with y = (1 − ε) [class = label] + ε / C for label smoothing ε (Szegedy et al.,
    "Rethinking the Inception Architecture", 2016, section 7). Labels of −100 don't count, as in torch."""

    labels: ClassVar[bool] = True
    teacher: ClassVar[bool] = False
    smooths: ClassVar[bool] = True
    fits: ClassVar[Fit] = "logits"

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term. `targets` are class indices, one a row, or probabilities of the logits' shape."""
        targets = rows(targets) if targets.is_floating_point() else targets.reshape(-1)
        return F.cross_entropy(rows(student), targets, label_smoothing=self.label_smoothing)


class Decoupled(Loss):
    """T² · mean (α · KL(b_t ‖ b_s) + β · KL(p̂ ‖ q̂)), where b = (the probability of the label's class, that of all
    others) and p̂, q̂ are the probabilities of the others among themselves: Zhao et al., "Decoupled Knowledge
    Distillation", 2022, equation (7). Computed on logarithms throughout. By default α = 1 and β = 8."""

    soft: ClassVar[bool] = True
    labels: ClassVar[bool] = True
    fits: ClassVar[Fit] = "logits"
    parts: ClassVar[tuple[str, ...]] = ("the label's class", "the other classes")
    defaults: ClassVar[tuple[float, ...]] = (1.0, 8.0)

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term. `targets` are class indices, one a row."""
        target = targets.reshape(-1, 1)
        s, t = rows(student) / temperature, rows(teacher) / temperature
        others = torch.arange(s.shape[1] - 1, device=s.device).expand(s.shape[0], -1)
        others = others + (others >= target)  # the classes that aren't the label's
        b_s, b_t = _binary(s, target, others), _binary(t, target, others)
        one = F.kl_div(b_s, b_t, reduction="batchmean", log_target=True)
        q, p = F.log_softmax(s.gather(1, others), 1), F.log_softmax(t.gather(1, others), 1)
        rest = F.kl_div(q, p, reduction="batchmean", log_target=True)
        return (self.alpha * one + self.beta * rest) * temperature.square()


def _binary(logits: Tensor, target: Tensor, others: Tensor) -> Tensor:
    """The logarithms of the probability of the label's class, and of all others: (rows, 2)."""
    rest = logits.gather(1, others).logsumexp(1, keepdim=True)
    return F.log_softmax(torch.cat((logits.gather(1, target), rest), 1), 1)


class LogitStandardized(Loss):
    """`kl` of logits that are standardised in each row, z = (x − mean) / (σ + 1e-7), σ² the mean square over the
    classes: Sun et al., "Logit Standardization in Knowledge Distillation", 2024, algorithm 1. T is 2 by default."""

    soft: ClassVar[bool] = True
    fits: ClassVar[Fit] = "logits"
    default_temperature: ClassVar[float] = 2.0

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term."""
        return softened_kl(_standard(rows(student)), _standard(rows(teacher)), temperature)


def _standard(logits: Tensor) -> Tensor:
    centred = logits - logits.mean(1, keepdim=True)
    return centred / (logits.std(1, correction=0, keepdim=True) + 1e-7)


class Dist(Loss):
    """T² · (α · mean over rows of (1 − ρ(q_i, p_i)) + β · mean over classes of (1 − ρ(q^j, p^j))), ρ Pearson's
    correlation: Huang et al., "Knowledge Distillation from A Stronger Teacher" (DIST), 2022, equations (6) to (9). By
    default α = β = 1 and T = 1."""

    soft: ClassVar[bool] = True
    fits: ClassVar[Fit] = "logits"
    parts: ClassVar[tuple[str, ...]] = ("relations between classes", "relations between samples")
    defaults: ClassVar[tuple[float, ...]] = (1.0, 1.0)
    default_temperature: ClassVar[float] = 1.0

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term."""
        q, p = F.softmax(rows(student) / temperature, 1), F.softmax(rows(teacher) / temperature, 1)
        between = 1 - _pearson(q, p).mean()
        within = 1 - _pearson(q.T, p.T).mean()
        return (self.alpha * between + self.beta * within) * temperature.square()


def _pearson(one: Tensor, other: Tensor) -> Tensor:
    """The correlation of each row of `one` with that of `other`."""
    return F.cosine_similarity(one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True), 1)


class ActivationKL(Loss):
    """`kl` of softened intermediate activations: all numbers of a sample's activation are taken as logits, T² · mean
    over samples of Σ p (log p − log q), p = softmax(t / T) and q = softmax(s / T) over them (Hinton, Vinyals and Dean's
    objective on a hidden layer)."""

    soft: ClassVar[bool] = True

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term."""
        return softened_kl(samples(student), samples(teacher), temperature)
