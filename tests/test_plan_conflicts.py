"""The conflict rule, overriding, time; binding through rewrites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.diagnostics import PlanError, PolicyError, Sink
from fxcompress.graph import ops
from fxcompress.graph.captured import Captured
from fxcompress.graph.provenance import touch
from fxcompress.graph.select import label
from fxcompress.graph.site import Change, Outcome, Site
from fxcompress.passbase import VERBS, Facet, Pass, register_verb
from fxcompress.plan import Binder, Plan, check_model, lower, plan
from fxcompress.plan.conflicts import sequential
from fxcompress.policy import parse


class Net(nn.Module):
    """Two branches that are added up, then two that are joined, then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc, self.head = nn.Linear(16, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x) + self.two(x))
        x = torch.cat([self.left(x), self.right(x)], 1).mean((2, 3))
        return self.head(torch.relu(self.fc(x)))


def captured_net() -> Captured:
    torch.manual_seed(0)
    return fxcompress.capture(Net(), (torch.randn(2, 3, 6, 6),))


@dataclass(frozen=True)
class SplitTest(Pass):
    """Put two linear layers in the place of one: W = W · I."""

    verb, facet, kinds = "split_test", Facet.TOPOLOGY, ("linear",)

    def rewrite(self, graph: Captured, site: Site) -> Outcome:
        changes = []
        for node in site.nodes:
            path, old = str(node.target), graph.module_of(node)
            pair = nn.Sequential(nn.Linear(old.in_features, old.in_features, device="meta"), old)
            graph.module.set_submodule(path, pair)
            with graph.graph.inserting_before(node):
                first = graph.graph.call_module(f"{path}.0", node.args)
                second = graph.graph.call_module(f"{path}.1", (first,))
            for new in (first, second):
                touch(new, self, site, "split", was=(node.name,))
            graph.replace(node, second, (first, second))
            changes.append(Change(path, "linear", "layers", "1", "2", "selected"))
        return Outcome(tuple(changes))


@dataclass(frozen=True)
class DropTest(Pass):
    """Take activations out."""

    verb, facet = "drop_test", Facet.TOPOLOGY

    def rewrite(self, graph: Captured, site: Site) -> Outcome:
        for node in site.nodes:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        return Outcome(())


@dataclass(frozen=True)
class TanhTest(Pass):
    """Another activation: what was there is gone, the new one takes its place."""

    verb, facet = "tanh_test", Facet.NUMERIC

    def rewrite(self, graph: Captured, site: Site) -> Outcome:
        for node in site.nodes:
            with graph.graph.inserting_before(node):
                new = ops.call(graph.graph, "tanh", node.args[0])
            graph.replace(node, new)
            touch(new, self, site, "relu -> tanh")
        return Outcome(())


@pytest.fixture(autouse=True)
def verbs() -> Iterator[None]:
    toys = (SplitTest, DropTest, TanhTest)
    for toy in toys:
        register_verb(toy)
    yield
    for toy in toys:
        VERBS.unregister(toy.verb)


def planned(text: str) -> Plan:
    return plan(parse(f"policy p {{\n{text}\n}}"), captured_net())


def refused(text: str) -> list[tuple[str, int, int]]:
    """(code, line, line of the other place) of every diagnostic."""
    with pytest.raises(PlanError) as error:
        planned(text)
    return [(item.code, *(places[0].span.line if places else 0 for places in ((item.primary,), item.secondary)))
            for item in error.value.diagnostics]


MASK = "mask {} {{ sparsity = {}% }}"


def test_two_masks_of_one_layer_are_a_conflict_that_shows_both_places() -> None:
    assert refused("mask conv2d { sparsity = 50% }\nmask \"one\" { sparsity = 10% }") == [("FXC0301", 3, 2)]


def test_other_facets_and_other_layers_are_none() -> None:
    made = planned("mask conv2d { sparsity = 50% }\nremove channels(conv2d) { ratio = 50% }\n"
                   "mask linear { sparsity = 5% }")
    assert [step.verb for step in made.steps] == ["remove", "mask", "mask"]


def test_every_pair_in_conflict_is_told_once() -> None:
    text = "\n".join(MASK.format(*pair) for pair in (("conv2d", 1), ("conv2d", 2), ("conv2d", 3), ("linear", 4)))
    # the second and third each clash with the first; what clashed does not write, so that nothing is told twice
    assert refused(text) == [("FXC0301", 3, 2), ("FXC0301", 4, 2)]


def test_override_wins_and_the_other_keeps_its_other_layers() -> None:
    for text in ("mask conv2d { sparsity = 50% }\noverride mask \"one\" { sparsity = 10% }",
                 "override mask \"one\" { sparsity = 10% }\nmask conv2d { sparsity = 50% }"):
        steps = {step.override: step for step in planned(text).steps}
        assert [change.path for change in steps[True].changes] == ["one"]
        assert [change.path for change in steps[False].changes] == ["two", "left", "right"]
        assert steps[False].left == ("one",) and steps[True].left == ()


def test_override_in_the_finished_model() -> None:
    text = "policy p { mask conv2d { sparsity = 50% }, override mask \"one\" { sparsity = 25% } }"
    deployed = fxcompress.compile(text, Net(), (torch.randn(2, 3, 6, 6),)).finalize(target="cpu")
    shares = {name: float((deployed.get_parameter(f"{name}.weight") == 0).float().mean())
              for name in ("one", "two", "left", "right", "fc")}
    assert shares == {"one": 0.25, "two": 0.5, "left": 0.5, "right": 0.5, "fc": 0.0}


def test_override_takes_what_the_other_action_could_not_do() -> None:
    text = "mask conv2d { granularity = 2:4 }\n"  # the first convolutions have 3 inputs: no groups of 4
    assert {code for code, _, _ in refused(text)} == {"FXC0504"}
    made = planned(text + 'override mask "one" | "two" { sparsity = 50% }')
    assert [change.path for change in made.steps[0].changes] == ["left", "right"]


def test_an_action_that_is_overridden_whole_does_nothing() -> None:
    made = planned('mask "one" { sparsity = 50% }\noverride mask conv2d { sparsity = 10% }')
    assert made.steps[0].changes == () and made.steps[0].notes == ("nothing is left to it",)
    assert len(made.steps[1].changes) == 4


def test_two_overrides_are_a_conflict_and_an_idle_one_is_noted() -> None:
    assert refused("override mask conv2d { sparsity = 50% }\noverride mask \"one\" { sparsity = 10% }") == [
        ("FXC0301", 3, 2)]
    assert planned("override mask conv2d { sparsity = 50% }").notes == ("`override` in line 2 overrides nothing",)
    assert planned("mask conv2d { sparsity = 50% }\noverride mask \"one\" { sparsity = 10% }").notes == ()


def test_an_override_binds_to_layers_that_an_action_before_it_makes() -> None:
    made = planned('split_test "fc"\nmask linear { sparsity = 50% }\noverride mask "fc.0" { sparsity = 10% }')
    by_override = {step.override: step for step in made.steps if step.verb == "mask"}
    assert [change.path for change in by_override[True].changes] == ["fc.0"]
    assert [change.path for change in by_override[False].changes] == ["fc.1", "head"]
    assert by_override[False].left == ("fc.0",)


def test_coupled_layers_are_written_by_both() -> None:
    assert refused('remove channels("one") { ratio = 50% }\nremove channels("two") { ratio = 25% }') == [
        ("FXC0302", 3, 2)]
    assert refused('remove channels("one") { ratio = 50% }\noverride remove channels("two") { ratio = 25% }') == [
        ("FXC0302", 3, 2)], "what is coupled can't be parted"


def test_reading_fewer_channels_is_no_conflict() -> None:
    made = planned('remove channels("left") { ratio = 50% }\nremove channels("right") { ratio = 25% }')
    read = [(change.path, change.what, change.before, change.after) for step in made.steps for change in step.changes
            if change.path == "fc"]
    assert read == [("fc", "in_features", "16", "12"), ("fc", "in_features", "12", "10")]
    planned('remove channels("one" | "two") { ratio = 50% }\nremove channels("left") { ratio = 25% }')


PHASES = "phase a{} {{ mask conv2d {{ sparsity = 50% }} }}\nphase b{} {{ mask conv2d {{ sparsity = 60% }} }}"
TIMES = [("", "", False), ("", " after a", True), (" over epochs 0..3", " after a", True),
         ("", " over epochs 0..3", False),
         (" over epochs 0..3", " over epochs 3..5", False), (" over epochs 0..3", " over epochs 3..5 after a", True),
         (" over steps 0..30", " over epochs 3..5 after a", False),
         (" over 0%..30% of training", " over 30%..90% of training after a", True), (" after b", "", True)]


@pytest.mark.parametrize(("one", "other", "follows"), TIMES)
def test_phases_that_follow_one_another_are_in_no_conflict(one: str, other: str, follows: bool) -> None:
    text = PHASES.format(one, other)
    if follows:
        assert len(planned(text).steps) == 2
    else:
        assert [code for code, _, _ in refused(text)] == ["FXC0301"]


def test_following_is_transitive_and_the_start_comes_first() -> None:
    policy = parse("""policy p {
        mask linear { sparsity = 1% }
        phase a { mask linear { sparsity = 1% } }
        phase b over epochs 0..2 after a { mask linear { sparsity = 1% } }
        phase c after b { mask linear { sparsity = 1% } }
        phase d { mask linear { sparsity = 1% } }
    }""")
    phases = {phase.name: phase for phase in policy.phases}
    pairs = {(one, other) for one in phases for other in phases if sequential(policy, phases[one], phases[other])}
    chain = {("a", "b"), ("b", "c"), ("a", "c")}
    assert pairs == chain | {(b, a) for a, b in chain} | {
        pair for name in "abcd" for pair in ((name, "(start)"), ("(start)", name))}


def test_a_let_follows_its_layers_through_rewrites() -> None:
    made = planned('let last = "head"\nsplit_test last\nmask last { sparsity = 50% }')
    assert [change.path for change in made.steps[1].changes] == ["head.0", "head.1"]
    made = planned('let act = relu\nphase a { tanh_test act }\nphase b after a { tanh_test act }')
    assert made.steps[1].kinds == (("tanh", 2),)


def test_an_inline_selector_binds_in_its_turn() -> None:
    made = planned("split_test \"head\"\nmask linear { sparsity = 50% }")
    assert [change.path for change in made.steps[1].changes] == ["fc", "head.0", "head.1"]
    made = planned("phase a { tanh_test relu }\nphase b after a { tanh_test tanh }")
    assert made.steps[1].kinds == (("tanh", 2),)


def test_layers_that_a_rewrite_will_make_are_left_to_plan() -> None:
    policy = parse('policy p { split_test "head", mask "head.0" { sparsity = 50% } }')
    assert check_model(policy, captured_net()) == []
    assert [change.path for change in plan(policy, captured_net()).steps[1].changes] == ["head.0"]
    wrong = parse('policy p { split_test "head", mask "head.7" { sparsity = 50% } }')
    assert check_model(wrong, captured_net()) == []
    with pytest.raises(PlanError, match="FXC0202"):
        plan(wrong, captured_net())


def test_a_let_whose_layers_are_gone_is_an_error_that_says_where_they_went() -> None:
    text = "let act = relu\nphase a { drop_test act }\nphase b after a { tanh_test act }"
    with pytest.raises(PlanError) as error:
        planned(text)
    found = error.value.diagnostics[0]
    assert found.code == "FXC0209" and "`drop_test act`, <policy>:3" in found.notes[0]
    assert planned(text.replace("tanh_test", "optional tanh_test")).steps[1].nodes == ()


def test_a_facet_follows_a_layer_that_is_replaced() -> None:
    assert refused('tanh_test relu\ntanh_test tanh') == [("FXC0301", 3, 2)]


def test_the_errors_of_several_actions_come_at_once() -> None:
    text = ('mask "one" { sparsity = 50%, granularity = 3:7 }\nmask linear { sparsity = 1% }\n'
            'mask "fc" { sparsity = 2% }\nbudget macs <= 1')
    assert [code for code, _, _ in refused(text.replace("50%", "57%"))] == ["FXC0504", "FXC0301"]


def test_the_binder_of_the_engine_gives_the_sites_of_the_plan() -> None:
    policy = parse("""policy p {
        let convs = conv2d
        remove channels(convs) { ratio = 50% }
        mask convs - first(convs) { sparsity = 50% }
        override mask "left" { sparsity = 10% }
        optional mask conv3d { sparsity = 1% }
    }""")
    captured = captured_net()
    made = plan(policy, captured)
    binder = Binder(policy, captured)
    for step, expected in zip(lower(policy, made), made.steps, strict=True):
        site = binder.site(step.phase, step.action, step.leaves)
        assert (tuple(node.name for node in site.nodes) if site is not None else ()) == expected.nodes
        if site is not None:
            binder.carry_out(step, site)
    assert [label(node) for node in binder.lets["convs"].nodes] == ["one", "two", "left", "right"]


def test_without_a_sink_the_binder_raises() -> None:
    policy = parse('policy p { mask "nowhere" { sparsity = 1% } }')
    phase = policy.phases[0]
    with pytest.raises(PolicyError, match="FXC0202"):
        Binder(policy, captured_net()).site(phase, phase.actions[0])
    sink = Sink()
    assert Binder(policy, captured_net(), sink).site(phase, phase.actions[0]) is None
    assert [item.code for item in sink.items] == ["FXC0202"]
    assert Binder(policy, captured_net()).site(phase, phase.actions[0], lenient=True) is None
