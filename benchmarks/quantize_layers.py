"""An exported file cut at every rounding, so that each layer by itself can be held against the simulation.

Where a file rounds to integers, what was computed goes out, and what the next layers read comes in: one run computes
all layers of the model, each on integers that it is given. Fed with those of the simulation, a layer whose result lies
one step apart has a sum next to the edge between two integers; more would be another computation. A whole model says
less: such steps grow on the way through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import fxcompress
from fxcompress.backends.auto import FILE_OF
from fxcompress.backends.openvino_file import convert
from fxcompress.backends.runtimes import RUNTIMES
from fxcompress.graph.interpret import evaluating, values_of

IN = "_given"  # what the name of a cut gets on the side of its readers
Grid = tuple[float, int, tuple[int, ...]]  # scale, zero point, shape

Known = dict[Grid, list[Tensor]]


@dataclass(frozen=True)
class Apart:
    """Over all cuts of a file: how many there are, by how many steps integers differ at the most, and how many of them
    do, of how many."""

    cuts: int
    most: int
    off: int
    count: int


def rounded(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Known:
    """The integers that the quantizers of the simulation `module` round `inputs` and what follows to, by their grid and
    shape, in the order of the graph."""
    found: Known = {}
    with evaluating(module):
        for node, value in values_of(fx.Interpreter(module), inputs):
            called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(called, fxcompress.nn.Quantizer) and called.on and called.axis is None:
                scale, zero = float(called.scale), int(called.zero_point) - called.scheme.low  # files count from zero
                found.setdefault((scale, zero, tuple(value.shape)), []).append(
                    fxcompress.quantize_tensor(value, scale, zero, "quint8"))
    return found


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


def layers_apart(runtime: str, source: Path, known: Known, inputs: Sequence[Tensor]) -> Apart:
    """How far the layers of the ONNX file `source`, run by `runtime`, lie from what is `known` of the simulation."""
    file = source.with_name(f"cut-{runtime}.onnx")
    wanted = cut(source, known, inputs, file)
    if FILE_OF[runtime] == "model.xml":
        convert(file, file.with_suffix(".xml"))
        file = file.with_suffix(".xml")
    found = RUNTIMES[runtime](file)([*inputs, *wanted])
    off = [(made.int() - tensor.int()).abs() for made, tensor in zip(found, wanted, strict=True)]
    return Apart(len(wanted), max(int(each.max()) for each in off), sum(int(each.count_nonzero()) for each in off),
                 sum(each.numel() for each in off))
