"""`mixed`: which layers cost the most when they are rounded, and leaving those in float.

A scan: from the float model, one layer at a time is rounded (its weight, and what it reads), and the signal-to-noise
ratio of what the model gives is measured: SQNR = 10·log₁₀(Σy² / Σ(ŷ − y)²). Only what comes after the layer is computed
again. Layers with the most noise for each multiply-accumulate stay in float, as many as the share of these allows.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxcompress.graph.calibration import Calibration
from fxcompress.graph.captured import Captured
from fxcompress.graph.interpret import evaluating, values_of
from fxcompress.graph.ops import kind_of, module_of
from fxcompress.nn.quantizer import Quantizer
from fxcompress.passes.shared.attention import attends
from fxcompress.passes.shared.integer import averages, data_of, role_of
from fxcompress.passes.shared.recovery import UNROUNDED, Layer, layers_of, spread
from fxcompress.passes.shared.recovery_bias import channels, mean_shift
from fxcompress.passes.shared.recovery_walk import some_inputs
from fxcompress.passes.shared.switching import quantizers_of, without_rounding
from fxcompress.passes.shared.weights import absorb

SAMPLES, _AT_ONCE = 8, 4  # of the calibration data: all, and that a scan holds every value of
LEFT, SENSITIVITY = "left", "sensitivity"  # keys of `node.meta`: why a layer stays in float; what the scan found
_LEAST = 1e-3  # of the noise of all layers: one that makes less isn't worth being in float
_SHOWN = 12  # lines of the table in the notes


@dataclass(frozen=True)
class Sensitivity:
    """What rounding one layer alone does to the model: `sqnr` of all that the model gives, in dB; `macs` are the
    layer's share of those of all quantized layers; `left` says whether it stays in float."""

    path: str
    kind: str
    macs: float
    sqnr: float
    left: bool = False

    @property
    def noise(self) -> float:
        """Noise power over signal power."""
        return 10 ** (-self.sqnr / 10)


def leave_some(captured: Captured, layers: Sequence[Layer], data: Calibration) -> tuple[list[Layer], list[str]]:
    """Scan the layers that ask for it, and leave in float what the asked share allows. Returns the layers left, and the
    table as notes."""
    left: list[Layer] = []
    notes: list[str] = []
    for share in dict.fromkeys(layer.asked.mixed for layer in layers if layer.asked.mixed):
        group = [layer for layer in layers if layer.asked.mixed == share]
        rows = scan(captured, group, data)
        chosen = choose(list(rows.values()), share) if isinstance(share, float) else set()
        for layer, row in rows.items():
            layer.node.meta[SENSITIVITY] = row
            if row.path in chosen:
                rows[layer] = _leave(layer)
                left.append(layer)
        notes += table(list(rows.values()), f"up to {share:.1%}" if isinstance(share, float) else "more at the end, "
                       "where the policy's expectations need it")
    switch(captured, layers)
    return left, notes


def _leave(layer: Layer) -> Sensitivity:
    row: Sensitivity = replace(layer.node.meta[SENSITIVITY], left=True)
    layer.node.meta[SENSITIVITY] = row
    layer.node.meta[LEFT] = f"rounding it alone gives {row.sqnr:.1f} dB, {row.macs:.1%} of the MACs"
    return row


def waiting(captured: Captured) -> list[str]:
    """The names of the nodes of layers that may be left in float as expectations need it, in the order to do so."""
    layers = [layer for layer in layers_of(captured) if layer.asked.mixed == "auto" and SENSITIVITY in layer.node.meta]
    return [layer.node.name for layer in sorted(layers, key=lambda layer: _weight(layer.node.meta[SENSITIVITY]))]


def leave(captured: Captured, names: Container[str]) -> list[Sensitivity]:
    """Leave the layers of the nodes with these names in float, their weights and biases as they were before rounding;
    returns what the scan had found of them."""
    layers = layers_of(captured)
    chosen = [layer for layer in layers if layer.node.name in names]
    for layer in chosen:
        layer.restore()
    rows = [_leave(layer) for layer in chosen]
    switch(captured, layers)
    return rows


def _weight(row: Sensitivity) -> float:
    """What layers to leave are sorted by: the noise for each multiply-accumulate, the most first."""
    return -row.noise / max(row.macs, 1e-12)


def choose(rows: Sequence[Sensitivity], share: float) -> set[str]:
    """The paths to leave in float: by noise for each multiply-accumulate, as long as the share of these allows, but
    none that makes next to none of the noise."""
    chosen: set[str] = set()
    least = _LEAST * sum(row.noise for row in rows)
    for row in sorted(rows, key=_weight):
        if row.noise > least and row.macs <= share + 1e-9:
            share -= row.macs
            chosen.add(row.path)
    return chosen


def table(rows: Sequence[Sensitivity], limit: str) -> list[str]:
    """The lines of the notes: the layers with the most noise first."""
    left = [row for row in rows if row.left]
    lines = [f"mixed: {len(left)} of {len(rows)} layers stay in float, {sum(row.macs for row in left):.1%} of the MACs "
             f"({limit}); SQNR of what the model gives with one layer rounded:"]
    ordered = sorted(rows, key=lambda row: row.sqnr)
    lines += [f"  {row.sqnr:5.1f} dB  {row.macs:6.1%} of the MACs  {'float' if row.left else 'int  '}  {row.path}"
              for row in ordered[:_SHOWN]]
    if len(ordered) > _SHOWN:
        lines.append(f"  and {len(ordered) - _SHOWN} layers from {ordered[_SHOWN].sqnr:.1f} dB")
    return lines


def scan(captured: Captured, layers: Sequence[Layer], data: Calibration) -> dict[Layer, Sensitivity]:
    """The sensitivity of each of `layers`, on the first `SAMPLES` samples of `data`.

    Raises PlanError (FXC0570) for a batch that doesn't fit.
    """
    noise, signal = dict.fromkeys(range(len(layers)), 0.0), 0.0
    with evaluating(captured.module), without_rounding(captured), _as_they_were(layers_of(captured)) as written:
        for inputs in _few(some_inputs(captured, data, SAMPLES), captured.fixed_batch):
            run = _Run(captured, inputs)
            signal += sum(float(value.double().square().sum()) for value in run.given)
            for number, layer in enumerate(layers):
                with _as_written(layer, written):
                    noise[number] += run.noise(layer)
    macs = [layer.node.meta["fxc"].macs for layer in layers]
    return {layer: Sensitivity(layer.name, kind_of(layer.node), count / max(1, sum(macs)),
                               10 * math.log10(max(signal, 1e-30) / max(noise[number], 1e-30)))
            for number, (layer, count) in enumerate(zip(layers, macs, strict=True))}


@contextmanager
def _as_they_were(layers: Sequence[Layer]) -> Iterator[Mapping[str, tuple[Tensor, Tensor]]]:
    """The weights that were rounded by a recovery step are what they were before it, and afterwards what they are now:
    gives both, by the layer's node."""
    both: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        kept, weight = layer.node.meta.get(UNROUNDED), layer.tensor("weight")
        if kept is not None and kept.weight is not None and weight is not None:
            both[layer.node.name] = kept.weight, weight.detach().clone()
            _set(layer, kept.weight)
    try:
        yield both
    finally:
        for layer in layers:
            if layer.node.name in both:
                _set(layer, both[layer.node.name][1])


@contextmanager
def _as_written(layer: Layer, written: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """The weight of this layer alone is what the recovery step wrote."""
    if layer.node.name not in written:
        yield
        return
    was, now = written[layer.node.name]
    _set(layer, now)
    try:
        yield
    finally:
        _set(layer, was)


def _set(layer: Layer, value: Tensor) -> None:
    weight = layer.tensor("weight")
    assert weight is not None
    with torch.no_grad():
        weight.copy_(value)


def _few(batches: Iterable[list[Any]], fixed: str) -> Iterable[list[Any]]:
    """The batches, cut where they are large: a scan keeps every value."""
    for inputs in batches:
        size = max((value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim()), default=1)
        if fixed or size <= _AT_ONCE:
            yield inputs
            continue
        for first in range(0, size, _AT_ONCE):
            yield [value[first:first + _AT_ONCE] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size
                   else value for value in inputs]


_Env = Mapping[fx.Node, Any]


class _Run:
    """Every value of the float model for one batch."""

    def __init__(self, captured: Captured, inputs: list[Any]) -> None:
        self.nodes = list(captured.graph.nodes)
        self.run = fx.Interpreter(captured.module)
        self.values = {node: value.clone() if isinstance(value, Tensor) and node.op == "placeholder" else value
                       for node, value in values_of(self.run, inputs)}
        self.output = next(node for node in reversed(self.nodes) if node.op == "output")
        self.given = _floats(self.values[self.output])

    def noise(self, layer: Layer) -> float:
        """Σ(ŷ − y)² with `layer` alone rounded; where biases are to be corrected, with its own corrected for that."""
        given = self._after({layer.call, *_sources(layer.data)}, layer.node)[layer.node]
        if layer.asked.correct_bias:
            expected = self._after(set(), layer.node)[layer.node]
            shift = mean_shift(layer, [given], [expected])
            given = given - spread(shift, channels(layer), given).to(given.dtype)
        found = self._after({layer.node}, self.output, {layer.node: given})[self.output]
        return sum(float((a.double() - b.double()).square().sum())
                   for a, b in zip(_floats(found), self.given, strict=True))

    def _after(self, changed: set[fx.Node], end: fx.Node, given: Mapping[fx.Node, Any] | None = None) -> _Env:
        """The values up to `end`, which is computed in any case, with those that come after `changed` computed anew:
        what quantizers in it give, rounded, or what is `given`."""
        env: ChainMap[fx.Node, Any] = ChainMap(dict(given or {}), self.values)
        self.run.env = env  # type: ignore[assignment]
        dirty = set(given or ())
        for node in self.nodes[:self.nodes.index(end) + 1]:
            if node in dirty or not (node in changed or node is end or any(
                    source in dirty for source in node.all_input_nodes)):
                continue
            with _rounding(node, node in changed):
                env[node] = self.run.run_node(node)
            dirty.add(node)
        return env


@contextmanager
def _rounding(node: fx.Node, on: bool) -> Iterator[None]:
    """A quantizer, which is off otherwise, on."""
    module: Any = module_of(node) if on else None
    if module is not None:
        module.on = True
    try:
        yield
    finally:
        if module is not None:
            module.on = False


def _floats(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def switch(captured: Captured, layers: Sequence[Layer]) -> None:
    """Quantizers on the weights of layers that are left in float round nothing, nor do those on values that no other
    layer reads."""
    for layer in layers:
        layer.quantizer.on = LEFT not in layer.node.meta
        layer.call.meta.pop(LEFT, None)
        if LEFT in layer.node.meta:
            layer.call.meta[LEFT] = layer.node.meta[LEFT]
    calls = quantizers_of(captured)
    read = _read(layers, calls)
    for node, quantizer in calls.items():
        node.meta.pop(LEFT, None)
        quantizer.on = quantizer in read
        if not quantizer.on:
            node.meta[LEFT] = "what reads it stays in float"


def _read(layers: Sequence[Layer], calls: Mapping[fx.Node, Quantizer]) -> set[Quantizer]:
    """The quantizers on values that kernels read: what they multiply, of what that is a mean, and, where the sum is
    wanted in integers, what they add; and those that attention reads."""
    kernels = [layer for layer in layers if LEFT not in layer.node.meta]
    ends = {layer.region.end for layer in kernels}
    read = {calls[source] for layer in kernels for source in _sources(layer.data) if source in calls}
    read |= {calls[source] for node, quantizer in calls.items() if quantizer in read
             for mean in node.all_input_nodes if averages(mean) for source in _sources(data_of(mean)[0])
             if source in calls}
    read |= {quantizer for node, quantizer in calls.items() if attends(node)}
    rest = [layer for layer in layers if layer.region.other is not None]
    while due := [layer for layer in rest if any(calls.get(user) in read for user in layer.region.end.users)]:
        rest = [layer for layer in rest if layer not in due]
        for layer in due:
            assert layer.region.other is not None
            # In float the addition would be taken for that of the kernel on its other side, which would lack integers.
            read |= {calls[source] for source in _sources(layer.region.other)
                     if source in calls and (layer in kernels or source.args[0] in ends)}
    return read


def _sources(node: fx.Node) -> set[fx.Node]:
    """The quantizers whose numbers `node` has, behind what only moves them."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if kind_of(node) == "quantizer":
            found.add(node)
        elif role_of(node) in ("passes", "joins"):
            stack += node.all_input_nodes
    return found


def take_back(layers: Iterable[Layer]) -> None:
    """Layers that were left in float are quantized again, for another scan."""
    for layer in layers:
        layer.node.meta.pop(LEFT, None)


def drop_left(captured: Captured) -> list[fx.Node]:
    """Take the quantizers that round nothing, for layers that stay in float, out of the graph; returns the nodes that
    now read something else. The caller refreshes."""
    changed: list[fx.Node] = []
    for node in list(captured.graph.nodes):
        if kind_of(node) == "quantizer" and LEFT in node.meta:
            changed += node.users
            node.replace_all_uses_with(node.all_input_nodes[0])
            captured.graph.erase_node(node)
            if not any(other.op == "call_module" and other.target == node.target for other in captured.graph.nodes):
                captured.module.delete_submodule(str(node.target))
    for node in dict.fromkeys(changed):
        if role_of(node) == "product":
            absorb(captured, node)
    there = set(captured.graph.nodes)
    return [node for node in dict.fromkeys(changed) if node in there]


def sensitivities(captured: Captured) -> tuple[Sensitivity, ...]:
    """What the last scan found, in graph order."""
    return tuple(node.meta[SENSITIVITY] for node in captured.graph.nodes if SENSITIVITY in node.meta)
