"""Whether `quantize` takes what models are made of: captured, calibrated and simulated, some dozens of them.

    python benchmarks/quantize_zoo.py [--only resnet18 bert ...] [--kernels] [--out benchmarks/results/quantize_zoo.csv]
    python benchmarks/quantize_zoo.py --show      # the table of the CSV, without running anything

Small inputs, random weights (`zoo_models.enliven` gives those that are constant values). All that the policy
`quantize conv2d | linear | multihead_attention | addmm` selects is counted: how many layers that are, how many stay in
float and why, and how far the simulated model is from the float one, relative to it; with `--kernels` the lowered one
too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.diagnostics import FxcError
from fxcompress.graph.ops import kind_of

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"
from tables import Row, markdown, read, write
from zoo_models import enliven

RESULTS = Path(__file__).parent / "results/quantize_zoo.csv"
COLUMNS = ("model", "layers", "quantized", "left", "drift", "kernels", "kernel_drift", "why")
KINDS = ("conv2d", "linear", "multihead_attention", "addmm")


@dataclass(frozen=True)
class Subject:
    """A model and what it is called with."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]


def images(side: int, batch: int = 2) -> tuple[Tensor]:
    """Normally distributed images."""
    return (torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)),)


def words(length: int = 16) -> tuple[Tensor, Tensor]:
    """Token ids, and a mask that leaves the last ones out."""
    ids = torch.randint(0, 99, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, length // 2:] = 0
    return ids, mask


def _torchvision(name: str, side: int = 64, **options: Any) -> Subject:
    def make() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None, **options)

    return Subject(make, lambda: images(side))


def _timm(name: str, side: int = 96) -> Subject:
    def make() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, pretrained=False)
        return made

    return Subject(make, lambda: images(side))


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def _transformers(model: str, inputs: Callable[[], tuple[Any, ...]], **settings: Any) -> Subject:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{model.removesuffix('Model')}Config")(**settings)
        made: nn.Module = getattr(transformers, model)(config)
        return made

    return Subject(make, inputs)


def _sequence() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 6, 32), torch.randn(2, 4, 32)


class _Recurrent(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.rnn, self.after = nn.Linear(32, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        found, state = self.rnn(self.before(x).relu())
        return self.after(found) + self.after(state[-1])[:, None]


_PATCHES = {"image_size": 32, "patch_size": 8}
SUBJECTS: Mapping[str, Subject] = {
    **{name: _torchvision(name) for name in (
        "resnet18", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1",
        "densenet121", "googlenet", "efficientnet_b0", "mnasnet0_5", "regnet_y_400mf", "convnext_tiny", "vgg11_bn")},
    "inception_v3": _torchvision("inception_v3", 96), "swin_t": _torchvision("swin_t"),
    "swin_v2_t": _torchvision("swin_v2_t"),
    "vit_b_16": _torchvision("vit_b_16", 32, image_size=32),
    "deeplabv3_mobilenet_v3_large": _torchvision("deeplabv3_mobilenet_v3_large", weights_backbone=None),
    **{f"timm/{name}": _timm(name) for name in (
        "tf_efficientnet_lite0", "tf_mobilenetv3_small_100", "ghostnet_050", "repvgg_a0", "nfnet_f0", "resnetv2_50",
        "hrnet_w18_small", "mobilevitv2_050", "edgenext_xx_small", "hardcorenas_a")},
    **{f"timm/{name}": _timm(name, 224) for name in ("deit_tiny_patch16_224", "mixer_s32_224")},
    "transformers/bert": _transformers("BertModel", words, **_SMALL),
    "transformers/distilbert": _transformers("DistilBertModel", words, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "transformers/roberta": _transformers("RobertaModel", words, **_SMALL),
    "transformers/vit": _transformers("ViTModel", lambda: images(32), **_SMALL, **_PATCHES),
    "transformers/gpt2": _transformers("GPT2Model", lambda: (words()[0],), n_embd=32, n_layer=2, n_head=4),
    "transformers/llama": _transformers("LlamaModel", words, vocab_size=99, **_SMALL),
    "transformers/convnext": _transformers("ConvNextModel", lambda: images(64), hidden_sizes=[16, 16, 32, 32],
                                           depths=[1, 1, 1, 1]),
    "nn/Transformer": Subject(lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True), _sequence),
    "nn/GRU": Subject(_Recurrent, lambda: (torch.randn(2, 6, 32),)),
}


def run(name: str, kernels: bool) -> Row:
    """One model."""
    torch.manual_seed(0)
    subject = SUBJECTS[name]
    model = subject.make().eval()
    enliven(model)
    inputs = subject.inputs()
    captured = fxcompress.capture(model, inputs)
    asked = sum(_layers(node) for node in captured.graph.nodes if kind_of(node) in KINDS)
    there = {kind_of(node) for node in captured.graph.nodes}
    policy = f"policy all {{ quantize {' | '.join(kind for kind in KINDS if kind in there)} }}"
    result = fxcompress.compile(policy, model, inputs, calibration=[inputs])
    (step,) = result.plan.steps
    left = [note for note in step.notes if " in float: " in note]
    row: Row = {"model": name, "layers": asked, "quantized": len(step.changes), "left": asked - len(step.changes),
                "drift": drift(result.module.eval(), model, inputs), "why": left}
    integers = {node.args[0].meta["fxc"].dtype for node in result.captured.graph.nodes if kind_of(node) == "quantizer"}
    assert integers == {torch.float32}, f"{name}: a quantizer on {integers}"
    if kernels:
        try:
            lowered = result.finalize(target="cpu")
        except FxcError as error:  # kernels that depart from the simulation
            return {**row, "why": [*left, error.diagnostics[0].message]}
        row["kernels"] = sum(kind_of(node) in ("int_conv2d", "int_linear") for node in lowered.graph.nodes)
        row["kernel_drift"] = drift(lowered, model, inputs)
        row["why"] = [note for note in result.notes if " in float: " in note]
    return row


def _layers(node: fx.Node) -> int:
    """How many linear layers or convolutions a node is: an attention module has one projection, or three."""
    if kind_of(node) != "multihead_attention":
        return 1
    return 2 if node.args[0] is node.args[1] else 4


@torch.no_grad()
def drift(found: nn.Module, model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """‖found − model‖ / ‖model‖ over the first float tensor that they give."""
    one, two = _first(found(*inputs)), _first(model(*inputs))
    return float((one - two).norm() / two.norm())


def _first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return value


def table(rows: list[Row]) -> str:
    """The Markdown table."""
    return markdown(("model", "layers", "quantized", "drift", "in kernels", "drift"), [
        (str(row["model"]), str(row["layers"]), str(row["quantized"]), f"{float(row['drift']):.3f}",
         str(row["kernels"]), f"{float(row['kernel_drift']):.3f}" if row["kernel_drift"] else "") for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=sorted(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--kernels", action="store_true", help="lower to integer kernels too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="print the table of the CSV")
    args = parser.parse_args()
    if not args.show:
        torch.set_num_threads(1)
        rows = []
        for name in args.only:
            try:
                rows.append(run(name, args.kernels))
            except FxcError as error:
                rows.append({"model": name, "why": [str(item.message) for item in error.diagnostics]})
            print(rows[-1], flush=True)
            write(args.out, rows, COLUMNS)
    print(table([row for row in read(args.out) if row["layers"]]))


if __name__ == "__main__":
    main()
