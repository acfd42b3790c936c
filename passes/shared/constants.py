"""Channels that hold a constant: a bias or a batch-norm shift behind a filter of zeros, through what follows it
pointwise. `folding.py` lets their readers take the constant into their biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.graph.coupling import Coupling
from fxcompress.graph.ops import arguments, kind_of, module_of, op_of

# Operators that give a constant for constants, computed by themselves on them; not-a-number stands for "not constant".
_POINTWISE = frozenset((
    "relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "mish",
    "hardtanh", "softplus", "add", "sub", "mul", "div", "neg", "prelu"))
_SAME = frozenset((
    "dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous", "clone", "detach", "interpolate",
    *(f"{name}_pool{n}d" for n in (1, 2, 3) for name in ("max", "adaptive_avg", "adaptive_max"))))
_FILTERED = (*(f"conv{n}d" for n in (1, 2, 3)), "linear")


def constants(coupling: Coupling) -> dict[fx.Node, Tensor]:
    """The constants of each node along its dimension 1 (the last one of a linear layer): one number a channel,
    not-a-number for a channel that isn't constant. Nodes without any are left out."""
    values: dict[fx.Node, Tensor] = {}
    with torch.no_grad():
        if not _possible(coupling):
            return values
        for node in coupling.flow.nodes:
            value = _constant(node, kind_of(node), values)
            if value is not None and not bool(value.isnan().all()):
                values[node] = value
    return values


def _possible(coupling: Coupling) -> bool:
    """Whether any filter begins with a zero or any scale of a norm is one: in most models none does, and looking at
    one weight of each filter is enough to say so."""
    firsts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for node in coupling.flow.nodes:
        if node.op == "call_module" and ((kind := kind_of(node)) in _FILTERED or kind.startswith("batchnorm")):
            module = module_of(node)
            weight = module._parameters.get("weight")
            if weight is not None:
                first = weight if weight.dim() == 1 else weight.as_strided(weight.shape[:1], weight.stride()[:1])
                firsts.setdefault((weight.device, weight.dtype), []).append(first)
            elif "parametrizations" in module._modules:  # computed from others
                return True
    return any(bool((torch.cat(found) == 0).any()) for found in firsts.values())


def _constant(node: fx.Node, kind: str, values: Mapping[fx.Node, Tensor]) -> Tensor | None:
    if node.op == "call_module" and kind in _FILTERED:
        return _of_filters(arguments(node))
    if not any(source in values for source in node.all_input_nodes) and "batchnorm" not in kind:
        return None
    if kind.startswith("batchnorm") and node.op == "call_module":
        return _normed(arguments(node), values)
    if kind in _SAME:
        return values.get(arguments(node)["input"])
    op = op_of(node)
    if kind in _POINTWISE and op is not None:
        nan = torch.tensor([float("nan")])
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda source: values.get(source, nan))
        value = op.target(*args, **kwargs)
        return value if isinstance(value, Tensor) and value.dim() == 1 else None
    return None


def _normed(args: Mapping[str, Any], values: Mapping[fx.Node, Tensor]) -> Tensor | None:
    scale, shift, mean, variance = (args[name] for name in ("weight", "bias", "running_mean", "running_var"))
    if scale is None or mean is None:
        return None
    nan = torch.full_like(scale, float("nan"))
    value = (values.get(args["input"], nan) - mean) * torch.rsqrt(variance + args["eps"]) * scale + shift
    return torch.where(scale == 0, shift, value)


def _of_filters(args: Mapping[str, Any]) -> Tensor | None:
    """The bias of each filter that is zero."""
    weight, bias = args["weight"], args["bias"]
    zero = weight.flatten(1)[:, 0] == 0  # few pass, so that few filters are read whole
    if not bool(zero.any()):
        return None
    zero[zero.clone()] = ~weight[zero].flatten(1).any(dim=1)
    value = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias.detach()
    return torch.where(zero, value, torch.full_like(value, float("nan")))
