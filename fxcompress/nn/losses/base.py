"""What all terms of a distillation share."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Fit = Literal["logits", "same", "places", "batch"]


class Loss(nn.Module):
    """One term: a number, 0-dim, that says how far the student is from what it learns from. It is not weighted.

    The class says what it takes, and the pass checks that:

    * `soft`: it softens by a temperature, `default_temperature` where none is given; it multiplies its value by T², so
      that gradients keep their size as T moves (Hinton, Vinyals and Dean, 2015, section 2)
    * `labels`: it reads the labels; `teacher`: it reads the teacher
    * `fits`: what of both shapes must be equal. `logits`: all, and no adapter is made unless asked for; `same`: all;
      `places`: all but the channels; `batch`: the first dimension alone
    * `parts`: what `alpha` and `beta` are the weights of, and `defaults` their values

    `forward(student, teacher, temperature, targets)` gets None for what the class doesn't take.
    """

    soft: ClassVar[bool] = False
    labels: ClassVar[bool] = False
    teacher: ClassVar[bool] = True
    fits: ClassVar[Fit] = "same"
    smooths: ClassVar[bool] = False  # takes `label_smoothing`
    parts: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[tuple[float, ...]] = ()
    default_temperature: ClassVar[float] = 4.0

    def __init__(self, alpha: float | None = None, beta: float | None = None, label_smoothing: float = 0.0) -> None:
        """`alpha` and `beta` are the weights of `parts`."""
        super().__init__()
        known = (*self.defaults, 1.0, 1.0)
        self.alpha = known[0] if alpha is None else alpha
        self.beta = known[1] if beta is None else beta
        self.label_smoothing = label_smoothing

    def forward(self, student: Tensor, teacher: Tensor, temperature: Tensor, targets: Tensor) -> Tensor:
        """The term."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The settings that mean something."""
        shown = [f"{name}={value:g}" for name, value in zip(("alpha", "beta"), (self.alpha, self.beta), strict=True)]
        return ", ".join(shown[:len(self.parts)])


def whole(value: Tensor) -> Tensor:
    """`value` in at least single precision: sums of exponentials overflow in half."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def exactly(value: Tensor) -> torch.autocast:
    """While it lasts autocasting is off where `value` lies: products of single precision are of single precision."""
    return torch.autocast(value.device.type, enabled=False)


def rows(value: Tensor) -> Tensor:
    """`value` as (rows, features), in at least single precision. Features are the last dimension of [N, C] and of
    sequences [N, T, C], and dimension 1 of images [N, C, H, W]; every place is a row."""
    value = whole(value)
    if value.dim() > 3:
        value = value.movedim(1, -1)
    return value if value.dim() == 2 else value.reshape(-1, value.shape[-1])


def samples(value: Tensor) -> Tensor:
    """`value` as (N, everything of a sample), in at least single precision."""
    return whole(value).flatten(1)
