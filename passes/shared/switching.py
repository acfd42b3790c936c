"""The quantizers of a graph: found, and switched off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import arguments, kind_of, module_of
from fxcompress.nn.quantizer import Quantizer


def quantizers_of(captured: Captured) -> dict[fx.Node, Quantizer]:
    """The calls of quantizers on values, those on weights left out."""
    return {node: module for node in captured.graph.nodes if kind_of(node) == "quantizer"
            and isinstance(module := module_of(node), Quantizer) and module.axis is None
            and not _is_weight(node)}


def _is_weight(node: fx.Node) -> bool:
    return any(arguments(user).get("weight") is node for user in node.users)


@contextmanager
def without_rounding(captured: Captured) -> Iterator[None]:
    """All quantizers off, and afterwards as they were."""
    quantizers = [module for module in captured.module.modules() if getattr(module, "fxc_kind", "") == "quantizer"]
    was = [module.on for module in quantizers]
    for module in quantizers:
        module.on = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, on in zip(quantizers, was, strict=True):
            module.on = on
