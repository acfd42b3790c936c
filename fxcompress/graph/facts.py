"""What is known of every node and of the whole graph: shapes, parameters, multiply-accumulates, bytes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .macs import macs_of
from .ops import kind_of, path_of, submodule

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NodeFact:
    """The facts of one node, at the batch size of the example.

    `shape` is None for a number; a value that is a tuple has a tuple of the shapes (dtypes, dynamic flags) of its
    items. `params` counts the elements of the parameters that the node itself holds (a module, or a `get_attr` of a
    parameter), `bytes` those of its parameters and buffers, `value_bytes` those of its value. `macs` are the
    multiply-accumulates of one forward pass at the example's batch size; elementwise work, norms and pools count
    none.
    """

    kind: str
    path: str
    shape: Any = None
    dtype: Any = None
    dynamic: Any = ()
    params: int = 0
    macs: int = 0
    bytes: int = 0
    value_bytes: int = 0
    source: str = ""


@dataclass(frozen=True)
class Facts:
    """Totals of a graph. A parameter that is used twice counts once.

    `macs` are those of one sample: of the example's batch, divided by its size. `params` and `bytes` (parameters and
    buffers) count what the graph reads, `activations` the bytes of all values at the example's batch size.
    """

    macs: int
    params: int
    bytes: int
    activations: int
    nodes: int


def shapes(value: Any) -> Any:
    """The shape of a tensor, shapes of nested tuples; None for what has none."""
    return _over(value, _shape, None)


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape)


def _dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype


def _over(value: Any, function: Any, other: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return tuple(_over(item, function, other) for item in value)
    if isinstance(value, dict):
        return tuple(_over(item, function, other) for item in value.values())
    return other


def _dynamic(results: tuple[Any, ...]) -> Any:
    """For each dimension whether its size differs between the probes."""
    first = results[0]
    if isinstance(first, Tensor):
        if len(results) == 2:
            return tuple(map(operator.ne, first.shape, results[1].shape))
        return (False,) * first.dim()
    if isinstance(first, tuple | list) and not isinstance(first, torch.Size):
        return tuple(_dynamic(tuple(result[place] for result in results)) for place in range(len(first)))
    return ()


def _held(node: fx.Node, root: nn.Module) -> list[Tensor]:
    """The parameters and buffers that `node` reads by itself."""
    if node.op == "get_attr":
        value = _attribute(root, str(node.target))
        return [value] if isinstance(value, Tensor) else []
    if node.op == "call_module":
        module = submodule(root, str(node.target))
        if getattr(module, "fxc_apart", False):
            return []  # a teacher is no part of the model
        if not module._modules:
            own = (*module._parameters.values(), *module._buffers.values())
            return list({id(tensor): tensor for tensor in own if tensor is not None}.values())
        return [*module.parameters(), *module.buffers()]
    return []


def _attribute(root: nn.Module, path: str) -> object:
    prefix, _, name = path.rpartition(".")
    return getattr(submodule(root, prefix), name)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fact_of(node: fx.Node, results: tuple[Any, ...], root: nn.Module, value_of: Any) -> NodeFact:
    """The facts of `node`, whose value in each probe is `results`; `value_of(node)` is any node's value at probe
    one."""
    held = _held(node, root)
    first = results[0]
    path, shape = path_of(node), shapes(first)
    if node.op == "call_function":
        node.meta["fxc"] = NodeFact("", path, shape)  # the kind of a norm is read off its shape
    kind = kind_of(node)
    return NodeFact(
        kind, path, shape, dtype=_over(first, _dtype, None), dynamic=_dynamic(results),
        params=sum([t.numel() for t in held if isinstance(t, nn.Parameter)]) if held else 0,
        macs=macs_of(kind, node, first, value_of), bytes=_size(held) if held else 0,
        value_bytes=_bytes(first) if node.op not in ("get_attr", "output") else 0,
        source=str(node.meta.get("source", "")))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return sum(map(_bytes, items))


def totals(graph: fx.Graph, root: nn.Module, batch: int) -> Facts:
    """Totals of `graph`, whose nodes have their facts."""
    held = {id(tensor): tensor for node in graph.nodes for tensor in _held(node, root)}
    facts: list[NodeFact] = [node.meta["fxc"] for node in graph.nodes]
    return Facts(
        macs=sum(fact.macs for fact in facts) // max(1, batch),
        params=sum(t.numel() for t in held.values() if isinstance(t, nn.Parameter)),
        bytes=_size(held.values()), activations=sum(fact.value_bytes for fact in facts), nodes=len(facts))
