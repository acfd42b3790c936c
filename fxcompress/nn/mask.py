"""A mask on a parameter: a module of its own, so that the graph shows where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Evidence = Literal["none", "gradient", "movement"]


class Mask(nn.Module):
    """Multiplies a parameter by a buffer of ones and zeros; the parameter stays dense and trainable.

    `mask` is boolean, of the parameter's shape; True keeps an entry. With `evidence`, each backward pass also adds to
    the buffer `evidence` (float, same shape) what scores by gradient need. It is taken at the *masked* parameter, so
    that entries which are masked now collect it as well (the straight-through estimate):

    * `gradient`: the sum of the loss gradients since the last selection
    * `movement`: the sum of −weight · gradient since the mask was put in (Sanh, Wolf and Rush, "Movement Pruning",
      2020, equation 2)

    `seen` says that there was a backward pass, `stale` that there was none since the last selection: what was collected
    stays usable until news come. Entries that are not finite (a step that a gradient scaler skips) count as zero.
    """

    fxc_kind: ClassVar[str] = "mask"
    mask: Tensor
    evidence: Tensor | None
    seen: Tensor | None
    stale: Tensor | None

    def __init__(self, shape: Sequence[int], evidence: Evidence = "none", *, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        """A mask that keeps everything."""
        super().__init__()
        self.collects: Evidence = evidence
        kept = evidence != "none"
        self.register_buffer("mask", torch.ones(tuple(shape), dtype=torch.bool, device=device))
        self.register_buffer("evidence", torch.zeros(tuple(shape), dtype=dtype, device=device) if kept else None)
        for name in ("seen", "stale"):
            self.register_buffer(name, torch.zeros((), dtype=torch.bool, device=device) if kept else None)

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` with the masked entries at zero, of the same shape and dtype."""
        mask: Tensor
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            mask = torch.ops.fxcompress.as_floats(self.mask, weight.dtype)
        else:
            mask = self.mask.to(weight.dtype)
        masked: Tensor = weight * mask  # eight times as fast on the CPU as a product with booleans
        if self.evidence is not None and masked.requires_grad:
            masked.register_hook(partial(self.collect, weight.detach()))  # type: ignore[no-untyped-call]
        return masked

    def collect(self, weight: Tensor, gradient: Tensor) -> None:
        """Take up the gradient of the loss at the masked parameter, one backward pass's."""
        assert self.evidence is not None and self.seen is not None and self.stale is not None
        news = gradient.detach().nan_to_num(0.0, 0.0, 0.0)
        if self.collects == "movement":
            self.evidence.sub_(weight * news)
        else:
            self.evidence.copy_(torch.where(self.stale, news, self.evidence + news))
        self.seen.fill_(True)
        self.stale.fill_(False)

    def put(self, keep: Tensor) -> None:
        """Make `keep` (boolean, the parameter's shape) the mask, in place."""
        self.mask.copy_(keep)
        if self.stale is not None:
            self.stale.fill_(True)

    def masked(self) -> int:
        """How many entries are masked."""
        return int(self.mask.numel() - self.mask.sum())

    def extra_repr(self) -> str:
        """Shape and evidence."""
        return f"{tuple(self.mask.shape)}" + (f", evidence={self.collects!r}" if self.collects != "none" else "")


# `mask.to(dtype)`, which Inductor doesn't take apart: it would keep the booleans for the backward pass and bring them
# into a filter's layout one by one, which takes longer than the convolution.
_LIBRARY: Any = torch.library.Library("fxcompress", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("as_floats(Tensor mask, ScalarType dtype) -> Tensor")


@torch.library.impl(_LIBRARY, "as_floats", "CompositeExplicitAutograd")
def _as_floats(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask.to(dtype)


@torch.library.impl(_LIBRARY, "as_floats", "Meta")
def _shape_of_floats(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(mask, dtype=dtype)
