"""Channel shuffles: a dimension split into groups, transposed and merged again.

As a whole this only puts the indices in another order, so that no two of them are tied. Where as much is left of each
group, at the same places, it stays as it is; else `fxcompress.nn.Reorder` takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import fx

from ...nn import Reorder
from ..captured import Captured
from ..coupling_edit import Edit, Kept, kept_of, resize
from ..coupling_flow import Dim, Dims, Flow, Labels, Value, rule, shape_of
from ..ops import arguments, kind_of, path_of

_COPIES = ("contiguous", "clone")


@dataclass(frozen=True)
class Shuffle:
    """The split `first`, the merge `last` (the same node for an operator that does it all), and the place in dimension
    `dim` that each of its indices comes from; it is cut into `groups`."""

    first: fx.Node
    last: fx.Node
    dim: int
    groups: int
    order: Labels

    def regular(self, kept: Kept) -> bool:
        """Whether every group keeps the same places."""
        rows = kept.reshape(self.groups, -1)
        return bool((rows == rows[0]).all())


def begun_at(node: fx.Node) -> Shuffle | None:
    """The shuffle that the reshape `node` begins."""
    source = arguments(node)["input"]
    old, split = shape_of(source), shape_of(node)
    dim = next((place for place, (a, b) in enumerate(zip(old, split, strict=False)) if a != b), len(old))
    count = len(split) - len(old) + 1
    moved = _follow(node)
    if dim == len(old) or count < 2 or split[dim + count :] != old[dim + 1 :] or moved is None:
        return None
    if int(np.prod(split[dim : dim + count])) != old[dim]:
        return None
    last = _follow(moved)
    order = _axes(moved, len(split))
    axes = [place - dim for place in order[dim : dim + count]]
    rest = [place for place in order if not dim <= place < dim + count]
    if last is None or kind_of(last) not in ("reshape", "flatten") or shape_of(last) != old:
        return None
    if sorted(axes) != list(range(count)) or rest != sorted(rest):
        return None
    places = np.arange(old[dim]).reshape(split[dim : dim + count]).transpose(axes).reshape(-1)
    return Shuffle(node, last, dim, old[dim] // split[dim + count - 1], places)


def _follow(node: fx.Node) -> fx.Node | None:
    """The only node that reads `node`, past copies."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if kind_of(node) not in _COPIES:
            return node
    return None


def _axes(node: fx.Node, rank: int) -> list[int]:
    """Where the axes of a permutation's result come from; none for another operator."""
    kind, args = kind_of(node), arguments(node)
    order = list(range(rank))
    if kind == "permute":
        return [int(place) % rank for place in args["dims"]]
    if kind != "transpose":
        return []
    a, b = args["dim0"], args["dim1"]
    order[a], order[b] = order[b], order[a]
    return order


def split(flow: Flow, shuffle: Shuffle, dims: Dims) -> Dims:
    """Labels of the groups: those of the first one, which hold where the removal is regular."""
    labels = dims[shuffle.dim]
    assert labels is not None
    rank, old = len(shape_of(shuffle.first)), len(dims)
    offsets = labels.reshape(shuffle.groups, -1)[0]
    groups: list[Dim] = [None] * (rank - old)
    return (*dims[: shuffle.dim], *groups, offsets if len(offsets) > 1 else None, *dims[shuffle.dim + 1 :])


def merged(shuffle: Shuffle, dims: Dims) -> Dims:
    """Labels of the result, from those of the value that is shuffled."""
    labels = dims[shuffle.dim]
    mixed = None if labels is None else labels[shuffle.order]
    return (*dims[: shuffle.dim], mixed, *dims[shuffle.dim + 1 :])


def straightened(edit: Edit, node: fx.Node) -> bool:
    """Whether `node` is of a shuffle that isn't regular any more, whose place a `Reorder` will take."""
    shuffle: Shuffle | None = edit.flow.shuffles.get(node)
    if shuffle is None:
        return False
    source = arguments(shuffle.first)["input"]
    kept = edit.kept(edit.of(source)[shuffle.dim])
    if kept is None or shuffle.regular(kept):
        return False
    if node is shuffle.first:
        edit.later.append(partial(_reorder, edit.flow.captured, shuffle, _renumbered(shuffle.order, kept)))
    return True


def _renumbered(order: Labels, kept: Kept) -> list[int]:
    """`order` without what left, its places counted among those that stay."""
    places = np.cumsum(kept) - 1
    return [int(place) for place in places[order[kept[order]]]]


def _reorder(captured: Captured, shuffle: Shuffle, order: list[int]) -> None:
    source = arguments(shuffle.first)["input"]  # by now; a shuffle before it may have been replaced
    holder = path_of(shuffle.last).rpartition(".")[0] if shuffle.last.op == "call_module" else path_of(shuffle.last)
    try:
        parent = captured.module.get_submodule(holder)
    except AttributeError:  # a module without parameters isn't kept
        holder, parent = "", captured.module
    name = next(name for number in range(len(captured.graph.nodes))
                if not hasattr(parent, name := f"shuffle_{number}" if number else "shuffle"))
    device = next((tensor.device for tensor in (*captured.module.parameters(), *captured.module.buffers())), None)
    parent.add_module(name, Reorder(shuffle.dim, order).train(parent.training).to(device))
    with captured.graph.inserting_before(shuffle.last):
        new = captured.graph.call_module(f"{holder}.{name}".lstrip("."), (source,))
    gone = []
    node = shuffle.last
    while node is not source:
        gone.append(node)
        node = arguments(node)["input"]
    captured.replace(shuffle.last, new)
    captured.moved.update({old.name: (new.name,) for old in gone})


@rule("channel_shuffle")
def channel_shuffle(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """`(groups, n)` becomes `(n, groups)` along dimension 1."""
    dims, groups = flow.of(args["input"]), args["groups"]
    if dims[1] is None:
        return dims
    order = np.arange(len(dims[1])).reshape(groups, -1).transpose().reshape(-1)
    shuffle = flow.shuffles[node] = Shuffle(node, node, 1, groups, order)
    return merged(shuffle, dims)


@resize("channel_shuffle")
def resize_channel_shuffle(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Groups of unlike sizes are put in order by numbers."""
    straightened(edit, node)


@rule("reorder")
def reorder(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """What `Reorder` does to the data."""
    module = flow.module()
    assert isinstance(module, Reorder)
    dims = list(flow.of(node.args[0]))
    labels = dims[module.dim]
    dims[module.dim] = None if labels is None else labels[np.asarray(module.order)]
    return tuple(dims)


@resize("reorder")
def resize_reorder(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Its places are counted among those that stay."""
    module = edit.flow.captured.module.get_submodule(str(node.target))
    assert isinstance(module, Reorder)
    labels = edit.of(node.args[0])[module.dim]
    if labels is not None and edit.changed(labels):
        edit.modules[str(node.target)] = {"order": _renumbered(np.asarray(module.order), kept_of(labels, edit.gone))}
