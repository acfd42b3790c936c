"""The benchmarks of `quantize` over many models: what they print is what was done, and MiniLM is the real one."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FAMILIES = {"timm": "timm", "transformers": "transformers", "nn": "torch"}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.parametrize("name", [
    "nn/Transformer", "nn/GRU", "transformers/bert",
    *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "transformers/gpt2", "shufflenet_v2_x0_5", "densenet121", "swin_t", "convnext_tiny", "timm/nfnet_f0",
        "timm/ghostnet_050", "timm/tf_efficientnet_lite0", "timm/mobilevitv2_050", "transformers/llama",
        "transformers/vit"))])
def test_all_that_is_asked_for_is_in_kernels(name: str) -> None:
    """Every layer, near the float model; the row itself checks that quantizers stand on float tensors alone."""
    import quantize_zoo

    family = name.partition("/")[0]
    if util.find_spec(FAMILIES.get(family, "torchvision")) is None:
        pytest.skip(f"{family} isn't installed")
    row = quantize_zoo.run(name, kernels=True)
    assert row["layers"] == row["quantized"] == row["kernels"] and not row["why"]
    assert 0 < row["drift"] < 0.1 and row["kernel_drift"] < 0.1


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
def test_minilm_knows_what_sentences_mean() -> None:
    """A paraphrase is nearer than another subject, padding changes nothing, and the sentences are fit for a test."""
    import minilm

    if not _installed(minilm.PACKAGE) or util.find_spec("transformers") is None:
        pytest.skip("the model isn't installed")
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell sharply today."]
    with torch.no_grad():
        one, two, other = minilm.MiniLM()(**minilm.tokens(texts))
        padded, mask = minilm.tokens(texts[:1]).values()
        short = int(mask.sum())
        alone = minilm.MiniLM()(padded[:, :short], mask[:, :short])[0]
    assert float(one @ two) > 0.5 and float(one @ other) < 0.2
    assert torch.allclose(alone, one, atol=1e-5) and abs(float(one.norm()) - 1) < 1e-5
    calibration, test = minilm.sentences(64, 64)
    assert len({*calibration, *test}) == 128 and (calibration, test) == minilm.sentences(64, 64)
