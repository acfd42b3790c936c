"""Both models, and the images: also for `fxcompress train`, which calls the factories without arguments."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision.models import shufflenet_v2_x0_5, vgg11

from fxcompress.training.digits import DEVIATION, MEAN, digits

CLASSES = (3, 5, 6, 8, 9)  # the digits that are easily taken for each other
SIDE = 64  # pixels
TRAIN, TEST = 100, 30  # images a class
EXAMPLE = (torch.zeros(2, 3, SIDE, SIDE),)


def student() -> nn.Module:
    """torchvision's shufflenet_v2_x0_5 with five classes, untrained."""
    return shufflenet_v2_x0_5(num_classes=len(CLASSES))


def teacher() -> nn.Module:
    """torchvision's vgg11 with five classes, untrained. Its head is one linear layer on the 2x2 places that 64 pixels
    leave, in place of three with 119 million parameters on 7x7 places that would be made of them."""
    model = vgg11(num_classes=len(CLASSES))
    model.avgpool = nn.Identity()
    model.classifier = nn.Linear(512 * 2 * 2, len(CLASSES))
    return model


student.example_inputs = teacher.example_inputs = EXAMPLE  # type: ignore[attr-defined]


def make_images(folder: Path, train: int = TRAIN, test: int = TEST) -> None:
    """Write PNG files into `folder/train/CLASS` and `folder/test/CLASS`, so many a class. Those that are there stay."""
    for part, (images, labels), count in zip(("train", "test"), digits(), (train, test), strict=True):
        for digit in CLASSES:
            place = folder / part / str(digit)
            place.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images[labels == digit][:count, 0]):
                file = place / f"{number:03}.png"
                if not file.exists():
                    pixels = ((image * DEVIATION + MEAN) * 255).round().to(torch.uint8).numpy()
                    Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file)
