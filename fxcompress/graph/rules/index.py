"""Operators that take parts: slices, chunks, selections, lookups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from ..coupling_edit import Edit, resize
from ..coupling_flow import Dim, Dims, Flow, NoRuleError, Value, rule, shape_of
from .elementwise import broadcast


def replaced(dims: Dims, place: int, dim: Dim) -> Dims:
    """`dims` with another one at `place`."""
    changed = list(dims)
    changed[place] = dim
    return tuple(changed)


def removed(dims: Dims, place: int) -> Dims:
    """`dims` without the one at `place`."""
    changed = list(dims)
    changed.pop(place)
    return tuple(changed)


@rule("split", "chunk")
def split(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Consecutive stretches of the labels, as long as the parts are."""
    dims = flow.of(args["tensor"] if "tensor" in args else args["input"])
    place = args["dim"] % len(dims)
    sizes = [int(shape[place]) for shape in node.meta["fxc"].shape]
    ends = np.cumsum([0, *sizes])
    labels = dims[place]
    return [replaced(dims, place, None if labels is None else flow.piece(labels[start : start + size]))
            for start, size in zip(ends, sizes, strict=False)]


@resize("split", "chunk")
def resize_split(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """The parts keep what is kept of them; equal parts that stay equal stay a chunk."""
    source = args["tensor"] if "tensor" in args else args["input"]
    place = args["dim"] % len(shape_of(source))
    parts = edit.parts(node)
    old = [int(shape[place]) for shape in node.meta["fxc"].shape]
    new = [edit.size(part[place], size) for part, size in zip(parts, old, strict=True)]
    if new == old or ("chunks" in args and len(set(new)) == 1):
        return
    edit.become(node, "split", tensor=source, split_size_or_sections=new, dim=args["dim"])


@rule("unbind")
def unbind(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """The dimension is taken apart, so that none of it can go."""
    dims = flow.of(args["input"])
    flow.fix(dims[args["dim"]], "takes it apart, index by index")
    return [removed(dims, args["dim"])] * len(node.meta["fxc"].shape)


@rule("narrow")
def narrow(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """A stretch of the labels."""
    dims = flow.of(args["input"])
    place, start = args["dim"] % len(dims), args["start"]
    labels = dims[place]
    if labels is None:
        return dims
    if not isinstance(start, int) or not isinstance(args["length"], int):
        raise NoRuleError("takes a stretch that isn't constant")
    start %= len(labels)
    return replaced(dims, place, flow.piece(labels[start : start + args["length"]]))


@resize("narrow")
def resize_narrow(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Start and length count what is kept."""
    place = args["dim"] % len(shape_of(node))
    labels = edit.of(args["input"])[place]
    if edit.changed(labels):
        size = shape_of(args["input"])[place]
        edit.set(node, start=edit.before(labels, args["start"], size),
                 length=edit.size(edit.of(node)[place], args["length"]))


@rule("index_select")
def index_select(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Rows chosen by a tensor: which ones isn't known, so the dimension stays."""
    dims = flow.of(args["input"])
    flow.fix(dims[args["dim"]], "picks rows of it by number")
    index = flow.of(args["index"])
    return replaced(dims, args["dim"], index[0] if index else None)


@rule("gather", "take_along_dim")
def gather(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Picks along `dim` by number; elsewhere index by index."""
    index = args["index"] if "index" in args else args["indices"]
    if args["dim"] is None or shape_of(index) == () or len(shape_of(index)) != len(shape_of(args["input"])):
        raise NoRuleError("picks over all dimensions")
    dims, chosen = list(flow.of(args["input"])), flow.of(index)
    for place, labels in enumerate(dims):
        if place == args["dim"] % len(dims):
            flow.fix(labels, "picks rows of it by number")
            dims[place] = chosen[place]
        else:
            dims[place] = flow.tie(labels, chosen[place])
    return tuple(dims)


@rule("embedding", "embedding_bag")
def embedding(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Rows are looked up by number and stay; the width can shrink. A bag sums those of one dimension up."""
    weight = flow.parameter(args, "weight")
    if weight is None:
        raise NoRuleError("looks up in a table that isn't a parameter")
    flow.fix(weight[0], "looks its rows up by number")
    source = flow.source(args, "weight")
    if source is not None:
        flow.produce(weight[1], (source, 1))
    return (*(None,) * (len(shape_of(node)) - 1), weight[1])


@rule("one_hot", "nonzero", "masked_select")
def by_value(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """The result's shape or meaning depends on the values."""
    raise NoRuleError("makes positions of values")


# Indexing with brackets


def entries(index: Any, rank: int) -> list[Any]:
    """The index of each dimension, an ellipsis spelled out; None stands for a new dimension."""
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in [item for item in items if not isinstance(item, fx.Node)]:
        items.append(Ellipsis)
    place = next(place for place, item in enumerate(items) if item is Ellipsis)
    return [*items[:place], *[slice(None)] * (rank - taken), *items[place + 1 :]]


@rule("getitem")
def getitem(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """A part of a tuple, or brackets on a tensor: numbers, slices, None, an ellipsis, tensors of positions."""
    value = flow.values.get(args["input"])
    if isinstance(value, list):
        return value[args["index"]]
    if value is None or not isinstance(value, tuple):
        return None
    items = entries(args["index"], len(value))
    if any(_is_array(item) for item in items):
        return _advanced(flow, node, value, items)
    result: list[Dim] = []
    dims = iter(zip(value, shape_of(args["input"]), strict=True))
    for item in items:
        if item is None:
            result.append(None)
        elif isinstance(item, slice):
            result.append(_sliced(flow, *next(dims), item))
        else:
            _picked(flow, next(dims)[0], item)
    return tuple(result)


def _is_array(item: Any) -> bool:
    return isinstance(item, list) or (isinstance(item, fx.Node) and shape_of(item) != ())


def _sliced(flow: Flow, labels: Dim, size: int, part: slice) -> Dim:
    if labels is None or part == slice(None):
        return labels
    if any(isinstance(bound, fx.Node) for bound in (part.start, part.stop, part.step)):
        flow.fix(labels, "slices it at places that aren't constant")
        return None
    if part.step not in (None, 1):
        flow.fix(labels, "takes every so-manieth of it")
        return None
    return flow.piece(labels[part])


def _picked(flow: Flow, labels: Dim, item: Any) -> None:
    if labels is None:
        return
    whole = labels if isinstance(item, fx.Node) else labels[item : item + 1 or None]
    flow.fix(whole, "picks it by number")


def _advanced(flow: Flow, node: fx.Node, value: Dims, items: list[Any]) -> Value:
    """Tensors of positions. Their dimensions stand where the first of them stands, when they stand side by side."""
    arrays = [place for place, item in enumerate(items) if _is_array(item)]
    together = arrays == list(range(arrays[0], arrays[-1] + 1))
    chosen = broadcast(flow, [items[place] for place in arrays if isinstance(items[place], fx.Node)]) if all(
        isinstance(items[place], fx.Node) for place in arrays) else None
    if not together or chosen is None or any(not isinstance(item, slice) and not _is_array(item) for item in items):
        raise NoRuleError("picks positions of several dimensions apart")
    if any(_is_boolean(items[place]) for place in arrays):
        raise NoRuleError("picks where a condition holds")
    result: list[Dim] = []
    for place, (labels, item) in enumerate(zip(value, items, strict=True)):
        if place in arrays:
            flow.fix(labels, "picks rows of it by number")
            result += chosen if place == arrays[0] else ()
        else:
            result.append(_sliced(flow, labels, 0, item))
    return tuple(result)


def _is_boolean(item: Any) -> bool:
    return str(getattr(item.meta.get("fxc"), "dtype", "")) == "torch.bool"


@resize("getitem")
def resize_getitem(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Bounds and positions count what is kept before them."""
    value = edit.flow.values.get(args["input"])
    if not isinstance(value, tuple) or not any(edit.changed(labels) for labels in value):
        return
    items, place = entries(args["index"], len(value)), 0
    shape = shape_of(args["input"])
    for slot, item in enumerate(items):
        if item is None:
            continue
        labels, size = value[place], shape[place]
        place += 1
        if edit.changed(labels) and isinstance(item, slice):
            items[slot] = _moved(edit, labels, size, item)
        elif edit.changed(labels) and isinstance(item, int):
            items[slot] = edit.before(labels, item, size)
    edit.set(node, index=tuple(items))


def _moved(edit: Edit, labels: Dim, size: int, part: slice) -> slice:
    start = None if part.start is None else edit.before(labels, part.start, size)
    stop = None if part.stop is None else edit.before(labels, part.stop, size)
    return slice(start, stop, part.step)


@rule("slice_scatter")
def slice_scatter(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Writes a stretch: the written indices leave with those they overwrite."""
    dims, source = list(flow.of(args["input"])), list(flow.of(args["src"]))
    place = args["dim"] % len(dims)
    labels, written = dims[place], source[place]
    if args["step"] != 1 or any(isinstance(args[name], fx.Node) for name in ("start", "end")):
        raise NoRuleError("writes at places that a rule can't follow")
    for at, other in enumerate(source):
        if at != place:
            dims[at] = flow.tie(dims[at], other)
    if labels is None:
        flow.fix(written, "writes it into a part of another value")
    else:
        flow.tie(labels[slice(args["start"], args["end"])], written, "writes something into it that can't shrink")
    return tuple(dims)


@resize("slice_scatter")
def resize_slice_scatter(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Bounds count what is kept before them."""
    place = args["dim"] % len(shape_of(node))
    labels, size = edit.of(args["input"])[place], shape_of(node)[place]
    bounds = {name: args[name] if args[name] is None else edit.before(labels, args[name], size)
              for name in ("start", "end")}
    if edit.changed(labels):
        edit.set(node, **bounds)


@rule("select_scatter", "index_put", "index_add", "index_copy", "index_fill", "scatter", "scatter_add",
      "masked_scatter")
def written(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Writes into a part: dimensions of full size go through, the one written along stays."""
    dims = list(flow.of(args["input"]))
    place = args.get("dim")
    source = args.get("src", args.get("source"))
    if not isinstance(place, int) or not flow.is_tensor(source) or len(shape_of(source)) != len(dims):
        raise NoRuleError("writes at places that a rule can't follow")
    flow.fix(dims[place], "writes into a part of it")
    dims[place] = None
    parts = [flow.of(source), *([flow.of(args["index"])] if len(shape_of(args.get("index"))) == len(dims) else [])]
    for other in parts:
        for at, labels in enumerate(other):
            if at == place % len(dims):
                flow.fix(labels, "writes it into a part of another value")
            else:
                dims[at] = flow.tie(dims[at], labels)
    return tuple(dims)



