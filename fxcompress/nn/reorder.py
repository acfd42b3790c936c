"""Indices of one dimension put in another order: what a channel shuffle is once its groups are no longer alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn


class Reorder(nn.Module):
    """Gives `input.index_select(dim, order)`.

    `order` are the places that the results come from, each between 0 and the size of `dim`. The buffer that holds them
    isn't part of `state_dict`: they belong to the graph.
    """

    fxc_kind: ClassVar[str] = "reorder"
    _places: Tensor

    def __init__(self, dim: int, order: Sequence[int]) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("_places", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.order = tuple(order)

    @property
    def order(self) -> tuple[int, ...]:
        """The places that the results come from."""
        return self._order

    @order.setter
    def order(self, places: Sequence[int]) -> None:
        self._order = tuple(places)
        self._places = torch.tensor(self._order, dtype=torch.int64, device=self._places.device)

    def forward(self, input: Tensor) -> Tensor:
        """The indices of dimension `dim` in the order `order`."""
        return input.index_select(self.dim, self._places)

    def extra_repr(self) -> str:
        """The dimension, and how many places."""
        return f"dim={self.dim}, {len(self._order)} places"
