"""`capture`: from an `nn.Module` to its graph in normal form, by the first way that takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..diagnostics import CaptureError, Diagnostic
from .assemble import assemble
from .captured import Captured, Example
from .dynamic import UntraceableError
from .probe import Fakes, collecting_later, quiet
from .propagate import device_of
from .provenance import recall
from .trace import Traced, trace
from .tree import clone_model, meta, named_tensors, own
from .values import BatchFixedError

Way = Literal["auto", "fx", "export"]


def capture(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any], way: Way = "auto",
    skeleton: bool = False,
) -> Captured:
    """Capture `model` as a graph in normal form (`docs/design.md`); the model is left as it is.

    `example_inputs` is one tensor, a tuple, or a mapping for inputs by keyword; the first dimension of the first
    tensor is the batch, and the graph works for any batch size unless `Captured.fixed_batch` says why not. Weights
    may be on `meta`. `way` is "fx" (run the model's code on fake tensors and record it), "export" (`torch.export`,
    put back into modules), or "auto": the first, and where the model's code does what can't be recorded, the second.

    With `skeleton` no weight is copied: those of the result are on `meta`, which is all that planning needs.

    A GraphModule that passes have rewritten keeps its provenance.

    The result follows `.train()` and `.eval()`, has the model's `state_dict` keys and mode, and returns plain
    containers: mappings and dataclasses (the outputs of transformers) become dicts, named tuples become tuples.

    Raises CaptureError: FXC0401 where no way takes the model, FXC0402 where the example inputs don't fit its
    `forward`, FXC0403 where it isn't a module that can be copied.
    """
    return capture_example(model, as_example(example_inputs), way, skeleton)


def capture_example(model: nn.Module, example: Example, way: Way = "auto", skeleton: bool = False) -> Captured:
    """`capture` on the example inputs of another model."""
    _check_model(model)
    with quiet(), collecting_later():
        captured = _capture(model, example, bind_inputs(model, example), way, meta if skeleton else own)
    if isinstance(model, fx.GraphModule):
        recall(captured.graph, model.graph)
    return captured


def _capture(
    model: nn.Module, example: Example, inputs: Inputs, way: Way, make: Callable[[Tensor], Tensor]
) -> Captured:
    name = type(model).__name__
    failed: list[tuple[str, UntraceableError]] = []
    if way in ("auto", "fx"):
        try:
            return _by_tracing(model, example, inputs, name, copy_of(model, make))
        except UntraceableError as error:
            failed.append(("fx", error))
    if way in ("auto", "export"):
        from .export_ import by_export

        try:
            return by_export(model, example, inputs, name, copy_of(model, make))
        except UntraceableError as error:
            failed.append(("export", error))
    raise _refused(name, example, failed)


@dataclass(frozen=True)
class Inputs:
    """Example values by placeholder name, and how the model takes them."""

    values: Mapping[str, Any]
    positional: int  # the first so many are passed by position

    def call(self, model: nn.Module, given: Mapping[str, Any]) -> Any:
        """Call `model` with `given`, values by placeholder name."""
        names = list(self.values)
        args = [given[name] for name in names[:self.positional]]
        return model(*args, **{name: given[name] for name in names[self.positional:]})


def as_example(example_inputs: object) -> Example:
    """The example inputs as an `Example`. Raises CaptureError (FXC0402) for anything but a tensor, tuple, list or
    mapping."""
    if isinstance(example_inputs, Example):
        return example_inputs
    if isinstance(example_inputs, Tensor):
        return Example((example_inputs,))
    if isinstance(example_inputs, tuple | list):
        return Example(tuple(example_inputs))
    if isinstance(example_inputs, Mapping):
        return Example((), dict(example_inputs))
    raise _error("FXC0402", f"example inputs of type `{type(example_inputs).__name__}` can't be passed to a model",
                 help="give a tensor, a tuple of inputs, or a dict for inputs by keyword")


def bind_inputs(model: nn.Module, example: Example) -> Inputs:
    """Names for all inputs, from the signature of the model's `forward`. Raises CaptureError (FXC0402) where they
    don't fit."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*example.args, **example.kwargs)
    except TypeError as error:
        given = ", ".join([*(type(a).__name__ for a in example.args), *(f"{key}=" for key in example.kwargs)])
        raise _error("FXC0402", f"the example inputs don't fit `{type(model).__name__}.forward{signature}`: {error}",
                     notes=(f"given: {given or 'nothing'}",),
                     help="give a tuple of inputs in the order of `forward`, or a dict by keyword") from error
    names = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [f"input_{place}" for place in range(len(names), len(example.args))]
    values = {**dict(zip(names, example.args, strict=False)), **example.kwargs}
    return Inputs(values, len(example.args))


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise _error("FXC0403", f"a `{type(model).__name__}` is not a torch.nn.Module",
                     help="pass the model itself; for a factory, call it first")
    for name, parameter in named_tensors(model).parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise _error("FXC0403", f"the parameter `{name}` has no shape yet: it belongs to a lazy module",
                         help="run the model once on an input, then capture it")


def copy_of(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy of `model` with tensors made by `make`. Raises CaptureError (FXC0403) where it can't be copied."""
    try:
        return clone_model(model, make)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _error("FXC0403", f"`{type(model).__name__}` can't be copied: {error}",
                     help="capture works on a copy of the model; make copy.deepcopy(model) work") from error


def _by_tracing(model: nn.Module, example: Example, inputs: Inputs, name: str, copied: nn.Module) -> Captured:
    def run(fakes: Fakes, training: bool) -> Traced:
        return trace(copied, inputs.values, inputs.call, fakes, training)

    traced, other, fixed, notes = trace_both(run, device_of(model, example), example.batch, model.training)
    captured = assemble(copied, traced, other, example, "fx", name)
    captured.fixed_batch, captured.notes = fixed, (*captured.notes, *notes)
    return captured


def trace_both(
    run: Callable[[Fakes, bool], Traced], device: torch.device, batch: int, training: bool
) -> tuple[Traced, Traced | None, str, tuple[str, ...]]:
    """The trace in the mode `training`, that in the other mode if the model asks for its mode, why the batch is fixed
    (empty if it isn't), and notes."""
    fixed = ""
    batches: tuple[int, ...] = (batch, 2 * batch)
    try:
        traced = run(Fakes(batches, device), training)
    except BatchFixedError as error:
        batches, fixed = (batch,), f"{error.reason} at {error.source}" if error.source else error.reason
        traced = run(Fakes(batches, device), training)
    if not traced.reads_training:
        return traced, None, fixed, ()
    try:
        return traced, run(Fakes(batches, device), not training), fixed, ()
    except (UntraceableError, BatchFixedError) as error:
        here, there = ("training", "evaluation") if training else ("evaluation", "training")
        note = f"{there} mode can't be captured ({error.reason} at {error.source}): the graph always is that of {here}"
        return traced, None, fixed, (note,)


def _refused(name: str, example: Example, failed: list[tuple[str, UntraceableError]]) -> CaptureError:
    """The diagnostic for a model that no way takes, with the model's line and what each way said."""
    first = failed[0][1]
    reason = _at(first)
    if first.computing:
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in example.tensors())
        return _error("FXC0402", f"`{name}` doesn't run on the example inputs: {reason}",
                      notes=(f"the inputs are {shapes or 'no tensors'}",),
                      help="give inputs of the shape and dtype that the model is made for")
    notes = tuple(f"by {way}: {_at(error)}" for way, error in failed[1:])
    return _error("FXC0401", f"`{name}` can't be captured: {reason}", notes=notes, help=_way_out(first.reason))


def _at(error: UntraceableError) -> str:
    return f"{_short(error.reason)} at {error.source}" if error.source else _short(error.reason)


def _short(reason: str, limit: int = 200) -> str:
    line = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
    return line if len(line) <= limit else f"{line[:limit]}..."


def _way_out(reason: str) -> str:
    if "batch size" in reason:
        return "make that line independent of the batch size, or capture with the batch size the model is used with"
    if "value of a tensor" in reason:
        return "decide with torch.where, or move the decision out of `forward`"
    return "rewrite that line with torch operations on tensors, or capture the part of the model without it"


def _error(code: str, message: str, notes: tuple[str, ...] = (), help: str | None = None) -> CaptureError:
    return CaptureError([Diagnostic(code, message, notes=notes, help=help)])
