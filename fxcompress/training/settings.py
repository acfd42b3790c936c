"""How to train, as data; and optimizers, schedulers and losses of torch by their names."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..diagnostics import Diagnostic, PlanError, nearest

Loss = Callable[[Any, Any], Tensor]  # of (output, target), the mean over the batch

LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy, "nll": F.nll_loss, "mse": F.mse_loss, "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
}
CLASSIFYING = ("cross_entropy", "nll")  # losses whose targets are classes: accuracy is measured along
# What of a scheduler says how long it is, and whether that is in steps: filled in from the training where left out.
LENGTHS: Mapping[str, str] = {"CosineAnnealingLR": "T_max", "LinearLR": "total_iters", "PolynomialLR": "total_iters",
                              "OneCycleLR": "total_steps"}
EACH_STEP = ("OneCycleLR", "CyclicLR")  # these are defined by the step, the others by the epoch unless set otherwise
_CLOSURES = ("LBFGS",)  # they call the model several times a step


@dataclass(frozen=True)
class Settings:
    """How to train. `batch` samples make one step, over all processes and all parts of `accumulate` together: neither
    changes what is learned.

    * `optimizer`, `scheduler`, `loss`: names of torch, with settings: `SGD(lr=0.1, momentum=0.9)`
    * `scheduler_every`: `epoch` or `step`; None takes what the scheduler is defined by
    * `clip`: the largest norm of the gradient; None doesn't clip
    * `monitor`: the metric of the validation data that says which weights are best; `-name` for one where less is
      better (`loss` is); `patience` epochs without a better one end the training; None never does
    * `checkpoint_every`: steps; None writes one at the end of each epoch
    * `calibration`: how many training samples are shown to what is measured on data, where the policy has such
    * `device`: `auto` is a GPU where there is one; `cpu` stays on the CPU
    """

    epochs: int
    batch: int = 64
    optimizer: str = "AdamW(lr=0.001)"
    scheduler: str | None = None
    scheduler_every: str | None = None
    loss: str = "cross_entropy"
    accumulate: int = 1
    clip: float | None = None
    monitor: str | None = None
    patience: int | None = None
    keep_best: bool = True
    seed: int = 0
    calibration: int = 256
    checkpoint_every: int | None = None
    log_every: int = 10
    workers: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raises PlanError (FXC0803) with everything that is out of its range."""
        least = {"epochs": 1, "batch": 1, "accumulate": 1, "patience": 1, "calibration": 1, "checkpoint_every": 1,
                 "log_every": 1, "workers": 0, "seed": 0}
        wrong = [f"`{name}` is {value}, and has to be {low} or more" for name, low in least.items()
                 if (value := getattr(self, name)) is not None and value < low]
        if self.clip is not None and not self.clip > 0:
            wrong.append(f"`clip` is {self.clip}, and has to be above 0")
        for name, words in (("device", ("auto", "cpu")), ("scheduler_every", (None, "epoch", "step"))):
            if getattr(self, name) not in words:
                wrong.append(f"`{name}` is {getattr(self, name)!r}, and can be {' or '.join(filter(None, words))}")
        if self.batch % self.accumulate:
            wrong.append(f"a batch of {self.batch} can't be cut into {self.accumulate} equal parts")
        if wrong:
            raise PlanError([Diagnostic("FXC0803", message, help="`fxcompress train --help` says what is possible")
                             for message in wrong])

    @property
    def counts(self) -> dict[str, Any]:
        """What the weights at the end hang on: a run can only be resumed with the same."""
        free = ("checkpoint_every", "log_every", "workers", "device")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in free}


@dataclass(frozen=True)
class Named:
    """A name with settings, read from `NAME(key=value, ...)`; values are numbers, texts, tuples and the like."""

    name: str
    values: Mapping[str, object]

    @classmethod
    def read(cls, text: str, what: str) -> Named:
        """Nothing of `text` is evaluated. Raises PlanError (FXC0803)."""
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            if isinstance(tree, ast.Name):
                return cls(tree.id, {})
            if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args and all(
                    item.arg is not None for item in tree.keywords):
                return cls(tree.func.id, {str(item.arg): ast.literal_eval(item.value) for item in tree.keywords})
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            pass
        _fail(f"`{text}` names no {what}", help_="write a name, or a name with settings: `SGD(lr=0.1, momentum=0.9)`")


def _fail(message: str, *notes: str, help_: str, cause: Exception | None = None) -> NoReturn:
    raise PlanError([Diagnostic("FXC0803", message, notes=notes, help=help_)]) from cause


def _unknown(name: str, what: str, known: Mapping[str, object]) -> NoReturn:
    near = nearest(name, known, 1)
    _fail(f"unknown {what} `{name}`", f"known: {', '.join(sorted(known))}",
          help_=f"did you mean `{near[0]}`?" if near else "write one of them")


def optimizers() -> dict[str, type[Optimizer]]:
    """Those of `torch.optim` by name, save for those that call the model themselves."""
    return {name: found for name, found in vars(torch.optim).items()
            if isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer
            and name not in _CLOSURES}


def schedulers() -> dict[str, type[LRScheduler]]:
    """Those of `torch.optim.lr_scheduler` by name."""
    return {name: found for name, found in vars(torch.optim.lr_scheduler).items()
            if isinstance(found, type) and issubclass(found, LRScheduler) and found is not LRScheduler
            and not name.startswith("_")}


def make_optimizer(text: str, parameters: list[Any]) -> Optimizer:
    """The optimizer that `text` names, over parameters or groups of them. Raises PlanError (FXC0803)."""
    named = Named.read(text, "optimizer")
    if named.name not in optimizers():
        _unknown(named.name, "optimizer", optimizers())
    made: Optimizer = _made(optimizers()[named.name], named, "optimizer", parameters)
    return made


@dataclass
class Schedule:
    """A scheduler of torch, and when it moves."""

    scheduler: LRScheduler
    each_step: bool

    def step(self) -> None:
        """A step was trained."""
        if self.each_step:
            self.scheduler.step()

    def epoch_end(self, metric: float) -> None:
        """An epoch was trained; `metric` is what `ReduceLROnPlateau` looks at, less being better."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(metric)
        elif not self.each_step:
            self.scheduler.step()

    def follow(self, optimizer: Optimizer) -> None:
        """Take in groups that came after it was made: they move as the first one does."""
        rates = getattr(self.scheduler, "base_lrs", None)
        for group in optimizer.param_groups[1:]:
            for key, value in optimizer.param_groups[0].items():
                if key not in ("params", "param_names") and key not in group:
                    group[key] = value
        while rates is not None and len(rates) < len(optimizer.param_groups):
            optimizer.param_groups[len(rates)]["lr"] = optimizer.param_groups[0]["lr"]
            rates.append(rates[0])
        for name in ("min_lrs", "_last_lr"):
            known = getattr(self.scheduler, name, None)
            while isinstance(known, list) and known and len(known) < len(optimizer.param_groups):
                known.append(known[0])


def make_schedule(settings: Settings, optimizer: Optimizer, steps_per_epoch: int) -> Schedule | None:
    """The scheduler of `settings` over `optimizer`; its length is that of the training where it isn't given. Raises
    PlanError (FXC0803)."""
    if settings.scheduler is None:
        return None
    named = Named.read(settings.scheduler, "scheduler")
    if named.name not in schedulers():
        _unknown(named.name, "scheduler", schedulers())
    every = settings.scheduler_every or ("step" if named.name in EACH_STEP else "epoch")
    length = LENGTHS.get(named.name)
    if length is not None and length not in named.values:
        count = settings.epochs * (steps_per_epoch if every == "step" else 1)
        named = Named(named.name, {**named.values, length: count})
    return Schedule(_made(schedulers()[named.name], named, "scheduler", optimizer), every == "step")


def make_loss(text: str) -> tuple[Loss, bool]:
    """The loss that `text` names, and whether its targets are classes. Raises PlanError (FXC0803)."""
    named = Named.read(text, "loss")
    if named.name not in LOSSES:
        _unknown(named.name, "loss", LOSSES)
    function = LOSSES[named.name]
    known = inspect.signature(function).parameters
    for key in named.values:
        if key not in known or key == "reduction":
            _fail(f"the loss `{named.name}` has no setting `{key}`", help_="take it out")
    return partial(function, **named.values), named.name in CLASSIFYING


def _made(kind: Callable[..., Any], named: Named, what: str, *args: object) -> Any:
    try:
        return kind(*args, **named.values)
    except (TypeError, ValueError) as error:
        known = [name for name in inspect.signature(kind).parameters if name not in ("params", "optimizer")]
        _fail(f"the {what} `{named.name}` can't be made so: {error}", f"its settings: {', '.join(known)}",
              help_=f"write `{named.name}(key=value, ...)`")
