"""Particular models: recurrence and attention, several inputs, fixed batches, meta weights, subclasses, refusals."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_capture_forms import WAYS, Answer, Net, assert_same, conv, dynamic_sizes
from torch import Tensor, nn

from fxcompress.diagnostics import CaptureError
from fxcompress.graph import capture
from fxcompress.graph.ops import arguments, kind_of, path_of

Pair = namedtuple("Pair", "first second")


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
    assert node.meta["fxc"].source.startswith("test_capture_")
    assert way == "export" or "F.relu(m.c(x)) + 1" in node.meta["fxc"].source
    assert captured.node("body.c").op == "call_module"


def test_a_batch_of_one_is_dynamic_too() -> None:
    model = Net(dynamic_sizes, c=conv())
    for way in WAYS:
        captured = capture(model, torch.randn(1, 3, 8, 8), way)  # type: ignore[arg-type]
        assert_same(model, captured, torch.randn(4, 3, 8, 8))


def test_a_fixed_batch_says_where() -> None:
    model = Net(lambda m, x: m.c(x).view(2, 4, 64), c=conv())
    captured = capture(model, (torch.randn(2, 3, 8, 8),))
    assert captured.fixed_batch.startswith("reshape: shape '[2, 4, 64]' is invalid")
    assert "test_capture_cases.py" in captured.fixed_batch
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
    assert "test_capture_cases.py:" in diagnostic.message and "m.c(x)" in diagnostic.message


def test_a_refusal_is_all_that_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    function, _ = REFUSED["value"]
    with pytest.raises(CaptureError) as caught:
        capture(Net(function, c=conv()), (torch.randn(2, 3, 8, 8),))
    assert "by export" in caught.value.diagnostics[0].notes[0]
    assert capfd.readouterr() == ("", "")  # torch.export writes the graphs it had


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


class _Cached(nn.Module):
    """Keeps what it makes of a parameter for evaluation, by device (as the attention biases of timm)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bias_cache = nn.Parameter(torch.randn(4)), {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.table[[2, 0, 1]]
        key = str(x.device)
        if key not in self.bias_cache:
            self.bias_cache[key] = self.table[[2, 0, 1]]
        return x + self.bias_cache[key]


def test_a_cache_filled_before_capture_is_not_captured() -> None:
    torch.manual_seed(0)
    model, x = _Cached().eval(), torch.randn(2, 3)
    expected = model(x)
    captured = capture(model, x)
    torch.testing.assert_close(captured.module(x), expected)
    assert "table" in {node.target for node in captured.graph.nodes}
    assert set(model.bias_cache) == {"cpu"}, "the model's own cache stays"
    captured.module.train()(x).sum().backward()
    assert captured.module.get_parameter("table").grad is not None


class _DropsInPlace(nn.Module):
    """A dropout in place, whose input is read afterwards: itself, another view of its memory, what it is a part of."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.first, self.last, self.reads = nn.Linear(4, 6), nn.Linear(6, 2), reads
        self.drop = nn.Dropout(1.0, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        given = {"view": x.unsqueeze(1), "part": x[:, :3]}.get(self.reads, x)
        result = self.drop(given)
        return self.last(x) + (self.last(result) if self.reads == "both" else 0.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reads", ["input", "both", "view", "part"])
def test_what_a_module_wrote_in_place_is_read_afterwards(reads: str, way: Any) -> None:
    torch.manual_seed(0)
    model, x = _DropsInPlace(reads).eval(), torch.randn(2, 4)
    if (reads, way) == ("view", "fx"):
        with pytest.raises(CaptureError, match="a view of a tensor is read after"):
            capture(model, x, way=way)
        way = "auto"
    captured = capture(model, x, way=way)
    torch.testing.assert_close(captured.module(x), model(x))
    torch.testing.assert_close(captured.module.train()(x), model.train()(x))
    assert not any(getattr(module, "inplace", False) for module in captured.module.modules())


class _Hidden(nn.Module):
    """Reaches a layer that isn't one of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden = nn.Linear(4, 6), [nn.Linear(6, 2)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.first(x))


def test_parameters_outside_the_model_are_noted() -> None:
    torch.manual_seed(0)
    model, x = _Hidden(), torch.randn(2, 4)
    captured = capture(model, x)
    torch.testing.assert_close(captured.module(x), model(x))
    assert [note for note in captured.notes if "a parameter of 2 x 6" in note and "none of the model's modules" in note]
