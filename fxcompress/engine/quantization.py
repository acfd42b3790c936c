"""Measures what quantization did to a model, layer by layer, when it is finalized: see `quantization_rows.py`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..backends.int8 import Lowered
from ..graph.calibration import Calibration
from ..graph.calibration import inputs_of as batch_of
from ..graph.captured import Captured
from ..graph.comparing import inputs_of
from ..graph.interpret import Settled, evaluated, evaluating, values_of
from ..graph.ops import arguments, kind_of, module_of, op_of
from ..graph.select import label
from ..nn.attention import RoundedAttention
from ..nn.quantizer import Quantizer
from ..nn.scheme import Scheme
from ..passes.shared.attention import multiplies_values
from ..passes.shared.integer import data_of, regions_of, role_of
from .measure import tensors_in
from .quantization_rows import FLOAT, Error, Histogram, LayerRow, Quantization, Rounding

SAMPLES = 16  # of the calibration data that are measured on: whole batches, until there are as many
ROUNDS = 5  # of timing, of which the median counts; one more before them warms up
_PART = 2**22  # numbers summed in float64 at a time
WORST, BINS = 6, 128  # layers whose histograms are kept; bins of each


def measure(simulated: Captured, lowered: Captured, done: Lowered, data: Calibration | None) -> Quantization:
    """The table of `simulated`, whose quantizers have ranges, and of `lowered`, which `done` made of it: on the first
    batches of `data`, or on the example inputs. Takes a run in float and one with rounding, another in float for the
    histograms, and the memory of one batch in each; then the runs of `lowered` that are timed."""
    places = _places(simulated)
    run = _Run(simulated, data, places)
    run.compare()
    timed = lowered.copy()  # whose kernels are chosen for the shapes of the example inputs, which they see first
    seconds = times(timed)
    rows = tuple(_row(run, place, done, timed, seconds) for place in places)
    chosen: dict[object, tuple[LayerRow, _Place]] = {}  # of layers that read the same values the worst
    for row, place in sorted(zip(rows, places, strict=True), key=lambda pair: pair[0].own):
        if place.weight is not None and len(chosen) < WORST:
            chosen.setdefault(place.data, (row, place))
    return Quantization(run.samples, _samples(inputs_of(simulated)), sum(seconds.values()), run.result.error, rows,
                        tuple(run.histograms(list(chosen.values()))))


@dataclass(frozen=True)
class _Place:
    """Where a layer stands in the simulation: the node that it reads, the quantizers behind that and on its weight,
    and the node that holds what it gives. A second call of a layer goes by the `name` of its node."""

    name: str
    node: fx.Node
    data: fx.Node | None
    reads: nn.Module | None
    weight: nn.Module | None
    gives: fx.Node


def _places(captured: Captured) -> list[_Place]:
    """Those of all that multiply and accumulate, or have a rounded weight. They give the value behind the activation
    that their kernel applies, rounded where it is rounded."""
    weights = {node: quantizer for node in captured.graph.nodes if op_of(node) is not None
               and (quantizer := _quantizer(arguments(node).get("weight"))) is not None}
    products = [node for node in weights if role_of(node) == "product"]
    ends = {region.product: region.end for region in (regions_of(products) if products else ())}
    found: dict[str, _Place] = {}
    for node in captured.graph.nodes:
        if node in weights or getattr(node.meta.get("fxc"), "macs", 0) > 0:
            data = next(iter(data_of(node)), None) if node in ends or multiplies_values(node) else None
            end = ends.get(node, node)
            rounding = [user for user in end.users if _quantizer(user) is not None]
            name = label(node) if label(node) not in found else node.name
            found[name] = _Place(name, node, data, _grid(data), weights.get(node), (rounding or [end])[0])
    return list(found.values())


def _quantizer(node: object) -> nn.Module | None:
    """The quantizer that `node` calls: one with a range that was found, or one that takes that of the values."""
    return module_of(node) if isinstance(node, fx.Node) and kind_of(node) == "quantizer" else None


def _grid(node: fx.Node | None) -> nn.Module | None:
    """The quantizer on whose grid the value of `node` lies: its own, or that of what it moves."""
    while node is not None and _quantizer(node) is None:
        node = next(iter(data_of(node)), None) if role_of(node) in ("passes", "joins") else None
    return _quantizer(node)


class _Unrounded(fx.Interpreter):
    """Runs a graph as if there were no quantizers in it."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a quantizer reads; else the value of the module."""
        rounds = getattr(self.fetch_attr(target), "fxc_kind", "") == "quantizer"
        return args[0] if rounds else super().call_module(target, args, kwargs)


@dataclass
class _Sum:
    """What is counted of one tensor, batch after batch. Numbers that aren't finite in float (masks of attention) are
    passed over; what came to be infinite by rounding counts as the greatest number."""

    signal: float = 0.0
    noise: float = 0.0
    clipped: int = 0
    count: int = 0
    low: float = math.inf
    high: float = -math.inf

    def add(self, exact: Tensor, found: Tensor, quantizer: nn.Module | None = None) -> None:
        """Take in numbers, and what stands in their place; with `quantizer` also what that clips, and the extremes."""
        exact, found = exact.detach(), found.detach()
        finite = None if _all_finite(exact) else exact.isfinite()
        if finite is not None:
            exact, found = torch.where(finite, exact, 0), torch.where(finite, found, 0)
        found = found if _all_finite(found) else found.nan_to_num(torch.finfo(found.dtype).max)
        self.signal += _square(exact)
        self.noise += _square(exact - found)
        if quantizer is not None and exact.numel():
            self.count += exact.numel() if finite is None else int(finite.sum())
            self.clipped += int(clipped(quantizer, exact).sum()) if isinstance(quantizer, Quantizer) else 0
            low, high = exact.aminmax()
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    @property
    def error(self) -> Error:
        return Error(self.signal, self.noise)


def _all_finite(x: Tensor) -> bool:
    """Without a tensor of answers: weights may take up half of the memory."""
    return not x.numel() or all(bool(end.isfinite()) for end in x.aminmax())


def _square(x: Tensor) -> float:
    parts = torch.split(x.flatten(), _PART)
    return math.fsum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts)


def steps_of(quantizer: Quantizer, x: Tensor) -> Tensor:
    """`x` in steps of the scales and from their zero points, neither rounded nor clipped: [rows, n]."""
    return quantizer.in_rows(x) * (1.0 / quantizer.scale[:, None]) + quantizer.zero_point[:, None]


def clipped(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Which numbers of `x` round to no integer of the scheme, but beyond: booleans, [rows, n]."""
    integers = (quantizer.in_rows(x) * (1.0 / quantizer.scale[:, None])).round_().add_(quantizer.zero_point[:, None])
    return (integers < quantizer.scheme.low) | (integers > quantizer.scheme.high)


class _Run:
    """The runs over the data, and what was summed up in them."""

    def __init__(self, simulated: Captured, data: Calibration | None, places: Sequence[_Place]) -> None:
        self.simulated, self.data, self.places = simulated, data, places
        self.samples = 0
        self.result = _Sum()
        self.reads = {place.data: _Sum() for place in places if place.data is not None and place.reads is not None}
        self.gives = {place.gives: _Sum() for place in places}

    def compare(self) -> None:
        """Both models side by side: `samples` and every sum."""
        rounding = {place.data: place.reads for place in self.places}
        exact_run, run = _Unrounded(self.simulated.module), Settled(self.simulated.module)
        for inputs in self._batches():
            self.samples += _samples(inputs)
            pairs = zip(values_of(exact_run, inputs), values_of(run, inputs), strict=True)
            for (node, exact), (_, found) in pairs:
                if node in self.reads:
                    quantizer = rounding[node]
                    assert quantizer is not None
                    self.reads[node].add(exact, quantizer(exact), quantizer)
                if node in self.gives or node.op == "output":
                    total = self.gives.get(node, self.result)
                    for one, other in zip(_floats(exact), _floats(found), strict=True):
                        total.add(one, other)

    def histograms(self, chosen: Sequence[tuple[LayerRow, _Place]]) -> Iterator[Histogram]:
        """Of what the layers read, in another run, and of their weights."""
        watched = {place.data: torch.zeros(BINS) for _, place in chosen if place.data in self.reads}
        edges = {node: _edges(self.reads[node].low, self.reads[node].high) for node in watched if node is not None}
        if watched:
            run = _Unrounded(self.simulated.module)
            for inputs in self._batches():
                for node, value in values_of(run, inputs):
                    if node in watched:
                        watched[node] += torch.histc(value.detach().float().cpu(), BINS, *edges[node])
        for row, place in chosen:
            if place.data in watched and row.reads is not None:
                yield Histogram(row.layer, "reads", *edges[place.data], (row.reads.low, row.reads.high),
                                tuple(map(int, watched[place.data].tolist())))
            if isinstance(place.weight, Quantizer):
                steps = steps_of(place.weight, weight_of(self.simulated, place.node)).cpu()
                low, high = _edges(float(steps.min()), float(steps.max()))
                yield Histogram(row.layer, "weight", low, high,
                                (float(place.weight.scheme.low), float(place.weight.scheme.high)),
                                tuple(map(int, torch.histc(steps, BINS, low, high).tolist())))

    def _batches(self) -> Iterator[list[Any]]:
        """The inputs of the batches that are measured on, one at a time, in evaluation mode."""
        with evaluating(self.simulated.module):
            if self.data is None:
                yield inputs_of(self.simulated)
                return
            seen = 0
            for number, batch in enumerate(self.data.batches, 1):
                inputs = batch_of(self.simulated, batch, number)
                yield inputs
                seen += _samples(inputs)
                if seen >= SAMPLES:
                    return


def _edges(low: float, high: float) -> tuple[float, float]:
    """The ends of a histogram over numbers from `low` to `high`, apart from one another in any case."""
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def _floats(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def _samples(inputs: Sequence[Any]) -> int:
    """The samples of a batch: the first dimension of its first tensor that has one."""
    return next((len(value) for value in tensors_in(inputs) if value.dim()), 1)


def weight_of(captured: Captured, node: fx.Node) -> Tensor:
    """The weight that the layer `node` computes with, in float: what the quantizer on it reads."""
    with torch.no_grad():
        weight: Tensor = evaluated(captured.module, arguments(node)["weight"].args[0])
    return weight.detach()


def _row(run: _Run, place: _Place, done: Lowered, timed: Captured, seconds: dict[str, float]) -> LayerRow:
    node, name = place.node, place.node.name
    gives = run.gives[place.gives].error
    kernel = done.kernels.get(name)
    reads = None
    if place.data is not None and place.reads is not None:
        reads = _rounding(place.reads, run.reads[place.data])
    if place.weight is None:
        why = "no rule selects it" if role_of(node) == "product" else (
            RoundedAttention.why if reads is not None else f"there is no integer kernel for {kind_of(node)}")
        size, named = node.meta["fxc"].bytes, kernel.name if kernel is not None else name
        return LayerRow(place.name, kind_of(node), FLOAT, why, (size, size), seconds.get(named), reads, gives=gives)
    weight = weight_of(run.simulated, node)
    bias = arguments(node).get("bias")
    before = after = bytes_of([weight, *([evaluated(run.simulated.module, bias)] if isinstance(bias, fx.Node) else [])])
    shown, why = FLOAT, done.left.get(name, "")
    if kernel is not None:
        module = timed.module.get_submodule(str(kernel.target))
        shown, why = kernel_name(module), str(getattr(module, "why", ""))
        after = bytes_of(module.state_dict().values())
    total = _Sum()
    total.add(weight, place.weight(weight), place.weight)
    return LayerRow(place.name, kind_of(node), shown, why, (before, after),
                    seconds.get(kernel.name if kernel is not None else name), reads,
                    _rounding(place.weight, total), gives)


def _rounding(quantizer: nn.Module, total: _Sum) -> Rounding:
    """Of a quantizer without a range of its own the range is that of what it read."""
    scheme: Scheme = quantizer.scheme  # type: ignore[assignment]
    low, high = total.low, total.high
    if isinstance(quantizer, Quantizer):
        ends = [(end - quantizer.zero_point) * quantizer.scale for end in (scheme.low, scheme.high)]
        low, high = float(ends[0].min()), float(ends[1].max())
    return Rounding(scheme.bits, scheme.signed, scheme.symmetric, granularity(quantizer), low, high,
                    total.clipped / max(1, total.count), total.error)


def granularity(quantizer: nn.Module) -> str:
    """What has a scale: `per_tensor`, `per_channel`, `per_token`, `per_group(32)`."""
    group = getattr(quantizer, "group", 0)
    if group:
        return f"per_group({group})"
    if getattr(quantizer, "per_token", False):
        return "per_token"
    return "per_tensor" if getattr(quantizer, "axis", None) is None else "per_channel"


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What the numbers of `tensors` take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kernel_name(module: nn.Module) -> str:
    """What the table calls a kernel: its kind, and the library that it runs on where it chooses one."""
    kind, engine = str(getattr(module, "fxc_kind", type(module).__name__)), str(getattr(module, "engine", ""))
    return f"{kind} ({engine})" if engine else kind


class _Timed(fx.Interpreter):
    """Runs a graph and notes how long each node takes, in seconds, run after run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The value of `n`."""
        begun = time.perf_counter()
        value = super().run_node(n)
        self.seconds.setdefault(n.name, []).append(time.perf_counter() - begun)
        return value


def times(captured: Captured) -> dict[str, float]:
    """The median time of each node of `captured` for the example inputs, in seconds, by its name: within runs of the
    whole model, so that what it reads lies where it lies in use. On the CPU."""
    run, inputs = _Timed(captured.module), inputs_of(captured)
    with evaluating(captured.module):
        for _ in range(ROUNDS + 1):
            for _ in values_of(run, inputs):
                pass
    return {name: statistics.median(found[1:]) for name, found in run.seconds.items()}
