"""`finalize(target="cuda")`: the graph lowered for a GPU, checked on fake tensors, held against the simulation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..backends.cuda import Gpu, OnCuda, lower
from ..backends.half import check_on
from ..diagnostics import Diagnostic, PlanError
from ..graph.calibration import Calibration
from ..graph.calibration import inputs_of as batch_of
from ..graph.captured import Captured, Origin
from ..graph.comparing import inputs_of
from ..graph.interpret import evaluating, values_of
from ..graph.provenance import origins_of
from ..graph.verify import Before, verify
from ..passes.shared.calibrating import without_rounding
from .measure import apart, results

# Root mean square of (GPU − simulation) over that of the simulation. Layers without an integer kernel no longer round
# what they read, and those with one round float16: either may change as much as rounding itself does.
TOLERANCE = 0.05
_ORIGIN = Origin("finalize", "python", 'result.finalize("cuda")', "(end)", "computes in half precision or int8")


@dataclass(frozen=True)
class OnFakes:
    """What would run on a GPU, its tensors where they were: the graph, and what there is to say of it."""

    captured: Captured
    notes: tuple[str, ...]


def put_on_gpu(captured: Captured, data: Calibration | None, gpu: Gpu | None = None) -> list[str]:
    """Lower `captured`, in evaluation mode and without masks, for the GPU of this machine, on which its tensors are, in
    place and verified; returns what to note.

    Raises PlanError: FXC0580 where an operator can't be computed there, FXC0581 for weights out of float16's range,
    FXC0582 where the results depart from those before, on the first batch of `data` or on the example inputs.
    """
    simulated = captured.copy()
    done = lower_and_verify(captured, gpu or Gpu.here())
    return _held_against(simulated, captured, data) + _notes(done)


def on_fakes(captured: Captured, gpu: Gpu | None = None) -> OnFakes:
    """`captured`, in evaluation mode and without masks, lowered for a GPU that need not be there: a copy, every node of
    which was computed on fake tensors of the device. Raises PlanError as `put_on_gpu` does, save FXC0582."""
    made = captured.copy()
    done = lower_and_verify(made, gpu or Gpu())
    return OnFakes(made, tuple(_notes(done)))


def lower_and_verify(captured: Captured, gpu: Gpu) -> OnCuda:
    """Lower in place, and check: the invariants of every rewrite, and each node on fake tensors of the GPU, where the
    results must have the shapes and dtypes that they had. Raises PlanError (FXC0580, FXC0581), RewriteError."""
    before, done = Before.of(captured), OnCuda()
    there = {node: (node.op, node.target) for node in captured.graph.nodes}
    lower(captured, done, gpu)
    for node in captured.graph.nodes:
        if there.get(node) != (node.op, node.target) or node in done.changed:
            node.meta["origins"] = (*origins_of(node), _ORIGIN)
    captured.refresh()
    verify(captured, before)
    check_on(captured, gpu.device)
    return done


def _notes(done: OnCuda) -> list[str]:
    count = len(done.kernels)
    first = f"{count} layer{'s' * (count != 1)} in kernels for CUDA, the rest in half precision"
    return [first, *done.notes, *(f"{name} computes in half precision: {why}" for name, why in done.left.items())]


def _held_against(simulated: Captured, lowered: Captured, data: Calibration | None) -> list[str]:
    inputs = batch_of(simulated, next(iter(data.batches))) if data is not None else inputs_of(simulated)
    inputs = [_to(value, lowered) for value in inputs]
    promised = results(simulated, inputs)
    with without_rounding(simulated):
        allowed = max(TOLERANCE, 2 * apart(results(simulated, inputs), promised))
    gap = apart(results(lowered, inputs), promised)
    if not gap <= allowed:
        raise PlanError([Diagnostic(
            "FXC0582", f"on the GPU the model departs from what it was by {gap:.1%}",
            notes=(f"up to {allowed:.1%} of the result's root mean square are let pass: {TOLERANCE:.0%}, or twice what "
                   "rounding itself changes", *_first(simulated, lowered, inputs, allowed)),
            help='numbers there may leave the range of half precision; `finalize(target="cpu")` has that of float32')])
    return [f"within {gap:.2g} of the simulation"]


def _to(value: Any, captured: Captured) -> Any:
    device = next((tensor.device for tensor in captured.module.parameters()), torch.device("cpu"))
    return value.to(device) if isinstance(value, Tensor) else value


def _first(simulated: Captured, lowered: Captured, inputs: Sequence[Any], allowed: float) -> Iterator[str]:
    """The first node of both graphs whose values lie apart by more than `allowed`."""
    names = {node.name for node in lowered.graph.nodes} & {node.name for node in simulated.graph.nodes}
    expected: dict[str, Tensor] = {}
    with evaluating(simulated.module):
        for node, value in values_of(fx.Interpreter(simulated.module), inputs):
            if node.name in names and node.op.startswith("call_") and isinstance(value, Tensor):
                expected[node.name] = value.to("cpu", copy=True)
    with evaluating(lowered.module):
        for node, value in values_of(fx.Interpreter(lowered.module), inputs):
            if node.name in expected and apart([value.cpu()], [expected[node.name]]) > allowed:
                yield f"the first to depart is {node.name}"
                return
