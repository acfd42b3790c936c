"""Reshapes: dimensions merge and split.

The source and the result shape are cut into blocks of equal volume, each block into *atoms*, the finest axes both sides
are made of. A merge repeats the labels of its one tracked atom. A split chooses the atom that stays removable and ties
the labels along the others: whole heads, or the same offset in every head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import fx

from ..coupling_edit import Edit, resize
from ..coupling_flow import Dim, Dims, Flow, Value, rule, shape_of
from ..ops import arguments, kind_of
from . import shuffle

# What a value may pass between the split of its heads and their attention.
_TRANSPARENT = frozenset((
    "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "unbind", "getitem", "chunk", "split",
    "mul", "div", "add", "sub", "neg", "pow", "rsqrt", "contiguous", "clone", "to", "cat", "stack", "pad", "expand",
    "squeeze", "unsqueeze", "repeat_interleave", "normalize", "softmax", "layernorm", "rmsnorm", "relu", "elu",
    "dropout", "mean", "sum", "narrow"))
_ATTENTION = frozenset(("matmul", "bmm", "einsum", "baddbmm", "scaled_dot_product_attention"))
_LOOKAHEAD = 24


@rule("reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
def reshape(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Any change of shape that keeps the order of the data."""
    source = args["input"]
    dims = flow.of(source)
    if node in flow.shuffles:
        found = flow.shuffles[node]
        return shuffle.merged(found, flow.of(arguments(found.first)["input"]))
    begun = shuffle.begun_at(node) if len(shape_of(node)) > len(dims) else None
    if begun is not None and dims[begun.dim] is not None:
        flow.shuffles.update({begun.first: begun, begun.last: begun})
        return shuffle.split(flow, begun, dims)
    return reshaped(flow, dims, shape_of(source), shape_of(node))


def reshaped(flow: Flow, dims: Dims, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    """The labels `dims` of a value of shape `old` after it has got shape `new`."""
    result: list[Dim] = [None] * len(new)
    if any(labels is not None for labels in dims):
        for left, right in blocks(old, new):
            labels = [dims[place] for place in left]
            if any(dim is not None for dim in labels):
                parts = _block(flow, labels, [old[place] for place in left], [new[place] for place in right])
                for place, part in zip(right, parts, strict=True):
                    result[place] = part
    return tuple(result)


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Places in `old` and `new` that hold the same stretch of data; sizes of 1 are left out."""
    left = [place for place, size in enumerate(old) if size != 1]
    right = [place for place, size in enumerate(new) if size != 1]
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        have, want = old[a[0]], new[b[0]]
        while have != want:
            if have < want:
                a.append(left.pop(0))
                have *= old[a[-1]]
            else:
                b.append(right.pop(0))
                want *= new[b[-1]]
        yield a, b


def _block(flow: Flow, dims: list[Dim], old: list[int], new: list[int]) -> list[Dim]:
    if len(old) == len(new) == 1:
        return dims
    marks = sorted({*np.cumprod(old).tolist(), *np.cumprod(new).tolist()})
    if any(b % a for a, b in pairwise(marks)):
        for dim in dims:
            flow.fix(dim, "regroups it in a way that no axis survives")
        return [None] * len(new)
    sizes = [b // a for a, b in pairwise([1, *marks])]
    atoms: list[Dim] = []
    for dim, count in zip(dims, _counts(old, sizes), strict=True):
        atoms += split_axis(flow, dim, sizes[len(atoms) : len(atoms) + count])
    result, start = [], 0
    for count in _counts(new, sizes):
        result.append(merge_axes(flow, atoms[start : start + count], sizes[start : start + count]))
        start += count
    return result


def _counts(shape: list[int], sizes: list[int]) -> list[int]:
    """How many consecutive atoms make up each dimension."""
    counts, rest = [], iter(sizes)
    for size in shape:
        volume, count = 1, 0
        while volume < size:
            volume *= next(rest)
            count += 1
        counts.append(count)
    return counts


def merge_axes(flow: Flow, atoms: list[Dim], sizes: list[int]) -> Dim:
    """Labels of several axes merged into one: those of the one that is tracked, repeated."""
    tracked = [place for place, dim in enumerate(atoms) if dim is not None]
    if not tracked or len(atoms) == 1:
        return atoms[0] if tracked else None

    def rank(place: int) -> tuple[bool, int]:
        dim = atoms[place]
        assert dim is not None
        return not flow.is_weak(dim), len(dim)

    chosen = max(tracked, key=rank)
    for place in tracked:
        if place != chosen:
            flow.fix(atoms[place], "merges it with another dimension that can shrink")
    outer, inner = int(np.prod(sizes[:chosen])), int(np.prod(sizes[chosen + 1 :]))
    labels = atoms[chosen]
    assert labels is not None
    return np.tile(np.repeat(labels, inner), outer)


def split_axis(flow: Flow, labels: Dim, sizes: list[int]) -> list[Dim]:
    """Labels of the axes that one dimension is split into: one of them stays removable."""
    if labels is None or len(sizes) == 1:
        return [labels] if len(sizes) == 1 else [None] * len(sizes)
    table = labels.reshape(sizes)
    natural = [axis for axis in range(len(sizes)) if _uniform(np.moveaxis(table, axis, 0).reshape(sizes[axis], -1))]
    chosen = natural[0] if natural else _choose(flow, labels, sizes)
    rows = np.moveaxis(table, chosen, 0).reshape(sizes[chosen], -1)
    if not natural:
        flow.tie(np.repeat(rows[:, 0], rows.shape[1]), rows.reshape(-1))
    return [rows[:, 0] if axis == chosen else None for axis in range(len(sizes))]


def _uniform(rows: np.ndarray[Any, np.dtype[np.int64]]) -> bool:
    """Whether every index along the axis already has one label."""
    return bool((rows == rows[:, :1]).all())


def _choose(flow: Flow, labels: np.ndarray[Any, np.dtype[np.int64]], sizes: list[int]) -> int:
    """The axis that stays removable: the heads (or the width of a head) before an attention, else the inner axis, which
    is the offset in every group."""
    last = len(sizes) - 1
    if not feeds_attention(flow.node):
        return _turned(flow, last, 0, "split")
    if shape_of(flow.node)[-2:] == (1, sizes[last]):  # one head: only its width can shrink
        return last
    packed = last > 1 and sizes[last - 1] in (2, 3) and sizes[last - 2] > 3  # (heads, 3, width), else (3, heads, width)
    heads = last - 2 if packed else last - 1
    chosen = heads if flow.split == "heads" else last
    flow.heads.append((labels, labels))
    return _turned(flow, chosen, last if chosen == heads else heads, "heads")


def _turned(flow: Flow, chosen: int, other: int, form: str) -> int:
    flow.grouped[flow.node] = form
    return other if flow.node.name in flow.flipped else chosen


def feeds_attention(node: fx.Node) -> bool:
    """Whether a product of two computed values is near downstream, past nothing but moves and scalings."""
    seen, front = {node}, [node]
    for _ in range(_LOOKAHEAD):
        users = [user for member in front for user in member.users if user not in seen]
        kinds = [_kind(user) for user in users]
        if any(kind in _ATTENTION for kind in kinds):
            return True
        front = list(dict.fromkeys(user for user, kind in zip(users, kinds, strict=True) if kind in _TRANSPARENT))
        seen.update(front)
        if not front:
            return False
    return False


def _kind(node: fx.Node) -> str:
    return getattr(node.meta.get("fxc"), "kind", None) or kind_of(node)


@resize("reshape")
def resize_reshape(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Sizes follow the labels of the result."""
    if shuffle.straightened(edit, node):
        return
    given = args["shape"]
    given = tuple(given) if isinstance(given, tuple | list) else (given,)
    spelled = _spelled(edit, node, given)
    new = edit.sizes(node, spelled, edit.of(node)) or spelled
    if new != given:
        edit.set(node, shape=new)


def _spelled(edit: Edit, node: fx.Node, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """`given` with a -1 for a size that is computed from the batch and changes, as that of a batch merged with heads,
    where the other sizes are known: then a -1 that was elsewhere is written as its number."""
    dims, sizes = edit.of(node), shape_of(node)
    computed = [place for place, size in enumerate(given) if isinstance(size, fx.Node) and edit.changed(dims[place])]
    dynamic = node.meta["fxc"].dynamic
    if len(computed) != 1 or any(size == -1 and dynamic[place] for place, size in enumerate(given)):
        return given
    known = [sizes[place] if size == -1 else size for place, size in enumerate(given)]
    known[computed[0]] = -1
    return tuple(known)


@resize("unflatten")
def resize_unflatten(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Sizes follow the labels of the parts."""
    if shuffle.straightened(edit, node):
        return
    sizes = tuple(args["sizes"])
    place = args["dim"] % len(shape_of(args["input"]))
    new = edit.sizes(node, sizes, edit.of(node)[place : place + len(sizes)])
    if new:
        edit.set(node, sizes=new)
