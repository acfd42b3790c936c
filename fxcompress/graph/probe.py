"""Fake tensors: the example inputs at two batch sizes, and the shapes that operators and leaf modules give."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from .modules import leaf_of, module_kind

# Leaf modules that give back a value of the shape and dtype they were given.
_SHAPELESS = ("batchnorm", "layernorm", "groupnorm", "instancenorm", "rmsnorm", "prelu", "dropout", "alpha_dropout",
              "feature_alpha_dropout", "stochastic_depth", "rrelu")


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """`value` (nested tuples, lists and dicts) with every tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        items = [map_tensors(item, function) for item in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*items)
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


class Fakes:
    """Makes and keeps fake tensors. `batches` holds the batch size of each probe: the example's and twice that, or the
    example's alone where the batch is fixed."""

    def __init__(self, batches: tuple[int, ...], device: torch.device, mode: FakeTensorMode | None = None) -> None:
        self.batches, self.device = batches, device
        self.mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # id of a real tensor -> (it, its fake)

    def of(self, tensor: Tensor) -> Tensor:
        """The fake of a real or meta tensor; never copies data. The same tensor gives the same fake."""
        if id(tensor) not in self._made:
            if tensor.device.type == "meta" or tensor.layout != torch.strided:
                with self.mode:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
            else:
                fake = self.mode.from_tensor(tensor.detach(), static_shapes=True)
            self._made[id(tensor)] = (tensor, fake)
        return self._made[id(tensor)][1]

    def input(self, tensor: Tensor, probe: int) -> Tensor:
        """The fake of an example input in `probe`: its first dimension scaled if it is the batch."""
        shape = list(tensor.shape)
        if shape and shape[0] == self.batches[0]:
            shape[0] = self.batches[probe]
        with self.mode:
            return torch.empty(shape, dtype=tensor.dtype, device=self.device)

    def inputs(self, example: Any, probe: int) -> Any:
        """The fakes of an example input, which may be a container of tensors."""
        return map_tensors(example, lambda tensor: self.input(tensor, probe))

    def run_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a leaf module gives for fake inputs. Its buffers stay as they are."""
        kind = module_kind(module)
        if kind.startswith(_SHAPELESS) and args:
            with self.mode:
                return torch.empty_like(args[0]) if "dropout" not in kind else args[0].view_as(args[0])
        found = leaf_of(type(module))
        with self.mode:
            if found is not None and kind in _FUNCTIONS and not kwargs:
                return _FUNCTIONS[kind](self, module, *args)
            state = {name: self.of(t) for name, t in module.named_parameters(remove_duplicate=False)}
            state |= {name: self.of(t) for name, t in module.named_buffers(remove_duplicate=False)}
            with _beside(self, module):
                return functional_call(module, state, args, dict(kwargs))


@contextmanager
def _beside(fakes: Fakes, module: nn.Module) -> Iterator[None]:
    """What a module keeps of its weights beside its parameters: recurrent layers a list, which is fake while it
    lasts; hooks (the old `weight_norm` and `spectral_norm`) a tensor, which is put back."""
    kept = {name: value for name, value in module.__dict__.items() if isinstance(value, Tensor)}
    flat = module.__dict__.get("_flat_weights")
    if flat is not None:
        kept["_flat_weights"] = flat
        module.__dict__["_flat_weights"] = [fakes.of(weight) for weight in flat]
    try:
        yield
    finally:
        module.__dict__.update(kept)


def _weights(fakes: Fakes, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    bias = module.bias
    return fakes.of(module.weight), None if bias is None else fakes.of(bias)  # type: ignore[arg-type]


def _linear(fakes: Fakes, module: nn.Linear, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, *_weights(fakes, module))


_FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {"linear": _linear}
