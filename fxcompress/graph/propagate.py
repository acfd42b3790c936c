"""Shapes and facts of a graph, computed on fakes in both probes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..diagnostics import Diagnostic, RewriteError
from .facts import fact_of
from .ops import submodule
from .probe import Fakes, quiet
from .trace_errors import RAISED_BY_MODELS

if TYPE_CHECKING:
    from .captured import Captured, Example

Results = dict[fx.Node, tuple[Any, ...]]


def device_of(module: nn.Module, example: Example) -> torch.device:
    """Where the graph computes: the device of the inputs, or of the weights; the CPU for models on `meta`."""
    for tensor in chain(example.tensors(), module.parameters(), module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def propagate(captured: Captured) -> None:
    """Drop dead nodes and write `node.meta["fxc"]` of every node. Raises RewriteError (FXC0406) at the first node that
    can't be computed."""
    graph, root = captured.graph, captured.module
    drop_dead(graph)
    graph.lint()
    fakes = Fakes(captured.batches, device_of(root, captured.example))
    inputs = [*captured.example.args, *captured.example.kwargs.values()]
    results: Results = {}
    with torch.no_grad(), quiet():
        for node in graph.nodes:
            if node.op == "placeholder":
                example = inputs.pop(0) if inputs else None
                results[node] = tuple(fakes.inputs(example, probe) for probe in range(len(fakes.batches)))
            else:
                results[node] = _run(node, root, fakes, results)
    write_facts(graph, root, results)


def write_facts(graph: fx.Graph, root: nn.Module, results: Results) -> None:
    """Write the facts of every node, given its value in each probe."""
    def value_of(argument: Any) -> Any:
        return results[argument][0] if isinstance(argument, fx.Node) else argument

    for node in graph.nodes:
        node.meta["fxc"] = fact_of(node, results[node], root, value_of)


def drop_dead(graph: fx.Graph) -> None:
    """Erase nodes that nothing uses. Nothing in the normal form acts but by its value."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _run(node: fx.Node, root: nn.Module, fakes: Fakes, results: Results) -> tuple[Any, ...]:
    values = []
    for probe in range(len(fakes.batches)):
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda other: results[other][probe])  # noqa: B023
        try:
            values.append(_value(node, root, fakes, args, kwargs))
        except RAISED_BY_MODELS as error:
            raise _does_not_fit(node, fakes.batches[probe], error, results) from error
    return tuple(values)


def _value(node: fx.Node, root: nn.Module, fakes: Fakes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "output":
        return args[0]
    if node.op == "get_attr":
        prefix, _, name = str(node.target).rpartition(".")
        value = getattr(submodule(root, prefix), name)
        return fakes.of(value) if isinstance(value, Tensor) else value
    if node.op == "call_module":
        return fakes.run_module(submodule(root, str(node.target)), args, kwargs)
    if node.op == "call_method":
        return fakes.call(getattr(type(args[0]), str(node.target)), args, kwargs)
    return fakes.call(node.target, args, kwargs)  # type: ignore[arg-type]


def _does_not_fit(node: fx.Node, batch: int, error: Exception, results: Results) -> RewriteError:
    def shape(other: fx.Node) -> str:
        value = results[other][0]
        return f"{other.name}: {list(value.shape)}" if isinstance(value, Tensor) else f"{other.name}: {value}"

    inputs: Iterable[str] = (shape(other) for other in node.all_input_nodes)
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RewriteError([Diagnostic(
        "FXC0406", f"`{node.name}` can't be computed any more: {words}",
        notes=(f"its inputs at batch size {batch} are {', '.join(inputs)}", *_source(node)),
        help="a rewrite changed one side of this operator and not the other; undo it, or rewrite both")])


def _source(node: fx.Node) -> tuple[str, ...]:
    source = node.meta.get("source")
    return (f"the model's line is {source}",) if source else ()
