"""The one conflict rule: two actions that write the same facet of one node at the same time are an error that shows
both places, and only `override` wins. docs/adr/conflicts-and-time.md says why, and what "at the same time" is.

An action writes its facet of every node it selects, and of what is coupled to those (changes whose `why` begins with
"coupled"), by what it changes: output channels taken from a layer and input channels taken from it are no conflict.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import fx

from ..diagnostics import Diagnostic, Label, Sink
from ..graph.captured import Captured
from ..graph.select import label, quoted
from ..graph.site import Change, Outcome, Site
from ..passbase import Facet
from ..policy.model import Phase, Policy
from .lower import Step

START = "(start)"  # the phase of actions that stand outside any: it comes before all others
FEW = 6
SELECTED, COUPLED = "selected", "coupled"  # how the `why` of a change begins that an action makes by itself


def sequential(policy: Policy, one: Phase, other: Phase) -> bool:
    """Whether one of two different phases has ended before the other begins: one follows the other by `after`, over any
    number of phases, and their windows don't overlap. Windows in different units may overlap."""
    if one.name == other.name:
        return False
    if START in (one.name, other.name):
        return True
    by_name = {phase.name: phase for phase in policy.phases}
    if other.name not in _before(one, by_name) and one.name not in _before(other, by_name):
        return False
    if one.window is None or other.window is None:
        return True
    same_unit = one.window.unit == other.window.unit
    return same_unit and (one.window.end <= other.window.start or other.window.end <= one.window.start)


def _before(phase: Phase, by_name: dict[str, Phase]) -> set[str]:
    """The names of all phases that `phase` comes after."""
    found: set[str] = set()
    ahead = list(phase.after)
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead.extend(by_name[name].after)
    return found


@dataclass(frozen=True)
class Write:
    """That a step writes its facet of a node, which was called `name` then; `why` as in `Change`."""

    step: Step
    name: str
    why: str = SELECTED

    @property
    def facet(self) -> Facet:
        """The facet written."""
        return self.step.pass_.facet


@dataclass
class Ledger:
    """What was written so far, by the names that nodes have now. `leaves` collects, for each overridden step, the names
    (when its turn came) of the nodes that it must leave alone: then the plan is made anew with them."""

    policy: Policy
    sink: Sink
    selected: dict[str, list[Write]] = field(default_factory=dict)
    changed: dict[tuple[str, str], list[Write]] = field(default_factory=dict)
    leaves: dict[int, set[str]] = field(default_factory=dict)
    overrode: set[int] = field(default_factory=set)  # steps with `override` that did override something
    _reported: set[tuple[int, int]] = field(default_factory=set)

    def claim(self, step: Step, site: Site) -> Site:
        """Enter that `step` writes the nodes of `site`; returns the site without nodes that are in conflict or
        overridden. Conflicts go to the sink."""
        clashes: dict[int, list[tuple[fx.Node, Write]]] = {}
        for node in site.nodes:
            for write in self.selected.get(node.name, ()):
                if write.facet == step.pass_.facet and self._concurrent(write.step, step):
                    clashes.setdefault(write.step.number, []).append((node, write))
        dropped: set[fx.Node] = set()
        for pairs in clashes.values():
            dropped.update(node for node, _ in pairs)
            self._settle(step, pairs)
        kept = tuple(node for node in site.nodes if node not in dropped)
        for node in kept:
            self.selected.setdefault(node.name, []).append(Write(step, node.name))
        return replace(site, nodes=kept)

    def _settle(self, step: Step, pairs: list[tuple[fx.Node, Write]]) -> None:
        """Two steps that both select some nodes: one overrides, or it is an error."""
        other = pairs[0][1].step
        if step.action.override and not other.action.override:
            self.leaves.setdefault(other.number, set()).update(write.name for _, write in pairs)
            self.overrode.add(step.number)
        elif other.action.override and not step.action.override:
            self.leaves.setdefault(step.number, set()).update(node.name for node, _ in pairs)
            self.overrode.add(other.number)
        else:
            self._report(step, other, [label(node) for node, _ in pairs])

    def _report(self, step: Step, other: Step, labels: list[str]) -> None:
        if (other.number, step.number) in self._reported:
            return
        self._reported.add((other.number, step.number))
        both = step.action.override and other.action.override
        notes = ["both say `override`: then neither wins"] if both else []
        notes += _time_note(other.phase, step.phase)
        self.sink.items.append(Diagnostic(
            "FXC0301", f"two actions write the {step.pass_.facet} of {_layers(labels)}",
            Label(step.action.span, "written again here"), (Label(other.action.span, "first written here"),),
            tuple(notes),
            "take the layers out of one of the selections; or say `override` before the action that shall win"
            if not both else "keep `override` at the one that shall win"))

    def enter(self, step: Step, site: Site, outcome: Outcome, captured: Captured) -> None:
        """Enter what `step` changed beside what it selected, and follow nodes that were replaced."""
        self._follow(captured)
        by_label = {label(node): node.name for node in captured.graph.nodes}
        clashes: dict[int, list[tuple[Change, Write]]] = {}
        for change in outcome.changes:
            if change.path not in by_label or not change.why.startswith((SELECTED, COUPLED)):
                continue
            written = self.changed.setdefault((by_label[change.path], change.what), [])
            for write in written:
                coupled = write.why.startswith(COUPLED) or change.why.startswith(COUPLED)
                if coupled and write.facet == step.pass_.facet and self._concurrent(write.step, step):
                    clashes.setdefault(write.step.number, []).append((change, write))
            written.append(Write(step, by_label[change.path], change.why))
        for pairs in clashes.values():
            self._report_coupled(step, pairs)

    def _concurrent(self, one: Step, other: Step) -> bool:
        return one.number != other.number and not sequential(self.policy, one.phase, other.phase)

    def _report_coupled(self, step: Step, pairs: list[tuple[Change, Write]]) -> None:
        """Two steps change one layer that not both select: `override` can't part what is coupled."""
        other = pairs[0][1].step
        if (other.number, step.number) in self._reported:
            return
        self._reported.add((other.number, step.number))
        notes = [f"`{change.path}` is {why}" for change, write in pairs[:FEW]
                 for why in (write.why, change.why) if why.startswith(COUPLED)]
        self.sink.items.append(Diagnostic(
            "FXC0302", f"two actions change {pairs[0][0].what} of {_layers(change.path for change, _ in pairs)}",
            Label(step.action.span, "changed again here"), (Label(other.action.span, "first changed here"),),
            tuple(notes),
            "select layers that are coupled in one action (`coupled(...)` selects them), or put the actions in phases "
            "that follow one another"))

    def _follow(self, captured: Captured) -> None:
        """Carry entries of nodes that are gone over to their successors."""
        alive = {node.name for node in captured.graph.nodes}
        for name in [name for name in self.selected if name not in alive]:
            for node in captured.nodes_named([name]):
                self.selected.setdefault(node.name, []).extend(self.selected[name])
            del self.selected[name]
        for key in [key for key in self.changed if key[0] not in alive]:
            for node in captured.nodes_named([key[0]]):
                self.changed.setdefault((node.name, key[1]), []).extend(self.changed[key])
            del self.changed[key]


def _layers(labels: Iterable[str]) -> str:
    """`` `a`, `b` and 3 more``."""
    names = list(dict.fromkeys(labels))
    if len(names) > FEW:
        return f"{', '.join(f'`{name}`' for name in names[:FEW])} and {len(names) - FEW} more"
    return quoted(names).replace(" or ", " and ")


def _time_note(one: Phase, other: Phase) -> list[str]:
    """Why two different phases count as running at the same time."""
    if one.name == other.name:
        return []
    if one.window is not None and other.window is not None and one.window.unit != other.window.unit:
        return [f"`{one.name}` and `{other.name}` have windows in different units: whether they overlap can't be said"]
    return [f"phases `{one.name}` and `{other.name}` may run at the same time; `after` puts one behind the other"]
