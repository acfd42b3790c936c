"""The proof of a removal: the smaller model equals the larger one, the consumers' weights for what left set to zero.

Both run on the example inputs, in evaluation mode (`comparing.py`). Zeroing is done where labels are contracted away:
in the weights of the layer that sums over them, or, for a product of two computed values, in one of its operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .captured import Captured, Example
from .comparing import Proof, Run, difference, inputs_of, proven, side_by_side, worst_apart
from .coupling import Coupling
from .coupling_edit import Kept, kept_of
from .coupling_flow import Consumed
from .tree import named_tensors

_REPORT = ("this is a defect of a transfer rule: please report it with the model; until then leave the layers at fault "
           "out of the selection")


def prove(original: Captured, rewritten: Captured, coupling: Coupling, gone: Kept, example: Example | None = None, *,
          double: bool = False) -> Proof:
    """Compare `rewritten` with `original`, whose `coupling` it is, its consumers' weights for the labels `gone` zeroed;
    with `double` in float64.

    A difference in float32 that float64 doesn't confirm is rounding; then the proof is the one in float64. Raises
    RewriteError (FXC0541) if the difference is real. Both models and their modes are left as they were.
    """
    def compare(dtype: torch.dtype | None) -> Proof:
        inputs = inputs_of(original, example, dtype)
        with side_by_side(original, rewritten, dtype), _zeroed(original.module, coupling, gone) as masks:
            return worst_apart(_Masked(original.module, masks, dtype), Run(rewritten.module, dtype), inputs, apart)

    def apart(node: fx.Node, expected: Any, found: Any) -> float:
        return difference(expected, found) if node.op == "output" else _kept(
            expected, found, coupling.flow.values[node], gone)

    return proven(compare, "the model without these channels differs from the model with them zeroed", _REPORT, double)


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


class _Masked(Run):
    """Runs a graph with some inputs of some nodes zeroed along a dimension."""

    def __init__(self, module: fx.GraphModule, entries: list[tuple[Consumed, Tensor]],
                 dtype: torch.dtype | None) -> None:
        super().__init__(module, dtype)
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
    tensors = named_tensors(module).all
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
