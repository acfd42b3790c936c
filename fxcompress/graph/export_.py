"""The second way of capture: `torch.export`, for models whose code does what can't be recorded as it runs.

While the model is exported, each of its leaf modules is one call of the operator `fxcompress::leaf`, so that it
comes out as one node with all its inputs, in either mode, and is put back as a `call_module` node of the module
itself. The exported graph is then run through the recorder, as the model's code is in the first way: the normal form
of both is the same.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from . import frames
from .assemble import assemble
from .captured import Captured, Example
from .dynamic import UntraceableError
from .probe import Fakes, FakesOnDevice, map_tensors, quiet
from .propagate import device_of
from .recorder import Recorder
from .trace import Traced, leaf_kind, plain, state_names, vanishes, watched_modes
from .trace_errors import RAISED_BY_MODELS
from .twins import Twins
from .values import BatchFixedError

if TYPE_CHECKING:
    from .capture import Inputs

_SCHEMA = "(Tensor[] inputs, str call) -> Tensor[]"


@dataclass
class _Session:
    """The calls of leaf modules in the export that runs now, and what its outputs lost."""

    calls: dict[str, Leaf] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    computing: bool = False  # shapes of a leaf are computed by its own code


_now = _Session()


@dataclass(frozen=True)
class Leaf:
    """One call of a leaf module: where it is, and its arguments but for the tensors among them."""

    path: str
    module: nn.Module
    others: tuple[Any, ...]  # every leaf of (args, kwargs); a `_TENSOR` where a tensor stands
    spec: pytree.TreeSpec
    outputs: dict[str, Any] = field(default_factory=dict)

    def arguments(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with `tensors` in their places."""
        rest = iter(tensors)
        filled = [next(rest) if item is _TENSOR else item for item in self.others]
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        return args, kwargs


_TENSOR = object()


@torch.library.custom_op("fxcompress::leaf", mutates_args=(), schema=_SCHEMA)
def _leaf_op(inputs: list[Tensor], call: str) -> list[Tensor]:
    """Stands for a leaf module while a model is exported; it is never run on real tensors."""
    raise NotImplementedError("fxcompress::leaf only exists while a model is exported")


@_leaf_op.register_fake
def _leaf_shapes(inputs: list[Tensor], call: str) -> list[Tensor]:
    leaf = _now.calls[call]
    mode = next(tensor.fake_mode for tensor in inputs if hasattr(tensor, "fake_mode"))
    args, kwargs = leaf.arguments(inputs)
    fakes = FakesOnDevice(inputs[0].device, mode)
    _now.computing = True
    try:
        result = fakes.run_module(leaf.module, args, kwargs)
    finally:
        _now.computing = False
    flat, spec = pytree.tree_flatten(result)
    leaf.outputs["spec"], leaf.outputs["items"] = spec, [isinstance(item, Tensor) for item in flat]
    return [item.clone() for item in flat if isinstance(item, Tensor)]


def _leaf_forward(path: str, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """What a leaf module does while the model is exported."""
    def forward(*args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [item for item in flat if isinstance(item, Tensor)]
        if _now.computing or not tensors or any(isinstance(item, torch.SymInt | torch.SymFloat) for item in flat):
            return original(*args, **kwargs)
        others = tuple(_TENSOR if isinstance(item, Tensor) else item for item in flat)
        name = f"{len(_now.calls)}"
        leaf = _now.calls[name] = Leaf(path, module, others, spec)
        outputs = iter(torch.ops.fxcompress.leaf(tensors, name))
        result = pytree.tree_unflatten([next(outputs) if tensor else None for tensor in leaf.outputs["items"]],
                                       leaf.outputs["spec"])
        return tensors[0].copy_(result) if getattr(module, "inplace", False) else result

    return forward


@contextlib.contextmanager
def _leaves_as_operators(model: nn.Module) -> Iterator[None]:
    """While it lasts, leaf modules of `model` call the operator `fxcompress::leaf`, and `model` returns plain
    containers."""
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return plain(original(*args, **kwargs), _now.notes)

    leaves = {path: module for path, module in model.named_modules() if path and leaf_kind(module)}
    for path, module in leaves.items():
        module.forward = _leaf_forward(path, module, type(module).forward.__get__(module))
    model.forward = forward
    try:
        yield
    finally:
        for module in (model, *leaves.values()):
            del module.forward


def by_export(model: nn.Module, example: Example, inputs: Inputs, name: str, copied: nn.Module) -> Captured:
    """Capture by `torch.export`; `copied` is a copy of `model` that the result may keep. Raises UntraceableError."""
    from .capture import trace_both

    def run(fakes: Fakes, training: bool) -> Traced:
        return _trace(copied, example, inputs, fakes, training)

    traced, other, fixed, notes = trace_both(run, device_of(model, example), example.batch, model.training)
    captured = assemble(copied, traced, other, example, "export", name)
    captured.fixed_batch, captured.notes = fixed, (*captured.notes, *notes)
    return captured


def _trace(model: nn.Module, example: Example, inputs: Inputs, fakes: Fakes, training: bool) -> Traced:
    """Export `model` in one mode and record the exported graph."""
    _now.calls.clear()
    _now.notes.clear()
    with watched_modes(training, lambda: _now.computing) as reads, _leaves_as_operators(model):
        program = _export(model, example, inputs, fixed=len(fakes.batches) == 1)
    _check_batch(program, fakes)
    try:
        return _record(program, model, inputs, fakes, training, bool(reads))
    except UntraceableError as error:
        if "written in place" not in error.reason:
            raise
    return _record(program.run_decompositions({}), model, inputs, fakes, training, bool(reads))


def _export(model: nn.Module, example: Example, inputs: Inputs, fixed: bool) -> ExportedProgram:
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    batch = example.batch

    def grow(tensor: Tensor) -> Tensor:
        """A batch of one would be taken for a constant."""
        tensor = tensor.to("meta") if on_meta else tensor
        alone = batch == 1 and not fixed and tensor.dim() and tensor.shape[0] == 1
        return torch.cat([tensor, tensor]) if alone else tensor

    def dims(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: Dim.AUTO} if value.dim() and not fixed and value.shape[0] == max(2, batch) else None
        if isinstance(value, tuple | list):
            return type(value)(dims(item) for item in value)
        return {key: dims(item) for key, item in value.items()} if isinstance(value, dict) else None

    given = {name: map_tensors(value, grow) for name, value in inputs.values.items()}
    args = tuple(list(given.values())[:inputs.positional])
    kwargs = dict(list(given.items())[inputs.positional:])
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = {name: dims(value) for name, value in bound.items()}
    said = StringIO()  # where it fails, torch writes whole graphs to stderr before it raises
    try:
        with quiet(), contextlib.redirect_stderr(said):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except RAISED_BY_MODELS as error:
        raise UntraceableError(f"torch.export: {type(error).__name__}: {error}", frames.innermost(error)) from error
    sys.stderr.write(said.getvalue())
    return program


def _check_batch(program: ExportedProgram, fakes: Fakes) -> None:
    """Note for which batch sizes an exported graph holds, where not for all: `torch.export` follows conditions on sizes
    the way the example goes. Raises BatchFixedError if it holds for the example's alone."""
    specs = program.graph_signature.input_specs
    given = [spec.arg.name for spec in specs if spec.kind == InputKind.USER_INPUT
             and isinstance(spec.arg, TensorArgument)]
    sizes = [size for node in program.graph.nodes if node.name in given for size in node.meta["val"].shape[:1]]
    known = [size if type(size) is int else size.node.maybe_as_int() for size in sizes]
    if len(fakes.batches) > 1 and max(2, fakes.batches[0]) in known:
        raise BatchFixedError("torch.export: the model's code takes a way of its own at this batch size", "")
    for bounds in program.range_constraints.values():
        if bounds.upper != int_oo or bounds.lower > 2:
            _now.notes.append(f"the graph holds for batch sizes of {bounds.lower} to {bounds.upper}: the model's code "
                              "takes another way at others")


def _record(
    program: ExportedProgram, model: nn.Module, inputs: Inputs, fakes: Fakes, training: bool, reads_training: bool
) -> Traced:
    recorder = Recorder(fx.Graph(), fakes, state_names(model.named_modules()), fakes.device)
    twins = Twins(recorder, training)
    recorder.twin = twins.match
    replay = _Replay(program, model, recorder, twins)
    try:
        output = replay.run({name: recorder.input(name, value) for name, value in inputs.values.items()})
    except (UntraceableError, BatchFixedError):
        raise
    except RAISED_BY_MODELS as error:
        raise UntraceableError(f"{type(error).__name__}: {error}", recorder.source()) from error
    recorder.graph.output(recorder.argument(output))
    recorder.notes += _now.notes
    return Traced(recorder, twins.found, reads_training)


class _Replay:
    """Runs the nodes of an exported graph through the recorder."""

    def __init__(self, program: ExportedProgram, model: nn.Module, recorder: Recorder, twins: Twins) -> None:
        self.program, self.model, self.recorder, self.twins = program, model, recorder, twins
        self.at: fx.Node | None = None
        recorder.locate = lambda: frames.stack_line(self.at.stack_trace) if self.at is not None else ""

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output, in its own containers, for `inputs` by name."""
        flat = iter(pytree.tree_leaves(list(inputs.values())))
        given: list[Any] = []
        for spec in self.program.graph_signature.input_specs:
            given.append(next(flat) if spec.kind == InputKind.USER_INPUT else self._state(spec.kind, str(spec.target)))
        outputs = self._graph(self.program.graph_module, given)
        specs = self.program.graph_signature.output_specs
        written = [str(spec.target) for spec in specs if spec.kind == OutputKind.BUFFER_MUTATION]
        if any(not name.endswith(("num_batches_tracked", "running_mean", "running_var")) for name in written):
            self.recorder.refuse(f"the model writes its buffer `{written[0]}` while it runs")
        results = [value for value, spec in zip(outputs, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]
        return pytree.tree_unflatten(results, self.program.call_spec.out_spec)

    def _state(self, kind: InputKind, target: str) -> Any:
        if kind == InputKind.PARAMETER:
            return self.model.get_parameter(target)
        if kind == InputKind.BUFFER:
            return self.model.get_buffer(target)
        if kind in (InputKind.CONSTANT_TENSOR, InputKind.CUSTOM_OBJ):
            return self.program.constants[target]
        self.recorder.refuse(f"torch.export gives the graph an input of kind {kind}")

    def _graph(self, module: fx.GraphModule, given: list[Any]) -> Any:
        """The outputs of `module`, a flat tuple or list, for the values `given` to its placeholders."""
        values: dict[fx.Node, Any] = {}
        places = iter(given)
        for node in module.graph.nodes:
            self.at = node
            if node.op == "placeholder":
                values[node] = next(places)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(str(node.target))(module)
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda other: values[other])
            else:
                args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)),
                                                     lambda item: self._argument(item, values))
                values[node] = self._call(node, args, kwargs)
        return ()

    def _argument(self, item: Any, values: Mapping[fx.Node, Any]) -> Any:
        """An argument of a node; where weights are on `meta`, what the model makes beside them isn't."""
        if isinstance(item, torch.device) and item.type == "meta":
            return self.recorder.fakes.device
        return values[item] if isinstance(item, fx.Node) else item

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rec, target = self.recorder, node.target
        if target is torch.ops.fxcompress.leaf.default:
            return self._leaf(*args)
        if target is operator.getitem and isinstance(args[0], tuple | list):
            return args[0][args[1]]
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._region(str(target), args)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        rec.path = str(stack[-1][0]) if stack else ""
        with self.twins.inside(rec.path, self._module(rec.path)):
            return rec.record(target, args, kwargs)  # type: ignore[arg-type]

    def _module(self, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError:  # the name of an argument that holds a module
            return self.model

    def _leaf(self, inputs: list[Any], call: str) -> list[Any]:
        leaf, rec = _now.calls[call], self.recorder
        args, kwargs = leaf.arguments(inputs)
        rec.path = leaf.path
        if vanishes(leaf.module):
            return inputs
        result = rec.emit_module(leaf.path, args, kwargs, leaf.module)
        return [item for item in pytree.tree_leaves(result) if isinstance(item, Tensor)]

    def _region(self, name: str, args: tuple[Any, ...]) -> Any:
        """A stretch of the model under `torch.no_grad`, or under autocast switched off: its nodes, in line."""
        if name == "wrap_with_set_grad_enabled":
            with torch.set_grad_enabled(bool(args[0])):
                return self._graph(args[1], list(args[2:]))
        if name == "wrap_with_autocast" and not args[2]:
            return self._graph(args[4], list(args[5:]))
        self.recorder.refuse(f"the model uses `{name}`")

