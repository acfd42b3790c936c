"""Carry a removal out: constants of the graph, parameters and buffers, attributes of their modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .coupling import Coupling, Mask
from .coupling_computed import compute_again
from .coupling_edit import RESIZES, Edit, Kept
from .ops import arguments, kind_of, submodule

Attributes = Callable[[Any], Mapping[str, object]]


@dataclass(frozen=True)
class Removal:
    """What left: `gone` says it of every label of `coupling`; `resized`: each tensor's (dimension, kept indices)."""

    coupling: Coupling
    gone: Kept
    resized: Mapping[Tensor, tuple[tuple[int, Tensor], ...]]


def _convolution(module: nn.modules.conv._ConvNd) -> Mapping[str, object]:
    a, b = module.weight.shape[:2]
    if module.transposed:
        return {"in_channels": a, "out_channels": b * module.groups}
    return {"in_channels": b * module.groups, "out_channels": a}


# What a module says of its size, from its parameters.
ATTRIBUTES: tuple[tuple[type[nn.Module], Attributes], ...] = (
    (nn.modules.conv._ConvNd, _convolution),
    (nn.Linear, lambda m: {"in_features": m.weight.shape[1], "out_features": m.weight.shape[0]}),
    (nn.Bilinear, lambda m: dict(zip(("out_features", "in1_features", "in2_features"), m.weight.shape, strict=True))),
    (nn.modules.batchnorm._NormBase, lambda m: {"num_features": (m.weight if m.affine else m.running_mean).shape[0]}),
    (nn.GroupNorm, lambda m: {"num_channels": m.weight.shape[0]} if m.affine else {}),
    (nn.LayerNorm, lambda m: {"normalized_shape": tuple(m.weight.shape)} if m.weight is not None else {}),
    (nn.Embedding, lambda m: {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}),
    (nn.EmbeddingBag, lambda m: {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}),
    (nn.PReLU, lambda m: {"num_parameters": m.weight.shape[0]}),
)


def remove(coupling: Coupling, doomed: Mask) -> Removal:
    """Take the components `doomed` out of the model that `coupling` describes, in place.

    Parameters keep their identity, `requires_grad` and memory format; gradients are cut as they are. Afterwards the
    graph's facts are fresh, and `coupling` describes the model as it was.
    """
    captured = coupling.captured
    gone = doomed[coupling.component] if coupling.count else np.zeros(0, dtype=np.bool_)
    edit = Edit(coupling.flow, gone)
    for node in coupling.flow.nodes:
        fact = node.meta.get("fxc")
        function = RESIZES.get(getattr(fact, "kind", None) or kind_of(node))
        if function is not None:
            function(edit, node, arguments(node))
    for rewrite in edit.later:
        rewrite()
    resized: dict[Tensor, tuple[tuple[int, Tensor], ...]] = {}
    owners: set[str] = set(edit.modules)
    for entry in coupling.flow.tensors.values():
        kept = [(place, torch.from_numpy(mask.nonzero()[0]))
                for place, dim in enumerate(entry.dims) if (mask := edit.kept(dim)) is not None]
        if kept:
            shrink(entry.tensor, kept, captured.concrete)
            resized[entry.tensor] = tuple(kept)
            owners.update(name.partition(".parametrizations.")[0] if ".parametrizations." in name
                          else name.rpartition(".")[0] for name in entry.names)
    for path in sorted(owners):
        owner = submodule(captured.module, path)
        compute_again(owner)
        _describe(owner, edit.modules.get(path, {}))
    captured.refresh()
    return Removal(coupling, gone, resized)


def shrink(tensor: Tensor, kept: list[tuple[int, Tensor]], concrete: bool) -> None:
    """Keep the given indices of a tensor and of its gradient, in place. A fake one only changes its shape."""
    cut, gradient = (_cut if concrete else _cut_fake), tensor.grad
    tensor.grad = None
    small = cut(tensor.data, kept)
    if tensor.requires_grad:
        # Whoever still holds a loss holds autograd's node for this tensor, and that remembers the old shape. It is let
        # go where the dtype changes.
        tensor.data = small.new_empty(0, dtype=torch.float64 if small.dtype != torch.float64 else torch.float32)
    tensor.data = small
    if gradient is not None:
        tensor.grad = cut(gradient, kept)


def _cut(data: Tensor, kept: list[tuple[int, Tensor]]) -> Tensor:
    last = data.dim() == 4 and data.is_contiguous(memory_format=torch.channels_last) and not data.is_contiguous()
    for place, indices in kept:
        data = data.index_select(place, indices.to(data.device))
    return data.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _cut_fake(data: Tensor, kept: list[tuple[int, Tensor]]) -> Tensor:
    shape = list(data.shape)
    for place, indices in kept:
        shape[place] = len(indices)
    return data.new_empty(shape)


def _describe(module: nn.Module, given: Mapping[str, object]) -> None:
    """Bring a module's attributes in line with its parameters."""
    for name, value in given.items():
        setattr(module, name, value)
    for cls, attributes in ATTRIBUTES:
        if isinstance(module, cls):
            for name, value in attributes(module).items():
                setattr(module, name, value)
