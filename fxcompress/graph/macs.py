"""Multiply-accumulates of the operators that have any. One fused multiply-add is one; biases count nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from .ops import arguments, module_of

Values = Callable[[Any], Any]  # argument (a node or a constant) -> its fake value
Counter = Callable[[Mapping[str, Any], Tensor, Values], int]


def macs_of(kind: str, node: fx.Node, value: Any, value_of: Values) -> int:
    """Multiply-accumulates of `node`, whose value is `value`, in one forward pass at the example's batch size."""
    if kind in _RECURRENT and node.op == "call_module":
        return _recurrent(node, value_of)
    if kind in _HOLDERS:
        shape: Any = module_of(node).shape  # of the weight, which may be packed
        return int(value.numel() * math.prod(shape[1:]))
    counter = _COUNTERS.get(kind)
    if counter is None:
        return 0
    return counter(arguments(node), value, value_of)


def _conv(a: Mapping[str, Any], out: Tensor, of: Values) -> int:
    """Every output element sums over one filter: `weight.numel() / out_channels`."""
    weight = of(a["weight"])
    return int(out.numel() * (weight.numel() // weight.shape[0]))


def _conv_transpose(a: Mapping[str, Any], out: Tensor, of: Values) -> int:
    """Every input element is spread over one filter: `weight.numel() / in_channels`."""
    weight, x = of(a["weight"]), of(a["input"])
    return int(x.numel() * (weight.numel() // weight.shape[0]))


def _linear(a: Mapping[str, Any], out: Tensor, of: Values) -> int:
    return int(out.numel() * of(a["weight"]).shape[-1])


def _bilinear(a: Mapping[str, Any], out: Tensor, of: Values) -> int:
    weight = of(a["weight"])
    return int(out.numel() * (weight.shape[1] * weight.shape[2] + weight.shape[2]))


def _product(a: Mapping[str, Any], out: Tensor, of: Values) -> int:
    """`matmul` and its like: every output element sums over the last dimension of the left factor."""
    left = of(next(a[name] for name in ("mat1", "batch1", "input") if name in a))
    return int(out.numel() * left.shape[-1]) if isinstance(left, Tensor) and left.dim() else 0


def _einsum(a: Mapping[str, Any], out: Tensor, of: Values) -> int:
    """All indices together, as if contracted in one go; no multiply-add with a single operand."""
    equation = a["equation"]
    if not isinstance(equation, str) or len(a["operands"]) < 2:
        return 0
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.split("->")[0].replace(" ", "").split(","), a["operands"], strict=True):
        shape = list(of(operand).shape)
        head, dots, tail = letters.partition("...")
        names = [*head, *(f".{n}" for n in range(len(shape) - len(head + tail), 0, -1) if dots), *tail]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return math.prod(sizes.values())


def _attention(a: Mapping[str, Any], out: Tensor, of: Values) -> int:
    """`q kᵀ` and `p v`; a causal mask saves nothing here."""
    query, key, value = of(a["query"]), of(a["key"]), of(a["value"])
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return int(pairs * (query.shape[-1] + value.shape[-1]))


def _rounded_attention(a: Mapping[str, Any], out: Tensor, of: Values) -> int:
    """The same; its arguments have no names."""
    return _attention({"query": a["0"], "key": a["1"], "value": a["2"]}, out, of)


def _multihead(a: Mapping[str, Any], out: Any, of: Values) -> int:
    """The three projections in, the attention of every head, the projection out (Vaswani et al., 2017)."""
    query, key, value = of(a["query"]), of(a["key"]), of(a["value"])
    embed, kdim, vdim = a["embed_dim"], query.shape[-1] if a["kdim"] is None else a["kdim"], a["vdim"]
    rows_q, rows_k = query.numel() // query.shape[-1], key.numel() // key.shape[-1]
    sequence = (key.shape[1] if a["batch_first"] else key.shape[0]) if key.dim() == 3 else key.shape[0]
    projections = rows_q * embed * embed + rows_k * kdim * embed + (value.numel() // value.shape[-1]) * vdim * embed
    return int(projections + 2 * rows_q * sequence * embed + rows_q * embed * embed)


# They hold their weights; each output element sums over one filter, of `shape` without its outputs.
_HOLDERS = ("int_conv2d", "int_linear", "packed_conv2d", "dynamic_linear", "weight_only_linear", "weight_only_conv2d",
            "cuda_int8_linear", "cuda_int8_weight_linear", "cuda_int4_linear", "sparse24_linear")
_RECURRENT = ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell")


def _recurrent(node: fx.Node, of: Values) -> int:
    """Every step multiplies once with every weight matrix of every layer and direction."""
    x = of(node.args[0] if node.args else node.kwargs["input"])
    steps = x.numel() // x.shape[-1] if isinstance(x, Tensor) else 0
    return steps * sum(p.numel() for p in module_of(node).parameters() if p.dim() == 2)


_COUNTERS: Mapping[str, Counter] = {
    **{f"conv{n}d": _conv for n in (1, 2, 3)}, **{f"conv_transpose{n}d": _conv_transpose for n in (1, 2, 3)},
    "linear": _linear, "bilinear": _bilinear, "scaled_dot_product_attention": _attention,
    "rounded_attention": _rounded_attention,
    "multihead_attention": _multihead,
    "einsum": _einsum, **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot", "addmm", "baddbmm"), _product),
}
