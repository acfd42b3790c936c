"""Constant arguments in one spelling: `stride=(2, 2)` and `stride=2` are the same, and so are lists and tuples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .opbase import Op

if TYPE_CHECKING:
    from .recorder import Recorder

_PER_AXIS = ("kernel_size", "stride", "padding", "dilation", "output_padding", "output_size")
_SPATIAL = ("conv", "pool")
_EMPTY_IS_NONE = {"stride": (), "dims": (), "dim": ()}


def tidy(op: Op, values: dict[str, Any], rec: Recorder) -> dict[str, Any]:
    """`values` in their canonical spelling."""
    return {name: _tidy(op, name, value, values) for name, value in values.items()}


def _tidy(op: Op, name: str, value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, torch.Size | list):
        value = tuple(value)
    if isinstance(value, tuple) and not value and name in _EMPTY_IS_NONE and op.family != "reduce":
        return None
    if op.family == "reduce" and name == "dim" and isinstance(value, tuple) and len(value) <= 1:
        return value[0] if value else None if op.name not in ("amax", "amin") else ()
    if op.family in _SPATIAL and name in _PER_AXIS and isinstance(value, tuple):
        value = value[0] if value and all(type(item) is int and item == value[0] for item in value) else value
    if op.family == "pool" and name == "stride" and value is not None and value == _one(values.get("kernel_size")):
        return None
    return value


def _one(value: Any) -> Any:
    """The one number of a sequence of equal numbers."""
    items = tuple(value) if isinstance(value, tuple | list) else (value,)
    return items[0] if all(item == items[0] for item in items) else items
