"""`fxcompress train`: data by SPEC, what is printed, what is written, what is refused."""

from __future__ import annotations

import json
import random
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import run
from torch import Tensor

import fxcompress
from fxcompress.diagnostics import FxcError
from fxcompress.spec_training import load_training
from fxcompress.training.data import Data, Inputs, Order, Samples, parted, training_loader

Golden = Callable[[str, str], None]
ROOT = Path(__file__).parent.parent
LENET = ROOT / "examples/lenet_mnist"
GREY, COLOUR = (torch.zeros(2, 1, 28, 28),), (torch.zeros(2, 3, 16, 16),)


def normal(text: str) -> str:
    """Without what training makes of the numbers."""
    text = re.sub(r"zeroed, to \S+", "zeroed, to <rounding>", text)
    text = re.sub(r"(loss|accuracy) \d+\.\d+", r"\1 <number>", text)
    return re.sub(r" +\d+\.\d% (?= *Nx)", " <share>  ", re.sub(r"epoch \d+, the best", "epoch <n>, the best", text))


def test_the_demo_by_one_command(tmp_path: Path, golden: Golden, capsys: pytest.CaptureFixture[str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", str(LENET / "policy.fxc"), "--model", f"{LENET / 'lenet.py'}:LeNet5", "--data", "mnist5k",
                "--epochs", "2", "-o", "out", "--scheduler", "CosineAnnealingLR", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    golden("commands/train.txt", normal(printed.out))
    written = {path.name for path in Path("out").iterdir()} - {"tensorboard"}
    assert written == {"artifact", "checkpoint.pt", "metrics.csv", "metrics.jsonl", "curves.png", "curves.svg",
                       "ramps.png", "ramps.svg"}
    for name in ("curves", "ramps"):
        assert Image.open(f"out/{name}.png").size[0] > 500 and "</svg>" in Path(f"out/{name}.svg").read_text()
    weights = [value for name, value in fxcompress.load("out/artifact").named_parameters() if name.endswith("weight")]
    zeros = sum(int((value == 0).sum()) for value in weights)
    assert zeros / sum(value.numel() for value in weights) == pytest.approx(0.7, abs=0.01)
    head, *rows = Path("out/metrics.csv").read_text().splitlines()
    assert len(rows) == 2 and {"step", "loss", "validation.accuracy", "sparsity"} <= set(head.split(","))
    accuracy = float(rows[-1].split(",")[head.split(",").index("validation.accuracy")])
    assert accuracy > 0.6  # ten classes

    assert run(["inspect", "out/artifact"]) == 0
    assert "sparsity" in capsys.readouterr().out
    assert run(["train", str(LENET / "policy.fxc"), "--model", f"{LENET / 'lenet.py'}:LeNet5", "--data", "mnist5k",
                "--epochs", "2", "-o", "out", "--scheduler", "CosineAnnealingLR", "--device", "cpu", "--resume"]) == 0
    assert "epoch 1/2" not in capsys.readouterr().out  # it was finished


def test_curves_go_to_tensorboard_where_it_is(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from train_nets import trainer

    trained = trainer(tmp_path).fit()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = events.Scalars("epoch/validation.loss")
    assert [point.step for point in points] == [6 * epoch for epoch in range(1, 7)]
    assert points[-1].value == pytest.approx(trained.history[-1]["validation"]["loss"], rel=1e-5)


def test_without_matplotlib_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train_nets import trainer

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trained = trainer(tmp_path, epochs=6).fit()
    assert any("matplotlib isn't installed" in note for note in trained.notes)
    assert not (tmp_path / "curves.png").exists()
    report = json.loads((tmp_path / "artifact/report.json").read_text())
    assert report["training"]["notes"] == list(trained.notes)


# Data

def test_digits_are_those_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(LENET)
    from digits import digits

    found = load_training("mnist5k", GREY)
    for part, expected in zip((found.train, found.validation), digits(), strict=True):
        assert torch.equal(part.tensors[0], expected.images)  # type: ignore[union-attr]
        assert torch.equal(part.tensors[1], expected.labels)  # type: ignore[union-attr]


def images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 5) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            grey = np.full((20, 24, 3), 40 * number + index, dtype=np.uint8)
            Image.fromarray(grey).save(folder / name / f"{index}.png")


def test_a_folder_of_images(tmp_path: Path) -> None:
    images(tmp_path / "all")
    found = load_training(f"imagefolder:{tmp_path / 'all'}", COLOUR)
    assert (len(found.train), len(found.validation)) == (8, 2)  # type: ignore[arg-type]
    image, label = found.train[0]
    path, named = found.train.dataset.samples[found.train.indices[0]]  # type: ignore[attr-defined]
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert image.shape == (3, 16, 16) and label == named
    level = torch.full((3, 16, 16), (40 * label + int(Path(path).stem)) / 255)
    torch.testing.assert_close(image, (level - mean[:, None, None]) / deviation[:, None, None])
    images(tmp_path / "both/train")
    images(tmp_path / "both/val", count=2)
    both = load_training(f"imagefolder:{tmp_path / 'both'}", GREY)
    assert (len(both.train), len(both.validation)) == (10, 4)  # type: ignore[arg-type]
    assert both.train[0][0].shape == (1, 28, 28)


def test_a_dataset_of_torchvision_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST/raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    for part, count in (("train", 4), ("t10k", 2)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, count, 28, 28) + pixels[:count].tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))
    found = load_training(f"torchvision:MNIST:{tmp_path}", GREY)
    assert (len(found.train), len(found.validation)) == (4, 2)  # type: ignore[arg-type]
    image, label = found.train[3]
    assert label == 3
    torch.testing.assert_close(image[0], (torch.from_numpy(pixels[3]).float() / 255 - 0.5) / 0.5)


def test_data_by_a_function(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def one():\n    return TensorDataset(torch.arange(10.0)[:, None], torch.arange(10) % 2)\n"
        "def two():\n    return one(), one()\n"
        "def wrong():\n    return 3\n"
        "def fails():\n    raise OSError('no disk')\n")
    assert len(load_training(f"{tmp_path}/own.py:one", GREY).train) == 8  # type: ignore[arg-type]
    assert len(load_training(f"{tmp_path}/own.py:two", GREY).train) == 10  # type: ignore[arg-type]
    for name, code in (("wrong", "FXC0802"), ("fails", "FXC0714"), ("none", "FXC0713")):
        with pytest.raises(FxcError) as caught:
            load_training(f"{tmp_path}/own.py:{name}", GREY)
        assert caught.value.diagnostics[0].code == code


@pytest.mark.parametrize("spec", ["mnist", "imagefolder:", "imagefolder:nowhere", "torchvision:MNIST",
                                  "torchvision:MNIST:nowhere", "torchvision:Mnist:x"])
def test_wrong_data_specs(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code = run(["train", str(LENET / "policy.fxc"), "--model", f"{LENET / 'lenet.py'}:LeNet5", "--data", spec,
                "--epochs", "1", "-o", "out", "--device", "cpu"])
    printed = capsys.readouterr()
    assert code == 2 and "FXC0801" in printed.err and "help:" in printed.err
    assert not Path("out").exists()


def test_a_model_that_takes_no_images(tmp_path: Path) -> None:
    images(tmp_path / "all")
    with pytest.raises(FxcError) as caught:
        load_training(f"imagefolder:{tmp_path / 'all'}", (torch.zeros(2, 10),))
    assert caught.value.diagnostics[0].code == "FXC0801"


# The order of samples, and what is drawn in them

class Drawn(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.stack([torch.rand(()), torch.tensor(random.random()), torch.tensor(np.random.rand())]), index


def epoch(workers: int, number: int, skip: int = 0) -> list[Tensor]:
    loader, order = training_loader(Data(Drawn()), 2, 1, 7, workers)
    order.begin(number, skip)
    found = []
    for indices, batch in loader:
        assert torch.equal(torch.as_tensor(indices), batch[1])
        found.append(torch.cat([batch[0].flatten(), batch[1]]))
    return found


def test_what_is_drawn_hangs_on_seed_epoch_and_sample_alone() -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    whole = epoch(0, 3)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()
    torch.manual_seed(99)
    for other in (epoch(2, 3), [*whole[:1], *epoch(0, 3, 1)]):
        assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    assert not torch.equal(torch.cat(epoch(0, 4)), torch.cat(whole))
    indices = torch.cat([batch[-2:] for batch in whole]).int().tolist()
    assert sorted(indices) == list(range(8))


def test_an_epoch_is_cut_to_whole_steps() -> None:
    order = Order(11, 4, 0)
    assert order.steps == 2 and len(list(order)) == len(order) == 8
    order.begin(1, 1)
    assert len(list(order)) == len(order) == 4


def test_calibration_data_are_training_inputs() -> None:
    data = Data(Samples(Drawn(), 0).dataset)
    given = Inputs(data, 5, 2, 0)
    first, again = list(given), list(given)
    assert [len(batch[0]) for batch in first] == [2, 2, 1] and len(given) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))


def test_samples_say_what_their_target_is() -> None:
    assert parted((1, 2, 3)) == ((1, 2), {}, 3)
    assert parted({"x": 1, "labels": 2}) == ((), {"x": 1}, 2)
    for sample in ((1,), {"x": 1}, torch.zeros(3)):
        with pytest.raises(FxcError):
            parted(sample)
