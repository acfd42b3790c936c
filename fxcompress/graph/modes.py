"""One graph for training and evaluation: what differs between the traces of both modes becomes a `ByMode` module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ..nn.mode import ByMode
from .opbase import Op
from .ops import op_of

PLAIN = (bool, int, float, str, type(None))
Change = tuple[fx.Node, str, Any]


def merge_modes(kept: fx.Graph, other: fx.Graph, tree: nn.Module, training: bool) -> bool:
    """Make `kept`, traced in mode `training`, follow the mode of its modules; `other` was traced in the opposite
    mode.

    Where the same constant argument differs, a `ByMode` module of the enclosing module (in `tree`) gives it. Returns
    False and changes nothing if the graphs differ in anything else.
    """
    pairs = list(zip(kept.nodes, other.nodes, strict=False))
    if len(kept.nodes) != len(other.nodes):
        return False
    numbers = {node: number for number, pair in enumerate(pairs) for node in pair}
    changes: list[Change] = []
    for one, two in pairs:
        found = _differences(one, two, numbers)
        if found is None:
            return False
        changes += found
    for change in changes:
        _insert(tree, change, training)
    return True


def _differences(one: fx.Node, two: fx.Node, numbers: Mapping[fx.Node, int]) -> list[Change] | None:
    """The constant arguments in which two nodes differ; None if they differ in more."""
    if (one.op, one.target) != (two.op, two.target):
        return None
    op = op_of(one)
    mine, theirs = _arguments(one, op), _arguments(two, op)
    if mine.keys() != theirs.keys():
        return None
    changes: list[Change] = []
    for name in mine:
        if _numbered(mine[name], numbers) != _numbered(theirs[name], numbers):
            if op is None or not (isinstance(mine[name], PLAIN) and isinstance(theirs[name], PLAIN)):
                return None
            changes.append((one, name, theirs[name]))
    return changes


def _arguments(node: fx.Node, op: Op | None) -> dict[str, Any]:
    if op is not None:
        return op.bind(node.args, node.kwargs)
    return {**{str(place): value for place, value in enumerate(node.args)}, **node.kwargs}


def _numbered(value: Any, numbers: Mapping[fx.Node, int]) -> Any:
    """`value` with nodes as their numbers, comparable between graphs."""
    return repr(fx.map_arg(value, lambda node: f"%{numbers[node]}"))


def _insert(tree: nn.Module, change: Change, training: bool) -> None:
    node, name, other = change
    op = op_of(node)
    assert op is not None  # only canonical calls change
    values = op.bind(node.args, node.kwargs)
    pair = (values[name], other) if training else (other, values[name])
    path = str(node.meta.get("path", ""))
    owner = _box(tree, path)
    label = next(f"_{name}{n or ''}" for n in range(len(owner._modules) + 1)
                 if f"_{name}{n or ''}" not in owner._modules)
    owner.add_module(label, ByMode(*pair).train(owner.training))
    target = f"{path}.{label}" if path else label
    with node.graph.inserting_before(node):
        switch = node.graph.create_node("call_module", target, (), {}, target.replace(".", "_"))
    switch.meta.update({key: node.meta[key] for key in ("path", "source") if key in node.meta})
    node.args, node.kwargs = op.normal({**values, name: switch})


def _box(tree: nn.Module, path: str) -> nn.Module:
    """The module of `tree` at `path`, made where the tree has no branch there."""
    at = tree
    for name in path.split(".") if path else ():
        if name not in at._modules:
            at.add_module(name, nn.Module().train(at.training))
        at = at._modules[name]  # type: ignore[assignment]
    return at
