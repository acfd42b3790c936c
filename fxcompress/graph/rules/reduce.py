"""Operators that reduce, scan or normalise along dimensions, pooling and resizing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from ..coupling_flow import Dims, Flow, NoRuleError, Value, rule, shape_of
from .layout import tuple_of

_POSITIONS = ("argmax", "argmin", "sort", "argsort", "topk", "cumsum", "cumprod", "median")


def places(args: Mapping[str, Any], rank: int) -> list[int]:
    """The dimensions an operator works along; all of them if none is given."""
    given = args.get("dim")
    if given is None or given in ((), []):
        return list(range(rank))
    return sorted({place % rank if rank else 0 for place in tuple_of(given)})


@rule("sum")
def total(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """A sum contracts its dimensions, as a product with ones does."""
    dims = flow.of(args["input"])
    for place in places(args, len(dims)):
        flow.consume(args["input"], place, dims[place])
    return reduced(flow, node, dims, args)


@rule("mean", "amax", "amin", "max", "min", "prod", "var", "std", "norm", "logsumexp", "all", "any", "var_mean",
      "std_mean", "vector_norm", "nansum")
def statistic(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """A statistic over its dimensions changes when an index leaves them."""
    if "other" in args and args["other"] is not None:
        raise NoRuleError("compares two values")
    dims = flow.of(args["input"])
    for place in places(args, len(dims)):
        flow.notice(dims[place], "takes a statistic over it")
    return reduced(flow, node, dims, args)


def reduced(flow: Flow, node: fx.Node, dims: Dims, args: Mapping[str, Any]) -> Value:
    """Labels of the result: without the reduced dimensions, or with them of size 1; for each of several results."""
    gone = places(args, len(dims))
    keep = bool(args.get("keepdim"))
    result = tuple(None if place in gone else labels for place, labels in enumerate(dims) if keep or place not in gone)
    several = isinstance(flow_shape(node), tuple) and any(isinstance(part, tuple) for part in flow_shape(node))
    return [result] * len(flow_shape(node)) if several else result


def flow_shape(node: fx.Node) -> tuple[Any, ...]:
    """The shape a node's fact gives, of a tensor or a tuple of them."""
    return getattr(node.meta.get("fxc"), "shape", None) or ()


@rule(*_POSITIONS)
def positional(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Positions or the order along a dimension matter: it stays. Elsewhere labels go through."""
    dims = list(flow.of(args["input"]))
    for place in places(args, len(dims)):
        flow.fix(dims[place], "depends on positions along it")
        dims[place] = None
    if len(shape_of(node)) != len(dims) and not isinstance(flow_shape(node)[0] if flow_shape(node) else 0, tuple):
        return reduced(flow, node, tuple(dims), args)
    several = any(isinstance(part, tuple) for part in flow_shape(node))
    return [tuple(dims)] * len(flow_shape(node)) if several else tuple(dims)


@rule("softmax", "log_softmax", "softmin", "normalize")
def normalised(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Normalises along `dim`: removal there changes the others."""
    dims = flow.of(args["input"])
    for place in places(args, len(dims)):
        flow.notice(dims[place], "normalises over it")
    return dims


@rule("tril", "triu")
def triangle(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Positions along the last two dimensions matter."""
    dims = flow.of(args["input"])
    for labels in dims[-2:]:
        flow.fix(labels, "depends on positions along it")
    return (*dims[:-2], None, None)


def spatial(flow: Flow, dims: Dims, count: int, reason: str) -> Dims:
    """`dims` with the last `count` of them untracked."""
    for labels in dims[len(dims) - count :]:
        flow.fix(labels, reason)
    return (*dims[: len(dims) - count], *(None,) * count)


def _pool(count: int) -> None:
    @rule(*(f"{name}_pool{count}d" for name in ("max", "avg", "adaptive_avg", "adaptive_max", "lp")))
    def pool(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
        """Channels go through, spatial extents don't."""
        dims = spatial(flow, flow.of(args["input"]), count, "pools over it")
        return [dims] * len(flow_shape(node)) if any(isinstance(p, tuple) for p in flow_shape(node)) else dims


for _count in (1, 2, 3):
    _pool(_count)


@rule("interpolate")
def interpolate(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Batch and channels go through."""
    dims = flow.of(args["input"])
    return spatial(flow, dims, len(dims) - 2, "resizes it")


@rule("grid_sample")
def grid_sample(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Batch and channels go through; the grid is coordinates."""
    for labels in flow.of(args["grid"]):
        flow.fix(labels, "reads it as coordinates")
    dims = flow.of(args["input"])
    return spatial(flow, dims, len(dims) - 2, "samples it")
