"""Numbers that move in training: ramps against the published formula, scores by gradient against theirs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from engine_nets import EXAMPLE, SPARSE, Net, batches, masks, sgd, sparsity, train
from torch import nn
from torch.nn.utils import prune

import fxcompress
from fxcompress.engine.clock import Clock


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def test_a_cubic_ramp_is_the_schedule_of_zhu_and_gupta(model: nn.Module) -> None:
    begin, times, frequency, final = 3, 6, 4, 0.8
    policy = SPARSE % (f"steps {begin}..{begin + times * frequency}", "cubic(10% -> 80%)", f"{frequency} steps")
    result = fxcompress.compile(policy, model, EXAMPLE)
    optimizer, data, code = sgd(result), batches(), None
    sizes = [8 * 9, 24 * 128, 4 * 24]
    for step in range(1, begin + times * frequency + 3):
        train(result, optimizer, data, 1)
        if step < begin:
            assert not masks(result.module)
            continue
        code = code or result.module.code
        assert result.module.code == code  # the schedule changes numbers, never the graph
        # "To prune, or not to prune", equation (1), at the last update: t0, t0 + Δt, ..., t0 + nΔt
        n = min((step - begin) // frequency, times)
        wanted = final + (0.1 - final) * (1 - n * frequency / (times * frequency)) ** 3
        counts = [int((~mask).sum()) for mask in masks(result.module).values()]
        assert counts == [round(wanted * size) for size in sizes]
        assert result.done == (step >= begin + times * frequency)
    assert result.progress == {"sparsify": 1.0}


@pytest.mark.parametrize(("window", "ramp", "every", "value"), [
    ("epochs 0..4", "linear(0% -> 80%)", "1 epochs", lambda t: 0.8 * math.floor(t) / 4),
    ("epochs 1..3", "linear(0% -> 80%)", "2 steps", lambda t: 0.8 * max(0, t - 1) / 2),
    ("25%..75% of training", "cosine(0% -> 80%)", "2 steps",
     lambda t: 0.8 * (1 - math.cos(math.pi * max(0, t - 1) / 2)) / 2),
    ("epochs 0..2", "step(20% -> 50%)", "1 steps", lambda t: 0.5 if t >= 2 else 0.2),
])
def test_windows_in_epochs_and_in_percent(model: nn.Module, window: str, ramp: str, every: str, value: object) -> None:
    result = fxcompress.compile(SPARSE % (window, ramp, every), model, EXAMPLE, epochs=4, steps_per_epoch=4)
    optimizer, data = sgd(result), batches()
    for epoch in range(4):
        for step in range(1, 5):
            train(result, optimizer, data, 1)
            if step % 2 == 0 and masks(result.module):
                time = min(epoch + step / 4, 3 if "1..3" in window or "%" in window else 4)
                assert sparsity(result.module) == pytest.approx(value(time), abs=1e-3)  # type: ignore[operator]
        result.epoch_end()
    assert result.done


def test_the_steps_of_an_epoch_are_learned_from_the_first(model: nn.Module) -> None:
    result = fxcompress.compile(SPARSE % ("epochs 0..2", "linear(0% -> 80%)", "1 steps"), model, EXAMPLE)
    assert any("steps_per_epoch=" in note for note in result.notes)
    optimizer, data = sgd(result), batches()
    train(result, optimizer, data, 4)
    assert sparsity(result.module) == 0
    result.epoch_end()
    for time in (1.25, 1.5):
        train(result, optimizer, data, 1)
        assert sparsity(result.module) == pytest.approx(0.8 * time / 2, abs=1e-3)


def test_the_clock() -> None:
    clock = Clock(steps_per_epoch=10, total_epochs=4)
    for _ in range(15):
        clock.advance()
    assert (clock.now("steps"), clock.now("epochs"), clock.now("training")) == (15, 1.5, 0.375)
    clock.end_epoch()
    assert clock.now("epochs") == 1
    learned = Clock()
    for _ in range(3):
        learned.advance()
    assert learned.now("epochs") == 0
    learned.end_epoch()
    for _ in range(4):
        learned.advance()
    assert learned.now("epochs") == 2  # an epoch that is longer than the first waits at its end


def test_a_constant_is_chosen_anew_from_the_weights_as_they_are(model: nn.Module) -> None:
    result = fxcompress.compile(SPARSE % ("steps 0..20", "50%", "5 steps"), model, EXAMPLE)
    optimizer, data = sgd(result), batches()
    for step in range(1, 21):
        train(result, optimizer, data, 1)
        if step % 5 == 0:
            for name, mask in masks(result.module).items():
                layer = nn.Linear(1, 1)
                layer.weight = nn.Parameter(result.module.get_parameter(name).detach().clone())
                prune.l1_unstructured(layer, "weight", 0.5)
                assert torch.equal(layer.weight_mask.bool(), mask)


def test_nested_random_masks_over_a_ramp(model: nn.Module) -> None:
    policy = (SPARSE % ("steps 0..8", "linear(0% -> 80%)", "2 steps")).replace("every ", "by = random\n every ")
    result = fxcompress.compile(policy, model, EXAMPLE, seed=3)
    optimizer, data = sgd(result), batches()
    before = {name: mask.clone() for name, mask in masks(result.module).items()}
    for _ in range(4):
        train(result, optimizer, data, 2)
        for name, mask in masks(result.module).items():
            assert not (mask & ~before[name]).any()
            before[name] = mask.clone()
    other = fxcompress.compile(policy, model, EXAMPLE, seed=4)
    train(other, sgd(other), batches(), 8)
    assert not all(torch.equal(mask, before[name]) for name, mask in masks(other.module).items())


def test_a_ramp_does_not_recompile(model: nn.Module) -> None:
    from torch._dynamo.testing import CompileCounter

    result = fxcompress.compile(SPARSE % ("steps 0..6", "cubic(0% -> 80%)", "1 steps"), model, EXAMPLE)
    counter = CompileCounter()
    compiled = torch.compile(result.module, backend=counter)
    for _ in range(8):
        compiled(*EXAMPLE)
        result.step()
    assert result.done and counter.frame_count == 1
    result.module.eval(), compiled.eval()
    assert torch.equal(compiled(*EXAMPLE), result.module(*EXAMPLE))


# Scores by gradient, for one linear layer and a squared loss: the gradient at the masked weight is 2/n (Wx - t) xᵀ


@pytest.mark.parametrize("by", ["movement", "gradient"])
def test_scores_by_gradient_against_the_formula(by: str) -> None:
    torch.manual_seed(0)
    action = f"mask linear {{ sparsity = 50%, by = {by}, every = 3 steps }}"
    policy = f"policy p {{ phase a over steps 0..6 {{ {action} }} }}"
    x, target = torch.randn(16, 6), torch.randn(16, 5)
    result = fxcompress.compile(policy, nn.Sequential(nn.Linear(6, 5, bias=False)), (x,))
    optimizer = torch.optim.SGD(result.module.parameters(), lr=0.1)
    weight = result.module.get_parameter("0.weight")
    moved = torch.zeros(5, 6)
    since = torch.zeros(5, 6)
    chosen = torch.ones(5, 6, dtype=torch.bool)
    for step in range(1, 7):
        w = weight.detach().clone()
        gradient = 2 / target.numel() * (x @ (w * chosen).T - target).T @ x
        moved -= w * gradient  # Sanh, Wolf and Rush, equation (2): taken at the masked weight, also where it is masked
        since += gradient
        optimizer.zero_grad()
        F.mse_loss(result.module(x), target).backward()
        assert torch.allclose(weight.grad, gradient * chosen, atol=1e-6)
        optimizer.step()
        result.step()
        if step in (1, 3, 6):  # at once when the first gradients are there, then every third step
            score = moved if by == "movement" else (weight.detach() * since).abs()
            chosen = torch.ones(30, dtype=torch.bool)
            chosen[score.flatten().topk(15, largest=False).indices] = False
            chosen = chosen.view(5, 6)
            since.zero_()
        assert torch.equal(masks(result.module)["0.weight"], chosen)


def test_gradients_that_the_model_holds_count_as_seen(model: nn.Module) -> None:
    F.cross_entropy(model(EXAMPLE[0]), torch.tensor([0, 1, 2, 3])).backward()
    result = fxcompress.compile("policy p { mask linear { sparsity = 50%, by = gradient } }", model, EXAMPLE)
    assert result.done
    mask, weight = masks(result.module)["fc1.weight"], model.fc1.weight
    score = (weight * weight.grad).abs()
    assert score[mask].min() >= score[~mask].max()


def test_without_gradients_the_choice_waits_and_finalize_says_so(model: nn.Module) -> None:
    result = fxcompress.compile("policy p { mask linear { sparsity = 50%, by = gradient } }", model, EXAMPLE)
    assert not result.done and sparsity(result.module) == 0
    with pytest.warns(UserWarning, match="was never written"):
        result.finalize()
    assert [item.code for item in result.warnings] == ["FXC0524"]
    train(result, sgd(result), batches(), 1)
    assert result.done and sparsity(result.module) == 0.5
