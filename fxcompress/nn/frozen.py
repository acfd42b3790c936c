"""A teacher's modules: what they hold can't be trained, saved, or put into training mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """Gives one tensor, which is no parameter and not in `state_dict`."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        """The tensor."""
        return self.value


class ChannelsLast(nn.Module):
    """Lays images [N, C, H, W] out with their channels last."""

    def forward(self, images: Tensor) -> Tensor:
        """The same numbers."""
        return images.contiguous(memory_format=torch.channels_last)


class Frozen(nn.Module):
    """A module that stays in evaluation mode, whatever is asked of what it stands in: for those that act otherwise in
    training (batch norm, recurrent layers with dropout), and for a teacher whose code can't be captured."""

    def __init__(self, inner: nn.Module) -> None:
        """Takes `inner` over: see `freeze`."""
        super().__init__()
        self.inner = freeze(inner).eval()
        super().train(False)

    def train(self, mode: bool = True) -> Frozen:
        """Stays as it is."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `inner` gives, without gradients of its own."""
        return self.inner(*args, **kwargs)


class FrozenTeacher(Frozen):
    """A whole teacher as one module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What it gives; nothing is recorded for a backward pass."""
        with torch.no_grad():
            return self.inner(*args, **kwargs)


def freeze(module: nn.Module) -> nn.Module:
    """Make every parameter and buffer of `module` a buffer that isn't saved, in place, and return it. Optimizers,
    weight decay and `state_dict` can't see these; `.to()` moves them."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                value = made.setdefault(id(parameter), parameter.detach())
                del part._parameters[name]
                part.register_buffer(name, value, persistent=False)
        part._non_persistent_buffers_set.update(name for name, value in part._buffers.items() if value is not None)
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [getattr(part, name, None) for name in part._flat_weights_names]
    return module
