"""`equalize`: channels between two layers are scaled so that none wastes the range it shares with others.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019, section 4.1: for
y = W₂·f(W₁x + b) and f(s·x) = s·f(x), W₁ and b are divided by s, W₂ is multiplied by it, and s = √(r₁/r₂) for each
channel makes the ranges r₁/s and r₂·s equal. What the ranges are of depends on what shares a scale:

* r₁ is that of a row of W₁ where all of W₁ has one scale, as in the paper; where each row has its own, that of the
  values between the layers, which always share one.
* r₂ is that of a column of W₂. In a depthwise layer with a scale for each channel a column shares its scale with no
  other: all ranges r₁ then become the largest one.

f may be ReLU. ReLU6 and its like don't commute with scales: a channel that reaches the bound on the calibration data
stays as it is, and others are scaled no further than to the bound, so that the model computes the same on those data.
With `relu6_to_relu` they become ReLUs first, as in the paper: channels with the largest weights often are those that
reach the bound. What that moves the output by is noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxcompress.graph.calibration import Calibration
from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import arguments, kind_of
from fxcompress.graph.provenance import origins_of
from fxcompress.passes.shared.inference import vanishes
from fxcompress.passes.shared.normalizing import few
from fxcompress.passes.shared.recovery import Layer, Sharing, spread
from fxcompress.passes.shared.switching import without_rounding

KINDS = ("conv2d", "linear")
_ROUNDS = 20  # over all pairs: layers in the middle of a chain belong to two
_DONE = 1e-3  # when no factor is farther from 1
_NEAR = 0.999  # of the bound: what comes so near reaches it


@dataclass
class Largest:
    """The largest magnitude of each channel of a value, over all batches."""

    dim: int
    seen: Tensor | None = None

    def see(self, value: Tensor) -> None:
        """Take in one more batch."""
        others = [dim for dim in range(value.dim()) if dim != self.dim % value.dim()]
        found = value.detach().abs().amax(others) if others else value.detach().abs()
        self.seen = found if self.seen is None else torch.maximum(self.seen, found)


@dataclass
class _Kept:
    """The value that is seen last."""

    value: object = None

    def see(self, value: Tensor) -> None:
        """Take it."""
        self.value = value


@dataclass
class Pair:
    """Two layers, the second of which alone reads the first; `top` is where the activation between them is cut off."""

    first: Layer
    second: Layer
    top: float | None = None
    values: Largest = field(default_factory=lambda: Largest(1))

    def unbind(self) -> None:
        """Make the activation between them a ReLU."""
        activation = self.first.region.activation
        assert activation is not None
        source, asked = arguments(activation)["input"], origins_of(self.first.node)[-1]
        activation.meta["origins"] = (*origins_of(activation),
                                      replace(asked, detail="a ReLU from here on: equalize, relu6_to_relu", was=()))
        activation.op, activation.target = "call_function", F.relu
        activation.args, activation.kwargs = (source,), {}
        self.top = None

    @property
    def free(self) -> bool:
        """Whether each channel has a scale of its own in the second layer."""
        return (kind_of(self.second.node) == "conv2d" and self.second.weight().shape[1] == 1
                and self.second.quantizer.axis is not None)

    def columns(self) -> Tensor:
        """The range of each column of the second weight."""
        return self._by_column(self.second.weight().abs()).amax((1, 3)).flatten()

    def _by_column(self, weight: Tensor) -> Tensor:
        """The second weight as [groups, outputs, inputs, places]."""
        groups = int(arguments(self.second.node).get("groups", 1))
        return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)

    def factors(self) -> Tensor:
        """s for each channel."""
        values = self.values.seen
        assert values is not None
        per_row = self.first.quantizer.axis is not None
        first = values if per_row else self.first.weight().abs().flatten(1).amax(1)
        if self.free:
            s = first / (first.max() if self.top is None or not per_row else self.top)
        else:
            second = self.columns()
            if per_row and self.top is not None:
                first, second = first / self.top, second / second.max()
            s = (first / second).sqrt()
        if self.top is not None:
            s = torch.maximum(s, values / self.top).masked_fill(values >= _NEAR * self.top, 1.0)
        live = s.isfinite() & (s > 0)  # channels that are zero on all data too: weights may be large there
        return torch.where(live, s, torch.ones_like(s))

    def scale(self, s: Tensor) -> None:
        """Divide the first layer's outputs by `s`, and multiply what the second reads by it."""
        one, bias, two = self.first.tensor("weight"), self.first.tensor("bias"), self.second.tensor("weight")
        assert one is not None and two is not None and self.values.seen is not None
        with torch.no_grad():
            one.div_(spread(s, 0, one))
            if bias is not None:
                bias.div_(s)
            columns = self._by_column(two)
            two.copy_((columns * s.reshape(len(columns), 1, -1, 1)).reshape(two.shape))
        self.values.seen = self.values.seen / s


def equalize(captured: Captured, layers: Sequence[Layer], data: Calibration) -> tuple[list[Layer], list[str]]:
    """Equalize all pairs among the layers that ask for it. Returns the layers whose weights have changed, and notes."""
    notes: list[str] = []
    pairs = list(_pairs(captured, [layer for layer in layers if layer.asked.equalize], notes))
    notes += _unbound(captured, [pair for pair in pairs if pair.top is not None and pair.first.asked.relu6_to_relu],
                      data)
    if pairs:
        with without_rounding(captured):
            data.feed(captured, {pair.first.region.end: [pair.values] for pair in pairs})
    for _ in range(_ROUNDS):
        farthest = 0.0
        for pair in pairs:
            s = pair.factors()
            pair.scale(s)
            farthest = max(farthest, float(s.log().abs().max()))
        if farthest < _DONE:
            break
    if any(layer.asked.equalize for layer in layers):
        notes.insert(0, f"equalize: {len(pairs)} pairs of layers")
    return list({layer.node: layer for pair in pairs for layer in (pair.first, pair.second)}.values()), notes


def _unbound(captured: Captured, pairs: Sequence[Pair], data: Calibration) -> list[str]:
    """Make the activations of `pairs` ReLUs, and say by how much that moves what the model gives for one batch."""
    if not pairs:
        return []
    batch = replace(data, batches=list(islice(data.batches, 1)), watch=None)  # one for both: a loader may shuffle
    before = _outputs(captured, batch)
    for pair in pairs:
        pair.unbind()
    captured.refresh()
    after = _outputs(captured, batch)
    moved = sum(float((a - b).double().square().sum()) for a, b in zip(after, before, strict=True))
    norm = sum(float(b.double().square().sum()) for b in before)
    share = (moved / max(norm, 1e-30)) ** 0.5
    return [f"relu6_to_relu: {len(pairs)} became ReLU, which moves the output by {share:.1%} (norm of the difference, "
            "one batch)"]


def _outputs(captured: Captured, data: Calibration) -> list[Tensor]:
    """What the model gives in floats for the one batch of `data`."""
    output, = captured.graph.find_nodes(op="output")
    seen = {node: _Kept() for node in output.all_input_nodes}
    with without_rounding(captured):
        data.feed(captured, {node: [kept] for node, kept in seen.items()})
    return [kept.value for kept in seen.values() if isinstance(kept.value, Tensor)]


def _pairs(captured: Captured, layers: Sequence[Layer], notes: list[str]) -> Iterator[Pair]:
    by_node, sharing = {layer.node: layer for layer in layers}, Sharing(captured)
    skipped: dict[str, list[str]] = {}
    for first in layers:
        second = by_node.get(_reader(first.region.end))  # type: ignore[arg-type]
        if second is None or first.region.add is not None:
            continue
        top = _top(first.region.activation)
        why = (f"{kind_of(first.region.activation)} doesn't commute with scales"
               if top is None and first.region.activation is not None
               else sharing.why_not(first, ("weight", "bias")) or sharing.why_not(second))
        if kind_of(first.node) not in KINDS or kind_of(second.node) not in KINDS:
            why = "only pairs of conv2d and linear are"
        if why is None:
            assert top is not None
            yield Pair(first, second, top if top < float("inf") else None,
                       Largest(-1 if kind_of(first.node) == "linear" else 1))
        else:
            skipped.setdefault(why, []).append(first.name)
    notes += [f"equalize: not behind {few(names)}: {why}" for why, names in skipped.items()]


def _top(activation: fx.Node | None) -> float | None:
    """Where an activation that commutes with scales is cut off; None for one that doesn't commute."""
    if activation is None or kind_of(activation) == "relu":
        return float("inf")
    if kind_of(activation) == "relu6":
        return 6.0
    if kind_of(activation) == "hardtanh":
        values = arguments(activation)
        return float(values["max_val"]) if values["min_val"] == 0 and values["max_val"] > 0 else None
    return None


def _reader(node: fx.Node) -> fx.Node | None:
    """The node that alone reads the numbers of `node`, behind what keeps channels and commutes with scales."""
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None
        node = users[0]
        if not (kind_of(node) in ("quantizer", "max_pool2d") or vanishes(node) or _pads_zeros(node)):
            return node


def _pads_zeros(node: fx.Node) -> bool:
    """Whether `node` puts zeros around the places of images."""
    values = arguments(node) if kind_of(node) == "pad" else None
    return values is not None and values["mode"] == "constant" and not values["value"] and len(values["pad"]) <= 4
