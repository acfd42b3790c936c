"""Operators that work index by index: labels unify position by position, with broadcasting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ..coupling_flow import Dim, Dims, Flow, Value, rule, shape_of
from ..ops import OPS


def broadcast(flow: Flow, operands: Sequence[object], drop: int = 0) -> Dims:
    """Labels of the broadcast of `operands` (nodes), without their last `drop` dimensions."""
    shapes = [shape_of(operand) for operand in operands]
    labels = [flow.of(operand) for operand in operands]
    rank = max(len(shape) for shape in shapes) - drop
    return tuple(_one(flow, [(shape, dims) for shape, dims in zip(shapes, labels, strict=True)], place - drop)
                 for place in range(-rank, 0))


def _one(flow: Flow, operands: list[tuple[tuple[int, ...], Dims]], place: int) -> Dim:
    """Tie what the operands have at `place` (from the end); those of size 1 are repeated and have no say."""
    result: Dim = None
    started = False
    for shape, dims in operands:
        if len(shape) < -place or shape[place] == 1:
            continue
        result = flow.tie(result, dims[place]) if started else dims[place]
        started = True
    return result


def pointwise(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Any elementwise operator: all its tensor arguments broadcast together. Arithmetic on sizes has no labels."""
    operands = [value for value in args.values() if flow.is_tensor(value)]
    return broadcast(flow, operands) if operands and _is_tensor_node(node) else None


def _is_tensor_node(node: fx.Node) -> bool:
    return getattr(node.meta.get("fxc"), "shape", None) is not None


rule(*(name for name, op in OPS.items() if op.family == "elementwise"))(pointwise)


@rule("to", "clone", "contiguous", "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
      "feature_alpha_dropout", "rrelu", "stochastic_depth", "bernoulli", "zeros_like", "ones_like", "full_like",
      "empty_like", "rand_like", "randn_like")
def same(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """The result has the labels of the first argument."""
    return flow.of(args["input"])


@rule("prelu")
def prelu(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """A slope per channel (dimension 1), or one for all."""
    dims = flow.of(args["input"])
    weight = flow.parameter(args, "weight")
    if weight is None or weight[0] is None or len(dims) < 2:
        return dims
    return (dims[0], flow.tie(dims[1], weight[0]), *dims[2:])


@rule("mask")
def mask(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """A mask on a parameter (`nn/mask.py`): its buffers have the parameter's shape."""
    dims = flow.of(node.args[0])
    for name, buffer in flow.module().named_buffers():
        if buffer.dim() == len(dims):
            pairs = zip(dims, flow.tensor(f"{node.target}.{name}"), strict=True)
            dims = tuple(flow.tie(ours, theirs) for ours, theirs in pairs)
    return dims


@rule("glu")
def glu(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """`a * sigmoid(b)` of the two halves along `dim`."""
    dims = flow.of(args["input"])
    place = args["dim"] % len(dims)
    whole = dims[place]
    half = None if whole is None else flow.tie(whole[: len(whole) // 2], whole[len(whole) // 2 :])
    return (*dims[:place], half, *dims[place + 1 :])


@rule("cosine_similarity")
def cosine_similarity(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """A normalised product over `dim`, which is contracted."""
    dims = list(broadcast(flow, [args["x1"], args["x2"]]))
    flow.notice(dims.pop(args["dim"]), "normalises over it")
    return tuple(dims)
