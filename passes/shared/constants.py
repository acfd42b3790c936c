"""Constants that leave with removed channels: a bias or a batch-norm shift behind a filter of zeros.

Such a channel holds one number wherever it is read, so its readers can take that number into their biases: the model
without the channel then equals the model with it. A convolution that pads with zeros reads less of the channel at the
border; the fold is exact where its kernel stays inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.graph.coupling import Coupling
from fxcompress.graph.coupling_edit import Kept, kept_of
from fxcompress.graph.coupling_flow import Consumed
from fxcompress.graph.ops import arguments, kind_of, op_of

# Operators that give a constant for constants, computed by themselves on them; not-a-number stands for "not constant".
_POINTWISE = frozenset((
    "relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "mish",
    "hardtanh", "softplus", "add", "sub", "mul", "div", "neg", "prelu"))
_SAME = frozenset((
    "dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous", "clone", "detach", "interpolate",
    *(f"{name}_pool{n}d" for n in (1, 2, 3) for name in ("max", "adaptive_avg", "adaptive_max"))))
_CONVS = {f"conv{n}d": function for n, function in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d))}


@dataclass
class Fold:
    """What the readers of constant channels take into their biases: gathered before the removal, done after it.

    `values` are the constants of each node along its dimension 1 (the last one of a linear layer): one number a
    channel, not-a-number for a channel that isn't constant.
    """

    coupling: Coupling
    gone: Kept
    values: dict[fx.Node, Tensor] = field(default_factory=dict)
    shifts: list[tuple[fx.Node, Tensor]] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def gather(self) -> Fold:
        """Find constant channels among those that leave, and what each reader gets from them."""
        if not self.coupling.captured.concrete:
            return self
        with torch.no_grad():
            for node in self.coupling.flow.nodes:
                value = self._constant(node, kind_of(node))
                if value is not None and not bool(value.isnan().all()):
                    self.values[node] = value
            if self.values:
                for entry in self.coupling.flow.consumed:
                    self._read(entry)
        return self

    def _constant(self, node: fx.Node, kind: str) -> Tensor | None:
        if node.op == "call_module" and (kind in _CONVS or kind == "linear"):
            return _of_filters(arguments(node), kind)
        if not any(source in self.values for source in node.all_input_nodes) and "batchnorm" not in kind:
            return None
        if kind.startswith("batchnorm") and node.op == "call_module":
            return self._normed(arguments(node))
        if kind in _SAME:
            return self.values.get(arguments(node)["input"])
        op = op_of(node)
        if kind in _POINTWISE and op is not None:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._operand)
            value = op.target(*args, **kwargs)
            return value if isinstance(value, Tensor) and value.dim() == 1 else None
        return None

    def _operand(self, node: fx.Node) -> Tensor:
        return self.values.get(node, torch.tensor([float("nan")]))

    def _normed(self, args: Mapping[str, Any]) -> Tensor | None:
        scale, shift, mean, variance = (args[name] for name in ("weight", "bias", "running_mean", "running_var"))
        if scale is None or mean is None:
            return None
        nan = torch.full_like(scale, float("nan"))
        value = (self.values.get(args["input"], nan) - mean) * torch.rsqrt(variance + args["eps"]) * scale + shift
        return torch.where(scale == 0, shift, value)

    def _read(self, entry: Consumed) -> None:
        """What the reader `entry` gets from the constant channels that leave."""
        node, kind = entry.node, kind_of(entry.node)
        source = arguments(node).get("input")
        value = self.values.get(source) if isinstance(source, fx.Node) else None
        if value is None or node.op != "call_module":
            return
        gone = torch.from_numpy((entry.labels >= 0) & self.gone[entry.labels])
        args = arguments(node)
        gone = gone.repeat(len(value) // len(gone))  # the labels of a grouped reader are those of one group
        value = torch.where(gone & ~value.isnan(), value, torch.zeros(()))
        if not bool((value != 0).any()):
            return
        if kind == "linear":
            self.shifts.append((node, F.linear(value, args["weight"])))
        elif kind in _CONVS:
            if args["padding"] not in (0, "valid") and set(np.atleast_1d(args["padding"]).tolist()) != {0}:
                self.padded.append(str(node.target))
            self.shifts.append((node, _convolved(_CONVS[kind], args, value)))
        else:
            self.left.append(str(node.target))

    def carry_out(self) -> list[str]:
        """Change the biases, or where there is none the mean of the batch norm behind; returns what to note."""
        produced = self.coupling.produced
        done = []
        for node, shift in self.shifts:
            kept = [torch.from_numpy(kept_of(entry.labels, self.gone)) for entry in produced.get(node, [])]
            self._shift(node, shift[kept[0]] if kept else shift)
            done.append(str(node.target))
        notes = [f"constants of removed channels are folded into {', '.join(done[:4])}"
                 f"{' and more' if len(done) > 4 else ''}"] * bool(done)
        if self.padded:
            notes.append(f"at the zero-padded border of {', '.join(self.padded[:4])} that fold isn't exact")
        if self.left:
            notes.append(f"constants of removed channels that {', '.join(self.left[:4])} read are dropped")
        return notes

    def _shift(self, node: fx.Node, shift: Tensor) -> None:
        module = self.coupling.captured.module.get_submodule(str(node.target))
        bias, users = module.bias, list(node.users)
        if isinstance(bias, Tensor):
            bias.data += shift.to(bias)
        elif len(users) == 1 and users[0].op == "call_module" and kind_of(users[0]).startswith("batchnorm"):
            norm = self.coupling.captured.module.get_submodule(str(users[0].target))
            assert isinstance(norm.running_mean, Tensor)
            norm.running_mean -= shift.to(norm.running_mean)
        else:
            weight = module.get_parameter("weight")
            module.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)


def _of_filters(args: Mapping[str, Any], kind: str) -> Tensor | None:
    """The bias of each filter that is zero."""
    weight, bias = args["weight"], args["bias"]
    zero = weight.flatten(1)[:, 0] == 0  # few pass, so that few filters are read whole
    if not bool(zero.any()):
        return None
    zero[zero.clone()] = ~weight[zero].flatten(1).any(dim=1)
    value = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias.detach()
    return torch.where(zero, value, torch.full_like(value, float("nan")))


def _convolved(convolve: Callable[..., Tensor], args: Mapping[str, Any], value: Tensor) -> Tensor:
    """What a convolution gives for a constant input, where its kernel stays inside."""
    weight = args["weight"]
    dilation = np.broadcast_to(args["dilation"], weight.dim() - 2)
    extent = [int((size - 1) * step + 1) for size, step in zip(weight.shape[2:], dilation, strict=True)]
    picture = value.reshape(1, -1, *(1,) * len(extent)).expand(1, -1, *extent).to(weight)
    return convolve(picture, weight, dilation=args["dilation"], groups=args["groups"]).flatten()
