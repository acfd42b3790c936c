"""Shares that a policy leaves out: solved from its budgets, against counts that torch makes, sums and saved files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxcompress
from fxcompress.diagnostics import FxcError, PlanError, PolicyError
from fxcompress.graph.captured import Captured, Example
from fxcompress.passes.remove import Remove
from fxcompress.plan import Plan, Totals
from fxcompress.plan.budgets import Reached, is_met, load_of
from fxcompress.plan.build import build
from fxcompress.plan.materialise import materialised
from fxcompress.plan.search import GRID, Search
from fxcompress.policy import parse

IMAGES = torch.zeros(1, 3, 64, 64)


@cache
def meta(name: str, size: int = 64) -> Captured:
    with torch.device("meta"):
        model = torchvision.models.get_model(name).eval()
    captured = fxcompress.capture(model, torch.zeros(1, 3, size, size))
    captured.model_name = name
    return captured


def model_of(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return torchvision.models.get_model(name).eval()


def macs_of(module: nn.Module, inputs: torch.Tensor = IMAGES) -> int:
    with FlopCounterMode(display=False) as counter:
        module(inputs)
    return counter.get_total_flops() // 2


def policy(actions: str, *budgets: str) -> str:
    return "policy p {\n" + "\n".join([actions, *(f"budget {budget}" for budget in budgets)]) + "\n}"


def code_of(caught: pytest.ExceptionInfo[FxcError]) -> str:
    return caught.value.diagnostics[0].code


def is_close(reached: float, limit: float, tolerance: float = 0.01) -> bool:
    return (1 - tolerance) * limit <= reached <= limit


@pytest.mark.parametrize(("name", "align"), [
    ("resnet18", 1), ("resnet18", 8), ("mobilenet_v2", 8), pytest.param("mobilenet_v2", 1, marks=pytest.mark.slow)])
def test_macs_are_met_within_a_percent_as_torch_counts_them(name: str, align: int) -> None:
    text = policy(f"remove channels(conv2d) {{ align = {align}, verify = off }}", "macs <= 50% of dense")
    model = model_of(name)
    dense = macs_of(model)
    result = fxcompress.compile(text, model, IMAGES)
    deployed = result.finalize()
    assert is_close(macs_of(deployed), 0.5 * dense)
    assert macs_of(deployed) == result.plan.after.macs == result.plan.budgets[0].value
    if align > 1:
        sizes = [m.out_channels for m in deployed.modules() if isinstance(m, nn.Conv2d)]
        assert sizes and all(size % align == 0 for size in sizes)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize(("name", "what"), [
    ("resnet50", "channels(conv2d)"), ("mobilenet_v2", "channels(conv2d)"),
    pytest.param("vit_b_16", "channels(linear | multihead_attention | conv2d)", marks=pytest.mark.slow)])
def test_the_usual_models_come_within_a_percent(name: str, what: str, align: int) -> None:
    text = policy(f"remove {what} {{ align = {align} }}", "macs <= 50% of dense")
    made = fxcompress.plan(text, meta(name, 224))
    assert is_close(made.after.macs, 0.5 * made.before.macs)
    assert made.budgets[0].state == "met"


def test_parameters_and_stored_bytes_are_met(tmp_path: Path) -> None:
    action = "remove channels(conv2d) { verify = off }"
    model = model_of("resnet18")
    slim = fxcompress.compile(policy(action, "params <= 4M"), model, IMAGES).finalize()
    assert is_close(sum(p.numel() for p in slim.parameters()), 4e6)
    small = fxcompress.compile(policy(action, "size <= 16 MiB"), model, IMAGES).finalize()
    fxcompress.save(small, tmp_path / "out")
    stored = load_file(str(tmp_path / "out" / "weights.safetensors"))
    assert is_close(sum(value.numel() * value.element_size() for value in stored.values()), 16 * 2**20)


@pytest.mark.parametrize(("budgets", "tightest"), [
    (("macs <= 50% of dense", "params <= 90% of dense"), 0), (("macs <= 90% of dense", "params <= 30% of dense"), 1)])
def test_all_budgets_are_met_and_the_tightest_closely(budgets: tuple[str, ...], tightest: int) -> None:
    made = fxcompress.plan(policy("remove channels(conv2d) { }", *budgets), meta("resnet18"))
    loads = [budget.value / budget.limit for budget in made.budgets if budget.value is not None]
    assert len(loads) == 2 and max(loads) <= 1
    assert loads[tightest] == max(loads) >= 0.99
    solved = made.steps[0].solved
    assert solved is not None and solved.why.startswith(f"budget {budgets[tightest]}, line {3 + tightest}")


@pytest.mark.parametrize(("op", "met"), [("<=", True), ("<", False)])
def test_a_strict_limit_is_not_touched(op: str, met: bool) -> None:
    budget = parse(policy("remove channels(conv2d) { }", f"macs {op} 1000")).budgets[0]
    dense, reached = Totals(params=1, macs=4000, bytes=4), Totals(params=1, macs=1000, bytes=4)
    assert (load_of(budget, dense, Reached(reached)) <= 1) == met == is_met(budget, dense, reached)
    assert load_of(budget, dense, Reached(Totals(params=1, macs=999, bytes=4))) < 1


def test_free_actions_share_one_ratio_and_fixed_ones_keep_theirs() -> None:
    actions = ('remove channels("layer1.**" & conv2d) { }\nremove channels("layer4.**" & conv2d) { align = 4 }\n'
               'remove channels("layer2.**" & conv2d) { ratio = 25% }')
    made = fxcompress.plan(policy(actions, "macs <= 75% of dense"), meta("resnet18"))
    first, second, fixed = (step.solved for step in made.steps)
    assert first is not None and second is not None and first.share == second.share and fixed is None
    assert is_close(made.after.macs, 0.75 * made.before.macs)
    kept = {change.path: int(change.after) for change in made.steps[2].changes if change.what == "out_channels"}
    assert kept and set(kept.values()) == {96}


def test_groups_of_one_size_differ_by_one_step_at_most() -> None:
    text = policy("remove channels(conv2d) { align = 8 }", "macs <= 50% of dense")
    made = fxcompress.plan(text, meta("resnet50", 224))
    left: dict[int, set[int]] = {}
    for change in made.steps[0].changes:
        if change.what == "out_channels":
            left.setdefault(int(change.before), set()).add(int(change.after))
    share = made.steps[0].solved.share  # type: ignore[union-attr]
    assert share is not None and any(len(sizes) > 1 for sizes in left.values())
    assert all(abs(size - whole * (1 - share)) < 8 for whole, sizes in left.items() for size in sizes)


def test_what_is_met_already_is_left_alone() -> None:
    model = model_of("resnet18")
    text = policy("remove channels(conv2d) { }", "macs <= 100% of dense")
    made = fxcompress.plan(text, model, IMAGES)
    assert made.after == made.before and made.steps[0].changes == ()
    assert "does nothing: budget macs <= 100% of dense, line 3 is met without it" in made.steps[0].notes
    deployed = fxcompress.compile(text, model, IMAGES).finalize()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(deployed(images), model(images))


def test_what_cannot_be_reached_is_refused_with_what_can() -> None:
    action = 'remove channels("layer4.**") {{ {} }}'
    with pytest.raises(PlanError) as caught:
        fxcompress.plan(policy(action.format(""), "macs <= 20% of dense"), meta("resnet18"))
    closest = fxcompress.plan(policy(action.format("ratio = 100%")), meta("resnet18"))
    share = 100 * closest.after.macs / closest.before.macs
    assert code_of(caught) == "FXC0320"
    assert caught.value.diagnostics[0].message == (
        f"the budget can't be met: macs comes down to {share:.3g}% of dense at best")
    assert caught.value.diagnostics[0].help


def test_limits_of_an_action_hold_in_the_search() -> None:
    with pytest.raises(PlanError) as caught:
        fxcompress.plan(policy("remove channels(conv2d) { max_ratio = 10% }", "macs <= 50% of dense"), meta("resnet18"))
    assert code_of(caught) == "FXC0320" and "at best" in caught.value.diagnostics[0].message


def test_fixed_actions_are_judged_as_before() -> None:
    with pytest.raises(PlanError) as caught:
        fxcompress.plan(policy("remove channels(conv2d) { ratio = 10% }", "macs <= 50% of dense"), meta("resnet18"))
    assert "would meet it" in (caught.value.diagnostics[0].help or "")


def test_neither_a_ratio_nor_a_budget_is_an_error_of_check() -> None:
    with pytest.raises(PolicyError) as caught:
        parse(policy("remove channels(conv2d) { by = l1 }"))
    assert code_of(caught) == "FXC0146"
    assert parse('policy p { remove channels(conv2d) as half { } }\npreset half for remove { ratio = 50% }')
    with pytest.raises(PlanError) as alone:
        Remove().apply(meta("resnet18"), "first(conv2d)", "channels")
    assert code_of(alone) == "FXC0345"


SCOPES = ["scope = global", "scope = isomorphic, by = l1", "scope = global, by = lamp, align = 8"]


@pytest.mark.parametrize("settings_", SCOPES)
def test_what_depends_on_weights_is_solved_with_them(settings_: str) -> None:
    model = model_of("resnet18")
    text = policy(f"remove channels(conv2d) {{ {settings_}, verify = off }}", "macs <= 50% of dense")
    result = fxcompress.compile(text, model, IMAGES)
    assert is_close(macs_of(result.finalize()), 0.5 * macs_of(model))
    assert result.plan.after.macs == macs_of(result.finalize()), "the plan had the weights too"


def test_a_plan_without_weights_leaves_that_open_and_compile_solves_it() -> None:
    text = policy("remove channels(conv2d) { scope = global, verify = off }", "macs <= 50% of dense")
    made = fxcompress.plan(text, meta("resnet18"))
    assert made.steps[0].solved is not None and made.steps[0].solved.share is None
    assert [(budget.state, budget.value) for budget in made.budgets] == [("unknown", None)]
    assert "(known when it is carried out)" in made.show()
    model = model_of("resnet18")
    result = fxcompress.compile(text, model, IMAGES, plan=Plan.from_json(made.to_json()))
    assert is_close(macs_of(result.finalize()), 0.5 * macs_of(model))
    assert any("is solved for budget macs <= 50% of dense" in note for note in result.notes)


def test_gradients_are_waited_for() -> None:
    model = model_of("resnet18")
    text = policy("remove channels(conv2d) { scope = global, by = taylor, verify = off }", "macs <= 50% of dense")
    captured = fxcompress.capture(model, IMAGES)
    assert fxcompress.plan(text, captured).budgets[0].state == "unknown"
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert is_close(macs_of(fxcompress.compile(text, model, IMAGES).finalize()), 0.5 * macs_of(model))


def test_weights_that_training_changed_are_solved_for_anew() -> None:
    model = model_of("resnet18")
    text = ("policy p { phase late over steps 1..2 { remove channels(conv2d) { scope = global, verify = off } }\n"
            "budget macs <= 50% of dense }")
    result = fxcompress.compile(text, model, IMAGES)
    planned = result.plan.steps[0].solved
    with torch.no_grad():
        for place, parameter in enumerate(result.module.parameters()):
            parameter.mul_(1 + place % 7)
    result.step()
    result.step()
    assert is_close(macs_of(result.finalize()), 0.5 * macs_of(model))
    assert planned is not None and any("with the weights as they are" in note for note in result.notes)


def test_the_plan_is_data_that_compile_follows() -> None:
    text = policy("remove channels(conv2d) { align = 8, verify = off }", "macs <= 60% of dense")
    made = fxcompress.plan(text, meta("resnet18"))
    assert Plan.from_json(made.to_json()) == made
    solved = json.loads(made.to_json())["steps"][0]["solved"]
    assert solved["name"] == "ratio" and 0 < solved["share"] < 1 and round(solved["share"] / GRID, 6).is_integer()
    result = fxcompress.compile(text, model_of("resnet18"), IMAGES, plan=Plan.from_json(made.to_json()))
    assert macs_of(result.finalize()) == made.after.macs


def test_golden_solved(golden: Callable[[str, str], None]) -> None:
    text = policy("remove channels(conv2d) { align = 8 }", "macs <= 50% of dense", "size <= 40 MiB")
    golden("plan/resnet18_solved.txt", fxcompress.plan(text, meta("resnet18")).show())


# The search, without graphs


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=60), st.floats(1.01, 50))
@settings(max_examples=200, deadline=None)
def test_the_search_keeps_every_limit_it_can(places: list[int], most: float) -> None:
    """Any falling staircase: what comes out is within the limit if the whole share is, and no step below 1 lies nearer
    unless the trials were used up in closing in on it."""
    steps = sorted(place * GRID for place in places)

    def load(share: float, spread: float) -> float:
        return most * (1 - sum(share >= place - 1e-9 for place in steps) / len(steps))

    search = Search(load, 0.005, 40)
    found = search.run((0.0,))
    assert found.met == (load(1.0, 0.0) <= 1)
    assert search.tries >= 0
    assert found.load == load(found.share, 0.0)


@given(st.floats(1.001, 1000), st.sampled_from([1.0, 1.5, 2.0, 3.0]))
@settings(max_examples=200, deadline=None)
def test_smooth_loads_are_met_closely(most: float, power: float) -> None:
    search = Search(lambda share, spread: most * (1 - share) ** power, 0.005, 40)
    found = search.run((0.0,))
    best = math.floor((1 - (1 / most) ** (1 / power)) / GRID + 1) * GRID
    assert 0.99 <= found.load <= 1 or found.share <= best + GRID
    assert search.tries >= 20, "smooth loads take few trials"


# Time, by a clock that counts weights


class Scales:
    """A clock that takes a nanosecond a parameter, and remembers how often it was asked."""

    def __init__(self, least: float = 0.0) -> None:
        self.asked, self.least = 0, least

    def __call__(self, modules: Sequence[nn.Module], example: Example) -> tuple[float, ...]:
        self.asked += 1
        for module in modules:
            with torch.no_grad():
                assert bool(module(*example.args, **example.kwargs).isfinite().all())
        return tuple(max(self.least, 1e-9 * sum(p.numel() for p in module.parameters())) for module in modules)


@cache
def real(name: str) -> Captured:
    return fxcompress.capture(model_of(name), IMAGES)


@pytest.mark.parametrize(("budget", "limit"), [("latency <= 60% of dense", 0.6), ("latency <= 4 ms", None)])
def test_latency_is_solved_by_measuring(budget: str, limit: float | None) -> None:
    clock = Scales()
    made = build(parse(policy("remove channels(conv2d) { align = 8 }", budget)), real("resnet18"), clock)
    seconds = limit * 1e-9 * made.before.params if limit is not None else 4e-3
    assert is_close(1e-9 * made.after.params, seconds, 0.05)
    assert made.budgets[0].state == "met" and made.budgets[0].value == pytest.approx(1e-9 * made.after.params)
    assert 2 <= clock.asked <= 8
    assert "as measured here" in made.show()


def test_latency_and_macs_are_met_together() -> None:
    text = policy("remove channels(conv2d) { }", "latency <= 90% of dense", "macs <= 50% of dense")
    made = build(parse(text), real("resnet18"), Scales())
    assert [budget.state for budget in made.budgets] == ["met", "met"]
    assert is_close(made.after.macs, 0.5 * made.before.macs, 0.05)


def test_a_latency_out_of_reach_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        build(parse(policy("remove channels(conv2d) { }", "latency <= 1 ms")), real("resnet18"), Scales(least=2e-3))
    assert code_of(caught) == "FXC0320" and "comes down to 2 ms" in caught.value.diagnostics[0].message


def test_latency_waits_for_weights() -> None:
    clock = Scales()
    text = policy("remove channels(conv2d) { }", "latency <= 60% of dense")
    made = build(parse(text), meta("resnet18"), clock)
    assert clock.asked == 0 and made.budgets[0].state == "unknown"
    assert made.steps[0].solved is not None and made.steps[0].solved.share is None


def test_latency_is_not_measured_where_nothing_is_left_out() -> None:
    clock = Scales()
    text = policy("remove channels(conv2d) { ratio = 10% }", "latency <= 60% of dense")
    assert build(parse(text), real("resnet18"), clock).budgets[0].state == "unknown" and clock.asked == 0


def test_a_skeleton_with_weights_again_runs() -> None:
    pruned = Remove(ratio=0.5).apply(real("resnet18").skeleton(), "conv2d", "channels")
    made = materialised(pruned, real("resnet18"))
    first, whole = made.module.get_parameter("conv1.weight"), real("resnet18").module.get_parameter("conv1.weight")
    assert torch.equal(first, whole[:32]) and made.module(IMAGES).shape == (1, 1000)
    assert all(p.is_meta for p in pruned.module.parameters())
