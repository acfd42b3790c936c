"""For the GPU: linear layers that are quantized multiply int8, those with a 2:4 pattern are sparse, the rest is half.

Runs without a GPU: nothing is computed on the device until the result is called, and every node is checked on fake
tensors of it (`half.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ..graph.captured import Captured
from ..graph.interpret import evaluated
from ..graph.modules import module_kind
from ..graph.ops import ON_WEIGHTS, arguments, kind_of, module_of, path_of
from ..graph.propagate import drop_dead
from ..graph.provenance import inherit
from ..graph.tree import named_tensors
from ..nn.affine import quantize
from ..nn.cuda import CudaInt8Linear, Sparse24Linear, ToInt8, is_two_of_four
from ..nn.cuda_weights import GROUPS, INPUTS, OUTPUTS, CudaInt4Linear, CudaInt8WeightLinear
from ..nn.integer import Grid
from ..nn.quantizer import Quantizer
from ..passes.shared.fold_norms import fold
from ..passes.shared.integer import data_of, role_of
from ..passes.shared.weights import EXPOSABLE, absorb
from .attention import unrounded_attention
from .half import to_half
from .settling import settle

_INT8_SINCE, _INT4_SINCE, _SPARSE_SINCE = (7, 5), (8, 0), (8, 0)  # compute capabilities: Turing, Ampere
_ROWS, _COLUMNS = 32, 64  # 2:4 weights come in multiples of these (CUTLASS's; cuSPARSELt's divide them)
_BITS = 8  # of the integers that the products take
_PACKED_BITS = 4  # of weights that are packed by twos
_NO_INTEGERS: Mapping[str, str] = {
    "conv2d": "torch has no convolution of integers for CUDA",
    "embedding": "it multiplies nothing",
}


@dataclass(frozen=True)
class Gpu:
    """What is lowered for: a torch device, and what the hardware can do (its compute capability)."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    capability: tuple[int, int] = _SPARSE_SINCE

    @classmethod
    def here(cls) -> Gpu:
        """The GPU of this machine."""
        return cls(torch.device("cuda"), torch.cuda.get_device_capability())


@dataclass
class OnCuda:
    """What `lower` did: `kernels` has the new nodes by the name of the layer's node; `left` says of each layer that is
    quantized or 2:4 and computes in half precision why; `notes` what else to say; `changed` are the layers whose
    weights or calls became others."""

    kernels: dict[str, fx.Node] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changed: set[fx.Node] = field(default_factory=set)


def lower(captured: Captured, done: OnCuda, gpu: Gpu | None = None) -> None:
    """Make `captured`, in evaluation mode and without masks, compute on a GPU, in place, and write into `done` what was
    done. Tensors stay where they are: the result may be moved, and runs on the CPU too. The caller refreshes.

    Raises PlanError: FXC0580 where an operator can't be computed there, FXC0581 for weights out of float16's range.
    """
    gpu = gpu or Gpu()
    done.notes += unrounded_attention(captured)
    norms = fold(captured, [node for node in captured.graph.nodes if kind_of(node) in EXPOSABLE])
    _Lowering(captured, done, gpu).run()
    _round_weights(captured)
    _let_values_pass(captured)
    for node in list(captured.graph.nodes):
        if kind_of(node) in EXPOSABLE and node.op == "call_function":
            absorb(captured, node)
    drop_dead(captured.graph)
    settle(captured, done.kernels.values())
    done.changed.update(node for node, _ in norms)
    if norms:
        done.notes.append(f"{len(norms)} batch norm{'s' * (len(norms) != 1)} folded into the layers before them")
    done.notes += to_half(captured, gpu.device)


@dataclass
class _Lowering:
    """Puts kernels in the place of linear layers. `rounded` has the integers of each value on each grid."""

    captured: Captured
    done: OnCuda
    gpu: Gpu
    rounded: dict[tuple[fx.Node, Grid], fx.Node] = field(default_factory=dict)

    def run(self) -> None:
        for node in list(self.captured.graph.nodes):
            if kind_of(node) not in ("linear", *_NO_INTEGERS):
                continue
            quantizer = _weight_quantizer(node)
            weight = self._weight(node)
            sparse = weight is not None and bool(weight.any()) and is_two_of_four(weight.flatten(1))
            if quantizer is not None and self._integer(node, quantizer) and sparse:
                self.done.notes.append(f"{path_of(node)} multiplies integers, densely: its 2:4 pattern isn't used")
            elif node.name not in self.done.kernels and sparse:
                self._sparse(node)

    def _weight(self, node: fx.Node) -> Tensor | None:
        found = arguments(node)["weight"]
        return evaluated(self.captured.module, found) if isinstance(found, fx.Node) else found  # type: ignore[no-any-return]

    def _integer(self, node: fx.Node, quantizer: Quantizer) -> bool:
        """Put a product with integer weights in the place of `node`, or say why not."""
        data, bias = arguments(node)["input"], arguments(node).get("bias")
        if kind_of(node) != "linear":
            self.done.left[node.name] = _NO_INTEGERS[kind_of(node)]
            return False
        with torch.no_grad():
            weights = Weights.of(evaluated(self.captured.module, arguments(node)["weight"].args[0]), quantizer)
            offset = evaluated(self.captured.module, bias).detach() if isinstance(bias, fx.Node) else None
            grids = _grids(data)
            if grids == {None}:
                made = _weight_only(weights, offset, self.gpu) if kind_of(data) != "quantizer" else (
                    "there is no kernel for CUDA that rounds what it reads as it runs")
            else:
                made = _static(weights, offset, grids, self.gpu)
        if isinstance(made, str):
            self.done.left[node.name] = made
            return False
        if isinstance(made, CudaInt8Linear):
            data = self._round(data, made.reads, node)
        self._replace(node, made.to(weights.integers.device), data)
        return True

    def _round(self, data: fx.Node, grid: Grid, node: fx.Node) -> fx.Node:
        """The integers of `data`, made in front of `node` unless they are there already."""
        if (data, grid) not in self.rounded:
            with self.captured.graph.inserting_before(node):
                self.rounded[data, grid] = self._call(ToInt8(grid), f"{data.name}_to_int8", data, node)
        return self.rounded[data, grid]

    def _sparse(self, node: fx.Node) -> None:
        """Put a sparse product in the place of `node`, or say why not."""
        values, weight, bias = arguments(node), self._weight(node), arguments(node).get("bias")
        assert weight is not None
        why = self._why_not_sparse(node, weight)
        if why is not None:
            self.done.left.setdefault(node.name, why)
            return
        offset = evaluated(self.captured.module, bias) if isinstance(bias, fx.Node) else bias
        layer = Sparse24Linear(weight.shape, offset is not None)
        layer.fill(weight, offset)
        self._replace(node, layer, values["input"])

    def _why_not_sparse(self, node: fx.Node, weight: Tensor) -> str | None:
        if kind_of(node) != "linear":
            return "its 2:4 pattern isn't used: torch's sparse products are those of matrices"
        if weight.shape[0] % _ROWS or weight.shape[1] % _COLUMNS:
            return (f"its 2:4 pattern isn't used: sparse products take multiples of {_ROWS} outputs and {_COLUMNS} "
                    f"inputs, it has {weight.shape[0]} and {weight.shape[1]}")
        if self.gpu.capability < _SPARSE_SINCE:
            return "its 2:4 pattern isn't used: tensor cores have sparse products since compute capability 8.0"
        return None

    def _replace(self, node: fx.Node, layer: nn.Module, data: fx.Node) -> None:
        with self.captured.graph.inserting_before(node):
            path = path_of(node)
            made = self._call(layer, f"{path}.{node.name}_cuda" if path else f"{node.name}_cuda", data, node)
        node.replace_all_uses_with(made)
        self.captured.graph.erase_node(node)
        self.done.kernels[node.name] = made

    def _call(self, module: nn.Module, path: str, data: fx.Node, old: fx.Node) -> fx.Node:
        owner, _, leaf = path.rpartition(".")
        self.captured.module.get_submodule(owner).add_module(leaf, module.eval())
        made = self.captured.graph.call_module(path, (data,))
        made.meta["path"] = path_of(old)
        inherit(made, old)
        return made


@dataclass(frozen=True)
class Weights:
    """The integers of a weight [out, in], with scales and zero points [out, groups]; a group has `group` inputs."""

    integers: Tensor
    scale: Tensor
    zero: Tensor
    group: int
    bits: int

    @classmethod
    def of(cls, weight: Tensor, quantizer: Quantizer) -> Weights:
        """Rounded as `quantizer` does it."""
        out, inputs, scheme = weight.shape[0], weight.shape[1], quantizer.scheme
        rows, scale, zero = quantizer.in_rows(weight), quantizer.scale[:, None], quantizer.zero_point[:, None]
        integers = quantize(rows, scale, zero, scheme.low, scheme.high, torch.int8).reshape(out, -1)[:, :inputs]
        each = out if quantizer.rows > 1 else 1
        scales, zeros = (tensor.reshape(each, -1).expand(out, -1) for tensor in (quantizer.scale, quantizer.zero_point))
        return cls(integers, scales, zeros, rows.shape[1] if scales.shape[1] > 1 else inputs, scheme.bits)

    @property
    def plain(self) -> bool:
        """Whether they are int8 with a scale for each output, and zero is zero."""
        return self.bits <= _BITS and self.scale.shape[1] == 1 and not bool(self.zero.any())


def _static(weights: Weights, bias: Tensor | None, grids: set[Grid | None], gpu: Gpu) -> nn.Module | str:
    """The layer that multiplies integers with integers, or why there is none."""
    (grid, *others) = grids
    if others or grid is None:
        return "what it reads isn't rounded to one grid"
    if not weights.plain:
        return "its weights aren't symmetric int8 with a scale for each output"
    if gpu.capability < _INT8_SINCE:
        return "tensor cores multiply int8 since compute capability 7.5"
    layer = CudaInt8Linear(weights.integers.shape, grid)
    layer.fill(weights.integers, weights.scale[:, 0], bias)
    return layer


def _weight_only(weights: Weights, bias: Tensor | None, gpu: Gpu) -> nn.Module | str:
    """The layer that reads floats and holds integers, or why there is none: 4 bits where tinygemm takes the sizes."""
    (out, inputs), groups = weights.integers.shape, weights.scale.shape[1]
    group = weights.group if groups > 1 else next((size for size in GROUPS if inputs % size == 0), 0)
    fits = group in GROUPS and not (inputs % group or inputs % INPUTS or out % OUTPUTS)
    if weights.bits <= _PACKED_BITS and fits and gpu.capability >= _INT4_SINCE:
        packed = CudaInt4Linear((out, inputs), bias is not None, group)
        scale, zero = (each.expand(out, inputs // group) for each in (weights.scale, weights.zero))
        packed.fill(weights.integers, scale, zero, bias)
        return packed
    if weights.plain:
        layer = CudaInt8WeightLinear((out, inputs), bias is not None)
        layer.fill(weights.integers, weights.scale[:, 0], bias)
        return layer
    return (f"the packed kernels take int8 with a scale for each output, or 4 bits in groups of {GROUPS[-1]} to "
            f"{GROUPS[0]} with {INPUTS} inputs and {OUTPUTS} outputs, or multiples of these")


def _weight_quantizer(node: fx.Node) -> Quantizer | None:
    """The quantizer on the weight of `node`, if it rounds."""
    weight = arguments(node).get("weight")
    found = module_of(weight) if isinstance(weight, fx.Node) and weight.op == "call_module" else None
    return found if isinstance(found, Quantizer) and found.on else None


def _grids(node: object) -> set[Grid | None]:
    """The grids that the numbers of `node` lie on, with None for numbers that aren't rounded: quantizers found by
    walking back through what only moves numbers."""
    found: set[Grid | None] = set()
    stack, seen = [node], set()
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        module = module_of(at) if isinstance(at, fx.Node) and at.op == "call_module" else None
        if isinstance(module, Quantizer) and module.axis is None and module.on:
            found.add(Grid.of(module))
        elif isinstance(at, fx.Node) and role_of(at) in ("passes", "joins") and data_of(at):
            stack += data_of(at)
        else:
            found.add(None)
    return found


def _round_weights(captured: Captured) -> None:
    """Weights of layers that stay become what their quantizers make of them, in place where nothing else reads them."""
    root, graph = captured.module, captured.graph
    names = named_tensors(root).parameters
    for call in [node for node in graph.nodes if kind_of(node) == "quantizer" and _on_weight(node)]:
        source = call.args[0]
        rounded = evaluated(root, call).detach()
        parameter = names.get(str(source.target))
        sharing = [node for node in graph.nodes if _reads(node, parameter, names) and node is not source]
        if parameter is not None and source.op == "get_attr" and not sharing and len(source.users) == 1:
            with torch.no_grad():
                parameter.copy_(rounded)
            call.replace_all_uses_with(source)
        else:
            root.register_parameter(f"{call.name}_rounded", nn.Parameter(rounded))
            with graph.inserting_before(call):
                made = graph.get_attr(f"{call.name}_rounded")
            inherit(made, call)
            call.replace_all_uses_with(made)
        graph.erase_node(call)


def _reads(node: fx.Node, parameter: Tensor | None, names: Mapping[str, Tensor]) -> bool:
    """Whether `node` reads the very tensor, under whatever name."""
    if node.op == "get_attr":
        return names.get(str(node.target)) is parameter
    return node.op == "call_module" and any(tensor is parameter for tensor in module_of(node).parameters())


def _on_weight(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and (source.op == "get_attr" or kind_of(source) in ON_WEIGHTS)


def _let_values_pass(captured: Captured) -> None:
    """Values are no longer rounded but by the products of integers: rounding what is computed in half precision would
    cost time and lose digits."""
    for node in list(captured.graph.nodes):
        if kind_of(node) == "quantizer":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            captured.graph.erase_node(node)
    for name in [name for name, module in captured.module.named_modules() if module_kind(module) == "quantizer"]:
        captured.module.delete_submodule(name)
