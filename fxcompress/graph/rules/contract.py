"""Products of matrices: contracted labels unify, and the others go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ..coupling_flow import Dim, Dims, Flow, NoRuleError, Value, rule, shape_of
from .elementwise import broadcast
from .layout import tuple_of


@rule("linear")
def linear(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """`x @ weight.T + bias`, weight (out, in)."""
    dims = flow.of(args["input"])
    weight = flow.parameter(args, "weight")
    if weight is None:
        raise NoRuleError("has a weight that no rule follows")
    inner = flow.tie(dims[-1], weight[1])
    flow.consume_parameter(args, "weight", 1, inner)
    bias = flow.parameter(args, "bias")
    out = weight[0] if bias is None else flow.tie(weight[0], bias[0])
    source = flow.source(args, "weight")
    flow.produce(out, *([(source, 0)] if source else []))
    return (*dims[:-1], out)


@rule("bilinear")
def bilinear(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """`x1 · W · x2 + bias`, weight (out, in1, in2)."""
    one, two = flow.of(args["input1"]), flow.of(args["input2"])
    weight = flow.parameter(args, "weight")
    if weight is None:
        raise NoRuleError("has a weight that no rule follows")
    flow.consume_parameter(args, "weight", 1, flow.tie(one[-1], weight[1]))
    flow.consume_parameter(args, "weight", 2, flow.tie(two[-1], weight[2]))
    bias = flow.parameter(args, "bias")
    out = weight[0] if bias is None else flow.tie(weight[0], bias[0])
    source = flow.source(args, "weight")
    flow.produce(out, *([(source, 0)] if source else []))
    return (*_tied(flow, one[:-1], two[:-1]), out)


def _tied(flow: Flow, one: Dims, two: Dims) -> Dims:
    return tuple(flow.tie(a, b) for a, b in zip(one, two, strict=True))


def _made(flow: Flow, value: fx.Node, place: int, out: Dim) -> None:
    """A matrix that is a parameter makes the channels `out` of its dimension `place`."""
    if value.op == "get_attr" and out is not None and flow.has(str(value.target)):
        flow.produce(out, (str(value.target), len(shape_of(value)) + place))


@rule("matmul", "bmm", "mm")
def matmul(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """(..., m, k) @ (..., k, n); a vector on either side has only k."""
    a, b = args["input"], args["other"] if "other" in args else args["mat2"]
    return product(flow, a, b)


def product(flow: Flow, a: fx.Node, b: fx.Node) -> Dims:
    """The labels of `a @ b`."""
    left, right = flow.of(a), flow.of(b)
    if not left or not right:
        raise NoRuleError("multiplies something that isn't a tensor")
    row = -1 if len(right) == 1 else -2
    inner = flow.tie(left[-1], right[row])
    flow.consume(a, len(left) - 1, inner)
    if len(left) == 1 or len(right) == 1:
        rest = (left[:-1] if len(right) == 1 else (*right[:-2], right[-1]))
        return () if len(left) == len(right) == 1 else rest
    _made(flow, a, -2, left[-2])
    _made(flow, b, -1, right[-1])
    return (*broadcast(flow, [a, b], drop=2), left[-2], right[-1])


@rule("addmm", "baddbmm")
def addmm(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """`input + a @ b`, with broadcasting."""
    a, b = (args["mat1"], args["mat2"]) if "mat1" in args else (args["batch1"], args["batch2"])
    dims = list(product(flow, a, b))
    added, shape = flow.of(args["input"]), shape_of(args["input"])
    for place in range(-len(added), 0):
        if shape[place] != 1:
            dims[place] = flow.tie(dims[place], added[place])
    return tuple(dims)


@rule("mv")
def matrix_vector(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """(m, k) @ (k)."""
    return product(flow, args["input"], args["vec"])


@rule("dot")
def dot(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """(k) @ (k)."""
    return product(flow, args["input"], args["tensor"])


@rule("outer")
def outer(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """(m) and (n) make (m, n)."""
    return (flow.of(args["input"])[0], flow.of(args["vec2"])[0])


@rule("tensordot")
def tensordot(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Contracts the last dimensions of one with the first of the other, or those that are listed."""
    one, two, dims = flow.of(args["a"]), flow.of(args["b"]), args["dims"]
    if isinstance(dims, int):
        pairs = [(len(one) - dims + place, place) for place in range(dims)]
    else:
        pairs = [(a % len(one), b % len(two)) for a, b in zip(*map(tuple_of, dims), strict=True)]
    for a, b in pairs:
        flow.consume(args["a"], a, flow.tie(one[a], two[b]))
    rest = [place for place in range(len(two)) if place not in [b for _, b in pairs]]
    if args["b"].op == "get_attr" and flow.has(str(args["b"].target)):
        for place in rest:
            flow.produce(two[place], (str(args["b"].target), place))
    return (*(one[place] for place in range(len(one)) if place not in [a for a, _ in pairs]),
            *(two[place] for place in rest))


@rule("einsum")
def einsum(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Equal letters unify; those that the result lacks are contracted."""
    operands = args["operands"]
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(args["equation"], str):
        raise NoRuleError("gives its equation by numbers")
    left, result = _terms(args["equation"], [len(shape_of(operand)) for operand in operands])
    labels: dict[str, Dim] = {}
    sizes: dict[str, int] = {}
    for operand, letters in zip(operands, left, strict=True):
        if len(set(letters)) != len(letters):
            raise NoRuleError("takes a diagonal")
        for letter, dim, size in zip(letters, flow.of(operand), shape_of(operand), strict=True):
            if size != 1 or letter not in labels:
                known = letter in labels and sizes[letter] != 1
                labels[letter] = flow.tie(labels[letter], dim) if known else dim
                sizes[letter] = size
    for letter in labels.keys() - set(result):
        operand, letters = next((o, t) for o, t in zip(operands, left, strict=True) if letter in t)
        flow.consume(operand, letters.index(letter), labels[letter])
    for operand, letters in zip(operands, left, strict=True):
        if operand.op == "get_attr" and flow.has(str(operand.target)):
            for letter in set(letters) & set(result):
                flow.produce(labels[letter], (str(operand.target), letters.index(letter)))
    return tuple(labels[letter] for letter in result)


def _terms(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result; dimensions under an ellipsis get digits, from the right."""
    text, arrow, result = equation.replace(" ", "").partition("->")
    terms, width = [], 0
    for term, rank in zip(text.split(","), ranks, strict=True):
        spread = rank - len(term.replace("...", "")) if "..." in term else 0
        width = max(width, spread)
        terms.append(term.replace("...", "".join(chr(0x100 + place) for place in range(spread - 1, -1, -1))))
    ellipsis = "".join(chr(0x100 + place) for place in range(width - 1, -1, -1))
    if not arrow:
        letters = sorted(set(text) - set(",.")) if text else []
        result = ellipsis + "".join(letter for letter in letters if text.count(letter) == 1)
    return terms, result.replace("...", ellipsis)
