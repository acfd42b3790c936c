"""Weights kept from earlier, for lottery tickets (Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019): a mask is
found in training, then the weights go back to what they were before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..policy.values import Duration
from .clock import Clock
from .follow import Resized, cut

INITIAL = "initial"
When = str | Duration  # `initial`, or how far into the training


@dataclass
class Snapshots:
    """The parameters of `module` at some times; running statistics aren't kept, training sets them anyway.

    They are cut along with their parameters, so that a rewind after `remove` brings back what is left.
    """

    module: nn.Module
    wanted: tuple[Duration, ...] = ()
    taken: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by `initial` or `2 epochs`

    def take(self, when: When) -> None:
        """Keep a copy of the parameters as they are, in main memory."""
        self.taken[str(when)] = {name: parameter.detach().to("cpu", copy=True)
                                 for name, parameter in self.module.named_parameters()}

    def look(self, clock: Clock) -> None:
        """Take those whose time has come."""
        for when in self.wanted:
            if str(when) not in self.taken and clock.reached(when.count, when.unit):
                self.take(when)

    def cut(self, resized: Resized) -> None:
        """Follow parameters that were cut."""
        for name, parameter in self.module.named_parameters():
            if parameter in resized:
                for weights in self.taken.values():
                    if name in weights:
                        weights[name] = cut(weights[name], resized[parameter])

    def back(self, when: When) -> list[str]:
        """Set every parameter to what it was at `when`; returns the names of those that were not there then.

        Raises KeyError if that time wasn't kept.
        """
        weights = self.taken[str(when)]
        unknown = []
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
                else:
                    unknown.append(name)
        return unknown

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What is kept, for a checkpoint."""
        return self.taken

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up a checkpoint's."""
        self.taken = {when: dict(weights) for when, weights in state.items()}


def rewind_times(values: Iterable[object]) -> tuple[Duration, ...]:
    """The times other than `initial` that `values` of `rewind` name."""
    return tuple(dict.fromkeys(value for value in values if isinstance(value, Duration)))
