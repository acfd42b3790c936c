"""`nn.MultiheadAttention` written out as canonical calls on its own parameters.

The module stays as the holder of its parameters, so `state_dict` keys and the identity of parameters hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ...nn.mode import ByMode
from ..captured import Captured
from ..coupling_flow import shape_of
from ..ops import arguments, call


class _Writer:
    """Appends calls under the path of the module they replace."""

    def __init__(self, captured: Captured, node: fx.Node) -> None:
        self.captured, self.node, self.path = captured, node, str(node.target)
        self.graph = captured.module.graph

    def call(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        new = call(self.graph, kind, *args, **kwargs)
        return self._mark(new)

    def get(self, name: str) -> fx.Node | None:
        """A parameter of the module, or None where it has none."""
        owner = self.captured.module.get_submodule(self.path)
        return self._mark(self.graph.get_attr(f"{self.path}.{name}")) if getattr(owner, name) is not None else None

    def linear(self, name: str, *args: Any) -> fx.Node:
        """A projection, at a path of its own: there is an empty module, for what passes put beside its weight."""
        owner = self.captured.module.get_submodule(self.path)
        if name not in owner._modules:
            owner.add_module(name, nn.Module().train(owner.training))
        return self._mark(call(self.graph, "linear", *args), f"{self.path}.{name}")

    def module(self, name: str, *args: fx.Node) -> fx.Node:
        return self._mark(self.graph.call_module(f"{self.path}.{name}", args), f"{self.path}.{name}")

    def _mark(self, new: fx.Node, path: str | None = None) -> fx.Node:
        new.meta["path"] = path or self.path
        for key in ("origins", "nn_module_stack", "stack_trace", "source"):
            if key in self.node.meta:
                new.meta[key] = self.node.meta[key]
        return new


def write_out(captured: Captured, node: fx.Node, mha: nn.MultiheadAttention, heads: int,
              width: int) -> tuple[fx.Node, ...]:
    """Replace the call `node` of `mha`, which keeps `heads` heads of `width`; the scale is that of the old width.
    Returns the linear layers it becomes: `in_proj`, or `q_proj`, `k_proj` and `v_proj`; and `out_proj`.

    The formula is that of Vaswani et al., "Attention Is All You Need", 2017, section 3.2.
    """
    writer, args = _Writer(captured, node), arguments(node)
    with captured.module.graph.inserting_before(node):
        batched = len(shape_of(args["query"])) == 3
        projections, (query, key, value) = _projected(writer, args, mha, heads * width)
        key, value = (_with_learned(writer, part, name, batched, mha)
                      for part, name in ((key, "bias_k"), (value, "bias_v")))
        split = [_split(writer, part, heads, width, batched, mha.batch_first) for part in (query, key, value)]
        if mha.add_zero_attn:
            split[1:] = [writer.call("pad", part, (0, 0, 0, 1)) for part in split[1:]]
        weights_used = any(user.args[1] == 1 and user.users for user in node.users)
        mask = _mask(writer, args, batched, heads)
        extra = (mha.bias_k is not None) + mha.add_zero_attn  # keys that every query may attend to
        if mask is not None and extra:
            mask = writer.call("pad", mask, (0, extra))
        scale = float(mha.head_dim) ** -0.5
        if not weights_used:
            mixed, weights = writer.call("scaled_dot_product_attention", *split, attn_mask=mask,
                                         dropout_p=_rate(writer, mha), scale=scale), None
        else:
            mixed, weights = _explicit(writer, split, mask, scale, mha)
        result = writer.module("out_proj", _joined(writer, mixed, heads * width, batched, mha.batch_first))
        if weights is not None and args["average_attn_weights"]:
            weights = writer.call("mean", weights, dim=-3)
    for user in list(node.users):
        taken = result if user.args[1] == 0 else weights or result
        taken.meta["fxc"] = user.meta["fxc"]  # for those written out after it; `refresh` brings it up to date
        user.replace_all_uses_with(taken)
        captured.module.graph.erase_node(user)
    captured.module.graph.erase_node(node)
    products = (*projections, result)
    captured.moved[node.name] = tuple(product.name for product in products)
    return products


def _rate(writer: _Writer, mha: nn.MultiheadAttention) -> fx.Node | float:
    """The share of attention weights that are dropped in training."""
    if not mha.dropout:
        return 0.0
    mha.add_module("_dropout_p", ByMode(mha.dropout, 0.0).train(mha.training))
    return writer.module("_dropout_p")


def _projected(writer: _Writer, args: Mapping[str, Any], mha: nn.MultiheadAttention,
               inner: int) -> tuple[list[fx.Node], list[fx.Node]]:
    """The projections, and what they give: queries, keys and values."""
    sources = [args["query"], args["key"], args["value"]]
    bias = writer.get("in_proj_bias")
    if mha._qkv_same_embed_dim and sources[0] is sources[1] is sources[2]:
        packed = writer.linear("in_proj", sources[0], writer.get("in_proj_weight"), bias)
        return [packed], _parts(writer, packed, inner, -1)
    biases: list[Any] = [None] * 3 if bias is None else _parts(writer, bias, inner, 0)
    if mha._qkv_same_embed_dim:
        whole = writer.get("in_proj_weight")
        assert whole is not None
        weights: list[Any] = _parts(writer, whole, inner, 0)
    else:
        weights = [writer.get(f"{name}_proj_weight") for name in "qkv"]
    made = [writer.linear(f"{name}_proj", source, weight, part)
            for name, source, weight, part in zip("qkv", sources, weights, biases, strict=True)]
    return made, made


def _parts(writer: _Writer, whole: fx.Node, size: int, dim: int) -> list[fx.Node]:
    split = writer.call("split", whole, size, dim=dim)
    return [writer.call("getitem", split, place) for place in range(3)]


def _with_learned(writer: _Writer, value: fx.Node, name: str, batched: bool, mha: nn.MultiheadAttention) -> fx.Node:
    """Keys or values with the learned one of the module, (1, 1, inner), at the end of the sequence, if it has any."""
    learned = writer.get(name)
    if learned is None:
        return value
    if not batched:
        return writer.call("cat", (value, writer.call("squeeze", learned, 0)), dim=0)
    batch = 0 if mha.batch_first else 1
    sizes: list[Any] = [-1, -1, -1]
    sizes[batch] = writer.call("size", value, batch)
    return writer.call("cat", (value, writer.call("expand", learned, *sizes)), dim=1 - batch)


def _split(writer: _Writer, value: fx.Node, heads: int, width: int, batched: bool, batch_first: bool) -> fx.Node:
    """(N, L, inner) or (L, N, inner) -> (N, heads, L, width); (L, inner) -> (heads, L, width)."""
    parts = writer.call("unflatten", value, -1, (heads, width))
    if not batched:
        return writer.call("transpose", parts, 0, 1)
    return writer.call("transpose", parts, 1, 2) if batch_first else writer.call("permute", parts, 1, 2, 0, 3)


def _joined(writer: _Writer, value: fx.Node, inner: int, batched: bool, batch_first: bool) -> fx.Node:
    """The way back."""
    if not batched:
        rows = writer.call("transpose", value, 0, 1)
    else:
        rows = writer.call("transpose", value, 1, 2) if batch_first else writer.call("permute", value, 2, 0, 1, 3)
    return writer.call("flatten", rows, start_dim=-2)


def _mask(writer: _Writer, args: Mapping[str, Any], batched: bool, heads: int) -> fx.Node | None:
    """One additive mask of the attention mask and the padding of the keys: where a boolean one is true, nothing is
    attended to."""
    given, padding = args["attn_mask"], args["key_padding_mask"]
    mask = None if given is None else _additive(writer, given, args["query"])
    if batched and len(shape_of(given)) == 3:  # one for each sample and head
        mask = writer.call("unflatten", mask, 0, (-1, heads))
    if padding is not None:
        padding = _additive(writer, padding, args["query"])
        for place in ((1, 1) if batched else (0, 0)):
            padding = writer.call("unsqueeze", padding, place)
        mask = padding if mask is None else writer.call("add", mask, padding)
    return mask


def _additive(writer: _Writer, mask: fx.Node, like: fx.Node) -> fx.Node:
    if str(getattr(mask.meta.get("fxc"), "dtype", "")) != "torch.bool":
        return mask
    zeros = writer.call("to", mask, dtype=getattr(like.meta["fxc"], "dtype", None))
    zeros = writer.call("mul", zeros, 0.0)
    return writer.call("masked_fill", zeros, mask, float("-inf"))


def _explicit(writer: _Writer, split: list[fx.Node], mask: fx.Node | None, scale: float,
              mha: nn.MultiheadAttention) -> tuple[fx.Node, fx.Node]:
    """The product written out, for attention weights that are dropped in training or given back."""
    query, key, value = split
    scores = writer.call("matmul", writer.call("mul", query, scale), writer.call("transpose", key, -2, -1))
    scores = scores if mask is None else writer.call("add", scores, mask)
    weights = writer.call("softmax", scores, dim=-1)
    if mha.dropout:
        mha.add_module("attn_dropout", nn.Dropout(mha.dropout).train(mha.training))
        weights = writer.module("attn_dropout", weights)
    return writer.call("matmul", weights, value), weights
