"""`correct_bias`, `adaround` and `gptq`: against formulas written out; all keys against doing it again and masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.diagnostics import PlanError, PolicyError
from fxcompress.graph.interpret import evaluating
from fxcompress.graph.ops import path_of
from fxcompress.passes.shared.recovery import layers_of
from fxcompress.passes.shared.recovery_descent import descend
from fxcompress.passes.shared.recovery_gptq import DAMPING, solve
from fxcompress.passes.shared.switching import without_rounding

KEYS = ("adaround", "gptq", "correct_bias", "equalize", "smooth", "mixed")
VALUES = {"smooth": "50%", "mixed": "30%"}


def correlated(*shape: int, seed: int = 1) -> Tensor:
    """Values whose last dimension but its noise comes from a quarter as many."""
    made = torch.Generator().manual_seed(seed)
    width = shape[-1]
    mixing = torch.randn(max(1, width // 4), width, generator=torch.Generator().manual_seed(9))
    base = torch.randn(*shape[:-1], max(1, width // 4), generator=made)
    return base @ mixing + 0.3 * torch.randn(*shape, generator=made) + 0.5


class Net(nn.Module):
    """A convolution, a depthwise one, one of two groups, a norm and two linear layers, with various activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.deep = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pair = nn.Conv2d(8, 12, (1, 3), groups=2, bias=False)
        self.norm, self.one, self.two = nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.pair(F.relu6(self.deep(F.relu(self.stem(x))))))
        return self.two(F.relu(self.one(self.norm(x.mean((2, 3))))))


def compiled(settings: str, model: nn.Module | None = None, data: list[Tensor] | None = None) -> fxcompress.Result:
    data = data or [correlated(12, 3, 10, 10), correlated(8, 3, 10, 10, seed=2)]
    return fxcompress.compile(f"policy p {{ quantize conv2d | linear {{ {settings} }} }}", model or Net().eval(),
                              data[0][:2], calibration=data)


def noise(result: fxcompress.Result, model: nn.Module, x: Tensor) -> float:
    with evaluating(result.module):
        expected = model(x)
        return float((result.module(x) - expected).norm() / expected.norm())


def weights(result: fxcompress.Result) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in result.module.named_parameters()}


# Rounding


def optimal_brain(weight: Tensor, hessian: Tensor, scale: float, high: int) -> Tensor:
    """Optimal Brain Quantization in a fixed order (Frantar and Alistarh, 2022, algorithm 3), one output after another:
    round one weight, let all that are left make its error good, take it out of the inverse. No Cholesky, no blocks."""
    found = torch.empty_like(weight)
    for out in range(len(weight)):
        row, inverse = weight[out].clone(), torch.linalg.inv(hessian)
        for at in hessian.diagonal().argsort(descending=True, stable=True).tolist():
            rounded = (row[at] / scale).round().clamp(-high, high) * scale if weight[out, at] else row[at] * 0
            row.sub_((row[at] - rounded) / inverse[at, at] * inverse[:, at])
            inverse -= torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]
            inverse[at, at] = 1.0  # never asked for again
            found[out, at] = rounded
    return found


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("block", [5, 128])
def test_gptq_is_the_algorithm_without_blocks(block: int, zeros: bool) -> None:
    made = torch.Generator().manual_seed(3)
    weight, x = torch.randn(6, 18, generator=made).double(), correlated(300, 18).double()
    if zeros:
        weight[:, ::3] = 0
    hessian = 2 * x.T @ x
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(18)
    whole = torch.full((1, 6, 18), 0.4, dtype=torch.float64)
    found = solve(weight[None], hessian[None], whole, torch.zeros_like(whole), -7, 7, block)[0]
    expected = optimal_brain(weight, damped, 0.4, 7)
    nearest = (weight / 0.4).round().clamp(-7, 7) * 0.4
    assert torch.allclose(found, expected, atol=1e-12) and not torch.equal(expected, nearest)
    assert float(((found - weight) @ x.T).square().sum()) < 0.7 * float(((nearest - weight) @ x.T).square().sum())
    assert not zeros or not found[:, ::3].any()


def test_a_descent_finds_what_all_roundings_tried_out_find() -> None:
    """For pairs of weights all four roundings are within one change or two; for six it ends where no single change, and
    no pair of them, is better."""
    made = torch.Generator().manual_seed(4)
    x = correlated(200, 6, seed=5).double()
    weight, scale = torch.randn(1, 9, 6, generator=made).double(), torch.full((1, 9, 6), 0.5, dtype=torch.float64)
    hessian, floor = (x.T @ x)[None], (weight / scale).floor()

    def errors(up: Tensor) -> Tensor:
        return ((((floor + up) * scale - weight) @ x.T) ** 2).sum(-1)

    start = (weight / scale).round() - floor
    gradient = torch.bmm((floor + start) * scale - weight, hessian)
    found = descend(start, scale, torch.ones_like(scale), hessian, gradient)
    assert bool((errors(found) <= errors(start)).all()) and float(errors(found).sum()) < float(errors(start).sum())
    for first in range(6):
        for second in range(6):
            other = found.clone()
            for at in {first, second}:
                other[..., at] = 1 - other[..., at]
            assert bool((errors(found) <= errors(other) + 1e-9).all())


@pytest.mark.parametrize("key", ["adaround", "gptq"])
def test_weights_come_out_on_their_grid_and_outputs_nearer(key: str) -> None:
    """Each weight is one step at most from the float one with `adaround`; plain rounding gives what was written."""
    model, fresh = Net().eval(), correlated(24, 3, 10, 10, seed=7)
    plain, result = compiled("weight_bits = 3 bits"), compiled(f"weight_bits = 3 bits, {key} = true")
    assert noise(result, model, fresh) < 0.9 * noise(plain, model, fresh)
    was = dict(model.named_parameters())
    for layer in layers_of(result.captured):
        written, scale = layer.weight(), layer.grid()[0]
        assert torch.equal(layer.rounded(), written)
        if key == "adaround":
            before = was[f"{path_of(layer.node)}.weight"]
            reach = scale * layer.quantizer.scheme.high
            assert bool(((written - before.clamp(-reach, reach)).abs() < 1.001 * scale).all())
    final = result.finalize(target="cpu")
    assert torch.allclose(final(fresh), result.module.eval()(fresh), atol=1e-3)


def test_a_layers_loss_is_no_more_than_that_of_rounding_to_the_nearest() -> None:
    """Of one linear layer, whose inputs aren't rounded: on the data that it was learned from."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 10)).eval(), correlated(500, 24)
    losses = {}
    for key in ("", "adaround = true", "gptq = true"):
        settings = f"mode = weight_only, weight_bits = 3 bits{', ' * bool(key)}{key}"
        losses[key] = compiled(settings, model, [x]).module.eval()(x)
    expected = model(x)
    plain, *others = ((given - expected).detach().square().sum(0) for given in losses.values())
    for other in others:
        assert bool((other <= plain * 1.0001).all()) and float(other.sum()) < 0.7 * float(plain.sum())


# Biases


def test_means_of_layers_are_those_of_floats() -> None:
    """E[ŷ] = E[y] for every output of every layer, on the calibration data (Nagel et al., 2019, section 4.2)."""
    data = [correlated(12, 3, 10, 10), correlated(8, 3, 10, 10, seed=2)]
    shifts = {key: _shifts(compiled(f"weight_bits = 3 bits, correct_bias = {key}", data=data), data)
              for key in ("false", "true")}
    assert max(shifts["true"].values()) < 1e-4 and min(shifts["false"].values()) > 5e-3


def _shifts(result: fxcompress.Result, data: list[Tensor]) -> dict[str, float]:
    """The largest shift of a mean of each layer, over the deviation of what it gives."""
    layers = [layer.node for layer in layers_of(result.captured)]
    originals = Net().eval()
    found: dict[str, list[Tensor]] = {}
    expected: dict[str, list[Tensor]] = {}
    hooks = [module.register_forward_hook(lambda _, __, out, name=name: expected.setdefault(name, []).append(out))
             for name, module in originals.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]

    class Watching(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n in layers:
                found.setdefault(path_of(n), []).append(value.clone())
            return value

    with evaluating(result.module), torch.no_grad():
        for batch in data:
            Watching(result.module).run(batch)
            originals(batch)
    for hook in hooks:
        hook.remove()
    shifts = {}
    for name, values in found.items():
        one, two = torch.cat(values), torch.cat(expected[name])
        dims = [0, *range(2, one.dim())]
        shifts[name] = float((one.mean(dims) - two.mean(dims)).abs().max() / two.std())
    assert len(shifts) == 5
    return shifts


# All of them


@pytest.mark.parametrize("key", [key for key in KEYS if key != "equalize"])  # that goes on from where it was
def test_doing_it_again_gives_the_same(key: str) -> None:
    data = [correlated(12, 3, 10, 10), correlated(8, 3, 10, 10, seed=2)]
    result = compiled(f"weight_bits = 4 bits, {key} = {VALUES.get(key, 'true')}", data=data)
    before, x = weights(result), correlated(6, 3, 10, 10, seed=3)
    given = result.module.eval()(x)
    result.calibrate(data)
    after = weights(result)
    assert all(torch.allclose(before[name], after[name], rtol=1e-4, atol=1e-5) for name in before)
    assert torch.allclose(result.module.eval()(x), given, rtol=1e-3, atol=1e-3)


def test_what_was_trained_since_is_not_brought_back() -> None:
    data = [correlated(12, 3, 10, 10)]
    result = compiled("weight_bits = 4 bits, adaround = true", data=data)
    parameter = result.module.get_parameter("one.weight")
    with torch.no_grad():
        parameter.add_(0.37)
    trained = parameter.detach().clone()
    result.calibrate(data)
    assert float((parameter - trained).abs().max()) < 0.4  # a step of rounding: not 0.37 and a step


@pytest.mark.parametrize("key", KEYS)
def test_masked_zeros_stay_zero(key: str) -> None:
    data = [correlated(12, 3, 10, 10)]
    policy = ("policy p { phase one { mask conv2d | linear { sparsity = 50% } }\nphase two after one { "
              f"quantize conv2d | linear {{ weight_bits = 4 bits, {key} = {VALUES.get(key, 'true')} }} }} }}")
    result = fxcompress.compile(policy, Net().eval(), data[0][:2], calibration=data)
    masks = {name.removesuffix("_mask.mask"): buffer for name, buffer in result.module.named_buffers()
             if name.endswith("_mask.mask")}
    assert len(masks) == 5
    for layer in layers_of(result.captured):
        mask = masks[f"{path_of(layer.node)}.weight"].bool()
        assert not layer.rounded()[~mask].any() and int(mask.sum()) < 0.6 * mask.numel()
    final = result.finalize(target="cpu")
    assert torch.allclose(final(data[0]), result.module.eval()(data[0]), atol=1e-2)


def test_without_data_it_is_said() -> None:
    """And `calibrate` does later what `compile` would have done."""
    data = [correlated(12, 3, 10, 10)]
    policy = "policy p { quantize linear { mode = weight_only, weight_bits = 4 bits, gptq = true } }"
    result = fxcompress.compile(policy, Net().eval(), data[0][:2])
    with pytest.raises(PlanError, match="FXC0575"):
        result.finalize(target="cpu")
    result.calibrate(data)
    at_once = fxcompress.compile(policy, Net().eval(), data[0][:2], calibration=data)
    assert all(torch.equal(a, b) for a, b in zip(weights(result).values(), weights(at_once).values(), strict=True))
    assert torch.allclose(result.finalize(target="cpu")(data[0]), at_once.module.eval()(data[0]), atol=1e-4)


def test_one_way_to_round() -> None:
    with pytest.raises(PolicyError, match="FXC0375"):
        fxcompress.parse("policy p { quantize linear { adaround = true, gptq = true } }")


def test_what_cannot_be_written_is_said() -> None:
    """A weight that two layers read, and one that is computed."""
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.b(self.a(x)), self.a.weight.tanh())

    result = compiled("adaround = true", Tied().eval(), [correlated(20, 6)])
    notes = "\n".join(result.notes)
    assert "its weight is shared with other layers" in notes and "its weight is computed in the model" in notes
    with without_rounding(result.captured):
        found, expected = result.module.eval()(correlated(3, 6)), Tied.forward(_same(), correlated(3, 6))
    assert torch.allclose(found, expected, atol=1e-5)


def _same() -> Any:
    torch.manual_seed(0)
    model = nn.Module()
    model.a, model.b = nn.Linear(6, 6), nn.Linear(6, 6)  # type: ignore[assignment]
    model.b.weight = model.a.weight
    return model
