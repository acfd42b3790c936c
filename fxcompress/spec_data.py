"""Calibration data of the command line: a file of tensors, or a function of the user's own.

| SPEC | the data |
|---|---|
| `FILE.npy` | an array: the first dimension counts samples |
| `FILE.npz`, `FILE.safetensors` | one array for the only input, or one for each input by its name |
| `package.module:factory`, `file.py:factory` | what `factory()` gives, or `factory` itself: an iterable of batches |

Files are read without pickle, so that one from a stranger can't run anything; a function is the user's own Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn
from zipfile import BadZipFile

import torch
from torch import Tensor

from .diagnostics import Diagnostic
from .spec import SpecError, factory_of

FORMS = "FILE.npy, FILE.npz, FILE.safetensors, package.module:factory or file.py:factory"


def load_data(spec: str) -> object:
    """What `calibration=` of `compile` takes, from `spec`. Raises SpecError: FXC0719 for a file that is none of these
    or can't be read, FXC0710, FXC0713 and FXC0714 for a function that isn't there or fails."""
    reader = _READERS.get(Path(spec).suffix)
    if reader is not None:
        return _only(reader(spec))
    if ":" not in spec:
        _fail(f"`{spec}` doesn't say where calibration data come from", help_=f"write {FORMS}")
    found = factory_of(spec)
    return found() if callable(found) else found


def _fail(message: str, *notes: str, help_: str, cause: Exception | None = None) -> NoReturn:
    raise SpecError([Diagnostic("FXC0719", message, notes=notes, help=help_)]) from cause


def _numpy(path: str) -> Mapping[str, Tensor]:
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        _fail(f"the calibration data can't be read from {path}: {str(error).splitlines()[0]}",
              help_="give a file that numpy.save or numpy.savez wrote, of numbers and not of Python objects",
              cause=error)


def _safetensors(path: str) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        _fail(f"the calibration data can't be read from {path}: {error}",
              help_="give a file that safetensors.torch.save_file wrote", cause=error)


_READERS: Mapping[str, Callable[[str], Mapping[str, Tensor]]] = {
    ".npy": _numpy, ".npz": _numpy, ".safetensors": _safetensors}


def _only(tensors: Mapping[str, Tensor]) -> object:
    """The only tensor of a file, whatever its name; else all of them by name."""
    return next(iter(tensors.values())) if len(tensors) == 1 else dict(tensors)
