"""Which statement may stand where. The grammar takes any statement in any block, for the sake of these messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..diagnostics import Fix, Sink, nearest
from ..source import Span
from . import ast, schema
from .words import STATEMENTS, listed

#: what each statement is called, and the places where it may stand
STATEMENT: Mapping[type, tuple[str, tuple[str, ...]]] = {
    ast.Use: ("`use`", ("file",)),
    ast.PolicyDecl: ("`policy`", ("file",)),
    ast.PresetDecl: ("`preset`", ("file",)),
    ast.Let: ("`let`", ("file", "policy")),
    ast.Target: ("`target`", ("policy",)),
    ast.Input: ("`input`", ("policy",)),
    ast.Phase: ("`phase`", ("policy",)),
    ast.Action: ("an action", ("policy", "phase")),
    ast.Budget: ("`budget`", ("policy",)),
    ast.Expect: ("`expect`", ("policy",)),
    ast.Pair: ("`pair`", ("action",)),
    ast.Setting: ("a setting", ("action", "preset", "pair")),
}
POLICY_SETTINGS = ("precision",)  # the settings that stand in a policy itself
PLACE = {
    "file": "at the top of a file", "policy": "in a policy", "phase": "in a phase",
    "action": "in the block of an action",
    "preset": "in a preset", "pair": "in a pair",
}


def check_places(items: Iterable[ast.Statement], place: str, sink: Sink) -> None:
    """Report every statement that stands where it can't, in blocks of blocks too. They nest no deeper than brackets."""
    for item in items:
        known = STATEMENT.get(type(item))
        of_policy = place == "policy" and isinstance(item, ast.Setting) and item.key.text in POLICY_SETTINGS
        if known is not None and place not in known[1] and place != "broken" and not of_policy:
            _misplaced(item, *known, place, sink)
            continue
        inner = getattr(item, "body", None)
        if isinstance(inner, ast.Block):
            check_places(inner.items, _INSIDE[type(item)], sink)


_INSIDE: Mapping[type, str] = {
    ast.PolicyDecl: "policy", ast.PresetDecl: "preset", ast.Phase: "phase", ast.Action: "action", ast.Pair: "pair",
    ast.Broken: "broken",
}


def _misplaced(item: ast.Statement, called: str, allowed: tuple[str, ...], place: str, sink: Sink) -> None:
    span, help_ = item.span, f"move it: {called} stands {listed([PLACE[each] for each in allowed])}"
    fixes: tuple[Fix, ...] = ()
    if isinstance(item, ast.Action):
        span = item.head
        if item.verb.text not in schema.verb_names():
            near = nearest(item.verb.text, STATEMENTS, 1)
            if near:
                help_, fixes = f"did you mean `{near[0]}`?", (Fix(item.verb.span, near[0]),)
    elif isinstance(item, ast.Phase | ast.PolicyDecl | ast.PresetDecl):
        span = Span(item.span.source, item.span.start, item.name.span.end)
    sink.error("FXC0011", f"{called} can't stand {PLACE[place]}", span, "misplaced", help=help_, fixes=fixes)
