"""Temperatures of a distillation, each a module whose value a term divides logits by."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """A number in the buffer `value`, 0-dim, that a schedule may write."""

    value: Tensor

    def __init__(self, value: float = 1.0, device: torch.device | None = None) -> None:
        """Begins at `value`, which is more than 0."""
        super().__init__()
        self.register_buffer("value", torch.tensor(value, device=device))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T, 0-dim."""
        return self.value

    def put(self, value: float) -> bool:
        """Write the value, in place: nothing that was compiled is compiled anew."""
        self.value.fill_(value)
        return True


class AdaptiveTemperature(Temperature):
    """T = max(‖s − t‖₂ / n, 0.1), s and t what student and teacher give and n how many numbers each has: near to each
    other they are compared sharply. No gradient flows through T. `value` holds the last."""

    FLOOR: ClassVar[float] = 0.1

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T, 0-dim."""
        apart = student.detach().float() - teacher.detach().float()
        found: Tensor = (torch.linalg.vector_norm(apart) / student.numel()).clamp_min(self.FLOOR)
        self.value.copy_(found)
        return found


class LearnedTemperature(Temperature):
    """T = 1 + 20 σ(p), p a parameter that is trained *against* the term (its gradient is reversed), so that T makes the
    student's task harder, never trivially easy: Li et al., "Curriculum Temperature for Knowledge Distillation", 2023,
    with a global temperature and λ = 1. It begins at the value given, within 1 and 21. `value` holds the last."""

    LEAST: ClassVar[float] = 1.0
    SPAN: ClassVar[float] = 20.0

    def __init__(self, value: float = 4.0, device: torch.device | None = None) -> None:
        """Begins at `value`."""
        super().__init__(value, device)
        share = min(0.999, max(0.001, (value - self.LEAST) / self.SPAN))
        self.position = nn.Parameter(torch.logit(torch.tensor(share, device=device)))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T, 0-dim."""
        reversed_ = 2 * self.position.detach() - self.position
        found = self.LEAST + self.SPAN * torch.sigmoid(reversed_)
        self.value.copy_(found.detach())
        return found
