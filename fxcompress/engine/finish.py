"""What is left when training is over: masks folded into the weights, expectations measured, budgets judged again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from ..backends.floats import lower_floats
from ..backends.int8 import Lowered, lower
from ..diagnostics import Diagnostic, PlanError, Sink
from ..graph.calibration import Calibration
from ..graph.captured import Captured, Example, Origin
from ..graph.distilled import distillations
from ..graph.provenance import origins_of
from ..graph.select import Bound
from ..graph.timing import TOLERANCE, latency
from ..graph.verify import Before, verify
from ..passes.shared.distilling import remove_distillation
from ..passes.shared.inference import bake_evaluation
from ..passes.shared.masking import remove_masks
from ..passes.shared.recovery_mixed import drop_left
from ..passes.shared.training_rounds import fold_training
from ..plan.budgets import judge
from ..plan.model import Totals
from ..plan.totals import totals_of
from ..policy.model import Policy
from .gpu import put_on_gpu
from .integers import held_against, is_quantized, require_ranges
from .measure import Baseline, Measured, Measuring, failure
from .mixing import keep_expectations
from .quantization import measure as measure_quantization
from .quantization_rows import Quantization


@dataclass(frozen=True)
class Finished:
    """A result, and what was measured on it."""

    captured: Captured
    totals: Totals
    measured: tuple[Measured, ...]
    notes: tuple[str, ...] = ()
    quantization: Quantization | None = None


def take_masks_off(captured: Captured, *, fold: bool) -> None:
    """Remove every mask from `captured`, in place and verified: into the weights (`fold`), or leaving them dense."""
    verb = "finalize" if fold else "lift"
    detail = "the mask became zeros in the weight" if fold else "the mask was taken off"
    _rewritten(captured, partial(remove_masks, fold=fold), Origin(verb, "python", f"result.{verb}()", "(end)", detail))


def take_teacher_out(captured: Captured, call: fx.Node) -> None:
    """Remove what a distillation put in: teacher, adapters and terms, in place and verified."""
    _rewritten(captured, partial(remove_distillation, call=call),
               Origin("strip", "python", "result.strip()", "(end)", "learns no more"))


def take_training_off(captured: Captured) -> None:
    """Remove what only acts in training (dropout, stochastic depth, switches of the mode), in place and verified."""
    _rewritten(captured, bake_evaluation,
               Origin("finalize", "python", "result.finalize()", "(end)", "reads past a dropout"))


def take_norms_in(captured: Captured) -> None:
    """Fold the batch norms that quantizers counted in while they trained, in place and verified."""
    _rewritten(captured, fold_training,
               Origin("finalize", "python", "result.finalize()", "(end)", "rounds with the range that training left"))


def leave_in_float(captured: Captured) -> None:
    """Take out the quantizers of layers that stay in float (`mixed`), in place and verified."""
    _rewritten(captured, drop_left, Origin("finalize", "python", "result.finalize()", "(end)", "stays in float"))


def _rewritten(captured: Captured, rewrite: Callable[[Captured], Iterable[fx.Node]], origin: Origin) -> None:
    """Rewrite `captured` and verify it; the nodes that `rewrite` gives came to be by `origin`."""
    before = Before.of(captured)
    for node in rewrite(captured):
        node.meta["origins"] = (*origins_of(node), origin)
    captured.refresh()
    verify(captured, before)


def put_integers_in(captured: Captured, data: Calibration | None) -> tuple[list[str], Quantization]:
    """Replace what is quantized by integer kernels, in place and verified; returns what to note and what was measured.
    Raises PlanError (FXC0573)."""
    simulated, done = captured.copy(), Lowered()

    def rewrite(captured: Captured) -> Iterable[fx.Node]:
        there = set(captured.graph.nodes)
        lower(captured, done)
        return [node for node in captured.graph.nodes if node not in there]

    _rewritten(captured, rewrite, Origin("finalize", "python", "result.finalize()", "(end)", "computes in integers"))
    notes = held_against(simulated, captured, done, data)
    return notes, measure_quantization(simulated, captured, done, data)


def pack_floats(captured: Captured) -> None:
    """Fold norms and pack what stays in float for the CPU, in place and verified."""
    _rewritten(captured, lower_floats, Origin("finalize", "python", "result.finalize()", "(end)", "packed for the CPU"))


def finish(captured: Captured, policy: Policy, baseline: Baseline, lets: Mapping[str, Bound], target: str,
           data: Calibration | None = None, pack: bool | None = None) -> Finished:
    """A copy of `captured` for `target` with nothing left of training, in evaluation mode. `data` are what integer
    kernels are held against the simulation on.

    Raises PlanError: FXC0530 for expectations that don't hold, FXC0320 and FXC0531 for budgets that aren't met,
    FXC0572 for quantized layers that weren't calibrated, FXC0573 for kernels that depart from the simulation; FXC0580
    to FXC0582 on a GPU, see `put_on_gpu`.
    """
    require_ranges(captured)
    final = captured.copy()
    for call in distillations(final.graph):
        take_teacher_out(final, call)
    take_masks_off(final, fold=True)
    take_training_off(final)
    take_norms_in(final)
    notes = keep_expectations(final, policy, baseline, lets, data)
    leave_in_float(final)
    final.module.zero_grad(set_to_none=True)
    final.module.eval()
    final = replace(final, module=final.module.to(target), example=_moved(final.example, target))
    quantized, quantization = is_quantized(final), None
    if target == "cuda":
        notes += put_on_gpu(final, data)
    elif quantized:
        lowered, quantization = put_integers_in(final, data)
        notes += lowered
    sink = Sink()
    measuring = Measuring(final, baseline, lets)
    measured = tuple(measuring.measure(expect) for expect in policy.expects)
    sink.items += [failure(expect, found) for expect, found in zip(policy.expects, measured, strict=True)
                   if not found.holds]
    counted = totals_of(final)
    if target == "cpu" and (quantized if pack is None else pack):
        pack_floats(final)
    _judge_budgets(policy, baseline, counted, final, sink)
    sink.raise_if_errors(PlanError)
    return Finished(final, totals_of(final), measured, tuple(notes), quantization)


def device_for(target: str) -> str:
    """The torch device of `target`. Raises PlanError (FXC0527) where this machine has none, or for another word."""
    if target == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if target not in ("cpu", "cuda"):
        raise PlanError([Diagnostic("FXC0527", f"unknown target `{target}`", help="use `cpu`, `cuda` or `auto`")])
    if target == "cuda" and not torch.cuda.is_available():
        raise PlanError([Diagnostic("FXC0527", "the target is `cuda`, but torch sees no GPU here",
                                    help='finalize on a machine with one, or `finalize(target="cpu")`')])
    return target


def _moved(example: Example, device: str) -> Example:
    def move(value: object) -> object:
        if isinstance(value, tuple | list):
            return type(value)(move(item) for item in value)
        return value.to(device) if isinstance(value, Tensor) else value

    return Example(tuple(map(move, example.args)), {name: move(value) for name, value in example.kwargs.items()})


def _judge_budgets(policy: Policy, baseline: Baseline, totals: Totals, final: Captured, sink: Sink) -> None:
    """Budgets once more, now that sizes which depended on weights are known and time can be measured."""
    for budget in policy.budgets:
        if budget.metric == "latency":
            limit = budget.limit * baseline.latency if budget.relative else budget.limit
            found = latency(final.module, final.example)
            if found > limit * (1 + TOLERANCE):
                sink.error("FXC0531", f"the budget is not met: one forward takes {1e3 * found:.3g} ms", budget.span,
                           f"the limit is {1e3 * limit:.3g} ms", notes=(
                               f"up to {TOLERANCE:.0%} more would do, for timings differ by that much",),
                           help="remove more, or allow more time; `finalize` measures the example batch on this "
                                "machine, with torch's number of threads")
            continue
        refusal = judge(budget, baseline.totals, totals)[1]
        if refusal is not None:
            sink.items.append(replace(refusal, help="remove more, or raise the budget"))
