"""Fake tensors: the example inputs at two batch sizes, and what operators and leaf modules give for them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from .modules import module_kind
from .shapes import META, RULES
from .shapes_modules import rule_of
from .trace_errors import RAISED_BY_MODELS
from .values import map_leaves

# Leaf modules that give back a value of the shape and dtype they were given.
_SHAPELESS = ("batchnorm", "layernorm", "groupnorm", "instancenorm", "rmsnorm", "prelu", "dropout", "alpha_dropout",
              "feature_alpha_dropout", "stochastic_depth", "rrelu")
Fake = Callable[[Tensor], Tensor]


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """`value` (nested tuples, lists and dicts) with every tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        items = [map_tensors(item, function) for item in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
        if hasattr(value, "n_sequence_fields"):  # torch.return_types.max and its like
            return type(value)(items)
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value


_LOGGERS = tuple(map(logging.getLogger, ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")))


@contextmanager
def quiet() -> Iterator[None]:
    """While it lasts, torch doesn't log operators that fail on fakes: what fails is reported by us."""
    before = [logger.disabled for logger in _LOGGERS]
    for logger in _LOGGERS:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(_LOGGERS, before, strict=True):
            logger.disabled = disabled


@contextmanager
def collecting_later() -> Iterator[None]:
    """While it lasts, Python doesn't look for garbage: of the many objects of a capture nearly all stay, and a full
    collection walks through everything that is loaded."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class Fakes:
    """Makes and keeps fake tensors, which are on `meta`. `batches` holds the batch size of each probe: the example's
    and twice that, or the example's alone where the batch is fixed.

    Common operators have rules (`shapes.py`), torch's own meta functions do the rest. What neither takes runs in a
    `FakeTensorMode` (`FakesOnDevice`), many times as slow; what it raises there says what is wrong.
    """

    def __init__(self, batches: tuple[int, ...], device: torch.device) -> None:
        self.batches, self.device = batches, device
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # id of a real tensor -> (it, its fake)
        self._on_device: FakesOnDevice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The fake of a real or meta tensor. The same tensor gives the same fake."""
        found = self._made.get(id(tensor))
        if found is None:
            found = self._made[id(tensor)] = (tensor, on_meta(tensor))
        return found[1]

    def input(self, tensor: Tensor, probe: int) -> Tensor:
        """The fake of an example input in `probe`: its first dimension scaled if it is the batch."""
        shape = list(tensor.shape)
        if shape and shape[0] == self.batches[0]:
            shape[0] = self.batches[probe]
        return torch.empty(shape, dtype=tensor.dtype, device=META)

    def inputs(self, example: Any, probe: int) -> Any:
        """The fakes of an example input, which may be a container of tensors."""
        return map_tensors(example, lambda tensor: self.input(tensor, probe))

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `function` gives for fakes. Raises what it raises on fake tensors of the device."""
        rule = RULES.get(function)
        try:
            found = rule(*args, **kwargs) if rule is not None else None
            return found if found is not None else _fakes(function(*args, **kwargs))
        except RAISED_BY_MODELS:
            slow = self._slow()  # tried below, so that what it raises stands for itself
        with slow.mode:
            return map_tensors(function(*slow.fakes(args), **slow.fakes(kwargs)), on_meta)

    def run_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a leaf module gives for fake inputs. Its buffers stay as they are. Raises as `call` does."""
        rule = rule_of(module)
        try:
            found = rule(module, *args, **kwargs) if rule is not None else None
            return found if found is not None else _run_module(self.of, module, args, kwargs)
        except RAISED_BY_MODELS:
            slow = self._slow()
        with slow.mode:
            return map_tensors(_run_module(slow.of, module, slow.fakes(args), slow.fakes(kwargs)), on_meta)

    def on_device(self, fake: Tensor) -> Tensor:
        """A `FakeTensor` on the device for a fake."""
        return self._slow().fakes(fake)  # type: ignore[no-any-return]

    def _slow(self) -> FakesOnDevice:
        if self._on_device is None:
            self._on_device = FakesOnDevice(self.device)
        return self._on_device


def on_meta(tensor: Tensor) -> Tensor:
    """A `meta` tensor with the shape, strides and dtype of `tensor`, in memory of its own."""
    if tensor.layout != torch.strided:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _fakes(value: Any) -> Any:
    """`value` with fakes for real tensors, which a function makes that is told no device."""
    if isinstance(value, Tensor):
        return value if value.is_meta else on_meta(value)
    return map_tensors(value, _fakes) if isinstance(value, tuple | list | dict) else value


class FakesOnDevice:
    """Fake tensors in the sense of torch, which act as if they were on `device`."""

    def __init__(self, device: torch.device, mode: FakeTensorMode | None = None) -> None:
        self.device, self.mode = device, mode or FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The fake of a real or meta tensor; never copies data. The same tensor gives the same fake."""
        if id(tensor) not in self._made:
            self._made[id(tensor)] = (tensor, self._fake(tensor))
        return self._made[id(tensor)][1]

    def _fake(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta" and tensor.layout == torch.strided:
            return self.mode.from_tensor(tensor.detach(), static_shapes=True)
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)

    def fakes(self, value: Any) -> Any:
        """`value` with its `meta` tensors and device replaced by those of `device`."""
        def leaf(item: Any) -> Any:
            if isinstance(item, Tensor):
                return self._fake(item) if item.is_meta else item
            return self.device if isinstance(item, torch.device) and item.type == "meta" else item

        return map_leaves(value, leaf)

    def run_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a leaf module gives for fake inputs, sizes of which may be symbols. Its buffers stay as they are."""
        kind = module_kind(module)
        with self.mode:
            if kind.startswith(_SHAPELESS) and args:
                return torch.empty_like(args[0]) if "dropout" not in kind else args[0].view_as(args[0])
            return _run_module(self.of, module, args, kwargs)


def _run_module(of: Fake, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run `module` with fakes, made by `of`, for its tensors."""
    state = {name: of(t) for name, t in module.named_parameters(remove_duplicate=False)}
    state |= {name: of(t) for name, t in module.named_buffers(remove_duplicate=False)}
    with _beside(of, module):
        return functional_call(module, state, args, dict(kwargs))


@contextmanager
def _beside(of: Fake, module: nn.Module) -> Iterator[None]:
    """What a module keeps of its weights beside its parameters: recurrent layers a list, which is fake while it
    lasts; hooks (the old `weight_norm` and `spectral_norm`) a tensor, which is put back."""
    kept = {name: value for name, value in module.__dict__.items() if isinstance(value, Tensor)}
    flat = module.__dict__.get("_flat_weights")
    if flat is not None:
        kept["_flat_weights"] = flat
        module.__dict__["_flat_weights"] = [of(weight) for weight in flat]
    try:
        yield
    finally:
        module.__dict__.update(kept)
