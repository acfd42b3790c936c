"""Subclasses of leaf modules with a forward of their own that still call the operator of their base on their own
parameters (a batch norm with an activation, a layer norm over channels): the call is given to a plain twin of the
module, which has the same parameters and buffers, so that the layer is as easy to find and to rewrite as any other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .modules import leaf_of
from .opbase import Op

if TYPE_CHECKING:
    from .recorder import Recorder

# Canonical arguments that must be the module's own tensors, and those that must equal its settings.
_TENSORS = {"conv": ("weight", "bias"), "linear": ("weight", "bias"), "embedding": ("weight",),
            "layernorm": ("weight", "bias"),
            "groupnorm": ("weight", "bias"), "batchnorm": ("weight", "bias", "running_mean", "running_var")}
_SETTINGS = {"conv": ("stride", "padding", "dilation", "groups"), "layernorm": ("normalized_shape", "eps"),
             "groupnorm": ("num_groups", "eps"), "batchnorm": ("eps", "momentum")}


@dataclass
class Twins:
    """Which modules get a twin, found while tracing in mode `training`."""

    recorder: Recorder
    training: bool
    found: dict[str, type[nn.Module]] = field(default_factory=dict)
    _stack: list[tuple[str, nn.Module]] = field(default_factory=list)

    @contextmanager
    def inside(self, path: str, module: nn.Module) -> Iterator[None]:
        """The code of `module` runs."""
        self._stack.append((path, module))
        try:
            yield
        finally:
            self._stack.pop()

    def match(self, op: Op, values: dict[str, Any]) -> str | None:
        """The path of the module whose twin computes `op(values)`, or None."""
        if not self._stack or "weight" not in values:
            return None
        path, module = self._stack[-1]
        found = leaf_of(type(module))
        if not path or found is None or found[1].kind.rstrip("123d") != op.name.rstrip("123d") or path in self.found:
            return None
        family = op.name.rstrip("123d") if op.name.startswith("conv") else op.name
        if family not in _TENSORS or not self._equal(family, module, values):
            return None
        self.found[path] = found[0]
        return path

    def _equal(self, family: str, module: nn.Module, values: dict[str, Any]) -> bool:
        state = {**module._parameters, **module._buffers}
        own = all(values.get(name) is state.get(name) for name in _TENSORS[family])
        if family == "embedding":
            own = own and all(values.get(n) == getattr(module, n) for n in ("padding_idx", "max_norm"))
        if family == "batchnorm":
            own = own and values["training"] == (self.training or module.running_mean is None)
        if family == "conv":
            own = own and module.padding_mode == "zeros"
        return own and all(_one(values[name]) == _one(getattr(module, name)) for name in _SETTINGS.get(family, ()))


def _one(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value)
    items = tuple(value) if isinstance(value, tuple | list) else (value,)
    return items[0] if all(item == items[0] for item in items) else items


def make_twin(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """A module of class `base` with the state of `module`: the same parameters, buffers and settings."""
    twin = base.__new__(base)
    twin.__dict__.update(module.__dict__)
    return twin
