"""One training, from its first step or from a checkpoint to its last: what moves in it, and the state of all of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from ..diagnostics import Diagnostic, PlanError
from ..engine import Result
from ..graph.trace_errors import RAISED_BY_MODELS
from ..nn import Mask
from . import checkpoint
from .best import Best
from .data import Data, number, parted, size_of, training_loader, validation_loader
from .log import Log
from .settings import Loss, Settings, make_optimizer, make_schedule
from .show import Bar
from .step import Wrapped, agree, prediction
from .teacher_cache import Keeping

if TYPE_CHECKING:
    from accelerate import Accelerator

Metrics = Mapping[str, Callable[[Any, Any], Any]]  # of (output, target), the mean over the batch
Told = Callable[["Run", str], object]  # told behind each `step`, `epoch` and `checkpoint`


@dataclass
class Running:
    """The mean of the loss and its terms since it was last asked for."""

    counts: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """One more part of a step; nothing waits for the device."""
        for name, value in values.items():
            self.counts[name] = self.counts.get(name, 0) + 1
            more = value.detach().double()
            self.sums[name] = self.sums[name] + more if name in self.sums else more

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes; the loss is called ``""``."""
        return {name: float(accelerator.reduce(value, reduction="mean")) / self.counts[name]
                for name, value in self.sums.items()}

    def clear(self) -> None:
        """Begin anew."""
        self.counts, self.sums = {}, {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"counts": dict(self.counts), "sums": checkpoint.on_cpu(self.sums)}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take up a checkpoint's."""
        self.counts = dict(state["counts"])
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}


class Run:
    """The moving parts of one training. `position` is (`epoch`, `in_epoch`): epochs done, and steps of the one that
    runs; `steps` counts through."""

    def __init__(self, accelerator: Accelerator, settings: Settings, data: Data, loss: Loss, metrics: Metrics,
                 begin: Callable[[int, Mapping[str, Any] | None], Result], *, folder: Path | None,
                 state: Mapping[str, Any] | None, identity: Mapping[str, Any], told: Told) -> None:
        """`begin(steps_per_epoch, schedule)` compiles the policy, from a checkpoint's schedule if there is one; `state`
        is that checkpoint, and `identity` what it has to say of settings and model."""
        self.accelerator, self.settings, self.metrics = accelerator, settings, metrics
        self.folder, self.identity, self.told = folder, identity, told
        parts = settings.accumulate
        loader, self.order = training_loader(data, settings.batch, parts, settings.seed, settings.workers)
        self.loader: Any = accelerator.prepare_data_loader(loader)
        held_out = validation_loader(data, settings.batch, settings.seed, settings.workers)
        self.validation: Any = None if held_out is None else accelerator.prepare_data_loader(held_out)
        self.best = Best.of(settings.monitor, metrics if held_out is not None else {})
        if state is None:
            _seed(settings.seed, accelerator.process_index)
        self.result = begin(self.order.steps, None if state is None else state["schedule"])
        module = self.result.module
        if state is not None:
            module.load_state_dict(state["model"])
            checkpoint.put_beside(module, state["beside"])
        groups = list(module.parameters()) if state is None else checkpoint.grouped(
            module, state["optimizer"]["groups"])
        self.torch_optimizer = self.result.follow(make_optimizer(settings.optimizer, groups))
        self.schedule = make_schedule(settings, self.torch_optimizer, self.order.steps)
        self.optimizer: Any = accelerator.prepare_optimizer(self.torch_optimizer)
        self.wrapped = Wrapped(accelerator, self.result, loss, self.optimizer)
        self.keeping = Keeping(accelerator, self.result, data, settings.batch // parts, folder)
        self.running, self.whole_epoch = Running(), Running()
        self.history: list[dict[str, Any]] = []
        self.epoch = self.in_epoch = self.steps = 0
        self.stopped = False
        if state is not None:
            self._take_up(state)
        self.log = None
        if folder is not None and accelerator.is_main_process:
            self.log = Log(folder, None if state is None else state["log"], self.steps)

    @property
    def module(self) -> fx.GraphModule:
        """The module that trains."""
        return self.result.module

    def train(self, bar: Bar) -> None:
        """To the end of the last epoch, or to where patience ends."""
        row: Mapping[str, Any] = {}
        while self.epoch < self.settings.epochs and not self.stopped:
            self.module.train()
            self.order.begin(self.epoch, self.in_epoch)
            parts: list[Any] = []
            for batch in self.loader:
                parts.append(batch)
                if len(parts) == self.settings.accumulate:
                    self._step(parts)
                    row = self._told_step() or row
                    bar(self.epoch, self.in_epoch, row)
                    parts = []
            row = self._end_epoch()
            bar(self.epoch, 0, row)
        if self.log is not None:
            self.log.close()

    def _step(self, parts: list[Any]) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # here: what begins between epochs may score by the last gradients
        whole, accelerator = self.wrapped.fit(), self.accelerator
        for place, batch in enumerate(parts, 1):
            with nullcontext() if place == len(parts) else accelerator.no_sync(whole):
                loss, terms = self._loss(whole, batch)
                accelerator.backward(loss / len(parts))
            for running in (self.running, self.whole_epoch):
                running.add({"": loss, **terms})
        if self.settings.clip is not None:
            accelerator.clip_grad_norm_(self.module.parameters(), self.settings.clip)
        self.optimizer.step()
        agree(accelerator, self.module)
        self.result.step()
        if self.schedule is not None:
            self.schedule.follow(self.torch_optimizer)
            self.schedule.step()
        self.in_epoch += 1
        self.steps += 1

    def _loss(self, whole: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        indices, samples = batch
        args, kwargs, target = parted(samples)
        logits = self.keeping.of(indices)
        try:
            loss, terms = whole(args, kwargs, target, logits)
        except RAISED_BY_MODELS as error:
            named = {**{f"input {place}": value for place, value in enumerate(args, 1)}, **kwargs, "target": target}
            shapes = [f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
                      for name, value in named.items() if isinstance(value, Tensor)]
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PlanError([Diagnostic(
                "FXC0802", f"the model or its loss fails on a batch: {words}",
                notes=(f"the batch: {', '.join(shapes)}",),
                help="look whether the data fit the model, and the targets the loss")]) from error
        return loss, terms

    def _told_step(self) -> Mapping[str, Any] | None:
        row = None
        if self.steps % self.settings.log_every == 0:
            row = self._row(self.running)
            self.running.clear()
            if self.log is not None:
                self.log.step(row)
        self.told(self, "step")
        every = self.settings.checkpoint_every
        if every is not None and self.steps % every == 0 and self.in_epoch < self.order.steps:
            self.save()
        return row

    def _row(self, running: Running) -> dict[str, Any]:
        """What is measured at a step: losses since the last time, the model's size, what moves."""
        means = running.means(self.accelerator)
        masked = [child for child in self.module.modules() if isinstance(child, Mask)]
        entries = sum(mask.mask.numel() for mask in masked)
        return {"step": self.steps, "epoch": round(self.result.clock.epoch, 6), "loss": means.pop("", None),
                **({"terms": means} if means else {}), "lr": float(self.torch_optimizer.param_groups[0]["lr"]),
                "sparsity": sum(mask.masked() for mask in masked) / entries if entries else 0.0,
                "params": sum(parameter.numel() for parameter in self.module.parameters()),
                **{name: dict(found) for name in ("numbers", "temperatures")
                   if (found := getattr(self.result, name, None))}}

    def _end_epoch(self) -> Mapping[str, Any]:
        self.result.epoch_end()
        self.epoch, self.in_epoch = self.epoch + 1, 0
        row = self._row(self.whole_epoch)
        self.whole_epoch.clear()
        found = self.evaluate()
        if found:
            row["validation"] = found
        if self.best is not None:
            if self.result.settled:
                self.best.see(self.epoch, found, self.module, keep=self.settings.keep_best)
            else:
                self.best.forget()
            patience = self.settings.patience
            self.stopped = patience is not None and self.best.since >= patience
        if self.schedule is not None:
            self.schedule.epoch_end(self._plateau(row))
        self.history.append(row)
        if self.log is not None:
            self.log.epoch(row, self.history)
        self.told(self, "epoch")
        self.save()
        return row

    def _plateau(self, row: Mapping[str, Any]) -> float:
        if self.best is None:
            return float(row["loss"])
        value = float(row["validation"][self.best.metric])
        return value if self.best.less else -value

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Every metric over the validation samples, the same on all processes; empty where there are none."""
        if self.validation is None:
            return {}
        self.module.eval()
        sums, count = dict.fromkeys(self.metrics, 0.0), 0
        for batch in self.validation:
            args, kwargs, target = parted(batch)
            with self.accelerator.autocast():
                output = prediction(self.module(*args, **kwargs))
            output, target = self.accelerator.gather_for_metrics((output.float(), target))
            size = size_of([target])
            for name, metric in self.metrics.items():
                sums[name] += float(metric(output, target)) * size
            count += size
        self.module.train()
        return {name: value / count for name, value in sums.items()}

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint of this moment, which is behind a step."""
        if self.folder is None:
            return
        from accelerate.utils import gather_object

        own = gather_object([{"rng": checkpoint.rng_state(), "running": self.running.state(),
                              "whole_epoch": self.whole_epoch.state()}])
        if self.accelerator.is_main_process:
            assert self.log is not None
            self.told(self, "checkpoint")
            checkpoint.save(self.folder / checkpoint.NAME, {**self.identity, **self._state(), "processes": own,
                                                            "log": self.log.size()})
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "schedule": self.result.state_dict(), "model": self.module.state_dict(),
            "beside": checkpoint.beside(self.module),
            "optimizer": checkpoint.optimizer_state(self.torch_optimizer, self.module),
            "scheduler": None if self.schedule is None else self.schedule.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "position": {"epoch": self.epoch, "in_epoch": self.in_epoch, "steps": self.steps},
            "sampler": {"seed": self.order.seed, "epoch_seed": number(self.order.seed, self.epoch)},
            "history": self.history, "stopped": self.stopped,
            "best": None if self.best is None else self.best.state()}

    def _take_up(self, state: Mapping[str, Any]) -> None:
        """All of a checkpoint but what the module and the groups of the optimizer were made from; the random numbers
        last, behind everything that draws some."""
        self.torch_optimizer.load_state_dict(state["optimizer"]["state"])
        if self.schedule is not None:
            self.schedule.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name, value in state["position"].items():
            setattr(self, name, value)
        self.history, self.stopped = list(state["history"]), state["stopped"]
        if self.best is not None:
            self.best.load(state["best"])
        index = self.accelerator.process_index
        own = state["processes"][min(index, len(state["processes"]) - 1)]
        self.running.load(own["running"], self.accelerator.device)
        self.whole_epoch.load(own["whole_epoch"], self.accelerator.device)
        if index < len(state["processes"]):
            checkpoint.set_rng_state(own["rng"])
        else:  # there were fewer then
            _seed(number(self.settings.seed, self.steps), index)


def _seed(seed: int, process: int) -> None:
    """Random numbers of this process, apart from those of the data: dropout, say."""
    random.seed(seed + process)
    np.random.seed((seed + process) % 2**32)
    torch.manual_seed(seed + process)
