"""Ranges for quantizers, from a run over the calibration data; before and after it, what wins accuracy back."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxcompress.diagnostics import Diagnostic, PlanError
from fxcompress.graph.calibration import Calibration
from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import kind_of, module_of, path_of
from fxcompress.nn.observers import Observer
from fxcompress.nn.pairs import reach
from fxcompress.nn.quantizer import Quantizer
from fxcompress.passbase import OBSERVERS
from fxcompress.passes.shared.normalizing import few
from fxcompress.passes.shared.recovery import Layer, Sharing, layers_of
from fxcompress.passes.shared.recovery_bias import correct_bias
from fxcompress.passes.shared.recovery_equalize import equalize
from fxcompress.passes.shared.recovery_gptq import gptq
from fxcompress.passes.shared.recovery_mixed import LEFT, Sensitivity, leave, leave_some, switch, take_back
from fxcompress.passes.shared.recovery_patches import Product
from fxcompress.passes.shared.recovery_rounding import adaround
from fxcompress.passes.shared.recovery_smooth import smooth
from fxcompress.passes.shared.recovery_walk import SAMPLES, Sight, walk
from fxcompress.passes.shared.switching import quantizers_of as quantizers_of  # noqa: PLC0414
from fxcompress.passes.shared.switching import without_rounding as without_rounding  # noqa: PLC0414

_ROWS = 4096  # of weights whose ranges are found at a time
RECOVERED = "recovered"  # key of `node.meta`: what was asked for a layer has been done


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


def calibrate(captured: Captured, data: Calibration) -> list[str]:
    """Give every quantizer on values a range, and do for each layer what its settings ask for. Returns what to note.

    The order is fixed: `equalize` and `smooth` on the float weights, whose ranges are then found anew; the ranges
    of values, in one run with all quantizers off; `adaround` or `gptq`, and `correct_bias`, layer after layer;
    where there is `mixed`, it comes before the biases of the layers that it doesn't leave in float. Doing it again
    begins with the weights and biases that were there before the first time, unless they were trained since; the
    scales of `equalize` stay, and go on from there.

    Raises PlanError: FXC0570 for data that don't fit, FXC0571 where a quantizer has seen no finite value.
    """
    layers = layers_of(captured)
    for layer in layers:
        layer.restore()
    take_back(layers)
    moved: list[Layer] = []
    notes: list[str] = []
    for step in (equalize, smooth):
        changed, found = step(captured, layers, data)
        moved += changed
        notes += found
    for layer in {layer.node: layer for layer in moved}.values():
        cover(layer)
    _find_ranges(captured, data)
    switch(captured, layers)
    notes += _Written(captured, layers, data).run()
    for layer in layers:
        layer.node.meta[RECOVERED] = True
    return notes


def cover(layer: Layer) -> None:
    """Find the range of a weight anew."""
    cover_weight(layer.quantizer, layer.weight())


def cover_weight(quantizer: Quantizer, weight: Tensor) -> None:
    """Give `quantizer` the range of `weight`. Takes the memory of the observers of a few thousand rows at a time."""
    kind, ranges = OBSERVERS[quantizer.observer], []
    for rows in torch.split(quantizer.in_rows(weight), _ROWS):
        observer = kind(len(rows), rows.device, *quantizer.arguments)
        observer.update(rows)
        ranges.append(observer.range(quantizer.scheme))
    low, high = (torch.cat(ends) for ends in zip(*ranges, strict=True))
    if quantizer.scheme.pairs:
        furthest = reach(quantizer.outputs(weight))
        furthest = furthest.amax().expand_as(high) if len(furthest) != len(high) else furthest
        low, high = torch.minimum(low, -furthest), torch.maximum(high, furthest)
    with torch.no_grad():
        quantizer.cover(low, high)


def _find_ranges(captured: Captured, data: Calibration) -> None:
    calls = quantizers_of(captured)
    watching = {quantizer: _Watching(quantizer, observer_of(quantizer)) for quantizer in calls.values()}
    collectors: dict[fx.Node, list[_Watching]] = {}
    for node, quantizer in calls.items():
        source = node.args[0]
        assert isinstance(source, fx.Node)
        collectors.setdefault(source, []).append(watching[quantizer])
    if not collectors:
        return
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


@dataclass
class _Written:
    """The steps that write weights and biases, on one model; `skipped` has names of layers by what can't be done."""

    captured: Captured
    layers: Sequence[Layer]
    data: Calibration
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def run(self) -> list[str]:
        rounding, biased = self.able()
        scans = any(layer.asked.mixed for layer in self.layers)
        self.walk(rounding, [] if scans else biased)
        left, notes = leave_some(self.captured, self.layers, self.data)
        for layer in left:
            layer.restore()
        if scans:  # what rounding shifts depends on which layers round
            biased = [layer for layer in biased if layer not in left]
            self.walk([], biased)
        return [*self._said(rounding, biased), *notes]

    def walk(self, rounding: Sequence[Layer], biased: Sequence[Layer]) -> None:
        """Write the weights of some layers and the biases of some, in graph order."""
        walk(self.captured, self.data, [layer for layer in self.layers if layer in rounding or layer in biased],
             lambda layer, sight: self._at(layer, sight, rounding, biased))

    def able(self) -> tuple[list[Layer], list[Layer]]:
        """The layers whose weights, and whose biases, are to be written and can be."""
        sharing = Sharing(self.captured)
        rounding: list[Layer] = []
        biased: list[Layer] = []
        for layer in self.layers:
            if layer.asked.adaround or layer.asked.gptq:
                key = "adaround" if layer.asked.adaround else "gptq"
                why = sharing.why_not(layer)
                if why is None and Product.of(layer) is None:
                    why = "it isn't a conv2d or linear layer"
                self._sort(layer, key, why, rounding)
            if layer.asked.correct_bias:
                why = "it has no bias" if layer.tensor("bias") is None else sharing.why_not(layer, ("bias",))
                self._sort(layer, "correct_bias", why, biased)
        return rounding, biased

    def _sort(self, layer: Layer, key: str, why: str | None, able: list[Layer]) -> None:
        if why is None:
            able.append(layer)
        else:
            self.skipped.setdefault(f"{key}: not {{}}: {why}", []).append(layer.name)

    def _at(self, layer: Layer, sight: Sight, rounding: Sequence[Layer], biased: Sequence[Layer]) -> None:
        if layer in rounding:
            before, after = (adaround if layer.asked.adaround else gptq)(layer, sight)
            self.before.append(before)
            self.after.append(after)
        if layer in biased:
            correct_bias(layer, sight)

    def _said(self, rounding: Sequence[Layer], biased: Sequence[Layer]) -> list[str]:
        notes = [line.format(few(names)) for line, names in self.skipped.items()]
        if rounding:
            ratios = sorted(after / before for before, after in zip(self.before, self.after, strict=True) if before > 0)
            middle = f", which leaves {ratios[len(ratios) // 2]:.0%} of the squared error (median)" if ratios else ""
            notes.append(f"rounding of {len(rounding)} layers on up to {SAMPLES} samples{middle}")
        if biased:
            notes.append(f"correct_bias: {len(biased)} layers")
        return notes


def leave_in_float(captured: Captured, names: Container[str], data: Calibration | None) -> list[Sensitivity]:
    """Leave the layers of the nodes with these names in float, as they were before rounding, and correct the biases of
    the others anew on `data`: what rounding shifts depends on which layers round. Returns what the scan had found."""
    rows, layers = leave(captured, names), layers_of(captured)
    if data is not None and any(layer.asked.correct_bias for layer in layers):
        for layer in layers:
            layer.restore_bias()
        written = _Written(captured, layers, data)
        _, biased = written.able()
        written.walk([], [layer for layer in biased if LEFT not in layer.node.meta])
    return rows


def uncalibrated(captured: Captured) -> list[str]:
    """Where the quantizers without a range stand; layers that `mixed` leaves in float need none."""
    return [path_of(node) or node.name for node in captured.graph.nodes
            if kind_of(node) == "quantizer" and not getattr(module_of(node), "on", True) and LEFT not in node.meta]


def unrecovered(captured: Captured) -> list[str]:
    """Layers that were to win accuracy back on calibration data, and have seen none."""
    return [layer.name for layer in layers_of(captured) if layer.asked and RECOVERED not in layer.node.meta]
