"""The proof of a removal: the smaller model equals the larger one, the consumers' weights for what left set to zero.

Both run on the example inputs, in evaluation mode. Zeroing is done where labels are contracted away: in the weights of
the layer that sums over them, or, for a product of two computed values, in one of its operands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..diagnostics import Diagnostic, RewriteError
from .captured import Captured, Example
from .coupling import Coupling
from .coupling_edit import Kept, kept_of
from .coupling_flow import Consumed
from .interpret import evaluating, values_of

TOLERANCE = 1e-4  # relative to the largest number of a value, in float32
TOLERANCE_64 = 1e-9


@dataclass(frozen=True)
class Proof:
    """The worst relative difference of two values of one node, and the precision they were computed in."""

    error: float
    dtype: torch.dtype

    @property
    def holds(self) -> bool:
        """Whether the outputs are equal up to rounding."""
        return self.error <= (TOLERANCE_64 if self.dtype == torch.float64 else TOLERANCE)


def prove(original: Captured, rewritten: Captured, coupling: Coupling, gone: Kept,
          example: Example | None = None) -> Proof:
    """Compare `rewritten` with `original`, whose `coupling` it is, its consumers' weights for the labels `gone` zeroed.

    A difference in float32 that float64 doesn't confirm is rounding; then the proof is the one in float64. Raises
    RewriteError (FXC0541) if the difference is real. Both models and their modes are left as they were.
    """
    example = example or original.example
    proof = _compare(original, rewritten, coupling, gone, _inputs(original, example, None), None)
    if not proof.holds:
        double = torch.float64
        proof = _compare(original, rewritten, coupling, gone, _inputs(original, example, double), double)
    if not proof.holds:
        raise RewriteError([Diagnostic(
            "FXC0541", f"the model without these channels differs from the model with them zeroed by {proof.error:.2g}",
            notes=("the difference is that of the worst value inside, relative to its largest number, in float64",
                   "nothing was changed"),
            help="this is a defect of a transfer rule: please report it with the model; until then leave the layers at "
                 "fault out of the selection")])
    return proof


def _compare(original: Captured, rewritten: Captured, coupling: Coupling, gone: Kept, inputs: list[Any],
             dtype: torch.dtype | None) -> Proof:
    """Run both node by node and compare every value they share, on the indices that are kept: what a later layer would
    drown or an untrained one multiplies by zero shows where it arises."""
    modules = (original.module, rewritten.module)
    worst = 0.0
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_precision(module, dtype))
            stack.enter_context(evaluating(module))
        masks = stack.enter_context(_zeroed(original.module, coupling, gone))
        shared = {node.name for node in original.graph.nodes} & {node.name for node in rewritten.graph.nodes}
        found = ((node.name, value) for node, value in values_of(fx.Interpreter(rewritten.module), inputs)
                 if node.name in shared)
        for node, value in values_of(_Masked(original.module, masks), inputs):
            if node.name in shared:
                name, other = next(found)
                assert name == node.name, f"{name} and {node.name} are out of step"
                labels = coupling.flow.values[node]
                apart = difference(value, other) if node.op == "output" else _kept(value, other, labels, gone)
                worst = max(worst, apart)
    return Proof(worst, dtype or torch.float32)


def _kept(expected: Any, found: Any, labels: Any, gone: Kept) -> float:
    """The difference of two values of one node, the first on the indices that the second has kept."""
    if isinstance(labels, list) and isinstance(expected, tuple | list):
        return max((_kept(a, b, part, gone) for a, b, part in zip(expected, found, labels, strict=True)), default=0.0)
    if isinstance(labels, tuple) and isinstance(expected, Tensor):
        for place, dim in enumerate(labels):
            if dim is not None:
                kept = kept_of(dim, gone)
                if not kept.all():
                    expected = expected.index_select(place, torch.from_numpy(np.flatnonzero(kept)).to(expected.device))
    return difference(expected, found)


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
    finite = a.isfinite()
    if not bool(finite.all()):
        if not bool(((a == b) | (a.isnan() & b.isnan()) | finite).all()):
            return float("inf")
        a, b = a[finite], b[finite]
    largest = float(a.abs().max()) if a.numel() else 0.0
    error = float((a - b).abs().max()) if a.numel() else 0.0
    return float("inf") if math.isnan(error) else error / max(largest, 1e-30)


def _inputs(captured: Captured, example: Example, dtype: torch.dtype | None) -> list[Any]:
    """The example inputs in the order of the graph's placeholders, in another precision if asked for."""
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


class _Masked(fx.Interpreter):
    """Runs a graph with some inputs of some nodes zeroed along a dimension."""

    def __init__(self, module: fx.GraphModule, entries: list[tuple[Consumed, Tensor]]) -> None:
        super().__init__(module)
        self.masks: dict[fx.Node, list[tuple[Consumed, Tensor]]] = {}
        for entry, gone in entries:
            self.masks.setdefault(entry.node, []).append((entry, gone))

    def run_node(self, n: fx.Node) -> Any:
        """Run `n` on inputs of which what left is zero."""
        held = {entry.target: self.env[entry.target] for entry, _ in self.masks.get(n, ())}  # type: ignore[index]
        for entry, gone in self.masks.get(n, ()):
            self.env[entry.target] = self.env[entry.target].index_fill(entry.dim, gone, 0)  # type: ignore[index]
        result = super().run_node(n)
        self.env.update({node: value for node, value in held.items() if node in self.env})
        return result


@contextmanager
def _zeroed(module: fx.GraphModule, coupling: Coupling, gone: Kept) -> Iterator[list[tuple[Consumed, Tensor]]]:
    """The consumers' weights zeroed in `module`, and afterwards the very same data as before; gives the operands that
    have to be zeroed when they are read."""
    entries = [(entry, torch.from_numpy(np.flatnonzero((entry.labels >= 0) & gone[entry.labels])))
               for entry in coupling.flow.consumed]
    entries = [(entry, places) for entry, places in entries if len(places)]
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    saved: list[tuple[Tensor, Tensor]] = []
    for entry, places in entries:
        if isinstance(entry.target, str):
            tensor = tensors[entry.target]
            saved.append((tensor, tensor.data))
            tensor.data = tensor.data.index_fill(entry.dim, places.to(tensor.device), 0)
    try:
        yield [(entry, places) for entry, places in entries if isinstance(entry.target, fx.Node)]
    finally:
        for tensor, data in reversed(saved):
            tensor.data = data
