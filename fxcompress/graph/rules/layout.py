"""Operators that move indices about: they do to the labels what they do to the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from ..coupling_edit import Edit, resize
from ..coupling_flow import Dim, Dims, Flow, NoRuleError, Value, rule, shape_of


def tuple_of(value: Any) -> tuple[Any, ...]:
    """One number or several, as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@rule("permute")
def permute(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Dimensions in another order."""
    dims = flow.of(args["input"])
    return tuple(dims[place] for place in args["dims"])


@rule("transpose")
def transpose(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Two dimensions change places."""
    dims = list(flow.of(args["input"]))
    a, b = args["dim0"], args["dim1"]
    dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


@rule("movedim")
def movedim(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Dimensions `source` go to `destination`, the others keep their order."""
    dims = flow.of(args["input"])
    rank = len(dims)
    pairs = zip(tuple_of(args["source"]), tuple_of(args["destination"]), strict=True)
    moved = {destination % rank: source % rank for source, destination in pairs}
    rest = iter(place for place in range(rank) if place not in moved.values())
    return tuple(dims[moved[place] if place in moved else next(rest)] for place in range(rank))


@rule("rot90")
def rot90(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """A rotation of two dimensions, neither of which may shrink."""
    dims = list(flow.of(args["input"]))
    for place in args["dims"]:
        flow.fix(dims[place], "rotates it")
        dims[place] = None
    return tuple(dims)


@rule("flip")
def flip(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Labels in reverse."""
    dims = list(flow.of(args["input"]))
    for place in tuple_of(args["dims"]):
        labels = dims[place]
        dims[place] = None if labels is None else labels[::-1]
    return tuple(dims)


@rule("roll")
def roll(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Labels rolled; without dimensions the whole tensor is rolled as one vector."""
    dims = list(flow.of(args["input"]))
    if args["dims"] in (None, (), []):
        if len(dims) != 1:
            raise NoRuleError("rolls over several dimensions at once")
        return (None if dims[0] is None else np.roll(dims[0], tuple_of(args["shifts"])[0]),)
    for shift, place in zip(tuple_of(args["shifts"]), tuple_of(args["dims"]), strict=True):
        labels = dims[place]
        dims[place] = None if labels is None else np.roll(labels, shift)
    return tuple(dims)


@resize("roll")
def resize_roll(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """The shift becomes the number of kept indices that wrap around."""
    dims = edit.of(args["input"])
    places = tuple_of(args["dims"]) if args["dims"] not in (None, (), []) else (0,)
    shifts = list(tuple_of(args["shifts"]))
    for slot, place in enumerate(places):
        mask = edit.kept(dims[place])
        if mask is not None:
            wrapped = shifts[slot] % len(mask)
            shifts[slot] = int(mask[len(mask) - wrapped :].sum())
    edit.set(node, shifts=tuple(shifts), dims=tuple(places))


@rule("repeat", "tile")
def repeat(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Labels repeated end to end; new leading dimensions are of one index repeated."""
    dims = flow.of(args["input"])
    repeats = tuple_of(args["repeats"] if "repeats" in args else args["dims"])
    if not all(isinstance(count, int) for count in repeats):
        repeats = _known(node, args["input"], len(repeats))
    repeats = (1,) * (len(dims) - len(repeats)) + repeats
    shape = (1,) * (len(repeats) - len(dims)) + shape_of(args["input"])
    dims = (None,) * (len(repeats) - len(dims)) + dims
    return tuple(_tiled(flow, labels, size, count) for labels, size, count in zip(dims, shape, repeats, strict=True))


def _known(node: fx.Node, source: fx.Node, rank: int) -> tuple[int, ...]:
    """How often each dimension is repeated, from the shapes."""
    new, old = shape_of(node), shape_of(source)
    old = (1,) * (rank - len(old)) + old
    return tuple(after // before for after, before in zip(new[-rank:], old, strict=True))


def _tiled(flow: Flow, labels: Dim, size: int, count: int) -> Dim:
    if labels is None or count == 1:
        return labels
    return np.tile(labels, count)


@rule("repeat_interleave")
def repeat_interleave(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Every index repeated in place."""
    dims = list(flow.of(args["input"]))
    count, place = args["repeats"], args["dim"]
    if place is None or not isinstance(count, int):
        raise NoRuleError("repeats a number of times that isn't a constant, or over all dimensions")
    labels = dims[place]
    dims[place] = None if labels is None else np.repeat(labels, count)
    return tuple(dims)


@resize("repeat_interleave")
def resize_repeat_interleave(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """A given size of the result isn't needed."""
    if args["output_size"] is not None and args["dim"] is not None:
        edit.set(node, output_size=edit.size(edit.of(node)[args["dim"]], args["output_size"]))


@rule("expand")
def expand(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """One index repeated is a constant, whose labels follow whatever they meet; the batch is untracked anyway."""
    dims, old, new = flow.of(args["input"]), shape_of(args["input"]), shape_of(node)
    lead = len(new) - len(dims)
    sizes = args["size"]
    known = [isinstance(size, int) for size in (sizes if isinstance(sizes, list | tuple) else (sizes,))]
    result: list[Dim] = []
    for place, size in enumerate(new):
        kept = place >= lead and old[place - lead] == size
        result.append(dims[place - lead] if kept else flow.fresh(size, weak=True) if known[place] else None)
    return tuple(result)


@resize("expand")
def resize_expand(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Sizes follow the labels of the result."""
    new = edit.sizes(node, tuple_of(args["size"]), edit.of(node))
    if new:
        edit.set(node, size=new)


@rule("cat")
def cat(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Label arrays end to end along `dim`; the other dimensions unify."""
    parts = [part for part in args["tensors"] if len(shape_of(part)) == len(shape_of(node))]
    place = args["dim"] % len(shape_of(node))
    return tuple(_joined(flow, parts, d) if d == place else _all_tied(flow, parts, d)
                 for d in range(len(shape_of(node))))


def _joined(flow: Flow, parts: list[fx.Node], place: int) -> Dim:
    labels = [flow.of(part)[place] for part in parts]
    if all(dim is None for dim in labels):
        return None
    sizes = [shape_of(part)[place] for part in parts]
    return np.concatenate([np.full(size, -1) if dim is None else dim for dim, size in zip(labels, sizes, strict=True)])


def _all_tied(flow: Flow, parts: list[fx.Node], place: int) -> Dim:
    result = flow.of(parts[0])[place]
    for part in parts[1:]:
        result = flow.tie(result, flow.of(part)[place])
    return result


@rule("stack")
def stack(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """A new dimension, of which nothing can be removed; all others unify."""
    parts = list(args["tensors"])
    dims = [_all_tied(flow, parts, d) for d in range(len(shape_of(parts[0])))]
    dims.insert(args["dim"] % len(shape_of(node)), None)
    return tuple(dims)


@rule("meshgrid")
def meshgrid(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Coordinates: nothing of them can be removed."""
    raise NoRuleError("makes coordinates of it")


@rule("pixel_shuffle")
def pixel_shuffle(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Each r·r consecutive channels become one."""
    return _shuffled(flow, flow.of(args["input"]), args["upscale_factor"] ** 2, shrink=True)


@rule("pixel_unshuffle")
def pixel_unshuffle(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Each channel becomes r·r consecutive ones."""
    return _shuffled(flow, flow.of(args["input"]), args["downscale_factor"] ** 2, shrink=False)


def _shuffled(flow: Flow, dims: Dims, block: int, shrink: bool) -> Dims:
    labels = dims[-3]
    if labels is not None and shrink:
        table = labels.reshape(-1, block)
        flow.tie(np.repeat(table[:, 0], block), labels)
        labels = table[:, 0]
    elif labels is not None:
        labels = np.repeat(labels, block)
    for spatial in dims[-2:]:
        flow.fix(spatial, "moves it into channels or out of them")
    return (*dims[:-3], labels, None, None)


@rule("unfold")
def unfold(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """(N, C, H, W) -> (N, C·k·k, blocks): each channel becomes k·k consecutive ones."""
    dims = flow.of(args["input"])
    for spatial in dims[-2:]:
        flow.fix(spatial, "slides over it")
    labels = dims[-3]
    block = shape_of(node)[-2] // shape_of(args["input"])[-3]
    return (*dims[:-3], None if labels is None else np.repeat(labels, block), None)


@rule("fold")
def fold(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """(N, C·k·k, blocks) -> (N, C, H, W): each k·k consecutive rows make one channel."""
    dims = flow.of(args["input"])
    flow.fix(dims[-1], "slides over it")
    labels = dims[-2]
    if labels is not None:
        table = labels.reshape(shape_of(node)[-3], -1)
        flow.tie(np.repeat(table[:, 0], table.shape[1]), labels)
        labels = table[:, 0]
    return (*dims[:-2], labels, None, None)


@rule("pad")
def pad(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Padding with a constant adds indices that can go (they only hold the constant); other modes copy real ones."""
    dims, shape = list(flow.of(args["input"])), shape_of(args["input"])
    amounts = args["pad"]
    for slot in range(len(amounts) // 2):
        place = len(dims) - 1 - slot
        dims[place] = _padded(flow, dims[place], shape[place], amounts[2 * slot : 2 * slot + 2], args["mode"])
    return tuple(dims)


def _padded(flow: Flow, labels: Dim, size: int, amounts: tuple[Any, Any], mode: str) -> Dim:
    left, right = amounts
    if labels is None or (left == 0 and right == 0):
        return labels
    if mode != "constant" or not isinstance(left, int) or not isinstance(right, int) or min(left, right) < 0:
        flow.fix(labels, "pads it by more than a constant")
        return None
    ends = [np.arange(flow.count, flow.count + left), labels, np.arange(flow.count + left, flow.count + left + right)]
    flow.count += left + right
    return np.concatenate(ends)


@resize("pad")
def resize_pad(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """As much is added as is kept of it."""
    amounts, dims = list(args["pad"]), edit.of(node)
    for slot in range(len(amounts) // 2):
        mask = edit.kept(dims[len(dims) - 1 - slot])
        if mask is not None:
            left, right = amounts[2 * slot : 2 * slot + 2]
            amounts[2 * slot] = int(mask[:left].sum())
            amounts[2 * slot + 1] = int(mask[len(mask) - right :].sum())
    edit.set(node, pad=tuple(amounts))
