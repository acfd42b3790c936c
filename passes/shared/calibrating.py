"""Ranges for quantizers: what they read is shown to observers, in one run over the calibration data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxcompress.diagnostics import Diagnostic, PlanError
from fxcompress.graph.calibration import Calibration
from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import kind_of, module_of, path_of
from fxcompress.nn.observers import Observer
from fxcompress.nn.quantizer import Quantizer
from fxcompress.passbase import OBSERVERS
from fxcompress.passes.shared.weights import of_parameters


@dataclass
class _Watching:
    """Shows the value of a node to the observer of the quantizer that reads it."""

    quantizer: Quantizer
    observer: Observer

    def see(self, value: Tensor) -> None:
        self.observer.update(self.quantizer.in_rows(value))


def observer_of(quantizer: Quantizer) -> Observer:
    """A fresh observer of the kind that `quantizer` names."""
    made: Observer = OBSERVERS[quantizer.observer](quantizer.rows, quantizer.scale.device, *quantizer.arguments)
    return made


def quantizers_of(captured: Captured) -> dict[fx.Node, Quantizer]:
    """The calls of quantizers on values, those on weights left out."""
    return {node: module for node in captured.graph.nodes if kind_of(node) == "quantizer"
            and isinstance(module := module_of(node), Quantizer) and module.axis is None
            and not of_parameters(node.args[0])}


@contextmanager
def without_rounding(captured: Captured) -> Iterator[None]:
    """All quantizers off, and afterwards as they were."""
    quantizers = [module for module in captured.module.modules() if isinstance(module, Quantizer)]
    was = [module.on for module in quantizers]
    for module in quantizers:
        module.on = False
    try:
        yield
    finally:
        for module, on in zip(quantizers, was, strict=True):
            module.on = on


def calibrate(captured: Captured, data: Calibration) -> None:
    """Give every quantizer on values a range, in one run of the model with all quantizers off.

    Raises PlanError: FXC0570 for data that don't fit, FXC0571 where a quantizer has seen no finite value.
    """
    calls = quantizers_of(captured)
    watching = {quantizer: _Watching(quantizer, observer_of(quantizer)) for quantizer in calls.values()}
    collectors: dict[fx.Node, list[_Watching]] = {}
    for node, quantizer in calls.items():
        source = node.args[0]
        assert isinstance(source, fx.Node)
        collectors.setdefault(source, []).append(watching[quantizer])
    with without_rounding(captured):
        data.feed(captured, collectors)
    blind = [path_of(node) or node.name for node, quantizer in calls.items() if not watching[quantizer].observer.seen]
    if blind:
        raise PlanError([Diagnostic(
            "FXC0571", "the calibration data show no number to some quantizers",
            notes=(f"without a range: {', '.join(blind[:8])}{' ...' if len(blind) > 8 else ''}",),
            help="look for values that aren't finite")])
    with torch.no_grad():
        for quantizer, watched in watching.items():
            quantizer.cover(*watched.observer.range(quantizer.scheme))


def uncalibrated(captured: Captured) -> list[str]:
    """Where the quantizers without a range stand."""
    return [path_of(node) or node.name for node in captured.graph.nodes
            if kind_of(node) == "quantizer" and not getattr(module_of(node), "on", True)]
