"""From quantizers to integer kernels: what the simulation promises, computed in uint8 and int8 on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from ..graph.captured import Captured
from ..graph.interpret import evaluated
from ..graph.ops import arguments, kind_of, module_of, op_of, path_of
from ..graph.propagate import drop_dead
from ..graph.provenance import inherit
from ..nn.affine import quantize
from ..nn.integer import FLOATS, After, Grid, IntConv2d, IntLinear
from ..nn.moving import IntAdaptiveMean, Interleave, ToFloat, ToInteger
from ..nn.quantizer import Quantizer, WeightQuantizer
from ..passes.shared.calibrating import quantizers_of
from ..passes.shared.integer import Region, averages, data_of, regions_of, role_of
from ..passes.shared.masking import is_there
from ..passes.shared.post_ops import post_op
from .attention import lower_attention
from .dynamic import lower_dynamic
from .int8_moves import MODULES, READS_SIZES, interleaved, mean, pair
from .settling import settle
from .weight_only import lower_weight_only

KERNELS = ("conv2d", "linear")  # kinds of layers that there are integer kernels for
KERNEL_BITS = 8  # of the integers that kernels read and give: narrower ones are left to the simulation


@dataclass
class Lowered:
    """What `lower` did: `kernels` has the new nodes by the name of the layer's node; `left` says of each quantized
    layer that stays in float why."""

    kernels: dict[str, fx.Node] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def lower(captured: Captured, done: Lowered) -> None:
    """Put integer kernels in the place of quantized layers, in place, and write into `done` what was done. All
    quantizers have ranges; the caller refreshes."""
    _Lowering(captured, done).run()


@dataclass
class _Lowering:
    """`ints` has the integers of each value, with their grid; `floats` the same numbers as floats again; `stands` the
    kernels that give floats, by the node in whose place they stand; `replaced` are the nodes whose place integers
    take."""

    captured: Captured
    done: Lowered
    ints: dict[fx.Node, tuple[fx.Node, Grid]] = field(default_factory=dict)
    floats: dict[fx.Node, fx.Node] = field(default_factory=dict)
    stands: dict[fx.Node, fx.Node] = field(default_factory=dict)
    replaced: set[fx.Node] = field(default_factory=set)

    def run(self) -> None:
        graph = self.captured.graph
        lower_attention(self.captured, self.done)
        lower_dynamic(self.captured, self.done)
        lower_weight_only(self.captured, self.done)
        products = [node for node in graph.nodes if role_of(node) == "product" and _on_weight(node)]
        self.done.left |= {node.name: f"there is no integer kernel for {kind_of(node)}"
                           for node in products if kind_of(node) not in KERNELS}
        products = [node for node in products if kind_of(node) in KERNELS]
        ends = {region.end: region for region in (regions_of(products) if products else ())}
        rounded = quantizers_of(self.captured)
        for node in list(graph.nodes):
            if node in rounded:
                self._round(node, rounded[node], ends)
            elif node in ends and not any(user in rounded for user in node.users):
                self._emit(ends[node], None, node)
            elif role_of(node) in ("passes", "joins"):
                self._pass(node)
            elif averages(node) and data_of(node)[0] in self.ints:
                self._average(node)
        for node, (integers, grid) in list(self.ints.items()):
            for user in [user for user in node.users if user not in self.replaced]:
                sized = kind_of(user) in READS_SIZES
                user.replace_input_with(node, integers if sized else self._float(node, integers, grid))
        drop_dead(graph)
        self._keep_apart()
        settle(self.captured, self.done.kernels.values())

    def _round(self, node: fx.Node, quantizer: Quantizer, ends: Mapping[fx.Node, Region]) -> None:
        """Integers for what a quantizer rounds: of the kernel in front of it, or of floats."""
        source, scheme = node.args[0], quantizer.scheme
        assert isinstance(source, fx.Node)
        up = -scheme.low  # kernels count from zero: `qint8` is the same grid
        grid = Grid(float(quantizer.scale), int(quantizer.zero_point) + up, 0, scheme.high + up)
        if source in ends and self._emit(ends[source], grid, node):
            return
        self._take(node, self._call(ToInteger(grid), f"{node.name}_to_integer", node, (source,), node), grid)

    def _take(self, node: fx.Node, integers: fx.Node, grid: Grid) -> None:
        self.ints[node] = (integers, grid)
        self.replaced.add(node)

    def _emit(self, region: Region, gives: Grid | None, at: fx.Node) -> bool:
        """Put the kernel of `region` behind `at`, whose place it takes; False where what it reads is in floats."""
        product, (data, *_) = region.product, data_of(region.product)
        if data not in self.ints or (gives and region.other is not None and region.other not in self.ints):
            self.done.left[product.name] = "what it reads isn't in integers"
            return False
        integers, reads = self.ints[data]
        inputs, after = [integers], After(gives)
        if region.other is not None:
            if gives is not None:
                other, adds = self.ints[region.other]
            else:  # oneDNN adds floats to what it gives as floats
                rounded, adds = self.ints.get(region.other), FLOATS
                other = self.stands.get(region.other, region.other) if rounded is None else self._float(
                    region.other, *rounded)
            inputs, after = [integers, other], replace(after, adds=adds)
        activation, numbers = post_op(region.activation)
        after = replace(after, activation=activation, numbers=numbers)
        made = self._call(_kernel(self.captured, product, reads, after), self._home(product), at, tuple(inputs),
                          product)
        self.done.kernels[product.name] = made
        self.replaced.update(node for node in (product, region.add, region.activation) if node is not None)
        if gives is None:
            at.replace_all_uses_with(made)
            self.stands[at] = made
        else:
            self._take(at, made, gives)
        return True

    def _home(self, product: fx.Node) -> str:
        """Where the kernel of `product` stands: in its layer's module, or beside it where there is none, or where
        another call of the layer has its kernel there."""
        path = path_of(product)
        taken = not path or not is_there(self.captured, path) or is_there(self.captured, f"{path}.integer")
        return f"{product.name}_integer" if taken else f"{path}.integer"

    def _pass(self, node: fx.Node) -> None:
        """Let an operator that only moves numbers move integers, where all that it reads are of one grid."""
        data = data_of(node)
        grids = {self.ints[value][1] for value in data if value in self.ints}
        if not data or len(grids) != 1 or any(value not in self.ints for value in data):
            return
        swap = {value: self.ints[value][0] for value in data}
        halves = interleaved(node)
        if halves is not None:
            read = tuple(self.ints[half][0] for half in halves)
            made = self._call(Interleave(), f"{node.name}_integer", node, read, node)
        elif kind_of(node) in MODULES:
            module = MODULES[kind_of(node)](node)
            made = self._call(module, f"{node.name}_integer", node, (swap[data[0]],), node)
        else:
            with self.captured.graph.inserting_after(node):
                made = self.captured.graph.node_copy(node, lambda arg: swap.get(arg, arg))
        self._take(node, made, *grids)

    def _average(self, node: fx.Node) -> None:
        """Let a mean over places sum integers; it gives floats."""
        integers, grid = self.ints[data_of(node)[0]]
        made = self._call(mean(node, grid), f"{node.name}_integer", node, (integers,), node)
        node.replace_all_uses_with(made)
        self.replaced.add(node)

    def _float(self, node: fx.Node, integers: fx.Node, grid: Grid) -> fx.Node:
        if integers not in self.floats:
            self.floats[integers] = self._call(ToFloat(grid), f"{integers.name}_to_float", integers, (integers,), node)
        return self.floats[integers]

    def _call(self, module: nn.Module, path: str, after: fx.Node, args: tuple[fx.Node, ...], old: fx.Node) -> fx.Node:
        """A call of a new module at `path`, behind the node `after`, with the provenance of `old`."""
        owner, _, leaf = path.rpartition(".")
        self.captured.module.get_submodule(owner).add_module(leaf, module.eval())
        with self.captured.graph.inserting_after(after):
            node = self.captured.graph.call_module(path, args)
        node.meta["path"] = path_of(old)
        inherit(node, old)
        return node

    def _keep_apart(self) -> None:
        """A kernel writes its sum into what it adds: it gets a copy where that is read again later, or
        is what it multiplies."""
        order = {node: place for place, node in enumerate(self.captured.graph.nodes)}
        for node in self.done.kernels.values():
            module = module_of(node)
            if isinstance(module, IntConv2d | IntLinear) and len(node.args) > 1 and (
                    isinstance(other := node.args[1], fx.Node)):
                aliases = _aliases(other)
                later = any(order[user] > order[node] for alias in aliases for user in alias.users)
                lent = any(alias.op in ("placeholder", "get_attr") or kind_of(alias) == "expand" for alias in aliases)
                module.after = replace(module.after, copies=later or lent or node.args[0] in aliases)


def _aliases(node: fx.Node) -> set[fx.Node]:
    """The nodes whose values may share memory with that of `node`: views of it, and what it is a view of."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if _may_view(node):
                stack += node.all_input_nodes
            stack += [user for user in node.users if _may_view(user)]
    return found


def _may_view(node: fx.Node) -> bool:
    op = op_of(node)
    return kind_of(node) == IntAdaptiveMean.fxc_kind or (
        op is not None and (op.family in ("shape", "index") or op.name in ("to", "detach", "contiguous")))


def _on_weight(node: fx.Node) -> Quantizer | None:
    """The quantizer on the weight of a product, if it can be int8."""
    weight = arguments(node).get("weight")
    found = module_of(weight) if isinstance(weight, fx.Node) and weight.op == "call_module" else None
    if not isinstance(found, Quantizer) or isinstance(found, WeightQuantizer):
        return None
    return found if found.on and found.scheme.bits <= KERNEL_BITS else None


def _kernel(captured: Captured, node: fx.Node, reads: Grid, after: After) -> IntConv2d | IntLinear:
    """The integer layer for `node`, its weights rounded as the quantizer on them does."""
    values, quantizer = arguments(node), _on_weight(node)
    assert quantizer is not None
    bias = values.get("bias")
    with torch.no_grad():
        weight = evaluated(captured.module, values["weight"].args[0])
        shape = (-1, *[1] * (weight.dim() - 1))
        integers = quantize(weight, quantizer.scale.reshape(shape), quantizer.zero_point.reshape(shape),
                            quantizer.scheme.low, quantizer.scheme.high, torch.int8)
        scales = quantizer.scale.expand(weight.shape[0]).clone()
        offset = evaluated(captured.module, bias).detach().clone() if isinstance(bias, fx.Node) else None
    made: IntConv2d | IntLinear
    if kind_of(node) == "linear":
        made = IntLinear(weight.shape, offset is not None, reads, after)
    else:
        made = IntConv2d(weight.shape, offset is not None, reads, after, pair(values["stride"]),
                         pair(values["padding"]), pair(values["dilation"]), int(values["groups"]))
    made.fill(integers, scales, offset)
    return made
