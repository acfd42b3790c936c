"""The tables of a zoo run: a line for each suite, the same beside Torch-Pruning, and every model that failed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tables import Row, markdown, median, number, yes
from zoo_models import SUITES

PARTS = ("capture", "analyse", "rewrite", "prove")
NAMES = {"torchvision": "torchvision, classification", "segmentation": "torchvision, segmentation",
         "video": "torchvision, video", "timm": "timm"}


def seconds(row: Mapping[str, Any]) -> float:
    """Capture, analysis and rewriting, without the proof."""
    return sum(float(row[f"seconds_{part}"]) for part in PARTS[:3])


def summary(rows: list[Row]) -> str:
    """Markdown: the table of the suites, that of the peer if it ran, and the models that failed, with the reasons."""
    parts = [suites(rows)]
    compared = [row for row in rows if row.get("peer_ok") not in (None, "")]
    if compared:
        parts.append(peers(compared))
    parts.append(failures(rows))
    return "\n\n".join(part for part in parts if part)


def by_suite(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each suite that has any."""
    return {suite: here for suite in SUITES if (here := [row for row in rows if row["suite"] == suite])}


def suites(rows: list[Row]) -> str:
    """One line a suite, medians over the models that passed."""
    head = ["suite", "models", "proven", "all inexact", "trainable", "refused", "wrong", "MACs left, convolutional",
            "MACs left, with attention", "seconds to capture + analyse + rewrite + prove", "worst error"]
    lines = []
    for suite, here in by_suite(rows).items():
        good = [row for row in here if yes(row)]
        errors = [error for row in good if (error := number(row, "error")) is not None]
        refused = sum(yes(row, "refused") for row in here)
        counts = [len(here), len(errors), len(good) - len(errors), sum(yes(row, "backward") for row in here), refused,
                  len(here) - len(good) - refused]
        left = [_macs_left([row for row in good if row["kind"] == kind]) for kind in ("convolution", "attention")]
        times = [median(number(row, f"seconds_{part}") for row in good) for part in PARTS]
        lines.append([NAMES[suite], *map(str, counts), *left, " + ".join(times), f"{max(errors, default=0.0):.0e}"])
    return markdown(head, lines) + (
        "\n\nHalf of the channels removed, nothing told of the models. *Proven*: it equals the model with those "
        "channels zeroed, and its outputs keep their shapes; *all inexact*: normalisations run over every removed "
        "dimension, so that only shapes can be checked; *trainable*: a backward pass gives every parameter a finite "
        "gradient. MACs and processor seconds (one thread) are medians over the models that passed.")


def _macs_left(rows: list[Row]) -> str:
    """The median share that is left, and the largest."""
    shares = [float(row["macs_after"]) / float(row["macs_before"]) for row in rows]
    return f"{statistics.median(shares):.0%}, at most {max(shares):.0%}" if shares else "-"


def peers(rows: list[Row]) -> str:
    """One line a suite: what came of Torch-Pruning on the same models, and times where both passed."""
    head = ["suite", "models", "valid: fxcompress", "Torch-Pruning", "layers thinner: fxcompress", "Torch-Pruning",
            "median s: fxcompress", "Torch-Pruning", "ratio of times"]
    lines = []
    for suite, here in by_suite(rows).items():
        both = [row for row in here if yes(row) and yes(row, "peer_ok")]
        valid = [sum(yes(row) for row in here), sum(yes(row, "peer_ok") for row in here)]
        thin = [median((number(row, key) for row in both), ".0%") for key in ("share_thinner", "peer_share_thinner")]
        lines.append([NAMES[suite], str(len(here)), *map(str, valid), *thin, median(seconds(row) for row in both),
                      median(number(row, "peer_seconds") for row in both),
                      median(number(row, "time_ratio") for row in both)])
    return markdown(head, lines) + (
        "\n\nTorch-Pruning was told the classifiers and head counts. Its results count as valid if they run and their "
        "outputs have the shapes they had; nothing else about them is checked. Medians over the models where both "
        "passed; without our proof.")


def failures(rows: list[Row]) -> str:
    """The models that were refused, and those that went wrong, each with its reason; empty if there are none."""
    lines = [f"- `{row['suite']}/{row['model']}`, {'refused' if yes(row, 'refused') else 'wrong'}"
             f" ({row.get('stage') or 'time'}): {_first_line(row)}" for row in rows if not yes(row)]
    count = Counter("refused" if yes(row, "refused") else "wrong" for row in rows if not yes(row))
    return "\n".join([f"Not removed from: {', '.join(f'{n} {what}' for what, n in count.items())}.", "", *lines]
                     ) if lines else ""


def _first_line(row: Row) -> str:
    return (str(row.get("reason") or "no reason given").splitlines() or [""])[0][:200]
