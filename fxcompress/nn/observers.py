"""Observers: what range of values an integer type should cover.

An observer sees values as rows, `[rows, n]`: one row for a tensor with a single scale, one for each channel otherwise.
`update` takes values in, `range` says which to cover, as (low, high), each of the shape [rows]. Others add theirs
with `register_observer`. Values that aren't finite (masks of attention) are passed over.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .scheme import Scheme

BINS = 2048
_FINE, _COARSE = 70, 50  # shares of the full range that are tried: evenly from 1 to 0.3, geometrically to `_LEAST`
_LEAST = 0.01
_ELEMENTS = 2**20  # that are computed with at a time
_ROUNDS, _PLACES = 4, 48  # of `histogram`: rounds over both ends, candidates for an end


class Observer(nn.Module):
    """Base of the observers, and the simplest: the least and the greatest value."""

    low: Tensor
    high: Tensor

    def __init__(self, rows: int = 1, device: torch.device | None = None) -> None:
        """An observer of `rows` rows that has seen nothing."""
        super().__init__()
        self.register_buffer("low", torch.full((rows,), float("inf"), device=device))
        self.register_buffer("high", torch.full((rows,), float("-inf"), device=device))

    @property
    def seen(self) -> bool:
        """Whether every row has seen a value."""
        return bool((self.low <= self.high).all())

    def update(self, values: Tensor) -> None:
        """Take `values` in, [rows, n]."""
        low, high = extremes(values)
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The (low, high) of each row that `scheme` should cover."""
        return self.low, self.high

    forward = update


class MinMax(Observer):
    """The least and the greatest value seen."""


class MovingAverage(Observer):
    """Moving averages of the least and the greatest value of each update (Jacob et al., 2018, section 3.1):
    average + momentum · (value − average)."""

    momentum = 0.01

    def update(self, values: Tensor) -> None:
        """Take `values` in, [rows, n]."""
        for average, value in zip((self.low, self.high), extremes(values), strict=True):
            moved = torch.where(average.isfinite(), average + self.momentum * (value - average), value)
            average.copy_(torch.where(value.isfinite(), moved, average))


class HistogramObserver(Observer):
    """Base of those that look at the distribution: a histogram of `BINS` bins a row over all that was seen. When values
    come from outside of its range, it is widened and its counts are spread over the new bins, as if they lay evenly in
    the old ones."""

    counts: Tensor

    def __init__(self, rows: int = 1, device: torch.device | None = None) -> None:
        """An empty histogram."""
        super().__init__(rows, device)
        self.register_buffer("counts", torch.zeros(rows, BINS, device=device))

    def update(self, values: Tensor) -> None:
        """Take `values` in, [rows, n]."""
        values = values.detach().to(torch.float32)
        low, high = extremes(values)
        low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        if not torch.equal(low, self.low) or not torch.equal(high, self.high):
            self.counts.copy_(self._spread(low, high))
            self.low.copy_(low)
            self.high.copy_(high)
        self.counts += self._count(values)

    def _spread(self, low: Tensor, high: Tensor) -> Tensor:
        """The counts over the range `low` to `high`, by the cumulative distribution at the new edges."""
        edges = torch.linspace(0, 1, BINS + 1, device=low.device)
        places = low[:, None] + (high - low)[:, None] * edges
        width = ((self.high - self.low) / BINS).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        at = ((places - self.low[:, None]) / width).nan_to_num(0.0).clamp(0, BINS)
        before = at.floor().long().clamp(max=BINS - 1)
        total = torch.nn.functional.pad(self.counts.double().cumsum(1), (1, 0))
        cumulative = total.gather(1, before) + (at - before) * self.counts.double().gather(1, before)
        cumulative[:, -1] = total[:, -1]  # the highest value belongs to the last bin
        return cumulative.diff(dim=1).float()

    def _count(self, values: Tensor) -> Tensor:
        rows = len(self.low)
        if rows == 1 and values.device.type == "cpu" and values.numel():
            low, high = float(self.low), float(self.high)
            if low < high < float("inf"):  # passes over what isn't finite
                return torch.histc(values, BINS, low, high)[None]
        span = (self.high - self.low).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        finite = values.isfinite()
        share = ((values - self.low[:, None]) / span).nan_to_num(0.0).clamp(0, 1)
        place = (share * BINS).long().clamp(max=BINS - 1) + BINS * torch.arange(rows, device=values.device)[:, None]
        return torch.bincount(place[finite], minlength=rows * BINS).reshape(rows, BINS).to(torch.float32)

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, [rows, bins]."""
        middle = (torch.arange(BINS, device=self.low.device) + 0.5) / BINS
        return self.low[:, None] + (self.high - self.low)[:, None] * middle

    def errors(self, scheme: Scheme, low: Tensor, high: Tensor) -> Tensor:
        """The sum of squared differences that quantizing with each of several ranges gives: [tries, rows], as `low` and
        `high` are. Values lie at the centers. Takes the memory of a few tries at a time."""
        centers, found = self.centers, []
        few = max(1, _ELEMENTS // centers.numel())
        for lows, highs in zip(torch.split(low, few), torch.split(high, few), strict=True):
            scale, zero = (part[..., None] for part in scheme.parameters(lows, highs))
            integers = (centers / scale).round_().add_(zero).clamp_(scheme.low, scheme.high)
            apart = integers.sub_(zero).mul_(scale).sub_(centers).square_()
            found.append(torch.einsum("trb,rb->tr", apart, self.counts))
        return torch.cat(found)


class Percentile(HistogramObserver):
    """The values at the quantiles 1 − share and share."""

    def __init__(self, rows: int = 1, device: torch.device | None = None, share: float = 0.9999) -> None:
        """`share` in (0.5, 1]."""
        super().__init__(rows, device)
        self.share = share

    def range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The (low, high) of each row, to the width of a bin."""
        total = self.counts.double().cumsum(1)
        wanted = torch.tensor([1 - self.share, self.share], dtype=torch.float64, device=total.device) * total[:, -1:]
        first = torch.searchsorted(total, wanted[:, :1].contiguous(), right=True).clamp(max=BINS - 1)
        last = torch.searchsorted(total, wanted[:, 1:].contiguous()).clamp(max=BINS - 1) + 1
        width = (self.high - self.low) / BINS
        return self.low + first[:, 0] * width, self.low + last[:, 0] * width


class Mse(HistogramObserver):
    """Both ends drawn in by one factor, to the least mean squared error of quantization. Choukroun et al., "Low-bit
    Quantization of Neural Networks for Efficient Inference", 2019 (OMSE)."""

    def range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The best (low, high) of each row."""
        factors = _shares(self.low.device)
        best = factors[self.errors(scheme, factors[:, None] * self.low, factors[:, None] * self.high).argmin(0)]
        return self.low * best, self.high * best


class Histogram(Mse):
    """Each end drawn in by a factor of its own, to the least squared error (L2): from coarse to fine, one end after the
    other. Where the scheme is symmetric the ends move together, as in `mse`."""

    def range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The (low, high) of each row."""
        if scheme.symmetric:
            return super().range(scheme)
        ends = torch.stack([self.low.clamp(max=0), self.high.clamp(min=0)])
        factors = torch.ones_like(ends)
        steps = torch.linspace(-1, 1, _PLACES, device=ends.device)[:, None]
        for round_ in range(_ROUNDS):
            for side in (1, 0):
                candidates = torch.cat([factors[side][None], (factors[side] + steps / 4**round_).clamp(_LEAST, 1.0)])
                tried = (ends * factors)[:, None].repeat(1, len(candidates), 1)
                tried[side] = ends[side] * candidates
                factors[side] = candidates.gather(0, self.errors(scheme, *tried).argmin(0)[None])[0]
        low, high = ends * factors
        return low, high


class Kl(HistogramObserver):
    """Both ends drawn in by one factor, to the least Kullback-Leibler divergence of the quantized distribution from the
    clipped one. Migacz, "8-bit Inference with TensorRT", 2017."""

    def range(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The best (low, high) of each row."""
        factors = _shares(self.low.device)
        few = max(1, _ELEMENTS // self.counts.numel())
        tried = [self._divergences(scheme, part[:, None] * self.low, part[:, None] * self.high)
                 for part in torch.split(factors, few)]
        best = factors[torch.cat(tried).argmin(0)]
        return self.low * best, self.high * best

    def _divergences(self, scheme: Scheme, low: Tensor, high: Tensor) -> Tensor:
        """KL(P‖Q) of several ranges, [tries, rows] as `low` and `high` are: P has what lies outside in its end bins; Q
        spreads what falls on one integer over the bins of that integer that aren't empty."""
        centers, counts = self.centers, self.counts.double()
        scale, zero = (part[..., None] for part in scheme.parameters(low, high))
        below, above = centers < low[..., None], centers > high[..., None]
        inside = ~(below | above)
        held = counts * inside
        clipped = held.clone()
        for outside, end in ((below, inside.byte().argmax(-1, keepdim=True)),
                             (above, BINS - 1 - inside.flip(-1).byte().argmax(-1, keepdim=True))):
            clipped.scatter_add_(-1, end, (counts * outside).sum(-1, keepdim=True))
        integers = ((centers / scale).round() + zero).clamp(scheme.low, scheme.high).long() - scheme.low
        filled = (clipped > 0).double()
        mass = held.new_zeros(*low.shape, scheme.steps + 1)
        share = mass.scatter_add(-1, integers, filled)
        mass = mass.scatter_add(-1, integers, held) / share.clamp(min=1)
        p, q = clipped / clipped.sum(-1, keepdim=True), mass.gather(-1, integers) * filled
        q = q / q.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        found = torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0).sum(-1)
        return torch.where(inside.any(-1), found, torch.inf)


def _shares(device: torch.device) -> Tensor:
    """The factors that are tried, from 1 downwards."""
    fine = torch.linspace(1.0, 0.3, _FINE, device=device)
    return torch.cat([fine, 0.3 * (_LEAST / 0.3) ** torch.linspace(0, 1, _COARSE + 1, device=device)[1:]])


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest finite value of each row: (inf, -inf) for a row without one."""
    values = values.detach().to(torch.float32)
    if not values.shape[1]:
        empty = values.new_full((len(values),), float("inf"))
        return empty, -empty
    low, high = values.aminmax(dim=1)
    if bool((low.isfinite() & high.isfinite()).all()):
        return low, high
    finite = values.isfinite()
    return (torch.where(finite, values, float("inf")).amin(1), torch.where(finite, values, float("-inf")).amax(1))
