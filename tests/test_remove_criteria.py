"""Criteria of `remove`, their reducers, normalisers and scopes, against references written out in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from remove_check import captured_of, kept_indices, makers, remove, wake
from remove_nets import NETS, Net, conv, picture, tokens
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fxcompress
from fxcompress.diagnostics import PlanError
from fxcompress.graph.captured import Captured
from fxcompress.graph.site import Site
from fxcompress.passbase import CRITERIA
from fxcompress.passes import Mask, register_criterion
from fxcompress.passes.remove import Remove

Filters = list[list[float]]


def with_gradients(captured: Captured) -> Captured:
    """Gradients of a loss of which every output has a part of its own."""
    out = captured.module(*captured.example.args)
    (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).square().sum().backward()
    return captured


def kept_in_place(captured: Captured, nodes: tuple = (), **settings: object) -> dict[str, list[int]]:
    """What stays of each weight's first dimension; gradients of `captured` are seen."""
    outcome = Remove(**{"ratio": 0.5, **settings}).rewrite(captured, Site(nodes or makers(captured), "channels"))
    return {name: dims[0].tolist() for name, dims in kept_indices(captured, outcome).items() if 0 in dims}


# One layer's scores, filter by filter, weight by weight


def by_l1(filters: Filters, grads: Filters) -> list[float]:
    return [sum(abs(w) for w in row) for row in filters]


def by_l2(filters: Filters, grads: Filters) -> list[float]:
    return [math.sqrt(sum(w * w for w in row)) for row in filters]


def by_taylor(filters: Filters, grads: Filters) -> list[float]:
    return [sum(abs(w * g) for w, g in zip(row, grad, strict=True)) for row, grad in zip(filters, grads, strict=True)]


def by_hessian(filters: Filters, grads: Filters) -> list[float]:
    return [sum(0.5 * (g * g) * (w * w) for w, g in zip(row, grad, strict=True))
            for row, grad in zip(filters, grads, strict=True)]


def by_lamp(filters: Filters, grads: Filters) -> list[float]:
    energy = [sum(w * w for w in row) for row in filters]
    return [e / sum(other for other in energy if other >= e) for e in energy]


def by_fpgm(filters: Filters, grads: Filters) -> list[float]:
    return [sum(math.dist(row, other) for other in filters) for row in filters]


LAYER = {"l1": by_l1, "l2": by_l2, "taylor": by_taylor, "hessian": by_hessian, "lamp": by_lamp, "fpgm": by_fpgm}
OVER = {"mean": lambda values: sum(values) / len(values), "sum": sum, "max": max, "first": lambda values: values[0]}


def scores(by: str, *weights: nn.Parameter, how: str = "mean") -> list[float]:
    """The scores of channels that all of `weights` make."""
    layers = []
    for weight in weights:
        grad = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        layers.append(LAYER[by](weight.detach().flatten(1).tolist(), grad.flatten(1).tolist()))
    return [OVER[how]([layer[channel] for layer in layers]) for channel in range(len(layers[0]))]


def best(values: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda place: -values[place])[:count])


@pytest.mark.parametrize("how", list(OVER))
@pytest.mark.parametrize("by", list(LAYER))
def test_a_criterion_keeps_what_its_formula_says(by, how):
    torch.manual_seed(3)
    model, inputs = NETS["residual"]()
    model = wake(model)
    with torch.no_grad():
        model.c.weight.mul_(torch.linspace(2, 0.3, 16)[:, None, None, None])  # so that the reducers differ
    captured = with_gradients(captured_of(model, inputs))
    p = dict(captured.module.named_parameters())
    together, alone = scores(by, p["a.weight"], p["c.weight"], how=how), scores(by, p["b.weight"])
    kept = kept_in_place(captured, ratio=0.375, by=by, reduce=how)
    assert kept["a.weight"] == kept["c.weight"] == best(together, 10)
    assert kept["b.weight"] == best(alone, 10)


def test_the_reducers_and_criteria_tell_filters_apart():
    torch.manual_seed(3)
    model, inputs = NETS["residual"]()
    captured = with_gradients(captured_of(wake(model), inputs))
    weights = [captured.module.get_parameter(f"{name}.weight") for name in "ac"]
    picks = {tuple(best(scores(by, *weights), 10)) for by in LAYER}
    assert len(picks) >= 4, "the criteria would choose alike: the test above would show little"


# Several groups ranked together


def stack() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 24), nn.ReLU(), conv(24, 32), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 5))
    with torch.no_grad():
        for path, scale in (("0", 3.0), ("2", 1.0), ("4", 2.0), ("7", 0.6), ("9", 1.5)):
            weight = model.get_submodule(path).weight
            weight.mul_(scale * torch.linspace(0.2, 1.0, len(weight)).reshape(-1, *[1] * (weight.dim() - 1)))
    return model.eval()


PATHS = ("0", "2", "4", "7", "9")


def normalized(values: list[float], normalize: str) -> list[float]:
    mean = sum(values) / len(values)
    if normalize == "standard":
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        return [(value - mean) / deviation for value in values]
    return [value / {"none": 1.0, "mean": mean, "max": max(values)}[normalize] for value in values]


def expected(captured: Captured, by: str, normalize: str, share: float, *classes: tuple[str, ...]) -> dict:
    """What stays where each of `classes` is ranked as one."""
    kept = {}
    for paths in classes:
        ranked = [(value, path, place) for path in paths for place, value in enumerate(
            normalized(scores(by, captured.module.get_parameter(f"{path}.weight")), normalize))]
        stays = sorted(ranked)[int(share * len(ranked)):]
        kept.update({f"{path}.weight": sorted(place for _, p, place in stays if p == path) for path in paths})
    return kept


@pytest.mark.parametrize(("by", "normalize", "means"), [
    ("l2", "none", "none"), ("l2", "mean", "mean"), ("l1", "max", "max"), ("l2", "standard", "standard"),
    ("l2", "auto", "mean"), ("fpgm", "auto", "mean"), ("taylor", "auto", "none"), ("hessian", "auto", "none"),
    ("lamp", "auto", "none"), ("lamp", "mean", "mean"),
])
def test_global_scope_ranks_normalized_scores(by, normalize, means):
    captured = with_gradients(captured_of(stack(), picture()))
    wanted = expected(captured, by, means, 0.25, PATHS)
    assert all(wanted.values()), "a layer would be emptied; the pass brings one back"
    kept = kept_in_place(captured, ratio=0.25, by=by, scope="global", normalize=normalize)
    assert {name: kept.get(name, wanted[name]) for name in wanted} == wanted
    assert all(name in kept or len(wanted[name]) == len(captured.module.get_parameter(name)) for name in wanted)


def test_isomorphic_scope_ranks_alike_structures_only():
    captured = captured_of(stack(), picture())
    wanted = expected(captured, "l2", "none", 0.5, ("0", "2"), ("4",), ("7", "9"))
    assert all(wanted.values())
    assert wanted != expected(captured, "l2", "none", 0.5, PATHS)
    kept = kept_in_place(captured, scope="isomorphic", normalize="none")
    assert {name: kept[name] for name in wanted} == wanted


def test_isomorphic_scope_ranks_the_hidden_units_of_like_blocks_together():
    torch.manual_seed(0)
    model = fxcompress.capture(nn.TransformerEncoder(nn.TransformerEncoderLayer(
        16, 2, 24, batch_first=True), 3, enable_nested_tensor=False).eval(), tokens())
    with torch.no_grad():
        model.module.get_parameter("layers.1.linear1.weight").mul_(0.1)
    result, _ = remove(model, "hidden", ratio=1 / 3, scope="isomorphic", normalize="none")
    assert [result.module.get_submodule(f"layers.{i}.linear1").out_features for i in range(3)] == [24, 1, 24]


def test_random_global_ranking_is_of_plain_draws():
    drawn = torch.rand(104, generator=torch.Generator().manual_seed(5)).tolist()
    highest, start = set(best(drawn, 52)), 0
    captured = captured_of(stack(), picture())
    sizes = [captured.module.get_parameter(f"{path}.weight").shape[0] for path in PATHS]
    kept = kept_in_place(captured, by="random", seed=5, scope="global")
    for path, size in zip(PATHS, sizes, strict=True):
        assert kept[f"{path}.weight"] == [place for place in range(size) if start + place in highest]
        start += size


# Caps


def test_max_ratio_caps_each_group_and_the_rest_gives_more():
    captured = captured_of(stack(), picture())
    free = expected(captured, "l2", "none", 0.5, PATHS)
    sizes = {f"{path}.weight": captured.module.get_submodule(path).weight.shape[0] for path in PATHS}
    assert any(len(free[name]) < 0.25 * sizes[name] for name in sizes), "the cap would not bind"
    kept = kept_in_place(captured, scope="global", normalize="none", max_ratio=0.75)
    left = {name: len(kept.get(name, range(sizes[name]))) for name in sizes}
    assert sum(left.values()) == sum(sizes.values()) // 2
    assert all(left[name] >= 0.25 * sizes[name] for name in sizes)


@pytest.mark.parametrize("name", ["residual", "dense_concatenation", "unequal_split", "channel_shuffle", "grouped"])
def test_no_layer_loses_more_than_max_ratio(name):
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    captured = captured_of(wake(model), inputs)
    for align in (1, 2):
        result, outcome = remove(captured, ratio=0.8, max_ratio=0.5, align=align)
        kept = kept_indices(result, outcome)
        dense = dict(captured.module.named_parameters())
        weights = [key for key in kept if key.endswith("weight") and 0 in kept[key]]
        assert weights and all(len(kept[key][0]) >= 0.5 * len(dense[key]) for key in weights)
        assert align > 1 or any("because of max_ratio = 50%" in note for note in outcome.notes)


def test_a_budget_is_met_by_the_ratio_and_never_by_lifting_a_cap():
    policy = "policy p {{ remove channels(conv2d) {{ ratio = 5%, max_ratio = {} }}, budget macs <= 50% of dense }}"
    captured = captured_of(stack(), picture())
    with pytest.raises(PlanError) as raised:
        fxcompress.plan(policy.format("80%"), captured)
    assert "would meet it" in raised.value.diagnostics[0].help and "max_ratio" not in raised.value.diagnostics[0].help
    with pytest.raises(PlanError) as raised:
        fxcompress.plan(policy.format("10%"), captured)
    assert "would meet it" not in raised.value.diagnostics[0].help


# Gradients


def test_no_gradient_is_refused_and_the_layers_named():
    captured = with_gradients(captured_of(stack(), picture()))
    captured.module.get_parameter("4.weight").grad = None
    for by in ("taylor", "hessian"):
        with pytest.raises(PlanError) as raised:
            kept_in_place(captured, by=by)
        (found,) = raised.value.diagnostics
        assert found.code == "FXC0343" and found.notes == ("without one: 4",)


def test_a_masked_weight_counts_as_masked_and_a_computed_one_is_refused():
    def run(m, x):
        return m.b(torch.relu(m.a(x)))

    torch.manual_seed(0)
    plain = Net(run, a=nn.Linear(16, 12), b=nn.Linear(12, 5)).eval()
    masked = with_gradients(Mask(sparsity=0.6).apply(captured_of(plain, tokens()), '"a"'))
    weight = masked.module.get_parameter("a.weight")
    mask = masked.module.get_submodule("a.weight_mask").mask
    seen = nn.Parameter(weight.detach() * mask)
    seen.grad = weight.grad
    wanted = best(scores("taylor", seen), 6)
    node = next(node for node in masked.graph.nodes if node.meta["fxc"].path == "a"
                and node.meta["fxc"].kind == "linear")
    assert kept_in_place(masked, (node,), by="taylor")["a.weight"] == wanted

    normed = with_gradients(captured_of(
        Net(run, a=weight_norm(nn.Linear(16, 12)), b=nn.Linear(12, 5)).eval(), tokens()))
    with pytest.raises(PlanError) as raised:
        kept_in_place(normed, by="taylor")
    assert raised.value.diagnostics[0].code == "FXC0343"


def test_gradients_are_cut_with_their_weights_so_that_a_second_removal_sees_them():
    captured = with_gradients(captured_of(stack(), picture()))
    before = {name: p.grad.clone() for name, p in captured.module.named_parameters()}
    first = kept_in_place(captured, (captured.node("0"),), by="taylor")["0.weight"]
    assert torch.equal(captured.module.get_parameter("0.weight").grad, before["0.weight"][first])
    assert torch.equal(captured.module.get_parameter("2.weight").grad, before["2.weight"][:, first])
    wanted = best(scores("taylor", captured.module.get_parameter("2.weight")), 12)
    assert kept_in_place(captured, (captured.node("2"),), by="taylor")["2.weight"] == wanted


def test_apply_and_phases_rank_by_the_gradients_of_their_time():
    model, inputs = stack(), picture()
    model(*inputs).square().sum().backward()
    wanted = best(scores("taylor", model[2].weight), 12)
    captured = with_gradients(captured_of(model, inputs))
    chosen = best(scores("taylor", captured.module.get_parameter("2.weight")), 12)
    assert chosen != wanted, "the two losses would choose alike"
    applied = Remove(ratio=0.5, by="taylor").apply(captured, '"2"', "channels")
    assert torch.equal(applied.module.get_parameter("2.bias"), model[2].bias[chosen])

    action = 'remove channels("2") { ratio = 50%, by = taylor }'
    at_once = fxcompress.compile(f"policy p {{ {action} }}", model, inputs)
    assert torch.equal(at_once.module.get_parameter("2.bias"), model[2].bias[wanted])

    later = fxcompress.compile(f"policy p {{ phase thin over steps 1..2 {{ {action} }} }}", stack(), inputs)
    out = later.module(*inputs)
    (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).square().sum().backward()
    later.step()
    assert torch.equal(later.module.get_parameter("2.bias"), model[2].bias[chosen])


def test_a_plan_needs_no_gradients_and_says_what_it_cannot_know():
    policy = "policy p { remove channels(conv2d) { ratio = 50%, by = hessian, scope = isomorphic } }"
    shown = fxcompress.plan(policy, stack(), picture()).show()
    assert "(known after weights)" in shown


# Criteria of others


@pytest.fixture
def _own_criteria(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CRITERIA, "_added", dict(CRITERIA._added))  # registered for one test alone


@pytest.mark.usefixtures("_own_criteria")
def test_a_registered_criterion_is_a_value_of_by():
    @register_criterion("steepest", needs="gradient")
    def steepest(scoring):
        return scoring.reduce(scoring.weights, lambda part: part.grad.abs().amax(1))

    captured = with_gradients(captured_of(stack(), picture()))
    largest = captured.module.get_parameter("2.weight").grad.abs().flatten(1).amax(1).topk(12).indices
    policy = fxcompress.parse('policy p { remove channels("2") { ratio = 50%, by = steepest } }')
    assert policy is not None and fxcompress.register_criterion is register_criterion
    assert kept_in_place(captured, by="steepest")["2.weight"] == sorted(largest.tolist())
    with pytest.raises(PlanError) as raised:
        remove(captured_of(stack(), picture()), by="steepest")
    assert raised.value.diagnostics[0].code == "FXC0343"


@pytest.mark.usefixtures("_own_criteria")
@pytest.mark.parametrize(("score", "words"), [
    (lambda scoring: torch.zeros(()), "it gave a tensor of the shape ()"),
    (lambda scoring: torch.full((scoring.count,), torch.inf), "104 of 104 scores are infinite"),
])
def test_a_registered_criterion_that_scores_badly_is_refused(score, words):
    register_criterion("bad")(score)
    with pytest.raises(PlanError) as raised:
        remove(captured_of(stack(), picture()), by="bad")
    (found,) = raised.value.diagnostics
    assert found.code == "FXC0344" and words in found.notes[0]


@pytest.mark.usefixtures("_own_criteria")
def test_a_registered_criterion_says_whether_it_compares():
    for name, comparable in (("as_it_is", True), ("by_group", False)):
        register_criterion(name, comparable=comparable)(CRITERIA["l2"].function)
    for name, means in (("as_it_is", "none"), ("by_group", "mean")):
        captured = captured_of(stack(), picture())
        wanted = expected(captured, "l2", means, 0.25, PATHS)
        kept = kept_in_place(captured, ratio=0.25, by=name, scope="global")
        assert all(key in kept or len(captured.module.get_parameter(key)) == len(wanted[key]) for key in wanted)
        assert {key: kept.get(key, wanted[key]) for key in wanted} == wanted
