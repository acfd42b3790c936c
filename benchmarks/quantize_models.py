"""The models of `quantize_speed.py`, what they run on, and the files that its workers share.

Vision models are torchvision's, untrained, with the statistics that their batch norms have on noise: what is measured
is time, and values must stay in ranges that quantization can meet. MiniLM has its trained weights and reads real
sentences.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "vgg11", "shufflenet_v2_x0_5", "vit_b_16", "minilm")
TRANSFORMERS = ("vit_b_16", "minilm")
PLACE = Path(__file__).parent.parent / "out/quantize_speed"
SIZE = 224  # pixels
SAMPLES = 16  # to calibrate on
SETTLE = 3, 4  # batches, and images in each, that batch norms get their statistics from


@dataclass(frozen=True)
class Job:
    """One model at one batch size."""

    model: str
    batch: int

    @property
    def transformer(self) -> bool:
        return self.model in TRANSFORMERS

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arguments."""
        return ("input_ids", "attention_mask") if self.model == "minilm" else ("x",)

    @cached_property
    def net(self) -> nn.Module:
        """The float model in evaluation mode, the same in every process."""
        import torch

        if self.model == "minilm":
            from minilm import MiniLM

            return MiniLM()
        import torchvision

        torch.manual_seed(0)  # of the weights; `_settle` draws those that are all zeros
        net: nn.Module = torchvision.models.get_model(self.model)
        kept = cached(PLACE / f"{self.model}-torch-{version('torch')}.pt", lambda path: _settle(net, path))
        net.load_state_dict(torch.load(kept, weights_only=True))
        return net.eval()

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """What is timed: the arguments, `batch` samples of them."""
        return self._samples(self.batch, 1)

    @cached_property
    def calibration(self) -> list[tuple[Tensor, ...]]:
        """Arguments of `SAMPLES` other samples, `batch` at a time."""
        samples = self._samples(SAMPLES, 2)
        return [tuple(each[at:at + self.batch] for each in samples) for at in range(0, SAMPLES, self.batch)]

    def _samples(self, count: int, seed: int) -> tuple[Tensor, ...]:
        import torch

        if self.model != "minilm":
            return (torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)),)
        from minilm import sentences, tokens

        found = tokens(sentences()[seed - 1][:2 * count])  # two sentences a sample
        return tuple(found[name].reshape(count, -1) for name in self.names)

    def file(self, name: str, *packages: str) -> Path:
        """Where something made of this job is kept: `name` after the versions of what it was made with."""
        made = "-".join(f"{package}-{version(package)}" for package in ("torch", *packages))
        return PLACE / f"{self.model}-b{self.batch}" / made / name


def version(package: str) -> str:
    return importlib.metadata.version(package)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among the processes that ask for `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made_by(process: int) -> Path:
    """Where the workers that a process has started keep what is theirs alone."""
    return PLACE / f"made-by-{process}"


def cached(path: Path, make: Callable[[Path], Any]) -> Path:
    """`path`, which `make` writes (to a name beside it that ends alike) where it isn't there yet."""
    with locked(path):
        if not path.exists():
            scratch = path.with_name(f"{os.getpid()}-{path.name}")
            make(scratch)
            scratch.replace(path)
    return path


def _settle(net: nn.Module, path: Path) -> None:
    import torch

    batches, images = SETTLE
    for layer in net.modules():
        if isinstance(layer, torch.nn.Linear) and not layer.weight.any():  # vit's head, which would give zeros
            torch.nn.init.trunc_normal_(layer.weight, std=0.02)
    if isinstance(token := getattr(net, "class_token", None), torch.nn.Parameter):  # zeros, lost beside patches of one
        torch.nn.init.normal_(token)  # scale, as a trained one isn't
    net.train()
    with torch.no_grad():
        for seed in range(batches):
            net(torch.randn(images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(100 + seed)))
    torch.save(net.state_dict(), path)
