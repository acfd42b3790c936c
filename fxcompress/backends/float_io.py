"""Layers that read and give floats and hold integers: what they share when they are lowered."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from ..graph.captured import Captured
from ..graph.interpret import evaluated
from ..graph.ops import arguments, module_of, path_of
from ..graph.provenance import inherit
from ..nn.affine import quantize
from ..nn.quantizer import WeightQuantizer, in_groups


def layers_of(captured: Captured) -> Iterator[tuple[fx.Node, WeightQuantizer]]:
    """The layers whose weight a `WeightQuantizer` rounds, each with that, in graph order."""
    for node in list(captured.graph.nodes):
        weight = arguments(node).get("weight") if node.op == "call_function" else None
        found = module_of(weight) if isinstance(weight, fx.Node) and weight.op == "call_module" else None
        if isinstance(found, WeightQuantizer) and found.on:
            yield node, found


def rounded(captured: Captured, node: fx.Node, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """(integers of the weight's shape, scale, zero point) of the layer `node`, both [out, groups]."""
    with torch.no_grad():
        weight = evaluated(captured.module, arguments(node)["weight"].args[0]).detach()
        scale, zero = quantizer.scale, quantizer.zero_point
        low, high = quantizer.scheme.low, quantizer.scheme.high
        if quantizer.group:
            scale, zero = scale.reshape(len(weight), -1), zero.reshape(len(weight), -1)
            integers = quantize(in_groups(weight, quantizer.group), scale[..., None], zero[..., None], low, high,
                                torch.int8)
            integers = integers.flatten(1)[:, : weight[0].numel()].reshape(weight.shape)
        else:
            scale, zero = (part.expand(len(weight))[:, None] for part in (scale, zero))
            shape = (-1, *[1] * (weight.dim() - 1))
            integers = quantize(weight, scale.reshape(shape), zero.reshape(shape), low, high, torch.int8)
        return integers, scale.clone(), zero.to(torch.int8)


def bias_of(captured: Captured, node: fx.Node) -> Tensor | None:
    """The bias of the layer `node` as it is now."""
    bias = arguments(node).get("bias")
    return evaluated(captured.module, bias).detach().clone() if isinstance(bias, fx.Node) else None


def put_kernel(captured: Captured, node: fx.Node, module: nn.Module, read: fx.Node) -> fx.Node:
    """A call of `module` on `read` in the place of the layer `node`, at `integer` below its path; the new node."""
    path = f"{path_of(node) or node.name}.integer"
    owner, _, leaf = path.rpartition(".")
    captured.module.get_submodule(owner).add_module(leaf, module.eval())
    with captured.graph.inserting_after(node):
        made = captured.graph.call_module(path, (read,))
    made.meta["path"] = path_of(node)
    inherit(made, node)
    node.replace_all_uses_with(made)
    return made
