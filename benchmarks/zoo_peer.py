"""Torch-Pruning on one model of the zoo, with the settings that its examples recommend."""

from __future__ import annotations

import time
from typing import Any

RATIO = 0.5


def peer(entry: Any, result: dict[str, Any], brief: bool) -> None:
    """Fill `result` by pruning with Torch-Pruning: outputs are ignored, head counts told, both found by hand there."""
    import torch
    import torch_pruning as tp
    from torch import nn

    from zoo_worker import WrongError, layer_sizes, little, parameters, tensors, thinner

    tp.pruner.MetaPruner(*little(), importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=RATIO).step()
    model = entry.build()
    x = entry.inputs(model)
    with torch.no_grad():
        dense = tensors(model(x))  # their shapes say which layers are outputs
    layers = layer_sizes(model)
    heads = _heads(model)
    ignored = _outputs(entry, model, {t.shape[1] for t in dense if t.dim() > 1})
    result.update(params_before=parameters(model), stage="trace")
    start = time.process_time()
    pruner = tp.pruner.MetaPruner(
        model, x, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=RATIO, ignored_layers=ignored,
        num_heads=heads, unwrapped_parameters=_unwrapped(model), output_transform=lambda out: sum(
            t.sum() for t in tensors(out)))
    mid = time.process_time()
    result.update(seconds_trace=mid - start, stage="prune")
    pruner.step()
    result.update(seconds_prune=time.process_time() - mid, stage="run")
    if brief:
        result.update(params_after=parameters(model), ok=True, stage="")
        return
    _follow(model, heads, pruner)
    with torch.no_grad():
        thin = tensors(model(x))
    if [t.shape for t in dense] != [t.shape for t in thin]:
        raise WrongError("the outputs have other shapes than before")
    result.update(params_after=parameters(model), share_thinner=thinner(layers, model), stage="", ok=True)
    if not isinstance(model, nn.Module) or result["params_after"] >= result["params_before"]:
        raise WrongError("nothing was pruned")


def _heads(model: Any) -> dict[Any, int]:
    """Head counts of `nn.MultiheadAttention` and of modules with a `qkv` layer, as its examples give them."""
    from torch import nn

    heads = {}
    for module in model.modules():
        count = getattr(module, "num_heads", None)
        if isinstance(module, nn.MultiheadAttention):
            heads[module] = module.num_heads
        elif isinstance(count, int) and isinstance(getattr(module, "qkv", None), nn.Linear):
            heads[module.qkv] = count
    return heads


def _outputs(entry: Any, model: Any, widths: set[int]) -> list[Any]:
    """The classifiers: linear layers and convolutions as wide as the output; the last layers of segmentation heads."""
    from torch import nn

    if entry.suite == "segmentation":
        last = [head for name in ("classifier", "aux_classifier") if (head := getattr(model, name, None)) is not None]
        return [layer for head in last for layer in head.modules()
                if isinstance(layer, nn.Conv2d) and layer.out_channels in widths]
    return [layer for layer in model.modules()
            if (isinstance(layer, nn.Linear) and layer.out_features in widths)
            or (isinstance(layer, nn.Conv2d) and layer.out_channels in widths and layer.out_channels == 1000)]


def _unwrapped(model: Any) -> list[tuple[Any, int]] | None:
    """Position embeddings and class tokens, whose last dimension is the width of the model."""
    from torch import nn

    names = ("class_token", "cls_token", "pos_embed", "pos_embedding", "dist_token")
    found = [(p, p.dim() - 1) for name, p in model.named_parameters() if name.rpartition(".")[2] in names
             and isinstance(p, nn.Parameter)]
    return found or None


def _follow(model: Any, heads: dict[Any, int], pruner: Any) -> None:
    """What its examples set by hand afterwards: head counts and widths that modules hold as numbers."""
    if hasattr(model, "conv_proj") and hasattr(model, "hidden_dim"):
        model.hidden_dim = model.conv_proj.out_channels
    for module in model.modules():
        qkv = getattr(module, "qkv", None)
        if qkv in heads:
            module.num_heads = pruner.num_heads[qkv]
            module.head_dim = qkv.out_features // (3 * module.num_heads)
            if hasattr(module, "attn_dim"):
                module.attn_dim = module.head_dim * module.num_heads
