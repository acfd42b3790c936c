"""Sizes that depend on the batch, while a model is traced: numbers with one value per probe."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import fx

if TYPE_CHECKING:
    from .recorder import Recorder


class UntraceableError(Exception):
    """The model does something that a graph can't hold: `reason` says what, `source` where. `computing` says that an
    operator failed on tensors like the example inputs, as it would in the model itself."""

    def __init__(self, reason: str, source: str = "", computing: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.source, self.computing = reason, source, computing


class _Dynamic:
    """What `DynInt` and `DynFloat` share. `values[i]` is the number in probe `i`; `node` computes it."""

    recorder: Recorder
    node: fx.Node
    values: tuple[Any, ...]

    def _fail(self, what: str) -> NoReturn:
        raise UntraceableError(f"{what} depends on the batch size", self.recorder.source())

    def __repr__(self) -> str:
        return f"dynamic({self.node.name}={self.values})"

    def __bool__(self) -> bool:
        return self.recorder.decide(operator.ne, self.values, (0,) * len(self.values))

    def __hash__(self) -> int:  # noqa: PLE0309
        self._fail("a dictionary key")

    def __index__(self) -> int:  # noqa: PLE0305
        self._fail("a Python integer")

    def __int__(self) -> int:
        self._fail("a Python integer")

    def __float__(self) -> float:
        self._fail("a Python float")


def _arithmetic(function: Callable[[Any, Any], Any], swap: bool) -> Callable[[Any, Any], Any]:
    def method(self: _Dynamic, other: object) -> Any:
        if isinstance(other, torch.Tensor) or not isinstance(other, int | float | _Dynamic):
            return NotImplemented
        return self.recorder.record(function, (other, self) if swap else (self, other), {})

    return method


def _comparison(function: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
    def method(self: _Dynamic, other: object) -> Any:
        if isinstance(other, _Dynamic):
            others = other.values
        elif isinstance(other, int | float):
            others = (other,) * len(self.values)
        else:
            return NotImplemented
        return self.recorder.decide(function, self.values, others)

    return method


def _unary(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def method(self: _Dynamic) -> Any:
        return self.recorder.record(function, (self,), {})

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(_Dynamic, f"__{_name}__", _arithmetic(getattr(operator, _name), swap=False))
    setattr(_Dynamic, f"__r{_name}__", _arithmetic(getattr(operator, _name), swap=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(_Dynamic, f"__{_name}__", _comparison(getattr(operator, _name)))
setattr(_Dynamic, "__neg__", _unary(operator.neg))  # noqa: B010


class DynInt(_Dynamic, torch.SymInt):  # type: ignore[misc]
    """An integer. It is a `torch.SymInt` so that torch's argument checks let it through to the recorder."""

    def __init__(self, recorder: Recorder, node: fx.Node, values: tuple[int, ...]) -> None:
        self.recorder, self.node, self.values = recorder, node, values


class DynFloat(_Dynamic, torch.SymFloat):  # type: ignore[misc]
    """A float, for instance half of a dynamic size."""

    def __init__(self, recorder: Recorder, node: fx.Node, values: tuple[float, ...]) -> None:
        self.recorder, self.node, self.values = recorder, node, values


def holds_for_every_batch(
    function: Callable[[Any, Any], bool], left: tuple[Any, ...], right: tuple[Any, ...], batches: tuple[int, ...]
) -> bool | None:
    """The outcome of `left <op> right` if it is the same for every batch size from 1 up, else None.

    Both sides are taken to be linear in the batch size, as sizes are: two probes give the line.
    """
    difference = [a - b for a, b in zip(left, right, strict=True)]
    slope = (difference[1] - difference[0]) / (batches[1] - batches[0])
    at = [difference[0] + slope * (batch - batches[0]) for batch in (1, *batches, 2**20)]
    outcomes = {function(round(value, 6), 0) for value in at}
    if slope and function in (operator.eq, operator.ne):  # a line may cross zero at a batch size between the probes
        root = batches[0] - difference[0] / slope
        if root >= 1 and abs(root - round(root)) < 1e-9:
            return None
    return outcomes.pop() if len(outcomes) == 1 else None
