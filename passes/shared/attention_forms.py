"""Attention that a model writes out itself, as one call of `scaled_dot_product_attention`.

What is looked for is softmax(scale · q kᵀ + mask) v, with a dropout on the weights or none (Vaswani et al., "Attention
Is All You Need", 2017, section 3.2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import arguments, call, kind_of, path_of
from fxcompress.graph.provenance import inherit
from fxcompress.nn.mode import ByMode
from fxcompress.passes.shared.attention import KIND, drops

_PRODUCTS = {"matmul": ("input", "other"), "bmm": ("input", "mat2")}  # the names of both sides
_FAR = -1e9  # what a masked score becomes, at the most: beside it the score itself is lost in float32


class _UnlikeError(Exception):
    """Why something is no attention of the form above."""


@dataclass(frozen=True)
class _Product:
    """A product of two values over their last dimensions but for the order: `left` · `right`, or `left` · `right`ᵀ."""

    left: fx.Node
    right: fx.Node
    turns: bool = False

    @classmethod
    def of(cls, node: fx.Node) -> _Product | None:
        """What `node` multiplies; None for another operation."""
        values, names = arguments(node), _PRODUCTS.get(kind_of(node))
        if names is not None:
            left, right = (values[name] for name in names)
            return cls(left, right)
        if kind_of(node) != "einsum" or len(values["operands"]) != 2:
            return None
        sides, _, result = str(values["equation"]).replace(" ", "").replace("...", "_").partition("->")
        one, _, other = sides.partition(",")
        if min(len(one), len(other)) < 2:
            return None
        batch, rows, inner = one[:-2], one[-2], one[-1]
        left, right = values["operands"]
        for turns, columns in ((False, other[-1]), (True, other[-2])):
            last = columns + inner if turns else inner + columns
            if columns not in one and other == batch + last and result == batch + rows + columns:
                return cls(left, right, turns)
        return None


@dataclass(frozen=True)
class _Form:
    """`end` gives what attention gives; `keys` has the keys on its right side; where `mask` is true scores become
    `fill`, or it is added to them where that is None."""

    keys: _Product
    value: fx.Node
    end: fx.Node
    scale: float
    mask: fx.Node | None
    fill: float | None
    dropout: fx.Node | None


def gather(captured: Captured, softmax: fx.Node) -> fx.Node | str:
    """Make the attention whose weights `softmax` gives one call, in place, and return that; or why it can't be. The
    caller refreshes."""
    try:
        form = _form(softmax)
        rate = _rate(captured, form.dropout)
    except _UnlikeError as unlike:
        return str(unlike)
    graph, made = captured.graph, []

    def add(kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        made.append(call(graph, kind, *args, **kwargs))
        return made[-1]

    with graph.inserting_before(form.end):
        mask = form.mask
        if form.fill is not None:
            mask = add("masked_fill", add("mul", add("to", mask, dtype=torch.float32), 0.0), mask, form.fill)
        if isinstance(rate, ByMode):
            path = f"{form.end.name}_drops"
            captured.module.add_module(path, rate.train(captured.module.training))
            made.append(graph.call_module(path))
            rate = made[-1]
        key = form.keys.right
        if not form.keys.turns:
            key = arguments(key)["input"] if _turns(key) else add("transpose", key, -2, -1)
        found = add(KIND, form.keys.left, key, form.value, attn_mask=mask, dropout_p=rate, scale=form.scale)
    for node in made:
        node.meta["path"] = path_of(form.end)
        inherit(node, form.end)
    form.end.replace_all_uses_with(found)
    graph.erase_node(form.end)
    captured.moved[form.end.name] = (found.name,)
    return found


def _form(softmax: fx.Node) -> _Form:
    values, rank = arguments(softmax), len(_shape(softmax))
    if values["dim"] not in (-1, rank - 1) or values["dtype"] not in (None, torch.float32):
        raise _UnlikeError("its softmax isn't over the keys, in float32")
    weights, dropout = softmax, None
    user = _reader(softmax)
    while kind_of(user) == "to" or (kind_of(user) == "dropout" and dropout is None):
        dropout = user if kind_of(user) == "dropout" else dropout
        weights, user = user, _reader(user)
    result = _Product.of(user)
    scores, mask, fill = _unmasked(_source(softmax))
    scale, product = _unscaled(scores)
    keys = _Product.of(product)
    if keys is None or result is None or result.turns or result.left is not weights:
        raise _UnlikeError("between its products is more than a scale, a mask, a softmax and a dropout")
    shapes = [_shape(node) for node in (keys.left, keys.right, result.right)]
    if len({shape[:-2] for shape in shapes}) > 1 or len(shapes[0]) < 3 or _shape(product) != _shape(softmax):
        raise _UnlikeError("queries, keys and values have different numbers of samples or heads")
    return _Form(keys, result.right, user, scale, mask, fill, dropout)


def _reader(node: fx.Node) -> fx.Node:
    """The only node that reads `node`."""
    if len(node.users) != 1:
        raise _UnlikeError(f"{node.name} is read elsewhere too")
    return next(iter(node.users))


def _source(node: fx.Node) -> fx.Node:
    """What `node` reads, which nothing else does."""
    source: fx.Node = arguments(node)["input"]
    while kind_of(source) == "to":
        _reader(source)
        source = arguments(source)["input"]
    _reader(source)
    return source


def _unmasked(scores: fx.Node) -> tuple[fx.Node, fx.Node | None, float | None]:
    """The scores before they were masked, the mask, and what masked ones become; None for a mask that is added."""
    values = arguments(scores)
    if kind_of(scores) == "masked_fill":
        fill = values["value"]
        if not isinstance(fill, int | float) or fill > _FAR:
            raise _UnlikeError(f"masked scores become {fill}: the scores would not be lost in it")
        return _source(scores), values["mask"], float(fill)
    if kind_of(scores) != "add":
        return scores, None, None
    for one, other in (("input", "other"), ("other", "input")):
        side, mask = values[one], values[other]
        if isinstance(side, fx.Node) and isinstance(mask, fx.Node) and _Product.of(_unscaled(side)[1]) is not None:
            _reader(side)
            if getattr(mask.meta.get("fxc"), "dtype", None) is not torch.float32:
                raise _UnlikeError("its mask isn't in float32")
            return side, mask, None
    return scores, None, None


def _unscaled(scores: fx.Node) -> tuple[float, fx.Node]:
    """What the scores are multiplied by, and what they were before."""
    scale = 1.0
    while kind_of(scores) in ("mul", "div"):
        values, divides = arguments(scores), kind_of(scores) == "div"
        one, number = values["input"], values["other"]
        if isinstance(one, int | float) and not divides:
            one, number = number, one
        if not isinstance(one, fx.Node) or not isinstance(number, int | float) or (divides and not number):
            break
        scale = scale / number if divides else scale * number
        scores = one
    return scale, scores


def _turns(node: fx.Node) -> bool:
    """Whether `node` exchanges the last two dimensions."""
    if kind_of(node) != "transpose":
        return False
    values, rank = arguments(node), len(_shape(node))
    return {values["dim0"] % rank, values["dim1"] % rank} == {rank - 1, rank - 2}


def _rate(captured: Captured, dropout: fx.Node | None) -> Any:
    """The share of weights that is dropped: a number, a node that gives it, or the module for one."""
    if dropout is None:
        return 0.0
    values = arguments(dropout)
    rate, acts = values["p"], values.get("training", True)
    by_mode = dropout.op == "call_module" or (isinstance(acts, fx.Node) and drops(acts) == 1.0)
    if not rate or acts is False:
        return 0.0
    if by_mode and isinstance(rate, int | float):
        return ByMode(float(rate), 0.0)
    if drops(rate) is None or not (by_mode or acts is True):
        raise _UnlikeError("its dropout acts in evaluation too")
    return rate


def _shape(node: fx.Node) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta["fxc"].shape
    return shape
