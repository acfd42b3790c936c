"""Attention: fused, and as PyTorch's module, whose heads can only leave once it is written out in canonical calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx, nn

from ..coupling_edit import Edit, resize
from ..coupling_flow import Dim, Dims, Flow, Value, rule, shape_of, untracked
from .attention_rewrite import write_out


@rule("scaled_dot_product_attention")
def fused(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """query (..., L, E), key (..., S, E), value (..., S, V) -> (..., L, V)."""
    query, key, value = (flow.of(args[name]) for name in ("query", "key", "value"))
    flow.consume(args["query"], len(query) - 1, flow.tie(query[-1], key[-1]))
    for dim in (key[-2], value[-2], query[-2]):
        flow.fix(dim, "attends over it")
    lead = list(_batch(flow, args, query[:-2], key[:-2], value[:-2]))
    mask, shape = flow.of(args["attn_mask"]), shape_of(args["attn_mask"])
    for place, dim in enumerate(mask):
        at = place - len(mask)
        if at >= -2:
            flow.fix(dim, "attends over it")
        elif shape[at] != 1:
            lead[at + 2] = flow.tie(lead[at + 2], dim)
    return (*lead, None, value[-1])


def _batch(flow: Flow, args: Mapping[str, Any], query: Dims, key: Dims, value: Dims) -> Dims:
    """The leading dimensions unify; with grouped queries each key head serves a run of query heads."""
    shapes = [shape_of(args[name])[:-2] for name in ("query", "key", "value")]
    result: list[Dim] = []
    for place in range(-max(len(shape) for shape in shapes), 0):
        dims = [(labels[place], shape[place]) for labels, shape in zip((query, key, value), shapes, strict=True)
                if len(shape) >= -place]
        full = max(size for _, size in dims)
        tied: Dim = None
        for number, (labels, size) in enumerate(entry for entry in dims if entry[1] != 1):
            spread = np.repeat(labels, full // size) if labels is not None and size != full else labels
            tied = spread if number == 0 else flow.tie(tied, spread)
        result.append(tied)
    return tuple(result)


@resize("scaled_dot_product_attention")
def keep_scale(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """The scale that the width of a head implied stays what it was."""
    if args["scale"] is None and edit.changed(edit.of(args["query"])[-1]):
        edit.set(node, scale=float(shape_of(args["query"])[-1]) ** -0.5)


@rule("multihead_attention")
def module(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """`nn.MultiheadAttention`: the width of its inputs, of its result, and between them its heads."""
    mha = flow.module()
    assert isinstance(mha, nn.MultiheadAttention)
    path = str(node.target)
    inner = _inner(flow, node, args, mha)
    sources = [args["query"], args["key"], args["value"]]
    if mha._qkv_same_embed_dim:
        weights = [(f"{path}.in_proj_weight", slice(None))] * 3
    else:
        weights = [(f"{path}.{name}_proj_weight", slice(None)) for name in "qkv"]
    for source, (name, _) in zip(sources, weights, strict=True):
        columns = flow.tensor(name)[1]
        flow.consume(name, 1, flow.tie(flow.of(source)[-1], columns))
    if mha._qkv_same_embed_dim:
        weights = weights[:1]
    rows = None if inner is None else np.tile(inner, 3)
    for name, _ in weights:
        flow.tie(flow.tensor(name)[0], rows if len(weights) == 1 else inner)
        flow.consume(name, 0, rows if len(weights) == 1 else inner)
    flow.produce(inner, *[(name, 0) for name, _ in weights])
    if flow.has(f"{path}.in_proj_bias"):
        flow.tie(flow.tensor(f"{path}.in_proj_bias")[0], rows)
        flow.consume(f"{path}.in_proj_bias", 0, rows)
    for name in (f"{path}.bias_k", f"{path}.bias_v"):  # (1, 1, inner): a key and a value beside the input's
        if flow.has(name):
            flow.tie(flow.tensor(name)[2], inner)
            flow.consume(name, 2, inner)
    out = flow.tensor(f"{path}.out_proj.weight")
    flow.consume(f"{path}.out_proj.weight", 1, flow.tie(out[1], inner))
    channels = out[0]
    if flow.has(f"{path}.out_proj.bias"):
        channels = flow.tie(channels, flow.tensor(f"{path}.out_proj.bias")[0])
    flow.produce(channels, (f"{path}.out_proj.weight", 0))
    return [(*flow.of(args["query"])[:-1], channels), untracked(node.meta["fxc"].shape[1])]


def _inner(flow: Flow, node: fx.Node, args: Mapping[str, Any], mha: nn.MultiheadAttention) -> Dim:
    """The labels of the rows between projections: one a head, or one an offset in every head."""
    heads, width = mha.num_heads, mha.head_dim
    whole = flow.split == "heads"
    labels = flow.fresh(heads if whole else width)
    inner = None if labels is None else np.repeat(labels, width) if whole else np.tile(labels, heads)
    if any(user.args[1] == 1 and user.users for user in node.users):
        flow.fix(inner, "gives its attention weights back")
    if len(shape_of(args["attn_mask"])) == 3:
        flow.fix(inner, "takes a mask for each head")
    if inner is not None:
        flow.heads.append((inner, inner))
    return inner


@resize("multihead_attention")
def written_out(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """Where a width changes, the module gives way to canonical calls on its own parameters."""
    path = str(node.target)
    mha = edit.flow.captured.module.get_submodule(path)
    assert isinstance(mha, nn.MultiheadAttention)
    names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    present = [f"{path}.{name}" for name in names if edit.flow.has(f"{path}.{name}")]
    tensors = {name: edit.flow.tensor(name) for name in present}
    if not any(edit.changed(dim) for dims in tensors.values() for dim in dims):
        return
    out = tensors[f"{path}.out_proj.weight"]
    inner = edit.size(out[1], mha.embed_dim)
    kept_heads = inner // mha.head_dim if edit.flow.split == "heads" else mha.num_heads

    def later() -> None:
        products = write_out(edit.flow.captured, node, mha, kept_heads, inner // kept_heads)
        edit.flow.captured.moved[node.name] = (products[-1].name,)  # its outputs are those that indices are told of

    edit.later.append(later)
