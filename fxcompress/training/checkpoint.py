"""Checkpoints: one file, written whole or not at all, read without running anything that it holds."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..diagnostics import Diagnostic, PlanError

FORMAT = 1
NAME = "checkpoint.pt"


def write_bytes(path: Path, write: Any) -> None:
    """Let `write(file)` fill a file beside `path`, see it onto the disk and put it in place: a process that is killed
    at any moment leaves the old file or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name too
    finally:
        os.close(folder)


def make_ready(folder: Path, *, resume: bool) -> None:
    """Make the folder of a run; what killed processes left half written goes, and so does the checkpoint of an earlier
    run unless it is resumed. Raises PlanError (FXC0809)."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob(f".{NAME}.*"), *([] if resume else [folder / NAME])]:
            path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says of files becomes a PlanError (FXC0809)."""
    try:
        yield
    except OSError as error:
        raise PlanError([Diagnostic("FXC0809", f"the training can't write to {path}: {error.strerror or error}",
                                    help="name a folder that can be made and written to, with room for checkpoints")
                         ]) from error


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint. Raises PlanError (FXC0809)."""
    with writing(path):
        write_bytes(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path) -> dict[str, Any]:
    """Read one. Only tensors and plain values are let in. Raises PlanError (FXC0805)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise PlanError([Diagnostic("FXC0805", f"there is no checkpoint to resume from: {path}",
                                    help="leave `--resume` out to begin anew")]) from error
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError([Diagnostic("FXC0805", f"the checkpoint {path} can't be read: {words}",
                                    help="begin anew, without `--resume`")]) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise PlanError([Diagnostic("FXC0805", f"{path} is no checkpoint of this version of `fxcompress train`",
                                    help="begin anew, without `--resume`")])
    return state


def require_same(state: Mapping[str, Any], settings: Mapping[str, Any], initial: str) -> None:
    """Raise PlanError (FXC0805) where the run that `state` is of was told otherwise, or began with other weights."""
    other = [f"`{name}` was {state['settings'].get(name)!r}, and is {value!r} now" for name, value in settings.items()
             if state["settings"].get(name) != value]
    if state["initial"] != initial:
        other.append("the model doesn't begin with the weights that it began with then")
    if other:
        raise PlanError([Diagnostic("FXC0805", "the checkpoint is of another run", notes=tuple(other),
                                    help="resume with the same settings, or begin anew, without `--resume`")])


def print_of(model: nn.Module) -> str:
    """SHA-256 of the names and values of a model's state."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Random numbers

def rng_state() -> dict[str, Any]:
    """That of Python, numpy and torch in this process, as plain values and tensors."""
    name, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    return {"python": random.getstate(),
            "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place), int(has_gauss),
                      float(gauss)),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Go on from there."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# Optimizers: their groups by the names of their parameters, for what came in while training has a group of its own

def optimizer_state(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """The state of an optimizer of parameters of `module`."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {"groups": [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups],
            "state": optimizer.state_dict()}


def grouped(module: nn.Module, groups: Iterable[Iterable[str]]) -> list[dict[str, Any]]:
    """The parameters of such groups, to make the optimizer anew from."""
    return [{"params": [module.get_parameter(name) for name in names]} for names in groups]


def beside(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that `state_dict` leaves out: those of adapters and of learned temperatures."""
    known = module.state_dict().keys()
    return {name: parameter.detach() for name, parameter in module.named_parameters() if name not in known}


def put_beside(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set them to what they were."""
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(value)


def on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state dict of tensors in main memory."""
    return {name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in state.items()}
