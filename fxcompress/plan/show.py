"""A plan as text for a terminal, and as a table for a notebook."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from .model import Change, Plan, PlannedPhase, PlannedStep, Totals
from .text import amount, percent

SIGNS = {"topology": "-", "shape": "~", "mask": "+", "loss": "+", "numeric": "~"}  # what an action does to the graph
FEW = 4


def show(plan: Plan, verbose: bool = False) -> str:
    """The plan as plain text, one action a line with the place it comes from; with `verbose`, layer by layer."""
    lines = [f"plan {plan.policy} for {plan.model or 'a model'}, target {plan.target}"]
    for phase in plan.phases:
        steps = [step for step in plan.steps if step.phase == phase.name]
        lines += ["", _heading(phase), *_aligned(steps, verbose)]
    lines += ["", *_totals(plan)]
    if verbose:
        lines += ["", *_layers(plan)]
    verdicts = [(budget.text, budget.shown + ("  met" if budget.state == "met" else ""), budget.place)
                for budget in plan.budgets]
    verdicts += [(expect.text, "(known after measuring)", expect.place) for expect in plan.expects]
    if verdicts:
        lines += ["", *_columns(verdicts)]
    lines += ["", *(f"note: {note}" for note in plan.notes)] if plan.notes else []
    return "\n".join(lines) + "\n"


def _heading(phase: PlannedPhase) -> str:
    """`phase shrink  epochs 0..12  after warmup`."""
    parts = [f"phase {phase.name}", phase.window, f"after {', '.join(phase.after)}" if phase.after else ""]
    return "  ".join(part for part in parts if part)


def _aligned(steps: list[PlannedStep], verbose: bool) -> list[str]:
    """The lines of one phase: heads in columns, details below them."""
    heads = _columns([(f"  {SIGNS[step.facet]} {headline(step)}", summary(step), step.place) for step in steps])
    lines = []
    for head, step in zip(heads, steps, strict=True):
        lines.append(head)
        if step.settings:
            lines.append("      " + ", ".join(f"{name} = {value}" for name, value in step.settings))
        if step.left:
            lines.append(f"      left to an override: {', '.join(step.left)}")
        if verbose:
            lines += [f"      {row}" for row in _columns([_row(change) for change in step.changes])]
        every = verbose or len(step.notes) <= FEW or step.facet == "loss"  # these say what is done, term by term
        shown = step.notes if every else step.notes[: FEW - 1]
        lines += [f"      note: {note}" for note in shown]
        if len(shown) < len(step.notes):
            lines.append(f"      ({len(step.notes) - len(shown)} more notes in the verbose plan)")
        lines += [f"      (known after weights): {item}" for item in step.unknown]
    return lines


def headline(step: PlannedStep) -> str:
    """`remove channels(body)`."""
    selection = f"{step.what}({step.selection})" if step.what else step.selection
    return f"{'override ' if step.override else ''}{step.verb} {selection}".rstrip()


def summary(step: PlannedStep) -> str:
    """`19 conv2d (+ 1 coupled: conv1), out_channels 64 -> 44 ... 512 -> 360`."""
    selected = ", ".join(f"{count} {kind}" for kind, count in step.kinds) or (
        "" if step.facet == "loss" else "nothing")
    coupled = list(dict.fromkeys(c.path for c in step.changes if c.why.startswith("coupled")))
    names = ", ".join(coupled[:FEW]) + (", ..." if len(coupled) > FEW else "")
    more = f" (+ {len(coupled)} coupled: {names})" if coupled else ""
    own = [c for c in step.changes if c.why.startswith(("selected", "coupled"))]
    return ": ".join(part for part in (selected + more, _span_of(own)) if part)


def _span_of(changes: list[Change]) -> str:
    """`out_channels 64 -> 44 ... 512 -> 360`: the first kind of change, its smallest and its largest."""
    if not changes:
        return ""
    what = changes[0].what.partition(" of ")[0]  # "sparsity of conv1.weight"
    steps = list(dict.fromkeys(_arrow(c) for c in sorted(changes, key=_size) if c.what.startswith(what)))
    return f"{what} {steps[0]}" + (f" ... {steps[-1]}" if len(steps) > 1 else "")


def _arrow(change: Change) -> str:
    return change.after if "->" in change.after else f"{change.before} -> {change.after}"


def _size(change: Change) -> tuple[float, str]:
    return (float(change.before) if change.before.isdecimal() else 0.0, change.before)


def _row(change: Change) -> tuple[str, ...]:
    return change.path, change.kind, change.what, _arrow(change), change.why


def _totals(plan: Plan) -> list[str]:
    """Three figures before and after."""
    return _columns([("", "before", "after", ""), *_figures(plan.before, plan.after)])


def _figures(before: Totals, after: Totals) -> list[tuple[str, str, str, str]]:
    rows = [("parameters", before.params, after.params, ""), ("MACs a sample", before.macs, after.macs, ""),
            ("size", before.bytes, after.bytes, "B")]
    return [(name, amount(old, unit), amount(new, unit), percent(new / old) if old else "")
            for name, old, new, unit in rows]


def _layers(plan: Plan) -> list[str]:
    rows: list[tuple[str, ...]] = [("layer", "kind", "shape", "params", "MACs")]
    for layer in plan.layers:
        old, new = layer.before, layer.after
        pairs = [(getattr(old, name, None), getattr(new, name, None)) for name in ("shape", "params", "macs")]
        rows.append((layer.path, layer.kind, *(_pair(*pair) for pair in pairs)))
    return _columns(rows)


def _pair(old: object, new: object) -> str:
    """`64 -> 44`, or the one value where nothing changes."""
    old, new = (amount(value) if isinstance(value, int) else str(value or "none") for value in (old, new))
    return old if old == new else f"{old} -> {new}"


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows with their columns aligned, two blanks apart."""
    table = list(rows)
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))] if table else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def html(plan: Plan) -> str:
    """The plan as HTML tables: steps, and totals."""
    steps = [(step.phase, headline(step), summary(step), ", ".join(f"{k} = {v}" for k, v in step.settings),
              "; ".join((*step.notes, *(f"(known after weights): {item}" for item in step.unknown))), step.place)
             for step in plan.steps]
    checks = [(budget.text, f"{budget.shown} {budget.state}", budget.place) for budget in plan.budgets]
    checks += [(expect.text, "(known after measuring)", expect.place) for expect in plan.expects]
    return "".join((
        f"<h4>plan {escape(plan.policy)} for {escape(plan.model or 'a model')}</h4>",
        _table(("phase", "action", "what", "settings", "notes", "place"), steps),
        _table(("", "before", "after", ""), _figures(plan.before, plan.after)),
        _table(("constraint", "state", "place"), checks) if checks else "",
    ))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + f"</tr>{cells}</table>"
