"""Random policies for property tests: valid trees as text, and texts that were valid once."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

STEADY = settings(deadline=None, derandomize=True, database=None)  # the same examples in every run

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).map(lambda name: f"{name}_x")
NUMBERS = st.one_of(st.integers(0, 10**6).map(str), st.decimals(0, 1000, places=3).map(str))
QUANTITIES = st.tuples(NUMBERS,
                       st.sampled_from(("%", " %", "k", " M", " KiB", "MiB", " bits", " steps", " epoch", "ms"))
                       ).map("".join)
STRINGS = st.from_regex(r'"(layer|[a-z*.]|\\"|\\\\|ö){0,8}"', fullmatch=True)
VALUES = st.one_of(NUMBERS, QUANTITIES, STRINGS, NAMES, st.sampled_from(("2:4", "true", "- 3", 're"a\\.b"', "*")))
GAPS = st.sampled_from((" ", "  ", "\t", ""))
BREAKS = st.sampled_from(("\n", "\n\n", "  # why\n", "\n    # alone\n", "\r\n", "\n\n\n\n"))


def _call(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    inner = st.one_of(values, st.tuples(values, values).map(" -> ".join), st.tuples(NAMES, values).map("=".join))
    return st.tuples(NAMES, GAPS, st.lists(inner, max_size=3).map(" , ".join)).map(lambda t: f"{t[0]}{t[1]}({t[2]})")


def _where(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    condition = st.tuples(NAMES, st.sampled_from(("~", ">=", "<", "==", "!= ")), values).map("".join)
    return st.tuples(NAMES, GAPS, st.lists(condition, min_size=1, max_size=3).map(",\n   ".join)).map(
        lambda t: f"{t[0]}{t[1]}[{t[2]}]")


def _joined(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(values, st.sampled_from(("|", " & ", " - ", ">>", " >> ")), values).map("".join)


EXPRESSIONS = st.recursive(VALUES, lambda values: st.one_of(
    _call(values), _where(values), _joined(values), values.map(lambda text: f"( {text} )")), max_leaves=6)


@st.composite
def settings_block(draw: st.DrawFn) -> str:
    entries = draw(st.lists(st.tuples(NAMES, GAPS, EXPRESSIONS).map(lambda t: f"{t[0]}{t[1]}={t[2]}"), max_size=4))
    if draw(st.booleans()):
        return "{ " + ", ".join(entries) + draw(GAPS) + "}"
    return "{" + "".join(draw(BREAKS) + entry for entry in entries) + draw(BREAKS) + "}"


@st.composite
def actions(draw: st.DrawFn) -> str:
    head = draw(st.sampled_from(("", "override ", "optional  override\t"))) + draw(NAMES)
    clauses = draw(st.sampled_from(("", " as quick_x", " from teacher_x  as q_x")))
    block = f" {draw(settings_block())}" if draw(st.booleans()) else ""
    return f"{head} {draw(EXPRESSIONS)}{clauses}{block}"


@st.composite
def phases(draw: st.DrawFn) -> str:
    over = draw(st.sampled_from(("", " over epochs 0 .. 12", " over 0%..40 % of training")))
    after = draw(st.sampled_from(("", " after a_x", " after a_x ,b_x")))
    body = "".join(draw(BREAKS) + item for item in draw(st.lists(actions(), max_size=3)))
    return f"phase {draw(NAMES)}{over}{after} {{{body}{draw(BREAKS)}}}"


@st.composite
def policies(draw: st.DrawFn) -> str:
    """A policy that parses; its names and types are random."""
    statements = st.one_of(
        st.tuples(NAMES, EXPRESSIONS).map(lambda t: f"let {t[0]}={t[1]}"), actions(), phases(),
        st.just("target   cpu"), st.just("input x_x :f32[ N,3 ]"),
        EXPRESSIONS.map(lambda text: f"expect {text} < 5% else \"so\""), EXPRESSIONS.map(lambda text: f"budget {text}"))
    body = "".join(draw(BREAKS) + item for item in draw(st.lists(statements, max_size=6)))
    head = draw(st.sampled_from(("", "# head\n\n\n", 'use "std/prune.fxc"  {half,slim\n two_four}\n',
                                 "preset a_x for mask { b_x=2 }\n")))
    params = draw(st.sampled_from(("", "()", "( a_x:percent=5%,b_x : int )")))
    return f"{head}policy {draw(NAMES)}{params} {{{body}{draw(BREAKS)}}}{draw(BREAKS)}"


PIECES = ("1e999", "1e308 GB", "{", "}", "(", ")", "[", "]", "=", "==", '"', 're"', "\n", ",", "->", "<-", ">>", "..",
          "phase", "policy", "let",
          "use", "mask", "conv2d", "3", "60%", "2:4", "*", "-", "|", "of", "over", "after", "as", "#", "ö", "\0", "\t",
          "\r",
          ":", "else", "for", "preset", "budget", "expect", "pair", "optional", "\ufeff", "“", "\x1b[31m")


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A policy with pieces taken out and put in."""
    text = draw(policies())
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from((*PIECES, ""))) + text[at + draw(st.integers(0, 3)):]
    return text
