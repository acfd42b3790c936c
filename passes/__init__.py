"""The verbs, one a file, by their class names: `fxcompress.passes.Mask(sparsity=0.5).apply(captured, "conv2d")`.

They are loaded when first used. A verb that another package registers is in `fxcompress.passbase.VERBS`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxcompress.passes.distill import Distill as Distill
    from fxcompress.passes.distill import pair as pair
    from fxcompress.passes.mask import Mask as Mask
    from fxcompress.passes.quantize import Quantize as Quantize
    from fxcompress.passes.remove import Remove as Remove
    from fxcompress.passes.shared.criteria import register_criterion as register_criterion
    from fxcompress.passes.shared.scores import register_score as register_score

_FILES = {"Distill": "distill", "pair": "distill", "Mask": "mask", "Quantize": "quantize", "Remove": "remove",
          "register_criterion": "shared.criteria", "register_score": "shared.scores"}

__all__ = ["Distill", "Mask", "Quantize", "Remove", "pair", "register_criterion", "register_score"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _FILES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
