"""Regularised training before a removal: the steps against their formulae, and what they are worth on real digits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from engine_nets import EXAMPLE, Net, batches, train
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcompress

THIN = """policy p {
    phase thin over steps 0..%d {
        remove channels(%s) { ratio = 50%%, %s }
    }
}"""


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


X = (torch.randn(5, 4, generator=torch.Generator().manual_seed(1)),)


def groups(module: nn.Module) -> Tensor:
    """Row i of the first weight, entry i of its bias, column i of the second weight: what leaves with hidden unit i."""
    first, bias, second = (module.get_parameter(name).detach() for name in ("0.weight", "0.bias", "2.weight"))
    return torch.cat([first, bias[:, None], second.T], 1)


@pytest.mark.parametrize("rate", [None, 0.5])
def test_a_step_of_group_lasso_is_the_proximal_map(rate: float | None) -> None:
    strength = 0.02 if rate is None else 0.04
    result = fxcompress.compile(THIN % (5, '"0"', f"sparsify = group_lasso, strength = {strength}"), perceptron(), X)
    if rate is not None:
        result.follow(torch.optim.SGD(result.module.parameters(), lr=rate))
    with torch.no_grad():
        result.module.get_parameter("0.weight")[2].mul_(0.01)
        result.module.get_parameter("0.bias")[2] = 0
        result.module.get_parameter("2.weight")[:, 2].mul_(0.01)
    output = result.module.get_parameter("2.bias").clone()
    for _ in range(3):
        before = groups(result.module).double()
        result.step()
        # the norm soft-thresholded (Parikh and Boyd, "Proximal Algorithms"); 8 weights weigh √8 (Yuan and Lin)
        threshold, norms = 0.02 * math.sqrt(8), before.norm(dim=1, keepdim=True)
        wanted = torch.where(norms > threshold, (1 - threshold / norms) * before, torch.zeros(()))
        assert torch.allclose(groups(result.module).double(), wanted, atol=1e-7)
    assert not groups(result.module)[2].any() and groups(result.module)[[0, 1, 3]].any(1).all()
    assert torch.equal(result.module.get_parameter("2.bias"), output)


def test_the_steps_of_group_lasso_minimise_its_objective() -> None:
    """Proximal gradient descent (ISTA) on least squares plus the penalty ends where the optimality conditions hold."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 12, bias=False), nn.Linear(12, 2, bias=False))
    inputs, truth = torch.randn(64, 6), torch.randn(64, 2)
    result = fxcompress.compile(THIN % (3000, '"0"', "sparsify = group_lasso, strength = 0.02, verify = off"), model,
                                (inputs[:2],))
    result.follow(optimizer := torch.optim.SGD(result.module.parameters(), lr=0.1))
    first, second = result.module.get_parameter("0.weight"), result.module.get_parameter("1.weight")
    for _ in range(2500):
        optimizer.zero_grad()
        F.mse_loss(result.module(inputs), truth).backward()
        optimizer.step()
        result.step()
    optimizer.zero_grad()
    F.mse_loss(result.module(inputs), truth).backward()
    weights, gradients = torch.cat([first, second.T], 1).detach(), torch.cat([first.grad, second.grad.T], 1)
    norms, strength = weights.norm(dim=1), 0.02 * math.sqrt(8)
    alive = norms > 0
    assert 0 < int(alive.sum()) < 12  # whole units have died, others live
    stationary = gradients + strength * weights / norms.clamp(min=1e-12)[:, None]
    assert stationary[alive].norm(dim=1).max() < 1e-3 * strength
    assert gradients[~alive].norm(dim=1).max() <= strength


def test_a_growing_penalty_decays_what_was_chosen_and_nothing_else() -> None:
    result = fxcompress.compile(
        THIN % (9, '"0"', "by = l1, sparsify = growing, strength = 0.1, every = 2 steps"), perceptron(), X)
    result.follow(torch.optim.SGD(result.module.parameters(), lr=0.5))
    start = groups(result.module)
    chosen = result.module.get_parameter("0.weight").abs().sum(1).topk(4, largest=False).indices
    kept = [unit for unit in range(8) if unit not in chosen]
    wanted = start.clone()
    for step in range(8):
        result.step()
        wanted[chosen] *= 1 - 0.5 * 0.1 * (step // 2)  # grows by 0.1 after every second step
        assert torch.allclose(groups(result.module), wanted, atol=1e-7)
    with torch.no_grad():
        result.module.get_parameter("0.weight")[chosen] *= 100  # what was chosen leaves, whatever it is worth by now
    result.step()
    assert result.done
    assert torch.equal(groups(result.module), start[kept])


@pytest.mark.parametrize("sparsify", ["group_lasso", "growing"])
def test_what_is_not_selected_or_frozen_or_not_trained_is_left_alone(sparsify: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
                          nn.Linear(8, 2))
    model[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fxcompress.compile(THIN % (9, '"0"', f"sparsify = {sparsify}, strength = 0.1, every = 1 steps".replace(
        ", every = 1 steps", "" if sparsify == "group_lasso" else ", every = 1 steps")), model, X)
    trained = [p for name, p in result.module.named_parameters() if name != "2.weight" and p.requires_grad]
    result.follow(torch.optim.SGD(trained, lr=0.1))
    for _ in range(5):
        result.step()
    now = result.module.state_dict()
    assert [name for name in before if not torch.equal(now[name], before[name])] == ["0.weight"]


def test_only_selected_channels_of_a_shared_reader_are_touched() -> None:
    """A concatenation: the reader's columns for the layer that isn't selected keep their weights."""
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.a(x), self.b(x)], 1).relu())

    torch.manual_seed(4)
    result = fxcompress.compile(THIN % (9, '"a"', "sparsify = group_lasso, strength = 0.01"), Two(), X)
    head = result.module.get_parameter("head.weight")
    before = head.detach().clone()
    result.step()
    assert torch.equal(head[:, 6:], before[:, 6:]) and (head[:, :6].abs() < before[:, :6].abs()).all()


def test_without_training_it_says_that_nothing_was_trained() -> None:
    from fxcompress.commands import run_through

    text = THIN % (5, '"0"', "sparsify = group_lasso, strength = 1")
    model = perceptron()
    result = fxcompress.compile(text, model, X)
    run_through(result)
    assert any("has done nothing: no training step came before the removal" in note for note in result.notes)
    kept = model[0].weight.detach().norm(dim=1).topk(4).indices.sort().values
    assert torch.equal(result.module.get_parameter("0.weight"), model[0].weight[kept])


def test_the_plan_says_when_it_removes() -> None:
    plan = fxcompress.plan(THIN % (5, '"0"', "sparsify = growing, strength = 0.5"), perceptron(), X)
    assert "at the end of the phase, which trains with growing of strength 0.5" in plan.show()
    assert "out_features 8 -> 4" in plan.show()


def test_a_removal_beside_it_is_followed() -> None:
    policy = """policy p {
        phase a over steps 0..8 { remove channels("fc1") { ratio = 50%, sparsify = group_lasso, strength = 0.001 } }
        phase b over steps 0..8 { remove channels(conv2d) { ratio = linear(0% -> 50%), every = 2 steps } }
    }"""
    torch.manual_seed(5)
    result = fxcompress.compile(policy, Net(), EXAMPLE)
    train(result, result.follow(torch.optim.SGD(result.module.parameters(), lr=0.05)), batches(), 8)
    assert result.done and result.module.get_parameter("fc1.weight").shape == (12, 64)
    assert any("8 steps of group_lasso before" in note for note in result.notes)


# What it is worth


def digits() -> tuple[Tensor, Tensor]:
    """1,797 digits of 8x8 pixels, shuffled."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


def removed_after_training(seed: int, settings: str) -> tuple[float, float]:
    """Train a convnet for 14 epochs and remove 60 % of the channels, without any training after that: its accuracy on
    597 digits that it has not seen, and the norm of the filters of its second convolution that left over that of those
    that stayed."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10))
    images, labels = digits()
    result = fxcompress.compile("policy p { phase thin over epochs 0..14 { remove channels(conv2d | linear) { "
                                f"ratio = {settings}, verify = off }} }} }}", model, (images[:2],), steps_per_epoch=18)
    optimizer = result.follow(torch.optim.SGD(result.module.parameters(), lr=0.05, momentum=0.9))
    generator = torch.Generator().manual_seed(seed + 1)
    weight = result.module.get_parameter("3.weight")
    for _ in range(14):
        for batch in torch.randperm(1200, generator=generator)[:1152].split(64):
            optimizer.zero_grad()
            F.cross_entropy(result.module(images[batch]), labels[batch]).backward()
            optimizer.step()
            norms = weight.detach().flatten(1).norm(dim=1)
            result.step()
        result.epoch_end()
    assert result.done and len(weight) == 13
    kept = dict(result._executor.log[-1].kept["3.weight"])[0]
    gone = torch.tensor([index for index in range(32) if index not in kept])
    result.module.eval()
    accuracy = (result.module(images[1200:]).argmax(1) == labels[1200:]).float().mean()
    return float(accuracy), float(norms[gone].mean() / norms[kept].mean())


def test_it_keeps_the_accuracy_that_a_removal_without_it_loses() -> None:
    plain = [removed_after_training(seed, "step(0% -> 60%)") for seed in (0, 1)]
    lasso = [removed_after_training(seed, "60%, sparsify = group_lasso, strength = 0.01") for seed in (0, 1)]
    growing = [removed_after_training(seed, "60%, sparsify = growing, strength = 0.05, every = 5 steps")
               for seed in (0, 1)]
    for (dense, above), (shrunk, small), (grown, zero) in zip(plain, lasso, growing, strict=True):
        assert above > 0.5  # without it, what leaves is worth about as much as what stays
        assert small < 0.2 and zero < 1e-3
        assert shrunk > dense + 0.08 and shrunk > 0.85
        assert grown > dense + 0.08 and grown > 0.93


def test_a_share_that_is_solved_is_the_same_after_resuming() -> None:
    policy = """policy p {
        phase thin over steps 1..4 { remove channels(linear) { scope = global, sparsify = growing, strength = 0.1 } }
        budget params <= 60% of dense
    }"""
    first = fxcompress.compile(policy, perceptron(), X)
    with torch.no_grad():
        first.module.get_parameter("0.weight")[:7].mul_(1e-3)
    first.step()
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    second = fxcompress.compile(policy, other, X, resume=first.state_dict())
    second.module.load_state_dict(first.module.state_dict())
    for _ in range(3):
        first.step()
        second.step()
    assert first.done and second.done
    assert 0.5 < sum(p.numel() for p in first.finalize().parameters()) / 67 <= 0.6
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name])
