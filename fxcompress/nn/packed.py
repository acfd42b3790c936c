"""Float convolutions as they are deployed on the CPU: filters packed once by oneDNN, what follows in the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .held import HeldTensor
from .integer import is_fake
from .post_ops import FUNCTIONS

_M = torch.ops.mkldnn
FEW_PRODUCTS = 1e6  # below which torch's own convolution takes less than oneDNN's overhead of each call


class PackedConv2d(nn.Module):
    """A convolution of images [N, C, H, W] in float32, with what follows it: `adds` a second input of the result's
    shape, then `activation` (oneDNN's name, with its `numbers`). Results are channels-last. It is not for training."""

    fxc_kind: ClassVar[str] = "packed_conv2d"
    fxc_frozen: ClassVar[bool] = True
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, shape: Sequence[int], has_bias: bool, stride: Sequence[int], padding: Sequence[int],
                 dilation: Sequence[int], groups: int, adds: bool = False, activation: str = "none",
                 numbers: Sequence[float] = ()) -> None:
        """`shape` is that of the filters [out, in / groups, kH, kW]; the other settings as in `torch.nn.Conv2d`, each
        of two numbers."""
        super().__init__()
        self.shape, self.has_bias, self.adds = tuple(shape), has_bias, adds
        self.stride, self.padding, self.dilation, self.groups = tuple(stride), tuple(padding), tuple(dilation), groups
        self.activation, self.numbers = activation, tuple(numbers)
        self.weight = nn.Parameter(torch.zeros(self.shape), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(self.shape[0]), requires_grad=False) if has_bias else None
        self._packed = HeldTensor()  # filters packed for the first input seen

    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Set the filters and the bias."""
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._packed = HeldTensor()

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The convolution of `x`, float32 [N, out, H', W']; with `adds`, `other` is added to it."""
        if torch.compiler.is_compiling() or is_fake(x) or x.requires_grad or self._small(x):
            return self._plain(x, other)
        x = x.contiguous(memory_format=torch.channels_last)
        settings = (self.padding, self.stride, self.dilation, self.groups)
        if self._packed.tensor is None:
            self._packed.tensor = _M._reorder_convolution_weight(self.weight, *settings, x.shape)
        last = (self.activation, list(self.numbers), "")
        found: Tensor
        if other is None:
            found = _M._convolution_pointwise(x, self._packed.tensor, self.bias, *settings, *last)
        else:
            found = _M._convolution_pointwise.binary(
                x, other.contiguous(memory_format=torch.channels_last), self._packed.tensor, self.bias, *settings,
                "add", 1.0, *(last if self.activation != "none" else (None, [], None)))
        return found

    def _plain(self, x: Tensor, other: Tensor | None) -> Tensor:
        made = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if other is not None:
            made = made + other
        return FUNCTIONS[self.activation](made, *self.numbers)

    def _small(self, x: Tensor) -> bool:
        """Whether there is little to compute, each filter reading many channels."""
        places = prod(-(-size // stride) for size, stride in zip(x.shape[2:], self.stride, strict=True))
        return self.shape[1] > 1 and x.shape[0] * places * self.weight.numel() < FEW_PRODUCTS

    def extra_repr(self) -> str:
        """The filters' shape and what follows the convolution."""
        return ", ".join([str(self.shape), *["add"] * self.adds, *[self.activation] * (self.activation != "none")])
