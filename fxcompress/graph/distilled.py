"""Where a graph meets its teacher: the call of a `Distillation`, and the inputs that only it reads.

    def forward(self, x, targets=None, losses=False):
        ...                                   # the student, as it was
        return self.distill(fc, targets, losses, x, layer3)

The call gives back its first argument unless losses are asked for. To everything that walks the graph it is one
operator that gives back what it is given, and whose other arguments it reads.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..nn.distillation import Distillation
from .ops import module_of, path_of

TARGETS, LOSSES = "targets", "losses"
CONTROLS = {TARGETS: None, LOSSES: False}  # the inputs of a distillation alone, and their defaults


def is_distillation(node: fx.Node) -> bool:
    """Whether `node` calls a `Distillation`."""
    return node.op == "call_module" and node.graph.owning_module is not None and isinstance(
        module_of(node), Distillation)


def is_control(node: fx.Node) -> bool:
    """Whether `node` is an input that only distillations read."""
    return (node.op == "placeholder" and node.target in CONTROLS and bool(node.args) and bool(node.users)
            and all(map(is_distillation, node.users)))


def distillations(graph: fx.Graph) -> list[fx.Node]:
    """Every call of a `Distillation`, in graph order."""
    return [node for node in graph.nodes if is_distillation(node)]


def result_of(graph: fx.Graph) -> Any:
    """What the student gives: a node, or nested containers of nodes, before any distillation."""
    value: Any = next(iter(reversed(graph.nodes))).args[0]
    while isinstance(value, fx.Node) and is_distillation(value):
        value = value.args[0]
    return value


def append(module: fx.GraphModule, name: str, distillation: Distillation, values: tuple[fx.Node, ...]) -> fx.Node:
    """Let what `module` gives pass through `distillation`, which reads `values`; gives its call."""
    graph = module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    end = next(iter(reversed(graph.nodes)))
    controls = [node for node in inputs if is_control(node)]
    if not controls:
        first = inputs[-1] if inputs else None
        before = first.next if first is not None else next(iter(graph.nodes))
        with graph.inserting_before(before):
            controls = [graph.placeholder(key, default_value=value) for key, value in CONTROLS.items()]
    module.add_module(name, distillation)
    with graph.inserting_before(end):
        call = graph.call_module(name, (end.args[0], *controls, *values))
    end.args = (call,)
    return call


def detach(module: fx.GraphModule, call: fx.Node) -> None:
    """Undo `append`, in place."""
    graph, given = module.graph, call.args[0]
    controls = [node for node in graph.nodes if is_control(node)]
    for user in list(call.users):
        user.args, user.kwargs = fx.node.map_arg(  # type: ignore[assignment]
            (user.args, user.kwargs), lambda node: given if node is call else node)
    graph.erase_node(call)
    module.delete_submodule(path_of(call))
    for node in controls:
        if not node.users:
            graph.erase_node(node)
