"""What modules make of their tensors as they run, and keep: it is never copied, pickled or saved."""

from __future__ import annotations

from torch import Tensor


class Held:
    """Base: a copy of it is a new one, which holds nothing."""

    def __reduce__(self) -> tuple[type[Held], tuple[()]]:
        return type(self), ()


class HeldTensor(Held):
    """Holds one tensor, or none yet."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
