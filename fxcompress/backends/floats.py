"""What stays in float, as it is deployed on the CPU: norms folded, convolutions packed with what follows them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from ..graph.captured import Captured
from ..graph.ops import arguments, kind_of, path_of
from ..graph.propagate import drop_dead
from ..graph.provenance import inherit
from ..graph.tree import named_tensors
from ..nn.packed import PackedConv2d
from ..passes.shared.fold_norms import fold
from ..passes.shared.integer import Region, regions_of
from ..passes.shared.masking import is_there, parameter_of
from ..passes.shared.post_ops import post_op
from ..passes.shared.weights import absorb, expose, unexposable
from .int8_moves import pair
from .settling import settle

_FOLDED = ("conv1d", "conv2d", "conv3d", "linear")


def lower_floats(captured: Captured) -> list[fx.Node]:
    """Fold batch norms and pack the float convolutions of `captured`, in place; returns the nodes that were made or
    changed. Layers that share a weight stay as they are. The caller refreshes."""
    layers = [node for node in captured.graph.nodes if kind_of(node) in _FOLDED]
    folded = list(dict.fromkeys(node for node, _ in fold(captured, layers)))
    weights = _Weights(captured)
    convolutions = [node for node in layers if weights.packable(node)]
    kernels: dict[fx.Node, fx.Node] = {}
    stands: dict[fx.Node, fx.Node] = {}  # kernels by the end of the region in whose place they stand
    for region in regions_of(convolutions) if convolutions else ():
        other = region.other and stands.get(region.other, region.other)
        kernels[region.product] = stands[region.end] = _pack(captured, region, other)
    for node in folded:
        if node not in kernels:
            absorb(captured, node)
    drop_dead(captured.graph)
    settle(captured, kernels.values())
    return [*(node for node in folded if node not in kernels), *kernels.values()]


class _Weights:
    """How often each parameter is read, under whatever name."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.tensors = named_tensors(captured.module).parameters
        names = [name for node in captured.graph.nodes for name in self._read(node)]
        self.readers = Counter(id(self.tensors[name]) for name in names if name in self.tensors)

    def _read(self, node: fx.Node) -> list[str]:
        if node.op == "get_attr":
            return [str(node.target)]
        return [name for key in ("weight", "bias") if (name := parameter_of(node, key))] if (
            node.op == "call_module" and kind_of(node) in _FOLDED) else []

    def packable(self, node: fx.Node) -> bool:
        """Whether `node` is a convolution of float images with filters of its own."""
        if kind_of(node) != "conv2d" or (node.op == "call_module" and unexposable(node)):
            return False
        fact = node.meta.get("fxc")
        tensor = self.tensors.get(parameter_of(node, "weight") or "")
        return (tensor is not None and self.readers[id(tensor)] == 1 and tensor.dtype == torch.float32
                and getattr(fact, "dtype", None) == torch.float32 and len(getattr(fact, "shape", ())) == 4
                and not isinstance(arguments(node)["padding"], str))


def _pack(captured: Captured, region: Region, other: fx.Node | None) -> fx.Node:
    """A packed convolution in the place of `region`, which adds `other`."""
    product, path = region.product, path_of(region.product)
    expose(captured, product)
    values = arguments(product)
    name, bias = parameter_of(product, "weight"), parameter_of(product, "bias")
    assert name is not None
    weight = captured.module.get_parameter(name)
    activation, numbers = post_op(region.activation)
    made = PackedConv2d(weight.shape, bias is not None, pair(values["stride"]), pair(values["padding"]),
                        pair(values["dilation"]), int(values["groups"]), region.add is not None, activation, numbers)
    made.fill(weight, None if bias is None else captured.module.get_parameter(bias))
    target = f"{path}.packed" if path and is_there(captured, path) else f"{product.name}_packed"
    owner, _, leaf = target.rpartition(".")
    captured.module.get_submodule(owner).add_module(leaf, made.eval())
    with captured.graph.inserting_after(region.end):
        node = captured.graph.call_module(target, tuple(
            read for read in (values["input"], other) if read is not None))
    inherit(node, product)
    node.meta["path"] = path
    for replaced in filter(None, (region.activation, region.add, product)):
        captured.replace(replaced, node)
    return node
