"""Labels as they flow through a graph: the state of one analysis, and the registry of transfer rules.

Every dimension of every value is either untracked (None: nothing of it can be removed; inputs, batch and spatial
dimensions) or an integer array with one label per index, -1 where that index can't be removed. A rule gives the labels
of its node's result and says which labels must leave together (`tie`), which can't leave (`fix`), whose removal a
normalisation notices (`notice`), and where labels are contracted away (`consume_*`). Ties are only collected here;
`coupling.py` joins them once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx, nn

from .captured import Captured
from .coupling_computed import computed, held_by
from .ops import kind_of
from .tree import named_tensors

Labels = npt.NDArray[np.int64]
Dim = Labels | None
Dims = tuple[Dim, ...]
Value = Any  # Dims of a tensor, a list of Values of a tuple, None of anything else
Rule = Callable[["Flow", fx.Node, Mapping[str, Any]], Value]
Arguments = Callable[[fx.Node], Mapping[str, Any]]

RULES: dict[str, Rule] = {}
_NO_SIZES = frozenset((tuple, type(None)))


class NoRuleError(Exception):
    """A rule meets a form of its operator that it doesn't cover: the node becomes a barrier, with this reason."""


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Decorator: the transfer rule of the canonical operators `kinds`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


@dataclass(frozen=True)
class Event:
    """Something a rule said at `node`: why labels are fixed, or what notices their removal."""

    node: fx.Node
    reason: str


@dataclass
class TensorLabels:
    """A parameter or buffer: all its names in the model, and the labels of its dimensions."""

    tensor: Tensor
    names: list[str]
    dims: list[Dim]


@dataclass(frozen=True)
class Produced:
    """The output channels a node makes. `weights` are the (tensor, dimension) pairs that hold them."""

    node: fx.Node
    labels: Labels
    weights: tuple[tuple[str, int], ...]
    follows: bool = False  # channel by channel from its input, as a depthwise convolution


@dataclass(frozen=True)
class Consumed:
    """Where labels are contracted away: along `dim` of the tensor named `target`, or of the input node `target`."""

    node: fx.Node
    target: str | fx.Node
    dim: int
    labels: Labels


@dataclass
class Flow:
    """One run of the abstract interpretation over `captured`. `split` says which axis of a split dimension stays
    removable where nothing else decides: "heads" or "head_dim"."""

    captured: Captured
    split: str = "heads"
    flipped: frozenset[str] = frozenset()  # names of nodes that take the other of their two grouped forms
    count: int = 0
    values: dict[fx.Node, Value] = field(default_factory=dict)
    tensors: dict[int, TensorLabels] = field(default_factory=dict)
    ties: list[tuple[Labels, Labels, int]] = field(default_factory=list)
    fixed: list[tuple[Labels, Event]] = field(default_factory=list)
    noticed: list[tuple[Labels, Event]] = field(default_factory=list)
    produced: list[Produced] = field(default_factory=list)
    consumed: list[Consumed] = field(default_factory=list)
    heads: list[tuple[Labels, Dim]] = field(default_factory=list)  # (labels of an attention axis, of the whole)
    grouped: dict[fx.Node, str] = field(default_factory=dict)  # "whole" groups leave, or the same "offset" in each
    shuffles: dict[fx.Node, Any] = field(default_factory=dict)  # `Shuffle` by its first and its last node
    pieces: list[Labels] = field(default_factory=list)  # parts cut out of a dimension, which mustn't become empty
    weak: list[int] = field(default_factory=list)  # starts and ends of label ranges that only repeat a constant

    def __post_init__(self) -> None:
        """Look the nodes and tensors of the model up once."""
        module = self.captured.module
        self.nodes = list(module.graph.nodes)
        self.index = {node: place for place, node in enumerate(self.nodes)}
        self.node = self.nodes[0]
        self._named = named_tensors(module).all
        self._free: dict[int, Labels] = {}  # arrays with no -1 in them, by identity
        self._names: dict[int, list[str]] = {}
        for name, tensor in self._named.items():
            self._names.setdefault(id(tensor), []).append(name)

    # Labels

    def fresh(self, size: int, weak: bool = False) -> Dim:
        """New labels for a dimension of `size`; None for one of a single index, which can't go. `weak` ones stand for
        a constant repeated `size` times, which gives way to any other label it is merged with."""
        if size <= 1:
            return None
        start, self.count = self.count, self.count + size
        if weak:
            self.weak += [start, self.count]
        labels = np.arange(start, self.count, dtype=np.int64)
        self._free[id(labels)] = labels
        return labels

    def is_weak(self, labels: Labels) -> bool:
        """Whether `labels` only repeat a constant."""
        return bool(bisect_right(self.weak, int(labels[0])) % 2)

    def tensor(self, name: str, track: Iterable[int] | None = None) -> Dims:
        """Labels of the parameter or buffer `name`: the same wherever it is used. Only the dimensions `track` are
        (all, if None); one that another user tracks and this one doesn't is fixed."""
        tensor = self._named[name]
        known = self.tensors.get(id(tensor))
        wanted = None if track is None else set(track)
        if known is None:
            dims = [self.fresh(size) if wanted is None or place in wanted else None
                    for place, size in enumerate(tensor.shape)]
            known = TensorLabels(tensor, self._names[id(tensor)], dims)
            self.tensors[id(tensor)] = known
        for place, dim in enumerate(known.dims):
            if wanted is not None and place not in wanted:
                self.fix(dim, "reads it along a dimension that another user of the tensor could shrink")
        return tuple(known.dims)

    def has(self, name: str) -> bool:
        """Whether the model has a parameter or buffer of this name (a module's bias may be None)."""
        return name in self._named

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter or buffer."""
        return tuple(self._named[name].shape)

    # What rules say

    def tie(self, a: Dim, b: Dim, reason: str = "ties it to a dimension that no parameter has") -> Dim:
        """`a` and `b` must leave together, index by index. Returns the labels of the tied dimension."""
        if a is None or b is None:
            self.fix(a, reason)
            self.fix(b, reason)
            return None
        if a is b:
            return a
        if len(a) != len(b):
            raise NoRuleError("dimensions of different sizes meet")
        if id(a) in self._free and id(b) in self._free:
            self.ties.append((a, b, self.index[self.node]))
            return a
        free = (a >= 0) & (b >= 0)
        if not free.all():
            self.fix(a[~free], reason)
            self.fix(b[~free], reason)
            result = np.where(free, a, -1)
            a, b = a[free], b[free]
        else:
            result = a
            self._free[id(a)], self._free[id(b)] = a, b
        self.ties.append((a, b, self.index[self.node]))
        return result

    def fix(self, dim: Dim, reason: str) -> None:
        """None of `dim` can be removed, because the current node `reason`."""
        if dim is not None and len(dim):
            self.fixed.append((dim, Event(self.node, reason)))

    def notice(self, dim: Dim, reason: str) -> None:
        """Removing from `dim` changes what the current node computes for the others: those components are inexact."""
        if dim is not None:
            self.noticed.append((dim, Event(self.node, reason)))

    def produce(self, dim: Dim, *weights: tuple[str, int], follows: bool = False) -> None:
        """The current node makes the channels `dim`, held by `weights`."""
        if dim is not None:
            self.produced.append(Produced(self.node, dim, weights, follows))

    def consume(self, target: str | fx.Node, dim: int, labels: Dim) -> None:
        """The current node sums over `labels`, which lie along `dim` of a tensor (by name) or of one of its inputs."""
        if labels is not None:
            self.consumed.append(Consumed(self.node, target, dim, labels))

    def consume_parameter(self, args: Mapping[str, Any], name: str, dim: int, labels: Dim) -> None:
        """The same for the argument `name`, be it a tensor of the current node's module or the value of a node."""
        value = args[name]
        target = value if isinstance(value, fx.Node) else held_by(self, str(self.node.target), name)
        assert target is not None
        self.consume(target, dim, labels)

    def piece(self, labels: Dim) -> Dim:
        """A part cut out of a dimension: something of it has to stay."""
        if labels is not None and len(labels):
            self.pieces.append(labels)
        return labels

    # Arguments of nodes

    def of(self, value: object) -> Dims:
        """Labels of an argument that is a tensor; a constant has none."""
        dims = self.values.get(value) if isinstance(value, fx.Node) else None
        return dims if isinstance(dims, tuple) else ()

    def is_tensor(self, value: object) -> bool:
        """Whether an argument is a node whose value is a tensor."""
        return isinstance(value, fx.Node) and isinstance(self.values.get(value), tuple)

    def parameter(self, args: Mapping[str, Any], name: str, track: Iterable[int] | None = None) -> Dims | None:
        """Labels of the argument `name`, be it a tensor of the module the current node calls or the value of a node;
        None if the operator has none."""
        value = args.get(name)
        if isinstance(value, fx.Node):
            dims = self.of(value)
            for place in () if track is None else set(range(len(dims))) - set(track):
                self.fix(dims[place], "reads it as a kernel's extent")
            return dims
        if value is None:
            return None
        path = f"{self.node.target}.{name}"
        return self.tensor(path, track) if path in self._named else computed(self, str(self.node.target), name, track)

    def source(self, args: Mapping[str, Any], name: str) -> str | None:
        """The tensor that the argument `name` comes from: the module's, or the first one up a chain of nodes."""
        value = args.get(name)
        while isinstance(value, fx.Node):
            if value.op == "get_attr":
                return str(value.target)
            inputs = [node for node in value.all_input_nodes if node.op != "placeholder"]
            value = inputs[0] if inputs else None
        return held_by(self, str(self.node.target), name) if self.node.op == "call_module" else None

    def module(self) -> nn.Module:
        """The module the current node calls."""
        return self.captured.module.get_submodule(str(self.node.target))


def shape_of(node: object) -> tuple[int, ...]:
    """The shape of a node's tensor value; empty for anything else."""
    shape: Any = getattr(node.meta.get("fxc"), "shape", None) if isinstance(node, fx.Node) else None
    return shape if is_shape(shape) else ()


def is_shape(shape: object) -> bool:
    """Whether a fact's shape is that of one tensor, not of a tuple of them and not of a number."""
    return isinstance(shape, tuple) and _NO_SIZES.isdisjoint(map(type, shape))


def untracked(shape: object) -> Value:
    """The labels of a value of which nothing is tracked."""
    if shape is None:
        return None
    if is_shape(shape):
        return (None,) * len(shape)  # type: ignore[arg-type]
    return [untracked(part) for part in shape]  # type: ignore[attr-defined]


def fits(value: Value, shape: object) -> bool:
    """Whether labels have the shape of the value they describe."""
    if shape is None or value is None:
        return value is None or shape is None
    if is_shape(shape):
        return isinstance(value, tuple) and len(value) == len(shape) and all(  # type: ignore[arg-type]
            dim is None or len(dim) == size for dim, size in zip(value, shape, strict=True))  # type: ignore[call-overload]
    return isinstance(value, list) and len(value) == len(shape) and all(  # type: ignore[arg-type]
        fits(part, inner) for part, inner in zip(value, shape, strict=True))  # type: ignore[call-overload]


def tracked(value: Value) -> list[Labels]:
    """All label arrays in a value."""
    if isinstance(value, np.ndarray):
        return [value]
    return [labels for part in value or () for labels in tracked(part)] if isinstance(value, tuple | list) else []


def run(flow: Flow, arguments: Arguments) -> None:
    """Interpret the whole graph of `flow`. Unknown operators become barriers."""
    for node in flow.nodes:
        flow.node = node
        flow.values[node] = _apply(flow, node, arguments)


def _apply(flow: Flow, node: fx.Node, arguments: Arguments) -> Value:
    fact = node.meta.get("fxc")
    shape, kind = getattr(fact, "shape", None), getattr(fact, "kind", None) or kind_of(node)
    function = RULES.get(kind)
    if function is None:
        return barrier(flow, node, shape, "has no rule")
    try:
        value = function(flow, node, arguments(node))
    except NoRuleError as reason:
        return barrier(flow, node, shape, str(reason))
    if not fits(value, shape):
        return barrier(flow, node, shape, "has a result of another shape than its rule says")
    return value


def barrier(flow: Flow, node: fx.Node, shape: object, reason: str) -> Value:
    """Nothing that `node` reads, or holds, can be removed."""
    for source in node.all_input_nodes:
        for labels in tracked(flow.values[source]):
            flow.fix(labels, reason)
    if node.op == "call_module":
        names = [f"{node.target}.{name}" for name, _ in flow.module().named_parameters(remove_duplicate=False)]
        for name in names:
            for dim in flow.tensor(name):
                flow.fix(dim, reason)
        first = next((name for name in names if flow.shape(name)), None)
        if first is not None:
            flow.produce(flow.tensor(first)[0], (first, 0))  # so that it is named as a layer that can't shrink
    return untracked(shape)
