"""Laws of selectors on random models, and globs against the plainest matcher there is."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.graph.captured import Captured
from fxcompress.graph.pattern import MOST_REPETITIONS, PatternError, glob, regex
from fxcompress.graph.select import operators, select

STEADY = settings(deadline=None, derandomize=True, database=None, max_examples=40)
Nodes = frozenset[fx.Node]


class Block(nn.Module):
    """Named layers, some of whose results are added up or read twice."""

    def __init__(self, layers: list[str], twice: bool) -> None:
        super().__init__()
        self.twice, self.inner = twice, nn.ModuleList()
        for layer in layers:
            self.inner.append({
                "conv": nn.Conv2d(4, 4, 3, padding=1), "wide": nn.Conv2d(4, 4, 1), "act": nn.ReLU(),
                "bn": nn.BatchNorm2d(4), "nest": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))}[layer])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            y = layer(x)
            x = x + y if self.twice else y
        return x


@cache
def captured_of(layers: tuple[tuple[tuple[str, ...], bool], ...]) -> Captured:
    model = nn.Sequential(*(Block(list(block), twice) for block, twice in layers))
    return fxcompress.capture(model, (torch.zeros(1, 4, 4, 4),))


LAYERS = st.sampled_from(("conv", "wide", "act", "bn", "nest"))
MODELS = st.lists(st.tuples(st.lists(LAYERS, min_size=1, max_size=4).map(tuple), st.booleans()), min_size=1, max_size=3
                  ).map(tuple).map(captured_of)
ATOMS = st.sampled_from(("conv2d", "relu", "add", "batchnorm2d", "*", "conv2d[kernel_size == 3]", "*[params > 20]",
                         'conv2d[name ~ "0.**"]', '*[name ~ "**.1"]', '"0.inner"', '"*.inner.1"', "first(conv2d, 2)"))
SELECTORS = st.recursive(ATOMS, lambda inner: st.one_of(
    st.tuples(inner, st.sampled_from("|&-"), inner).map(lambda t: f"({t[0]}) {t[1]} ({t[2]})"),
    st.tuples(inner, inner).map(lambda t: f"({t[0]}) >> ({t[1]})"),
    inner.map(lambda s: f"last(({s}), 2)"), inner.map(lambda s: f"inputs_of({s})")), max_leaves=4)


def at(captured: Captured, text: str) -> Nodes:
    found = select(captured, text, optional=True)
    order = [node for node in captured.graph.nodes if node in found]
    assert list(found) == order, "selections come in graph order, each node once"
    return frozenset(found)


@STEADY
@given(MODELS, SELECTORS, SELECTORS, SELECTORS)
def test_sets_obey_their_laws(captured: Captured, a: str, b: str, c: str) -> None:
    one, two, every = at(captured, a), at(captured, b), at(captured, "*")
    assert at(captured, f"({a}) | ({b})") == at(captured, f"({b}) | ({a})") == one | two
    assert at(captured, f"({a}) & ({b})") == at(captured, f"({b}) & ({a})") == one & two
    assert at(captured, f"({a}) - ({b})") == one - two
    assert at(captured, f"({a}) - ({b}) - ({c})") == at(captured, f"({a}) - (({b}) | ({c}))")
    assert at(captured, f"(({a}) | ({b})) & ({c})") == at(captured, f"(({a}) & ({c})) | (({b}) & ({c}))")
    assert one <= every == frozenset(operators(captured.graph))
    assert at(captured, f"* - (* - ({a}))") == one


@STEADY
@given(MODELS, SELECTORS, SELECTORS)
def test_dataflow_is_the_only_reader(captured: Captured, a: str, b: str) -> None:
    one, two = at(captured, a), at(captured, b)
    expected = {node for node in one if len(node.users) == 1 and next(iter(node.users)) in two}
    assert at(captured, f"({a}) >> ({b})") == expected
    assert at(captured, f"({a}) >> ({b}) >> *") <= at(captured, f"({a}) >> ({b})")


@STEADY
@given(MODELS, SELECTORS, st.integers(1, 5))
def test_helpers_obey_their_laws(captured: Captured, a: str, count: int) -> None:
    ordered = select(captured, a, optional=True)
    assert at(captured, f"first(({a}), {count})") == frozenset(ordered[:count])
    assert at(captured, f"last(({a}), {count})") == frozenset(ordered[-count:])
    assert at(captured, f"({a})[params > 20]" if a == "*" else f"(* & ({a}))[params >= 0]") <= frozenset(ordered)
    assert at(captured, a) <= at(captured, f"coupled({a})")
    assert at(captured, f"coupled(coupled({a}))") == at(captured, f"coupled({a})")


@STEADY
@given(MODELS, SELECTORS)
def test_a_copy_gives_the_same_names(captured: Captured, a: str) -> None:
    names = {node.name for node in at(captured, a)}
    assert {node.name for node in at(captured.copy(), a)} == names == {node.name for node in at(captured.skeleton(), a)}


def plainly(pattern: list[str], path: list[str]) -> bool:
    """The definition: `**` is any number of parts, every other part is matched by `fnmatch`."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(plainly(pattern[1:], path[skip:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and plainly(pattern[1:], path[1:])


PARTS = st.from_regex(r"[ab01]{1,3}", fullmatch=True)
GLOBS = st.lists(st.one_of(PARTS, st.just("**"), st.from_regex(r"[ab*?]{1,3}", fullmatch=True).filter(
    lambda part: "**" not in part), st.just("[ab]*")), min_size=1, max_size=5)


@settings(STEADY, max_examples=300)
@given(GLOBS, st.lists(PARTS, min_size=1, max_size=5))
def test_globs_match_as_defined(pattern: list[str], path: list[str]) -> None:
    assert glob(".".join(pattern)).matches(".".join(path)) == plainly(pattern, path)


@settings(STEADY, max_examples=300)
@given(st.from_regex(r"([ab.]|\[ab\]|\\\.|[ab][*+?]|\([ab]+\)|\(a\|b\)\??){1,5}", fullmatch=True),
       st.from_regex(r"[ab.]{1,8}", fullmatch=True))
def test_regular_expressions_match_as_python_says(pattern: str, path: str) -> None:
    try:
        found = regex(pattern)
    except PatternError:
        assert sum(pattern.count(sign) for sign in "*+") > MOST_REPETITIONS
        return
    assert bool(found.fullmatch(path)) == bool(re.fullmatch(pattern, path))


def test_hostile_patterns_end() -> None:
    """Each of these takes a backtracking matcher longer than the age of the universe."""
    path = ".".join(["a" * 30] * 30) + "!"
    assert not glob(".".join(["**"] * 20 + ["b"])).matches(path)
    assert not glob(".".join(["**", "a*"] * 12 + ["b"])).matches(path)
    assert not glob(("*a" * 15) + "b.**").matches(path)
    for pattern in (r"(a+)+b", r"(a|a)*b", r"((a*)b?)*", r"(?:a+){2,}", r"(a?){30}b", "a*" * 10 + "b",
                    "a?" * 30 + "a" * 30, r"(a+){9}", r"(.*)\1*(.*)*b", r"([ab]+.)+", "(?P<x>a+)+", "(a+){,}",
                    "a{,}" * 5):
        with pytest.raises(PatternError):
            regex(pattern)


@pytest.mark.parametrize("pattern", ["a**b", "a..b", ".a", "a.**b"])
def test_globs_that_are_none(pattern: str) -> None:
    with pytest.raises(PatternError):
        glob(pattern)


@pytest.mark.parametrize(("pattern", "path", "matches"), [
    (r"a[*+]+", "a*+", True), (r"\(a\)", "(a)", True), (r"[]*]+", "]*", True), (r"a{2}", "aa", True),
    (r"a{}", "a{}", True),
    (r"layer[0-9]+\.[0-9]+", "layer1.0", True), (r"(?:conv|bn)1?", "bn1", True), (r"[^\]]*", "abc", True)])
def test_signs_that_are_no_repetition_are_let_through(pattern: str, path: str, matches: bool) -> None:
    assert bool(regex(pattern).fullmatch(path)) is matches
