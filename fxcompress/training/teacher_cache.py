"""What a teacher gives for each training sample, computed once and kept by the sample's index.

That is only right where a sample is the same each time. What a dataset draws is seen by the state of the three sources
of random numbers (Python's, numpy's, torch's on the CPU), for every sample; the first are read twice besides.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, TensorDataset, default_collate

from ..diagnostics import Diagnostic, PlanError
from ..engine import Result
from ..graph.distilled import distillations
from ..nn.distillation import Cache, Distillation
from . import checkpoint
from .data import Data, length, number, parted, seeded

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = "1"
TWICE = 8  # samples that are read a second time
FRESH = "take `cache` out of `distill`, or augmentation out of the data"


@dataclass(frozen=True)
class Kept:
    """Logits by sample: all in `values`, or the greatest of each in `values` with their `classes`, and in `rest` what
    each other class gets, so that at temperature 1 all of them together have the probability that they had."""

    values: Tensor
    classes: Tensor | None = None
    rest: Tensor | None = None
    width: int = 0

    @classmethod
    def of(cls, logits: Tensor, top_k: int | None) -> Kept:
        """Of logits [N, C], the `top_k` greatest; without it of any tensor [N, ...]."""
        if top_k is None:
            return cls(logits)
        values, classes = logits.topk(top_k, dim=1)
        others = logits.float().scatter(1, classes, -torch.inf)
        rest = torch.logsumexp(others, 1) - float(np.log(logits.shape[1] - top_k))
        return cls(values, classes.int(), rest.to(logits.dtype), logits.shape[1])

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The logits of the samples `indices` [n], on their device."""
        chosen = indices.to(self.values.device, torch.long)
        values = self.values[chosen]
        if self.classes is not None and self.rest is not None:
            spread = self.rest[chosen, None].expand(-1, self.width).clone()
            values = spread.scatter_(1, self.classes[chosen].long(), values)
        return values.to(indices.device)

    def __len__(self) -> int:
        return len(self.values)


def cached_distillation(result: Result) -> tuple[fx.Node, Distillation] | None:
    """The call whose teacher's logits are to be kept, if there is one now."""
    for node in distillations(result.captured.graph):
        found = result.captured.module_of(node)
        if isinstance(found, Distillation) and found.cache is not None:
            return node, found
    return None


def keep_teacher(result: Result, dataset: Dataset[Any], *, batch: int = 64, path: Path | str | None = None,
                 write: bool = True, precision: AbstractContextManager[Any] | None = None) -> Kept:
    """Run the teacher of the action with `cache` over `dataset`, whose samples are tuples (input, ..., target) or
    mappings, and let it go: from then on each call that asks for losses needs `teacher_logits=kept[indices]`.

    With `path` a file (safetensors, with SHA-256 of teacher and data) is read if it is there, and written otherwise.
    `precision` is a context to run the teacher in. Raises PlanError (FXC0810) where nothing is to be kept, where
    samples are not the same each time, and for a file of another teacher or other data.
    """
    found = cached_distillation(result)
    if found is None or found[1].teacher is None:
        _refuse("no teacher is in the model now whose logits are to be kept", "say `cache = memory` in `distill`")
    node, module = found
    teacher, top_k = cast(nn.Module, module.teacher), cast(Cache, module.cache).top_k
    names = [str(each.target) for each in node.args[4:4 + module.inputs] if isinstance(each, fx.Node)]
    precision = precision if precision is not None else nullcontext()
    kept, place = None, Path(path) if path is not None else None
    known = {"format": FORMAT, "teacher": print_of(teacher), "top_k": str(top_k or 0),
             "samples": str(length(dataset))}
    if place is not None and place.exists():
        known["data"] = _Reader(dataset).digest(batch)
        kept = _read(place, known)
    if kept is None:
        reader = _Reader(dataset)
        with precision:
            logits = torch.cat([*_answers(teacher, names, reader, batch)])
        kept, known["data"] = Kept.of(logits, top_k), reader.sum.hexdigest()
        if place is not None and write:
            _write(place, kept, known)
    module.forget_teacher()
    return kept


def print_of(teacher: nn.Module) -> str:
    """SHA-256 of what a teacher computes, and with what."""
    digest = hashlib.sha256(f"{getattr(teacher, 'code', '')}\n{teacher}".encode())
    for name, value in teacher.named_buffers():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def _answers(teacher: nn.Module, names: list[str], reader: _Reader, batch: int) -> Iterator[Tensor]:
    """The teacher's logits, batch by batch; the last is filled up, for all to be computed alike."""
    device = next((value.device for value in teacher.buffers()), torch.device("cpu"))
    for count, args, kwargs in reader.batches(batch):
        values = [value.to(device) for value in (*args, *(kwargs[name] for name in names[len(args):]))]
        before = torch.get_rng_state()
        found = teacher(*values)
        if not torch.equal(before, torch.get_rng_state()):
            _refuse("the teacher draws random numbers", "take `cache` out of `distill`")
        yield found[:count].to("cpu", copy=True)


class _Reader:
    """Samples read in order, each checked to be the same each time; `sum` is SHA-256 of the inputs so far."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset, self.sum = dataset, hashlib.sha256()

    def digest(self, batch: int) -> str:
        """That of all inputs."""
        for _ in self.batches(batch):
            pass
        return self.sum.hexdigest()

    def batches(self, batch: int) -> Iterator[tuple[int, tuple[Any, ...], dict[str, Any]]]:
        """(how many samples count, inputs, inputs by keyword) of `batch` samples each."""
        count = length(self.dataset)
        for start in range(0, count, batch):
            samples = [self._sample(index) for index in range(start, min(start + batch, count))]
            there = len(samples)
            samples += samples[-1:] * (batch - there)
            args, kwargs, _ = parted(default_collate(samples))
            yield there, args, kwargs

    def _sample(self, index: int) -> Any:
        found = self._drawn(index, 0)
        args, kwargs, _ = parted(found)
        for leaf in tree_leaves((args, kwargs)):
            self.sum.update(_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
        if index < TWICE and not isinstance(self.dataset, TensorDataset):
            again = tree_leaves(parted(self._drawn(index, 1))[:2])
            if not all(map(_same, tree_leaves((args, kwargs)), again)):
                _refuse(f"sample {index} of the training data is another each time it is read", FRESH)
        return found

    def _drawn(self, index: int, turn: int) -> Any:
        if isinstance(self.dataset, TensorDataset):
            return self.dataset[index]
        with seeded(number(turn, index)):
            before = _states()
            found = self.dataset[index]
            drawn = [name for name, state in _states().items() if not _same(state, before[name])]
        if drawn:
            _refuse(f"sample {index} of the training data is drawn anew each time, by random numbers of {drawn[0]}",
                    FRESH)
        return found


def _states() -> dict[str, Any]:
    return {"Python": random.getstate(), "numpy": repr(np.random.get_state(legacy=False)["state"]),
            "torch": torch.get_rng_state()}


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(
        np.array_equal(one, other)) if isinstance(one, np.ndarray) else bool(one == other)


# The file


def _write(path: Path, kept: Kept, known: dict[str, str]) -> None:
    from safetensors.torch import save

    tensors = {name: value.contiguous() for name in ("values", "classes", "rest")
               if (value := getattr(kept, name)) is not None}
    with checkpoint.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_bytes(path, lambda file: file.write(save(tensors, {**known, "width": str(kept.width)})))


def _read(path: Path, known: dict[str, str]) -> Kept:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        other = [name for name, value in known.items() if told.get(name) != value]
        if not other:
            return Kept(tensors["values"], tensors.get("classes"), tensors.get("rest"), int(told["width"]))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        _refuse(f"{path} can't be read: {error}", "delete it, and it is made anew")
    _refuse(f"{path} holds the logits of another run: {', '.join(other)} differ", "delete it, and it is made anew")


def _refuse(why: str, help_: str) -> NoReturn:
    raise PlanError([Diagnostic("FXC0810", f"a teacher's logits can't be kept: {why}", help=help_)])


class Keeping:
    """The logits that a training keeps, for as long as their `distill` lasts."""

    def __init__(self, accelerator: Accelerator, result: Result, data: Data, batch: int, folder: Path | None) -> None:
        """Files go into `folder`."""
        self.accelerator, self.result, self.data, self.batch, self.folder = accelerator, result, data, batch, folder
        self.kept: Kept | None = None

    def of(self, indices: Tensor) -> Tensor | None:
        """What the teacher gives for these samples; None where that isn't kept now. Raises PlanError (FXC0810)."""
        found = cached_distillation(self.result)
        if found is None:
            self.kept = None
            return None
        if self.kept is None or found[1].teacher is not None:
            self.kept = keep_teacher(self.result, self.data.train, batch=self.batch, path=self._path(found[1]),
                                     write=self.accelerator.is_main_process, precision=self.accelerator.autocast())
        return self.kept[indices]

    def _path(self, module: Distillation) -> Path | None:
        if module.cache is None or module.cache.place == "memory":
            return None
        if self.folder is None:
            _refuse("`cache = disk`, and the training has no output folder", "give one, or say `cache = memory`")
        assert module.teacher is not None
        return self.folder / f"teacher-{print_of(module.teacher)[:12]}.safetensors"
