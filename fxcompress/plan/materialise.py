"""A skeleton with weights again, to be timed: the leading part of each real tensor."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from ..graph.captured import Captured
from ..graph.tree import copy_module

SMALL = 0.01  # what stands where there is nothing real: no zero, and nothing that becomes too small for normal floats


def materialised(skeleton: Captured, real: Captured) -> Captured:
    """A copy of `skeleton` that runs, or `skeleton` itself if it has weights. Each tensor is the first part, along
    every dimension, of the one of its name in `real`, or holds small numbers where there is none as large. What it
    computes has no sense, but takes the time that the model takes."""
    if skeleton.concrete:
        return skeleton
    module, whole = copy_module(skeleton.module, _filled), _tensors(real.module)
    with torch.no_grad():
        for name, tensor in _tensors(module).items():
            source = whole.get(name)
            if source is not None and source.dim() == tensor.dim() and all(map(int.__le__, tensor.shape, source.shape)):
                tensor.copy_(source[tuple(slice(size) for size in tensor.shape)])
    return replace(skeleton, module=module, concrete=True)


def _tensors(module: fx.GraphModule) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _filled(tensor: Tensor) -> Tensor:
    """A tensor like a fake one."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return made.fill_(SMALL if made.is_floating_point() or made.is_complex() else 0)
