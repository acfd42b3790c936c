"""`finalize(target="auto", data=...)`: the fastest engine that keeps what the policy expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..backends.auto import FAILURES, Contender, Deployed, Row, Table, contenders, reason_of, tensors_by_name, timed
from ..diagnostics import Diagnostic, PlanError
from ..graph.calibration import inputs_of
from ..graph.captured import Captured, Example
from ..graph.ops import kind_of
from ..graph.timing import TOLERANCE, latency
from ..policy.model import Policy
from .finish import Finished
from .integers import is_quantized
from .measure import Baseline, Measuring

Finish = Callable[[Captured, Policy], Finished]  # a captured model, finished for the CPU under a policy


@dataclass(frozen=True)
class Choice:
    """What was chosen, the finished graph it runs, and what to note."""

    deployed: Deployed
    finished: Finished
    notes: tuple[str, ...]


def choose(captured: Captured, policy: Policy, baseline: Baseline, finish: Finish,
           measuring: Callable[[Captured], Measuring], batch: object) -> Choice:
    """Finish `captured` in integers and in floats, try both by every engine on `batch`, and take the fastest that keeps
    the expectations and the budgets.

    Raises PlanError: FXC0570 for a batch that doesn't fit the model, FXC0722 where nothing is left to choose.
    """
    values = inputs_of(captured, batch)
    plain = replace(policy, budgets=tuple(budget for budget in policy.budgets if budget.metric != "latency"))
    variants = {"int8": captured.copy(), "fp32": without_rounding(captured)} if is_quantized(captured) else {
        "fp32": captured.copy()}
    found: list[Contender] = []
    finished: dict[str, Finished] = {}
    example = Example(())
    for precision, variant in variants.items():
        try:
            done = finished[precision] = finish(variant, plain)
        except FAILURES as error:
            found.append(Contender("all", precision, why=reason_of(error)))
            continue
        example = tensors_by_name(done.captured.module, values)
        tried = contenders(done.captured.module, precision, example)
        measures = measuring(done.captured)
        for contender in tried:
            contender.why = contender.why or _objection(contender, policy, baseline, measures, done.captured)
        found += tried
    ready = [contender for contender in found if contender.deployed is not None and not contender.why]
    if not ready:
        raise PlanError([Diagnostic(
            "FXC0722", "no engine runs this model as the policy expects",
            notes=tuple(f"{one.engine} {one.precision}: {one.why}" for one in found),
            help="expect less, allow more time, or install another engine: pip install 'fxcompress[export,openvino]'")])
    seconds = dict(zip(map(id, ready), timed([_there(one) for one in ready], example), strict=True))
    best = min(ready, key=lambda one: seconds[id(one)])
    table = Table(tuple(Row(one.engine, one.precision, seconds.get(id(one)), one.why, one is best) for one in found),
                  torch.get_num_threads())
    deployed = _there(best)
    deployed.table = table
    return Choice(deployed, finished[best.precision], tuple(f"auto: {line}" for line in table.show().splitlines()))


def _there(contender: Contender) -> Deployed:
    assert contender.deployed is not None
    return contender.deployed


def _objection(contender: Contender, policy: Policy, baseline: Baseline, measures: Measuring,
               captured: Captured) -> str:
    """The first expectation or budget of time that the contender doesn't keep. What doesn't hang on the engine was
    judged when the graph was finished."""
    runs = _there(contender)
    try:
        for expect in policy.expects:
            if expect.metric == "drift" and not (measured := measures.measure(expect, runs)).holds:
                return f"{measured.text} isn't kept: {measured.shown}"
        for budget in policy.budgets:
            if budget.metric == "latency":
                limit = budget.limit * baseline.latency if budget.relative else budget.limit
                if (found := latency(runs, captured.example)) > limit * (1 + TOLERANCE):
                    return f"the budget of {1e3 * limit:.3g} ms isn't met: {1e3 * found:.3g} ms"
    except FAILURES as error:
        return reason_of(error)
    return ""


def without_rounding(captured: Captured) -> Captured:
    """A copy of `captured` without its quantizers."""
    plain = captured.copy()
    for node in list(plain.graph.nodes):
        if kind_of(node) == "quantizer":
            source: Any = node.args[0]
            node.replace_all_uses_with(source)
            plain.graph.erase_node(node)
    plain.module.delete_all_unused_submodules()
    plain.refresh()
    return plain
