"""Normalisations: their scales, shifts and statistics are tied to what they normalise; those that compute their
statistics over the removed dimension make a removal inexact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from ..coupling_edit import Edit, resize
from ..coupling_flow import Dim, Flow, Value, rule, shape_of
from .convolution import by_group, by_offset, form
from .index import replaced
from .layout import tuple_of

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


@rule("batchnorm", "batchnorm1d", "batchnorm2d", "batchnorm3d", "instancenorm", "instancenorm1d", "instancenorm2d",
      "instancenorm3d")
def per_channel(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Each channel for itself (dimension 1; 0 for an instance norm without a batch)."""
    dims = flow.of(args["input"])
    kind = node.meta["fxc"].kind
    unbatched = kind.startswith("instancenorm") and kind[-1] == "d" and len(dims) == int(kind[-2]) + 1
    channel = 0 if unbatched else 1
    if kind.startswith("instancenorm") or args.get("running_mean", node) is None or args.get("training") is True:
        for place in set(range(len(dims))) - {channel}:
            flow.notice(dims[place], "normalises over it")
    return _tied(flow, args, dims, channel)


def _tied(flow: Flow, args: Mapping[str, Any], dims: tuple[Dim, ...], channel: int) -> Value:
    labels = dims[channel]
    for name in _PER_CHANNEL:
        vector = flow.parameter(args, name)
        if vector is not None:
            labels = flow.tie(labels, vector[0])
    return replaced(dims, channel, labels)


@rule("layernorm", "rmsnorm")
def layer(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Over the last dimensions, which their weight spans."""
    dims = list(flow.of(args["input"]))
    count = len(tuple_of(args["normalized_shape"]))
    for place in range(-count, 0):
        flow.notice(dims[place], "normalises over it")
    for name in ("weight", "bias"):
        vector = flow.parameter(args, name)
        for place in range(-count, 0):
            if vector is not None:
                dims[place] = flow.tie(dims[place], vector[place])
    return tuple(dims)


@rule("groupnorm")
def group(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Whole groups leave exactly; the same offset of every group doesn't."""
    dims = flow.of(args["input"])
    groups, channels = args["num_groups"], shape_of(args["input"])[1]
    labels = dims[1]
    if form(flow, labels, groups, channels // groups) == "whole" and labels is not None:
        reps = labels.reshape(groups, -1)[:, 0]
        by_group(flow, labels, groups, reps)
        labels = np.repeat(reps, channels // groups)
    elif labels is not None:
        flow.notice(labels, "normalises over it")
        first = by_offset(flow, labels, groups)
        labels = None if first is None else np.tile(first, groups)
        if first is None:
            flow.fix(dims[1], "must keep a channel in every group")
    for name in ("weight", "bias"):
        vector = flow.parameter(args, name)
        if vector is not None:
            labels = flow.tie(labels, vector[0])
    return replaced(dims, 1, labels)


@rule("local_response_norm")
def local_response(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Over neighbouring channels."""
    dims = flow.of(args["input"])
    flow.notice(dims[1], "normalises over neighbours along it")
    return dims


@resize("groupnorm")
def resize_groups(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Whole groups that leave are no longer counted."""
    groups, kept = args["num_groups"], edit.kept(edit.of(args["input"])[1])
    if kept is None:
        return
    form_ = edit.flow.grouped.get(node, "whole" if len(kept) == groups > 1 else "offset")
    left = int(kept.reshape(groups, -1).any(axis=1).sum()) if form_ == "whole" else groups
    if node.op == "call_module":
        edit.modules[str(node.target)] = {"num_groups": left, "num_channels": int(kept.sum())}
    else:
        edit.set(node, num_groups=left)


@resize("layernorm", "rmsnorm")
def resize_layer(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """The normalised shape follows the input."""
    old = tuple_of(args["normalized_shape"])
    new = edit.sizes(node, old, edit.of(args["input"])[-len(old) :])
    if new and node.op == "call_module":
        edit.modules[str(node.target)] = {"normalized_shape": new}
    elif new:
        edit.set(node, normalized_shape=new)
