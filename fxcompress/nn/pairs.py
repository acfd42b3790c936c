"""Neighbouring weights whose products kernels sum in 16 bits where the CPU has no VNNI instructions.

There `vpmaddubsw` adds u8·s8 + u8·s8 and saturates beyond 2¹⁵ (Intel, "Intel 64 and IA-32 Architectures Software
Developer's Manual", volume 2, PMADDUBSW). With values up to 255 nothing does while two neighbours of one sign sum to
128 at most: so weights may have 8 bits, if their scale is chosen for that; 7 bits for all of them are the other way.
Neighbours are inputs 2i and 2i + 1 of an output, at one place of the kernel; FBGEMM counts inputs over all places.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

SAFE_BITS = 15  # of a value and a weight together, where the sum of any two products has to fit 16 bits
_ROUNDED = 1 + 2**-20  # so that no scale is rounded to one that is too small
_PART = 2**24  # numbers looked at at a time
SATURATES = "without VNNI instructions sums of two of its products would saturate 16 bits"


# Settings of the environment that keep a library from VNNI instructions, and their values that do (oneDNN
# documentation, "CPU Dispatcher Control"; FBGEMM, src/Utils.cc).
_KEPT_FROM: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"), frozenset({"SSE41", "AVX", "AVX2", "AVX512_CORE"})),
    "FBGEMM_ENABLE_INSTRUCTIONS": frozenset({"AVX2", "AVX512"})}


def saturates() -> bool:
    """Whether sums of two products of u8 and s8 saturate 16 bits here: where the CPU has no VNNI instructions, or
    oneDNN or FBGEMM is told to do without."""
    told = any(os.environ.get(name, "").upper() in values for name, values in _KEPT_FROM.items())
    return told or not torch.cpu._is_vnni_supported()


def _ways(shape: torch.Size) -> list[Tensor]:
    """`pairs_of` by each order that kernels read in; in one order a weight has one neighbour at most."""
    inputs = shape[0]
    if inputs == 1:
        return []
    order = torch.arange(shape.numel()).reshape(inputs, -1).T  # [places, inputs]
    ways = [order[:, : inputs // 2 * 2].reshape(-1, 2)]
    if inputs % 2:
        ways.append(order.flatten()[: shape.numel() // 2 * 2].reshape(-1, 2))
    return ways


def pairs_of(shape: torch.Size) -> Tensor:
    """The neighbours among the weights of one output, `shape` [in, ...]: places in its flattened weights, [pairs, 2].

    Filters of one input have none: oneDNN sums their products in 32 bits.
    """
    return torch.cat([torch.zeros(0, 2, dtype=torch.long), *_ways(shape)])


def reach(weight: Tensor) -> Tensor:
    """How far a weight [out, in, ...] or the sum of two neighbours goes from zero, [out]: with steps of a 127th of it,
    however each weight is rounded, no two sum to more than 128. Two of different signs never go further than one."""
    pairs, rows = pairs_of(weight.shape[1:]).to(weight.device), weight.flatten(1)
    found = rows.abs().amax(1)
    if not len(pairs):
        return found
    sums = [(part[:, pairs[:, 0]] + part[:, pairs[:, 1]]).abs().amax(1)
            for part in torch.split(rows, max(1, _PART // rows.shape[1]))]
    return torch.maximum(found, torch.cat(sums) * _ROUNDED)


def fit(weight: Tensor, top: int) -> bool:
    """Whether no sum of two products of the integers `weight` [out, in, ...] with values up to `top` saturates."""
    return top * int(reach(weight.to(torch.int16)).max()) < 1 << SAFE_BITS


def partners(shape: torch.Size) -> Tensor:
    """The neighbours of each of the weights of one output, `shape` [in, ...], by their places when flattened: [weights,
    1 or 2]; its own place where it has no other."""
    ways = _ways(shape)
    found = torch.arange(shape.numel())[:, None].repeat(1, max(1, len(ways)))
    for way, part in enumerate(ways):
        found[part[:, 0], way], found[part[:, 1], way] = part[:, 1], part[:, 0]
    return found
