"""Pictures of a training, by matplotlib: its curves, and the ramps of the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..render import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
FORMATS = ("png", "svg")
MISSING = "no pictures of the training were drawn: matplotlib isn't installed (pip install 'fxcompress[plots]')"


def draw(folder: Path, epochs: Sequence[Row], steps: Sequence[Row]) -> tuple[list[Path], str]:
    """Draw `curves` and `ramps`, each as PNG and SVG, into `folder`. Returns the files, and what to note: nothing, or
    that matplotlib isn't there."""
    try:
        import matplotlib
    except ImportError:
        return [], MISSING
    written = []
    for name, figure in (("curves", curves(epochs)), ("ramps", ramps(steps))):
        for form in FORMATS:
            with matplotlib.rc_context({"svg.hashsalt": "fxcompress", "svg.fonttype": "none"}):
                figure.savefig(folder / f"{name}.{form}", dpi=150, metadata={"Date": None} if form == "svg" else None)
            written.append(folder / f"{name}.{form}")
    return written, ""


def curves(epochs: Sequence[Row]) -> Figure:
    """Loss and its terms by epoch, and each metric of the validation data."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {"loss": {}}
    for row in epochs:
        at = float(row["epoch"])
        _put(lines["loss"], "training", at, row.get("loss"))
        for name, value in row.get("terms", {}).items():
            _put(lines["loss"], name, at, value)
        for name, value in row.get("validation", {}).items():
            _put(lines.setdefault(name, {}), "validation", at, value)
    return _figure(lines, "epoch", "What the training came to")


def ramps(steps: Sequence[Row]) -> Figure:
    """What the policy moved, by step: sparsity, parameters, learning rate and each number of a ramp."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in steps:
        at = float(row["step"])
        for name, called in (("sparsity", "sparsity"), ("params", "parameters"), ("lr", "learning rate")):
            _put(lines.setdefault(called, {}), name, at, row.get(name))
        for part, called in (("numbers", "ramps"), ("temperatures", "temperature")):
            for name, value in row.get(part, {}).items():
                _put(lines.setdefault(called, {}), name, at, value)
    return _figure(lines, "step", "What the policy did meanwhile")


def _put(lines: dict[str, list[tuple[float, float]]], name: str, at: float, value: object) -> None:
    if isinstance(value, int | float):
        lines.setdefault(name, []).append((at, float(value)))


def _figure(parts: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], unit: str, title: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = {name: lines for name, lines in parts.items() if lines}
    figure = Figure(figsize=(8, 0.6 + 2.1 * max(1, len(shown))), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    rows = figure.subplots(max(1, len(shown)), 1, squeeze=False)[:, 0]
    for axes, (name, lines) in zip(rows, shown.items(), strict=False):
        _lines(axes, name, lines)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rows[-1].set_xlabel(unit, fontsize=8)
    return figure


def _lines(axes: Axes, name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for label, points in lines.items():
        axes.plot([at for at, _ in points], [value for _, value in points], lw=1.3,
                  marker="o" if len(points) < 40 else None, ms=3, label=clean(label).replace("$", r"\$"))
    axes.set_ylabel(clean(name).replace("$", r"\$"), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if name in ("sparsity", "parameters", "learning rate"):
        axes.set_ylim(bottom=0)
    if len(lines) > 1 or name == "ramps":
        axes.legend(frameon=False, fontsize=7)
