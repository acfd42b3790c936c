"""`check --model`: every selector of a policy bound to a model, its inputs compared; nothing is rewritten."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..diagnostics import Diagnostic, Label, PlanError, PolicyError, Sink, nearest
from ..graph.captured import Captured
from ..graph.predicates import DTYPES
from ..graph.select import quoted
from ..passbase import VERBS, Facet
from ..policy import instantiate
from ..policy.model import Action, InputSpec, Phase, Policy
from ..policy.selector import Selector, Where
from .bind import Binder, inner, refs
from .lower import ordered, pass_of

MAKES_LAYERS = frozenset({Facet.TOPOLOGY, Facet.NUMERIC})


def check_model(policy: Policy, captured: Captured) -> list[Diagnostic]:
    """What is wrong with `policy` for this model, all of it: FXC02xx, and FXC0133 for parameters without a value.

    Selectors in actions bind to the model as it is. Behind an action that makes layers, or changes sizes that the
    selector asks for, they may mean what isn't there yet: there, what selects nothing is left to `plan`.
    """
    try:
        policy = instantiate(policy)
    except PolicyError as error:
        return list(error.diagnostics)
    sink = Sink()
    _check_inputs(policy, captured, sink)
    binder = Binder(policy, captured, sink)
    used: set[str] = set()
    done: set[Facet] = set()
    for phase, action in ordered(policy):
        if action.selector is not None:
            used.update(ref.name for ref in refs(action.selector))
            binder.site(phase, action, lenient=_may_come_later(action.selector, done))
        elif not done & MAKES_LAYERS:
            _check_pass(binder, phase, action, sink)
        done.add(VERBS[action.verb].facet)
    for expect in policy.expects:
        if expect.argument is not None and expect.argument != "output":
            used.update(ref.name for ref in refs(expect.argument))
            if not any(ref.name in binder.broken for ref in refs(expect.argument)):
                lenient = expect.metric == "count" or _may_come_later(expect.argument, done)
                binder.selecting().select(expect.argument, lenient)
    for name, selector in policy.lets.items():
        if name not in used | _inner(policy) and name not in binder.broken:
            binder.selecting().select(selector)
    return sink.items


def _check_pass(binder: Binder, phase: Phase, action: Action, sink: Sink) -> None:
    """What the pass itself says of an action without a selector."""
    try:
        site = binder.site(phase, action)
    except PlanError as error:
        sink.items.extend(replace(item, primary=item.primary or Label(action.span)) for item in error.diagnostics)
        return
    if site is not None:
        sink.items.extend(pass_of(action).check(binder.captured, site))


def _may_come_later(selector: Selector, done: set[Facet]) -> bool:
    """Whether actions that write the facets `done` can make what `selector` selects."""
    return bool(done & MAKES_LAYERS) or (Facet.SHAPE in done and _asks_facts(selector))


def _asks_facts(selector: Selector) -> bool:
    """Whether the selector itself, not the `let`s it uses, asks for facts besides names."""
    if isinstance(selector, Where) and any(predicate.key != "name" for predicate in selector.predicates):
        return True
    return any(_asks_facts(part) for part in inner(selector))


def _inner(policy: Policy) -> set[str]:
    """The `let`s that others use."""
    return {ref.name for selector in policy.lets.values() for ref in refs(selector)}


def _check_inputs(policy: Policy, captured: Captured, sink: Sink) -> None:
    """Compare every `input` declaration with the model's input of that name."""
    inputs = {str(node.target): node for node in captured.graph.nodes if node.op == "placeholder"}
    for spec in policy.inputs:
        node = inputs.get(spec.name)
        if node is None:
            near = nearest(spec.name, inputs)
            sink.error("FXC0210", f"{captured.model_name or 'this model'} has no input `{spec.name}`", spec.span,
                       notes=(f"its inputs are {', '.join(f'`{name}`' for name in inputs)}",),
                       help=f"did you mean {quoted(near)}?" if near else f"declare {quoted(inputs)}")
        else:
            _check_input(spec, node, sink)


def _check_input(spec: InputSpec, node: fx.Node, sink: Sink) -> None:
    fact = node.meta["fxc"]
    if not isinstance(fact.shape, tuple):
        return
    found = f"{DTYPES.get(str(fact.dtype), str(fact.dtype))}[{', '.join(map(str, fact.shape))}]"
    wanted = f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"
    dynamic = fact.dynamic if isinstance(fact.dynamic, tuple) else ()
    fits = len(spec.shape) == len(fact.shape) and all(
        size == actual if isinstance(size, int) else True for size, actual in zip(spec.shape, fact.shape, strict=True))
    named = [size for size, moves in zip(spec.shape, dynamic, strict=False) if isinstance(size, str) and not moves]
    if DTYPES.get(str(fact.dtype)) != spec.dtype or not fits:
        sink.error("FXC0210", f"input `{spec.name}` was declared {wanted}, and the example input is {found}", spec.span,
                   help="give example inputs of the declared type and sizes, or change the declaration")
    elif named:
        sink.error("FXC0210", f"dimension `{named[0]}` of input `{spec.name}` does not vary in the captured graph",
                   spec.span, notes=("only the batch, the first dimension, is dynamic",),
                   help=f"write its size: {found}")
