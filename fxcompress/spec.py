"""Model SPECs of the command line: where a model comes from, its weights, and inputs to try it on.

| SPEC | the model |
|---|---|
| `torchvision:NAME` | `torchvision.models.get_model(NAME)`, random weights |
| `timm:NAME` | `timm.create_model(NAME)`, random weights |
| `package.module:factory` | what `factory()` gives back, or `factory` itself if it is a module already |
| `file.py:factory` | the same, from a file |

The last two run the user's own Python; the first two run only library code. Nothing is ever downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from .diagnostics import Diagnostic, FxcError, nearest
from .policy.model import InputSpec

DTYPES: Mapping[str, torch.dtype] = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64, "i64": torch.int64,
    "i32": torch.int32, "bool": torch.bool, "u8": torch.uint8,
}
FORMS = "torchvision:NAME, timm:NAME, package.module:factory or file.py:factory"
BATCH = 2  # what a dynamic first dimension is tried with
LENGTH = 64  # what any other dynamic dimension is tried with

# What torchvision's models take where that isn't an image of 224 by 224: (beginning of the name, shapes of the inputs).
_TORCHVISION_INPUTS: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = (
    ("inception_v3", ((1, 3, 299, 299),)),
    ("quantized_inception_v3", ((1, 3, 299, 299),)),
    ("raft_", ((1, 3, 128, 128), (1, 3, 128, 128))),
    *((name, ((1, 3, 16, 112, 112),)) for name in ("r3d_", "mc3_", "r2plus1d_")),
    *((name, ((1, 3, 16, 224, 224),)) for name in ("mvit_", "swin3d_", "s3d")),
)

T = TypeVar("T")
Inputs = tuple[object, ...] | dict[str, object]


class SpecError(FxcError):
    """A SPEC, its weights or its inputs can't be used."""


@dataclass(frozen=True)
class Loaded:
    """A model, the inputs to capture it with (a tuple, or a dict of keyword inputs), and the SPEC it came from."""

    model: nn.Module
    example_inputs: Inputs
    spec: str


def load_spec(spec: str, weights: str | Path | None = None, inputs: Sequence[InputSpec] = ()) -> Loaded:
    """Make the model of `spec`, with `weights` (a safetensors file that must fit exactly) if given, in evaluation mode.

    Its example inputs are those that the policy declares (`inputs`), else `example_inputs` beside the factory (a value
    or a function), else what torchvision or timm say. Raises SpecError (FXC0710 to FXC0718).
    """
    source, example = _resolve(spec)
    model = _make(spec, source).eval()
    if weights is not None:
        load_weights(model, weights)
    if inputs:
        return Loaded(model, declared_inputs(inputs, model), spec)
    value = example() if example is not None else getattr(model, "example_inputs", None)
    if callable(value):
        value = _run(spec, "calling example_inputs()", value)
    if value is None:
        _fail("FXC0717", f"nothing says what inputs {spec} takes",
              help_="declare them in the policy (`input x: f32[N, 3, 224, 224]`), or put `example_inputs`, a tuple "
                    "or a dict or a function that gives one, beside the factory")
    return Loaded(model, _as_inputs(spec, value), spec)


def factory_of(spec: str) -> object:
    """The object that `package.module:name` or `file.py:name` names; calling it, if it is a function, calls the user's
    own code, whose errors become SpecErrors. Raises SpecError (FXC0710, FXC0713, FXC0714)."""
    origin, _, name = spec.rpartition(":")
    if not (origin and name):
        _fail("FXC0710", f"`{spec}` doesn't say where to find it", help_="write package.module:name or file.py:name")
    found = _found(spec, origin, name, "a function that makes it")[0]
    return partial(_run, spec, f"calling {name}()", found) if callable(found) else found


def _fail(code: str, message: str, *notes: str, help_: str | None = None, cause: Exception | None = None) -> NoReturn:
    raise SpecError([Diagnostic(code, message, notes=notes, help=help_)]) from cause


def _resolve(spec: str) -> tuple[object, Callable[[], object] | None]:
    """The factory (or module) that `spec` names, and where its example inputs come from."""
    origin, colon, name = spec.rpartition(":")
    if not (colon and origin and name):
        _fail("FXC0710", f"`{spec}` doesn't say where a model comes from", help_=f"write {FORMS}")
    if origin == "torchvision":
        return _torchvision(name), lambda: _torchvision_inputs(name)
    if origin == "timm":
        return _timm(name)
    factory, module = _found(spec, origin, name, "a function that makes the model")
    example = getattr(factory, "example_inputs", getattr(module, "example_inputs", None))
    return factory, None if example is None else lambda: example


def _found(spec: str, origin: str, name: str, otherwise: str) -> tuple[Any, ModuleType]:
    """`name` of the module or file `origin`, and that module."""
    module = _from_file(spec, Path(origin)) if origin.endswith(".py") else _from_package(spec, origin)
    if not hasattr(module, name):
        known = [word for word in vars(module) if not word.startswith("_") and callable(getattr(module, word))]
        _fail("FXC0713", f"{origin} has no `{name}`", help_=_did_you_mean(name, known, otherwise))
    return getattr(module, name), module


def _did_you_mean(name: str, known: Sequence[str], otherwise: str) -> str:
    close = nearest(name, known)
    return f"did you mean {' or '.join(close)}?" if close else f"name {otherwise}"


def _torchvision(name: str) -> Callable[[], nn.Module]:
    from torchvision.models import get_model, list_models

    if name not in list_models():
        _fail("FXC0711", f"torchvision has no model `{name}`",
              help_=_did_you_mean(name, list_models(), "one that torchvision.models.list_models() lists"))
    options = {"weights": None} | ({"weights_backbone": None} if "_" in name and _takes_backbone(name) else {})
    return partial(get_model, name, **options)


def _takes_backbone(name: str) -> bool:
    from torchvision.models import get_model_builder

    return "weights_backbone" in inspect.signature(get_model_builder(name)).parameters


def _torchvision_inputs(name: str) -> tuple[Tensor, ...]:
    shapes = next((shapes for start, shapes in _TORCHVISION_INPUTS if name.startswith(start)), ((1, 3, 224, 224),))
    return tuple(example_tensor(shape, torch.float32) for shape in shapes)


def _timm(name: str) -> tuple[Callable[[], nn.Module], Callable[[], object]]:
    try:
        import timm
    except ImportError as error:
        _fail("FXC0712", "timm is not installed", help_="pip install timm", cause=error)
    if not timm.is_model(name):
        _fail("FXC0711", f"timm has no model `{name}`",
              help_=_did_you_mean(name, timm.list_models(), "one that timm.list_models() lists"))

    def inputs() -> tuple[Tensor, ...]:
        config = timm.get_pretrained_cfg(name)
        size = config.input_size if config is not None else (3, 224, 224)
        return (example_tensor((1, *size), torch.float32),)

    return partial(timm.create_model, name, pretrained=False), inputs


def _from_package(spec: str, name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the user's own modules are in the working folder

    def load() -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there, and imports another that isn't
            _fail("FXC0713", f"there is no module `{error.name}` to import for {spec}",
                  help_="run from the folder that holds it, or name the file: path/to/file.py:factory", cause=error)

    return _run(spec, f"importing {name}", load)


def _from_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        _fail("FXC0713", f"there is no file {path} for {spec}", help_="paths are relative to the working folder")
    module_spec = importlib.util.spec_from_file_location(f"fxcompress_spec_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None  # a path that ends in .py always has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickling look there
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # as `python file.py` does
    try:
        _run(spec, f"running {path}", partial(module_spec.loader.exec_module, module))
    finally:
        sys.path.remove(folder)
    return module


def _run(spec: str, doing: str, function: Callable[[], T]) -> T:
    """Call the user's own code. What it raises becomes a SpecError that says where, with the traceback as its cause."""
    try:
        return function()
    except FxcError:
        raise
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        at = "an unknown place"
        if trace is not None:
            file = Path(trace.tb_frame.f_code.co_filename)
            at = f"{file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}:{trace.tb_lineno}"
        raise SpecError([Diagnostic("FXC0714", f"{doing} for {spec} failed: {type(error).__name__}: {error}",
                                    notes=(f"raised at {at}",), help="mend it there; run it by itself to see the whole "
                                    "traceback")]) from error


def _make(spec: str, source: object) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    if not callable(source):
        _fail("FXC0715", f"{spec} is a {type(source).__name__}, not a function that makes a model",
              help_="name a function without arguments that returns a torch.nn.Module, or such a module")
    model = _run(spec, f"calling {spec.rpartition(':')[2]}()", source)
    if not isinstance(model, nn.Module):
        _fail("FXC0715", f"{spec} gave back a {type(model).__name__}, not a torch.nn.Module",
              help_="let the factory return the model")
    return model


def example_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to try a model on: normal numbers from a fixed seed; ones for whole numbers (a token that any vocabulary
    has) and truth values (a mask that hides nothing)."""
    if not dtype.is_floating_point:
        return torch.ones(tuple(shape), dtype=dtype)
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(dtype)


def declared_inputs(inputs: Sequence[InputSpec], model: nn.Module) -> Inputs:
    """Example inputs as a policy declares them. A named dimension is dynamic: `BATCH` in first place, `LENGTH`
    elsewhere, one size for one name. By keyword if the names are those of `forward` but not its first ones in order,
    else by place. Raises SpecError (FXC0718) for a dtype that has no example."""
    sizes: dict[str, int] = {}
    tensors: dict[str, object] = {}
    for declared in inputs:
        if declared.dtype not in DTYPES:
            _fail("FXC0718", f"the input `{declared.name}` has the dtype `{declared.dtype}`, which has no example",
                  help_=f"write one of {', '.join(DTYPES)}")
        shape = [size if isinstance(size, int) else sizes.setdefault(size, LENGTH if place else BATCH)
                 for place, size in enumerate(declared.shape)]
        tensors[declared.name] = example_tensor(shape, DTYPES[declared.dtype])
    accepted = list(inspect.signature(model.forward).parameters)
    names = list(tensors)
    if names != accepted[: len(names)] and set(names) <= set(accepted):
        return tensors
    return tuple(tensors.values())


def _as_inputs(spec: str, value: object) -> Inputs:
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, tuple | list):
        return tuple(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    _fail("FXC0717", f"the example inputs of {spec} are a {type(value).__name__}",
          help_="give a tuple of inputs, or a dict of inputs by name")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the safetensors file `path` into `model`, in place. Raises SpecError (FXC0716) that lists every tensor that
    is missing, not known to the model, or of another shape. A tied weight may be stored once."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        _fail("FXC0716", f"the weights can't be read from {path}: {error}",
              help_="give a file that safetensors.torch.save_file wrote", cause=error)
    wanted = model.state_dict(keep_vars=True)
    problems = _misfits(wanted, stored)
    if problems:
        shown = problems[:12] + ([f"and {len(problems) - 12} more"] if len(problems) > 12 else [])
        count = "1 tensor doesn't fit" if len(problems) == 1 else f"{len(problems)} tensors don't fit"
        _fail("FXC0716", f"the weights in {path} are not those of this model: {count}", *shown,
              help_="name the model that the weights were saved from")
    model.load_state_dict(stored, strict=False)


def _misfits(wanted: Mapping[str, Any], stored: Mapping[str, Tensor]) -> list[str]:
    problems = []
    given = {id(tensor) for name, tensor in wanted.items() if name in stored}
    for name, tensor in wanted.items():
        if name in stored:
            if stored[name].shape != tensor.shape:
                problems.append(f"`{name}` is {list(stored[name].shape)} in the file and {list(tensor.shape)} in the "
                                "model")
        elif id(tensor) not in given:
            close = nearest(name, stored.keys() - wanted.keys(), 1)
            problems.append(f"`{name}` is missing" + (f" (the file has `{close[0]}`)" if close else ""))
    problems.extend(f"`{name}` is not in the model" for name in stored if name not in wanted)
    return problems
