"""What the files of `export` give beside the simulation that was calibrated, on models with their real weights.

    python benchmarks/quantize_export.py [--only MODEL ...] [--out benchmarks/results/quantize_export.csv]
    python benchmarks/quantize_export.py --show      # the table of the CSV, without running anything

EfficientNet-Lite0 and MobileNetV2 on the test crops of `photographs.py`, MiniLM on the test sentences of `minilm.py`.
Each file is run by the runtime it is made for. Distances are in steps of 8 bits over what the simulation gives, and
beside them how far the simulation is from fp32, and from itself in float64: roundings that fall to the other side
somewhere in a deep model are noise of the kind that rounding is anyway, of which a file must add little. What files
compute is seen in single layers, each fed with the simulation's integers (`quantize_layers.py`), on the first batch.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.backends.runtimes import RUNTIMES

sys.path.insert(0, str(Path(__file__).parent))
import minilm
from photographs import crops, efficientnet_lite0
from quantize_accuracy import BATCH, asked, sqnr
from quantize_equalize import Features, normalized
from quantize_layers import Apart, InDouble, file_apart, module_apart, rounded
from tables import Row, markdown, read, write

RESULTS = Path(__file__).parent / "results/quantize_export.csv"
COLUMNS = ("model", "by", "most", "mean", "sqnr", "rounding", "cuts", "most_apart", "share")
FILE = "model.onnx"
POLICY = 'use "std/quant.fxc" {{ int8 }}\npolicy small {{ quantize {layers} as int8 {{ {more} }} }}'
STEPS = 255  # of 8 bits
Batch = Sequence[Tensor]
Run = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Subject:
    """A model with the batches to calibrate on and to test on, each of what it takes in order."""

    model: nn.Module
    calibration: Sequence[Batch]
    test: Sequence[Batch]
    layers: str = "conv2d | linear"
    more: str = "correct_bias = true"  # settings


def _images(model: nn.Module, prepare: Callable[[Tensor], Tensor]) -> Subject:
    seen, test = ([(part,) for part in prepare(images).split(BATCH)] for images in crops())
    return Subject(model, seen, test)


def _minilm(more: str = "") -> Subject:
    seen, test = ([tuple(batch.values()) for batch in minilm.batches(texts, 32)] for texts in minilm.sentences())
    return Subject(minilm.MiniLM(), seen, test, "linear", more)


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "EfficientNet-Lite0": lambda: _images(efficientnet_lite0(), lambda images: images),
    "MobileNetV2": lambda: _images(Features(), normalized),
    "MiniLM": _minilm,
    "MiniLM, attention too": lambda: _minilm("attention = true"),
}


def ways(module: torch.fx.GraphModule, folder: Path) -> Mapping[str, Run]:
    """The module itself, and each format that it is exported to, in `folder`."""
    def by(runtime: str, name: str) -> Run:
        run = RUNTIMES[runtime](fxcompress.export(module, folder / name).path)
        return lambda batch: run(batch)[0]

    program = torch.export.load(fxcompress.export(module, folder / "model.pt2").path).module()
    return {"GraphModule": lambda batch: module(*batch), "`.pt2`": lambda batch: program(*batch),
            "ONNX Runtime": by("onnxruntime", FILE), "OpenVINO": by("openvino", "model.xml")}


def layers(simulation: torch.fx.GraphModule, module: torch.fx.GraphModule, folder: Path,
           batch: Batch) -> Mapping[str, Apart]:
    """How far single layers lie from the simulation, by what runs them; `folder` is that of `ways`."""
    known = rounded(simulation, batch)
    return {"GraphModule": module_apart(module, known, batch),
            "ONNX Runtime": file_apart("onnxruntime", folder / FILE, known, batch),
            "OpenVINO": file_apart("openvino", folder / FILE, known, batch)}


def measure(name: str) -> list[Row]:
    """A row for each way to run the model `name`."""
    subject = SUBJECTS[name]()
    policy = POLICY.format(layers=subject.layers, more=subject.more)
    result = fxcompress.compile(policy, subject.model, tuple(subject.test[0]), calibration=list(subject.calibration))
    simulation, module = result.module.eval(), result.finalize(target="cpu")
    simulated = _all(lambda batch: simulation(*batch), subject.test)
    rounding = sqnr(simulated, _all(lambda batch: subject.model(*batch), subject.test))
    step = float(simulated.max() - simulated.min()) / STEPS
    double = InDouble(simulation)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runs = {"the simulation in float64": lambda batch: double.run(*map(_doubled, batch)).float(),
                **ways(module, Path(folder))}
        apart = layers(simulation, module, Path(folder), subject.test[0])
        for by, run in runs.items():
            found = _all(run, subject.test)
            off = (found - simulated).abs() / step
            rows.append({"model": name, "by": by, "most": float(off.max()), "mean": float(off.mean()),
                         "sqnr": sqnr(found, simulated), "rounding": rounding,
                         **(asdict(apart[by]) if by in apart else {})})
    return rows


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@torch.no_grad()
def _all(run: Run, batches: Sequence[Batch]) -> Tensor:
    return torch.cat([run(batch) for batch in batches])


def table(rows: list[Row]) -> str:
    """The Markdown table."""
    head = ("model", "run by", "mean distance, steps", "the most", "SQNR to the simulation, dB",
            "of the simulation to fp32", "layers by themselves", "the most, steps", "of their integers differ")
    return markdown(head, [
        (str(row["model"]), str(row["by"]), f"{float(row['mean']):.2f}", f"{float(row['most']):.1f}",
         f"{float(row['sqnr']):.1f}", f"{float(row['rounding']):.1f}", str(row["cuts"]) or "-",
         str(row["most_apart"]) or "-", f"{100 * float(row['share']):.2g} %" if row["share"] else "-")
        for row in rows], words=2)


def main() -> None:
    args = asked(__doc__.splitlines()[0], SUBJECTS, RESULTS)
    if not args.show:
        torch.set_num_threads(1)
        kept = [row for row in read(args.out) if row["model"] not in args.only]
        for name in args.only:
            kept += measure(name)
            write(args.out, sorted(kept, key=lambda row: list(SUBJECTS).index(row["model"])), COLUMNS)
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
