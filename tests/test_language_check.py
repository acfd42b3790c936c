"""Checking: names, types, presets, phases, budgets; what a good text means, and what is said of a bad one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from verbs import toy_verbs

from fxcompress.diagnostics import PolicyError
from fxcompress.policy import check_source, instantiate, load_policy, parse, parse_selector
from fxcompress.policy.kinds import DTYPES, HELPERS, INPUT_DTYPES, KINDS, PREDICATES
from fxcompress.policy.model import Action, Policy
from fxcompress.policy.selector import Everything, Flow, Helper, Kind, Predicate, Ref, SetOp, Where
from fxcompress.policy.selector import Path as PathGlob
from fxcompress.policy.values import Call, Duration, NofM, Ramp, Unset, Window
from fxcompress.source import Source, Span


@pytest.fixture(autouse=True)
def _verbs() -> Iterator[None]:
    with toy_verbs():
        yield


def codes(text: str, **params: object) -> list[str]:
    return [item.code for item in check_source(Source("p.fxc", text), params).diagnostics]


def body(text: str, **params: object) -> Policy:
    return parse(f"policy p {{\n{text}\n}}", params)


def timed(text: str) -> str:
    """A policy with `text` in a phase that has a window, as ramps and times want it."""
    return f"policy p {{\nphase a over epochs 0..9 {{\n{text}\n}}\n}}"


def only(policy: Policy) -> Action:
    [phase] = policy.phases
    [action] = phase.actions
    return action


NOWHERE = Span(Source("", ""), 0, 0)


def at(*args: object) -> tuple[object, ...]:
    return (*args, NOWHERE)


@pytest.mark.parametrize(("text", "value"), [
    ("amount = 60%", ("amount", 0.6)),
    ("amount = 7 %", ("amount", 0.07)),
    ("amount = cubic(0% -> 60%)", ("amount", Ramp("cubic", 0.0, 0.6))),
    ("rate = -0.5", ("rate", -0.5)),
    ("rate = linear(1 -> -1e-1)", ("rate", Ramp("linear", 1.0, -0.1))),
    ("number = 1.5M", ("number", 1_500_000)),
    ("number = 3k", ("number", 3000)),
    ("flag = true", ("flag", True)),
    ("width = 4 bits", ("width", 4)),
    ("every = 100 steps", ("every", Duration(100, "steps"))),
    ("every = 1 epoch", ("every", Duration(1, "epochs"))),
    ("calibrate = 256 samples", ("calibrate", Duration(256, "samples"))),
    ("mode = slow", ("mode", "slow")),
    ("keep = 2:4", ("keep", NofM(2, 4))),
    ("shape = column", ("shape", "column")),
    ("shape = 1:2", ("shape", NofM(1, 2))),
    ("shape = block(4, 8)", ("shape", Call("block", (4, 8)))),
    ('label = "a \\"b\\""', ("label", 'a "b"')),
])
def test_values(text: str, value: tuple[str, object]) -> None:
    key, expected = value
    found = only(parse(timed(f"toy conv2d {{ {text} }}"))).values
    assert dict(found) == {key: expected} and type(found[key]) is type(expected)


@pytest.mark.parametrize(("text", "code", "fix"), [
    ("amount = 60", "FXC0105", "60%"), ("amount = 0.6", "FXC0105", "60%"), ("amount = 101%", "FXC0106", None),
    ("amount = cubic(0% -> 160%)", "FXC0106", None), ("amount = cubic(0 -> 60%)", "FXC0105", "0%"),
    ("amount = cubic(60%)", "FXC0105", None), ("amount = qubic(0% -> 6%)", "FXC0116", "cubic"),
    ("amount = 3 MiB", "FXC0105", None), ("plain = 60%", "FXC0106", None),
    ("plain = cubic(0% -> 60%)", "FXC0105", None),
    ("rate = 50%", "FXC0105", "0.5"), ("rate = 3", "FXC0106", None), ("number = 0.5", "FXC0105", None),
    ("number = 2M", None, None), ("number = 3M", "FXC0106", None), ("flag = on", "FXC0105", "true"),
    ("flag = 1", "FXC0105", None), ("width = 4", "FXC0105", "4 bits"), ("width = 16 bits", "FXC0106", None),
    ("every = 100", "FXC0105", "100 steps"), ("every = 3 samples", "FXC0105", None),
    ("every = 0 steps", "FXC0106", None),
    ("mode = fats", "FXC0116", "fast"), ('mode = "fast"', "FXC0105", "fast"), ("keep = 4:2", "FXC0106", None),
    ("keep = 2", "FXC0105", None), ("shape = block(4)", "FXC0105", None), ("shape = block(0, 4)", "FXC0106", None),
    ("shape = rows", "FXC0116", "row"), ("label = conv1", "FXC0105", '"conv1"'),
])
def test_wrong_values(text: str, code: str | None, fix: str | None) -> None:
    found = check_source(Source("p", timed(f"toy conv2d {{ {text} }}"))).diagnostics
    assert [item.code for item in found] == ([code] if code else [])
    fixes = [item.fixes[0].replacement if item.fixes else None for item in found]
    assert fixes == ([fix] if code else [])


@pytest.mark.parametrize(("text", "code", "fix"), [
    ("amount = 60", "FXC0105", "60%"), ("flag = on", "FXC0105", "true"), ("every = 100", "FXC0105", "100 steps"),
    ("mode = fats", "FXC0116", "fast"), ("label = conv1", "FXC0105", '"conv1"'), ("rate = 50%", "FXC0105", "0.5"),
])
def test_fixes_mend(text: str, code: str, fix: str) -> None:
    source = Source("p", timed(f"toy conv2d {{ {text} }}"))
    [item] = check_source(source).diagnostics
    [change] = item.fixes
    mended = source.text[:change.span.start] + change.replacement + source.text[change.span.end:]
    assert codes(mended) == []


@pytest.mark.parametrize(("text", "selector"), [
    ("*", Everything(NOWHERE)),
    ("conv2d", Kind("conv2d", NOWHERE)),
    ('"layer*.conv1"', PathGlob("layer*.conv1", NOWHERE)),
    ("conv2d >> batchnorm2d >> relu",
     Flow((Kind("conv2d", NOWHERE), Kind("batchnorm2d", NOWHERE), Kind("relu", NOWHERE)),
                                           NOWHERE)),
    ("conv2d - linear - relu", SetOp("-", (Kind("conv2d", NOWHERE), Kind("linear", NOWHERE), Kind("relu", NOWHERE)),
                                     NOWHERE)),
    ("(conv2d | linear) & *", SetOp("&", (SetOp("|", (Kind("conv2d", NOWHERE), Kind("linear", NOWHERE)), NOWHERE),
                                          Everything(NOWHERE)), NOWHERE)),
    ("last(conv2d, 2)", Helper("last", (Kind("conv2d", NOWHERE), 2), NOWHERE)),
    ('inside("layer1")', Helper("inside", (PathGlob("layer1", NOWHERE),), NOWHERE)),
    ('conv2d[name ~ re"a\\.b", params > 1.5M, depthwise, dtype == f32, bytes <= 6 KiB, bias == false]',
     Where(Kind("conv2d", NOWHERE), (
         Predicate("name", "~", "a\\.b", NOWHERE, True), Predicate("params", ">", 1_500_000, NOWHERE),
         Predicate("depthwise", "==", True, NOWHERE), Predicate("dtype", "==", "f32", NOWHERE),
         Predicate("bytes", "<=", 6144, NOWHERE), Predicate("bias", "==", False, NOWHERE)), NOWHERE)),
])
def test_selectors(text: str, selector: object) -> None:
    assert parse_selector(text) == selector


@pytest.mark.parametrize("text", [
    "", "conv2d |", "conv2d linear", "50%", "conv2d | linear - relu", "convd2", "frist(conv2d)", "first()",
    "first(conv2d, 0)",
    "conv2d[nam ~ \"x\"]", "conv2d[name > 3]", 'conv2d[name ~ re"("]', "conv2d[64 <= params]",
    "conv2d[params > 3 steps]",
    'conv2d[name ~ re"[[a]"]', "(" * 100, '"' + "x" * 300 + '"', "channels(conv2d)", "body",
])
def test_wrong_selectors(text: str) -> None:
    with pytest.raises(PolicyError):
        parse_selector(text)


def test_lets_are_bound_in_order_of_need() -> None:
    policy = body('let b = a - "x"\nlet a = conv2d\ntoy b { amount = 5% }')
    assert list(policy.lets) == ["a", "b"]
    assert policy.lets["b"] == SetOp("-", (Ref("a", NOWHERE), PathGlob("x", NOWHERE)), NOWHERE)


def test_facts_of_actions() -> None:
    action = only(body("let a = conv2d\noptional override take channels(a) { ratio = 5% }"))
    assert (action.verb, action.what, action.optional, action.override) == ("take", "channels", True, True)
    assert action.span.text == "take channels(a)" and action.value_spans["ratio"].text == "ratio = 5%"


def test_teacher_and_pairs() -> None:
    text = """policy p(t: model) {
    learn from t {
        pair output <- "head" { weight = 10%, loss = mse }
    }
}"""
    action = only(parse(text, {"t": object()}))
    assert action.teacher == "t" and action.selector is None
    [pair] = action.pairs
    assert (pair.student, pair.teacher, dict(pair.values)) == ("output", "head", {"weight": 0.1, "loss": "mse"})
    assert codes("policy p { learn { } }") == ["FXC0136"]
    assert codes("policy p(t: model) { learn from t { pair x <- output { weight = 1% } } }") == ["FXC0135"]
    assert codes("policy p(t: model) { learn from t { pair output <- output } }") == ["FXC0103"]
    assert codes("policy p(t: model) { toy conv2d from t { amount = t } }") == ["FXC0136", "FXC0105"]
    assert codes("policy p { learn from nobody }") == ["FXC0136"]


def test_parameters_are_filled_in() -> None:
    text = """policy p(a: percent = 60%, n: int, on: bool = false, who: text = "layer1", how: text = "slow", r: number =
    1) {
    phase a_phase over epochs 0..9 {
        toy who { amount = cubic(0% -> a), number = n, flag = on, mode = how, rate = r }
        toy conv2d[params > n, name ~ who] { amount = a }
    }
    budget macs <= a of dense
}"""
    policy = parse(text, {"n": 7, "a": "7%"})
    first, second = policy.phases[0].actions
    assert first.selector == PathGlob("layer1", NOWHERE)
    assert first.values == {"amount": Ramp("cubic", 0.0, 0.07), "number": 7, "flag": False, "mode": "slow", "rate": 1.0}
    assert isinstance(second.selector, Where) and second.selector.predicates[0].value == 7
    assert policy.budgets[0].limit == 0.07 and policy.params["a"] == 0.07


def test_missing_parameters_are_checked_by_type_and_asked_for_later() -> None:
    text = ("policy p(n: int, a: percent) {\n    phase b over epochs 0..9 {\n"
            "        toy conv2d { number = n, amount = linear(0% -> a) }\n    }\n}")
    policy = parse(text)
    assert policy.missing == ("n", "a")
    assert only(policy).values == {"number": Unset(("n",)), "amount": Unset(("a",))}
    with pytest.raises(PolicyError) as error:
        instantiate(policy, {"n": 3})
    assert "`a`" in error.value.diagnostics[0].message
    whole = instantiate(policy, {"n": 3, "a": "50%"})
    assert whole.missing == () and only(whole).values == {"number": 3, "amount": Ramp("linear", 0.0, 0.5)}
    again = instantiate(whole, {"n": 4})
    assert only(again).values == {"number": 4, "amount": Ramp("linear", 0.0, 0.5)}
    assert codes("policy p(n: int) { toy conv2d { amount = n } }") == ["FXC0105"]
    assert codes(text, n=0, a=0.5) == ["FXC0106"]
    assert codes(text, n="x") == ["FXC0105"]
    assert codes(text, m=1) == ["FXC0133"]


def test_presets_merge_under_the_block(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "deep.fxc").write_text("preset deep for toy { amount = 30%, mode = slow }\n")
    (tmp_path / "lib" / "all.fxc").write_text('use "deep.fxc"\npreset flat for toy { amount = 10% }\n')
    path = tmp_path / "p.fxc"
    path.write_text('use "lib/all.fxc" { deep }\npolicy p {\n    toy conv2d as deep { amount = 40% }\n}\n')
    action = only(load_policy(path))
    assert action.values == {"amount": 0.4, "mode": "slow"} and action.preset == "deep"
    path.write_text('use "lib/all.fxc"\npolicy p {\n    toy conv2d as flat\n    toy linear as deep\n}\n')
    assert [action.values for action in load_policy(path).phases[0].actions] == [
        {"amount": 0.1}, {"amount": 0.3, "mode": "slow"}]


def test_uses_in_circles_by_any_path(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.fxc").write_text(f'use "../{tmp_path.name}/{other}.fxc"\npreset {name} for toy {{ }}\n')
    with pytest.raises(PolicyError) as error:
        load_policy(tmp_path / "a.fxc")
    assert "FXC0120" in {item.code for item in error.value.diagnostics}
    for i in range(60):
        (tmp_path / f"c{i}.fxc").write_text(f'use "c{i + 1}.fxc"\n')
    with pytest.raises(PolicyError) as error:
        load_policy(tmp_path / "c0.fxc")
    assert "FXC0008" in {item.code for item in error.value.diagnostics}


def test_errors_in_used_files_point_there(tmp_path: Path) -> None:
    (tmp_path / "lib.fxc").write_text("preset soft for toy { amount = 60 }\n")
    (tmp_path / "p.fxc").write_text('use "lib.fxc"\npolicy p { toy conv2d as soft }\n')
    with pytest.raises(PolicyError) as error:
        load_policy(tmp_path / "p.fxc")
    [item] = error.value.diagnostics
    assert item.primary is not None and str(item.primary.span) == f"{tmp_path / 'lib.fxc'}:1:32"


def phases(*heads: str) -> list[str]:
    text = "\n".join(f"phase {head} {{ toy conv2d {{ amount = 5% }} }}" for head in heads)
    return [phase.name for phase in body(text).phases]


def test_phases_in_running_order() -> None:
    assert phases("b after a", "a") == ["a", "b"]
    assert phases("late over epochs 5..9", "early over epochs 0..5") == ["early", "late"]
    assert phases("d after late", "late over epochs 5..9", "early over epochs 0..5") == ["early", "late", "d"]
    assert phases("x over steps 5..9", "y over epochs 0..5") == ["x", "y"]
    policy = body("phase a over 10%..40% of training { toy conv2d { amount = 5% } }\ntoy linear { amount = 5% }")
    assert [phase.name for phase in policy.phases] == ["(start)", "a"]
    assert policy.phases[1].window == Window(0.1, 0.4, "training")


@pytest.mark.parametrize(("heads", "code"), [
    (["a over epochs 3..3"], "FXC0124"), (["a over epochs 0..1 over epochs 2..3"], "FXC0104"),
    (["a after a"], "FXC0123"), (["a after b", "b after c", "c after a"], "FXC0123"), (["a after x"], "FXC0122"),
    (["a over epochs 0..5", "b over epochs 4..6 after a"], "FXC0125"),
    (["a over epochs 0..5", "b after a", "c over epochs 4..6 after b"], "FXC0125"),
    (["a over minutes 0..5"], "FXC0126"), (["a over 0%..140% of training"], "FXC0124"),
    (["a over epochs 0%..5"], "FXC0124"), (["a", "a"], "FXC0108"), (["a after b, b", "b"], "FXC0104"),
])
def test_wrong_phases(heads: list[str], code: str) -> None:
    text = "\n".join(f"phase {head} {{ toy conv2d {{ amount = 5% }} }}" for head in heads)
    assert codes(f"policy p {{\n{text}\n}}") == [code]


def test_budgets_and_expectations() -> None:
    policy = body("""toy conv2d { amount = 5% }
budget macs < 55% of dense
budget size <= 6 MiB
budget latency <= 3 ms
budget params <= 1.5M
expect count(conv2d) == 19
expect drift(output) < 5% else "why"
expect unchanged(linear)
expect sparsity >= 50%
expect sparsity(conv2d) >= 50%
expect macs <= 60% of dense""")
    assert [(item.metric, item.op, item.limit, item.relative) for item in policy.budgets] == [
        ("macs", "<", 0.55, True), ("size", "<=", 6 * 2**20, False), ("latency", "<=", 0.003, False),
        ("params", "<=", 1_500_000, False)]
    assert [(item.metric, item.op, item.limit, item.relative, item.why) for item in policy.expects] == [
        ("count", "==", 19, False, None), ("drift", "<", 0.05, False, "why"), ("unchanged", None, None, False, None),
        ("sparsity", ">=", 0.5, False, None), ("sparsity", ">=", 0.5, False, None), ("macs", "<=", 0.6, True, None)]
    assert [type(item.argument).__name__ for item in policy.expects] == ["Kind", "str", "Kind", "NoneType", "Kind",
                                                                         "NoneType"]


@pytest.mark.parametrize(("text", "code"), [
    ("toy relu { amount = 5% }", "FXC0137"), ("let a = relu\n toy first(a)[params > 3] { amount = 5% }", "FXC0137"),
    ("toy conv2d | relu { amount = 5% }", None), ("toy * { amount = 5% }", None),
    ("toy relu | silu { amount = 5% }", "FXC0137"), ("take conv2d { ratio = 5% }", "FXC0115"),
    ("take heads(*) {}", "FXC0103"), ("take heads(*)", "FXC0103"),
    ("toy conv2d { flag = true, mode = slow }", "FXC0500"),
    ("toy { amount = 5% }", "FXC0144"), ("toy conv2d as x", "FXC0117"), ("toy conv2d as a as b", "FXC0104"),
    ("preset a for toy {}", "FXC0011"), ("use \"std/prune.fxc\"", "FXC0011"), ("let toy = 3", "FXC0139"),
    ("target cpu, target cpu", "FXC0104"), ("input x: f33[3]", "FXC0128"), ("input x: f32[]", None),
    ("let true = conv2d", "FXC0142"),
])
def test_statements(text: str, code: str | None) -> None:
    found = codes(f"policy p {{\n{text}\n}}")
    assert code in found if code else found == []


def test_unused_names_are_warnings() -> None:
    policy = parse("policy p(n: int = 3) {\n    let a = conv2d\n    toy linear { amount = 5% }\n}")
    assert [(item.code, item.severity) for item in policy.warnings] == [("FXC0110", "warning")] * 2


def test_unused_is_not_said_beside_errors() -> None:
    assert codes("policy p {\n    let a = conv2d\n    toy lnear { amount = 5% }\n}") == ["FXC0107"]


def test_libraries_check_but_are_no_policy() -> None:
    assert codes("preset a for toy { amount = 5% }") == []
    with pytest.raises(PolicyError):
        parse("preset a for toy { amount = 5% }")


def test_tables_agree_with_the_graph() -> None:
    from fxcompress import spec
    from fxcompress.graph.ops import MODULES, OPS
    from fxcompress.graph.predicates import DTYPES as GRAPH_DTYPES
    from fxcompress.graph.predicates import PROPERTIES

    ranked = {f"{kind}{rank}d" for kind in ("batchnorm", "instancenorm") for rank in (1, 2, 3)}
    assert {*OPS, *(leaf.kind for leaf in MODULES.values()), "input", "output", "parameter", *ranked} == KINDS
    assert set(PROPERTIES) == set(PREDICATES)
    assert set(GRAPH_DTYPES.values()) == set(DTYPES)
    assert set(INPUT_DTYPES) == set(spec.DTYPES)
    assert set(HELPERS) == {"first", "last", "inside", "inputs_of", "coupled"}
