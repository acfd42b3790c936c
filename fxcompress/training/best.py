"""Which weights are the best, and when to stop: judged once the policy has come to rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..diagnostics import Diagnostic, PlanError, nearest
from .checkpoint import on_cpu


@dataclass
class Best:
    """The best epoch since the graph and its masks stay as they are: before that, weights of different epochs are of
    different models, and the dense one would win."""

    metric: str
    less: bool  # less is better
    value: float | None = None
    epoch: int | None = None
    since: int = 0  # epochs without a better one
    weights: dict[str, Any] | None = None

    @classmethod
    def of(cls, monitor: str | None, known: Mapping[str, object]) -> Best | None:
        """For the metric `monitor` (`-name`: less is better; None: accuracy, else the loss) among those that are
        measured. None where nothing is. Raises PlanError (FXC0804)."""
        if not known and monitor is None:
            return None
        name = (monitor or ("accuracy" if "accuracy" in known else "loss")).strip()
        less, name = name.startswith("-") or name == "loss", name.removeprefix("-")
        if name not in known:
            near = nearest(name, known, 1)
            raise PlanError([Diagnostic(
                "FXC0804", f"no metric `{name}` is measured",
                notes=(f"measured: {', '.join(known)}" if known else "there are no validation data",),
                help=f"did you mean `{near[0]}`?" if near else "monitor one that is, or give validation data")])
        return cls(name, less)

    def see(self, epoch: int, metrics: Mapping[str, float], module: nn.Module, *, keep: bool) -> None:
        """An epoch of a policy at rest."""
        value = metrics[self.metric]
        better = not math.isnan(value) and (
            self.value is None or (value < self.value if self.less else value > self.value))
        if not better:
            self.since += 1
            return
        self.value, self.epoch, self.since = value, epoch, 0
        if keep:
            self.weights = on_cpu(module.state_dict())

    def forget(self) -> None:
        """The policy was not at rest after all."""
        self.value = self.epoch = self.weights = None
        self.since = 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: getattr(self, name) for name in ("value", "epoch", "since", "weights")}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's."""
        for name, value in state.items():
            setattr(self, name, value)
