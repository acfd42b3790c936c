"""`equalize` and `smooth`: the formulas of the papers, and the same function in floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.diagnostics import PolicyError
from fxcompress.graph.interpret import evaluating
from fxcompress.graph.ops import kind_of, module_of
from fxcompress.passes.shared.recovery import layers_of
from fxcompress.passes.shared.switching import without_rounding


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compiled(settings: str, model: nn.Module, x: Tensor) -> fxcompress.Result:
    return fxcompress.compile(f"policy p {{ quantize conv2d | linear {{ {settings} }} }}", model, x[:2],
                              calibration=[x])


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def in_floats(result: fxcompress.Result, x: Tensor) -> Tensor:
    with evaluating(result.module), without_rounding(result.captured):
        return result.module(x)  # type: ignore[no-any-return]


class Uneven(nn.Module):
    """A chain whose channels have ranges far apart: convolution, depthwise convolution, convolution, linear."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.point, self.head, self.act = nn.Conv2d(8, 6, 1), nn.Linear(6, 4), activation()
        with torch.no_grad():
            for layer in (self.first, self.deep):
                layer.weight *= torch.logspace(-2, 0.3, 8)[:, None, None, None]
                layer.bias *= torch.logspace(-2, 0.3, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.point(self.act(self.deep(self.act(self.first(x))))))
        return self.head(F.max_pool2d(x, x.shape[-1]).flatten(1))


def weight(result: fxcompress.Result, name: str) -> Tensor:
    return result.module.get_parameter(f"{name}.weight").detach()


def test_ranges_of_weights_become_equal() -> None:
    """With one scale for a weight: max|W₁ᵢ| = max|W₂ᵢ| for each channel between two layers, which is √(r₁·r₂) (Nagel et
    al., 2019, equation 11); the model computes the same in floats."""
    model, x = Uneven().eval(), noise(16, 3, 8, 8)
    with torch.no_grad():
        model.first.bias[7] = -50.0  # zero on all data: its weights take part in the range all the same
    result = compiled("granularity = per_tensor, equalize = true", model, x)
    for y in (x, noise(16, 3, 8, 8, seed=2)):
        assert apart(in_floats(result, y), model(y)) < 1e-5
    first, deep, point = (weight(result, name) for name in ("first", "deep", "point"))
    rows = [w.abs().flatten(1).amax(1) for w in (first, deep)]
    columns = [deep.abs().flatten(1).amax(1), point.abs().amax((0, 2, 3))]
    seen = _values(result, x)
    for one, two, name in zip(rows, columns, ("deep", "point"), strict=True):
        assert (name == "deep") == bool(seen[name][7] == 0)
        assert torch.allclose(one, two, rtol=0.01)
    assert "equalize: 2 pairs of layers" in result.notes


def test_two_layers_are_scaled_by_the_papers_factor() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval(), noise(50, 5)
    result = compiled("granularity = per_tensor, equalize = true", model, x)
    one, two = model[0].weight, model[2].weight
    s = (one.abs().amax(1) / two.abs().amax(0)).sqrt()
    assert torch.allclose(weight(result, "0"), one / s[:, None], rtol=1e-4)
    assert torch.allclose(result.module.get_parameter("0.bias"), model[0].bias / s, rtol=1e-4)
    assert torch.allclose(weight(result, "2"), two * s, rtol=1e-4)


def test_values_between_fill_their_range_with_a_scale_for_each_channel() -> None:
    """What a depthwise layer reads: every channel has the range of the largest. What a full one reads: the range of the
    values, over that of its column, is the same for all."""
    model, x = Uneven().eval(), noise(16, 3, 8, 8)
    result = compiled("equalize = true", model, x)
    seen = _values(result, x)
    live = [seen[name] > 0 for name in ("deep", "point")]
    assert min(int(each.sum()) for each in live) >= 4
    assert torch.allclose(seen["deep"][live[0]], seen["deep"].max(), rtol=0.01)
    ratio = (seen["point"] / weight(result, "point").abs().amax((0, 2, 3)))[live[1]]
    assert torch.allclose(ratio, ratio.mean(), rtol=0.02)
    assert apart(in_floats(result, x), model(x)) < 1e-5


def _values(result: fxcompress.Result, x: Tensor) -> dict[str, Tensor]:
    """The largest magnitude of each channel that each layer reads, in floats."""
    found = {layer.data: str(layer.name) for layer in layers_of(result.captured)}
    seen = {}

    class Watching(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n in found:
                seen[found[n]] = value.abs().amax([0, *range(2, value.dim())])
            return value

    with evaluating(result.module), without_rounding(result.captured):
        Watching(result.module).run(x)
    return seen


def test_channels_that_reach_the_bound_of_a_relu6_stay_as_they_are() -> None:
    model = Uneven(nn.ReLU6).eval()
    with torch.no_grad():
        model.first.weight *= 4
    x = noise(16, 3, 8, 8)
    before = F.relu6(model.first(x)).amax((0, 2, 3)).detach()
    bound = before >= 6
    assert 0 < int(bound.sum()) < 8
    result = compiled("equalize = true", model, x)
    assert apart(in_floats(result, x), model(x)) < 1e-5
    assert torch.equal(weight(result, "first")[bound], model.first.weight[bound])
    seen = _values(result, x)["deep"]
    assert torch.allclose(seen[seen > 0], torch.tensor(6.0), rtol=1e-3)


def test_what_does_not_commute_with_scales_is_left_and_said() -> None:
    model, x = Uneven(nn.Hardswish).eval(), noise(16, 3, 8, 8)
    result = compiled("equalize = true", model, x)
    assert torch.equal(weight(result, "first"), model.first.weight)
    assert any("hardswish doesn't commute with scales" in note for note in result.notes)


# Smoothing


class Encoder(nn.Module):
    """Norms with outliers in two channels. The first is read by linear layers alone, the second by a residual too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.up, self.down = (nn.Linear(16, 16) for _ in range(4))
        with torch.no_grad():
            for norm in (self.one, self.two):
                norm.weight[:] = torch.rand(16) + 0.5
                norm.weight[3], norm.weight[7] = 40.0, -25.0
                norm.bias[:] = torch.randn(16) * 0.1

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y = self.two(x + self.q(y) * self.k(y).sigmoid())
        return y + self.down(F.gelu(self.up(y)))


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_smoothing_is_the_papers(mode: str) -> None:
    """s = max|X|^α / max|W|^(1−α) for each channel, over all that read it (Xiao et al., 2023, equation 4): in the
    norm's weight and bias, or where others read the norm too, in a product in front of the layers."""
    model, x = Encoder().eval(), noise(64, 5, 16)
    result = compiled(f"mode = {mode}, smooth = 60%", model, x)
    read = model.one(x).detach()
    both = torch.cat([model.q.weight, model.k.weight]).detach()
    s = read.abs().amax((0, 1)) ** 0.6 / both.abs().amax(0) ** 0.4
    assert torch.allclose(weight(result, "one"), model.one.weight / s, rtol=1e-4)
    assert torch.allclose(result.module.get_parameter("one.bias"), model.one.bias / s, rtol=1e-4)
    assert torch.allclose(weight(result, "q"), model.q.weight * s, rtol=1e-4)
    assert torch.equal(weight(result, "two"), model.two.weight)
    read = model.two(x + model.q(read) * model.k(read).sigmoid()).detach()
    s = read.abs().amax((0, 1)) ** 0.6 / model.up.weight.abs().amax(0) ** 0.4
    assert torch.allclose(weight(result, "up"), model.up.weight * s, rtol=1e-3)
    assert torch.allclose(dict(result.module.named_buffers())["two_smoothing"], 1 / s, rtol=1e-3)
    assert torch.equal(weight(result, "down"), model.down.weight)
    for y in (x, noise(64, 5, 16, seed=2)):
        assert apart(in_floats(result, y), model(y)) < 1e-5
    assert any("smooth: not down: it reads no norm" in note for note in result.notes)


class Dropped(nn.Module):
    """As BERT's embeddings: a dropout stands between the norm and what reads it, a residual among it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.drop = nn.LayerNorm(16), nn.Dropout(0.1)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.norm(x))
        return y + self.q(y) * self.k(y).sigmoid()


def test_smoothing_behind_a_dropout() -> None:
    model, x = Dropped().eval(), noise(32, 5, 16)
    result = compiled("smooth = 50%", model, x)
    s = model.norm(x).detach().abs().amax((0, 1)).sqrt()
    s = s / torch.cat([model.q.weight, model.k.weight]).detach().abs().amax(0).sqrt()
    assert torch.allclose(weight(result, "q"), model.q.weight * s, rtol=1e-4)
    assert torch.equal(weight(result, "norm"), model.norm.weight)
    assert apart(in_floats(result, x), model(x)) < 1e-5
    assert apart(result.finalize(target="cpu")(x), model(x)) < 0.05


def test_smoothing_brings_the_embedding_nearer() -> None:
    model, x, fresh = Encoder().eval(), noise(64, 5, 16), noise(64, 5, 16, seed=3)
    found = {key: compiled(key, model, x) for key in ("bits = 6 bits", "bits = 6 bits, smooth = 50%")}
    plain, smoothed = (apart(result.module.eval()(fresh), model(fresh)) for result in found.values())
    assert smoothed < 0.7 * plain
    final = found["bits = 6 bits, smooth = 50%"].finalize(target="cpu")
    assert apart(final(fresh), found["bits = 6 bits, smooth = 50%"].module(fresh)) < 0.02


def test_quantizers_stand_behind_what_divides() -> None:
    result = compiled("smooth = 50%", Encoder().eval(), noise(8, 5, 16))
    up = next(layer for layer in layers_of(result.captured) if layer.name == "up")
    assert kind_of(up.data) == "quantizer" and kind_of(up.data.args[0]) == "mul"  # type: ignore[arg-type]
    assert module_of(up.data).on


def test_bounds_can_be_dropped() -> None:
    """`relu6_to_relu`: what Nagel et al. (2019, section 5.1.1) do to MobileNetV2. The model then is the one with ReLUs,
    and its channels are scaled as those are."""
    model, x = Uneven(nn.ReLU6).eval(), noise(16, 3, 8, 8)
    with torch.no_grad():
        model.first.weight *= 4
    plain = Uneven(nn.ReLU).eval()
    plain.load_state_dict(model.state_dict())
    keys = "granularity = per_tensor, equalize = true"
    result, other = compiled(f"{keys}, relu6_to_relu = true", model, x), compiled(keys, plain, x)
    assert apart(in_floats(result, x), plain(x)) < 1e-5 < apart(plain(x), model(x))
    for name in ("first", "deep", "point"):
        assert torch.allclose(weight(result, name), weight(other, name), rtol=1e-3)
    moved = apart(plain(x), model(x))
    assert (f"relu6_to_relu: 2 became ReLU, which moves the output by {moved:.1%} (norm of the difference, one batch)"
            in result.notes)
    kinds = [kind_of(node) for node in result.module.graph.nodes]
    assert kinds.count("relu") == 2 and kinds.count("relu6") == 1, "the last one isn't between two layers"
    changed = next(node for node in result.module.graph.nodes if kind_of(node) == "relu")
    assert changed.meta["origins"][-1].detail == "a ReLU from here on: equalize, relu6_to_relu"
    result.calibrate([x])
    assert apart(in_floats(result, x), plain(x)) < 1e-5
    with torch.no_grad():
        assert apart(result.finalize(target="cpu")(x), result.module.eval()(x)) < 0.02


def test_dropping_bounds_is_for_equalize() -> None:
    with pytest.raises(PolicyError) as error:
        fxcompress.parse("policy p { quantize conv2d { relu6_to_relu = true } }")
    assert [item.code for item in error.value.diagnostics] == ["FXC0371"]
