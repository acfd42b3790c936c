"""Linear layers for the GPU that read floats and hold their weights as integers, which torch's kernels expand.

`aten._weight_int8pack_mm` takes int8 with a scale an output; `aten._weight_int4pack_mm` (tinygemm) takes 4 bits with a
scale and an offset, both bfloat16, for each group of inputs, and multiplies in bfloat16. The latter needs the weights
in an order of its own, made at the first call; on the CPU the same numbers are multiplied without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .held import HeldTensor
from .integer import is_fake

GROUPS = (256, 128, 64, 32)  # inputs that may share a scale in 4 bits
_TILES = 8  # of 16 inputs that a thread of tinygemm reads at once
INPUTS, OUTPUTS = 16 * _TILES, 8  # tinygemm takes multiples of these
_MIDDLE = 8  # tinygemm's integers are 0 to 15, and 8 stands for zero


class CudaInt8WeightLinear(nn.Module):
    """A linear layer with a weight of int8 [out, in] and a scale for each output; it gives float16 [..., out]."""

    fxc_kind: ClassVar[str] = "cuda_int8_weight_linear"
    fxc_frozen: ClassVar[bool] = True  # its parameters are constants, whatever they were before
    weight: nn.Parameter
    scale: Tensor
    bias: Tensor | None

    def __init__(self, shape: Sequence[int], has_bias: bool) -> None:
        """`shape` is [out, in]."""
        super().__init__()
        self.shape, self.has_bias = tuple(shape), has_bias
        self.weight = nn.Parameter(torch.zeros(self.shape, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.ones(self.shape[0]))
        self.bias = nn.Parameter(torch.zeros(self.shape[0]), requires_grad=False) if has_bias else None

    def fill(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """Set the weights: int8 [out, in], float [out] (or one), float [out]."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = scale.to(torch.float32).expand(self.shape[0]).clone()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """float16 [..., out]."""
        rows = x.reshape(-1, self.shape[1]).to(torch.float32).contiguous()
        made = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        made = made if self.bias is None else made + self.bias
        return made.to(torch.float16).reshape(*x.shape[:-1], self.shape[0])  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The weight's shape."""
        return str(self.shape)


class CudaInt4Linear(nn.Module):
    """A linear layer with a weight of 4 bits [out, in], `group` inputs of which share a scale and an offset: it stands
    for (q − 8)·scale + offset, q from 0 to 15. It gives float16 [..., out].

    `weight` is uint8 [out, in / 2], the first of two in the upper half; `scales` bfloat16 [in / group, out, 2].
    """

    fxc_kind: ClassVar[str] = "cuda_int4_linear"
    fxc_frozen: ClassVar[bool] = True  # its parameters are constants, whatever they were before
    weight: nn.Parameter
    scales: Tensor
    bias: Tensor | None

    def __init__(self, shape: Sequence[int], has_bias: bool, group: int) -> None:
        """`shape` is [out, in], multiples of `OUTPUTS` and `INPUTS`; `group` is one of `GROUPS` that divides `in`."""
        super().__init__()
        out, inputs = self.shape = tuple(shape)
        if out % OUTPUTS or inputs % INPUTS or group not in GROUPS or inputs % group:
            raise ValueError(f"a weight of {out} by {inputs} with groups of {group} can't be packed in 4 bits")
        self.has_bias, self.group = has_bias, group
        self.weight = nn.Parameter(torch.zeros(out, inputs // 2, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.ones(inputs // group, out, 2, dtype=torch.bfloat16))
        self.bias = nn.Parameter(torch.zeros(out), requires_grad=False) if has_bias else None
        self._packed = HeldTensor()

    def fill(self, weight: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> None:
        """Set the weights: integers from -8 to 7, [out, in]; their scales and zero points [out, in / group]; [out]."""
        held = (weight + _MIDDLE).to(torch.uint8)
        self.weight = nn.Parameter(held[:, ::2] << 4 | held[:, 1::2], requires_grad=False)
        self.scales = torch.stack([scale, -zero * scale], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._packed = HeldTensor()

    def floats(self) -> Tensor:
        """The weight as float32 [out, in]."""
        held = torch.stack([self.weight >> 4, self.weight & 15], -1).flatten(1).to(torch.float32) - _MIDDLE
        scale, offset = self.scales.to(torch.float32).transpose(0, 1).unbind(-1)
        grouped = held.reshape(*scale.shape, self.group)
        return torch.addcmul(offset[..., None], grouped, scale[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """float16 [..., out]."""
        rows = x.reshape(-1, self.shape[1]).to(torch.bfloat16).contiguous()
        made = self._product(rows).to(torch.float32)
        made = made if self.bias is None else made + self.bias
        return made.to(torch.float16).reshape(*x.shape[:-1], self.shape[0])

    def _product(self, rows: Tensor) -> Tensor:
        if not rows.is_cuda:
            return F.linear(rows.to(torch.float32), self.floats())
        packed = self._packed.tensor
        if packed is None:
            packed = torch.ops.aten._convert_weight_to_int4pack(self.weight, _TILES)
            if not is_fake(rows):
                self._packed.tensor = packed
        made: Tensor = torch.ops.aten._weight_int4pack_mm(rows, packed, self.group, self.scales)
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> CudaInt4Linear:
        self._packed = HeldTensor()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = HeldTensor()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """The weight's shape and the group."""
        return f"{self.shape}, group={self.group}"
