"""Pictures of a quantized model, by matplotlib: its errors along the depth, and the numbers of its worst layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..diagnostics import ArtifactError, Diagnostic
from ..engine.quantization_rows import FLOAT, Error, Histogram, LayerRow, Quantization
from ..render import clean
from .quantization import decibels, quantization_of, share
from .rows import Model, open_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
_BLUE, _ORANGE, _GREY, _RED, _INK = "#2a78c2", "#d9822b", "#9a9a9a", "#c23b3b", "#333333"
_READS, _WEIGHT, _GIVES = (_BLUE, "o", "what it reads, by its own rounding"), (_ORANGE, "s", "its weight, likewise"), (
    _INK, "D", "what it gives, with all the rounding before it")
_FLOOR = 0.7  # of the axes of counts, which are logarithmic: below 1, so that a single number shows
_NAMES = 70  # layers that still get their names below the axis; of more of them only some do


def plots(model: Model, folder: str | Path) -> list[Path]:
    """Draw `sqnr` and `histograms` of a quantized model, each as PNG and SVG, into `folder`, which is made if need be.
    Returns the files.

    Raises ArtifactError: FXC0730 for a model without figures of its quantization, FXC0731 without matplotlib, FXC0732
    for a folder that can't be written to.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ArtifactError([Diagnostic("FXC0731", "pictures need matplotlib, which isn't installed",
                                        help="pip install 'fxcompress[plots]'")]) from error
    found = quantization_of(open_model(model))
    if found is None:
        raise ArtifactError([Diagnostic("FXC0730", "there is nothing to draw: no quantization was measured here",
                                        help="finalize it from a policy that has `quantize`, for the target `cpu`")])
    path, written = Path(folder), []
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, figure in (("sqnr", depth(found)), ("histograms", worst(found))):
            for form in FORMATS:
                with matplotlib.rc_context({"svg.hashsalt": "fxcompress", "svg.fonttype": "none"}):
                    figure.savefig(path / f"{name}.{form}", dpi=150, metadata={"Date": None} if form == "svg" else None)
                written.append(path / f"{name}.{form}")
    except OSError as error:
        raise ArtifactError([Diagnostic("FXC0732", f"the pictures can't be written to {path}: {error.strerror}",
                                        help="name a folder that can be made or written to")]) from error
    return written


def depth(found: Quantization) -> Figure:
    """SQNR along the depth: of what each layer reads, of its weight, and of what it gives."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    count = len(found.rows)
    figure = Figure(figsize=(min(18.0, max(8.0, 2.5 + 0.21 * count)), 5.2), layout="constrained")
    axes = figure.add_subplot()
    _line(axes, [row.reads.error if row.reads is not None else None for row in found.rows], *_READS)
    _line(axes, [row.weight.error if row.weight is not None else None for row in found.rows], *_WEIGHT)
    _line(axes, [row.gives for row in found.rows], *_GIVES)
    left = [place for place, row in enumerate(found.rows) if row.kernel == FLOAT]
    for place in left:
        axes.axvspan(place - 0.5, place + 0.5, color=_GREY, alpha=0.18, lw=0,
                     label="left in float" if place == left[0] else None)
    every = math.ceil(count / _NAMES)
    places = range(0, count, every)
    axes.set_xticks(places, [_shown(found.rows[place].layer) for place in places], rotation=90, fontsize=7)
    axes.set_xlim(-0.6, count - 0.4)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("SQNR against float, dB", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8, borderaxespad=0.2)
    figure.suptitle("Rounding along the depth", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _shown(layer: str) -> str:
    """The name of a layer, which may be a stranger's, as plain text: matplotlib reads formulas between dollars."""
    return clean(layer).replace("$", r"\$")


def _line(axes: Axes, errors: Sequence[Error | None], color: str, marker: str, label: str) -> None:
    """One line with a gap where nothing was measured or nothing differs."""
    values = [error.sqnr if error is not None and math.isfinite(error.sqnr) else math.nan for error in errors]
    axes.plot(range(len(values)), values, color=color, marker=marker, ms=3.5, lw=1.2, label=label)


def worst(found: Quantization) -> Figure:
    """The histograms of the worst layers, a row each: what it reads, and its weight in steps of its scales. What lies
    beyond the range of the integers is red."""
    from matplotlib.figure import Figure

    rows = {row.layer: row for row in found.rows}
    layers = list(dict.fromkeys(item.layer for item in found.histograms if item.layer in rows))
    figure = Figure(figsize=(11, 0.9 + 1.75 * max(1, len(layers))), layout="constrained")
    figure.suptitle("The layers whose own rounding costs most: between the lines what integers reach, red what is "
                    "clipped", x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = figure.subplots(max(1, len(layers)), 2, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for item in found.histograms:
        if item.layer in rows:
            _histogram(grid[layers.index(item.layer), int(item.what == "weight")], item, rows[item.layer])
    return figure


def _histogram(axes: Axes, item: Histogram, row: LayerRow) -> None:
    part = row.weight if item.what == "weight" else row.reads
    count = len(item.counts)
    edges = [item.low + (item.high - item.low) * place / max(1, count) for place in range(count + 1)]
    low, high = item.reach
    inside = [low <= (one + other) / 2 <= high for one, other in pairwise(edges)]
    axes.set_axis_on()
    for wanted, color in ((True, _WEIGHT[0] if item.what == "weight" else _READS[0]), (False, _RED)):
        heights = [number if fits is wanted else 0 for number, fits in zip(item.counts, inside, strict=True)]
        axes.stairs([max(_FLOOR, height) for height in heights], edges, baseline=_FLOOR, fill=True, color=color)
    left, right = min(item.low, low), max(item.high, high)
    margin = 0.03 * (right - left or 1.0)
    axes.set_xlim(left - margin, right + margin)
    for end, beyond in ((low, left - margin), (high, right + margin)):
        axes.axvline(end, color=_INK, lw=1.1)
        axes.axvspan(*sorted((end, beyond)), color=_RED, alpha=0.08, lw=0)
    axes.set_yscale("log")
    axes.set_ylim(_FLOOR, 2.5 * max((1, *item.counts)))
    what = "weight, in steps" if item.what == "weight" else "what it reads"
    figures = "" if part is None else f"{decibels(part.error)} dB, " + (
        f"{share(part.clipped)} clipped" if part.clipped else "nothing clipped")
    axes.set_title(f"{_shown(row.layer)}: {what}", loc="left", fontsize=8.5)
    axes.set_title(figures, loc="right", fontsize=8.5, color=_INK)
    axes.tick_params(labelsize=7)
    axes.set_ylabel("count", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
