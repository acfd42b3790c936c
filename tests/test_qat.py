"""`mode = qat`: against the formulas of the papers written out in torch, and models that are trained."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fxcompress
from fxcompress.graph.ops import kind_of
from fxcompress.graph.predicates import held
from fxcompress.inspect import report
from fxcompress.nn import FreezingBatchNorm2d, IntConv2d, IntLinear, TrainedQuantizer
from fxcompress.nn.scheme import Scheme
from fxcompress.passes import Quantize

SETTINGS = "mode = qat, bits = 7 bits"


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    with torch.no_grad():
        model[1].weight.copy_(noise(6, seed=3))  # type: ignore[union-attr]
        model[1].bias.copy_(noise(6, seed=4))  # type: ignore[union-attr]
        for _ in range(3):
            model(noise(8, 1, 6, 6) * 2 + 1)
    return model


def compiled(steps: int = 8, more: str = "", model: nn.Module | None = None, **kwargs: Any) -> fxcompress.Result:
    policy = f"policy p {{ phase t over steps 0..{steps} {{ quantize conv2d | linear {{ {SETTINGS}{more} }} }} }}"
    return fxcompress.compile(policy, model or small_net(), noise(8, 1, 6, 6), **kwargs)


def steps(result: fxcompress.Result, count: int, optimizer: torch.optim.Optimizer, first: int = 0) -> None:
    result.module.train()
    for step in range(first, first + count):
        optimizer.zero_grad()
        F.cross_entropy(result.module(noise(8, 1, 6, 6, seed=50 + step)), torch.arange(8) % 4).backward()
        optimizer.step()
        result.step()


def quantizer(result: fxcompress.Result, path: str) -> TrainedQuantizer:
    found = result.module.get_submodule(path)
    assert isinstance(found, TrainedQuantizer)
    return found


def rounds(x: Tensor, module: TrainedQuantizer) -> Tensor:
    """torch's own fake quantizers, with the range of `module`."""
    low, high = module.scheme.low, module.scheme.high
    if module.axis is None:
        return torch.fake_quantize_per_tensor_affine(x, module.scale[0], module.zero_point[0], low, high)
    return torch.fake_quantize_per_channel_affine(x, module.scale, module.zero_point, 0, low, high)


# What is computed


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_training_is_that_of_the_papers(granularity: str) -> None:
    """Krishnamoorthi 2018, section 3.2.2: the weight times gamma over the running deviation is rounded, the result of
    the convolution scaled back, and normalised by its batch. Values and gradients."""
    result = compiled(more=f", granularity = {granularity}", calibration=[noise(8, 1, 6, 6)])
    module, x = result.module.train(), noise(8, 1, 6, 6, seed=9)
    twin = copy.deepcopy(module)
    made = module(x)
    made.square().sum().backward()
    conv, norm, linear = twin.get_submodule("0"), twin.get_submodule("1"), twin.get_submodule("4")
    assert isinstance(norm, FreezingBatchNorm2d) and norm.running_var is not None
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()[:, None, None, None]
    y = F.conv2d(rounds(x, quantizer(result, "input_1_quantizer")),
                 rounds(conv.weight * factor, quantizer(result, "0.weight_quantizer"))) / factor.reshape(1, -1, 1, 1)
    y = F.batch_norm(y, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    y = rounds(F.relu(y), quantizer(result, "relu_quantizer")).flatten(1)
    y = F.linear(y, rounds(linear.weight, quantizer(result, "4.weight_quantizer")), linear.bias)
    assert torch.allclose(made, y, atol=1e-4)
    y.square().sum().backward()
    for name, parameter in twin.named_parameters():
        found = result.module.get_parameter(name).grad
        assert found is not None and parameter.grad is not None and apart(found, parameter.grad) < 1e-3, name


def test_in_evaluation_it_is_the_folded_model() -> None:
    result = compiled()
    steps(result, 5, torch.optim.SGD(result.module.parameters(), 0.05))
    module, x = result.module.eval(), noise(8, 1, 6, 6, seed=9)
    conv, norm = nn.Conv2d(1, 6, 3, bias=False).eval(), nn.BatchNorm2d(6).eval()
    conv.load_state_dict({"weight": module.get_parameter("0.weight")})
    norm.load_state_dict({name: module.state_dict()[f"1.{name}"] for name in norm.state_dict()})
    folded = fuse_conv_bn_eval(conv, norm)
    y = F.conv2d(rounds(x, quantizer(result, "input_1_quantizer")),
                 rounds(folded.weight, quantizer(result, "0.weight_quantizer")), folded.bias)
    y = rounds(F.relu(y), quantizer(result, "relu_quantizer")).flatten(1)
    y = F.linear(y, rounds(module.get_parameter("4.weight"), quantizer(result, "4.weight_quantizer")),
                 module.get_parameter("4.bias"))
    assert apart(module(x), y) < 1e-2  # a value in a thousand may fall to the other side of a half
    assert float(((module(x) - y).abs() > 1e-5).double().mean()) < 0.2
    small = finalized(result)
    assert apart(small(x), module(x)) < 1e-2
    assert isinstance(small.get_submodule("0"), IntConv2d) and isinstance(small.get_submodule("4"), IntLinear)
    kinds = [kind_of(node) for node in small.graph.nodes]
    assert not {"batchnorm2d", "quantizer", "conv2d"} & set(kinds)


def finalized(result: fxcompress.Result) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that training stopped short
        return result.finalize(target="cpu")


def test_a_channel_that_the_norm_multiplies_by_zero() -> None:
    model = small_net()
    with torch.no_grad():
        model[1].weight[:3] = 0.0  # type: ignore[union-attr, index, operator]
    result = compiled(model=model)
    steps(result, 2, torch.optim.SGD(result.module.parameters(), 0.01))
    gradients = [parameter.grad for parameter in result.module.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    assert bool(result.module.eval()(noise(8, 1, 6, 6)).isfinite().all())


# Ranges


def test_ranges_are_moving_averages() -> None:
    """Jacob et al. 2018, section 3.1: exponential moving averages of the least and the greatest of each batch."""
    module = TrainedQuantizer(Scheme(8, signed=False, symmetric=False)).train()
    low = high = None
    for seed in range(4):
        x = noise(50, seed=seed) * (seed + 1)
        module(x)
        low = x.min() if low is None else low * 0.99 + x.min() * 0.01
        high = x.max() if high is None else high * 0.99 + x.max() * 0.01
    assert low is not None and high is not None
    assert torch.allclose(module.low[0], low) and torch.allclose(module.high[0], high)
    assert torch.allclose(module.scale[0], (high - low) / 255)
    module(torch.tensor([float("inf"), 1.0, float("nan")]))
    assert bool(module.scale.isfinite().all()) and module.on


def test_evaluation_moves_nothing() -> None:
    result = compiled(calibration=[noise(8, 1, 6, 6)])
    before = {name: tensor.clone() for name, tensor in result.module.state_dict().items()}
    result.module.eval()(noise(8, 1, 6, 6, seed=3) * 10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.module.state_dict().items())


def test_the_factors_of_a_norm_are_counted_once() -> None:
    captured = compiled().captured
    layers = {layer.label: layer.params for layer in report(captured.module).after.layers}
    assert layers["0"] == 6 * 9 and layers["1"] == 2 * 6 and held(captured.node("_0"), "params") == 6 * 9
    assert captured.facts.params == sum(parameter.numel() for parameter in captured.module.parameters())


# The schedule


def test_the_schedule_switches_numbers_and_not_the_graph() -> None:
    result = compiled(8, ", delay = 25%, freeze = 75%")
    optimizer = torch.optim.SGD(result.module.parameters(), 0.05)
    code, parameters = result.module.code, list(result.module.parameters())
    norm, found = result.module.get_submodule("1"), []
    assert isinstance(norm, FreezingBatchNorm2d)
    for step in range(8):
        before = {name: tensor.clone() for name, tensor in result.module.state_dict().items()}
        watched = quantizer(result, "relu_quantizer")
        found.append((bool(watched.rounds), bool(watched.moves), bool(norm.frozen)))
        steps(result, 1, optimizer, step)
        moved = any(not torch.equal(before[name], result.module.state_dict()[name]) for name in (
            "relu_quantizer.scale", "0.weight_quantizer.scale", "1.running_mean", "1.running_var"))
        assert moved == (step < 6)
    assert found == [(False, True, False)] * 2 + [(True, True, False)] * 4 + [(True, False, True)] * 2
    assert result.module.code == code and list(map(id, result.module.parameters())) == list(map(id, parameters))
    assert result.done


def test_a_frozen_norm_computes_with_its_statistics() -> None:
    norm = FreezingBatchNorm2d(3)
    with torch.no_grad():
        norm(noise(4, 3, 5, 5) * 3 + 1)
    x = noise(4, 3, 5, 5, seed=7)
    assert torch.allclose(norm(x), F.batch_norm(x, None, None, norm.weight, norm.bias, True))
    norm.freeze(True)
    mean = None if norm.running_mean is None else norm.running_mean.clone()
    assert mean is not None and torch.equal(norm.train()(x), copy.deepcopy(norm).eval()(x))
    assert norm.running_mean is not None and torch.equal(norm.running_mean, mean)


def test_a_phase_without_time_never_freezes_and_says_so() -> None:
    result = fxcompress.compile(f"policy p {{ quantize conv2d {{ {SETTINGS} }} }}", small_net(), noise(8, 1, 6, 6))
    assert any("could be frozen" in note for note in result.notes)
    with pytest.raises(fxcompress.PlanError, match="FXC0572"):
        result.finalize(target="cpu")  # it has seen nothing yet
    result.module.train()(noise(8, 1, 6, 6))
    assert isinstance(result.finalize(target="cpu").get_submodule("0"), IntConv2d)


# Going on


@pytest.mark.parametrize("at", [3, 7])
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(at: int) -> None:
    def run(result: fxcompress.Result, first: int, last: int, state: Any = None) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(result.module.parameters(), 0.05, momentum=0.9)
        if state is not None:
            optimizer.load_state_dict(state)
        steps(result, last - first, optimizer, first)
        return optimizer

    whole = compiled(8, ", delay = 25%")
    run(whole, 0, 8)
    part = compiled(8, ", delay = 25%")
    optimizer = run(part, 0, at)
    saved = copy.deepcopy((part.state_dict(), part.module.state_dict(), optimizer.state_dict()))
    resumed = compiled(8, ", delay = 25%", resume=saved[0])
    resumed.module.load_state_dict(saved[1])
    assert quantizer(resumed, "relu_quantizer").on
    run(resumed, at, 8, saved[2])
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name
    x = noise(8, 1, 6, 6, seed=9)
    assert torch.equal(resumed.finalize(target="cpu")(x), whole.finalize(target="cpu")(x))


def test_saved_in_training_and_at_the_end(tmp_path: Path) -> None:
    result = compiled(4)
    steps(result, 4, torch.optim.SGD(result.module.parameters(), 0.05))
    x = noise(8, 1, 6, 6, seed=9)
    for name, module in (("training", result.module.eval()), ("end", result.finalize(target="cpu"))):
        fxcompress.save(module, tmp_path / name)
        assert torch.equal(fxcompress.load(tmp_path / name)(x), module(x))


# What it is worth


def test_few_bits_learn_digits() -> None:
    """In four bits a network keeps within a point of its floats, where it is trained so; with weights of two bits it
    still learns, and without training it has lost most."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
                          nn.Linear(512, 10))

    def train(module: nn.Module, epochs: int, rate: float, step: Any) -> None:
        optimizer = torch.optim.Adam(module.parameters(), rate)
        for _ in range(epochs):
            for part in torch.randperm(1200).split(64):
                optimizer.zero_grad()
                F.cross_entropy(module(x[part]), y[part]).backward()
                optimizer.step()
                step()

    def accuracy(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(x[1200:]).argmax(1) == y[1200:]).double().mean())

    train(model, 6, 3e-3, lambda: None)
    model.eval()
    data, found = list(x[:256].split(64)), {}
    for mode, bits, weight_bits in (("qat", 4, 4), ("qat", 3, 2), ("static", 3, 2)):
        result = fxcompress.compile(
            f"policy p {{ phase t over epochs 0..5 {{ quantize conv2d | linear {{ mode = {mode}, bits = {bits} bits, "
            f"weight_bits = {weight_bits} bits }} }} }}", model, x[:64], calibration=data, steps_per_epoch=19)
        result.module.train()
        if mode == "qat":
            train(result.module, 5, 1e-3, result.step)
        found[mode, bits] = accuracy(finalized(result))
    assert accuracy(model) > 0.93 and found["qat", 4] >= accuracy(model) - 0.01
    assert found["qat", 3] > found["static", 3] + 0.05 and found["qat", 3] > accuracy(model) - 0.04


def test_applied_from_python() -> None:
    captured = Quantize(mode="qat", weight_bits=4).apply(fxcompress.capture(small_net(), noise(8, 1, 6, 6)), "conv2d",
                                                         calibration=[noise(8, 1, 6, 6)])
    found = [module for module in captured.module.modules() if isinstance(module, TrainedQuantizer)]
    assert len(found) == 2 and all(module.on for module in found)
