"""Facts against figures that others publish, and against torch's own counter."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.diagnostics import RewriteError
from fxcompress.graph import capture
from fxcompress.graph.ops import OPS, call, kind_of

# Multiply-accumulates (billions) and parameters (millions) at 224x224, from the model cards of torchvision
# (https://pytorch.org/vision/stable/models.html, "GFLOPS" and "Params"). ViT's card leaves out what its fused
# attention computes: 12 layers of 2 * 197 * 197 * 768; the 17.6 of its authors (Dosovitskiy et al., 2021) has it.
PUBLISHED = {"resnet50": (4.09, 25.56), "mobilenet_v2": (0.30, 3.50), "vit_b_16": (17.6, 86.57),
             "vgg16": (15.47, 138.36),
             "efficientnet_b0": (0.39, 5.29), "densenet121": (2.83, 7.98), "regnet_y_400mf": (0.40, 4.34)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None) if "regnet" not in name else None
    if model is None:  # its constructor computes widths from tensors
        model = torchvision.models.get_model(name, weights=None).to("meta")
    facts = capture(model, torch.empty(4, 3, 224, 224)).facts
    macs, params = PUBLISHED[name]
    digits = 1 if name == "vit_b_16" else 2
    assert round(facts.macs / 1e9, digits) == macs
    assert round(facts.params / 1e6, 2) == params
    assert facts.bytes == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11", "shufflenet_v2_x0_5", "squeezenet1_1",
                                  "googlenet"])
def test_macs_are_half_the_flops_of_torch_s_counter(name: str) -> None:
    options: dict[str, Any] = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options).eval()
        x = torch.empty(3, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(x)
    captured = capture(model, torch.empty(3, 3, 64, 64))
    assert 2 * sum(node.meta["fxc"].macs for node in captured.graph.nodes) == counter.get_total_flops()
    assert captured.facts.macs == counter.get_total_flops() // 6


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
        self.one = nn.Conv1d(4, 8, 5, dilation=2)
        self.three = nn.Conv3d(1, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(self.up(x).flatten(2))
        z = torch.einsum("bcl,bdl->bcd", y, y) @ y.mT.mean(1, keepdim=True).mT
        return torch.baddbmm(z, y, y.mT @ z) + torch.bmm(y,
                                                         y.mT).sum() + self.three(y[:, None, :, :9, None].expand(-1, -1,
                                                                                                                 -1, -1,
                                                                                                                 3)).sum()


def test_macs_of_other_products() -> None:
    x = torch.randn(2, 6, 5, 5)
    with FlopCounterMode(display=False) as counter:
        Products()(x)
    captured = capture(Products(), x)
    assert 2 * sum(node.meta["fxc"].macs for node in captured.graph.nodes) == counter.get_total_flops()


def test_macs_of_attention_and_recurrence() -> None:
    embed, heads, length, batch = 8, 2, 5, 3
    attention = nn.MultiheadAttention(embed, heads, batch_first=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.lstm = attention, nn.LSTM(embed, 6, num_layers=2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.attention(x, x, x)
            y = y + torch.nn.functional.scaled_dot_product_attention(x, x, x)
            return self.lstm(y)[0]

    captured = capture(Model(), torch.randn(batch, length, embed))
    macs = {kind_of(node): node.meta["fxc"].macs for node in captured.graph.nodes}
    rows = batch * length
    core = 2 * rows * length * embed  # q k^T and p v, over all heads
    assert macs["multihead_attention"] == 4 * rows * embed * embed + core
    assert macs["scaled_dot_product_attention"] == core
    assert macs["lstm"] == rows * 4 * 6 * ((embed + 6) + (6 + 6))  # each gate: input and state, in both layers


def test_facts_of_nodes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                          nn.Linear(144, 2)).half()
    captured = capture(model, torch.empty(2, 3, 8, 8, dtype=torch.float16))
    conv, norm, relu, flat, linear = (node.meta["fxc"] for node in captured.graph.nodes if node.op.startswith("call"))
    assert [f.kind for f in (conv, norm, relu, flat, linear)] == ["conv2d", "batchnorm2d", "relu", "flatten", "linear"]
    assert [f.path for f in (conv, norm, relu, flat, linear)] == ["0", "1", "2", "3", "4"]
    assert conv.shape == (2, 4, 6, 6) and conv.dtype is torch.float16 and conv.dynamic == (True, False, False, False)
    assert (conv.params, conv.bytes, conv.value_bytes) == (108, 216, 2 * 2 * 4 * 36)
    assert (norm.params, norm.bytes) == (8, 2 * 16 + 8)  # two parameters, two running statistics, the count of batches
    assert (relu.params, relu.macs, linear.macs) == (0, 0, 2 * 288)
    assert flat.shape == (2, 144)


def test_a_rewrite_that_does_not_fit_is_refused() -> None:
    captured = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)), torch.randn(2, 3, 8, 8))
    conv = captured.module.get_submodule("0")
    conv.weight.data = conv.weight.data[:3]
    conv.bias.data = conv.bias.data[:3]
    with pytest.raises(RewriteError) as caught:
        captured.refresh()
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "FXC0406" and "`_1`" in diagnostic.message
    assert any("[2, 3, 6, 6]" in note for note in diagnostic.notes)


def test_refresh_after_a_rewrite() -> None:
    captured = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8))
    old = captured.node("relu")
    with captured.graph.inserting_before(old):
        new = call(captured.graph, "leaky_relu", old.args[0], negative_slope=0.2)
        call(captured.graph, "sigmoid", old.args[0])  # nothing uses it
    captured.replace(old, new)
    captured.refresh()
    assert [kind_of(node) for node in captured.graph.nodes] == ["input", "conv2d", "leaky_relu", "output"]
    assert new.meta["fxc"].path == "1" and new.meta["fxc"].shape == (2, 4, 6, 6)
    assert captured.moved == {"relu": ("leaky_relu",)} and captured.nodes_named(["relu"]) == (new,)
    with pytest.raises(LookupError):
        captured.node("gone")


def test_every_operator_of_the_table_is_callable_and_unique() -> None:
    targets = [op.target for op in OPS.values()]
    assert all(callable(target) for target in targets) and len(set(targets)) == len(targets) == len(OPS)


def test_every_way_to_write_a_unary_operator() -> None:
    unary = [op for op in OPS.values() if op.family == "elementwise" and op.signature == "input"]
    wide = {"real", "imag", "angle", "view_as_real", "view_as_complex", "bitwise_not", "invert", "detach", "clone",
            "contiguous"}
    names = [op.name for op in unary if op.name not in wide and op.name not in vars(operator)]

    class All(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = {}
            for name in names:
                for owner in (torch, torch.nn.functional):
                    if hasattr(owner, name):
                        out[f"{owner.__name__} {name}"] = getattr(owner, name)(x)
                if hasattr(Tensor, name):
                    out[f"method {name}"] = getattr(x, name)()
                if hasattr(Tensor, f"{name}_"):
                    copy = x.clone()
                    getattr(copy, f"{name}_")()
                    out[f"in place {name}"] = copy
            return out

    x = torch.rand(2, 3) * 0.8 + 0.1
    model, captured = All(), capture(All(), x)
    assert len(names) > 40
    assert {kind_of(node) for node in captured.graph.nodes} - {"input", "output", "to"} == set(names)
    for key, value in captured.module(x).items():
        torch.testing.assert_close(value, model(x)[key], rtol=0, atol=0, equal_nan=True, msg=key)
