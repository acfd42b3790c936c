"""The facts that predicates in selectors ask for: `conv2d[out_channels >= 64, params > 100k]`. One table, `PROPERTIES`.

A property gives None for a node that has no such fact.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..policy.selector import Predicate
from .captured import Captured
from .ops import ON_WEIGHTS, arguments, kind_of, path_of
from .pattern import glob, regex

Value = float | bool | str | tuple[float, ...] | None

_CONV = re.compile(r"conv(_transpose)?\dd")
_CHANNEL_NORM = re.compile(r"(batchnorm|instancenorm)\dd|groupnorm")
_RECURRENT = re.compile(r"(lstm|gru|rnn)(_cell)?")


@dataclass(frozen=True)
class Property:
    """A fact of nodes: its name and doc line for the language reference, and how it is read: from one node, or from the
    whole graph for all nodes at once."""

    name: str
    doc: str
    get: Callable[[fx.Node], Value] = lambda node: None
    whole: Callable[[Captured], Mapping[fx.Node, Value]] | None = None


def shape_of(value: object) -> tuple[int, ...] | None:
    """The shape of an argument: a tensor, or a node with a fact; None for anything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, fx.Node):
        shape = getattr(value.meta.get("fxc"), "shape", None)
        return tuple(shape) if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape) else None
    return None


def _weight_size(kinds: re.Pattern[str], dim: int) -> Callable[[fx.Node], Value]:
    """Size `dim` of the weight of the operators whose kind matches."""

    def get(node: fx.Node) -> Value:
        if not kinds.fullmatch(kind_of(node)):
            return None
        shape = shape_of(arguments(node).get("weight"))
        return shape[dim] if shape is not None and len(shape) > dim else None

    return get


def _channels(side: int) -> Callable[[fx.Node], Value]:
    """Output (side 0) or input (side 1) channels of a convolution. Weights are [out, in / groups, ...]; those of
    transposed convolutions are [in, out / groups, ...]."""

    def get(node: fx.Node) -> Value:
        kind = kind_of(node)
        if not _CONV.fullmatch(kind):
            return None
        given = arguments(node)
        shape = shape_of(given.get("weight"))
        if shape is None:
            return None
        dim = 1 - side if kind.startswith("conv_transpose") else side
        return shape[dim] * (int(given["groups"]) if dim == 1 else 1)

    return get


def _kernel(node: fx.Node) -> Value:
    given = arguments(node)
    if _CONV.fullmatch(kind_of(node)):
        shape = shape_of(given.get("weight"))
        return tuple(float(size) for size in shape[2:]) if shape is not None else None
    return _sizes(given.get("kernel_size"))


def _sizes(value: object) -> Value:
    """A setting that is one number or one for each dimension; None where it isn't known before running."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list) and value and all(isinstance(size, int | float) for size in value):
        return tuple(float(size) for size in value)
    return None


def _setting(name: str, kinds: re.Pattern[str] | None = None) -> Callable[[fx.Node], Value]:
    """An argument of the call or setting of the module by its canonical name."""

    def get(node: fx.Node) -> Value:
        if kinds is not None and not kinds.fullmatch(kind_of(node)):
            return None
        return _sizes(arguments(node).get(name))

    return get


def _heads(node: fx.Node) -> Value:
    """Attention heads: the module's, or the third size from the end of the query [..., heads, tokens, head_dim]."""
    kind = kind_of(node)
    if kind == "multihead_attention":
        return int(arguments(node)["num_heads"])
    query = shape_of(arguments(node).get("query")) if kind == "scaled_dot_product_attention" else None
    return query[-3] if query is not None and len(query) > 3 else None


def _has_bias(node: fx.Node) -> Value:
    given = arguments(node)
    return given["bias"] is not None and given["bias"] is not False if "bias" in given else None


def _depthwise(node: fx.Node) -> Value:
    inputs = PROPERTIES["in_channels"].get(node)
    return None if inputs is None else inputs == _setting("groups")(node) != 1


def _rank(node: fx.Node) -> Value:
    shape = shape_of(node)
    return None if shape is None else len(shape)


def _dtype(node: fx.Node) -> Value:
    dtype = getattr(node.meta.get("fxc"), "dtype", None)
    return None if dtype is None or isinstance(dtype, tuple) else DTYPES.get(str(dtype), str(dtype))


DTYPES: Mapping[str, str] = {  # the names of the policy language for torch's
    "torch.float64": "f64", "torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16",
    "torch.int64": "i64", "torch.int32": "i32", "torch.int16": "i16", "torch.int8": "i8", "torch.uint8": "u8",
    "torch.bool": "bool",
}

def held(node: fx.Node, name: str) -> int:
    """`params` or `bytes` of what a node holds and of the parameters behind its arguments, masked or not; masks
    and quantizers count nothing."""
    total = _fact_number(node, name) if kind_of(node) not in ON_WEIGHTS else 0
    ahead, seen = list(node.all_input_nodes), set()
    while ahead:
        source = ahead.pop()
        if source not in seen and (source.op == "get_attr" or kind_of(source) in ON_WEIGHTS):
            seen.add(source)
            total += _fact_number(source, name) if source.op == "get_attr" else 0
            ahead.extend(source.all_input_nodes[:1])  # a quantizer reads the factors of a norm too, which aren't its
    return total


def _fact_number(node: fx.Node, name: str) -> int:
    return int(getattr(node.meta.get("fxc"), name, 0))


def macs(captured: Captured) -> Mapping[fx.Node, int]:
    """Multiply-accumulates of each node for one sample: of the example's batch, divided by its size."""
    batch = max(1, captured.example.batch)
    return {node: _fact_number(node, "macs") // batch for node in captured.module.graph.nodes}


def depths(captured: Captured) -> Mapping[fx.Node, Value]:
    """For each node, how many operators with parameters lie before it on the longest way from an input: linear time."""
    found: dict[fx.Node, int] = {}
    for node in captured.module.graph.nodes:
        found[node] = max((found[source] + _has_parameters(source) for source in node.all_input_nodes), default=0)
    return found


def _has_parameters(node: fx.Node) -> bool:
    return node.op != "get_attr" and kind_of(node) not in ON_WEIGHTS and held(node, "params") > 0


_LINEAR = re.compile("linear")
_EMBEDDING = re.compile("embedding(_bag)?")
_NORMS = re.compile(_CHANNEL_NORM.pattern + "|layernorm|rmsnorm")

PROPERTIES: Mapping[str, Property] = {prop.name: prop for prop in (
    Property("name", "the module path, as `model.named_modules()` gives it; for a function that of the module it is "
             "called in, or the node's own name", path_of),
    Property("params", "parameters that the operator reads, masked or not",
             lambda node: held(node, "params")),
    Property("macs", "multiply-accumulates of one sample", whole=macs),
    Property("bytes", "bytes of those parameters and of the operator's buffers",
             lambda node: held(node, "bytes")),
    Property("out_channels", "output channels of a convolution", _channels(0)),
    Property("in_channels", "input channels of a convolution, of all groups", _channels(1)),
    Property("kernel_size", "kernel size of a convolution or pool; a number compares with every dimension", _kernel),
    Property("stride", "stride of a convolution or pool", _setting("stride")),
    Property("padding", "padding of a convolution or pool", _setting("padding")),
    Property("dilation", "dilation of a convolution or pool", _setting("dilation")),
    Property("groups", "groups of a convolution", _setting("groups", _CONV)),
    Property("depthwise", "whether a convolution has as many groups as input channels", _depthwise),
    Property("out_features", "outputs of a linear layer", _weight_size(_LINEAR, 0)),
    Property("in_features", "inputs of a linear layer", _weight_size(_LINEAR, 1)),
    Property("channels", "channels that a normalisation scales", _weight_size(_NORMS, 0)),
    Property("embeddings", "rows of an embedding table", _weight_size(_EMBEDDING, 0)),
    Property("embedding_dim", "width of an embedding table", _weight_size(_EMBEDDING, 1)),
    Property("hidden_size", "hidden size of a recurrent layer", _setting("hidden_size", _RECURRENT)),
    Property("heads", "heads of an attention", _heads),
    Property("bias", "whether the operator has a bias", _has_bias),
    Property("rank", "dimensions of the result, the batch included", _rank),
    Property("dtype", 'type of the result: "f32", "bf16", "i64", ...', _dtype),
    Property("depth", "operators with parameters before this one, on the longest way from an input",
             whole=depths),
)}


COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}


def holds(predicate: Predicate, value: Value) -> bool:
    """Whether a node whose fact is `value` (not None) satisfies `predicate`. A size for each dimension satisfies a
    comparison with one number when every dimension does; `!=` is the opposite of `==`."""
    if predicate.op == "~":
        return matches(predicate, str(value))
    if isinstance(value, str) is not isinstance(predicate.value, str):
        return predicate.op == "!="  # `padding = "same"` beside a number
    if isinstance(value, tuple):
        if predicate.op == "!=":
            return not all(size == predicate.value for size in value)
        return all(COMPARE[predicate.op](size, predicate.value) for size in value)
    return COMPARE[predicate.op](value, predicate.value)


def matches(predicate: Predicate, path: str) -> bool:
    """Whether the glob or regular expression of a `~` predicate matches the whole of `path`. Raises PatternError."""
    text = str(predicate.value)
    return regex(text).fullmatch(path) is not None if predicate.is_regex else glob(text).matches(path)
