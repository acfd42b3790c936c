"""`mask` against `torch.nn.utils.prune`, against brute force, and against the graph it promises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune

import fxcompress
from fxcompress.diagnostics import FxcError
from fxcompress.graph import Captured, capture
from fxcompress.graph.ops import kind_of, path_of
from fxcompress.nn import Mask as MaskModule
from fxcompress.passbase import SCORES
from fxcompress.passes import Mask, register_score
from fxcompress.passes.shared.masking import remove_masks

LAYERS = "conv2d | linear"


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))


def _models() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    return {"lenet": (LeNet().eval(), (torch.randn(2, 1, 28, 28),)),
            "resnet18": (torchvision.models.resnet18().eval(), (torch.randn(2, 3, 32, 32),))}


MODELS = _models()
CAPTURED = {name: capture(model, inputs) for name, (model, inputs) in MODELS.items()}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def masks(captured: Captured) -> dict[str, Tensor]:
    """By the name of the parameter they stand on."""
    return {name.removesuffix("_mask"): module.mask for name, module in captured.module.named_modules()
            if isinstance(module, MaskModule)}


def torch_masks(model: nn.Module, how: Callable[[nn.Module], object], name: str = "weight") -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    for layer in layers(model).values():
        how(layer)
    return {f"{path}.{name}": getattr(layer, f"{name}_mask").bool() for path, layer in layers(model).items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    wrong = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not wrong


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("parameters", "how"), [
    ({"by": "magnitude"}, lambda m: prune.l1_unstructured(m, "weight", 0.37)),
    ({"by": "l2"}, lambda m: prune.l1_unstructured(m, "weight", 0.37)),  # one weight's norm is its magnitude
    ({"granularity": "row", "by": "magnitude"}, lambda m: prune.ln_structured(m, "weight", 0.37, n=1, dim=0)),
    ({"granularity": "row", "by": "l2"}, lambda m: prune.ln_structured(m, "weight", 0.37, n=2, dim=0)),
    ({"granularity": "column", "by": "magnitude"}, lambda m: prune.ln_structured(m, "weight", 0.37, n=1, dim=1)),
    ({"granularity": "column", "by": "l2"}, lambda m: prune.ln_structured(m, "weight", 0.37, n=2, dim=1)),
], ids=["l1", "l2", "row-l1", "row-l2", "column-l1", "column-l2"])
def test_equal_to_torch_layer_by_layer(
        model: str, parameters: dict[str, str], how: Callable[[nn.Module], object]) -> None:
    ours = Mask(sparsity=0.37, **parameters).apply(CAPTURED[model], LAYERS)
    assert_same(masks(ours), torch_masks(MODELS[model][0], how))


@pytest.mark.parametrize(("model", "sparsity"), [
    ("lenet", 0.0), ("lenet", 0.123), ("lenet", 0.9), ("lenet", 1.0), ("resnet18", 0.8)])
def test_equal_to_torch_globally(model: str, sparsity: float) -> None:
    dense = copy.deepcopy(MODELS[model][0])
    pairs = [(layer, "weight") for layer in layers(dense).values()]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=sparsity)
    theirs = {f"{path}.weight": layer.weight_mask.bool() for path, layer in layers(dense).items()}
    assert_same(masks(Mask(sparsity=sparsity, scope="global").apply(CAPTURED[model], LAYERS)), theirs)


def test_equal_to_torch_at_random_with_the_same_seed() -> None:
    ours = masks(Mask(sparsity=0.6, by="random", seed=7).apply(CAPTURED["resnet18"], LAYERS))
    order = list(ours)  # torch draws in the order of its calls, we in the order of the graph
    dense = copy.deepcopy(MODELS["resnet18"][0])
    torch.manual_seed(7)
    for name in order:
        prune.random_unstructured(dense.get_submodule(name.removesuffix(".weight")), "weight", 0.6)
    assert_same(ours, {f"{path}.weight": layer.weight_mask.bool() for path, layer in layers(dense).items()})


@pytest.mark.parametrize("parameter", ["bias", "all"])
def test_biases(parameter: str) -> None:
    model = MODELS["lenet"][0]
    theirs = torch_masks(model, lambda m: prune.l1_unstructured(m, "bias", 0.5), "bias")
    if parameter == "all":
        theirs |= torch_masks(model, lambda m: prune.l1_unstructured(m, "weight", 0.5))
    assert_same(masks(Mask(sparsity=0.5, parameter=parameter).apply(CAPTURED["lenet"], LAYERS)), theirs)


def test_biases_and_weights_in_one_ranking() -> None:
    model = copy.deepcopy(MODELS["lenet"][0])
    pairs = [(layer, name) for layer in layers(model).values() for name in ("weight", "bias")]
    prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=0.5)
    theirs = {f"{path}.{name}": getattr(layer, f"{name}_mask").bool()
              for path, layer in layers(model).items() for name in ("weight", "bias")}
    ours = Mask(sparsity=0.5, parameter="all", scope="global").apply(CAPTURED["lenet"], LAYERS)
    assert_same(masks(ours), theirs)


def test_the_bias_of_a_row_goes_with_it() -> None:
    found = masks(Mask(sparsity=0.5, granularity="row", parameter="all", by="l2").apply(CAPTURED["lenet"], LAYERS))
    for name in ("conv1", "conv2", "fc1", "fc2", "fc3"):
        rows = found[f"{name}.weight"].flatten(1)
        assert torch.equal(rows.any(1), rows.all(1))
        assert torch.equal(found[f"{name}.bias"], rows.all(1))
        assert int((~found[f"{name}.bias"]).sum()) == round(0.5 * len(rows))


def best_of_groups(weight: np.ndarray, n: int, m: int) -> np.ndarray:
    """Brute force over every pattern of every group of m neighbours along dimension 1."""
    keep = np.zeros(weight.shape, bool)
    patterns = [np.isin(np.arange(m), chosen) for chosen in combinations(range(m), n)]
    for place in np.ndindex(weight.shape[0], weight.shape[1] // m, *weight.shape[2:]):
        index = (place[0], slice(place[1] * m, (place[1] + 1) * m), *place[2:])
        keep[index] = max(patterns, key=lambda pattern: np.abs(weight[index][pattern]).sum())
    return keep


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 8)])
def test_n_of_m_keeps_the_best_of_every_group_along_the_inputs(n: int, m: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 4 * 4, 5), nn.Linear(5, 1)).eval()
    captured = capture(model, (torch.randn(2, 8, 6, 6),))
    found = masks(Mask(granularity=f"{n}:{m}").apply(captured, '"0" | "2"'))
    assert found.keys() == {"0.weight", "2.weight"}
    for name, mask in found.items():
        weight = model.get_parameter(name).detach().numpy()
        assert np.array_equal(mask.numpy(), best_of_groups(weight, n, m))


def test_a_ramp_to_n_of_m_takes_the_cheapest_groups_first() -> None:
    captured = CAPTURED["lenet"]
    weight = MODELS["lenet"][0].fc1.weight.detach().numpy()
    mask = masks(Mask(granularity="2:4", sparsity="linear(0% -> 50%)").apply(captured, '"fc1"'))["fc1.weight"]
    assert np.array_equal(mask.numpy(), best_of_groups(weight, 2, 4))  # `apply` shows the end of a ramp
    half = _quarter_sparse(captured)
    groups, loss = half.reshape(-1, 4), np.sort(np.abs(weight).reshape(-1, 4), axis=1)[:, :2].sum(1)
    touched = ~groups.all(1)
    assert touched.sum() == groups.shape[0] // 2 and (groups.sum(1)[touched] == 2).all()
    assert loss[touched].max() <= loss[~touched].min()


def _quarter_sparse(captured: Captured) -> np.ndarray:
    from fxcompress.graph.site import Site

    copied = captured.copy()
    outcome = Mask(granularity="2:4", sparsity="linear(0% -> 50%)").rewrite(copied, Site((copied.node("fc1"),)))
    assert outcome.scheduled[0].write(0.25)
    return masks(copied)["fc1.weight"].numpy()


def test_blocks_against_brute_force() -> None:
    weight = MODELS["lenet"][0].conv2.weight.detach().numpy()
    mask = masks(Mask(sparsity=0.5, granularity="block(4, 5)").apply(CAPTURED["lenet"], '"conv2"'))["conv2.weight"]
    matrix, found = np.abs(weight).reshape(16, 150), mask.numpy().reshape(16, 150)
    tiles = {(r, c): (slice(r, r + 4), slice(c, c + 5)) for r in range(0, 16, 4) for c in range(0, 150, 5)}
    worst = sorted(tiles, key=lambda place: matrix[tiles[place]].sum())[: len(tiles) // 2]
    for place, tile in tiles.items():
        assert (found[tile] == (place not in worst)).all()


def test_rows_of_layers_of_different_width_are_ranked_by_their_mean() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))
    captured = capture(model, (torch.randn(2, 4),))
    with torch.no_grad():
        for parameter, means in zip(captured.module.parameters(), ([1, 2, 3, 4, 5, 6], [1.5, 3.5, 9]), strict=True):
            parameter.copy_(torch.tensor(means, dtype=torch.float32)[:, None].expand_as(parameter))
    # of 42 weights: rows of 4 with the means 1, 2, 3 and one row of 6 with the mean 1.5
    found = masks(Mask(sparsity=18 / 42, granularity="row", scope="global").apply(captured, "linear"))
    assert {name: mask.all(1).tolist() for name, mask in found.items()} == {
        "0.weight": [False] * 3 + [True] * 3, "1.weight": [False, True, True]}


def test_a_transposed_and_grouped_convolution() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False)).eval()
    captured = capture(model, (torch.randn(2, 8, 4, 4),))
    applied = Mask(sparsity="50%", granularity="row", by="l2").apply(captured, "conv_transpose2d")
    mask = masks(applied)["0.weight"]
    weight = model[0].weight.detach()
    norms = torch.stack([weight[4 * (out // 3): 4 * (out // 3) + 4, out % 3].norm() for out in range(6)])
    silent = applied.module(torch.randn(2, 8, 4, 4)).abs().amax((0, 2, 3)) == 0
    assert set(torch.nonzero(silent).flatten().tolist()) == set(norms.topk(3, largest=False).indices.tolist())
    assert mask.shape == weight.shape


def test_the_mask_stands_in_the_graph_and_the_weight_stays_trainable() -> None:
    applied = Mask(sparsity=0.5).apply(CAPTURED["resnet18"], '"layer1.0.conv1"')
    node = applied.node("layer1.0.conv1")
    mask = node.args[1]
    assert (kind_of(node), path_of(node), node.name) == ("conv2d", "layer1.0.conv1", "layer1_0_conv1")
    assert (kind_of(mask), mask.target) == ("mask", "layer1.0.conv1.weight_mask")
    assert (mask.args[0].op, mask.args[0].target) == ("get_attr", "layer1.0.conv1.weight")
    dense = MODELS["resnet18"][0].state_dict()
    state = applied.module.state_dict()
    assert set(state) - set(dense) == {"layer1.0.conv1.weight_mask.mask"}
    assert torch.equal(state["layer1.0.conv1.weight"], dense["layer1.0.conv1.weight"])  # the weight stays dense
    applied.module(*MODELS["resnet18"][1]).sum().backward()
    gradient = applied.module.get_parameter("layer1.0.conv1.weight").grad
    assert torch.equal(gradient != 0, state["layer1.0.conv1.weight_mask.mask"] & (gradient != 0))
    assert gradient.count_nonzero() > 0


@pytest.mark.parametrize("model", MODELS)
def test_folding_gives_the_model_back_with_zeros_in_it(model: str) -> None:
    dense, inputs = MODELS[model]
    applied = Mask(sparsity=0.7, parameter="all").apply(CAPTURED[model], LAYERS)
    outputs, hidden = applied.module(*inputs), masks(applied)
    remove_masks(applied, fold=True)
    applied.refresh()
    assert list(applied.module.state_dict()) == list(dense.state_dict())
    assert [(n.op, n.target) for n in applied.graph.nodes] == [(n.op, n.target) for n in CAPTURED[model].graph.nodes]
    for name, mask in hidden.items():
        assert torch.equal(applied.module.get_parameter(name), dense.get_parameter(name) * mask)
    assert torch.equal(applied.module(*inputs), outputs)


def test_a_second_mask_takes_the_place_of_the_first() -> None:
    once = Mask(sparsity=0.2, by="random").apply(CAPTURED["lenet"], '"fc1"')
    twice = Mask(sparsity=0.8).apply(once, '"fc1"')
    assert_same(masks(twice), {"fc1.weight": torch_masks(
        MODELS["lenet"][0], lambda m: prune.l1_unstructured(m, "weight", 0.8))["fc1.weight"]})
    assert len([node for node in twice.graph.nodes if kind_of(node) == "mask"]) == 1
    assert [origin.verb for origin in twice.node("fc1").meta["origins"]] == ["mask", "mask"]


def test_without_regrowth_what_is_masked_stays_masked() -> None:
    first = Mask(sparsity=0.3, by="random").apply(CAPTURED["lenet"], LAYERS)
    for granularity, parameters in (("weight", {}), ("weight", {"scope": "global"})):
        again = Mask(sparsity=0.6, granularity=granularity, regrow=False, **parameters).apply(first, LAYERS)
        before, after = masks(first), masks(again)
        assert not any((after[name] & ~before[name]).any() for name in before)
        total = sum(mask.numel() for mask in after.values())
        assert sum(int((~mask).sum()) for mask in after.values()) == pytest.approx(0.6 * total, abs=len(after))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_a_tied_weight_is_masked_for_all_its_readers() -> None:
    model = Tied().eval()
    inputs = (torch.randint(0, 12, (2, 5)),)
    captured = capture(model, inputs)
    applied = Mask(sparsity=0.5).apply(captured, "linear")
    assert len(masks(applied)) == 1
    reference = copy.deepcopy(model)
    mask = next(iter(masks(applied).values()))
    with torch.no_grad():
        reference.embed.weight.mul_(mask)
    assert torch.equal(applied.module(*inputs), reference(*inputs))
    remove_masks(applied, fold=True)
    applied.refresh()
    assert torch.equal(applied.module(*inputs), reference(*inputs))
    assert applied.module.embed.weight is applied.module.head.weight


def test_a_module_called_twice_is_masked_in_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    model, inputs = Twice().eval(), (torch.randn(3, 6),)
    applied = Mask(sparsity=0.5).apply(capture(model, inputs), "first(linear)")
    reference = copy.deepcopy(model)
    prune.l1_unstructured(reference.fc, "weight", 0.5)
    assert torch.equal(applied.module(*inputs), reference(*inputs))


def test_a_skeleton_is_masked_without_weights() -> None:
    skeleton = CAPTURED["resnet18"].skeleton()
    for parameters in ({"sparsity": 0.5}, {"sparsity": "cubic(0% -> 60%)", "scope": "global"}, {"granularity": "2:4"}):
        applied = Mask(**parameters).apply(skeleton, 'conv2d - "conv1"')
        assert all(mask.device.type == "meta" for mask in masks(applied).values())
        assert len(masks(applied)) == 19


def test_a_registered_score_is_a_value_of_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCORES, "_added", dict(SCORES._added))  # registered for this test alone

    @register_score("farthest_from_one")
    def farthest(weight: Tensor, evidence: Tensor | None) -> Tensor:
        return (weight - 1).abs()

    found = masks(Mask(sparsity=0.5, by="farthest_from_one").apply(CAPTURED["lenet"], '"fc3"'))["fc3.weight"]
    distance = (MODELS["lenet"][0].fc3.weight - 1).abs()
    assert distance[found].min() > distance[~found].max()


def test_gradients_on_the_parameters_are_used_at_once() -> None:
    captured = CAPTURED["lenet"].copy()
    captured.module(*MODELS["lenet"][1]).square().sum().backward()
    fc = captured.module.fc1.weight
    from fxcompress.graph.site import Site

    outcome = Mask(sparsity=0.5, by="gradient").rewrite(captured, Site((captured.node("fc1"),)))
    assert not outcome.scheduled
    found = masks(captured)["fc1.weight"]
    saliency = (fc * fc.grad).abs()
    assert int((~found).sum()) == fc.numel() // 2
    assert saliency[found].min() >= saliency[~found].max()


@pytest.mark.parametrize(("parameters", "selector", "code", "words"), [
    ({"granularity": "2:4"}, "conv2d", "FXC0504", "its 1 inputs aren't a multiple of 4"),
    ({"granularity": "block(4, 4)", "sparsity": 0.5}, "conv2d", "FXC0504", "`conv1`"),
    ({"granularity": "column", "sparsity": 0.5, "parameter": "all"}, "conv2d", "FXC0503", "no meaning for a bias"),
    ({"granularity": "2:4", "sparsity": 0.3}, "conv2d", "FXC0502", "sparsity"),
    ({}, "conv2d", "FXC0501", "sparsity"),
])
def test_what_cannot_be_masked_is_said(parameters: dict[str, object], selector: str, code: str, words: str) -> None:
    with pytest.raises(FxcError) as caught:
        Mask(**parameters).apply(CAPTURED["lenet"], selector)  # type: ignore[arg-type]
    assert {item.code for item in caught.value.diagnostics} == {code}
    assert all(item.help for item in caught.value.diagnostics)
    assert any(words in item.message for item in caught.value.diagnostics)


def test_nothing_to_mask_and_frozen_weights_are_said() -> None:
    with pytest.raises(FxcError) as caught:
        Mask(sparsity=0.5, parameter="bias").apply(CAPTURED["resnet18"], "conv2d")
    assert caught.value.diagnostics[0].code == "FXC0506"
    frozen = copy.deepcopy(MODELS["lenet"][0]).requires_grad_(False)
    with pytest.raises(FxcError) as caught:
        Mask(sparsity=0.5, by="movement").apply(capture(frozen, MODELS["lenet"][1]), LAYERS)
    assert [item.code for item in caught.value.diagnostics] == ["FXC0505"] * 5


def test_the_names_of_the_issue() -> None:
    captured = fxcompress.capture(*MODELS["lenet"])
    applied = fxcompress.passes.Mask(sparsity=0.5, by="magnitude").apply(captured, "conv2d[out_channels >= 16]")
    assert masks(applied).keys() == {"conv2.weight"}
    assert not masks(captured)
