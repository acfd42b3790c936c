"""Quantized layers when training is over: refused without ranges, lowered to kernels, held against the simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..backends.int8 import Lowered
from ..diagnostics import Diagnostic, PlanError
from ..graph.calibration import Calibration
from ..graph.calibration import inputs_of as batch_of
from ..graph.captured import Captured
from ..graph.comparing import inputs_of
from ..graph.interpret import evaluating, values_of
from ..graph.ops import kind_of, module_of
from ..nn import IntConv2d, IntLinear, RoundedAttention
from ..nn.attention import rounding
from ..passes.shared.calibrating import uncalibrated, unrecovered, without_rounding
from ..passes.shared.integer import regions_of
from .measure import apart, results

# Root mean square of (kernels − simulation) over that of the simulation. Where a sum lies next to the edge between two
# integers, either side may take it, and in a deep model such differences grow to what rounding as a whole changes: so
# much is let pass where it is more.
TOLERANCE = 0.05
_STEPS = 1.5  # how far integers may lie apart from those of the simulation, in the mean, where it goes wrong


def is_quantized(captured: Captured) -> bool:
    """Whether there are quantizers in the graph."""
    return any(kind_of(node) == "quantizer" for node in captured.graph.nodes)


def require_ranges(captured: Captured) -> None:
    """Raise PlanError: FXC0572 where quantizers have no range yet, FXC0575 where layers wait for data to be recovered
    on."""
    bare = uncalibrated(captured)
    if bare:
        raise PlanError([Diagnostic(
            "FXC0572", "the model is quantized and not calibrated",
            notes=(f"without a range: {', '.join(bare[:8])}{f' and {len(bare) - 8} more' if len(bare) > 8 else ''}",),
            help="show it data, `result.calibrate(batches)`, or give `calibration=` to `compile`")])
    waiting = unrecovered(captured)
    if waiting:
        raise PlanError([Diagnostic(
            "FXC0575", "what should win accuracy back has had no calibration data",
            notes=(f"it was asked for {', '.join(waiting[:8])}"
                   f"{f' and {len(waiting) - 8} more' if len(waiting) > 8 else ''}",),
            help="show it data, `result.calibrate(batches)`, or give `calibration=` to `compile`")])


def held_against(simulated: Captured, lowered: Captured, done: Lowered, data: Calibration | None) -> list[str]:
    """Compare `lowered`, in which `done` was done, with the simulation, on the first batch of `data` or the example
    inputs. Returns what to note.

    Raises PlanError: FXC0573 where the results depart from the simulation, with the first layer that does.
    """
    inputs = batch_of(simulated, next(iter(data.batches))) if data is not None else inputs_of(simulated)
    promised = results(simulated, inputs)
    with without_rounding(simulated):
        allowed = max(TOLERANCE, apart(results(simulated, inputs), promised))
    with rounding(lowered.module):
        gap = apart(results(lowered, inputs), promised)
    if not gap <= allowed:
        raise PlanError([Diagnostic(
            "FXC0573", f"the integer kernels depart from the simulation by {gap:.1%}",
            notes=(f"up to {allowed:.1%} of the result's root mean square are let pass: {TOLERANCE:.0%}, or what "
                   "rounding itself changes", *_culprit(simulated, lowered, done, inputs)),
            help="leave that layer in float, and report it: the kernels should do what the simulation does")])
    attends = sum(isinstance(module_of(node), RoundedAttention) for node in done.kernels.values())
    count = len(done.kernels) - attends
    notes = [f"{count} layer{'s' * (count != 1)} in integer kernels, within {gap:.2g} of the simulation"]
    if attends:
        notes.append(f"{attends} attention{'s' * (attends != 1)} in float here, unrounded: {RoundedAttention.why}")
    return notes + [f"{name} stays in float: {why}" for name, why in done.left.items()]


def _culprit(simulated: Captured, lowered: Captured, done: Lowered, inputs: Sequence[Any]) -> list[str]:
    """The first kernel whose integers, read as floats, lie more than a step apart from the simulation's."""
    wanted = {str(node.name): name for name, node in done.kernels.items()}
    fused = {name for name, node in done.kernels.items() if isinstance(module_of(node), IntConv2d | IntLinear)}
    promised = _ends(simulated, fused) | {name: name for name in done.kernels if name not in fused}
    expected: dict[str, Tensor] = {}
    with evaluating(simulated.module):
        for node, value in values_of(fx.Interpreter(simulated.module), inputs):
            if node.name in promised:
                expected[promised[node.name]] = value.clone()
    with evaluating(lowered.module), rounding(lowered.module):
        for node, value in values_of(fx.Interpreter(lowered.module), inputs):
            name = wanted.get(node.name)
            if name is None or name not in expected:
                continue
            module = module_of(node)
            gives = module.after.gives if isinstance(module, IntConv2d | IntLinear) else None
            step = gives.scale if gives is not None else float(expected[name].abs().max()) / 255
            found = (value.float() - gives.zero_point) * gives.scale if gives is not None else value
            if float((found - expected[name]).abs().mean()) > _STEPS * step:
                return [f"the first to depart is {name}"]
    return []


def _ends(simulated: Captured, products: set[str]) -> dict[str, str]:
    """By the name of the node that holds what a kernel gives in the simulation, the name of its product."""
    found = {}
    nodes = [node for node in simulated.graph.nodes if node.name in products]
    for region in regions_of(nodes) if nodes else ():
        rounding = [user for user in region.end.users if kind_of(user) == "quantizer"]
        found[(rounding or [region.end])[0].name] = region.product.name
    return found

