"""Plans: what they say against what torch says of the models, golden texts, JSON, drift, budgets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxcompress
from fxcompress.diagnostics import PlanError, PolicyError
from fxcompress.graph.captured import Captured
from fxcompress.plan import Plan, check_model, lower, plan, policy_hash, read_policy
from fxcompress.plan.text import amount, percent
from fxcompress.policy import parse
from fxcompress.source import Source

EDGE = """# The policy of the design's sample, as far as two verbs go.
policy edge(sparsity: percent = 60%) {
    target cpu
    input x: f32[N, 3, 64, 64]

    let stem = conv2d[name ~ "conv1"]
    let body = conv2d[name ~ "layer*.**", out_channels >= 64]

    phase shrink over epochs 0..12 {
        mask body - last(body) {
            sparsity = cubic(0% -> sparsity)
            every    = 100 steps
        }
        remove channels(body) {
            ratio  = 30%
            align  = 8
            couple = extend
        }
        override mask first(body) { sparsity = 20% }
    }
    phase recover over epochs 12..30 after shrink {
        mask body { sparsity = 75% }
    }

    budget macs <= 55% of dense
    budget size <= 24 MiB
    budget latency <= 30 ms
    expect count(body) == 19
    expect drift(output) < 5% else "logits moved too far"
}
"""
HALF = "policy half { remove channels(conv2d) { ratio = 50% } }"


def source(text: str, name: str = "edge.fxc") -> Source:
    return Source(name, text)


@cache
def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return torchvision.models.get_model(name).eval()


@cache
def captured_of(name: str) -> Captured:
    captured = fxcompress.capture(meta(name), (torch.zeros(1, 3, 64, 64),))
    captured.model_name = name
    return captured


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3),
                         nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))


IMAGES = (torch.zeros(2, 3, 8, 8),)


def stored(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v2"])
def test_the_dense_totals_are_what_torch_says(name: str) -> None:
    found = plan(parse("policy p { mask linear { sparsity = 1% } }"), captured_of(name)).before
    model = meta(name)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.zeros(1, 3, 64, 64))
    assert found.params == sum(p.numel() for p in model.parameters())
    assert found.macs == counter.get_total_flops() // 2
    assert found.bytes == stored(model)


@pytest.mark.parametrize("name", ["small", "resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_the_planned_model_is_the_one_that_comes_out(name: str) -> None:
    torch.manual_seed(0)
    model = small() if name == "small" else torchvision.models.get_model(name)
    text = "policy p { remove channels(conv2d) { ratio = 25% }, mask conv2d { sparsity = 50% } }"
    inputs = (torch.randn(1, 3, 8, 8) if name == "small" else torch.randn(1, 3, 64, 64),)
    planned = fxcompress.plan(text, model, inputs)
    deployed = fxcompress.compile(text, model, inputs).finalize(target="cpu")
    with FlopCounterMode(display=False) as counter:
        deployed(*inputs)
    assert planned.after.params == sum(p.numel() for p in deployed.parameters()) < planned.before.params
    assert planned.after.bytes == stored(deployed)
    assert planned.after.macs == counter.get_total_flops() // 2
    shapes = {key: tuple(value.shape) for key, value in deployed.state_dict().items()}
    for change in planned.steps[0].changes:
        if change.what == "out_channels":
            assert shapes[f"{change.path}.weight"][0] == int(change.after), change
    assert {layer.path: layer.after.params for layer in planned.layers if layer.after is not None} == {
        path: sum(p.numel() for p in module.parameters(recurse=False))
        for path, module in deployed.named_modules() if list(module.parameters(recurse=False))}


@pytest.mark.parametrize("verbose", [False, True])
def test_golden_resnet18(golden: Callable[[str, str], None], verbose: bool) -> None:
    text = plan(parse(source(EDGE)), captured_of("resnet18")).show(verbose)
    golden(f"plan/resnet18{'_verbose' if verbose else ''}.txt", text)


@pytest.mark.parametrize("name", ["mobilenet_v2", "vgg11"])
def test_golden_half(golden: Callable[[str, str], None], name: str) -> None:
    golden(f"plan/{name}.txt", plan(parse(source(HALF, "half.fxc")), captured_of(name)).show())


def test_plans_need_no_weights_and_touch_none() -> None:
    model = torchvision.models.resnet18()
    captured = fxcompress.capture(model, (torch.zeros(1, 3, 64, 64),))
    captured.model_name = "resnet18"
    weights, graph = {k: v.clone() for k, v in captured.module.state_dict().items()}, captured.fingerprint()
    assert plan(parse(source(EDGE)), captured) == plan(parse(source(EDGE)), captured_of("resnet18"))
    assert captured.fingerprint() == graph
    assert all(torch.equal(value, weights[key]) for key, value in captured.module.state_dict().items())
    assert all(p.is_meta for p in captured_of("resnet18").module.parameters())


def test_json_gives_the_same_plan_back() -> None:
    made = plan(parse(source(EDGE)), captured_of("resnet18"))
    assert Plan.from_json(made.to_json()) == made
    assert Plan.from_json(made.to_json()).to_json() == made.to_json()
    assert Plan.from_json(made.to_json()).show(verbose=True) == made.show(verbose=True)


def planned_small() -> Plan:
    return fxcompress.plan("policy p { mask linear { sparsity = 50% } }", small(), IMAGES)


def test_json_of_another_kind_is_refused() -> None:
    data = json.loads(planned_small().to_json())
    wrong: list[dict[str, Any]] = [
        {**data, "fxcompress_plan": 1}, {**data, "more": 1}, {key: data[key] for key in data if key != "steps"},
        {**data, "steps": {}}, {**data, "before": {"params": 1, "macs": 1, "bytes": "1"}}, {**data, "steps": [None]},
        {**data, "before": {"params": True, "macs": 1, "bytes": 1}}, {**data, "policy": None}, {**data, "notes": [1]}]
    for text in [*map(json.dumps, wrong), "", "[]", "null", "{", '"x"', "[" * 100_000, "NaN", "\0"]:
        with pytest.raises(PlanError, match="FXC0332"):
            Plan.from_json(text)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(st.data())
def test_any_field_of_any_other_value_gives_a_plan_or_a_diagnostic(data: st.DataObject) -> None:
    tree = json.loads(PLANNED)
    place: Any = tree
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    try:
        found = Plan.from_json(json.dumps(tree))
    except PlanError as error:
        assert error.diagnostics[0].code == "FXC0332"
    else:
        assert Plan.from_json(found.to_json()).to_json() == found.to_json()


PLANNED = planned_small().to_json()


def test_a_plan_fits_its_policy_whatever_its_comments_and_its_weights() -> None:
    model = small()
    captured = fxcompress.capture(model, IMAGES)
    text = "policy p(s: percent = 50%) { mask linear { sparsity = s } }"
    made = fxcompress.plan(text, captured)
    other = parse("# why\npolicy p(s: percent = 50%) {\n   mask linear { sparsity = s }\n}\n")
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert made.matches(other, fxcompress.capture(model, IMAGES))
    made.require(other, captured)
    for changed in (parse(text, {"s": "60%"}), parse(text.replace("linear", "conv2d")), parse(text.replace(
            "mask linear", "optional mask linear"))):
        assert not made.matches(changed, captured)
        with pytest.raises(PlanError, match="FXC0330"):
            made.require(changed, captured)
    model[6] = nn.Linear(32 * 36, 11)
    with pytest.raises(PlanError, match="FXC0331"):
        made.require(other, fxcompress.capture(model, IMAGES))


def test_the_hash_counts_what_is_said() -> None:
    texts = ["policy p { mask linear { sparsity = 50% } }", "policy p { mask linear { sparsity = 51% } }",
             "policy p { mask conv2d { sparsity = 50% } }", "policy q { mask linear { sparsity = 50% } }",
             "policy p { target cuda, mask linear { sparsity = 50% } }",
             "policy p { mask linear { sparsity = 50% }, budget macs <= 1M }",
             "policy p { phase a { mask linear { sparsity = 50% } } }"]
    assert len({policy_hash(parse(text)) for text in texts}) == len(texts)


def test_policies_come_as_text_file_and_object_alike(tmp_path: Path) -> None:
    text = "policy p(s: percent) { mask linear { sparsity = s } }"
    path = tmp_path / "p.fxc"
    path.write_text(text)
    plans = [fxcompress.plan(policy, small(), IMAGES, params={"s": 0.5})
             for policy in (text, path, str(path), parse(text), parse(text, {"s": "50%"}))]
    assert len({made.policy_hash for made in plans}) == 1
    assert all(made.after == plans[0].after for made in plans)
    assert plans[0].steps[0].settings == (("sparsity", "50%"),)
    with pytest.raises(PolicyError, match="FXC0133"):
        fxcompress.plan(text, small(), IMAGES)


def test_a_teacher_is_given_to_the_parameters_that_actions_name() -> None:
    policy = parse("policy p { mask linear { sparsity = 50% } }")
    assert read_policy(policy, teacher=small()) == policy, "no action asks for one"


def test_actions_of_a_phase_run_by_facet_then_as_written() -> None:
    steps = lower(parse("""policy p {
        mask linear { sparsity = 1% }
        remove channels(conv2d) { ratio = 1% }
        mask conv2d { sparsity = 2% }
        phase later { mask linear { sparsity = 3% }, remove channels(conv2d) { ratio = 2% } }
    }"""))
    assert [(step.number, step.phase.name, step.action.verb, *step.action.values.values()) for step in steps] == [
        (1, "(start)", "remove", 0.01), (2, "(start)", "mask", 0.01), (3, "(start)", "mask", 0.02),
        (4, "later", "remove", 0.02), (5, "later", "mask", 0.03)]


BUDGETS = [("macs <= 100% of dense", True), ("macs < 100% of dense", False), ("params <= 1k", False),
           ("size <= 1 MiB", True), ("size < 40 KiB", False), ("params <= 99% of dense", False)]


@pytest.mark.parametrize(("budget", "met"), BUDGETS)
def test_budgets_are_met_or_refused(budget: str, met: bool) -> None:
    text = f"policy p {{ mask linear {{ sparsity = 50% }}, budget {budget} }}"
    if met:
        assert [b.state for b in fxcompress.plan(text, small(), IMAGES).budgets] == ["met"]
    else:
        with pytest.raises(PlanError) as error:
            fxcompress.plan(text, small(), IMAGES)
        assert [item.code for item in error.value.diagnostics] == ["FXC0320"]


@pytest.mark.parametrize("budget", ["macs <= 40% of dense", "params <= 7k", "size <= 35 KiB", "macs < 100k"])
def test_the_way_out_of_a_budget_is_one(budget: str) -> None:
    text = "policy p {{ remove channels(conv2d) {{ ratio = {}% }}, budget {} }}"
    captured = fxcompress.capture(small(), IMAGES)
    with pytest.raises(PlanError) as error:
        plan(parse(text.format(5, budget)), captured)
    found = re.match(r"`ratio = (\d+)%` \(line 1\) would meet it", error.value.diagnostics[0].help or "")
    assert found is not None
    assert plan(parse(text.format(found[1], budget)), captured).budgets[0].state == "met"
    with pytest.raises(PlanError):  # and a good deal less would not do
        plan(parse(text.format(int(found[1]) - 8, budget)), captured)


def test_all_refused_budgets_are_told_at_once() -> None:
    with pytest.raises(PlanError) as error:
        fxcompress.plan("policy p { mask linear { sparsity = 50% }, budget macs <= 1, budget params <= 1, "
                        "budget size <= 1 B }", small(), IMAGES)
    assert [item.code for item in error.value.diagnostics] == ["FXC0320"] * 3


def test_latency_is_left_to_measuring() -> None:
    made = fxcompress.plan("policy p { mask linear { sparsity = 50% }, budget latency <= 1 us }", small(), IMAGES)
    assert [(b.value, b.state, b.shown) for b in made.budgets] == [(None, "unknown", "(known after measuring)")]


def test_check_model_finds_everything_at_once() -> None:
    policy = parse("""policy p {
        input input: f32[N, 1, 8, 8]
        let unused = lstm
        let used = "9"
        mask used { sparsity = 50% }
        mask linear[out_channels > 3] { sparsity = 50% }
        optional mask gru | conv1d { sparsity = 50% }
        mask "1" { sparsity = 50% }
        expect unchanged("7.**")
        expect count(gru) == 0
    }""")
    found = check_model(policy, fxcompress.capture(small(), IMAGES))
    assert [item.code for item in found] == ["FXC0210", "FXC0202", "FXC0206", "FXC0208", "FXC0202", "FXC0201"]
    with pytest.raises(PolicyError) as error:
        fxcompress.plan(policy, small(), IMAGES)
    assert list(error.value.diagnostics) == found
    unset = parse("policy p(s: percent) { mask linear { sparsity = s } }")
    assert check_model(unset, fxcompress.capture(small(), IMAGES))[0].code == "FXC0133"


def test_a_let_that_selects_nothing_is_told_once() -> None:
    policy = parse("""policy p {
        let none = "9"
        mask none { sparsity = 50% }
        mask none | linear { sparsity = 50% }
        mask linear - none { sparsity = 50% }
    }""")
    assert [item.code for item in check_model(policy, fxcompress.capture(small(), IMAGES))] == ["FXC0202"]


def test_inputs_are_compared() -> None:
    captured = fxcompress.capture(small(), IMAGES)

    def codes(spec: str) -> list[str]:
        policy = parse(f"policy p {{ input {spec}, mask linear {{ sparsity = 1% }} }}")
        return [item.code for item in check_model(policy, captured)]

    assert codes("input: f32[N, 3, 8, 8]") == codes("input: f32[2, 3, 8, 8]") == []
    for spec in ("input: f16[N, 3, 8, 8]", "input: f32[N, 3, 8]", "input: f32[4, 3, 8, 8]", "input: f32[N, 3, H, 8]",
                 "image: f32[N, 3, 8, 8]"):
        assert codes(spec) == ["FXC0210"], spec


def test_an_optional_action_may_come_to_nothing() -> None:
    made = fxcompress.plan("policy p { optional mask embedding { sparsity = 50% }, mask linear { sparsity = 50% } }",
                           small(), IMAGES)
    assert made.steps[0].nodes == () and made.steps[0].notes == ("selects nothing, and is optional",)
    assert "nothing" in made.show()


def test_notebooks_get_escaped_tables() -> None:
    shown = fxcompress.plan('policy p { mask linear & "6" { sparsity = 5% } }', small(), IMAGES)._repr_html_()
    assert "<table>" in shown and "mask linear &amp; &quot;6&quot;" in shown and "<policy>" not in shown


@pytest.mark.parametrize(("value", "unit", "text"), [
    (0, "", "0"), (999, "", "999"), (1000, "", "1 k"), (11_689_512, "", "11.69 M"),
    (1_814_073_344, "MACs", "1.814 GMACs"), (46_796_608, "B", "44.63 MiB"), (1023, "B", "1023 B"),
    (1024, "B", "1 KiB"), (3e15, "", "3000 T")])
def test_amounts(value: float, unit: str, text: str) -> None:
    assert amount(value, unit) == text


def test_percentages() -> None:
    assert [percent(share) for share in (0, 0.5, 0.51234, 1, 0.00482)] == ["0%", "50%", "51.2%", "100%", "0.482%"]
