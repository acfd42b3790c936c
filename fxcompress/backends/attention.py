"""Attention whose products are of rounded values, lowered: floats here, integers in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..graph.captured import Captured
from ..graph.ops import call, module_of, path_of
from ..graph.propagate import drop_dead
from ..graph.provenance import inherit
from ..nn.attention import RoundedAttention
from ..nn.integer import Grid
from ..nn.quantizer import Quantizer
from ..passes.shared.attention import KIND, PARTS, RESULT, Attention, attentions

if TYPE_CHECKING:
    from .int8 import Lowered


def lower_attention(captured: Captured, done: Lowered) -> None:
    """Put `RoundedAttention` in the place of what `quantize` wrote out, in place, and say so in `done`."""
    for found in list(attentions(captured)):
        query, key, value, weights = (_grid(found.rounded[part]) for part in PARTS)
        path = f"{found.end.name.removesuffix(RESULT)}_rounded"
        made = RoundedAttention(query, key, value, weights, found.scale, found.causal)
        captured.module.add_module(path, made.eval())
        with captured.graph.inserting_after(found.end):
            placed = captured.graph.call_module(path, tuple(found.floats))
        _replace(found, placed)
        done.kernels[found.end.name] = placed
    drop_dead(captured.graph)


def unrounded_attention(captured: Captured) -> list[str]:
    """Put attention in floats back in the place of what `quantize` wrote out, in place; returns what to note."""
    written = list(attentions(captured))
    for found in written:
        query, key, value, *mask = found.floats
        with captured.graph.inserting_after(found.end):
            _replace(found, call(captured.graph, KIND, query, key, value, attn_mask=mask[0] if mask else None,
                                 is_causal=found.causal, scale=found.scale))
    drop_dead(captured.graph)
    count = f"{len(written)} attention{'s' * (len(written) != 1)}"
    return [f"{count} in half precision: torch's kernel takes no integers"] if written else []


def _replace(found: Attention, made: fx.Node) -> None:
    made.meta["path"] = path_of(found.end)
    inherit(made, found.end)
    found.end.replace_all_uses_with(made)


def _grid(node: fx.Node) -> Grid:
    quantizer = module_of(node)
    assert isinstance(quantizer, Quantizer)
    return Grid.of(quantizer)
