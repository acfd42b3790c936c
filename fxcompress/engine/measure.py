"""`expect`: what a policy wants of the result, measured on it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..diagnostics import Diagnostic, Label
from ..graph.captured import Captured, Example
from ..graph.interpret import evaluating
from ..graph.ops import parameter_names
from ..graph.select import Bound, Lets, select
from ..graph.timing import latency
from ..plan.model import Totals
from ..plan.totals import totals_of
from ..policy.model import Expect, Policy

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_TOTALS: Mapping[str, Callable[[Totals], int]] = {
    "macs": lambda totals: totals.macs, "params": lambda totals: totals.params, "size": lambda totals: totals.bytes}
_SHARES = ("drift", "sparsity")  # metrics shown in percent


@dataclass(frozen=True)
class Measured:
    """One `expect` and what came of it."""

    metric: str
    text: str
    value: float
    holds: bool

    @property
    def shown(self) -> str:
        """The value as a reader wants it: percent, or a count."""
        return f"{100 * self.value:.3g}%" if self.metric in _SHARES else f"{self.value:,.0f}"


@dataclass
class Baseline:
    """What is kept of the model as it came, for the expectations of one policy; nothing that none of them needs."""

    totals: Totals
    latency: float = 0.0  # seconds of one forward pass of the example
    outputs: list[Tensor] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, captured: Captured, policy: Policy) -> Baseline:
        """Of `captured` before any pass."""
        metrics = {expect.metric for expect in policy.expects}
        kept = cls(totals_of(captured))
        if any(budget.metric == "latency" and budget.relative for budget in policy.budgets):
            kept.latency = latency(captured.module, captured.example)
        if "drift" in metrics:
            kept.outputs = outputs(captured.module, captured.example)
        if "unchanged" in metrics:
            kept.weights = {name: value.detach().clone() for name, value in captured.module.state_dict().items()}
        return kept


def outputs(module: nn.Module, example: Example) -> list[Tensor]:
    """The floating-point outputs of `module` on the example inputs, in evaluation mode, as float64 on the CPU."""
    with evaluating(module):
        result = module(*example.args, **example.kwargs)
    return [tensor.detach().to("cpu", torch.float64) for tensor in tensors_in(result) if tensor.is_floating_point()]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def results(captured: Captured, inputs: Sequence[Any]) -> list[Tensor]:
    """All float tensors that `captured` gives for `inputs`, in evaluation mode."""
    with evaluating(captured.module):
        return [tensor for tensor in tensors_in(captured.module(*inputs)) if tensor.is_floating_point()]


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖found − expected‖₂ / ‖expected‖₂ over all tensors, in float64; ‖found‖₂ where nothing else was expected than
    zeros. NaN where values aren't numbers, unlike `drift`."""
    moved = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    size = sum(float(b.double().square().sum()) for b in expected)
    return math.sqrt(moved / size) if size else math.sqrt(moved)


def drift(before: list[Tensor], after: list[Tensor]) -> float:
    """The relative distance of all outputs together, ‖after − before‖₂ / ‖before‖₂; infinite where shapes differ or a
    value isn't finite."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return math.inf
    moved = math.sqrt(sum(float((b - a).square().sum()) for a, b in zip(before, after, strict=True)))
    size = math.sqrt(sum(float(tensor.square().sum()) for tensor in before))
    if not math.isfinite(moved) or not size:
        return 0.0 if moved == 0 else math.inf
    return moved / size


def sparsity(captured: Captured, nodes: tuple[fx.Node, ...] | None) -> float:
    """The share of exact zeros in the weights of `nodes`, of all parameters for None. Weights are parameters of two
    dimensions or more; biases and norms don't count."""
    names = {name for node in nodes or captured.graph.nodes for name in parameter_names(node).values()}
    weights = {id(p): p for name, p in captured.module.named_parameters(remove_duplicate=False)
               if name in names and p.dim() > 1}
    total = sum(p.numel() for p in weights.values())
    return sum(p.numel() - int(p.count_nonzero()) for p in weights.values()) / total if total else 0.0


class Measuring:
    """Measures expectations on `captured`, a finished result; `lets` are the policy's, bound before any rewrite."""

    def __init__(self, captured: Captured, baseline: Baseline, lets: Mapping[str, Bound]) -> None:
        """Takes over the names of `lets`: the result's nodes have them too."""
        self.captured, self.baseline = captured, baseline
        self.lets: Lets = {name: Bound(captured.nodes_named(node.name for node in let.nodes), let.selector)
                           for name, let in lets.items()}

    def measure(self, expect: Expect, runs: nn.Module | None = None) -> Measured:
        """What `expect` comes to; `runs` is what the model is run by, by default its own module. Raises PolicyError
        where its selector selects nothing (but for `count`)."""
        value = self._value(expect, runs or self.captured.module)
        if expect.op is None or expect.limit is None:
            return Measured(expect.metric, statement(expect), value, value == 0)
        scale = _TOTALS[expect.metric](self.baseline.totals) if expect.relative else 1.0
        return Measured(expect.metric, statement(expect), value, _COMPARE[expect.op](value, expect.limit * scale))

    def _value(self, expect: Expect, runs: nn.Module) -> float:
        if expect.metric in _TOTALS:
            return float(_TOTALS[expect.metric](totals_of(self.captured)))
        if expect.metric == "drift":
            return drift(self.baseline.outputs, outputs(runs, self.captured.example))
        nodes = None
        if expect.argument is not None and expect.argument != "output":
            nodes = select(self.captured, expect.argument, self.lets, optional=expect.metric == "count")
        if expect.metric == "sparsity":
            return sparsity(self.captured, nodes)
        assert nodes is not None, f"the language gives `{expect.metric}` a selector"
        return float(len(nodes)) if expect.metric == "count" else float(self._changed(nodes))

    def _changed(self, nodes: tuple[fx.Node, ...]) -> int:
        """How many parameters and buffers of `nodes` aren't what they were, to the bit."""
        now, was = self.captured.module.state_dict(), self.baseline.weights
        names = {name for node in nodes for name in parameter_names(node).values() if name in now}
        return sum(name not in was or not torch.equal(was[name].cpu(), now[name].cpu()) for name in names)


def statement(expect: Expect) -> str:
    """What is expected, on one line."""
    return " ".join(expect.span.text.split())


def failure(expect: Expect, measured: Measured) -> Diagnostic:
    """The diagnostic (FXC0530) of an expectation that doesn't hold."""
    what = f"{measured.shown} parameters changed" if expect.op is None else f"{expect.metric} is {measured.shown}"
    return Diagnostic("FXC0530", f"the result is not as expected: {what}", Label(expect.span, "expected here"),
                      notes=(expect.why,) if expect.why else (),
                      help="train for longer, ask less of the actions before it, or expect less")
