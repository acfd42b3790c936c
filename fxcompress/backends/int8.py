"""From quantizers to integer kernels: what a simulation promises, computed in uint8 and int8 on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.captured import Captured
from ..graph.ops import arguments, kind_of, module_of, path_of
from ..graph.provenance import inherit
from ..nn.affine import quantize
from ..nn.integer import After, Conv2d, Grid, Linear, MaxPool2d, ToFloat, ToInteger
from ..nn.quantizer import Quantizer
from ..passes.shared.integer import Region, data_of, regions_of, role_of

# Activation -> oneDNN's name for it, and the arguments that are its numbers.
ACTIVATIONS: Mapping[str, tuple[str, tuple[str | float, ...]]] = {
    "relu": ("relu", ()), "relu6": ("hardtanh", (0.0, 6.0)), "hardtanh": ("hardtanh", ("min_val", "max_val")),
    "hardswish": ("hardswish", ()), "silu": ("swish", ()),
}


def lower(captured: Captured) -> Captured:
    """`captured`, whose quantizers all round, with integer kernels in their place; in place. The caller refreshes."""
    return _Lowering(captured).run()


@dataclass
class _Lowering:
    captured: Captured
    ints: dict[fx.Node, tuple[fx.Node, Grid]] = field(default_factory=dict)  # value -> its integers
    floats: dict[fx.Node, fx.Node] = field(default_factory=dict)  # integers -> the same as floats

    def run(self) -> Captured:
        graph = self.captured.graph
        products = [node for node in graph.nodes if role_of(node) == "product" and _weight_quantizer(node)]
        regions = regions_of(products) if products else []
        ends = {region.end: region for region in regions}
        for node in list(graph.nodes):
            if kind_of(node) == "quantizer" and kind_of(node.args[0]) != "parameter" and not _is_weight(node):
                self._quantized(node, ends)
            elif node in ends and not _rounded(node):
                self._emit(ends[node], None, node)
            elif role_of(node) in ("passes", "joins"):
                self._pass(node)
        for node, (integers, grid) in list(self.ints.items()):
            left = [user for user in node.users if user.op == "output" or not self._gone(user)]
            for user in left:
                user.replace_input_with(node, self._float(node, integers, grid))
        graph.eliminate_dead_code()
        return self.captured

    def _gone(self, user: fx.Node) -> bool:
        """Whether integers took the place of `user` already."""
        return user in self._replaced

    _replaced: set[fx.Node] = field(default_factory=set)

    def _call(self, module: nn.Module, path: str, after: fx.Node, args: tuple[fx.Node, ...], old: fx.Node) -> fx.Node:
        owner, _, leaf = path.rpartition(".")
        self.captured.module.get_submodule(owner).add_module(leaf, module.eval())
        with self.captured.graph.inserting_after(after):
            node = self.captured.graph.call_module(path, args)
        node.meta["path"] = path_of(old)
        inherit(node, old)
        return node

    def _quantized(self, node: fx.Node, ends: Mapping[fx.Node, Region]) -> None:
        source, quantizer = node.args[0], module_of(node)
        assert isinstance(source, fx.Node) and isinstance(quantizer, Quantizer)
        grid = Grid(float(quantizer.scale), int(quantizer.zero_point), quantizer.scheme.low, quantizer.scheme.high)
        if source in ends:
            if self._emit(ends[source], grid, node):
                return
        made = self._call(ToInteger(grid), f"{node.name}_to_integer", node, (source,), node)
        self.ints[node] = (made, grid)
        self._replaced.add(node)

    def _emit(self, region: Region, gives: Grid | None, at: fx.Node) -> bool:
        """Put the kernel of `region` behind `at`; False where what it reads isn't in integers."""
        product = region.product
        data = data_of(product)[0]
        if data not in self.ints or (region.other is not None and region.other not in self.ints):
            return False
        integers, reads = self.ints[data]
        inputs = [integers]
        adds = None
        if region.other is not None:
            other, adds = self.ints[region.other]
            if gives is None:  # oneDNN adds floats to what it gives as floats
                other, adds = self._float(region.other, other, adds), Grid(1.0, 0)
            inputs.append(other)
        name, numbers = "none", ()
        if region.activation is not None:
            name, numbers = _activation(region.activation)
        path = f"{path_of(product)}.integer" if path_of(product) else f"{product.name}_integer"
        made = self._call(_kernel(self.captured, product, reads, After(gives, adds, name, numbers)), path, at,
                          tuple(inputs), product)
        self._replaced.update(node for node in (product, region.add, region.activation, at) if node is not None)
        if gives is None:
            at.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        else:
            self.ints[at] = (made, gives)
        return True

    def _pass(self, node: fx.Node) -> None:
        data = data_of(node)
        if not data or any(value not in self.ints for value in data):
            return
        grids = {self.ints[value][1] for value in data}
        if len(grids) > 1:
            return
        swap = {value: self.ints[value][0] for value in data}
        if kind_of(node) == "max_pool2d":
            made = self._call(_pool(node), f"{node.name}_integer", node, (swap[data[0]],), node)
        else:
            with self.captured.graph.inserting_after(node):
                made = self.captured.graph.node_copy(node, lambda arg: swap.get(arg, arg))
        self.ints[node] = (made, next(iter(grids)))
        self._replaced.add(node)

    def _float(self, node: fx.Node, integers: fx.Node, grid: Grid) -> fx.Node:
        if integers not in self.floats:
            self.floats[integers] = self._call(ToFloat(grid), f"{integers.name}_to_float", integers, (integers,), node)
        return self.floats[integers]


def _weight_quantizer(node: fx.Node) -> Quantizer | None:
    weight = arguments(node).get("weight")
    found = module_of(weight) if isinstance(weight, fx.Node) and weight.op == "call_module" else None
    return found if isinstance(found, Quantizer) and found.state == "on" else None


def _is_weight(node: fx.Node) -> bool:
    return all(arguments(user).get("weight") is node for user in node.users)


def _rounded(node: fx.Node) -> bool:
    return any(kind_of(user) == "quantizer" for user in node.users)


def _activation(node: fx.Node) -> tuple[str, tuple[float, ...]]:
    name, numbers = ACTIVATIONS[kind_of(node)]
    values = arguments(node)
    return name, tuple(float(values[each]) if isinstance(each, str) else each for each in numbers)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _pool(node: fx.Node) -> nn.Module:
    values = arguments(node)
    kernel = _pair(values["kernel_size"])
    return MaxPool2d(kernel, _pair(values.get("stride") or kernel), _pair(values.get("padding", 0)),
                     _pair(values.get("dilation", 1)), bool(values.get("ceil_mode", False)))


def _kernel(captured: Captured, node: fx.Node, reads: Grid, after: After) -> nn.Module:
    """The integer layer for `node`, its weights rounded as the quantizer on them says."""
    values = arguments(node)
    quantizer = _weight_quantizer(node)
    assert quantizer is not None
    with torch.no_grad():
        weight = _value(captured, values["weight"].args[0])
        shape = (-1, *[1] * (weight.dim() - 1))
        scheme = quantizer.scheme
        integers = quantize(weight, quantizer.scale.reshape(shape), quantizer.zero_point.reshape(shape), scheme.low,
                            scheme.high).to(torch.int8)
        scales = quantizer.scale.expand(weight.shape[0]).clone()
        bias = values.get("bias")
        offset = _value(captured, bias).detach().clone() if isinstance(bias, fx.Node) else None
    if kind_of(node) == "linear":
        return Linear(integers, scales, offset, reads, after)
    return Conv2d(integers, scales, offset, reads, after, _pair(values["stride"]), _pair(values["padding"]),
                  _pair(values["dilation"]), int(values["groups"]))


def _value(captured: Captured, node: fx.Node) -> Tensor:
    """A parameter, or what a module such as a mask makes of one."""
    if node.op == "get_attr":
        owner, _, leaf = str(node.target).rpartition(".")
        found: Tensor = getattr(captured.module.get_submodule(owner), leaf)
        return found
    made: Tensor = module_of(node)(_value(captured, node.args[0]))  # type: ignore[arg-type]
    return made
