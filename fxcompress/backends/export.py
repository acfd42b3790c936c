"""`export`: a finalized GraphModule as a file of another format, held against the module before it is given out."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..diagnostics import Diagnostic, PlanError
from ..graph.interpret import evaluating
from ..graph.ops import kind_of
from ..nn.attention import rounding
from ..nn.weight_only import WeightOnlyEmbedding
from .libraries import has
from .onnx_file import write_onnx
from .openvino_file import write_openvino
from .pt2_file import write_pt2
from .runtimes import onnxruntime, openvino
from .signature import Signature

FormatName = Literal["onnx", "openvino", "pt2"]
TOLERANCE = 0.05  # root mean square of (file − module) over that of the module
_SHIFT = 1e-3  # a change of the inputs, relative: what follows from it is let pass where it is more
_LOOKUPS = ("embedding", WeightOnlyEmbedding.fxc_kind)  # what they look up by integers is moved in the place of these


@dataclass(frozen=True)
class _Format:
    """How a format is written, its suffix, and how its files are run (by a library, if that is needed)."""

    suffix: str
    write: Callable[[fx.GraphModule, Signature, Path], None]
    run: Callable[[Path], Callable[[Sequence[Tensor]], list[Tensor]]]
    runner: str = ""


@dataclass(frozen=True)
class Exported:
    """What was written where. `gap` is the relative distance of the file's results from the module's, ‖a − b‖ / ‖b‖ on
    noise or the inputs given; None where it couldn't be run, and `notes` says why."""

    path: Path
    format: FormatName
    gap: float | None
    notes: tuple[str, ...] = ()


def _run_pt2(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    program = torch.export.load(path).module()
    return lambda inputs: tensors_of(program(*inputs))


FORMATS: Mapping[FormatName, _Format] = {
    "onnx": _Format(".onnx", write_onnx, onnxruntime, "onnxruntime"),
    "openvino": _Format(".xml", write_openvino, openvino, "openvino"),
    "pt2": _Format(".pt2", write_pt2, _run_pt2),
}


def export(module: fx.GraphModule, path: str | os.PathLike[str], format: FormatName | None = None,
           example_inputs: Sequence[Tensor] | None = None) -> Exported:
    """Write `module`, as `finalize` or `load` gives it, to `path`: `onnx` (.onnx, opset 20, QuantizeLinear and
    DequantizeLinear around what is in integers), `openvino` (.xml and .bin) or `pt2` (.pt2, `torch.export`'s program).
    The format is read off the suffix where it isn't given. The batch stays dynamic unless the graph's is fixed.

    What was written is run, on `example_inputs` (the tensors that the model takes, in order) or on noise, and held
    against the module. Raises PlanError: FXC0640 without a library, FXC0641 for what the format can't express, FXC0642
    where the results lie apart, FXC0643 for an unknown format, FXC0644 where the file can't be written.
    """
    target = Path(path)
    name = format_of(target, format)
    if module.graph.find_nodes(op="placeholder") and not all("fxc" in node.meta for node in module.graph.nodes):
        raise PlanError([Diagnostic("FXC0641", "this graph has no facts", notes=("shapes are read off them",),
                                    help="export what `finalize` or `fxcompress.load` gives")])
    signature = Signature.of(module)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            written = Path(folder) / target.name
            FORMATS[name].write(module, signature, written)
            found = _held_against(module, signature, written, name, example_inputs)
            for file in Path(folder).iterdir():  # the weights of some lie beside it
                os.replace(file, target.parent / file.name)
    except OSError as error:
        raise PlanError([Diagnostic("FXC0644", f"{target} can't be written: {error.strerror or error}",
                                    help="name a file in a folder that exists")]) from error
    return Exported(target, name, *found)


def format_of(path: Path, format: str | None) -> FormatName:
    """The format named, or that of the suffix. Raises PlanError (FXC0643)."""
    for name, entry in FORMATS.items():
        if format == name or (format is None and path.suffix == entry.suffix):
            return name
    wrong = f"there is no format `{format}`" if format is not None else f"`{path.name}` has no suffix of a format"
    raise PlanError([Diagnostic("FXC0643", wrong, help="write " + ", ".join(
        f"{name} ({entry.suffix})" for name, entry in FORMATS.items()))])


def _held_against(module: fx.GraphModule, signature: Signature, path: Path, name: FormatName,
                  example_inputs: Sequence[Tensor] | None) -> tuple[float | None, tuple[str, ...]]:
    """The gap and what to note."""
    runner = FORMATS[name].runner
    if runner and not has(runner):
        return None, (f"not held against the module: {runner} isn't installed",)
    inputs = list(example_inputs) if example_inputs is not None else signature.examples()
    given = dict(zip(signature.inputs, inputs, strict=True))
    with evaluating(module), rounding(module) if runner else nullcontext():
        expected, shifted = tensors_of(module(**given)), tensors_of(_Moved(module, given).run())
        found = FORMATS[name].run(path)(inputs)
    gap = apart(tensors_of(signature.restore(found)) if runner else found, expected)
    allowed = max(TOLERANCE, apart(shifted, expected))
    if not gap <= allowed:
        raise PlanError([Diagnostic(
            "FXC0642", f"what {path.name} computes lies {gap:.1%} apart from the module",
            notes=(f"up to {allowed:.1%} of the result's root mean square are let pass: {TOLERANCE:.0%}, or what a "
                   "change of the inputs by a thousandth makes, if that is more",),
            help="report it: every runtime should compute what the module does")])
    return gap, ()


class _Moved(fx.Interpreter):
    """Runs a graph on inputs that are changed by a thousandth; where these are integers, what is looked up by them."""

    def __init__(self, module: fx.GraphModule, given: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.given, self.random = given, torch.Generator().manual_seed(0)

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The input of that name; its default where none is given."""
        if target not in self.given:
            return super().placeholder(target, args, kwargs)
        tensor = self.given[target]
        return self._moved(tensor) if tensor.is_floating_point() else tensor

    def run_node(self, n: fx.Node) -> Any:
        """The value of the node, moved where it is looked up."""
        value = super().run_node(n)
        return self._moved(value) if kind_of(n) in _LOOKUPS else value

    def _moved(self, tensor: Tensor) -> Tensor:
        """Each number by itself: norms undo what happens to all alike."""
        up = torch.rand(tensor.shape, generator=self.random) < 1 / 2
        return tensor * torch.where(up, 1 + _SHIFT, 1 - _SHIFT).to(tensor)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor of a nest, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all floating-point tensors; infinite where shapes differ."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return math.inf
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if b.is_floating_point()]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    return math.sqrt(off / size) if size else math.sqrt(off)
