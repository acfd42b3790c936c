"""Attention with rounded values: `scaled_dot_product_attention` written out as two products of values that quantizers
round, and found again.

Queries and weights lie on grids that count from 0, keys and values on signed ones, as values and weights of layers do:
runtimes multiply such integers. What follows a product is in float: the scale, the mask and the softmax.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import arguments, call, kind_of, module_of, named_call, op_of, path_of
from fxcompress.graph.provenance import inherit
from fxcompress.nn.mode import ByMode
from fxcompress.nn.quantizer import Quantizer
from fxcompress.passes.shared.integer import role_of

KIND = "scaled_dot_product_attention"
PARTS = ("query", "key", "value", "weights")  # what is rounded
RESULT = "_result"  # the end of the name of the second product
_LEAST = torch.finfo(torch.float32).min  # a product that is masked: no row of a softmax is without a number
_CARRIES = ("shape", "index")  # families of operators that give what they read
_BETWEEN = ("transpose", "dropout")  # what may stand between a quantizer and the product that reads it


@dataclass(frozen=True)
class Attention:
    """A written-out attention: the calls of its quantizers by their part; `end`, the second product, which gives what
    attention gives; the mask as `scaled_dot_product_attention` takes it."""

    rounded: dict[str, fx.Node]
    end: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float

    @property
    def floats(self) -> list[fx.Node]:
        """Queries, keys and values before they are rounded, and the mask, if there is one."""
        read = [self.rounded[part].args[0] for part in PARTS[:3]]
        return [node for node in (*read, self.mask) if isinstance(node, fx.Node)]


def fed_by(captured: Captured, products: Iterable[fx.Node]) -> list[fx.Node]:
    """The attention whose values `products` give: rotary queries and keys come from more than a layer, values don't."""
    chosen = set(products)
    return [node for node in captured.graph.nodes if kind_of(node) == KIND
            and _giver(arguments(node)["value"]) in chosen]


def by_hand(captured: Captured, products: Iterable[fx.Node]) -> list[fx.Node]:
    """The softmaxes whose weights a product multiplies with values that `products` give: attention that the model
    writes out itself."""
    chosen = set(products)
    return [node for node in captured.graph.nodes if kind_of(node) == "softmax" and any(
        _giver(value) in chosen for value in _multiplied_by(node))]


def _multiplied_by(weights: fx.Node) -> Iterator[fx.Node]:
    """What products multiply `weights` with."""
    for user in weights.users:
        if kind_of(user) in ("dropout", "to"):
            yield from _multiplied_by(user)
        elif kind_of(user) in ("matmul", "bmm", "einsum"):
            yield from (node for node in user.all_input_nodes if node is not weights)


def _giver(value: fx.Node) -> fx.Node | None:
    """What gives the numbers of `value`, behind what only moves them."""
    node: fx.Node | None = value
    while node is not None and role_of(node) != "product":
        op = op_of(node)
        moves = role_of(node) in ("passes", "joins") or (op is not None and op.family in _CARRIES)
        node = next(iter(node.all_input_nodes), None) if moves else None
    return node


def why_not(node: fx.Node) -> str | None:
    """Why the attention `node` can't be written out with rounded values, or None."""
    values = arguments(node)
    if values["enable_gqa"]:
        return "its queries have more heads than its keys (`enable_gqa`)"
    if any(getattr(values[part].meta.get("fxc"), "dtype", None) is not torch.float32 for part in PARTS[:3]):
        return "it doesn't compute in float32"
    if not isinstance(values["scale"], int | float | None):
        return "its scale is computed"
    return None if drops(values["dropout_p"]) is not None else "its dropout acts in evaluation too"


def drops(rate: Any) -> float | None:
    """The share of weights that is dropped in training alone; None where some are in evaluation too."""
    if isinstance(rate, fx.Node):
        switch = module_of(rate) if rate.op == "call_module" else None
        return float(switch.train_value) if isinstance(switch, ByMode) and switch.eval_value == 0 else None
    return None if rate else 0.0


class Writer:
    """Writes attention out in the place of the call `node`."""

    def __init__(self, captured: Captured, node: fx.Node) -> None:
        self.captured, self.node, self.values = captured, node, arguments(node)
        self.made: list[fx.Node] = []

    def call(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A canonical call."""
        return self._mark(call(self.captured.graph, kind, *args, **kwargs))

    def product(self, suffix: str, left: fx.Node, right: fx.Node) -> fx.Node:
        """A product of two values, which goes by the name of the attention."""
        return self._mark(named_call(self.captured.graph, f"{self.node.name}{suffix}", "matmul", left, right))

    def quantizer(self, part: str, quantizer: Quantizer, source: fx.Node) -> fx.Node:
        """`source`, rounded."""
        path = f"{self.node.name}_{part}_quantizer"
        self.captured.module.add_module(path, quantizer)
        return self._mark(self.captured.graph.call_module(path, (source,)))

    def write(self, quantizers: dict[str, Quantizer]) -> list[fx.Node]:
        """The new nodes; the last gives what attention gives. `node` is gone afterwards."""
        values, graph = self.values, self.captured.graph
        scale = values["scale"] if values["scale"] is not None else values["query"].meta["fxc"].shape[-1] ** -0.5
        with graph.inserting_before(self.node):
            query, key, value = (self.quantizer(part, quantizers[part], values[part]) for part in PARTS[:3])
            scores = self.product("_scores", query, self.call("transpose", key, -2, -1))
            weights = self.call("softmax", self._masked(self.call("mul", scores, float(scale))), dim=-1)
            weights = self._dropped(self.quantizer(PARTS[3], quantizers[PARTS[3]], weights))
            end = self.product(RESULT, weights, value)
        self.node.replace_all_uses_with(end)
        graph.erase_node(self.node)
        self.captured.moved[self.node.name] = (end.name,)
        return self.made

    def _masked(self, scores: fx.Node) -> fx.Node:
        mask = self.values["attn_mask"]
        if self.values["is_causal"]:
            sizes = [self.call("size", scores, dim) for dim in (-2, -1)]
            later = self.call("gt", self.call("triu", self.call("new_ones", scores, *sizes), 1), 0)
            return self.call("masked_fill", scores, later, _LEAST)
        if mask is None:
            return scores
        if mask.meta["fxc"].dtype is torch.bool:
            return self.call("masked_fill", scores, self.call("logical_not", mask), _LEAST)
        return self.call("add", scores, mask)

    def _dropped(self, weights: fx.Node) -> fx.Node:
        rate = drops(self.values["dropout_p"])
        if not rate:
            return weights
        path = f"{self.node.name}_drops"
        self.captured.module.add_module(path, ByMode(True, False).train(self.captured.module.training))
        switch = self._mark(self.captured.graph.call_module(path))
        return self.call("dropout", weights, p=rate, training=switch)

    def _mark(self, new: fx.Node) -> fx.Node:
        new.meta["path"] = path_of(self.node)
        inherit(new, self.node)
        self.made.append(new)
        return new


def attentions(captured: Captured) -> Iterator[Attention]:
    """What was written out, in a graph for evaluation, in its order."""
    for node in captured.graph.nodes:
        found = attention_at(node)
        if found is not None:
            yield found


def multiplies_values(node: fx.Node) -> bool:
    """Whether `node` is a product of two rounded values."""
    return kind_of(node) == "matmul" and all(
        _rounded(_behind(arguments(node)[side], *_BETWEEN)) for side in ("input", "other"))


def attends(quantizer: fx.Node) -> bool:
    """Whether a product of two rounded values reads what `quantizer` gives."""
    users = [user for node in quantizer.users for user in (
        node.users if kind_of(node) in _BETWEEN else (node,))]
    return any(multiplies_values(user) for user in users)


def attention_at(end: fx.Node) -> Attention | None:
    """The attention whose second product is `end`."""
    if not multiplies_values(end):
        return None
    weights, value = (arguments(end)[side] for side in ("input", "other"))
    softmax = weights.args[0] if _rounded(weights) else None
    scaled, mask, causal = _unmasked(_read(softmax, "softmax"))
    scores = _read(scaled, "mul")
    if scores is None or not multiplies_values(scores):
        return None
    query, turned = (arguments(scores)[side] for side in ("input", "other"))
    rounded = dict(zip(PARTS, (query, _read(turned, "transpose"), value, weights), strict=True))
    if not all(_rounded(node) for node in rounded.values()):
        return None
    scale = arguments(scaled)["other"] if scaled is not None else None
    return Attention(rounded, end, mask, causal, scale) if isinstance(scale, float) else None


def _unmasked(scores: fx.Node | None) -> tuple[fx.Node | None, fx.Node | None, bool]:
    """The products before they were masked, by what they were, and whether it was by their order."""
    if scores is not None and kind_of(scores) == "add":
        return arguments(scores)["input"], arguments(scores)["other"], False
    if scores is None or kind_of(scores) != "masked_fill":
        return scores, None, False
    values = arguments(scores)
    given = _read(values["mask"], "logical_not")
    return values["input"], given, given is None


def _read(node: Any, kind: str) -> fx.Node | None:
    """What `node`, of that kind, reads."""
    found = arguments(node)["input"] if isinstance(node, fx.Node) and kind_of(node) == kind else None
    return found if isinstance(found, fx.Node) else None


def _behind(node: Any, *kinds: str) -> Any:
    while isinstance(node, fx.Node) and kind_of(node) in kinds:
        node = arguments(node)["input"]
    return node


def _rounded(node: Any) -> bool:
    return isinstance(node, fx.Node) and kind_of(node) == "quantizer"
