"""When phases run: their windows, and the order that `after` asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from ..diagnostics import Fix, Label, Sink, nearest
from . import ast
from .units import canonical, show_number, show_percent, to_base
from .values import Window
from .words import quoted

WORDS = ("epochs", "steps", "training")


def read_window(phase: ast.Phase, sink: Sink) -> Window | None:
    """The window of a phase, None without one or after an error."""
    overs = [clause for clause in phase.clauses if isinstance(clause, ast.Over)]
    if not overs:
        return None
    if len(overs) > 1:
        sink.error("FXC0104", f"phase `{phase.name.text}` has two windows", overs[1].span, "again",
                   secondary=(Label(overs[0].span, "first here"),), help="keep one of the two")
    over = overs[0]
    word = canonical(over.word.text)
    if word not in WORDS:
        known = nearest(word, WORDS, 1)
        sink.error("FXC0126", f"a phase can't run over `{over.word.text}`", over.word.span, f"expected {quoted(WORDS)}",
                   help=f"did you mean `{known[0]}`?" if known else
                   "write `over epochs 0..12`, `over steps 0..5000` or `over 0%..40% of training`",
                   fixes=(Fix(over.word.span, known[0]),) if known else ())
        return None
    bounds = [_bound(word, item, sink) for item in (over.start, over.end)]
    start, end = bounds
    if start is None or end is None:
        return None
    if start >= end:
        sink.error("FXC0124",
                   f"the window of phase `{phase.name.text}` {'is empty' if start == end else 'runs backwards'}",
                   over.start.span.to(over.end.span), "from its start to before its end",
                   help="write the smaller number first; the end is not part of the window")
        return None
    unit: Literal["steps", "epochs", "training"] = word  # type: ignore[assignment]
    return Window(start, end, unit)


def _bound(word: str, bound: ast.Number | ast.Quantity, sink: Sink) -> float | None:
    if word == "training":
        if isinstance(bound, ast.Quantity) and bound.unit == "%" and 0 <= bound.value <= 100:
            return bound.value / 100
        fix = f"{show_number(bound.value)}%" if isinstance(bound, ast.Number) and 1 < bound.value <= 100 else None
        wanted = "a percentage from 0% to 100%"
    else:
        if isinstance(bound, ast.Number) and (word == "epochs" or isinstance(bound.value, int)):
            return bound.value
        is_count = isinstance(bound, ast.Quantity) and bound.unit in ("k", "M")
        scaled = to_base(bound.value, bound.unit) if isinstance(bound, ast.Quantity) and is_count else None
        if isinstance(scaled, int):
            return scaled
        fix = show_number(bound.value) if isinstance(bound, ast.Quantity) and canonical(bound.unit) == word else None
        wanted = "a number" if word == "epochs" else "a whole number"
    sink.error("FXC0124", f"a window over {word} is bounded by {wanted}, found `{bound.span.text}`", bound.span, "",
               help=f"write `{fix}`" if fix is not None else "write `over epochs 0..12` or `over 0%..40% of training`",
               fixes=(Fix(bound.span, fix),) if fix is not None else ())
    return None


def show_window(window: Window) -> str:
    """`epochs 0..12`, `0%..40% of training`."""
    if window.unit == "training":
        return f"{show_percent(window.start)}..{show_percent(window.end)} of training"
    return f"{window.unit} {show_number(window.start)}..{show_number(window.end)}"


def in_order(phases: Sequence[ast.Phase], windows: Mapping[str, Window | None], broken: frozenset[str],
             sink: Sink) -> list[ast.Phase]:
    """`phases` in running order: every one after those its `after` names; among those that could be next, the one whose
    window begins first, then the one written first. Cycles, unknown names and windows that contradict are reported."""
    by_name = {phase.name.text: phase for phase in phases}
    before = {phase.name.text: _names(phase, by_name, broken, sink) for phase in phases}
    waiting = dict.fromkeys(by_name)
    mixed = len({window.unit for window in windows.values() if window is not None}) > 1
    ends: dict[str, Window | None] = {}  # the last window that a phase or what it waits for has
    ordered: list[ast.Phase] = []
    while waiting:
        ready = [name for name in waiting if not any(item in waiting for item in before[name])]
        if not ready:
            _cycle([by_name[name] for name in waiting], before, sink)
            return [*ordered, *(by_name[name] for name in waiting)]
        name = min(ready,
                   key=lambda each: 0.0 if mixed else _start(windows[each], [ends[item] for item in before[each]]))
        del waiting[name]
        ordered.append(by_name[name])
        ends[name] = _end(by_name[name], windows[name], {item: ends[item] for item in before[name]}, by_name, sink)
    return ordered


def _names(phase: ast.Phase, known: Mapping[str, ast.Phase], broken: frozenset[str], sink: Sink) -> list[str]:
    """What a phase comes after, without the unknown names."""
    found: dict[str, ast.Name] = {}
    for name in (name for clause in phase.clauses if isinstance(clause, ast.After) for name in clause.names):
        if name.text in found:
            sink.error("FXC0104", f"`{name.text}` stands twice behind `after`", name.span, "again",
                       secondary=(Label(found[name.text].span, "first here"),), help="take one out")
        elif name.text in known:
            found[name.text] = name
        elif name.text not in broken:
            near = nearest(name.text, known, 1)
            sink.error("FXC0122", f"unknown phase `{name.text}`", name.span, "no phase has this name",
                       notes=(f"phases: {', '.join(known)}",), help=f"did you mean `{near[0]}`?" if near else
                       "name a phase of this policy", fixes=(Fix(name.span, near[0]),) if near else ())
    return list(found)


def _start(window: Window | None, before: Sequence[Window | None]) -> float:
    """When a phase may begin, where all windows have one unit. In different ones phases count as written."""
    if window is not None:
        return window.start
    return max((end.end for end in before if end is not None), default=0.0)


def _end(phase: ast.Phase, window: Window | None, before: Mapping[str, Window | None], by_name: Mapping[str, ast.Phase],
         sink: Sink) -> Window | None:
    """The window that ends last of this phase and those before it; a start before their end is reported."""
    for name, end in before.items():
        if window is not None and end is not None and end.unit == window.unit and window.start < end.end:
            place = next(clause for clause in phase.clauses if isinstance(clause, ast.Over))
            sink.error("FXC0125", f"phase `{phase.name.text}` starts before `{name}`, which it comes after, has ended",
                       place.span, f"starts in {show_window(window)}",
                       secondary=(Label(by_name[name].name.span, f"ends in {show_window(end)}"),),
                       help="let it start where the other ends, or take the `after` out")
    if window is not None:
        return window
    known = [end for end in before.values() if end is not None]
    return max(known, key=lambda end: end.end) if known and len({end.unit for end in known}) == 1 else None


def _cycle(waiting: Sequence[ast.Phase], before: Mapping[str, Sequence[str]], sink: Sink) -> None:
    """Report one cycle among phases that wait for each other."""
    stuck = {phase.name.text for phase in waiting}
    name = waiting[0].name.text
    path: list[str] = []
    while name not in path:
        path.append(name)
        name = next(item for item in before[name] if item in stuck)
    path = path[path.index(name):]
    places = {phase.name.text: phase.name.span for phase in waiting}
    sink.error("FXC0123", f"phases wait for each other: {' after '.join(f'`{item}`' for item in [*path, path[0]])}",
               places[path[0]], "can never begin", secondary=tuple(Label(places[item]) for item in path[1:]),
               help="take one `after` out")
