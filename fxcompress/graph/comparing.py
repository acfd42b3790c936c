"""Two graphs compared value by value on the same inputs: what the proofs of removals have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..diagnostics import Diagnostic, RewriteError
from .captured import Captured, Example
from .interpret import evaluating, values_of

TOLERANCE = 1e-4  # relative to the largest number of a value, in float32
TOLERANCE_64 = 1e-10

Apart = Callable[[fx.Node, Any, Any], float]  # a node of the original, its value, that in the rewritten graph


@dataclass(frozen=True)
class Proof:
    """The worst relative difference of two values of one node, and the precision they were computed in."""

    error: float
    dtype: torch.dtype

    @property
    def holds(self) -> bool:
        """Whether the outputs are equal up to rounding."""
        return self.error <= (TOLERANCE_64 if self.dtype == torch.float64 else TOLERANCE)

    @property
    def shown(self) -> str:
        """`3e-07`, or `2e-15 in float64`."""
        return f"{self.error:.1g}" + (" in float64" if self.dtype == torch.float64 else "")


class Run(fx.Interpreter):
    """Runs a graph; in another precision if asked for, also where the graph itself names a floating-point one."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype | None = None) -> None:
        super().__init__(module)
        self.dtype = dtype

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `n`; `x.to(float32)` would round what was computed in float64."""
        given: tuple[tuple[Any, ...], dict[str, Any]] = super().fetch_args_kwargs_from_env(n)
        return given if self.dtype is None else tree_map(self._precise, given)

    def _precise(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value.is_floating_point else value


def proven(compare: Callable[[torch.dtype | None], Proof], what: str, help_: str, double: bool = False) -> Proof:
    """What `compare` finds in the models' own precision, or in float64. A difference that float64 doesn't confirm is
    rounding; then the proof is the one in float64, as it is from the start if `double`.

    Raises RewriteError (FXC0541) if the difference is real: `what` says of what to what.
    """
    proof = compare(torch.float64 if double else None)
    if not proof.holds and not double:
        proof = compare(torch.float64)
    if not proof.holds:
        raise RewriteError([Diagnostic(
            "FXC0541", f"{what} by {proof.error:.2g}",
            notes=("the difference is that of the worst value inside, relative to its largest number, in float64",
                   "nothing was changed"), help=help_)])
    return proof


@contextmanager
def side_by_side(original: Captured, rewritten: Captured, dtype: torch.dtype | None) -> Iterator[None]:
    """Both in evaluation mode and in the precision asked for; afterwards as they were."""
    with ExitStack() as stack:
        for module in (original.module, rewritten.module):
            stack.enter_context(_precision(module, dtype))
            stack.enter_context(evaluating(module))
        yield


def worst_apart(original: Run, rewritten: Run, inputs: list[Any], apart: Apart) -> Proof:
    """Run both node by node and compare every value they share: what a later layer would drown or an untrained one
    multiplies by zero shows where it arises."""
    worst = 0.0
    shared = {node.name for node in original.module.graph.nodes}  # type: ignore[union-attr]
    shared &= {node.name for node in rewritten.module.graph.nodes}  # type: ignore[union-attr]
    found = ((node.name, value) for node, value in values_of(rewritten, inputs) if node.name in shared)
    for node, value in values_of(original, inputs):
        if node.name in shared:
            name, other = next(found)
            assert name == node.name, f"{name} and {node.name} are out of step"
            worst = max(worst, apart(node, value, other))
    return Proof(worst, original.dtype or torch.float32)


def difference(expected: object, found: object) -> float:
    """The largest difference of two nests of tensors, relative to the largest finite value expected in each."""
    worst = 0.0
    one, two = tree_flatten(expected)[0], tree_flatten(found)[0]
    if len(one) != len(two):
        return float("inf")
    for a, b in zip(one, two, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            worst = max(worst, _apart(a.detach(), b.detach()) if a.shape == b.shape else float("inf"))
    return worst


def _apart(a: Tensor, b: Tensor) -> float:
    """Tensors of one shape; infinities and not-a-numbers have to stand in the same places. Numbers of other kinds than
    floating-point ones are positions and decisions, which rounding may turn: they aren't compared."""
    if not a.is_floating_point() or not a.numel():
        return 0.0
    largest = float(a.abs().max())
    if not math.isfinite(largest):
        finite = a.isfinite()
        if not bool(((a == b) | (a.isnan() & b.isnan()) | finite).all()):
            return float("inf")
        a, b = a[finite], b[finite]
        largest = float(a.abs().max()) if a.numel() else 0.0
    error = float((a - b).abs().max()) if a.numel() else 0.0
    return float("inf") if math.isnan(error) else error / max(largest, 1e-30)


def inputs_of(captured: Captured, example: Example | None = None, dtype: torch.dtype | None = None) -> list[Any]:
    """The example inputs in the order of the graph's placeholders, in another precision if asked for."""
    example = example or captured.example
    given, values = iter(example.args), []
    for node in captured.module.graph.nodes:
        if node.op != "placeholder":
            continue
        value = example.kwargs[node.name] if node.name in example.kwargs else next(given, *node.args[:1])
        values.append(tree_map(lambda leaf: _cast(leaf, dtype), value))
    return values


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if dtype is not None and isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def _precision(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Floating-point parameters and buffers in another precision, and afterwards the very same data as before."""
    held = [tensor for tensor in (*module.parameters(), *module.buffers()) if dtype and tensor.is_floating_point()]
    data = [tensor.data for tensor in held]
    for tensor in held:
        tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for tensor, old in zip(held, data, strict=True):
            tensor.data = old
