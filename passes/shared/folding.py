"""What readers lose with the channels that leave, folded into their biases.

A channel that holds a constant gives its readers the same number everywhere: with that number in their biases, the
model without the channel equals the model with it. What any other channel gives is near its mean over calibration data,
so that the mean takes its place: Evci et al., "Mean Replacement Pruning", 2018, of units; An et al.,
"Fluctuation-based Adaptive Structured Pruning", 2024, of channels of language models. A constant is its own mean.

A convolution that pads with zeros reads less of a channel at the border, and a transposed one lets each place of its
result see another part of its kernel. A bias is the same everywhere: the fold is then the mean over all places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.graph.calibration import Place
from fxcompress.graph.coupling import Coupling
from fxcompress.graph.coupling_edit import Kept, kept_of
from fxcompress.graph.coupling_flow import Consumed, shape_of
from fxcompress.graph.interpret import evaluated
from fxcompress.graph.ops import arguments, kind_of, op_of, path_of
from fxcompress.graph.tree import named_tensors
from fxcompress.passes.shared.constants import constants
from fxcompress.passes.shared.responses import Measured, live_nodes, places_of

_CONVS = tuple(f"conv{n}d" for n in (1, 2, 3))
_TRANSPOSED = tuple(f"conv_transpose{n}d" for n in (1, 2, 3))
_RECURRENT = ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell")


@dataclass(frozen=True)
class Sink:
    """What takes a shift of a reader's results: the tensor `name`, added (or, for the mean of a norm, taken away); or a
    new bias of the module at `name`."""

    name: str
    sign: int = 1  # 0: a bias that has to be made


@dataclass
class Fold:
    """What the readers of channels that leave get from them: gathered before the removal, carried out after it.
    `measured` are the moments of calibration data, None to fold constants alone."""

    coupling: Coupling
    gone: Kept
    measured: Measured | None = None
    shifts: dict[Sink, dict[fx.Node, Tensor]] = field(default_factory=dict)  # by the reader, before the removal
    folded: dict[str, list[str]] = field(default_factory=lambda: {"constant": [], "mean": []})  # readers
    channels: set[int] = field(default_factory=set)  # the components whose mean is folded
    uneven: list[str] = field(default_factory=list)  # readers whose places get different amounts
    left: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)  # readers of channels that arise in them

    def gather(self) -> Fold:
        """Find what each reader gets from channels that leave."""
        if self.coupling.captured.concrete and (self.measured is not None or self._constants):
            seen: set[tuple[fx.Node, str | fx.Node, int]] = set()
            with torch.no_grad():
                for entry in self.coupling.flow.consumed:
                    key = (entry.node, entry.target, entry.dim)
                    if key not in seen:  # an attention reads its input through one weight three times
                        seen.add(key)
                        self._read(entry)
        return self

    @cached_property
    def _constants(self) -> dict[fx.Node, Tensor]:
        return constants(self.coupling)

    @cached_property
    def _live(self) -> set[fx.Node]:
        return live_nodes(self.coupling)

    @cached_property
    def _calls(self) -> Counter[str]:
        """How many nodes call each module."""
        return Counter(str(node.target) for node in self.coupling.flow.nodes if node.op == "call_module")

    def _read(self, entry: Consumed) -> None:
        gone = (entry.labels >= 0) & self.gone[entry.labels]
        if not gone.any():
            return
        places = places_of(self.coupling, entry, self._live)
        if not places:
            if self.measured is not None:
                self.inside.append(_name(entry.node))
            return
        values = {place: self._value(place, gone) for place in places}
        if not any(bool(value.any()) for value in values.values()):
            return
        sink = self._sink(entry) if len(places) == 1 else None
        amount = self._amount(entry, values[places[0]]) if sink is not None else None
        if amount is None or sink is None:
            self.left.append(_name(entry.node))
            return
        before = self.shifts.setdefault(sink, {})
        before[entry.node] = before[entry.node] + amount if entry.node in before else amount
        self._note(entry, places[0], gone)

    def _value(self, place: Place, gone: Kept) -> Tensor:
        """What stands for each channel at `place` that leaves, 0 for the others: (channels), float64."""
        size = len(self.coupling.flow.values[place[0]][place[1]])
        moments = self.measured.get(place) if self.measured is not None else None
        value = moments.mean if moments is not None else torch.zeros(size, dtype=torch.float64)
        constant = self._constants.get(place[0])
        if constant is not None and len(constant) == size:
            value = torch.where(constant.isnan(), value, constant.double().cpu())
        return torch.where(_spread(gone, size), value, torch.zeros((), dtype=torch.float64))

    def _note(self, entry: Consumed, place: Place, gone: Kept) -> None:
        constant = self._constants.get(place[0])
        left = _spread(gone, len(gone) if constant is None else len(constant))
        if constant is not None and bool((left & ~constant.isnan().cpu()).any()):
            self.folded["constant"].append(_name(entry.node))
        if self.measured is not None and (constant is None or bool((left & constant.isnan().cpu()).any())):
            self.folded["mean"].append(_name(entry.node))
            self.channels.update(self.coupling.of(entry.labels[gone]).tolist())

    def _amount(self, entry: Consumed, value: Tensor) -> Tensor | None:
        """What the reader adds to each of its results for inputs `value`; None where that isn't known."""
        kind, args = kind_of(entry.node), arguments(entry.node)
        name = {"addmm": "mat2", "multihead_attention": "in_proj_weight"}.get(kind, "weight")
        weight = args.get(name)
        if kind in _RECURRENT:
            weight = self.coupling.captured.module.get_parameter(str(entry.target))
        if isinstance(weight, fx.Node):
            weight = evaluated(self.coupling.captured.module, weight)
        if not isinstance(weight, Tensor) or (kind == "multihead_attention" and not str(entry.target).endswith(name)):
            return None
        if kind in ("linear", "multihead_attention", *_RECURRENT):
            return F.linear(value, weight.double().cpu())
        if kind == "addmm":
            return value @ weight.double().cpu() if weight.dim() == 2 else None
        if kind not in _CONVS and kind not in _TRANSPOSED:
            return None
        seen = _coverage(entry.node, args, weight.dim() - 2, kind in _TRANSPOSED)
        if any(bool((share != 1).any()) for share in seen):
            self.uneven.append(_name(entry.node))
        return _summed(weight.double().cpu(), seen, value, args["groups"], kind in _TRANSPOSED)

    def _sink(self, entry: Consumed) -> Sink | None:
        """Where the reader's shift goes; None where there is no place for it."""
        node, kind, args, flow = entry.node, kind_of(entry.node), arguments(entry.node), self.coupling.flow
        if kind in _RECURRENT:
            name = str(entry.target).replace("weight_ih", "bias_ih")
            return Sink(name) if flow.has(name) and "weight_ih" in str(entry.target) else None
        if kind == "multihead_attention":
            return Sink(f"{node.target}.in_proj_bias") if flow.has(f"{node.target}.in_proj_bias") else None
        bias = args.get("input" if kind == "addmm" else "bias")
        if node.op == "call_module":
            norm = next(iter(node.users)) if len(node.users) == 1 else node
            path = str(node.target)
            if bias is None and self._takes_shift(norm):
                return Sink(f"{norm.target}.running_mean", -1)
            return Sink(f"{path}.bias") if flow.has(f"{path}.bias") else Sink(path, 0) if bias is None else None
        if isinstance(bias, fx.Node) and bias.op == "get_attr" and flow.has(str(bias.target)):
            labels = flow.tensor(str(bias.target))
            return Sink(str(bias.target)) if len(labels) == 1 else None
        path = path_of(node)
        holder = self.coupling.captured.module.get_submodule(path) if bias is None and kind != "addmm" else None
        return Sink(path, 0) if getattr(holder, "bias", self) is None and flow.has(f"{path}.weight") else None

    def _takes_shift(self, norm: fx.Node) -> bool:
        if norm.op != "call_module" or not kind_of(norm).startswith("batchnorm"):
            return False
        return self._calls[str(norm.target)] == 1 and self.coupling.flow.has(f"{norm.target}.running_mean")

    def carry_out(self) -> list[fx.Node]:
        """Change the biases, or where there is none the mean of the batch norm behind; gives the readers concerned.
        A reader's module that is called several times takes the mean over its calls."""
        done: list[fx.Node] = []
        for sink, amounts in self.shifts.items():
            calls = max(len(amounts), self._calls[str(next(iter(amounts)).target)] if sink.sign >= 0 else 1)
            shift = torch.stack(list(amounts.values())).sum(0) / calls
            self._shift(sink, next(iter(amounts)), shift)
            done += amounts
        if any(sink.sign == 0 for sink in self.shifts):
            self.coupling.captured.refresh()
        return done

    def _shift(self, sink: Sink, node: fx.Node, shift: Tensor) -> None:
        module = self.coupling.captured.module
        named = named_tensors(module).all
        if sink.sign:
            tensor = named[sink.name]
            labels = self.coupling.flow.tensor(sink.name)[0]
            tensor.data += sink.sign * self._kept(shift, labels).to(tensor)
            return
        labels = next((made.labels for made in self.coupling.produced.get(node, ())), None)
        holder, weight = module.get_submodule(sink.name), named[f"{sink.name}.weight"]
        holder.bias = nn.Parameter(self._kept(shift, labels).to(weight), requires_grad=weight.requires_grad)
        for reader in self.shifts[sink]:
            op = op_of(reader)
            if op is not None:
                with module.graph.inserting_before(reader):
                    bias = module.graph.get_attr(f"{sink.name}.bias")
                reader.args, reader.kwargs = op.normal({**arguments(reader), "bias": bias})

    def _kept(self, shift: Tensor, labels: Any) -> Tensor:
        return shift if labels is None else shift[torch.from_numpy(kept_of(labels, self.gone))]

    def notes(self) -> list[str]:
        """What to tell of it."""
        found = []
        if self.folded["constant"]:
            found.append(f"constants of removed channels are folded into {_listed(self.folded['constant'])}")
        if self.folded["mean"]:
            found.append(f"compensated: the means of {len(self.channels)} removed components on the calibration data "
                         f"are folded into the biases of {_listed(self.folded['mean'])}")
        if self.uneven:
            found.append(f"the fold into {_listed(self.uneven)} is the mean over its places, which differ (zero "
                         "padding, or a transposed kernel)")
        if self.left:
            found.append(f"what removed channels gave {_listed(self.left)} is dropped: there is no bias to take it")
        if self.inside:
            found.append(f"not compensated: what leaves is read inside of {_listed(self.inside)}, where its mean "
                         "can't be measured")
        return found


def _name(node: fx.Node) -> str:
    return path_of(node) or node.name


def _listed(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:4]) + (" and more" if len(names) > 4 else "")


def _spread(gone: Kept, size: int) -> Tensor:
    """Truth values of a dimension of `size`; the labels of a grouped reader are those of one group."""
    return torch.from_numpy(np.tile(gone, size // len(gone)))


def _coverage(node: fx.Node, args: Mapping[str, Any], rank: int, transposed: bool) -> list[Tensor]:
    """For each spatial dimension and each place of the kernel along it, (size of the kernel): the share of the results
    that it adds a number of the input to, not one of the padding."""
    kernel = shape_of(args["weight"]) if isinstance(args["weight"], fx.Node) else tuple(args["weight"].shape)
    stride, dilation = (np.broadcast_to(args[name], rank) for name in ("stride", "dilation"))
    found = []
    for dim in range(rank):
        size, result = (shape_of(place)[dim - rank] for place in (args["input"], node))
        taps = torch.arange(kernel[2 + dim]) * int(dilation[dim])
        before = _padding(args, dim, rank, int(taps[-1]))
        slides, stays = (size, result) if transposed else (result, size)
        places = torch.arange(slides)[:, None] * int(stride[dim]) - before + taps
        inside = (places >= 0) & (places < stays)
        if args.get("padding_mode", "zeros") != "zeros":
            inside = torch.ones_like(inside)
        found.append(inside.double().sum(0) / result)
    return found


def _padding(args: Mapping[str, Any], dim: int, rank: int, extent: int) -> int:
    """The padding before the first number; `extent` is the reach of the kernel."""
    if isinstance(args["padding"], str):
        return extent // 2 if args["padding"] == "same" else 0
    return int(np.broadcast_to(args["padding"], rank)[dim])


def _summed(weight: Tensor, seen: list[Tensor], value: Tensor, groups: int, transposed: bool) -> Tensor:
    """A kernel applied to a constant `value` of each channel, on average over the places: (out channels)."""
    for share in reversed(seen):
        weight = weight @ share
    if not transposed:
        weight = weight.reshape(groups, -1, weight.shape[1]).transpose(1, 2)  # (groups, in / groups, out / groups)
    weight = weight.reshape(groups, len(value) // groups, -1)
    return torch.einsum("gi,gio->go", value.reshape(groups, -1), weight).flatten()
