"""Transfer rules by canonical operator. Importing this package fills the registry."""

from __future__ import annotations

from . import (
    attention,
    contract,
    convolution,
    create,
    elementwise,
    index,
    layout,
    norm,
    recurrent,
    reduce,
    reshape,
    shuffle,
)

__all__ = ["attention", "contract", "convolution", "create", "elementwise", "index", "layout", "norm", "recurrent",
           "reduce", "reshape", "shuffle"]
