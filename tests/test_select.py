"""Selectors on real models, held against what `named_modules` and torch's own symbolic trace say."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.diagnostics import PolicyError, Sink
from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import path_of
from fxcompress.graph.predicates import PROPERTIES
from fxcompress.graph.select import HELPERS, Selecting, label, select
from fxcompress.policy import kinds, parse, parse_selector

MODELS = ("resnet18", "vgg11", "mobilenet_v2", "shufflenet_v2_x0_5", "vit_b_16")
CLASSES = {"conv2d": nn.Conv2d, "batchnorm2d": nn.BatchNorm2d, "linear": nn.Linear, "layernorm": nn.LayerNorm,
           "dropout": nn.Dropout, "multihead_attention": nn.MultiheadAttention}


@cache
def model_of(name: str) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name).eval()


@cache
def captured_of(name: str) -> Captured:
    size = 224 if name == "vit_b_16" else 64
    return fxcompress.capture(model_of(name), (torch.zeros(1, 3, size, size),))


def paths(name: str, selector: str, optional: bool = False) -> list[str]:
    return [label(node) for node in select(captured_of(name), selector, optional=optional)]


def modules(name: str, cls: type[nn.Module], holds: Callable[[nn.Module], bool] = lambda module: True) -> set[str]:
    return {path for path, module in model_of(name).named_modules() if type(module) is cls and holds(module)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["conv2d", "batchnorm2d", "linear"])
def test_a_kind_is_every_module_of_its_class(name: str, kind: str) -> None:
    expected = modules(name, CLASSES[kind])
    if name == "vit_b_16":  # attention is taken apart, and its projections are linear layers of their own
        assert expected <= set(paths(name, kind, optional=True))
    else:
        assert set(paths(name, kind, optional=True)) == expected


PREDICATES: dict[str, Callable[[nn.Conv2d], bool]] = {
    "out_channels >= 128": lambda m: m.out_channels >= 128,
    "in_channels < 64": lambda m: m.in_channels < 64,
    "kernel_size == 3": lambda m: m.kernel_size == (3, 3),
    "kernel_size != 3": lambda m: m.kernel_size != (3, 3),
    "stride == 2": lambda m: m.stride == (2, 2),
    "padding <= 0": lambda m: m.padding == (0, 0),
    "groups > 1": lambda m: m.groups > 1,
    "depthwise": lambda m: m.groups == m.in_channels != 1,
    "bias == true": lambda m: m.bias is not None,
    "params > 100k": lambda m: sum(p.numel() for p in m.parameters()) > 100_000,
    "bytes <= 4 KiB": lambda m: sum(p.numel() * 4 for p in m.parameters()) <= 4096,
    "dilation == 1, out_channels == 64": lambda m: m.dilation == (1, 1) and m.out_channels == 64,
    "dtype == f32": lambda m: m.weight.dtype == torch.float32,
    "rank == 4": lambda m: True,
}


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v2", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("predicate", PREDICATES)
def test_predicates_say_what_the_modules_say(name: str, predicate: str) -> None:
    assert set(paths(name, f"conv2d[{predicate}]", optional=True)) == modules(name, nn.Conv2d, PREDICATES[predicate])


def test_predicates_of_other_kinds() -> None:
    assert paths("resnet18", "linear[in_features == 512, out_features >= 1k]") == ["fc"]
    assert len(paths("resnet18", "batchnorm2d[channels == 512]")) == 5
    assert len(paths("vit_b_16", "layernorm[channels == 768]")) == 25
    assert paths("resnet18", "*[out_features > 1]") == ["fc"], "what has no such fact is passed over"
    assert paths("resnet18", '"layer4"[out_channels > 1, kernel_size == 1]') == ["layer4.0.downsample.0"]


class Heads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.view(2, 7, 4, 8).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_heads_embeddings_and_recurrent_layers() -> None:
    attention = fxcompress.capture(Heads(), (torch.zeros(2, 7, 32),))
    assert len(select(attention, "scaled_dot_product_attention[heads == 4]")) == 1
    model = nn.Sequential(nn.Embedding(30, 12), nn.LSTM(12, 5))
    text = fxcompress.capture(model, (torch.zeros(2, 3, dtype=torch.long),))
    assert len(select(text, "embedding[embeddings == 30, embedding_dim == 12]")) == 1
    assert len(select(text, "lstm[hidden_size == 5]")) == 1


def test_macs_are_of_one_sample() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))  # 3*3*3*8 multiply-accumulates at each of 10*10 places
    for batch in (1, 4):
        captured = fxcompress.capture(model, (torch.zeros(batch, 3, 10, 10),))
        assert len(select(captured, "conv2d[macs == 21600]")) == 1


def test_depth_counts_layers_with_parameters_on_the_longest_way() -> None:
    assert paths("resnet18", "conv2d[depth == 0]") == ["conv1"]
    assert paths("resnet18", "linear[depth == 34]") == ["fc"]  # conv1 and bn1, then 8 blocks of two convs and two norms
    assert paths("vgg11", "conv2d[depth < 3]") == ["features.0", "features.3", "features.6"]


def test_transposed_convolutions_have_their_channels_the_other_way_round() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 12, 3, groups=4))
    captured = fxcompress.capture(model, (torch.zeros(1, 8, 5, 5),))
    assert len(select(captured, "conv_transpose2d[in_channels == 8, out_channels == 12, groups == 4]")) == 1


def test_paths_select_what_is_there_and_what_is_inside() -> None:
    inside = [node.name for node in captured_of("resnet18").graph.nodes if path_of(node).startswith("layer3")]
    assert [node.name for node in select(captured_of("resnet18"), '"layer3"')] == inside
    assert paths("resnet18", '"fc"') == ["fc"]
    assert paths("resnet18", '"layer*.0.conv1"') == [f"layer{i}.0.conv1" for i in (1, 2, 3, 4)]
    assert paths("resnet18", 'inside("layer4.1") & conv2d') == ["layer4.1.conv1", "layer4.1.conv2"]
    assert paths("resnet18", 'conv2d[name == "conv1"]') == paths("resnet18", 'conv2d[name ~ "conv1"]') == ["conv1"]
    assert len(paths("resnet18", 'conv2d[name != "conv1"]')) == 19
    assert len(paths("resnet18", 'conv2d[name ~ re"layer[12]\\.[01]\\.conv[12]"]')) == 8


def test_functions_answer_to_their_own_names_too() -> None:
    assert paths("resnet18", 'add[name ~ "add_3"]') == ["add_3"]
    assert paths("resnet18", 'add[name ~ "layer1.1"]') == ["add_1"]


def chains(name: str) -> set[str]:
    """conv >> bn >> relu by torch's own symbolic trace."""
    traced = fx.symbolic_trace(model_of(name))
    found = set()

    def is_a(node: fx.Node, cls: type[nn.Module]) -> bool:
        return node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), cls)

    for node in traced.graph.nodes:
        norm = next(iter(node.users), None)
        act = next(iter(norm.users), None) if norm is not None else None
        alone = len(node.users) == 1 and norm is not None and len(norm.users) == 1
        if alone and is_a(node, nn.Conv2d) and is_a(norm, nn.BatchNorm2d) and is_a(act, (nn.ReLU, nn.ReLU6)):
            found.add(str(node.target))
    return found


@pytest.mark.parametrize(("name", "act"), [("resnet18", "relu"), ("shufflenet_v2_x0_5", "relu"),
                                           ("mobilenet_v2", "relu6")])
def test_dataflow_is_what_a_plain_trace_shows(name: str, act: str) -> None:
    assert set(paths(name, f"conv2d >> batchnorm2d >> {act}")) == chains(name) != set()


def test_reading_a_size_is_not_reading_a_value() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.fc(y.view(y.size(0), -1))

    captured = fxcompress.capture(Net(), (torch.zeros(2, 3, 8, 8),))
    assert len(select(captured, "conv2d >> (reshape | flatten) >> linear")) == 1


def test_helpers() -> None:
    convs = paths("resnet18", "conv2d")
    assert paths("resnet18", "first(conv2d)") == convs[:1]
    assert paths("resnet18", "last(conv2d, 3)") == convs[-3:]
    assert paths("resnet18", "first(conv2d, 99)") == convs
    assert paths("vgg11", 'inputs_of("classifier.0")') == ["features.18"]
    # by the architecture: the stem's channels run through the residual adds of the whole of layer1
    assert paths("resnet18", 'coupled(conv2d[name == "conv1"])') == ["conv1", "layer1.0.conv2", "layer1.1.conv2"]


def test_masked_layers_are_still_the_layers_they_were() -> None:
    model = torchvision.models.resnet18()
    captured = fxcompress.capture(model, (torch.zeros(1, 3, 64, 64),))
    masked = fxcompress.passes.Mask(sparsity=0.5).apply(captured, "conv2d")
    for text in ("conv2d", "*", 'conv2d[name ~ "layer*.**", out_channels >= 256]', "conv2d >> batchnorm2d >> relu",
                 "conv2d[params > 1M, kernel_size == 3]", '"layer2"', "conv2d[depth > 12]", "conv2d[bytes > 1 MiB]"):
        assert [label(n) for n in select(masked, text)] == [label(n) for n in select(captured, text)], text


def failing(selector: str, name: str = "resnet18") -> list[str]:
    with pytest.raises(PolicyError) as error:
        select(captured_of(name), selector)
    return [item.code for item in error.value.diagnostics]


def test_what_is_empty_is_an_error_unless_it_is_optional() -> None:
    for selector in ("lstm", '"layer9"', "conv2d[out_channels > 9k]", "conv2d >> linear", 'linear - "fc"',
                     "conv2d & linear", "inputs_of(first(conv2d))"):
        assert failing(selector), selector
        assert select(captured_of("resnet18"), selector, optional=True) == ()


def test_a_name_that_is_not_there_is_an_error_even_in_a_union_or_difference() -> None:
    assert failing('conv2d | "layer9"') == ["FXC0202"]
    assert failing('conv2d - "layer9"') == ["FXC0202"]
    assert failing("conv2d - lstm") == ["FXC0201"], "taking away what isn't there is a slip"
    assert len(paths("resnet18", "conv2d | lstm")) == 20, "a kind that isn't there leaves a union as it is"


def test_all_errors_of_a_selector_come_at_once() -> None:
    assert failing('linear[out_channels > 1] | conv2d[name ~ "a**b"]') == ["FXC0206", "FXC0207"]


def test_errors_hold_for_optional_selections_too() -> None:
    with pytest.raises(PolicyError, match="FXC0206"):
        select(captured_of("resnet18"), "linear[out_channels > 1]", optional=True)


def test_lets_are_followed_by_name_and_explained_where_they_stand() -> None:
    policy = parse('policy p {\n let big = conv2d[out_channels > 9k]\n mask big { sparsity = 1% }\n}')
    sink = Sink()
    selecting = Selecting(captured_of("resnet18"), policy.lets, sink)
    action = policy.phases[0].actions[0]
    assert action.selector is not None
    assert selecting.select(action.selector) == ()
    assert [item.code for item in sink.items] == ["FXC0203"]
    assert sink.items[0].secondary[0].span.text == "big"
    assert sink.items[0].primary is not None and sink.items[0].primary.span.line == 2


def test_openness() -> None:
    selecting = Selecting(captured_of("resnet18"), {"rest": parse_selector('"layer1" | conv2d')}, Sink())
    for text in ("*", '"layer1"', '"layer1"[params > 1]', "inputs_of(conv2d)", "* - conv2d", '"a" | conv2d',
                 "first(*)"):
        assert selecting.is_open(parse_selector(text)), text
    for text in ("conv2d", "conv2d[params > 1]", "conv2d - *", '"layer1" & conv2d', "conv2d >> *", "last(conv2d)"):
        assert not selecting.is_open(parse_selector(text)), text


def test_the_language_knows_the_same_facts_and_helpers() -> None:
    assert set(kinds.PREDICATES) == set(PROPERTIES)
    assert set(kinds.HELPERS) == set(HELPERS)


def test_operators_are_all_calls_but_those_that_prepare_weights() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.gain = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * self.gain) + 1

    captured = fxcompress.capture(Scaled(), (torch.zeros(2, 4),))
    assert [node.target for node in select(captured, "*")] == [nn.functional.linear, operator.add]
