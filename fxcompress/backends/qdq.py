"""A lowered graph in the form that exchange formats know: float operators between QuantizeLinear and DequantizeLinear.

Every module that computes on integers is replaced, at its path, by one that computes the same in floats: what it reads
was dequantized, its int8 weights are dequantized, and what it gives is rounded to its grid. Operators that only move
integers get a rounding behind them, which changes nothing and tells a runtime that they may stay in integers. Runtimes
recognise the pattern and run their own integer kernels (ONNX operator documentation, QuantizeLinear; ONNX Runtime,
"Quantize ONNX models", QDQ format).

A grid that ends below 255 is clipped behind QuantizeLinear, on bytes: there ONNX Runtime still fuses the operator in
front into an integer kernel, which it doesn't where the clipping is in floats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .. import nn as layers
from ..graph.ops import kind_of
from ..nn.attention import RoundedAttention, attend
from ..nn.integer import After, Grid, IntConv2d, IntLinear
from ..nn.moving import IntAdaptiveMean, Interleave, IntMaxPool2d, IntMean, ToFloat, ToInteger
from ..nn.post_ops import FUNCTIONS
from ..nn.quantizer import Quantizer
from .qdq_nodes import Dequantized, Rounded
from .qdq_weights import DynamicLinear, WeightConv2d, WeightEmbedding, WeightLinear

_TOP = 255  # of uint8
_SUM = 2**31 - 2**24  # of int32: what sums of products and a bias may come to, with room for roundings
_MOVES = ("permute", "transpose", "reshape", "view", "flatten", "unflatten", "contiguous", "squeeze", "unsqueeze")


def in_floats(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the lowered `module` in floats, with the same node names and paths. It can be exported to ONNX, not
    run: quantizing is written in ONNX's own operators. Tensors are shared with `module`."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    made = fx.GraphModule(module, graph, type(module).__name__)
    for old, new in zip(module.graph.nodes, made.graph.nodes, strict=True):
        new.meta.update(old.meta)
    _round_later(made)
    _multiply_parts(made)
    grids: dict[fx.Node, Grid] = {}
    calls = [str(node.target) for node in made.graph.nodes if node.op == "call_module"]
    for node in list(made.graph.nodes):
        reads = next((grids[source] for source in node.all_input_nodes if source in grids), None)
        kernel = made.get_submodule(str(node.target)) if node.op == "call_module" else None
        rule = RULES.get(getattr(kernel, "fxc_kind", ""))
        if rule is not None:
            floats, gives = rule(kernel, reads, len(node.meta["fxc"].shape))
            _put(made, node, floats, calls)
            if gives is not None:
                grids[node] = gives
        elif reads is not None and node.op != "output":
            _move(made, node, reads, grids)
    made.graph.lint()
    made.recompile()
    return made


def _round_later(root: fx.GraphModule) -> None:
    """Floats are moved before they are rounded, where nothing else reads the integers: runtimes permute floats faster
    than bytes (OpenVINO four times as fast, behind attention)."""
    for node in [node for node in root.graph.nodes if kind_of(node) == ToInteger.fxc_kind]:
        while len(node.users) == 1 and kind_of(user := next(iter(node.users))) in _MOVES:
            fact = user.meta["fxc"]
            user.replace_input_with(node, node.all_input_nodes[0])
            user.replace_all_uses_with(node)
            user.append(node)
            node.args = (user,)
            node.meta["fxc"], user.meta["fxc"] = fact, replace(fact, dtype=torch.float32)


def _multiply_parts(root: fx.GraphModule) -> None:
    """A linear layer whose floats are split, as queries, keys and values are, becomes a layer for each part: OpenVINO
    copies what it splits."""
    for node in [node for node in root.graph.nodes if kind_of(node) == IntLinear.fxc_kind]:
        layer, split = root.get_submodule(str(node.target)), next(iter(node.users))
        assert isinstance(layer, IntLinear)
        if len(node.users) != 1 or kind_of(split) not in ("split", "chunk") or layer.after != After(None) or any(
                kind_of(user) != "getitem" for user in split.users):
            continue
        sizes = [shape[-1] for shape in split.meta["fxc"].shape]
        if sum(sizes) != layer.shape[0]:  # along another dimension
            continue
        parts = [_rows(layer, last - size, last) for last, size in zip(accumulate(sizes), sizes, strict=True)]
        for user in list(split.users):
            place = user.args[1]
            assert isinstance(place, int)
            root.add_module(f"{node.name}_{place}", parts[place])
            with root.graph.inserting_before(node):
                made = root.graph.call_module(f"{node.name}_{place}", node.args)
            made.meta.update(user.meta)
            user.replace_all_uses_with(made)
            root.graph.erase_node(user)
        root.graph.erase_node(split)
        root.graph.erase_node(node)


def _rows(layer: IntLinear, first: int, last: int) -> IntLinear:
    """The outputs from `first` to `last` of `layer`."""
    made = IntLinear((last - first, layer.shape[1]), layer.has_bias, layer.reads, layer.after)
    made.fill(layer.weight[first:last], layer.weight_scale[first:last],
              None if layer.bias is None else layer.bias[first:last])
    return made.eval()


def _put(root: fx.GraphModule, node: fx.Node, module: nn.Module, calls: list[str]) -> None:
    """Let `node` call `module`: at the path it calls now, unless that is used twice or lies in a module that is called
    itself, and shared with the original."""
    path = str(node.target)
    if calls.count(path) > 1 or path.rpartition(".")[0] in calls:
        node.target = path = f"{node.name}_in_floats"
    owner, _, leaf = path.rpartition(".")
    root.get_submodule(owner).add_module(leaf, module.eval())


def _move(root: fx.GraphModule, node: fx.Node, grid: Grid, grids: dict[fx.Node, Grid]) -> None:
    """An operator that moves integers: what it gives lies on the grid of what it reads."""
    dtype = node.meta["fxc"].dtype
    if isinstance(dtype, tuple):  # several tensors: each is rounded where it is taken out
        grids[node] = grid
    elif dtype == torch.uint8:  # not a size
        path = f"{node.name}_gives"
        root.add_module(path, _rounded(grid, clips=False).eval())
        with root.graph.inserting_after(node):
            rounded = root.graph.call_module(path, (node,))
        rounded.meta.update(node.meta)
        grids[rounded] = grid
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)


def _rounded(grid: Grid, clips: bool = True) -> Rounded:
    """Rounds to `grid`; `clips` is off where no value can lie above it."""
    return Rounded(torch.tensor(grid.scale), torch.tensor(grid.zero_point), grid.low, grid.high if clips else _TOP)


def _quantizer(module: nn.Module) -> nn.Module:
    """A quantizer that has stayed in the graph, of a layer without a kernel."""
    if not isinstance(module, Quantizer) or not module.on:
        return module
    scheme, each = module.scheme, module.axis is not None
    scale, zero_point = (part if each else part.reshape(()) for part in (module.scale, module.zero_point))
    return Rounded(scale, zero_point, scheme.low, scheme.high, module.axis)


class _Product(nn.Module):
    """Base of the products, with what follows them."""

    def __init__(self, after: After) -> None:
        super().__init__()
        self.activation, self.numbers = after.activation, after.numbers
        if after.gives is not None:
            if _subsumed(after, after.gives):
                self.activation, self.numbers = "none", ()
            self.gives = _rounded(after.gives)
        self.rounds = after.gives is not None

    def finish(self, made: Tensor, other: Tensor | None) -> Tensor:
        """The sum with `other`, through the activation, rounded."""
        if other is not None:
            made = made + other
        made = _ACTIVATIONS[self.activation](made, *self.numbers)
        return self.gives(made) if self.rounds else made


_ACTIVATIONS: Mapping[str, Callable[..., Tensor]] = {**FUNCTIONS, "hardtanh": torch.clamp}


def _subsumed(after: After, grid: Grid) -> bool:
    """Whether rounding to `grid` does what the activation does, so that this one can go: a grid from 0 up behind a
    ReLU. Runtimes fuse a product with a rounding, and not with all that could stand between."""
    low, high = grid.floats
    if after.activation == "relu":
        return low >= 0.0
    if after.activation == "hardtanh":
        least, most = after.numbers
        return low >= least and high - grid.scale / 2 < most
    return False


class Conv2d(_Product):
    """`IntConv2d` in floats: reads images [N, C, H, W] that lie on its grid."""

    def __init__(self, kernel: IntConv2d) -> None:
        """Shares the weights of `kernel`."""
        super().__init__(kernel.after)
        self.settings = kernel.settings
        integers, scale, bias = _with_bias(kernel)
        self.weight = Dequantized(integers, scale)
        self.bias = bias

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """float32 [N, C', H', W']."""
        bias = self.bias() if self.bias is not None else None
        return self.finish(F.conv2d(x, self.weight(), bias, *self.settings), other)


class Linear(_Product):
    """`IntLinear` in floats. Rows [N, in] go through ONNX's Gemm, which takes a bias of integers; others through
    MatMul, whose weights lie the other way."""

    def __init__(self, kernel: IntLinear, rank: int) -> None:
        """Reads tensors of `rank` dimensions."""
        super().__init__(kernel.after)
        self.gemm = rank == 2
        if self.gemm:
            integers, scale, self.bias = _with_bias(kernel)
            self.weight = Dequantized(integers, scale)
        else:
            self.weight = Dequantized(kernel.weight.detach().t().contiguous(), kernel.weight_scale, axis=1)
            self.offset = kernel.bias

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """float32 [..., out]."""
        if self.gemm:
            made = F.linear(x, self.weight(), self.bias() if self.bias is not None else None)
        else:
            made = torch.matmul(x, self.weight())
            made = made + self.offset if self.offset is not None else made
        return self.finish(made, other)


def _with_bias(kernel: IntConv2d | IntLinear) -> tuple[Tensor, Tensor, Dequantized | None]:
    """Weights, their scales, and the bias in int32, whose step is that of the products: scale of weight times scale of
    input. Where a bias and the sum of the products could be too large for that (a channel whose weights are next to
    nothing) the channel gets a coarser scale: half a step of it is at most |bias|·2⁻³² for each product, far below a
    step of any result that holds it."""
    weight, scale = kernel.weight.detach(), kernel.weight_scale
    if kernel.bias is None:
        return weight, scale, None
    bias, reads = kernel.bias.detach().double(), kernel.reads.scale
    products = weight.flatten(1).abs().sum(1, dtype=torch.int64) * kernel.reads.high * scale.double()
    least = (bias.abs() / reads + products) / _SUM
    if bool((least > scale).any()):
        coarse = torch.maximum(scale.double(), least).float()
        coarse = torch.where(coarse.double() < least, coarse.nextafter(torch.full_like(coarse, torch.inf)), coarse)
        ratio = (scale.double() / coarse.double()).reshape(-1, *[1] * (weight.dim() - 1))
        weight, scale = (weight.double() * ratio).round().to(torch.int8), coarse
    step = (scale * torch.tensor(reads, dtype=torch.float32))
    integers = (bias / step.double()).round().to(torch.int32)
    return weight, scale, Dequantized(integers, step)


class Attention(nn.Module):
    """`RoundedAttention` in floats, with the rounding that torch has no kernels for."""

    def __init__(self, kernel: RoundedAttention) -> None:
        super().__init__()
        self.scale, self.causal = kernel.scale, kernel.causal
        self.query, self.key, self.value = _rounded(kernel.query), _rounded(kernel.key), _rounded(kernel.value)
        self.weights = _rounded(kernel.weights)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """float32 [..., L, V]."""
        return attend(self.query(query), self.key(key), self.value(value), mask, self.scale, self.causal, self.weights)


class MaxPool2d(nn.Module):
    """`IntMaxPool2d` in floats."""

    def __init__(self, kernel: IntMaxPool2d, grid: Grid) -> None:
        """Reads images on `grid`."""
        super().__init__()
        self.settings = (kernel.kernel_size, kernel.stride, kernel.padding, kernel.dilation, kernel.ceil_mode)
        self.gives = _rounded(grid, clips=False)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, C, H', W']."""
        return self.gives(F.max_pool2d(x, *self.settings))  # type: ignore[no-any-return]


class Mean(nn.Module):
    """`IntMean` in floats."""

    def __init__(self, keepdim: bool) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, C], or [N, C, 1, 1]."""
        return x.mean((2, 3), keepdim=self.keepdim)


class Interleaved(nn.Module):
    """`Interleave` in floats."""

    def __init__(self, grid: Grid) -> None:
        """Reads images on `grid`."""
        super().__init__()
        self.gives = _rounded(grid, clips=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """float32 [N, 2C, H, W]."""
        return self.gives(torch.stack([first, second], 2).flatten(1, 2))  # type: ignore[no-any-return]


# What a module on integers is in floats, given the grid of what it reads (None for floats) and the rank of what it
# gives; and the grid of what it gives.
Rule = Callable[[Any, Any, int], tuple[nn.Module, Grid | None]]

RULES: Mapping[str, Rule] = {
    ToInteger.fxc_kind: lambda module, reads, rank: (_rounded(module.gives), module.gives),
    ToFloat.fxc_kind: lambda module, reads, rank: (nn.Identity(), None),
    IntConv2d.fxc_kind: lambda module, reads, rank: (Conv2d(module), module.after.gives),
    IntLinear.fxc_kind: lambda module, reads, rank: (Linear(module, rank), module.after.gives),
    IntMaxPool2d.fxc_kind: lambda module, reads, rank: (MaxPool2d(module, reads), reads),
    IntMean.fxc_kind: lambda module, reads, rank: (Mean(module.keepdim), None),
    IntAdaptiveMean.fxc_kind: lambda module, reads, rank: (nn.Identity(), reads),
    Interleave.fxc_kind: lambda module, reads, rank: (Interleaved(reads), reads),
    RoundedAttention.fxc_kind: lambda module, reads, rank: (Attention(module), None),
    layers.DynamicLinear.fxc_kind: lambda module, reads, rank: (DynamicLinear(module), None),
    layers.WeightOnlyLinear.fxc_kind: lambda module, reads, rank: (WeightLinear(module), None),
    layers.WeightOnlyConv2d.fxc_kind: lambda module, reads, rank: (WeightConv2d(module), None),
    layers.WeightOnlyEmbedding.fxc_kind: lambda module, reads, rank: (WeightEmbedding(module), None),
    Quantizer.fxc_kind: lambda module, reads, rank: (_quantizer(module), None),
}
