"""Observers against numpy, scipy, published optima and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from fxcompress.nn.observers import (
    BINS,
    Histogram,
    HistogramObserver,
    Kl,
    MinMax,
    MovingAverage,
    Mse,
    Observer,
    Percentile,
)
from fxcompress.nn.scheme import Scheme

ALL = (MinMax, MovingAverage, Percentile, Mse, Histogram, Kl)
UINT8 = Scheme(8, signed=False, symmetric=False)


def signed(bits: int) -> Scheme:
    return Scheme(bits, signed=True, symmetric=True, narrow=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def watch(observer: Observer, values: Tensor, parts: int = 1) -> Observer:
    for part in values.chunk(parts, 1):
        observer.update(part)
    return observer


def mean_error(values: Tensor, scheme: Scheme, low: Tensor, high: Tensor) -> float:
    scale, zero = scheme.parameters(low, high)
    integers = ((values / scale[:, None]).round() + zero[:, None]).clamp(scheme.low, scheme.high)
    return float(((integers - zero[:, None]) * scale[:, None] - values).square().mean())


@pytest.mark.parametrize("cls", ALL)
def test_what_is_not_finite_is_passed_over(cls: type[Observer]) -> None:
    values = normal(2, 100)
    holed = torch.cat([values, torch.full((2, 3), float("-inf")), torch.full((2, 1), float("nan"))], 1)
    bare, other = watch(cls(2), values), watch(cls(2), holed)
    for one, two in zip(bare.range(UINT8), other.range(UINT8), strict=True):
        assert torch.allclose(one, two)
    assert not cls(2).seen and other.seen
    nothing = watch(cls(1), torch.full((1, 4), float("nan")))
    assert not nothing.seen


def test_min_max_and_moving_average() -> None:
    values = normal(3, 40)
    low, high = watch(MinMax(3), values, 4).range(UINT8)
    assert torch.equal(low, values.amin(1)) and torch.equal(high, values.amax(1))
    low, high = watch(MovingAverage(3), values, 4).range(UINT8)
    expected = values[:, :10].amax(1)
    for part in values.chunk(4, 1)[1:]:
        expected = 0.99 * expected + 0.01 * part.amax(1)
    assert torch.allclose(high, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_histogram_counts_as_numpy(rows: int) -> None:
    values = normal(rows, 5000)
    observer = HistogramObserver(rows)
    observer.update(values)
    for row in range(rows):
        expected, _ = np.histogram(values[row].numpy(), BINS, (float(values[row].min()), float(values[row].max())))
        cumulative = observer.counts[row].cumsum(0).numpy()
        assert cumulative[-1] == 5000 and np.abs(cumulative - expected.cumsum()).max() <= 2  # values on an edge


def test_widening_keeps_the_distribution() -> None:
    """In parts that get wider and wider; then the quantiles are still those of all values, to a bin's width or two."""
    values = normal(1, 20_000) * torch.linspace(0.1, 4, 20_000)
    observer = watch(Percentile(1, share=0.99), values, 50)
    assert isinstance(observer, HistogramObserver) and float(observer.counts.sum()) == pytest.approx(20_000, rel=1e-4)
    low, high = observer.range(UINT8)
    width = float((observer.high - observer.low) / BINS)
    assert float(low) == pytest.approx(float(values.quantile(0.01)), abs=3 * width)
    assert float(high) == pytest.approx(float(values.quantile(0.99)), abs=3 * width)


# The best steps of a uniform quantizer with 2**bits − 1 levels for a normal distribution: J. Max, "Quantizing for
# Minimum Distortion", 1960, table II.
@pytest.mark.parametrize(("bits", "step"), [(2, 1.224), (3, 0.6508), (4, 0.3534)])
@pytest.mark.parametrize("cls", [Mse, Histogram])
def test_least_squares_of_a_normal_distribution(cls: type[Observer], bits: int, step: float) -> None:
    scheme = signed(bits)
    low, high = watch(cls(), normal(1, 400_000), 4).range(scheme)
    assert float(scheme.parameters(low, high)[0]) == pytest.approx(step, rel=0.03)


@pytest.mark.parametrize("scheme", [UINT8, signed(8), signed(4), signed(3)])
@pytest.mark.parametrize("cls", [Mse, Histogram])
def test_no_common_factor_does_better(cls: type[Observer], scheme: Scheme) -> None:
    values = normal(4, 3000, seed=1)
    values[:, :3] *= torch.tensor([[1.0], [5.0], [20.0], [80.0]])
    ranges = watch(cls(4), values).range(scheme)
    for row in range(4):
        one = values[row:row + 1]
        found = mean_error(one, scheme, ranges[0][row:row + 1], ranges[1][row:row + 1])
        best = min(mean_error(one, scheme, one.amin(1) * share, one.amax(1) * share)
                   for share in torch.linspace(0.012, 1, 400))
        assert found <= best * 1.03


def test_each_end_by_itself() -> None:
    """One far value below: `histogram` draws that end in alone, and beats the common factor of `mse`."""
    values = torch.cat([normal(1, 5000).abs(), torch.tensor([[-40.0]])], 1)
    scheme = Scheme(4, signed=False, symmetric=False)
    both, each = (mean_error(values, scheme, *watch(cls(), values).range(scheme)) for cls in (Mse, Histogram))
    assert each < both


def test_kl_is_the_entropy_of_scipy() -> None:
    """At the share that was chosen the divergence is not above that of any other, computed by scipy."""
    values = normal(1, 50_000)
    values[0, :10] *= 12
    observer = watch(Kl(), values)
    assert isinstance(observer, Kl)
    scheme = signed(4)
    chosen = float(observer.range(scheme)[1] / observer.high)

    def divergence(share: float) -> float:
        low, high = (float(end) * share for end in (observer.low, observer.high))
        centers, counts = observer.centers[0].numpy(), observer.counts[0].numpy().astype(float)
        inside = (centers >= low) & (centers <= high)
        p = counts[inside].copy()
        p[0] += counts[centers < low].sum()
        p[-1] += counts[centers > high].sum()
        scale = max(-low, high) / 7
        level = np.clip(np.round(centers[inside] / scale), -7, 7)
        q = np.zeros_like(p)
        for number in np.unique(level):
            at = (level == number) & (p > 0)
            q[at] = counts[inside][level == number].sum() / max(at.sum(), 1)
        return float(entropy(p + 0.0, np.maximum(q, 1e-12 * q.sum())))

    least = min(divergence(share) for share in (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05))
    assert divergence(chosen) <= least * 1.01
    assert chosen < 0.5  # the ten far values are given up


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("is_signed", [True, False])
def test_zero_stays_zero(bits: int, symmetric: bool, is_signed: bool) -> None:
    """Also for ranges on one side of zero, and for a tensor of zeros."""
    scheme = Scheme(bits, is_signed, symmetric)
    low, high = torch.tensor([0.5, -3.0, 0.0, -1.0]), torch.tensor([2.0, -1.0, 0.0, 4.0])
    scale, zero = scheme.parameters(low, high)
    assert bool((scale > 0).all()) and bool((zero >= scheme.low).all()) and bool((zero <= scheme.high).all())
    for number in (low, high):
        integers = ((number / scale).round() + zero).clamp(scheme.low, scheme.high)
        assert bool((((integers - zero) * scale - number).abs() <= scale * (1.01 if symmetric else 0.51)).all())
