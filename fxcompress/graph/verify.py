"""The verifier: what must hold of a captured graph after every pass. One table, `INVARIANTS`, apart from the passes.

Invariants are checked in stages: what makes a graph, that it runs, what it means. A later stage is asked only where the
earlier ones hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from keyword import iskeyword
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from ..diagnostics import Diagnostic, Label, RewriteError
from ..nn.distillation import Distillation
from .captured import Captured, Origin
from .distilled import distillations, exposed, is_control
from .modules import leaf_of
from .ops import BY_TARGET, kind_of, module_of, path_of, submodule
from .provenance import origins_of
from .select import label
from .tree import named_tensors

if TYPE_CHECKING:
    from ..passbase import Pass
    from .site import Site

Signature = tuple[str, str, int]  # operation, target, parameters of its own


@dataclass(frozen=True)
class Before:
    """What the verifier remembers of a graph, to compare it with what a pass leaves."""

    inputs: tuple[str, ...]
    results: Any  # (shape, dtype) of what the model gives back
    nodes: Mapping[str, Signature]
    origins: Mapping[str, tuple[Origin, ...]]
    state: frozenset[str]  # the names in state_dict
    readers: Mapping[str, str]  # those of them that the graph reads -> a node that reads it
    trained: Mapping[str, bool]  # parameter -> requires_grad
    kinds: frozenset[str]

    @classmethod
    def of(cls, captured: Captured) -> Before:
        """Remember `captured` as it is now; its facts must be current."""
        graph = captured.module.graph
        named = named_tensors(captured.module)
        return cls(
            inputs=inputs_of(graph),
            results=results_of(graph),
            nodes={node.name: signature(node) for node in graph.nodes},
            origins={node.name: origins_of(node) for node in graph.nodes},
            state=frozenset(named.state),
            readers=readers(captured, named.state),
            trained={name: value.requires_grad for name, value in named.parameters.items()},
            kinds=frozenset(getattr(node.meta.get("fxc"), "kind", "") or kind_of(node) for node in graph.nodes),
        )


@dataclass(frozen=True)
class Violation:
    """An invariant that doesn't hold: at which node ("" for the whole graph), and how."""

    node: str
    reason: str


@dataclass(frozen=True)
class Invariant:
    """One row of the table."""

    name: str
    code: str
    stage: int
    check: Callable[[Captured, Before], Iterator[Violation]]
    refreshed: bool = False  # whether it held when the facts were computed, if they are those of the graph as it is


def signature(node: fx.Node) -> Signature:
    """What a pass changes when it changes what a node computes with."""
    return node.op, str(node.target), int(getattr(node.meta.get("fxc"), "params", 0))


def inputs_of(graph: fx.Graph) -> tuple[str, ...]:
    """The names of the model's inputs, without what only a distillation reads."""
    return tuple(str(node.target) for node in graph.nodes if node.op == "placeholder" and not is_control(node))


def results_of(graph: fx.Graph) -> Any:
    """(shape, dtype) of the output."""
    fact = next(iter(reversed(graph.nodes))).meta.get("fxc")
    return getattr(fact, "shape", None), getattr(fact, "dtype", None)


def readers(captured: Captured, state: Iterable[str]) -> dict[str, str]:
    """For every name of `state` that the graph reads, one node that reads it: or a module around the tensor."""
    nearest: dict[str, str | None] = {"": None}  # path -> the node at it, or else at the path around it
    for node in captured.module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            nearest[str(node.target)] = node.name

    def at(path: str) -> str | None:
        if path not in nearest:
            nearest[path] = at(path.rpartition(".")[0])
        return nearest[path]

    return {key: reader for key in state if (reader := at(key)) is not None}


# What makes a graph


def _targets(captured: Captured, before: Before) -> Iterator[Violation]:
    for node in captured.module.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        owner, _, name = str(node.target).rpartition(".")
        try:
            found = getattr(submodule(captured.module, owner), name, None)
        except AttributeError:
            found = None
        if found is None or (node.op == "call_module" and not isinstance(found, nn.Module)):
            yield Violation(node.name, f"its target `{node.target}` is not in the model")


def _lint(captured: Captured, before: Before) -> Iterator[Violation]:
    try:
        captured.module.graph.lint()
    except (RuntimeError, ValueError) as error:
        yield Violation("", str(error).strip().splitlines()[0])


def _in_place(captured: Captured, before: Before) -> Iterator[Violation]:
    for node in captured.module.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]
        function = node.op in ("call_function", "call_method")
        marked = name.endswith("_") and not name.endswith("__") and not iskeyword(name[:-1])  # `operator.and_` isn't
        if function and (marked or name in IN_PLACE_OPERATORS):
            yield Violation(node.name, f"`{name}` works in place")
        elif function and (node.kwargs.get("inplace") or node.kwargs.get("out") is not None):
            yield Violation(node.name, "it writes into one of its arguments")
        elif node.op == "call_module" and getattr(module_of(node), "inplace", False):
            yield Violation(node.name, f"its module `{node.target}` works in place")


IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "setitem"})


def _canonical(captured: Captured, before: Before) -> Iterator[Violation]:
    for node in captured.module.graph.nodes:
        known = (node.op == "call_function" and node.target in BY_TARGET) or (node.op == "call_module" and (
            leaf_of(type(module_of(node))) is not None or hasattr(module_of(node), "fxc_kind")))
        if node.op.startswith("call_") and not known and kind_of(node) not in before.kinds:
            yield Violation(node.name, f"`{kind_of(node)}` is not a canonical operator (graph/ops.py)")


# That it runs


def _runs(captured: Captured, before: Before) -> Iterator[Violation]:
    try:
        captured.refresh()
    except RewriteError as error:
        for found in error.diagnostics:
            yield Violation("", found.message + "".join(f"; {note}" for note in found.notes))


# What it means


def _signature_kept(captured: Captured, before: Before) -> Iterator[Violation]:
    graph = captured.module.graph
    inputs = inputs_of(graph)
    if inputs != before.inputs:
        yield Violation("", f"the inputs were {', '.join(before.inputs)} and are {', '.join(inputs) or 'none'}")
    results = results_of(graph)
    if results != before.results:
        yield Violation("output", f"the model gave {_shown(before.results)} and gives {_shown(results)}")


def _shown(results: Any) -> str:
    shape, dtype = results
    return f"{dtype} of shape {shape}"


def _state(captured: Captured, before: Before) -> Iterator[Violation]:
    now = dict.fromkeys(named_tensors(captured.module).state)
    read = readers(captured, now)
    present = {node.name for node in captured.module.graph.nodes}
    for key, reader in before.readers.items():
        if key not in now and reader in present:
            yield Violation(reader, f"`{key}` is gone from state_dict, and the layer is still there")
    for key in now:
        if key not in read and (key in before.readers or key not in before.state):
            yield Violation(key, "nothing in the graph reads it")


def _masks(captured: Captured, before: Before) -> Iterator[Violation]:
    for node in captured.module.graph.nodes:
        if node.op != "call_module" or kind_of(node) != "mask":
            continue
        weight, mask = node.args[0], getattr(module_of(node), "mask", None)
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not isinstance(mask, Tensor):
            yield Violation(node.name, "a mask must stand on a parameter")
            continue
        shape = getattr(weight.meta.get("fxc"), "shape", None)
        if tuple(mask.shape) != shape:
            yield Violation(node.name, f"the mask has shape {tuple(mask.shape)}, its parameter {shape}")
        for user in node.users:
            if kind_of(user) != "quantizer" and (user.op != "call_function" or not _has_holder(captured, user)):
                yield Violation(user.name, "a masked weight must be read by a function that stands at its layer's path")


def _has_holder(captured: Captured, node: fx.Node) -> bool:
    try:
        captured.module.get_submodule(path_of(node))
    except AttributeError:
        return False
    return True


def _provenance(captured: Captured, before: Before) -> Iterator[Violation]:
    for node in captured.module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.name not in before.nodes and not origins_of(node):
            yield Violation(node.name, "it is new and doesn't say which rule made it (graph/provenance.py)")
        elif node.name in before.nodes and before.nodes[node.name] != signature(node) and (
                len(origins_of(node)) <= len(before.origins[node.name])):
            yield Violation(node.name, "it was changed and doesn't say by which rule (graph/provenance.py)")


def _gradients(captured: Captured, before: Before) -> Iterator[Violation]:
    named = named_tensors(captured.module)
    now, buffers = named.parameters, named.buffers
    for name, trained in before.trained.items():
        if name in buffers:
            yield Violation(name, "it was a parameter and is a buffer")
        elif name in now and now[name].requires_grad != trained and not _is_frozen(captured, name):
            yield Violation(name, f"its requires_grad was {trained} and is {not trained}")


def _is_frozen(captured: Captured, name: str) -> bool:
    """Whether a module holds the parameter that computes with constants."""
    return bool(getattr(submodule(captured.module, name.rpartition(".")[0]), "fxc_frozen", False))


def _teachers(captured: Captured, before: Before) -> Iterator[Violation]:
    for node in distillations(captured.module.graph):
        module = module_of(node)
        assert isinstance(module, Distillation)
        yield from (Violation(node.name, reason) for reason in exposed(module))


INVARIANTS: tuple[Invariant, ...] = (
    Invariant("targets are in the model", "FXC0551", 0, _targets),
    Invariant("the graph lints", "FXC0550", 1, _lint, refreshed=True),
    Invariant("nothing works in place", "FXC0556", 1, _in_place),
    Invariant("operators are canonical", "FXC0557", 1, _canonical),
    Invariant("it runs on fake tensors", "FXC0552", 2, _runs, refreshed=True),
    Invariant("inputs and outputs are kept", "FXC0553", 3, _signature_kept),
    Invariant("state_dict matches the graph", "FXC0554", 3, _state),
    Invariant("masks fit their parameters", "FXC0555", 3, _masks),
    Invariant("changed nodes have provenance", "FXC0558", 3, _provenance),
    Invariant("parameters stay trainable", "FXC0559", 3, _gradients),
    Invariant("teachers are apart", "FXC0561", 3, _teachers),
)


def violations(captured: Captured, before: Before) -> list[tuple[Invariant, Violation]]:
    """What doesn't hold of `captured`, whose facts are computed anew on the way if the graph has changed since they
    were; of the first stage where anything doesn't."""
    fresh = False
    for stage in sorted({invariant.stage for invariant in INVARIANTS}):
        if stage == 1:  # the targets are there
            fresh = captured.is_fresh()
        found = [(invariant, violation) for invariant in INVARIANTS
                 if invariant.stage == stage and not (fresh and invariant.refreshed)
                 for violation in invariant.check(captured, before)]
        if found:
            return found
    return []


def verify(captured: Captured, before: Before, pass_: Pass | None = None, site: Site | None = None) -> None:
    """Check every invariant of what `pass_` made at `site` out of the graph `before`.

    Raises RewriteError with one diagnostic for each violation: FXC0550 to FXC0559, with the pass, the node and the
    policy line.
    """
    found = violations(captured, before)
    if found:
        raise RewriteError([_diagnostic(captured, invariant, violation, pass_, site) for invariant, violation in found])


def _diagnostic(captured: Captured, invariant: Invariant, violation: Violation, pass_: Pass | None,
                site: Site | None) -> Diagnostic:
    who = f"`{pass_.verb}`" if pass_ is not None else "a rewrite"
    node = next((node for node in captured.module.graph.nodes if node.name == violation.node), None)
    name = violation.node if node is None else path_of(node) if node.op == "call_module" else label(node)
    where = f"`{name}`" if name else "the graph"
    primary = Label(site.span, f"{who} was asked for here") if site is not None and site.span is not None else None
    return Diagnostic(
        invariant.code, f"{who} broke {where}: {violation.reason}", primary,
        notes=(f"the invariant: {invariant.name}",),
        help="this is a mistake in the pass, not in the policy: report it to the pass's author; nothing was written")
