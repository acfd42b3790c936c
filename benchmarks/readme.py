"""Bring the figures of README.md and docs up to date: the demo's from the record of a run, tables from result files.

    make figures                                    # runs the demo, then this
    python benchmarks/readme.py out/lenet_mnist.json  # docs/lenet_mnist.json, docs/lenet_mnist.svg and README.md
    python benchmarks/readme.py                     # the tables of benchmarks/results/*.csv alone
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import compensate
import distill_step
import quantize_accuracy
import quantize_and_remove
import quantize_calibrate
import quantize_digits
import quantize_equalize
import quantize_export
import quantize_minilm
import quantize_sizes
import quantize_speed
import quantize_zoo
import remove_accuracy
import remove_latency
import remove_speed
import remove_zoo
from tables import read

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "docs/lenet_mnist.json"
PICTURE = ROOT / "docs/lenet_mnist.svg"

PAGES = ("README.md", "docs/removal.md", "docs/calibration.md", "docs/quantization.md")  # they have the tables
# Name of a table -> the CSV it is made of, and what makes it.
TABLES: Mapping[str, tuple[Path, Callable[[list[dict[str, Any]]], str]]] = {
    "zoo": (remove_zoo.RESULTS, remove_zoo.summary),
    "speed": (remove_speed.RESULTS, remove_speed.table),
    "latency": (remove_latency.RESULTS, remove_latency.table),
    "accuracy": (remove_accuracy.RESULTS, remove_accuracy.table),
    "compensate": (compensate.RESULTS, compensate.table),
    "quantize-speed": (quantize_speed.RESULTS, quantize_speed.table),
    "quantize-speed-without-vnni": (quantize_speed.WITHOUT_VNNI, quantize_speed.table_without_vnni),
    "quantize-remove": (quantize_and_remove.RESULTS, quantize_and_remove.table),
    "quantize-accuracy": (quantize_accuracy.RESULTS, quantize_accuracy.table),
    "quantize-calibrate": (quantize_calibrate.RESULTS, quantize_calibrate.table),
    "quantize-equalize": (quantize_equalize.RESULTS, quantize_equalize.table),
    "quantize-export": (quantize_export.RESULTS, quantize_export.table),
    "quantize-digits": (quantize_digits.RESULTS, quantize_digits.table),
    "quantize-minilm": (quantize_minilm.RESULTS, quantize_minilm.table),
    "quantize-sizes": (quantize_sizes.RESULTS, quantize_sizes.table),
    "distill": (distill_step.RESULTS, distill_step.table),
    "quantize-zoo": (quantize_zoo.RESULTS, quantize_zoo.table),
}


def block(name: str) -> re.Pattern[str]:
    """What stands between the two markers of `name`."""
    return re.compile(rf"(?<=<!-- {name}: begin -->\n).*?(?=<!-- {name}: end -->)", flags=re.S)


def filled(text: str) -> str:
    """`text` with every table that it has markers for made anew. Raises FileNotFoundError without its CSV."""
    for name, (path, make) in TABLES.items():
        if block(name).search(text):
            if not path.exists():
                raise FileNotFoundError(f"{path}: run the benchmark that writes it")
            table = make(read(path)) + "\n"
            text = block(name).sub(lambda _, table=table: table, text)
    return text


def figures(record: dict[str, Any]) -> str:
    """The Markdown table of a record that the demo wrote."""
    before, after = record["before"], record["after"]
    rows = [
        ("accuracy on 1,000 unseen digits", *(f"{run['accuracy']:.1%}" for run in (before, after)),
         f"{(after['accuracy'] - before['accuracy']) * 100:+.1f} points"),
        *((name, *(form(run[key]) for run in (before, after)), f"x {after[key] / before[key]:.2f}")
          for name, key, form in (
              ("parameters", "params", "{:,}".format),
              ("parameters that are not zero", "nonzero", "{:,}".format),
              ("MACs an image", "macs", "{:,}".format),
              ("weights file", "file", lambda size: f"{size / 1024:.1f} KiB"),
              ("weights file, gzipped", "gzipped", lambda size: f"{size / 1024:.1f} KiB"),
              ("latency, one image, one thread", "latency", lambda seconds: f"{seconds * 1e6:.0f} µs"),
          )),
    ]
    lines = [("", "dense", "compressed", ""), ("---", "---:", "---:", "---:"), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    control = record["history"]["control"][-1][0]
    return (f"{table}\n\nTrained on for the same {record['epochs']} epochs without compression, the dense network "
            f"reaches {control:.1%}.\nThe whole run, training included, took {record['seconds']:.0f} s on one core.\n")


def picture(record: dict[str, Any], path: Path) -> None:
    """Accuracy, and the parameters in use, over the epochs of the run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fxcompress"  # the same record gives the same file
    from matplotlib import pyplot

    epochs, history = record["epochs"], record["history"]
    first, second = range(1, epochs + 1), range(epochs, 2 * epochs + 1)
    last = history["dense"][-1]
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(7.5, 4.2), height_ratios=(3, 2))
    top.plot(first, [100 * run[0] for run in history["dense"]], color="#555555", label="dense")
    for name, colour, style in (("control", "#999999", "--"), ("compressed", "#c2410c", "-")):
        label = "dense, trained on" if name == "control" else name
        top.plot(second, [100 * run[0] for run in (last, *history[name])], style, color=colour, label=label)
    top.set(ylabel="accuracy, %", ylim=(94, 100))
    top.legend(loc="lower right", frameon=False)
    used = [*history["dense"], *history["compressed"]]
    bottom.step(range(1, 2 * epochs + 1), [run[1] / 1000 for run in used], where="pre", color="#c2410c")
    bottom.set(ylabel="parameters in use, k", xlabel="epoch", ylim=(0, 66), xlim=(1, 2 * epochs))
    for axes in (top, bottom):
        axes.axvline(epochs, color="#bbbbbb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?", help="the JSON file that the demo wrote beside its artifact")
    path = parser.parse_args().record
    record = None
    if path is not None:
        kept = path.read_text(encoding="utf-8")
        RECORD.write_text(kept, encoding="utf-8")
        record = json.loads(kept)
        picture(record, PICTURE)
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        if record is not None:
            text = block("figures").sub(lambda _: figures(record), text)
        (ROOT / page).write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
