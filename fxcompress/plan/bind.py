"""Binding: from selectors to the nodes of one graph, followed through its rewrites.

A policy-level `let` binds once, to the graph as it was captured; what it selected is followed. A selector in an action
binds when the action's turn comes. Nodes are remembered by name, which copies and skeletons share.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

from torch import fx

from ..diagnostics import Label, PolicyError, Sink
from ..graph.apply import carry_out, fitting
from ..graph.captured import Captured
from ..graph.distilled import distillations
from ..graph.select import Bound, Selecting, quoted
from ..graph.site import Outcome, Site
from ..passbase import VERBS
from ..passes.shared.distilling import remove_distillation
from ..policy.model import Action, Phase, Policy
from ..policy.selector import Flow, Helper, Ref, Selector, SetOp, Where
from .conflicts import sequential
from .lower import Step


def inner(selector: Selector) -> tuple[Selector, ...]:
    """The selectors that `selector` is made of, one level down."""
    match selector:
        case Where(base=base):
            return (base,)
        case Flow(parts=parts) | SetOp(parts=parts):
            return parts
        case Helper(args=args):
            return tuple(arg for arg in args if not isinstance(arg, int))
    return ()


def refs(selector: Selector) -> Iterator[Ref]:
    """The names of `let`s in `selector`."""
    if isinstance(selector, Ref):
        yield selector
    for part in inner(selector):
        yield from refs(part)


class Binder:
    """The selections of one policy on one graph. `lets` bind at once; ask for the `site` of each action in its turn.

    What is wrong goes to `sink`; without one, it is raised as PolicyError.
    """

    def __init__(self, policy: Policy, captured: Captured, sink: Sink | None = None) -> None:
        self.policy, self.captured = policy, captured
        self.sink, self.raises = (sink, False) if sink is not None else (Sink(), True)
        self.lets: dict[str, Bound] = {}
        self.names: dict[str, tuple[str, ...]] = {}
        self.broken: set[str] = set()
        self.fates: dict[str, str] = {}  # name of a node that is gone without a successor -> which action took it
        self._selecting: Selecting | None = None
        self.teaching: dict[str, Phase] = {}  # the calls of what the model learns from, and while which phase it does
        for name in policy.lets:
            self._bind(name)
        self._raise()

    def _bind(self, name: str) -> None:
        if name in self.lets:
            return
        selector = self.policy.lets[name]
        for ref in refs(selector):
            self._bind(ref.name)
        before = len(self.sink.items)
        nodes = self.selecting().select(selector, optional=True)
        if len(self.sink.items) > before or any(ref.name in self.broken for ref in refs(selector)):
            self.broken.add(name)
        self.lets[name] = Bound(nodes, selector)
        self.names[name] = tuple(node.name for node in nodes)

    def selecting(self) -> Selecting:
        """Selections on the graph as it is now."""
        if self._selecting is None:
            self._selecting = Selecting(self.captured, self.lets, self.sink)
        return self._selecting

    def _raise(self) -> None:
        if self.raises:
            self.sink.raise_if_errors(PolicyError)

    def site(self, phase: Phase, action: Action, leaves: frozenset[str] = frozenset(), lenient: bool = False,
             ) -> Site | None:
        """Where `action` works now, without the nodes it leaves to others; None where that is nothing: the action is
        optional, all is left to others, or something is wrong. `lenient` lets any action come to nothing."""
        nodes = self._nodes(action, lenient or action.optional) if action.selector is not None else ()
        self._raise()
        if nodes is None:
            return None
        kept = tuple(node for node in nodes if node.name not in leaves)
        if action.selector is not None and not kept:
            return None
        selection = action.selector.span.text if action.selector is not None else ""
        teachers = self.captured.teachers
        teacher = teachers.of(action.teacher) if teachers is not None and action.teacher is not None else None
        return Site(kept, action.what, action.span, phase.name, selection, window=phase.window, teacher=teacher)

    def _nodes(self, action: Action, optional: bool) -> tuple[fx.Node, ...] | None:
        selector = action.selector
        assert selector is not None
        before = len(self.sink.items)
        if any(ref.name in self.broken for ref in refs(selector)):
            return None
        for ref in refs(selector):
            self._check_gone(ref, optional)
        if len(self.sink.items) > before:
            return None
        selecting = self.selecting()
        nodes = selecting.select(selector, optional)
        nodes = fitting(VERBS[action.verb], selecting, selector, nodes)
        if len(self.sink.items) == before:
            return nodes
        self.broken.update(ref.name for ref in refs(selector) if not self.names[ref.name])  # told once is enough
        return None

    def _check_gone(self, ref: Ref, optional: bool) -> None:
        """Report nodes of a `let` that are gone and left no successor."""
        alive = self.selecting().names
        gone = [name for name in self.names[ref.name] if name not in alive and not self.captured.nodes_named([name])]
        if not gone or optional:
            return
        notes = [f"`{name}` went with {self.fates[name]}" for name in gone if name in self.fates]
        are = "is" if len(gone) == 1 else "are"
        self.sink.error(
            "FXC0209", f"`{ref.name}` selects {quoted(gone, 'and')}, which {are} no longer there",
            ref.span, "used after its layers are gone",
            secondary=(Label(self.policy.lets[ref.name].span, "bound here, before anything was rewritten"),),
            notes=tuple(notes), help="select what is there now with a selector in the action, or say `optional`")

    def on(self, captured: Captured) -> Binder:
        """The same selections on a copy of the graph; what is wrong there goes to a sink of its own."""
        other = copy(self)
        other.captured, other.sink, other.raises, other._selecting = captured, Sink(), False, None
        other.broken, other.fates, other.teaching = set(self.broken), dict(self.fates), dict(self.teaching)
        other.follow()
        return other

    def follow(self) -> None:
        """Bind every `let` to what its nodes have become, after a rewrite."""
        self.lets = {name: Bound(self.captured.nodes_named(names), self.policy.lets[name])
                     for name, names in self.names.items()}
        self._selecting = None

    def _end_before(self, phase: Phase) -> None:
        """Take out what the model learnt from in phases that have ended when `phase` begins; in training the engine has
        done so."""
        over = [name for name, other in self.teaching.items()
                if other.window is not None and sequential(self.policy, other, phase)]
        for node in self.captured.nodes_named(over):
            remove_distillation(self.captured, node)
            self.captured.refresh()
        for name in over:
            del self.teaching[name]

    def carry_out(self, step: Step, site: Site, checked: bool = True) -> Outcome:
        """Run `step` at `site`, verify (unless not `checked`), and follow the nodes of every `let`. Raises what
        `apply.carry_out` does."""
        self._end_before(step.phase)
        before = {node.name for node in self.captured.graph.nodes}
        taught = distillations(self.captured.graph)
        outcome = carry_out(self.captured, step.pass_, site) if checked else step.pass_.rewrite(self.captured, site)
        self.teaching.update({node.name: step.phase for node in distillations(self.captured.graph)
                              if node not in taught})
        now = {node.name for node in self.captured.graph.nodes}
        where = f"`{step.action.verb} {site.selection}`, {step.action.span}"
        self.fates.update({name: where for name in before - now
                           if not self.captured.nodes_named([name])})
        self.follow()
        return outcome
