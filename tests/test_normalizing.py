"""The normal form of `quantize`: against what modules compute by themselves, and torch's own fusion."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import fxcompress
from fxcompress.diagnostics import PlanError
from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import arguments, kind_of, module_of
from fxcompress.graph.site import Site
from fxcompress.nn import Quantizer
from fxcompress.passes import Quantize
from fxcompress.passes.shared.fold_norms import fold
from fxcompress.passes.shared.normalizing import normalize

ALL = "conv2d | linear | multihead_attention"


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def kinds(captured: Captured | Any) -> list[str]:
    return [kind_of(node) for node in captured.graph.nodes]


def normal(model: nn.Module, inputs: Any, *wanted: str) -> tuple[Captured, list[str]]:
    """The captured model in normal form, and what was reported."""
    captured = fxcompress.capture(model, inputs)
    nodes = tuple(node for node in captured.graph.nodes if kind_of(node) in wanted)
    return captured, normalize(Quantize(), captured, Site(nodes)).lines()


# Attention


class Attends(nn.Module):
    """An attention module, called in one of the ways it can be."""

    def __init__(self, cross: bool, weights: bool, **settings: Any) -> None:
        super().__init__()
        self.attention, self.cross, self.weights = nn.MultiheadAttention(12, 3, **settings), cross, weights

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, hidden: Tensor | None = None) -> Any:
        memory = memory if self.cross else x
        found, weights = self.attention(x, memory, memory, attn_mask=mask, key_padding_mask=hidden,
                                        need_weights=self.weights)
        return (found, weights) if self.weights else found


def same(found: Any, expected: Any) -> bool:
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else ((found, expected),)
    return all(torch.allclose(a, b, atol=2e-6) for a, b in pairs)


@pytest.mark.parametrize(("batch_first", "cross", "weights"), list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True},
                                      {"kdim": 6, "vdim": 6}], ids=str)
def test_attention_is_that_of_the_module(batch_first: bool, cross: bool, weights: bool,
                                         settings: dict[str, Any]) -> None:
    """Values and gradients of every parameter, with a mask and without."""
    torch.manual_seed(0)
    if "kdim" in settings and not cross:
        settings = {"kdim": 12, "vdim": 12}
    model = Attends(cross, weights, batch_first=batch_first, **settings).eval()
    order = (2, 5) if batch_first else (5, 2)
    x, memory = noise(*order, 12), noise(*(order[0] + (not batch_first) * 2, order[1] + batch_first * 2),
                                         settings.get("kdim", 12), seed=2)
    keys = 7 if cross else 5
    hidden = torch.arange(keys) >= torch.tensor([[4], [keys]])
    for masks in ((), (noise(5, keys, seed=3), None), (torch.ones(5, keys).tril() == 0, hidden)):
        inputs = (x, memory, *masks)
        captured = normal(model, inputs, "multihead_attention")[0]
        assert "multihead_attention" not in kinds(captured) and kinds(captured).count("linear") == (4 if cross else 2)
        if weights is False:
            assert kinds(captured).count("scaled_dot_product_attention") == 1
        assert captured.module.state_dict().keys() == model.state_dict().keys()
        expected = model(*inputs)
        assert same(captured.module(*inputs), expected)
        for module in (model, captured.module):
            found = module(*inputs)
            (found[0] if weights else found).square().sum().backward()
        for (name, one), (_, two) in zip(model.named_parameters(), captured.module.named_parameters(), strict=True):
            assert one.grad is not None and torch.allclose(one.grad, two.grad, atol=1e-4), name  # type: ignore[arg-type]
            one.grad = None


def test_attention_drops_weights_in_training_alone() -> None:
    torch.manual_seed(0)
    model = Attends(False, False, batch_first=True, dropout=0.5)
    inputs = (noise(2, 5, 12), noise(2, 5, 12))
    captured = normal(model, inputs, "multihead_attention")[0]
    torch.manual_seed(1)
    runs = torch.stack([captured.module(*inputs) for _ in range(400)])
    assert float(runs.std(0).mean()) > 0.01  # drawn anew each time, right in the mean
    assert apart(runs.mean(0), model.eval()(*inputs)) < 0.1
    captured.module.eval()
    assert torch.allclose(captured.module(*inputs), model(*inputs), atol=1e-6)


def test_attention_without_a_batch_and_with_a_causal_hint() -> None:
    torch.manual_seed(0)

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.full((x.shape[0], x.shape[0]), float("-inf")).triu(1)
            return self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]

    model, x = Causal().eval(), noise(6, 8)
    captured = fxcompress.capture(model, (x,))
    nodes = tuple(node for node in captured.graph.nodes if kind_of(node) == "multihead_attention")
    normalize(Quantize(), captured, Site(nodes))
    assert torch.allclose(captured.module(x), model(x), atol=1e-6)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_all_of_a_transformer_is_in_integers(tmp_path: Path, granularity: str) -> None:
    """Self-attention is one packed layer and the way out, cross-attention four; saved and loaded it is the same."""
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 1, 1, 32, batch_first=True).eval()
    inputs = (noise(4, 6, 16), noise(4, 3, 16, seed=2))
    policy = f"policy p {{ quantize linear | multihead_attention {{ granularity = {granularity} }} }}"
    result = fxcompress.compile(policy, model, inputs, calibration=[inputs])
    expected = model(*inputs)
    simulated = result.module.eval()(*inputs)
    assert set(model.state_dict()) <= set(result.module.state_dict())
    small = result.finalize(target="cpu")
    found = kinds(small)
    assert found.count("int_linear") == 2 + 2 + 4 + 4 and not {"linear", "quantizer"} & set(found)
    paths = {str(node.target) for node in small.graph.nodes if kind_of(node) == "int_linear"}
    assert {"decoder.layers.0.multihead_attn.k_proj", "encoder.layers.0.self_attn.in_proj"} <= paths
    assert apart(small(*inputs), simulated) < 0.03 and apart(small(*inputs), expected) < 0.1
    fxcompress.save(small, tmp_path / "small")
    assert torch.equal(fxcompress.load(tmp_path / "small")(*inputs), small(*inputs))
    assert torch.equal(copy.deepcopy(small)(*inputs), small(*inputs))


def test_vit_is_in_integers_and_names_its_layers() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=10).eval()
    nn.init.normal_(model.heads.head.weight, std=0.1)
    x = noise(4, 3, 32, 32)
    result = fxcompress.compile(f"policy p {{ quantize {ALL} }}", model, x, calibration=[x])
    (step,) = result.plan.steps
    blocks = [f"encoder.layers.encoder_layer_{block}.{layer}" for block in range(3) for layer in
              ("self_attention.in_proj", "self_attention.out_proj", "mlp.0", "mlp.3")]
    assert {change.path for change in step.changes} == {"conv_proj", *blocks, "heads.head"}
    small = result.finalize(target="cpu")
    found = kinds(small)
    assert (found.count("int_conv2d"), found.count("int_linear")) == (1, 13)
    assert not {"conv2d", "linear", "multihead_attention", "quantizer"} & set(found)
    assert apart(small(x), result.module.eval()(x)) < 0.05 and apart(small(x), model(x)) < 0.1


def test_what_is_not_selected_of_attention_is_said() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    _, lines = normal(model, noise(2, 5, 16), "linear")
    assert any("2 multihead_attention compute in float" in line and "linear | multihead_attention" in line
               for line in lines)


# Norms


class Functional(nn.Module):
    """Convolutions and norms that are functions on attributes; one norm follows the mode, two are behind each other."""

    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.filters, self.more = nn.Parameter(noise(4, 3, 3, 3)), nn.Parameter(noise(4, 4, 1, 1, seed=2))
        self.offset = nn.Parameter(noise(4, seed=3)) if biased else None
        self.scale, self.shift = nn.Parameter(noise(4, seed=4)), nn.Parameter(noise(4, seed=5))
        self.register_buffer("mean", noise(4, seed=6))
        self.register_buffer("var", noise(4, seed=7).square() + 0.5)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.filters, self.offset, padding=1)
        x = F.relu(F.batch_norm(x, self.mean, self.var, self.scale, self.shift, self.training))
        return self.norm(F.batch_norm(F.conv2d(x, self.more), self.mean, self.var))


@pytest.mark.parametrize("biased", [True, False])
def test_functional_norms_are_folded(biased: bool) -> None:
    model, x = Functional(biased).eval(), noise(2, 3, 7, 7, seed=8)
    model.norm.running_mean = noise(4, seed=9)
    captured = fxcompress.capture(model, x)
    before = dict(model.state_dict())
    folded = fold(captured, [node for node in captured.graph.nodes if kind_of(node) == "conv2d"])
    captured.refresh()
    assert len(folded) == 3 and "batchnorm2d" not in kinds(captured)
    assert torch.allclose(captured.module(x), model(x), atol=1e-4)
    reference, norm = nn.Conv2d(3, 4, 3, padding=1, bias=biased), nn.BatchNorm2d(4)
    reference.weight = nn.Parameter(before["filters"].clone())
    reference.bias = nn.Parameter(before["offset"].clone()) if biased else None
    norm.load_state_dict({"weight": before["scale"], "bias": before["shift"], "running_mean": before["mean"],
                          "running_var": before["var"], "num_batches_tracked": torch.tensor(0)})
    expected = fuse_conv_bn_eval(reference.eval(), norm.eval())
    assert torch.allclose(captured.module.get_parameter("filters"), expected.weight, atol=1e-6)
    result = fxcompress.compile("policy p { quantize conv2d }", model, x, calibration=[x])
    small = result.finalize(target="cpu")
    assert kinds(small).count("int_conv2d") == 2 and apart(small(x), model(x)) < 0.1


def test_a_norm_that_always_takes_the_batch_is_not_folded() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), None, None, training=True)

    captured = fxcompress.capture(Always().eval(), noise(2, 3, 5, 5))
    assert not fold(captured, [node for node in captured.graph.nodes if kind_of(node) == "conv2d"])


def test_linear_layers_take_their_norm_in_and_no_other() -> None:
    """Behind [N, C] the norm's channels are the layer's; behind [N, L, C] they are the rows, even where L is C."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    with torch.no_grad():
        model(noise(64, 6))
    model.eval()
    captured = fxcompress.capture(model, noise(3, 6))
    assert len(fold(captured, [captured.node("0")])) == 1
    expected = fuse_linear_bn_eval(model[0], model[1])
    assert torch.allclose(captured.module.get_parameter("0.weight"), expected.weight, atol=1e-6)
    assert torch.allclose(captured.module.get_parameter("0.bias"), expected.bias, atol=1e-6)
    captured = fxcompress.capture(model, noise(3, 5, 6))
    assert not fold(captured, [captured.node("0")])


# Padding


class Padded(nn.Module):
    """Zeros around a convolution, by module, by function, by name; and such that differ from side to side."""

    def __init__(self) -> None:
        super().__init__()
        self.pad, self.a = nn.ZeroPad2d((1, 1, 2, 2)), nn.Conv2d(3, 4, 3, padding=(1, 0))
        self.b, self.c = nn.Conv2d(4, 4, 5, padding="same", dilation=2), nn.Conv2d(4, 4, 3, padding="valid")
        self.d, self.e = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 2, padding="same")
        self.f = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(self.pad(x))))
        x = self.d(F.pad(x, (0, 1, 0, 1)))
        return self.f(self.e(F.pad(x, (1, 1), value=1.0)))


def test_padding_becomes_a_setting_where_it_can() -> None:
    torch.manual_seed(0)
    model, x = Padded().eval(), noise(2, 3, 9, 9)
    captured, lines = normal(model, x, "conv2d")
    assert torch.allclose(captured.module(x), model(x), atol=1e-5)
    paddings = {str(node.target if node.op == "call_module" else node.meta["path"]): arguments(node)["padding"]
                for node in captured.graph.nodes if kind_of(node) == "conv2d"}
    assert (paddings["a"], paddings["b"], paddings["c"]) == ((3, 1), (4, 4), (0, 0))
    assert kinds(captured).count("pad") == 3  # one of one side alone, one of ones, and one that reflects
    assert any(line.startswith("e stays in float: the padding `same`") for line in lines)
    assert any("in front of d stays apart" in line for line in lines)
    result = fxcompress.compile("policy p { quantize conv2d }", model, x, calibration=[x])
    small = result.finalize(target="cpu")
    assert kinds(small).count("int_conv2d") == 5 and kinds(small).count("conv2d") == 1
    assert apart(small(x), result.module.eval()(x)) < 0.05


# Regions


class Repeats(nn.Module):
    """One ReLU for all, dropout between layers and their activations, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.a, self.b, self.twice = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.drop(self.a(x)))
        x = self.relu(self.drop(self.b(x)) + x)
        x = self.twice(self.relu(self.twice(x)) * 3)
        return self.head(F.dropout(x, 0.1, self.training).mean((2, 3)))


def test_a_relu_that_is_called_often_is_fused_each_time() -> None:
    torch.manual_seed(0)
    model, x = Repeats().eval(), noise(4, 3, 7, 7)
    result = fxcompress.compile("policy p { quantize conv2d | linear }", model, x, calibration=[x])
    small = result.finalize(target="cpu")
    found = kinds(small)
    assert [found.count(kind) for kind in ("int_conv2d", "int_linear", "relu", "add")] == [4, 1, 0, 0]
    calls = [node for node in small.graph.nodes if kind_of(node) == "int_conv2d"]
    one, two = (module_of(node) for node in calls[2:])
    assert one is not two and torch.equal(one.weight, two.weight)  # each with the grids of its own place
    assert apart(small(x), result.module.eval()(x)) < 0.03 and apart(small(x), model(x)) < 0.1


@pytest.mark.parametrize("residual", [True, False])
def test_a_sum_that_is_read_in_float_is_not_rounded(residual: bool) -> None:
    """The residual of a transformer: added by the kernel, in float."""
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
            self.drop = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.one(x))
            z = self.drop(self.two(y)) + y
            return self.norm(z) * (y if residual else 1.0)

    torch.manual_seed(0)
    model, x = Block().eval(), noise(4, 3, 8)
    result = fxcompress.compile("policy p { quantize linear }", model, x, calibration=[x])
    rounded = [node for node in result.captured.graph.nodes if kind_of(node) == "quantizer"
               and module_of(node).axis is None]
    assert len(rounded) == 2  # the input, and what `two` reads
    small = result.finalize(target="cpu")
    assert kinds(small).count("int_linear") == 2 and "add" not in kinds(small)
    with torch.no_grad():
        assert apart(small(x), result.module.eval()(x)) < 1e-5
    assert apart(small(x), result.module(x)) < 1e-5  # weights that want gradients don't disturb


def test_a_parameter_is_never_added_in_place() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(8, 8), nn.Parameter(noise(1, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.layer(x) + self.shift)

    model, x = Shifted().eval(), noise(1, 8)
    small = fxcompress.compile("policy p { quantize linear }", model, x, calibration=[x]).finalize(target="cpu")
    first = small(x)
    assert torch.equal(small(x), first) and torch.equal(small(torch.cat([x, x])), torch.cat([first, first]))


def test_numbers_that_are_no_floats_are_left_alone() -> None:
    """Indices, masks, and a recurrent layer's tuple: no quantizer on anything but float tensors."""
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.rnn = nn.Embedding(20, 8), nn.GRU(8, 8, batch_first=True)
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x, state = self.rnn(self.words(ids[:, :5]))
            x = self.layer(x).masked_fill(mask[:, :5, None] == 0, 0.0)
            return self.head(x) + self.head(state[-1])[:, None]

    torch.manual_seed(0)
    model = Words().eval()
    inputs = (torch.randint(0, 20, (4, 6)), torch.ones(4, 6, dtype=torch.bool))
    result = fxcompress.compile("policy p { quantize linear }", model, inputs, calibration=[inputs])
    for node in result.captured.graph.nodes:
        if kind_of(node) == "quantizer":
            assert node.args[0].meta["fxc"].dtype == torch.float32
    small = result.finalize(target="cpu")
    assert kinds(small).count("int_linear") == 3 and apart(small(*inputs), model(*inputs)) < 0.05


@pytest.mark.parametrize(("layer", "shape"), [
    (nn.Conv1d(4, 6, 3), (2, 4, 9)), (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)), (nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)), (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
], ids=str)
def test_layers_without_a_kernel_are_simulated_and_named(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(layer, nn.ReLU()).eval(), noise(*shape)
    kind = next(kind for kind in kinds(fxcompress.capture(model, x)) if kind.startswith("conv"))
    result = fxcompress.compile(f"policy p {{ quantize {kind} }}", model, x, calibration=[x])
    weight = next(module for name, module in result.module.named_modules()
                  if isinstance(module, Quantizer) and name.endswith("weight_quantizer"))
    channels = 1 if weight.axis is None else layer.weight.shape[weight.axis]  # type: ignore[operator,index]
    assert weight.rows == channels and (weight.axis is None) == (getattr(layer, "groups", 1) == 2)
    small = result.finalize(target="cpu")
    assert 0 < apart(result.module.eval()(x), model(x)) < 0.05 and apart(small(x), result.module(x)) < 1e-5
    assert any(f"no integer kernel for {kind}" in note for note in result.notes)


def test_a_weight_of_two_layers_keeps_serving_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.layer(self.words(ids)))

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(12).reshape(3, 4)
    result = fxcompress.compile("policy p { quantize linear }", model, ids, calibration=[ids])
    small = result.finalize(target="cpu")
    assert torch.equal(small.get_parameter("words.weight"), model.words.weight)
    assert kinds(small).count("int_linear") == 2 and apart(small(ids), model(ids)) < 0.1


class Gated(nn.Linear):
    """Its weight depends on what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * x.mean(), self.bias)


def test_reasons_are_grouped() -> None:
    model, x = nn.Sequential(*(Gated(8, 8) for _ in range(7)), nn.Linear(8, 2)).eval(), noise(2, 8)
    _, lines = normal(model, x, "linear")
    assert len(lines) == 1
    assert lines[0].endswith("and 3 more stay in float: the weight depends on more than parameters")
    with pytest.raises(PlanError) as error:
        fxcompress.compile("policy p { quantize linear }", model[:7], x)
    (found,) = error.value.diagnostics
    assert found.code == "FXC0370" and "depends on more than" in str(found.notes)


class Standardised(nn.Module):
    """Two products in one module whose weights are computed from parameters, one as transformers' `Conv1D`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(noise(8, 6)), nn.Parameter(noise(5, 8, seed=2))
        self.c, self.offset = nn.Parameter(noise(5, 4, seed=3)), nn.Parameter(noise(4, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.a - self.a.mean(1, keepdim=True)).relu()
        x = F.linear(x, self.b / self.b.norm(dim=1, keepdim=True)).relu()
        return torch.addmm(self.offset, x, self.c)


@pytest.mark.parametrize("inner", [True, False])
def test_weights_computed_from_parameters(inner: bool) -> None:
    model: nn.Module = Standardised().eval()
    model, x = nn.Sequential(model) if inner else model, noise(16, 6)
    result = fxcompress.compile("policy p { quantize linear | addmm }", model, x, calibration=[x])
    (result.module(x)).sum().backward()
    assert all(parameter.grad is not None for parameter in result.module.parameters())
    small = result.finalize(target="cpu")
    assert kinds(small).count("int_linear") == 3 and apart(small(x), model(x)) < 0.05
    assert apart(small(x), result.module.eval()(x)) < 0.02


def test_layers_on_constants_are_calibrated() -> None:
    """The biases of Swin v2's windows are computed from a table of coordinates, by layers."""
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.place = nn.Linear(8, 8), nn.Linear(2, 8)
            self.register_buffer("table", noise(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.place(self.table)

    torch.manual_seed(0)
    model, x = Biased().eval(), noise(3, 4, 8)
    result = fxcompress.compile("policy p { quantize linear { granularity = per_tensor } }", model, x, calibration=[x])
    small = result.finalize(target="cpu")
    assert kinds(small).count("int_linear") == 2 and apart(small(x), model(x)) < 0.05
