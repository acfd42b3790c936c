"""What came of a policy: as data for the artifact, as a table for a notebook."""

from __future__ import annotations

import math
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from ..graph.ops import module_of
from ..nn import Mask
from ..passes.shared.masking import mask_calls

if TYPE_CHECKING:
    from .finish import Finished
    from .result import Result


def masks(result: Result) -> dict[str, float]:
    """The sparsity of every mask in the module, by the name of its parameter."""
    found = {}
    for node in mask_calls(result.captured):
        mask = module_of(node)
        assert isinstance(mask, Mask)
        found[str(node.target).removesuffix("_mask")] = mask.masked() / max(1, mask.mask.numel())
    return found


def report(result: Result, finished: Finished) -> dict[str, Any]:
    """Plain data: totals before and after, phases, masks, what was expected and measured, notes and warnings."""
    return {
        "policy": result.policy.name,
        "model": result.captured.model_name,
        "torch": torch.__version__,
        "params": {name: str(value) for name, value in result.policy.params.items()},
        "before": asdict(result.plan.before),
        "after": asdict(finished.totals),
        "trained": {"steps": result.clock.steps, "epochs": result.clock.epochs},
        "phases": result.progress,
        "masks": masks(result),
        "expects": [{"text": found.text, "value": found.value if math.isfinite(found.value) else None,
                     "shown": found.shown, "holds": found.holds} for found in finished.measured],
        "notes": list(result.notes),
        "quantization": finished.quantization and finished.quantization.explained(result.notes).to_json(),
        "warnings": [{"code": item.code, "message": item.message} for item in result.warnings],
    }


def table(result: Result) -> str:
    """HTML for a notebook: phases and masks."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{100 * part:.0f}%</td></tr>"
                   for name, part in result.progress.items())
    hidden = "".join(f"<tr><td>{escape(name)}</td><td>{100 * share:.1f}%</td></tr>"
                     for name, share in masks(result).items())
    said = [*result.notes, *(f"{item.code}: {item.message}" for item in result.warnings)]
    notes = "".join(f"<li>{escape(note)}</li>" for note in said)
    return (f"<b>policy {escape(result.policy.name)}</b> on {escape(result.captured.model_name)}, "
            f"{result.clock.steps} steps, {result.clock.epochs} epochs"
            f"<table><tr><th>phase</th><th>done</th></tr>{rows}</table>"
            + (f"<table><tr><th>masked</th><th>sparsity</th></tr>{hidden}</table>" if hidden else "")
            + (f"<ul>{notes}</ul>" if notes else ""))
