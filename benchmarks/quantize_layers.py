"""Models cut at every rounding, so that each layer by itself can be held against the simulation.

Where integers begin, what was computed goes out, and what the next layers read comes in: one run computes all layers of
a model, each on integers that it is given. Fed with those of the simulation, a layer whose result lies one step apart
has a sum next to the edge between two integers; more would be another computation. A whole model says less: such steps
grow on the way through it. How much, the simulation itself shows where it is computed in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import fxcompress
from fxcompress.backends.auto import FILE_OF
from fxcompress.backends.openvino_file import convert
from fxcompress.backends.qdq import _MOVES
from fxcompress.backends.runtimes import RUNTIMES
from fxcompress.graph.interpret import evaluating, values_of
from fxcompress.graph.ops import kind_of
from fxcompress.nn.integer import Product

IN = "_given"  # what the name of a cut gets on the side of its readers
Grid = tuple[float, int, tuple[int, ...]]  # scale, zero point, shape
Known = dict[Grid, list[Tensor]]


@dataclass(frozen=True)
class Apart:
    """Over all cuts: how many there are, by how many steps integers differ at the most, and the share of them that
    does."""

    cuts: int
    most_apart: int
    share: float

    @classmethod
    def of(cls, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Apart:
        """Of what cuts give, and should give."""
        off = [(made.int() - tensor.int()).abs() for made, tensor in zip(found, wanted, strict=True)]
        return cls(len(off), max(int(each.max()) for each in off),
                   sum(int(each.count_nonzero()) for each in off) / sum(each.numel() for each in off))


def rounded(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Known:
    """The integers that the quantizers of the simulation `module` round `inputs` and what follows to, by their grid and
    shape, in the order of the graph; and the same moved, where nothing is rounded to such a shape: files round behind
    permutations."""
    found: Known = {}
    moved: Known = {}
    grids: dict[fx.Node, tuple[float, int]] = {}
    with evaluating(module):
        for node, value in values_of(fx.Interpreter(module), inputs):
            called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            quantizes = isinstance(called, fxcompress.nn.Quantizer) and called.on and called.axis is None
            if quantizes:
                grids[node] = float(called.scale), int(called.zero_point) - called.scheme.low  # files count from zero
            elif kind_of(node) in _MOVES and node.all_input_nodes[0] in grids:
                grids[node] = grids[node.all_input_nodes[0]]
            if node in grids:
                (found if quantizes else moved).setdefault((*grids[node], tuple(value.shape)), []).append(
                    fxcompress.quantize_tensor(value, *grids[node], "quint8"))
    return moved | found


def cut(source: Path, known: Known, inputs: Sequence[Tensor], to: Path) -> list[Tensor]:
    """Write the ONNX file `source`, cut where it rounds to a grid that is `known`, to `to`: its inputs are its own and
    then one for each cut, its outputs one for each cut. Returns what the cuts should give."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(source)
    graph = model.graph
    wanted = {}
    for (grid, dtype), names in _cuts(model, source, inputs).items():
        if len(names) == len(known.get(grid, ())):
            up = 128 * (dtype == torch.int8)
            wanted |= {name: (tensor.int() - up).to(dtype) for name, tensor in zip(names, known[grid], strict=True)}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in wanted:
                node.input[place] = name + IN
    del graph.output[:]
    for name, tensor in wanted.items():
        kind = TensorProto.INT8 if tensor.dtype == torch.int8 else TensorProto.UINT8
        graph.input.append(helper.make_tensor_value_info(name + IN, kind, tensor.shape))
        graph.output.append(helper.make_tensor_value_info(name, kind, tensor.shape))
    onnx.save(model, to)
    return list(wanted.values())


def _cuts(model: Any, source: Path, inputs: Sequence[Tensor]) -> dict[tuple[Grid, torch.dtype], list[str]]:
    """The names of what the file rounds to bytes, in its order, by grid and shape, as ONNX Runtime finds them, and by
    kind. Grids count from zero."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    read = {node.input[0]: node.input for node in model.graph.node if node.op_type == "DequantizeLinear"
            and node.input[0] not in constants}
    signed = {name: constants[given[2]].dtype == "int8" for name, given in read.items()}
    names = [name for node in model.graph.node for name in node.output if name in read]
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.graph.output.extend(helper.make_tensor_value_info(
        name, TensorProto.INT8 if signed[name] else TensorProto.UINT8, None) for name in names)
    file = source.with_name("whole.onnx")
    onnx.save(whole, file)
    found: dict[tuple[Grid, torch.dtype], list[str]] = {}
    for name, tensor in zip(names, RUNTIMES["onnxruntime"](file)(inputs)[-len(names):], strict=True):
        scale, zero = (constants[each].item() for each in read[name][1:3])
        grid = scale, zero + 128 * signed[name], tuple(tensor.shape)
        found.setdefault((grid, tensor.dtype), []).append(name)
    return found


def file_apart(runtime: str, source: Path, known: Known, inputs: Sequence[Tensor]) -> Apart:
    """How far the layers of the ONNX file `source`, run by `runtime`, lie from what is `known` of the simulation."""
    file = source.with_name(f"cut-{runtime}.onnx")
    wanted = cut(source, known, inputs, file)
    if FILE_OF[runtime] == "model.xml":
        convert(file, file.with_suffix(".xml"))
        file = file.with_suffix(".xml")
    return Apart.of(RUNTIMES[runtime](file)([*inputs, *wanted]), wanted)


class _Fed(fx.Interpreter):
    """Runs a lowered graph; what computes integers reads those that are `known`, in their order."""

    def __init__(self, module: fx.GraphModule, known: Known) -> None:
        super().__init__(module)
        self.left = {grid: list(tensors) for grid, tensors in known.items()}
        self.found: list[Tensor] = []
        self.wanted: list[Tensor] = []

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module gives, or should give, if it is known."""
        module, made = self.fetch_attr(target), super().call_module(target, args, kwargs)
        gives = module.after.gives if isinstance(module, Product) else getattr(module, "gives", None)
        left = self.left.get((gives.scale, gives.zero_point, tuple(made.shape))) if gives is not None else None
        if not left:
            return made
        self.found.append(made)
        self.wanted.append(left.pop(0))
        return self.wanted[-1].contiguous(memory_format=torch.channels_last if made.dim() == 4 else
                                          torch.contiguous_format)


@torch.no_grad()
def module_apart(module: fx.GraphModule, known: Known, inputs: Sequence[Tensor]) -> Apart:
    """How far the kernels of the GraphModule lie from what is `known` of the simulation."""
    run = _Fed(module, known)
    run.run(*inputs)
    return Apart.of(run.found, run.wanted)


class InDouble(fx.Interpreter):
    """Runs a simulation in float64, on the same grids and with the same rounded weights."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(copy.deepcopy(module).double().eval())
        self.given = module

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module gives; quantizers of values are written out."""
        called = self.given.get_submodule(target)
        if not isinstance(called, fxcompress.nn.Quantizer) or not called.on:
            return super().call_module(target, args, kwargs)
        if called.axis is not None:
            return called(args[0].float()).double()
        steps = (args[0] * (1.0 / called.scale).double()).round() + called.zero_point
        return (steps.clamp(called.scheme.low, called.scheme.high) - called.zero_point) * called.scale.double()
