"""Activations that oneDNN applies to what it computes, by the names that layers have for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor
from torch.nn import functional as F

# Name -> the same in torch, of a tensor and the activation's numbers.
FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "none": lambda x: x, "relu": F.relu, "hardtanh": F.hardtanh, "hardswish": F.hardswish, "swish": F.silu,
    "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
}

# Name -> oneDNN's name, and its algorithm, where these aren't the name and none.
_NAMES: Mapping[str, tuple[str, str]] = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


def named(activation: str) -> tuple[str, str]:
    """oneDNN's name and algorithm of an activation."""
    return _NAMES.get(activation, (activation, ""))
