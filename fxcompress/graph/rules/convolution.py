"""Convolutions of any rank, plain, grouped, depthwise and transposed.

A grouped convolution keeps equal groups in one of two forms. *Whole* groups leave with all their inputs and outputs: a
depthwise convolution's channel is a group. Or the same *offset* leaves every group, and the number of groups stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from ..coupling_edit import Edit, resize
from ..coupling_flow import Dim, Dims, Flow, Labels, NoRuleError, Value, rule, shape_of
from .layout import tuple_of

_KINDS = tuple(f"conv{n}d" for n in (1, 2, 3))
_TRANSPOSED = tuple(f"conv_transpose{n}d" for n in (1, 2, 3))


def form(flow: Flow, labels: Dim, groups: int, wide: int) -> str:
    """Which form a grouped operator takes: the one with the finer units, unless the analysis was told to turn it;
    `wide` is the width of a group. An input that can't shrink leaves only the second."""
    if labels is None:
        return "offset"
    chosen = "whole" if groups >= wide else "offset"
    if groups == 1 or wide == 1:
        return chosen
    if flow.node.name in flow.flipped:
        chosen = "offset" if chosen == "whole" else "whole"
    flow.grouped[flow.node] = chosen
    return chosen


def by_group(flow: Flow, labels: Dim, groups: int, reps: Labels) -> None:
    """All indices of one group have one label."""
    if labels is not None:
        flow.tie(np.repeat(reps, len(labels) // groups), labels)


def by_offset(flow: Flow, labels: Dim, groups: int) -> Dim:
    """The same offset in every group has one label: those of the first group."""
    if labels is None:
        return None
    first = labels.reshape(groups, -1)[0]
    flow.tie(np.tile(first, groups), labels)
    return first if len(first) > 1 else None


@rule(*_KINDS)
def convolution(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Weight (out, in / groups, *kernel)."""
    dims, channel = _input(flow, node, args)
    weight, bias, source = _held(flow, args)
    x, out, groups = dims[channel], weight[0], args["groups"]
    if bias is not None and out is not None:
        out = flow.tie(out, bias[0])
    follows = False
    if groups == 1:
        flow.consume_parameter(args, "weight", 1, flow.tie(x, weight[1]))
    else:
        out, follows = _grouped(flow, args, x, weight, out, groups)
    flow.produce(out, *((name, 0) for name in source), follows=follows)
    return _result(flow, dims, channel, out)


def _grouped(flow: Flow, args: Mapping[str, Any], x: Dim, weight: Dims, out: Dim, groups: int) -> tuple[Dim, bool]:
    wide = max(shape_of(args["input"])[-len(weight) + 1] // groups, 1)
    if form(flow, x, groups, wide) == "whole" and x is not None and out is not None:
        known = x if (x >= 0).all() else out  # the input's labels say more: which of them are heads, for one
        reps = known.reshape(groups, -1)[:, 0]
        by_group(flow, x, groups, reps)
        by_group(flow, out, groups, reps)
        flow.fix(weight[1], "is the width of a group of which all or nothing leaves")
        return np.repeat(reps, len(out) // groups), wide == 1
    inner = by_offset(flow, x, groups)
    flow.consume_parameter(args, "weight", 1, flow.tie(inner, weight[1]))
    first = by_offset(flow, out, groups)
    if first is None:
        flow.fix(out, "must keep a channel in every group")
        return None, False
    return np.tile(first, groups), False


@rule(*_TRANSPOSED)
def transposed(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Weight (in, out / groups, *kernel)."""
    dims, channel = _input(flow, node, args)
    weight, bias, source = _held(flow, args)
    x, groups = flow.tie(dims[channel], weight[0]), args["groups"]
    wide = shape_of(args["input"])[channel] // groups
    if groups == 1:
        flow.consume_parameter(args, "weight", 0, x)
        out = weight[1]
        flow.produce(out, *((name, 1) for name in source))
    elif form(flow, x, groups, wide) == "whole" and x is not None:
        reps = x.reshape(groups, -1)[:, 0]
        by_group(flow, x, groups, reps)
        flow.fix(weight[1], "is the width of a group of which all or nothing leaves")
        out = np.repeat(reps, shape_of(node)[channel] // groups)
        flow.produce(out, *((name, 0) for name in source), follows=True)
    else:
        flow.consume_parameter(args, "weight", 0, x)
        by_offset(flow, x, groups)
        out = None if weight[1] is None else np.tile(weight[1], groups)
        flow.produce(out, *((name, 1) for name in source))
    if bias is not None:
        out = flow.tie(out, bias[0])
    return _result(flow, dims, channel, out)


def _held(flow: Flow, args: Mapping[str, Any]) -> tuple[Dims, Dims | None, tuple[str, ...]]:
    """Labels of the weight, with a kernel that stays, and of the bias; the tensor that the weight comes from, where
    that is known."""
    weight, bias = flow.parameter(args, "weight", (0, 1)), flow.parameter(args, "bias")
    source = flow.source(args, "weight")
    if weight is None:
        raise NoRuleError("has a weight that no rule follows")
    return weight, bias, () if source is None else (source,)


def _input(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> tuple[Dims, int]:
    """The input's labels, spatial extents that a kernel slides over fixed, and the place of its channels (an input may
    lack the batch)."""
    rank = int(node.meta["fxc"].kind[-2])
    weight = args["weight"]
    kernel = shape_of(weight) if isinstance(weight, fx.Node) else tuple(weight.shape)
    dims = list(flow.of(args["input"]))
    if args.get("padding_mode", "zeros") not in ("zeros", "reflect", "replicate", "circular"):
        raise NoRuleError("pads in a way that no rule follows")
    over_scalars = rank == 1 and 1 in kernel[:2]  # of a value for each place: these places may be channels
    for axis, (taps, step) in enumerate(zip(kernel[2:], _each(args["stride"], rank), strict=True)):
        place = len(dims) - rank + axis
        same = step == 1 and shape_of(node)[place] == shape_of(args["input"])[place]
        if same and taps > 1 and over_scalars and args.get("padding_mode", "zeros") == "zeros":
            flow.notice(dims[place], "slides over it")  # as over the channels in efficient channel attention
        elif taps > 1 or not same:
            flow.fix(dims[place], "slides over it")
            dims[place] = None
    return tuple(dims), len(dims) - rank - 1


def _each(value: Any, count: int) -> tuple[Any, ...]:
    given = tuple_of(value)
    return given * count if len(given) == 1 else given


def _result(flow: Flow, dims: Dims, channel: int, out: Dim) -> Dims:
    return (*dims[:channel], out, *dims[channel + 1 :])


@resize(*_KINDS, *_TRANSPOSED)
def resize_groups(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Whole groups that leave are no longer counted."""
    groups, dims = args["groups"], edit.of(args["input"])
    channel = len(dims) - int(node.meta["fxc"].kind[-2]) - 1
    kept = edit.kept(dims[channel])
    if groups == 1 or kept is None or edit.flow.grouped.get(node, _single(kept, groups)) != "whole":
        return
    left = int(kept.reshape(groups, -1).any(axis=1).sum())
    if node.op == "call_module":
        edit.modules[str(node.target)] = {"groups": left}
    else:
        edit.set(node, groups=left)


def _single(kept: np.ndarray[Any, np.dtype[np.bool_]], groups: int) -> str:
    """A group of one input can only leave whole."""
    return "whole" if len(kept) == groups else "offset"
