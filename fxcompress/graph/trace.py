"""The first way of capture: run the model's own code on fake tensors and record every torch call it makes.

A `TorchFunctionMode` sees the calls before torch does, so the model holds ordinary (fake) tensors, and its control
flow on sizes that don't depend on the batch just runs. Modules of `MODULES` are not entered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from . import frames
from .dynamic import UntraceableError
from .modules import MODULES, keeps_forward, leaf_of
from .probe import Fakes
from .recorder import Recorder
from .trace_errors import RAISED_BY_MODELS
from .twins import Twins
from .values import BatchFixedError
from .writes import worked_in_place

_orig_call = nn.Module.__call__

@dataclasses.dataclass
class Traced:
    """One trace: the graph, what every node gives in each probe, the constants it reads and the plain twins it
    needs."""

    recorder: Recorder
    twins: Mapping[str, type[nn.Module]]
    reads_training: bool

    @property
    def graph(self) -> fx.Graph:
        """The recorded graph."""
        return self.recorder.graph


class _Mode(TorchFunctionMode):
    """Hands every torch call to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args[0])
        if name == "__set__":
            return self._set_attribute(func, args)
        if torch.is_autocast_enabled(self.recorder.device.type):
            self.recorder.refuse("the model switches autocast on by itself")
        return self.recorder.record(func, args, kwargs or {})

    def _attribute(self, func: Any, tensor: Tensor) -> Any:
        rec, name = self.recorder, func.__self__.__name__
        if not rec.tracked(tensor):
            return func(tensor)
        if name == "shape":
            return rec.shape_of(tensor)
        if name in _VIEWS:
            return _VIEWS[name](rec, tensor)
        if name == "device":
            return rec.device
        if name in _ON_DEVICE:
            return rec.device.type == name.removeprefix("is_")
        value = func(tensor)
        if isinstance(value, Tensor) and name not in ("grad", "_base"):
            rec.refuse(f"the model reads `.{name}` of a tensor")
        return value

    def _set_attribute(self, func: Any, args: tuple[Any, ...]) -> Any:
        name = func.__self__.__name__
        if self.recorder.tracked(args[0]) and name != "requires_grad":
            self.recorder.refuse(f"the model sets `.{name}` of a tensor")
        return None if self.recorder.tracked(args[0]) else func(*args)


_ON_DEVICE = frozenset(f"is_{name}" for name in "cpu cuda meta mps xpu hpu ipu xla mtia vulkan maia".split())


def _transposed(method: str) -> Callable[[Recorder, Tensor], Any]:
    return lambda rec, tensor: rec.record(getattr(torch.ops.aten, method).default, (tensor,), {})


_VIEWS: Mapping[str, Callable[[Recorder, Tensor], Any]] = {
    "T": _transposed("numpy_T"), "mT": _transposed("mT"), "mH": _transposed("mH"), "H": _transposed("matrix_H"),
    "data": lambda rec, tensor: rec.call("detach", tensor),
    "real": lambda rec, tensor: rec.call("real", tensor), "imag": lambda rec, tensor: rec.call("imag", tensor),
}


@dataclasses.dataclass
class _Run:
    """The state of one run of the model: which modules there are, in which of them the code is."""

    recorder: Recorder
    paths: Mapping[nn.Module, str]
    twins: Twins
    executing: bool = False  # a leaf module runs on fakes: torch's own code, not the model's

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `module(*args, **kwargs)` gives while tracing."""
        if self.executing:
            return _orig_call(module, *args, **kwargs)
        if vanishes(module):
            return args[0] if args else next(iter(kwargs.values()))
        path = self.paths.get(module)
        if path is None:
            return _orig_call(module, *args, **kwargs)
        rec, outer = self.recorder, self.recorder.path
        rec.path = path
        try:
            if path and is_leaf(module):
                return self._leaf(module, path, args, kwargs)
            with self.twins.inside(path, module):
                return _orig_call(module, *args, **kwargs)
        finally:
            rec.path = outer

    def _leaf(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.executing = True
        try:
            with torch._C.DisableTorchFunction():
                result = self.recorder.emit_module(path, args, kwargs, module)
                if module.__dict__.get("inplace", False):
                    worked_in_place(self.recorder, (*args, *kwargs.values())[0], result)
                return result
        finally:
            self.executing = False


def leaf_kind(module: nn.Module) -> str:
    """The kind of a module that isn't entered; `stochastic_depth` for every class that drops paths as torchvision's
    does; else empty."""
    if type(module).__name__.endswith("DropPath") and drop_rate(module) >= 0.0 and not list(module.parameters()):
        return "stochastic_depth"
    if type(module) in MODULES:
        return MODULES[type(module)].kind
    found = leaf_of(type(module))
    return found[1].kind if found is not None and keeps_forward(module) else ""


def is_leaf(module: nn.Module) -> bool:
    """Whether `module` stays one `call_module` node."""
    return bool(leaf_kind(module))


def vanishes(module: nn.Module) -> bool:
    """Whether `module` always gives back its input: it leaves no node."""
    return isinstance(module, nn.Identity) or (leaf_kind(module) == "stochastic_depth" and drop_rate(module) == 0.0)


def drop_rate(module: nn.Module) -> float:
    """The probability of a stochastic-depth module, whatever its author called it; -1 where it can't be told, or where
    the paths that stay are not scaled up."""
    rate = next((getattr(module, name) for name in ("p", "drop_prob") if hasattr(module, name)), -1.0)
    scaled = bool(getattr(module, "scale_by_keep", True))
    return float(rate or 0.0) if scaled and (rate is None or isinstance(rate, int | float)) else -1.0


@contextlib.contextmanager
def watched_modes(training: bool, executing: Callable[[], bool] = lambda: False) -> Iterator[list[str]]:
    """While it lasts, every module is in the mode `training`, and the list that is given tells which classes of
    module asked for it, apart from leaf modules."""
    reads: list[str] = []

    def read(module: nn.Module) -> bool:
        if not executing() and frames.is_model_code(sys._getframe(1).f_code.co_filename) and not leaf_kind(module):
            reads.append(type(module).__name__)
        return training

    def write(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield reads
    finally:
        del nn.Module.training


@contextlib.contextmanager
def _calls_to(run: _Run) -> Iterator[None]:
    """While it lasts, module calls come to `run`."""
    nn.Module.__call__ = lambda module, *args, **kwargs: run.call(module, args, kwargs)  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = _orig_call  # type: ignore[method-assign]


def state_names(named: Iterable[tuple[str, nn.Module]]) -> dict[int, str]:
    """The name of every parameter and buffer of a model with these modules, by id; of a shared one the first."""
    names: dict[int, str] = {}
    for path, module in named:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), f"{path}.{name}" if path else name)
    return names


def trace(model: nn.Module, args: Mapping[str, Any], call: Callable[..., Any], fakes: Fakes, training: bool) -> Traced:
    """Trace `model` in the given mode. `args` are the inputs by placeholder name, `call(model, inputs)` calls it
    with them.

    Raises UntraceableError, with the model's line, where its code does what a graph can't hold, BatchFixedError
    where it only works at the example's batch size.
    """
    named = list(model.named_modules())
    recorder = Recorder(fx.Graph(), fakes, state_names(named), fakes.device)
    twins = Twins(recorder, training)
    recorder.twin = twins.match
    run = _Run(recorder, {module: name for name, module in reversed(named)}, twins)
    inputs = {name: recorder.input(name, example) for name, example in args.items()}
    with watched_modes(training, lambda: run.executing) as reads, _calls_to(run), torch.enable_grad(), _Mode(recorder):
        output = _run_traced(recorder, model, call, inputs)
        recorder.graph.output(recorder.argument(plain(output, recorder.notes)))
    return Traced(recorder, twins.found, bool(reads))


def _run_traced(recorder: Recorder, model: nn.Module, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    try:
        return call(model, inputs)
    except (UntraceableError, BatchFixedError):
        raise
    except RAISED_BY_MODELS as error:
        raise UntraceableError(f"{type(error).__name__}: {error}", frames.innermost(error)) from error


def plain(output: Any, notes: list[str]) -> Any:
    """The model's output in plain containers: tuples and lists stay, named tuples become tuples, mappings and
    dataclasses (the outputs of transformers) become dicts without their None entries. What no graph can hold is left
    out, and `notes` says so."""
    if _fits(output):
        return output
    if isinstance(output, Mapping):
        kept = {str(key): value for key, value in output.items() if value is not None and _holds(value, key, notes)}
        return {key: plain(value, notes) for key, value in kept.items()}
    if dataclasses.is_dataclass(output):
        return plain({field.name: getattr(output, field.name) for field in dataclasses.fields(output)}, notes)
    if isinstance(output, tuple | list):
        items = [plain(value, notes) for place, value in enumerate(output) if _holds(value, place, notes)]
        return items if isinstance(output, list) else tuple(items)
    raise UntraceableError(f"the model returns a {type(output).__name__}")


def _fits(value: Any) -> bool:
    return value is None or isinstance(value, Tensor | torch.SymInt | torch.SymFloat | bool | int | float | str)


def _holds(value: Any, key: Any, notes: list[str]) -> bool:
    """Whether a graph can return `value`; a note where it can't."""
    fits = _fits(value) or isinstance(value, Mapping | tuple | list) or dataclasses.is_dataclass(value)
    if not fits:
        notes.append(f"the output `{key}` is a {type(value).__name__}, which a graph can't return: it is left out")
    return fits
