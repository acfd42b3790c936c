"""What integers go through between products: which operators have a module of their own for bytes."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..graph.ops import arguments, kind_of
from ..nn.integer import Grid
from ..nn.moving import IntAdaptiveMean, IntMaxPool2d, IntMean

READS_SIZES = ("size", "dim", "numel")  # operators that ask for the shape alone


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value for the example inputs; empty where it is no tensor."""
    shape = getattr(node.meta.get("fxc"), "shape", None)
    return shape if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape) else ()


def pair(value: Any) -> list[int]:
    """A setting of two numbers that may be given as one."""
    return [value, value] if isinstance(value, int) else list(value)


def max_pool(node: fx.Node) -> nn.Module:
    """The module for a `max_pool2d`."""
    values = arguments(node)
    kernel = pair(values["kernel_size"])
    return IntMaxPool2d(kernel, pair(values.get("stride") or kernel), pair(values.get("padding", 0)),
                        pair(values.get("dilation", 1)), bool(values.get("ceil_mode", False)))


def adaptive_mean(node: fx.Node) -> nn.Module:
    """The module for an `adaptive_avg_pool2d` whose images have as many places as it gives."""
    return IntAdaptiveMean(pair(arguments(node)["output_size"]))


MODULES = {"max_pool2d": max_pool, "adaptive_avg_pool2d": adaptive_mean}  # of what passes bytes by a module of its own


def mean(node: fx.Node, reads: Grid) -> IntMean:
    """The module for a mean over all places of images."""
    keeps = kind_of(node) == "adaptive_avg_pool2d" or bool(arguments(node).get("keepdim", False))
    return IntMean(reads, keeps)


def interleaved(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two halves, where `node` ends a channel shuffle of two groups: a concatenation of two images with equally
    many channels, split into [N, 2, C, H, W], transposed, and merged."""
    turn = _input(node, "reshape", "transpose")
    split = _input(turn, "transpose", "reshape")
    joined = _input(split, "reshape", "cat")
    if turn is None or split is None or joined is None:
        return None
    dims, values = arguments(turn), arguments(joined)
    parts = [part for part in values["tensors"] if isinstance(part, fx.Node)]
    shapes = [shape_of(part) for part in parts]
    if len(parts) != 2 or shapes[0] != shapes[1] or len(shapes[0]) != 4:
        return None
    _, channels, *places = shapes[0]
    shuffles = ({dims["dim0"], dims["dim1"]} == {1, 2} and values.get("dim", 0) in (1, -3)
                and len(values["tensors"]) == 2 and shape_of(split)[1:] == (2, channels, *places)
                and shape_of(node)[1:] == (2 * channels, *places))
    return (parts[0], parts[1]) if shuffles else None


def _input(node: fx.Node | None, kind: str, of: str) -> fx.Node | None:
    """What `node`, of one kind, reads, if that is of the other."""
    if node is None or kind_of(node) not in (kind, "view"):
        return None
    found = arguments(node)["input"]
    return found if isinstance(found, fx.Node) and kind_of(found) in (of, "view") else None
