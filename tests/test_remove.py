"""What `remove` promises: which filters, how many, what is tied, what is refused, what is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from remove_check import apart, captured_of, kept_indices, makers, remove, wake, zeroed
from remove_nets import NETS, Net, conv, head, picture, tokens
from torch import nn
from torch.nn.utils import prune

from fxcompress.diagnostics import PlanError, RewriteError
from fxcompress.graph import coupling_flow
from fxcompress.graph.coupling import analyse
from fxcompress.graph.select import select
from fxcompress.graph.site import Site
from fxcompress.passbase import CRITERIA
from fxcompress.passes.mask import Mask
from fxcompress.passes.remove import Remove

IMAGES = (torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),)


def chain(norm: bool = False):
    layers = [conv(3, 16), conv(16, 24), conv(24, 32)]
    parts = [part for layer in layers for part in ((layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()) if norm
                                                   else (layer, nn.ReLU()))]
    torch.manual_seed(0)
    return wake(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)))


def widths(result):
    return [m.out_channels for m in result.module.modules() if isinstance(m, nn.Conv2d)]


# Models


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5",
                                  "squeezenet1_1", "mobilenet_v3_small"])
def test_models_equal_the_dense_ones_with_readers_zeroed(name):
    model = wake(getattr(torchvision.models, name)())
    result, outcome = remove(captured_of(model, IMAGES), verify="off")
    with torch.no_grad():
        expected = zeroed(model, kept_indices(result, outcome))(*IMAGES)
        found, whole = result.module(*IMAGES), model(*IMAGES)
    assert apart(expected, found) < 1e-4
    assert apart(whole, found) > 1e-3
    assert result.facts.macs < 0.4 * captured_of(model, IMAGES).facts.macs
    result.module.train()(*IMAGES).sum().backward()
    assert all(p.grad is not None for p in result.module.parameters())


def test_heads_and_hidden_units_of_a_transformer_leave_exactly():
    model = wake(torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=7))
    images = (torch.randn(2, 3, 32, 32),)
    captured = captured_of(model, images)
    for what, removed in (("heads", 0.5), ("hidden", 0.5)):
        result, outcome = remove(captured, what, ratio=removed, exact=True)
        dense = zeroed(model, kept_indices(result, outcome),
                       {f"encoder.layers.encoder_layer_{i}.self_attention.out_proj.weight": 1 for i in range(2)})
        with torch.no_grad():
            assert apart(dense(*images), result.module(*images)) < 1e-4
            assert apart(model(*images), result.module(*images)) > 1e-3
    for i in range(2):
        assert result.module.get_parameter(f"encoder.layers.encoder_layer_{i}.mlp.0.weight").shape == (32, 32)


def test_head_dim_shrinks_in_every_head_and_the_scale_stays():
    def run(m, x):
        q, k, v = (part.view(2, 5, 4, 8).transpose(1, 2) for part in (m.q(x), m.k(x), m.v(x)))
        return m.o(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 32))

    torch.manual_seed(0)
    model = wake(Net(run, q=nn.Linear(16, 32), k=nn.Linear(16, 32), v=nn.Linear(16, 32), o=nn.Linear(32, 5)))
    inputs = tokens()
    result, outcome = remove(captured_of(model, inputs), "head_dim", ratio=0.25)
    kept = kept_indices(result, outcome)
    assert [len(kept[f"{name}.weight"][0]) for name in "qkv"] == [24, 24, 24]
    by_head = kept["q.weight"][0].reshape(4, 6) - 8 * torch.arange(4)[:, None]
    assert (by_head == by_head[0]).all()
    dense = copy.deepcopy(model)
    for name in ("q", "v"):  # a product with a zeroed query is zero, and so is what a zeroed value gives
        gone = torch.ones(32, dtype=torch.bool)
        gone[kept[f"{name}.weight"][0]] = False
        layer = dense.get_submodule(name)
        layer.weight.data[gone], layer.bias.data[gone] = 0.0, 0.0
    with torch.no_grad():
        assert apart(dense(*inputs), result.module(*inputs)) < 1e-4


# Which, and how many


def test_l2_and_l1_choose_the_filters_that_torch_prunes():
    for by, n in (("l2", 2), ("l1", 1)):
        model = chain()
        result, outcome = remove(captured_of(model, picture()), ratio=0.25, by=by)
        kept = kept_indices(result, outcome)
        reference = copy.deepcopy(model)
        for path in ("0", "2", "4"):
            layer = reference.get_submodule(path)
            prune.ln_structured(layer, "weight", amount=0.25, n=n, dim=0)
            left = layer.weight_mask.flatten(1).any(1).nonzero().flatten()
            assert torch.equal(kept[f"{path}.weight"][0], left), (by, path)


def test_bn_scale_takes_the_smallest_scales():
    model = chain(norm=True)
    result, outcome = remove(captured_of(model, picture()), by="bn_scale", nodes=())
    kept = kept_indices(result, outcome)
    for path in ("1", "4", "7"):
        scales = model.get_submodule(path).weight.abs()
        assert set(kept[f"{path}.weight"][0].tolist()) == set(scales.topk(len(scales) // 2).indices.tolist())


def test_bn_scale_refuses_layers_without_one():
    with pytest.raises(PlanError) as raised:
        remove(captured_of(chain(), picture()), by="bn_scale")
    assert raised.value.diagnostics[0].code == "FXC0343"


def test_random_follows_its_seed():
    captured = captured_of(chain(), picture())
    picks = [kept_indices(*remove(captured, by="random", seed=seed))["4.weight"][0].tolist() for seed in (1, 1, 2)]
    assert picks[0] == picks[1] != picks[2]


def test_a_criterion_can_be_registered(monkeypatch):
    monkeypatch.setattr(CRITERIA, "_added", dict(CRITERIA._added))  # registered for this test alone
    CRITERIA.register("first_weight", lambda scoring: scoring.reduce(scoring.weights, lambda part: part.rows[:, 0]))
    model = chain()
    result, outcome = remove(captured_of(model, picture()), by="first_weight")
    best = model[2].weight[:, 0, 0, 0].topk(12).indices
    assert set(kept_indices(result, outcome)["2.weight"][0].tolist()) == set(best.tolist())


@pytest.mark.parametrize(("ratio", "align", "expected"), [
    (0.5, 8, [8, 16, 16]), (0.3, 8, [8, 16, 24]), (0.99, 8, [8, 8, 8]), (0.6, 1, [6, 10, 13]), (0.1, 8, [16, 24, 32]),
])
def test_align_rounds_to_the_nearest_multiple_and_never_to_zero(ratio, align, expected):
    captured = captured_of(chain(), picture())
    if expected == [16, 24, 32]:
        with pytest.raises(PlanError) as raised:
            remove(captured, ratio=ratio, align=align)
        assert raised.value.diagnostics[0].code == "FXC0340"
        return
    result, _ = remove(captured, ratio=ratio, align=align)
    assert widths(result) == expected


def test_min_channels_holds_in_every_layer():
    result, outcome = remove(captured_of(chain(), picture()), ratio=0.75, min_channels=7)
    assert widths(result) == [7, 7, 8]
    assert any(note.startswith("0: 56% removed of 75% asked, because of min_channels = 7") for note in outcome.notes)


def test_global_scope_removes_the_ratio_over_all_layers():
    model = chain()
    with torch.no_grad():
        model[4].weight *= torch.linspace(0.05, 2, 32)[:, None, None, None]
        model[0].weight.fill_(1.0)
    result, _ = remove(captured_of(model, picture()), scope="global", ratio=0.25)
    assert sum(widths(result)) == 54
    assert widths(result)[0] == 16 and widths(result)[2] < 22, "the layers whose filters differ give more"


def test_groups_stay_equal():
    torch.manual_seed(0)
    model = wake(NETS["grouped"]()[0])
    result, _ = remove(captured_of(model, picture()), ratio=0.3)
    for module in result.module.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[0] == module.out_channels and module.out_channels % module.groups == 0
            assert module.weight.shape[1] * module.groups == module.in_channels


# Coupling


def only(captured, *paths):
    return tuple(captured.node(path) for path in paths)


def test_extend_shrinks_tied_layers_and_says_why():
    model = wake(torchvision.models.resnet18())
    captured = captured_of(model, IMAGES)
    result, outcome = remove(captured, nodes=only(captured, "layer1.0.conv2"), couple="extend")
    why = {change.path: change.why for change in outcome.changes if change.what == "out_channels"}
    assert why["layer1.0.conv2"] == "selected"
    assert set(why) == {"conv1", "layer1.0.conv2", "layer1.1.conv2"}
    assert why["conv1"].startswith("coupled to layer1.0.conv2 by add at resnet.py:")
    assert [result.module.get_submodule(path).out_channels for path in why] == [32, 32, 32]


def test_skip_leaves_what_is_tied_and_notes_it():
    captured = captured_of(wake(torchvision.models.resnet18()), IMAGES)
    nodes = only(captured, "layer1.0.conv1", "layer1.0.conv2")
    result, outcome = remove(captured, nodes=nodes, couple="skip")
    assert result.module.get_submodule("layer1.0.conv1").out_channels == 32
    assert result.module.get_submodule("layer1.0.conv2").out_channels == 64
    assert "layer1.0.conv2 keeps what is tied to conv1, which isn't selected (couple = skip)" in outcome.notes


def test_error_names_the_tied_layers_and_the_operator():
    captured = captured_of(wake(torchvision.models.resnet18()), IMAGES)
    with pytest.raises(PlanError) as raised:
        remove(captured, nodes=only(captured, "layer1.0.conv2"), couple="error")
    (found,) = raised.value.diagnostics
    assert found.code == "FXC0304" and "2 layers" in found.message
    tied = "layer1.1.conv2 (conv2d) is coupled to layer1.0.conv2 by add at resnet.py:"
    assert any(note.startswith(tied) for note in found.notes)


def test_depthwise_convolutions_follow_without_being_selected():
    captured = captured_of(wake(torchvision.models.mobilenet_v2()), IMAGES)
    node = captured.node("features.2.conv.0.0")
    result, outcome = remove(captured, nodes=(node,), couple="error")
    depthwise = result.module.get_submodule("features.2.conv.1.0")
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 48
    assert {c.path: c.why for c in outcome.changes}["features.2.conv.1.0"] in ("follows its input", "reads what left")


# Refusals and notes


def test_the_output_keeps_its_shape_without_being_told():
    result, outcome = remove(captured_of(chain(), picture()))
    assert result.module(*picture()).shape == (2, 5)
    assert "8 can't shrink: the model gives it back as its output" in outcome.notes


def test_removing_nothing_is_an_error():
    captured = captured_of(chain(), picture())
    with pytest.raises(PlanError) as raised:
        remove(captured, nodes=only(captured, "8"))
    assert raised.value.diagnostics[0].code == "FXC0340"
    with pytest.raises(PlanError) as raised:
        remove(captured, "heads")
    assert raised.value.diagnostics[0].code == "FXC0342"


def test_exact_refuses_what_a_normalisation_notices():
    def run(m, x):
        return m.b(m.norm(m.a(x)))

    torch.manual_seed(0)
    model = wake(Net(run, a=nn.Linear(16, 12), norm=nn.LayerNorm(12), b=nn.Linear(12, 5)))
    captured = captured_of(model, tokens())
    with pytest.raises(PlanError) as raised:
        remove(captured, exact=True)
    assert raised.value.diagnostics[0].code == "FXC0341"
    assert any("layernorm" in note and "normalises over it" in note for note in raised.value.diagnostics[0].notes)
    result, outcome = remove(captured)
    assert result.module.norm.normalized_shape == (6,)
    assert any(note.startswith("inexact: layernorm") for note in outcome.notes)


def test_an_operator_without_a_rule_is_a_barrier_that_is_named():
    def run(m, x):
        return head(m, m.b(torch.fft.fft2(m.a(x)).real))

    torch.manual_seed(0)
    model = wake(Net(run, a=conv(3, 8), b=conv(8, 8), fc=nn.Linear(8, 5)))
    result, outcome = remove(captured_of(model, picture()))
    assert result.module.a.out_channels == 8 and result.module.b.out_channels == 4
    (note,) = [note for note in outcome.notes if note.startswith("a can't shrink: ")]
    assert "fft" in note and "test_remove.py" in note


def test_a_wrong_rule_is_caught_by_the_proof_and_nothing_changes(monkeypatch):
    def wrong(flow, node, args):
        dims = flow.of(args["input"])
        return (dims[0], None if dims[1] is None else dims[1][::-1], *dims[2:])

    monkeypatch.setitem(coupling_flow.RULES, "relu", wrong)
    captured = captured_of(chain(), picture())
    before = {key: value.clone() for key, value in captured.module.state_dict().items()}
    text = str(captured.graph)
    with pytest.raises(RewriteError) as raised:
        Remove(ratio=0.5).rewrite(captured, Site(makers(captured), "channels"))
    assert raised.value.diagnostics[0].code == "FXC0541"
    after = captured.module.state_dict()
    assert str(captured.graph) == text and all(torch.equal(after[key], value) for key, value in before.items())
    Remove(ratio=0.5, verify="off").rewrite(captured, Site(makers(captured), "channels"))


# What follows, what stays


def test_parameters_keep_identity_requires_grad_format_and_mode():
    model = chain(norm=True).to(memory_format=torch.channels_last).train()
    model[0].weight.requires_grad_(False)
    captured = captured_of(model, picture())
    parameters = dict(captured.module.named_parameters())
    optimizer = torch.optim.Adam([p for p in parameters.values() if p.requires_grad])
    outcome = Remove(ratio=0.5).rewrite(captured, Site(makers(captured), "channels"))
    after = dict(captured.module.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert [p.requires_grad for p in after.values()] == [p.requires_grad for p in model.parameters()]
    assert after["3.weight"].is_contiguous(memory_format=torch.channels_last)
    assert captured.module.training
    captured.module(*picture()).sum().backward()
    optimizer.step()
    assert set(outcome.resized) <= {*after.values(), *captured.module.buffers()}


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 16)
            self.out = nn.Linear(16, 20, bias=False)
            self.out.weight = self.table.weight

        def forward(self, x):
            x = self.table(x)
            return self.out(x + self.down(torch.relu(self.up(x))))

    torch.manual_seed(0)
    model, inputs = wake(Tied()), (torch.randint(0, 20, (2, 6)),)
    result, outcome = remove(captured_of(model, inputs))
    assert result.module.out.weight is result.module.table.weight and result.module.out.weight.shape == (20, 8)
    assert result.module.table.embedding_dim == result.module.out.in_features == 8
    dense = zeroed(model, kept_indices(result, outcome))
    with torch.no_grad():
        assert apart(dense(*inputs), result.module(*inputs)) < 1e-4


def test_masked_layers_are_removed_from_by_what_their_masks_leave():
    model = chain()
    masked = Mask(sparsity=0.5, granularity="row").apply(captured_of(model, picture()), '"2"')
    result, outcome = remove(masked, nodes=(masked.node("2"),), ratio=0.5)
    rows = masked.module.get_submodule("2.weight_mask").mask.flatten(1).any(1).nonzero().flatten()
    kept = kept_indices(result, outcome)
    assert torch.equal(kept["2.weight"][0], rows) and len(rows) == 12
    assert set(kept["2.weight"]) == set(kept["2.weight_mask.mask"]) == {0}
    assert any("proven equal" in note for note in outcome.notes)
    result.module.train()(*picture()).sum().backward()
    again, outcome = remove(result, ratio=0.5)
    assert again.module.get_submodule("2.weight_mask").mask.shape == again.module.get_parameter("2.weight").shape


def test_from_python_with_a_selector_and_verified():
    captured = captured_of(chain(norm=True), picture())
    smaller = Remove(ratio="50%", by="l1", align=4).apply(captured, "conv2d >> batchnorm2d", "channels")
    assert widths(smaller) == [8, 12, 16] and widths(captured) == [16, 24, 32]
    assert smaller.node("0").meta["origins"][-1].detail == "out_channels 16 -> 8"
    assert select(captured, 'coupled("3")') == (captured.node("3"),)


def test_constants_behind_zeroed_filters_are_folded():
    def run(m, x):
        x = torch.relu(m.norm(m.a(x)))
        x = torch.relu(m.norm2(m.b(x)))
        return head(m, m.c(x))

    torch.manual_seed(0)
    model = wake(Net(run, a=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), b=nn.Conv2d(8, 8, 3, bias=False),
                     norm2=nn.BatchNorm2d(8), c=nn.Conv2d(8, 6, 1, bias=False), fc=nn.Linear(6, 5)))
    with torch.no_grad():
        model.a.weight[:4] = 0.0
        model.norm2.weight[4:] = 0.0
        model.norm.bias.uniform_(0.5, 1.5)
        model.norm2.bias.uniform_(0.5, 1.5)
    images = picture()
    captured = captured_of(model, images)
    for path, by, bias in (("a", "l2", False), ("b", "bn_scale", True)):
        result, outcome = remove(captured, nodes=only(captured, path), by=by)
        with torch.no_grad():
            assert apart(model(*images), result.module(*images)) < 1e-5
        assert any(note.startswith("constants of removed channels are folded into ") for note in outcome.notes)
        assert (result.module.c.bias is not None) is bias
    model.b.padding = (1, 1)
    result, outcome = remove(captured_of(model, picture()), nodes=only(captured, "a"))
    assert any("into b is the mean over its places" in note for note in outcome.notes)


def test_a_model_of_a_billion_parameters_is_analysed_without_memory():
    with torch.device("meta"):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True), 20)
    captured = captured_of(model.eval(), (torch.randn(1, 8, 2048),)).skeleton()
    assert captured.facts.params > 1_000_000_000
    outcome = Remove(ratio=0.5).rewrite(captured, Site(makers(captured), "hidden"))
    assert len([c for c in outcome.changes if c.what == "out_features"]) == 20
    assert all(parameter.is_meta for parameter in captured.module.parameters())


def test_the_analysis_is_linear_in_the_nodes():
    def labels(blocks):
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(blocks) for layer in (nn.Linear(8, 8), nn.ReLU())))
        flow = analyse(captured_of(model, (torch.randn(2, 8),))).flow
        return len(flow.nodes), flow.count, sum(len(a) for a, _, _ in flow.ties)

    small, large = labels(50), labels(500)
    assert all(b <= 10.5 * a for a, b in zip(small, large, strict=True))
