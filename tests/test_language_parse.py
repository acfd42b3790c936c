"""Parsing: the grammar, the stored tables, recovery, and that no text at all gives anything but diagnostics."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import lark
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policies import PIECES, STEADY, mutated, policies

from fxcompress.diagnostics import PolicyError
from fxcompress.policy import ast, build, check_source, parse_selector, tables, words
from fxcompress.policy.library import decode
from fxcompress.policy.parsing import MAX_DEPTH, parse_expression, parse_file
from fxcompress.policy.units import ALIASES, UNITS
from fxcompress.render import render_json, render_sarif, render_text
from fxcompress.source import Source

ROOT = Path(__file__).parent.parent
EDGE = '''
use "std/prune.fxc" { half }

policy edge(sparsity: percent = 60%) {
    target cpu
    input  x: f32[N, 3, 224, 224]

    let stem  = conv2d[name ~ "conv1"]
    let body  = conv2d[name ~ "layer*.**", out_channels >= 64]
    let fused = conv2d >> batchnorm2d >> relu

    phase shrink over epochs 0..12 {
        remove channels(body) {
            ratio  = 30%
            by     = l2
            align  = 8
            couple = extend        # residual partners outside `body` (conv1) shrink too
        }
        mask body - last(body) {
            sparsity = cubic(0% -> sparsity)
            by       = magnitude
            every    = 100 steps
        }
    }
    phase recover over epochs 12..30 after shrink {
        override mask stem | fused as half { sparsity = 40% }
        optional mask linear[name ~ re"head\\..*"] { granularity = 2:4 }
    }

    budget macs <= 55% of dense
    budget size <= 6MiB
    expect count(body) == 19
    expect drift(output) < 5% else "logits moved too far; lengthen phase recover"
}
'''


def errors(text: str) -> list[tuple[str, str]]:
    """(code, the text shown) of each syntax error."""
    return [(item.code, item.primary.span.text if item.primary else "")
            for item in parse_file(Source("p.fxc", text)).diagnostics]


def test_grammar_is_lalr_and_strict() -> None:
    pytest.importorskip("interegular")
    tables.build(strict=True)  # raises at any conflict, or where two terminals match the same text


def test_stored_tables_are_current() -> None:
    stored = json.loads((ROOT / "grammar" / tables.TABLES).read_text(encoding="utf-8"))
    current = json.loads(tables.encode(tables.build()))
    assert stored["grammar"] == current["grammar"], "run `python -m fxcompress.grammar`"
    if stored["lark"] != current["lark"]:
        pytest.skip(f"tables of Lark {stored['lark']} are not used by Lark {lark.__version__}")
    loaded, built = tables.load(None), tables.build()
    assert sorted(map(str, loaded.rules)) == sorted(map(str, built.rules))
    assert sorted(map(str, loaded.terminals)) == sorted(map(str, built.terminals))


def test_stored_tables_give_the_same_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = build.Builder()
    source = builder.source = Source("edge.fxc", EDGE)
    text = EDGE.strip("\n")
    fresh = tables.build(transformer=builder).parse(text, start="start")
    assert fresh == parse_file(source).file
    monkeypatch.setattr(lark, "__version__", "0.0")
    assert tables.load(builder).parse(text, start="start") == fresh  # of another version: made anew


def test_words_agree_with_the_grammar() -> None:
    grammar = tables.build()
    strings = {str(term.pattern.value) for term in grammar.terminals if term.pattern.type == "str"}
    assert {word for word in strings if word.isalpha()} == set(words.KEYWORDS)
    named = {term.name for term in grammar.terminals if not term.name.startswith("__")}
    assert named - {"BROKEN"} == set(words.TERMINALS) - {"$END"}
    assert set(words.UNITS) == set(UNITS)
    for unit in (*UNITS, *ALIASES):
        tree, problems = parse_expression(Source("u", f"3 {unit}"))
        assert isinstance(tree, ast.Quantity) and tree.unit == unit and not problems


def test_sample_policy_parses_and_checks() -> None:
    checked = check_source(Source("edge.fxc", EDGE))
    assert checked.diagnostics == ()
    assert checked.policy is not None and [phase.name for phase in checked.policy.phases] == ["shrink", "recover"]


def test_spans_cover_what_was_written() -> None:
    policy = parse_file(Source("edge.fxc", EDGE)).file.items[1]
    assert isinstance(policy, ast.PolicyDecl)
    phase = policy.body.items[5]
    assert isinstance(phase,
                      ast.Phase) and phase.span.text.startswith("phase shrink over") and phase.span.text.endswith("}")
    action = phase.body.items[1]
    assert isinstance(action, ast.Action)
    assert action.head.text == "mask body - last(body)"
    assert [item.span.text for item in action.body.items] == [  # type: ignore[union-attr]
        "sparsity = cubic(0% -> sparsity)", "by       = magnitude", "every    = 100 steps"]
    assert action.verb.span.line == 19


@pytest.mark.parametrize("ending", ["\r\n", "\n"])
def test_line_ends_and_bom_change_nothing(ending: str) -> None:
    data = b"\xef\xbb\xbf" + EDGE.replace("\n", ending).encode()
    assert parse_file(decode(data, "edge.fxc")).file == parse_file(Source("edge.fxc", EDGE)).file


def test_every_error_of_a_text_in_one_run() -> None:
    text = """policy p(a percent = 60%) {
    let x =
    phse one over epochs 0..3 {
        mask conv2d { sparsity = = 3, by = l2 }
    }
    mask linear[name ~ "a" { sparsity = 5% }
    mask embedding { every = 3 stpes }
    let y = first(conv2d
    mask lstm { sparsity = 5% } }
}"""
    assert errors(text) == [("FXC0004", "percent"), ("FXC0007", "="), ("FXC0010", "phse"), ("FXC0004", "= ="),
                            ("FXC0004", "{"), ("FXC0012", "stpes"), ("FXC0005", "("), ("FXC0006", "}")]


def test_statements_around_an_error_are_kept() -> None:
    text = """policy p {
    let a = conv2d
    let b = ) linear
    let c = relu
    mask a { sparsity = , by = l2 }
}"""
    policy = parse_file(Source("p", text)).file.items[0]
    assert isinstance(policy, ast.PolicyDecl)
    assert [item.name.text for item in policy.body.items if isinstance(item, ast.Let)] == ["a", "b", "c"]
    action = policy.body.items[-1]
    assert isinstance(action, ast.Action) and action.body is not None
    assert [item.key.text for item in action.body.items if isinstance(item, ast.Setting)] == ["by"]


def test_names_of_broken_statements_are_not_unknown() -> None:
    text = "policy p {\n    let body = conv2d[\n    mask body { sparsity = 50% }\n}"
    assert [item.code for item in check_source(Source("p", text)).diagnostics] == ["FXC0005"]


@pytest.mark.parametrize("char", "()[]{}")
def test_a_megabyte_of_brackets(char: str) -> None:
    """It takes a second; a reader of quadratic time would need an hour."""
    found = parse_file(Source("p", char * 2**20)).diagnostics
    assert 1 <= len(found) <= 3
    found = parse_file(Source("p", "policy p { mask " + char * 2**20)).diagnostics
    assert 1 <= len(found) <= 4


@pytest.mark.parametrize("text", [
    "let x = " + "(" * 10_000 + "a" + ")" * 10_000,
    "let x = " + "f(" * 10_000 + "a" + ")" * 10_000,
    "let x = " + "a[b>=" * 10_000,
    "policy p {\n" * 10_000,
])
def test_deep_nesting_is_a_diagnostic(text: str) -> None:
    found = parse_file(Source("p", text)).diagnostics
    assert "FXC0008" in {item.code for item in found}


def test_nesting_up_to_the_limit_is_fine() -> None:
    depth = MAX_DEPTH - 2
    text = "policy p {\n mask " + "(" * depth + "conv2d" + ")" * depth + " { sparsity = 50% }\n}"
    assert check_source(Source("p", text)).is_good


def test_wide_texts_without_recursion() -> None:
    text = "policy p {\n    let a = " + " | ".join(["conv2d"] * 20_000) + "\n    mask a { sparsity = 50% }\n}"
    assert check_source(Source("p", text)).is_good


def test_long_chains_of_lets() -> None:
    lets = "".join(f"    let a{i} = a{i - 1} - \"x\"\n" for i in range(1, 3000))
    found = check_source(Source("p",
                                f"policy p {{\n    let a0 = conv2d\n{lets}    mask a2999 {{ sparsity = 50% }}\n}}"))
    assert [item.code for item in found.diagnostics] == ["FXC0008"]


def assert_only_diagnostics(source: Source) -> None:
    checked = check_source(source)
    assert (checked.policy is None) or checked.is_good
    for item in checked.diagnostics:
        assert item.code.startswith("FXC0") and item.message
    render_text(checked.diagnostics).encode()
    json.loads(render_json(checked.diagnostics))
    json.loads(render_sarif(checked.diagnostics))


@STEADY
@given(st.text())
def test_any_text(text: str) -> None:
    text = text.encode(errors="replace").decode()
    assert_only_diagnostics(Source("p.fxc", text))
    try:
        parse_selector(text)
    except PolicyError as error:
        assert error.diagnostics


@STEADY
@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    try:
        source = decode(data, "p.fxc")
    except PolicyError as error:
        assert [item.code for item in error.diagnostics] == ["FXC0001"]
        render_text(error.diagnostics)
        return
    assert_only_diagnostics(source)


@STEADY
@given(st.lists(st.sampled_from(PIECES), max_size=60).map(" ".join))
def test_any_pieces(text: str) -> None:
    assert_only_diagnostics(Source("p.fxc", text))


@STEADY
@given(mutated())
def test_mutated_policies(text: str) -> None:
    assert_only_diagnostics(Source("p.fxc", text))


@STEADY
@given(policies())
def test_random_policies_parse(text: str) -> None:
    assert errors(text) == []


def test_trees_are_frozen_dataclasses_without_torch() -> None:
    code = ("import sys; from fxcompress.policy import parse; parse('policy p { mask conv2d { sparsity = 50% } }'); "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for thing in vars(ast).values():
        if isinstance(thing, type) and thing.__module__ == ast.__name__:
            assert is_dataclass(thing) and thing.__dataclass_params__.frozen  # type: ignore[attr-defined]
            assert thing is ast.File or "span" in {item.name for item in fields(thing)}
