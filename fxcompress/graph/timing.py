"""How long a module takes for one forward pass of its example."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import nn

from .captured import Example
from .interpret import evaluating

ROUNDS = 7  # of `latencies`
SECONDS = 0.05  # that a module runs for in one round, at least
TOLERANCE = 0.05  # of a limit on latency: what timings of one model differ by from run to run


def latency(module: nn.Module, example: Example) -> float:
    """The median time of one forward pass of the example, in seconds, with the number of threads torch has now."""
    from torch.utils.benchmark import Timer  # takes half a second to import, and talks of CUDA on machines without

    with evaluating(module):
        timer = Timer("module(*args, **kwargs)", num_threads=torch.get_num_threads(), globals={
            "module": module, "args": example.args, "kwargs": example.kwargs})
        return float(timer.blocked_autorange(min_run_time=0.5).median)


def latencies(modules: Sequence[nn.Module], example: Example) -> tuple[float, ...]:
    """The median time of one forward pass of the example by each module, in seconds: measured in turns, so that a
    machine that is busy for a while slows all of them down alike."""
    from torch.utils.benchmark import Timer

    each: list[list[float]] = [[] for _ in modules]
    timers = [Timer("module(*args, **kwargs)", num_threads=torch.get_num_threads(), globals={
        "module": module, "args": example.args, "kwargs": example.kwargs}) for module in modules]
    for _ in range(ROUNDS):
        for timer, module, times in zip(timers, modules, each, strict=True):
            with evaluating(module):
                times.append(float(timer.blocked_autorange(min_run_time=SECONDS).median))
    return tuple(statistics.median(times) for times in each)
