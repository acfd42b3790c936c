"""Small models that write things in awkward ways: both ways of capture compute what the model computes."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fxcompress.diagnostics import CaptureError
from fxcompress.graph import Captured, capture
from fxcompress.graph.ops import arguments, kind_of, path_of

WAYS = ("fx", "export")
Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    if isinstance(value, Mapping):
        return tensors(list(value.values()))
    return [t for item in value for t in tensors(item)] if isinstance(value, tuple | list) else []


def assert_same(model: nn.Module, captured: Captured, *args: Any, gradients: bool = True, **kwargs: Any) -> None:
    """Outputs, in both modes, and gradients are equal bit for bit, with the same random numbers."""
    module = captured.module
    assert list(module.state_dict()) == list(model.state_dict())
    assert module.training == model.training
    for training in (False, True):
        model.train(training), module.train(training)
        results = []
        for each in (model, module):
            each.zero_grad()
            torch.manual_seed(7)
            results.append(tensors(each(*args, **kwargs)))
            if gradients:
                sum(out.float().sum() for out in results[-1] if out.requires_grad).backward()
        assert len(results[0]) == len(results[1]) > 0
        for left, right in zip(*results, strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
        grads = dict(module.named_parameters())
        for name, parameter in model.named_parameters():
            other = grads[name].grad
            assert (parameter.grad is None) == (other is None), name
            assert parameter.grad is None or torch.equal(parameter.grad, other), name


class Net(nn.Module):
    """A model made of one function of itself and its inputs, and of the modules it is given."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3, padding=1)


def _aliased_residual(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    kept = y
    y += 1
    return kept * y  # `kept` is `y`


def _written_slice(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    y[:, 1:3] = 0.5
    y[:, 0, 1] = x[:, 0, 1]
    y[..., -1] += 2
    return y * 2


def _written_view(m: Any, x: Tensor) -> Tensor:
    y = m.c(x).clone()
    part = y[:, :2]
    part.mul_(3).add_(1, alpha=2)
    return y + 1


def _written_mask(m: Any, x: Tensor) -> Tensor:
    y = m.c(x).clone()
    y[y < 0] = 0
    return y


def _dynamic_sizes(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    flat = m.c(x).view(b, -1)
    zeros = torch.zeros(b, 2, device=x.device)
    steps = torch.arange(b, device=x.device).unsqueeze(1).to(x.dtype) / b
    assert flat.size(0) == b and c == 3 and len(x.shape) == 4 and (h // 2) * 2 == w
    return torch.cat([flat, zeros, steps, flat.new_ones(b, h)], 1).reshape(b * 3, -1)


def _constants(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[-2:], device=x.device).tril().bool()
    bias = x.new_zeros(x.shape[1], 1, 1)
    bias[1] = 3
    positions = torch.arange(x.shape[-1]).view(1, -1)
    return (m.c(x + bias)).masked_fill(~mask, 0.0) + positions


def _arithmetic(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    z = 1 - y / 3 + torch.add(y, x[:, :1], alpha=2) - torch.sub(y, 1, alpha=3) + torch.rsub(y, 2, alpha=0.5)
    whole = x[:, :1].int()
    z = z + (y.detach() // 0.5) + (whole // 2) + torch.div(whole, 3, rounding_mode="floor")
    z = z + 2 / (y.abs() + 1) + y.square() ** 0.5 + 2.0 ** y.sigmoid() + (y % 0.3)
    z = z + torch.div(y, 2, rounding_mode="floor") + torch.where(y > 0, y, y.exp() - 1)
    z = z + (-y).clip(-1, 1).clamp_min(-0.5) + y.var((2, 3), keepdim=True, unbiased=False) + y.std(dim=1, keepdim=True)
    return z + torch.max(y, x[:, :1]) + y.max(dim=1, keepdim=True).values + y.amax((2, 3), True)


def _shapes(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    a, b = y.chunk(2, dim=1)
    c, d = torch.split(y, [1, 3], 1)
    e = torch.stack([a.mean(1), b.mean(1)], 1).flip(-1).roll((1, 2), (2, 3))
    f = torch.einsum("bchw,bchv->bwv", y, y).unsqueeze(1)
    g = y.permute(0, 2, 3, 1).contiguous().view(y.shape[0], -1, y.shape[1]).mT.unflatten(2, (y.shape[2], -1))
    h = F.pad(d[:, 0:2, ::2], (0, 0, 0, y.shape[2] - y.shape[2] // 2))
    return torch.cat([e, f, g, h, c.expand(-1, 2, -1, -1), y.swapaxes(2, 3), y.mT.repeat(1, 2, 1, 1)], dim=1)


def _dropouts(m: Any, x: Tensor) -> Tensor:
    y = F.dropout(m.c(x), 0.3, m.training)
    q = y.flatten(2)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.25 if m.training else 0.0)


def _without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.c(x) * 2
    return m.c(x) * target.detach() + target


def _twice(m: Any, x: Tensor) -> Tensor:
    return m.act(m.same(m.act(m.same(x))))


def _numbers(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    return {"out": y.sum(), "n": x.shape[1], "batch": (y, [y + 1, None])}


def _random(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    keep = y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.5)
    return y * keep + torch.randn_like(y) + torch.rand(x.shape[-1], device=x.device)


def _functional(m: Any, x: Tensor) -> Tensor:
    y = F.embedding((x.abs() * 2).long().clamp(max=3)[:, 0], m.e.weight, padding_idx=0)
    a, b, c = y.tensor_split(3, dim=-1)
    d, e = y.split_with_sizes([2, 1], -1)
    z = F.elu(y, 0.5) + F.layer_norm(y, (3,), m.e.weight[0]) + torch.cat([a, b, c], -1) + torch.cat([d, e], dim=-1)
    w = m.e.weight
    z = z + z.mT.mH.swapaxes(axis0=1, axis1=2).swapdims(1, 2).adjoint().mT + (z.flatten(0, 2).T.H.t().t()).mean()
    return torch.einsum("bhwc,vc->bhwv", z, w) + F.linear(z, w)


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "aliased residual": (_aliased_residual, {"c": conv}),
    "written slice": (_written_slice, {"c": conv}),
    "written view": (_written_view, {"c": conv}),
    "written mask": (_written_mask, {"c": conv}),
    "dynamic sizes": (_dynamic_sizes, {"c": conv}),
    "constants": (_constants, {"c": conv}),
    "arithmetic": (_arithmetic, {"c": conv}),
    "shapes": (_shapes, {"c": conv}),
    "dropouts": (_dropouts, {"c": conv}),
    "no gradient": (_without_gradient, {"c": conv}),
    "one module twice": (_twice, {"same": lambda: nn.Conv2d(3, 3, 1), "act": nn.ReLU}),
    "numbers": (_numbers, {"c": conv}),
    "random": (_random, {"c": conv}),
    "checkpoint": (lambda m, x: torch.utils.checkpoint.checkpoint(m.c, x, use_reentrant=False) + x[:, :1], {"c": conv}),
    "functional": (_functional, {"e": lambda: nn.Embedding(4, 3)}),
    "group norm": (lambda m, x: m.n(m.c(x)), {"c": conv, "n": lambda: nn.GroupNorm(2, 4)}),
    "instance norm": (lambda m, x: m.n(m.c(x)), {"c": conv, "n": lambda: nn.InstanceNorm2d(4, affine=True)}),
    "transposed": (lambda m, x: m.t(m.c(x)), {"c": conv, "t": lambda: nn.ConvTranspose2d(4, 2, 2, 2)}),
    "resize": (lambda m, x: F.interpolate(m.c(x), scale_factor=2, mode="bilinear") + F.interpolate(x, (16, 16))[:, :1],
               {"c": conv}),
    "pools": (lambda m, x: m.a(m.p(m.c(x))).flatten(1),
              {"c": conv, "p": lambda: nn.MaxPool2d(2), "a": lambda: nn.AdaptiveAvgPool2d((1, 1))}),
    "identity": (lambda m, x: m.i(m.c(x)), {"c": conv, "i": nn.Identity}),
    "weight norm": (lambda m, x: m.c(x), {"c": lambda: nn.utils.parametrizations.weight_norm(conv())}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_form(form: str, way: str) -> None:
    torch.manual_seed(0)
    function, modules = FORMS[form]
    model = Net(function, **{name: make() for name, make in modules.items()})
    captured = capture(model, (torch.randn(2, 3, 8, 8),), way)  # type: ignore[arg-type]
    assert captured.way == way and not captured.fixed_batch and not captured.notes
    assert not [kind for node in captured.graph.nodes if "." in (kind := kind_of(node))], "no canonical name"
    assert_same(model, captured, torch.randn(3, 3, 8, 8))
    captured.refresh()
    assert_same(model, captured, torch.randn(5, 3, 8, 8))


class Sequences(nn.Module):
    """Recurrent layers, attention, embeddings with a tied head, several inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scales = nn.ParameterList([nn.Parameter(torch.full((8,), 1.0 + n)) for n in range(2)])
        self.register_buffer("shift", torch.ones(8))

    def forward(self, ids: Tensor, mask: Tensor | None = None, scale: float = 1.0, *,
                extra: Tensor | None = None) -> Answer:
        x = self.embed(ids)
        x, (h, _) = self.lstm(x)
        x, _ = self.gru(x)
        x, weights = self.attention(x, x, x, key_padding_mask=mask)
        x = self.layer(x) * torch.cat(list(self.scales)).view(2, -1).sum(0) + self.shift * scale
        if extra is not None:
            x = x + extra
        return Answer(self.head(x), hidden=weights + h.mean())


@pytest.mark.parametrize("way", WAYS)
def test_sequences(way: str) -> None:
    torch.manual_seed(0)
    model = Sequences().eval()
    ids, mask = torch.randint(0, 11, (2, 5)), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    inputs = {"ids": ids, "mask": mask, "extra": torch.randn(2, 5, 8)}
    captured = capture(model, inputs, way)  # type: ignore[arg-type]
    kinds = [kind_of(node) for node in captured.graph.nodes]
    for kind in ("embedding", "lstm", "gru", "multihead_attention", "layernorm", "linear"):
        assert kind in kinds
    wider = {name: torch.cat([value, value, value]) for name, value in inputs.items()}
    assert_same(model, captured, **wider)
    assert captured.module.get_parameter("head.weight") is captured.module.get_parameter("embed.weight")
    copied = captured.copy().module
    assert copied.get_parameter("head.weight") is copied.get_parameter("embed.weight")
    assert copied.get_parameter("head.weight") is not captured.module.get_parameter("head.weight")
    assert captured.facts.params == sum(p.numel() for p in model.parameters())
    short = capture(model, (ids,), way)  # type: ignore[arg-type]  # what isn't given takes its default
    assert_same(model, short, torch.cat([ids, ids]))


@pytest.mark.parametrize("way", WAYS)
def test_several_inputs_and_outputs(way: str) -> None:
    model = Net(lambda m, a, b: Pair(m.c(a) + b[0], {"x": b[1] * 2, "none": None}), c=nn.Linear(4, 4))
    a, b = torch.randn(2, 4), (torch.randn(2, 4), torch.randn(2, 1))
    captured = capture(model, (a, b), way)  # type: ignore[arg-type]
    out = captured.module(a, b)
    assert type(out) is tuple and list(out[1]) == ["x"]
    assert torch.equal(out[0], model(a, b)[0]) and torch.equal(out[1]["x"], b[1] * 2)


@pytest.mark.parametrize("way", WAYS)
def test_both_ways_name_paths_and_lines(way: str) -> None:
    model = nn.Sequential()
    model.add_module("body", Net(lambda m, x: F.relu(m.c(x)) + 1, c=conv()))
    captured = capture(model, (torch.randn(2, 3, 8, 8),), way)  # type: ignore[arg-type]
    node = next(node for node in captured.graph.nodes if kind_of(node) == "relu")
    assert path_of(node) == "body"
    assert node.meta["fxc"].source.startswith("test_capture_forms.py:")
    assert way == "export" or "F.relu(m.c(x)) + 1" in node.meta["fxc"].source
    assert captured.node("body.c").op == "call_module"


def test_a_batch_of_one_is_dynamic_too() -> None:
    model = Net(_dynamic_sizes, c=conv())
    for way in WAYS:
        captured = capture(model, torch.randn(1, 3, 8, 8), way)  # type: ignore[arg-type]
        assert_same(model, captured, torch.randn(4, 3, 8, 8))


def test_a_fixed_batch_says_where() -> None:
    model = Net(lambda m, x: m.c(x).view(2, 4, 64), c=conv())
    captured = capture(model, (torch.randn(2, 3, 8, 8),))
    assert captured.fixed_batch.startswith("reshape: shape '[2, 4, 64]' is invalid")
    assert "test_capture_forms.py" in captured.fixed_batch
    assert_same(model, captured, torch.randn(2, 3, 8, 8))
    captured.refresh()


def test_ways_of_its_own_at_some_batch_sizes_are_told() -> None:
    small = Net(lambda m, x: m.c(x) if x.shape[0] <= 8 else m.c(x) * 2, c=conv())
    captured = capture(small, torch.randn(2, 3, 8, 8))
    assert captured.way == "export" and not captured.fixed_batch
    assert any("batch sizes of 2 to 8" in note for note in captured.notes)
    assert_same(small, captured, torch.randn(8, 3, 8, 8))
    pair = Net(lambda m, x: m.c(x) * 2 if x.shape[0] == 2 else m.c(x), c=conv())
    captured = capture(pair, torch.randn(2, 3, 8, 8))
    assert captured.way == "export" and "at this batch size" in captured.fixed_batch
    assert_same(pair, captured, torch.randn(2, 3, 8, 8))
    whole = Net(lambda m, x: m.c(x) if x.shape[0] > 0 else x, c=conv())  # the same way for every batch
    assert capture(whole, torch.randn(2, 3, 8, 8)).way == "fx"


def test_the_model_stays_as_it_is() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    captured = capture(model, (torch.randn(2, 3, 8, 8),))
    assert [m.training for m in model] == [True, True, False]
    assert [captured.module.get_submodule(str(n)).training for n in range(3)] == [True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        captured.module.get_parameter("0.weight").zero_()
    assert torch.equal(before["0.weight"], model[0].weight)
    assert type(model.training) is bool and "training" not in vars(nn.Module)


def test_a_model_on_meta_is_a_skeleton() -> None:
    with torch.device("meta"):
        model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 5))
    for way in WAYS:
        captured = capture(model, (torch.randn(2, 3, 8, 8),), way)  # type: ignore[arg-type]
        assert not captured.concrete
        assert captured.node("3").meta["fxc"].shape == (2, 5)
        assert captured.node("3").meta["fxc"].dynamic == (True, False)


def test_subclasses_that_call_their_base_operator_are_that_layer() -> None:
    class ChannelNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
            return y.permute(0, 3, 1, 2)

    class StandardizedConv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    class NormAct(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.num_batches_tracked.add_(1)
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1,
                                self.eps).relu()

    model = nn.Sequential(conv(), ChannelNorm(4), StandardizedConv(4, 4, 3), NormAct(4))
    for way in WAYS:
        captured = capture(model, (torch.randn(2, 3, 8, 8),), way)  # type: ignore[arg-type]
        assert captured.node("1").op == captured.node("3").op == "call_module"
        assert type(captured.module.get_submodule("1")) is nn.LayerNorm
        functional = next(n for n in captured.graph.nodes if kind_of(n) == "conv2d" and path_of(n) == "2")
        assert functional.op == "call_function" and kind_of(arguments(functional)["weight"]) == "sub"
        for training in (False, True):
            x = torch.randn(3, 3, 8, 8)
            copied = capture(model.train(training), x).module
            assert torch.equal(model(x), copied(x))


class DropPath(nn.Module):
    """As models outside torchvision write it (timm, transformers)."""

    def __init__(self, drop_prob: float | None, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.drop_prob or not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * (mask.div_(1 - self.drop_prob) if self.scale_by_keep else mask)


@pytest.mark.parametrize("way", WAYS)
def test_dropped_paths(way: str) -> None:
    model = nn.Sequential(conv(), DropPath(0.5), DropPath(0.0), DropPath(None)).eval()
    captured = capture(model, torch.randn(2, 3, 8, 8), way)  # type: ignore[arg-type]
    assert [kind_of(node) for node in captured.graph.nodes] == ["input", "conv2d", "stochastic_depth", "output"]
    assert type(captured.module.get_submodule("1")) is torchvision.ops.StochasticDepth
    assert_same(model, captured, torch.randn(6, 3, 8, 8))
    unscaled = capture(nn.Sequential(conv(), DropPath(0.5, False)).eval(), torch.randn(2, 3, 8, 8),
                       way)  # type: ignore[arg-type]
    assert any("another way" in note for note in unscaled.notes)


@pytest.mark.parametrize("norm", [
    nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed(norm: Any) -> None:
    torch.manual_seed(0)
    captured = capture(nn.Sequential(norm(conv())), torch.randn(2, 3, 8, 8))
    torch.manual_seed(0)
    model = nn.Sequential(norm(conv()))  # the one that was captured stays as it is, and can't be run before the other
    assert_same(model, captured, torch.randn(3, 3, 8, 8))
    captured.refresh()
    assert type(captured.module.get_submodule("0").weight) is not torch._subclasses.FakeTensor


def test_leaves_are_of_torch_s_own_classes() -> None:
    class Mine(nn.Conv2d):
        """Nothing of its own."""

    captured = capture(nn.Sequential(Mine(3, 4, 3)), torch.randn(2, 3, 8, 8))
    assert type(captured.module.get_submodule("0")) is nn.Conv2d


REFUSED = {
    "value": (lambda m, x: m.c(x) if x.sum() > 0 else x, "reads the value of a tensor"),
    "item": (lambda m, x: m.c(x) * x.max().item(), "reads the value of a tensor"),
    "shape": (lambda m, x: m.c(x)[x[:, :1].nonzero()[0]], "depends on the value of a tensor"),
    "batch": (lambda m, x: m.c(x) if x.shape[0] > 4 else x, "batch size"),
    "range": (lambda m, x: sum(m.c(x)[i].sum() for i in range(x.shape[0])), "batch size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_model_s_line(name: str) -> None:
    function, words = REFUSED[name]
    with pytest.raises(CaptureError) as caught:
        capture(Net(function, c=conv()), (torch.randn(2, 3, 8, 8),), "fx")
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "FXC0401" and words in diagnostic.message and diagnostic.help
    assert "test_capture_forms.py:" in diagnostic.message and "m.c(x)" in diagnostic.message


@pytest.mark.parametrize("model, inputs, code", [
    (lambda x: x, torch.ones(1), "FXC0403"),
    (nn.LazyLinear(3), torch.ones(1, 2), "FXC0403"),
    (nn.Linear(2, 2), 3, "FXC0402"),
    (nn.Linear(2, 2), (torch.ones(1, 2), torch.ones(1)), "FXC0402"),
    (nn.Linear(2, 2), {"x": torch.ones(1, 2)}, "FXC0402"),
    (nn.Linear(2, 2), torch.ones(1, 3), "FXC0402"),
])
def test_wrong_calls(model: Any, inputs: Any, code: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(model, inputs)
    assert caught.value.diagnostics[0].code == code
