"""Running a captured graph node by node, for what its values say of it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and afterwards every module in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def values_of(run: fx.Interpreter, inputs: Sequence[Any],
              wanted: Container[fx.Node] | None = None) -> Iterator[tuple[fx.Node, Any]]:
    """Every node (of those `wanted`, which must hold all inputs of each) with its value, in graph order; `inputs` are
    those of all placeholders. A value is kept only as long as others need it. Each run starts anew."""
    nodes = [node for node in run.module.graph.nodes  # type: ignore[union-attr]
             if wanted is None or node in wanted or node.op == "placeholder"]
    ends = last_uses(nodes)
    run.env, run.args_iter = {}, iter(inputs)
    for node in nodes:
        run.env[node] = run.run_node(node)
        yield node, run.env[node]
        for dead in ends.get(node, ()):
            del run.env[dead]


class Settled(fx.Interpreter):
    """Computes what only parameters and buffers go into once, for all of its runs: rounded weights, mostly. They must
    not change between the runs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._settled: dict[fx.Node, Any] = {}
        self._constant: set[fx.Node] = set()
        for node in module.graph.nodes:
            sources = node.all_input_nodes
            computed = node.op.startswith("call_") and bool(sources)
            if node.op == "get_attr" or (computed and self._constant.issuperset(sources)):
                self._constant.add(node)

    def run_node(self, n: fx.Node) -> Any:
        """The value of `n`."""
        if n not in self._constant:
            return super().run_node(n)
        if n not in self._settled:
            self._settled[n] = super().run_node(n)
        return self._settled[n]


def last_uses(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """By the node that is the last one to need them, of `nodes` in graph order: the nodes whose values can go then."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in (node, *node.all_input_nodes):
            last[source] = node
    ends: dict[fx.Node, list[fx.Node]] = {}
    for source, user in last.items():
        ends.setdefault(user, []).append(source)
    return ends


def evaluated(root: nn.Module, node: fx.Node) -> Any:
    """The value of a node that only parameters and buffers go into; None for any other."""
    if node.op == "placeholder":
        return None
    if node.op == "get_attr":
        prefix, _, name = str(node.target).rpartition(".")
        return getattr(root.get_submodule(prefix), name)
    values = {source: evaluated(root, source) for source in node.all_input_nodes}
    if any(value is None for value in values.values()):
        return None
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda source: values[source])
    function: Any = root.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return function(*args, **kwargs)
