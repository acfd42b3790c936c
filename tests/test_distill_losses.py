"""Each loss against its formula, written out here with loops where that is plainer than how the package computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from fxcompress.nn import losses
from fxcompress.nn.temperature import AdaptiveTemperature, LearnedTemperature, Temperature
from fxcompress.passbase import LOSSES

N, C = 6, 5
T = 3.0


def draw(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 for _ in "st")  # type: ignore[return-value]


def term(loss: losses.Loss, s: Tensor, t: Tensor | None, temperature: float | None = None,
         targets: Tensor | None = None) -> float:
    softened = None if temperature is None else torch.tensor(temperature, dtype=torch.float64)
    return float(loss(s, t, softened, targets))


def probabilities(row: Tensor, temperature: float) -> list[float]:
    powers = [math.exp(float(value) / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def kl_rows(s: Tensor, t: Tensor, temperature: float) -> float:
    total = 0.0
    for a, b in zip(s, t, strict=True):
        q, p = probabilities(a, temperature), probabilities(b, temperature)
        total += sum(y * (math.log(y) - math.log(x)) for x, y in zip(q, p, strict=True))
    return temperature**2 * total / len(s)


def test_kl() -> None:
    s, t = draw(N, C)
    assert term(losses.KL(), s, t, T) == pytest.approx(kl_rows(s, t, T))
    assert term(losses.KL(), t, t, T) == pytest.approx(0.0, abs=1e-12)


def test_soft_cross_entropy() -> None:
    s, t = draw(N, C)
    total = 0.0
    for a, b in zip(s, t, strict=True):
        q, p = probabilities(a, T), probabilities(b, T)
        total -= sum(y * math.log(x) for x, y in zip(q, p, strict=True))
    assert term(losses.SoftCrossEntropy(), s, t, T) == pytest.approx(T**2 * total / N)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float) -> None:
    s, _ = draw(N, C)
    labels = torch.arange(N) % C
    total = 0.0
    for row, label in zip(s, labels.tolist(), strict=True):
        for place, q in enumerate(probabilities(row, 1.0)):
            total -= ((1 - smoothing) * (place == label) + smoothing / C) * math.log(q)
    assert term(losses.CrossEntropy(label_smoothing=smoothing), s, None, None, labels) == pytest.approx(total / N)


def test_mse_hint_and_cosine() -> None:
    s, t = draw(N, 3, 4, 4)
    apart = [float(a - b) ** 2 for a, b in zip(s.flatten(), t.flatten(), strict=True)]
    assert term(losses.MSE(), s, t) == pytest.approx(sum(apart) / len(apart))
    assert term(losses.Hint(), s, t) == pytest.approx(sum(apart) / N / 2)
    found = []
    for n, h, w in product(range(N), range(4), range(4)):
        a, b = s[n, :, h, w], t[n, :, h, w]
        found.append(1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
    assert term(losses.Cosine(), s, t) == pytest.approx(sum(found) / len(found))


def test_attention() -> None:
    s, t = draw(N, 3, 4, 4)
    t = torch.cat((t, t.flip(1)), 1)  # other channels, same places

    def map_of(value: Tensor) -> list[float]:
        flat = [sum(float(value[c, h, w]) ** 2 for c in range(len(value))) for h, w in product(range(4), range(4))]
        length = math.sqrt(sum(item**2 for item in flat))
        return [item / length for item in flat]

    each = [math.sqrt(sum((x - y) ** 2 for x, y in zip(map_of(a), map_of(b), strict=True))) / 2
            for a, b in zip(s, t, strict=True)]
    assert term(losses.Attention(), s, t) == pytest.approx(sum(each) / N)


def test_similarity() -> None:
    s, t = draw(N, 3, 4, 4)[0], draw(N, 7)[1]

    def matrix(value: Tensor) -> list[list[float]]:
        flat = value.flatten(1)
        rows = [[float(a @ b) for b in flat] for a in flat]
        return [[item / math.sqrt(sum(other**2 for other in row)) for item in row] for row in rows]

    a, b = matrix(s), matrix(t)
    total = sum((a[i][j] - b[i][j]) ** 2 for i, j in product(range(N), range(N)))
    assert term(losses.Similarity(), s, t) == pytest.approx(total / N**2)


def huber(a: float, b: float) -> float:
    return (a - b) ** 2 / 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def test_relation() -> None:
    s, t = draw(N, 8)[0], draw(N, 3, 2)[1]

    def distances(value: Tensor) -> dict[tuple[int, int], float]:
        flat = value.flatten(1)
        found = {(i, j): float((flat[i] - flat[j]).norm()) for i, j in product(range(N), range(N))}
        mean = sum(found[i, j] for i, j in found if i != j) / (N * (N - 1))
        return {key: item / mean for key, item in found.items()}

    def angle(value: Tensor, i: int, j: int, k: int) -> float:
        flat = value.flatten(1)
        a, b = flat[i] - flat[j], flat[k] - flat[j]
        return float((a / a.norm()) @ (b / b.norm())) if i != j != k else 0.0

    ds, dt = distances(s), distances(t)
    first = sum(huber(ds[key], dt[key]) for key in ds) / N**2
    second = sum(huber(angle(s, i, j, k), angle(t, i, j, k)) for i, j, k in product(range(N), repeat=3)) / N**3
    assert term(losses.Relation(beta=0.0), s, t) == pytest.approx(first)
    assert term(losses.Relation(alpha=0.0, beta=1.0), s, t) == pytest.approx(second)
    assert term(losses.Relation(), s, t) == pytest.approx(first + 2 * second)


def test_relation_has_slopes_everywhere() -> None:
    s, t = draw(N, 8)
    s[1] = s[0]  # two samples that agree: the root's slope there is endless
    s.requires_grad_(True)
    losses.Relation()(s, t, None, None).backward()  # type: ignore[arg-type]
    assert s.grad is not None and bool(s.grad.isfinite().all())


def test_decoupled() -> None:
    s, t = draw(N, C)
    labels = (torch.arange(N) * 2) % C
    total = 0.0
    for a, b, label in zip(s, t, labels.tolist(), strict=True):
        q, p = probabilities(a, T), probabilities(b, T)
        target = sum(y * math.log(y / x) for x, y in ((q[label], p[label]), (1 - q[label], 1 - p[label])))
        others = [place for place in range(C) if place != label]
        rest = sum(p[k] / (1 - p[label]) * math.log(p[k] / (1 - p[label]) / (q[k] / (1 - q[label]))) for k in others)
        total += 1.5 * target + 4.0 * rest
    loss = losses.Decoupled(alpha=1.5, beta=4.0)
    assert term(loss, s, t, T, labels) == pytest.approx(T**2 * total / N)


def test_decoupled_is_exact_where_probabilities_vanish() -> None:
    """A teacher so sure that 1 − p rounds to 0: logarithms of probabilities give infinities there."""
    s, t = draw(N, C)
    labels = torch.zeros(N, dtype=torch.long)
    t[:, 0] = 200.0
    s.requires_grad_(True)
    found = losses.Decoupled()(s, t, torch.tensor(1.0), labels)
    found.backward()
    assert bool(found.isfinite()) and s.grad is not None and bool(s.grad.isfinite().all())


def test_nst() -> None:
    s, t = draw(N, 3, 4, 4)
    t = torch.cat((t, t.flip(2)), 1)
    total = 0.0
    for mine, theirs in zip(s.flatten(2), t.flatten(2), strict=True):
        a, b = (torch.stack([row / row.norm() for row in rows]) for rows in (mine, theirs))

        def mean(one: Tensor, other: Tensor) -> float:
            return sum(float(x @ y) ** 2 for x in one for y in other) / (len(one) * len(other))

        total += mean(b, b) + mean(a, a) - 2 * mean(a, b)
    assert term(losses.NST(), s, t) == pytest.approx(total / N)


def test_logit_standardized() -> None:
    s, t = draw(N, C)

    def standard(value: Tensor) -> Tensor:
        rows = []
        for row in value.tolist():
            mean = sum(row) / C
            spread = math.sqrt(sum((item - mean) ** 2 for item in row) / C)
            rows.append([(item - mean) / (spread + 1e-7) for item in row])
        return torch.tensor(rows, dtype=torch.float64)

    assert term(losses.LogitStandardized(), s, t, 2.0) == pytest.approx(kl_rows(standard(s), standard(t), 2.0))
    shifted = 3.0 * s + 7.0  # neither shift nor scale counts
    assert term(losses.LogitStandardized(), s, shifted, 2.0) == pytest.approx(0.0, abs=1e-9)


def test_activation_kl() -> None:
    s, t = draw(N, 3, 4, 4)
    expected = kl_rows(s.flatten(1), t.flatten(1), T)
    assert term(losses.ActivationKL(), s, t, T) == pytest.approx(expected)


def test_dist() -> None:
    s, t = draw(N, C)
    q = [probabilities(row, T) for row in s]
    p = [probabilities(row, T) for row in t]

    def pearson(a: list[float], b: list[float]) -> float:
        ma, mb = sum(a) / len(a), sum(b) / len(b)
        top = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
        return top / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))

    between = sum(1 - pearson(a, b) for a, b in zip(q, p, strict=True)) / N
    columns = [([row[k] for row in q], [row[k] for row in p]) for k in range(C)]
    within = sum(1 - pearson(a, b) for a, b in columns) / C
    found = term(losses.Dist(alpha=2.0, beta=0.5), s, t, T)
    assert found == pytest.approx(T**2 * (2.0 * between + 0.5 * within))


def test_every_loss_is_tested_here() -> None:
    ours = {name for name in LOSSES.names() if LOSSES[name].__module__.startswith("fxcompress.")}
    here = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert ours - here == {"mse", "hint", "cosine"}, "in test_mse_hint_and_cosine"


@pytest.mark.parametrize("name", sorted(set(LOSSES.names()) - {"attention", "nst"}))
def test_slopes_are_right(name: str) -> None:
    """Against differences, in double precision."""
    s, t = draw(4, 3)
    targets = torch.tensor([0, 2, 1, 1])
    loss, temperature = LOSSES[name](), torch.tensor(2.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: loss(value, t, temperature, targets), (s.requires_grad_(True),))


@pytest.mark.parametrize("name", ["attention", "nst"])
def test_slopes_of_maps_are_right(name: str) -> None:
    s, t = draw(2, 2, 2, 2)
    loss: Callable[..., Tensor] = LOSSES[name]()
    assert torch.autograd.gradcheck(lambda value: loss(value, t, None, None), (s.requires_grad_(True),))


def test_sequences_and_images_count_every_place_as_a_row() -> None:
    s, t = draw(N * 4, C)
    expected = kl_rows(s, t, T)
    assert term(losses.KL(), s.view(N, 4, C), t.view(N, 4, C), T) == pytest.approx(expected)
    images = [value.view(N, 2, 2, C).permute(0, 3, 1, 2) for value in (s, t)]
    assert term(losses.KL(), *images, T) == pytest.approx(expected)
    labels = torch.arange(N * 4) % C
    flat = term(losses.CrossEntropy(), s, None, None, labels)
    assert term(losses.CrossEntropy(), images[0], None, None, labels.view(N, 2, 2)) == pytest.approx(flat)


@pytest.mark.parametrize("name", ["kl", "soft_cross_entropy", "logit_standardized"])
def test_slopes_keep_their_size_as_the_temperature_moves(name: str) -> None:
    """Hinton et al., section 2: with T², the gradient's size hardly depends on T; without, it goes by 1 / T²."""
    s, t = draw(64, 10, seed=3)
    loss = LOSSES[name]()
    sizes = []
    for temperature in (4.0, 8.0, 16.0, 32.0):
        value = (s / 2).requires_grad_(True)
        loss(value, t / 2, torch.tensor(temperature), None).backward()
        assert value.grad is not None
        sizes.append(float(value.grad.norm()))
    assert max(sizes) / min(sizes) < 1.2
    assert max(sizes) / min(sizes) < (32 / 4) ** 2 / 50, "without T² the ratio would be 64"


def test_half_precision_does_not_overflow() -> None:
    s, t = (value.to(torch.float16) * 100 for value in draw(N, C))
    assert bool(losses.KL()(s, t, torch.tensor(0.1), None).isfinite())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LOSSES.names())
def test_terms_are_of_single_precision_where_models_are_autocast(name: str) -> None:
    s, t = (value.float() for value in draw(N, 3, 4, 4)) if name in ("attention", "nst") else (
        value.float() for value in draw(N, C))
    loss, targets, temperature = LOSSES[name](), torch.arange(N) % C, torch.tensor(2.0)
    expected = loss(s, t, temperature, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(s, t, temperature, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_temperatures() -> None:
    s, t = draw(N, C)
    constant = Temperature(4.0)
    constant.put(2.5)
    assert float(constant(s, t)) == 2.5
    adaptive = AdaptiveTemperature()
    assert float(adaptive(s * 100, t)) == pytest.approx(
        math.sqrt(sum(float(x) ** 2 for x in (s * 100 - t).flatten())) / s.numel())
    assert float(adaptive(s, s)) == pytest.approx(0.1), "kept away from zero"
    assert float(adaptive.value) == pytest.approx(0.1) and not adaptive(s.requires_grad_(True), t).requires_grad
    learned = LearnedTemperature(4.0)
    assert float(learned(s, t).detach()) == pytest.approx(4.0, abs=1e-4)


def test_a_learned_temperature_works_against_the_term() -> None:
    s, t = draw(32, C)
    learned, loss = LearnedTemperature(4.0), losses.KL()
    before = loss(s, t, learned(s, t), None)  # type: ignore[arg-type]
    before.backward()
    with torch.no_grad():
        learned.position -= 0.1 * learned.position.grad.sign()  # type: ignore[union-attr]
        assert float(loss(s, t, learned(s, t), None)) > float(before)  # type: ignore[arg-type]
