"""What rounds while a model trains, and stops moving before training ends: quantizers whose ranges follow what they
see, batch norms whose statistics can be frozen.

Their switches are buffers, so that a checkpoint holds them, with a plain copy beside each that `forward` reads.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .observers import extremes
from .quantizer import Quantizer
from .scheme import Scheme

MOMENTUM = 0.01  # of the moving averages of what values reach, the share of a new batch
_LEAST = 1e-6  # of a norm's factor: a channel that the norm multiplies by zero has weights still


class TrainedQuantizer(Quantizer):
    """Rounds as `Quantizer` does; in training its range moves: for values, moving averages of the least and the
    greatest of each batch (Jacob et al., 2018, section 3.1), for a weight what it reaches now.

    A weight before a batch norm is rounded as it will be folded, and scaled back: with f = γ/√(σ² + ε) from the running
    statistics, Q(w·f)/f (Krishnamoorthi, 2018, section 3.2.2; scaling the layer's result back is the same). The norm
    itself computes as ever, on batches while it trains. Gradients pass to `w` where w·f lies inside of the range.

    `moves` says whether the range still moves, `rounds` whether values are rounded or only watched.
    """

    low: Tensor
    high: Tensor
    moves: Tensor
    rounds: Tensor

    def __init__(self, scheme: Scheme, rows: int = 1, axis: int | None = None, observer: str = "minmax",
                 arguments: tuple[float, ...] = (), on: bool = False, averages: bool = True, eps: float = 0.0,
                 device: torch.device | None = None) -> None:
        """`averages` is for values; `eps` is that of the norm behind a weight."""
        super().__init__(scheme, rows, axis, observer, arguments, on, device)
        self.averages, self.eps = averages, eps
        self.register_buffer("low", torch.full((rows,), float("inf"), device=device))
        self.register_buffer("high", torch.full((rows,), float("-inf"), device=device))
        for name in ("moves", "rounds"):
            self.register_buffer(name, torch.ones((), dtype=torch.bool, device=device))
        self._moves = self._rounds = True

    def forward(self, x: Tensor, variance: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
        """`x` rounded, of the same shape and dtype. `variance` and `gamma`, [out], are of the norm behind a weight."""
        if x.device.type == "meta":
            return x
        factor = self._factor(x, variance, gamma)
        folded = x if factor is None else x * factor
        if self.training and self._moves:
            self.watch(folded.detach())
        made = super().forward(folded) if self._rounds else folded
        return made if factor is None else made / factor

    def folded(self, x: Tensor, variance: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
        """A weight as it is rounded: scaled by the norm behind it."""
        factor = self._factor(x, variance, gamma)
        return x if factor is None else x * factor

    def _factor(self, weight: Tensor, variance: Tensor | None, gamma: Tensor | None) -> Tensor | None:
        if variance is None:
            return None
        factor = (variance + self.eps).rsqrt()
        if gamma is not None:
            factor = factor * gamma.detach()
        factor = torch.where(factor.abs() < _LEAST, torch.full_like(factor, _LEAST), factor)
        return factor.reshape(-1, *[1] * (weight.dim() - 1)).to(weight.dtype)

    def watch(self, x: Tensor) -> None:
        """Let the range follow `x`. Values that aren't finite are passed over."""
        with torch.no_grad():
            low, high = extremes(self.in_rows(x).float())
            if self.averages and self.on:
                low, high = (torch.where(new.isfinite(), old + MOMENTUM * (new - old), old)
                             for old, new in ((self.low, low), (self.high, high)))
            if self.on or bool((low <= high).all()):
                self.cover(low, high)

    def cover(self, low: Tensor, high: Tensor) -> None:
        """Cover `low` to `high`, each [rows], and go on from there."""
        self.low.copy_(low)
        self.high.copy_(high)
        super().cover(low, high)

    def switch(self, *, moves: bool, rounds: bool) -> None:
        """Set both switches."""
        self.moves.fill_(moves)
        self.rounds.fill_(rounds)
        self._moves, self._rounds = moves, rounds

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.low.device.type != "meta":
            self._moves, self._rounds = bool(self.moves), bool(self.rounds)
            self.on = bool((self.low <= self.high).all())

    def extra_repr(self) -> str:
        """The integers, the axis, and what the switches say."""
        return super().extra_repr() + ("" if self._rounds else ", only watches") + ("" if self._moves else ", frozen")


class _Freezing(nn.modules.batchnorm._BatchNorm):
    """A batch norm that, once frozen, computes with its running statistics in training too, and leaves them alone."""

    frozen: Tensor
    plain: ClassVar[type[nn.modules.batchnorm._BatchNorm]]

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True) -> None:
        """As torch's batch norms."""
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self._frozen = False

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
        """One on the very parameters and buffers of `norm`."""
        with torch.device("meta"):
            made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made._parameters.update(norm._parameters)
        made._buffers.update(norm._buffers)
        assert norm.running_var is not None
        made.frozen = torch.zeros((), dtype=torch.bool, device=norm.running_var.device)
        return made.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalised, of the same shape."""
        if not self.training or not self._frozen:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def freeze(self, frozen: bool) -> None:
        """Set the switch."""
        self.frozen.fill_(frozen)
        self._frozen = frozen

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.frozen.device.type != "meta":
            self._frozen = bool(self.frozen)


class FreezingBatchNorm1d(_Freezing, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` that can be frozen."""

    plain = nn.BatchNorm1d


class FreezingBatchNorm2d(_Freezing, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that can be frozen."""

    plain = nn.BatchNorm2d


FREEZING: tuple[type[_Freezing], ...] = (FreezingBatchNorm1d, FreezingBatchNorm2d)


def freezing(norm: nn.Module) -> nn.Module:
    """`norm` as one that can be frozen, on the same parameters; itself where it is no plain batch norm."""
    for cls in FREEZING:
        if type(norm) is cls.plain:
            assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
            return cls.of(norm)
    return norm
