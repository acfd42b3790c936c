"""Optimizers and stored weights follow the parameters that passes cut, add or take away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..graph.site import Cuts

Resized = Mapping[Tensor, Cuts]  # as in `Outcome`


def cut(tensor: Tensor, cuts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The slices of `tensor` that the parameter beside it has kept."""
    for dim, kept in cuts:
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


class Followers:
    """The optimizers that train a module, and its parameters as they were before a pass."""

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """`module` is the module that passes rewrite in place."""
        self.module = module
        self.optimizers = list(optimizers)
        self._shapes: dict[nn.Parameter, torch.Size] = {}
        self.look()

    def look(self) -> None:
        """Remember the parameters as they are now; call before a pass runs."""
        self._shapes = {parameter: parameter.shape for parameter in self.module.parameters()}

    def update(self, resized: Resized) -> list[str]:
        """Bring every optimizer in line with what a pass did; returns notes on state that was lost."""
        now = dict.fromkeys(self.module.parameters())
        new = [parameter for parameter in now if parameter not in self._shapes]
        gone = {parameter for parameter in self._shapes if parameter not in now}
        notes = []
        for optimizer in self.optimizers:
            notes += self._cut(optimizer, resized)
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
            for parameter in gone:
                optimizer.state.pop(parameter, None)
        if new and self.optimizers:
            self.optimizers[0].add_param_group({"params": new})
            notes.append(f"{len(new)} new parameters train in a group of their own, with the optimizer's defaults")
        return notes

    def _cut(self, optimizer: Optimizer, resized: Resized) -> list[str]:
        """Cut the state of each resized parameter (momentum, second moments) as the parameter was.

        State of another shape (factored moments) can't be cut: it begins anew, with a note. So does all state of LBFGS,
        which keeps one flat history of all parameters.
        """
        name = type(optimizer).__name__
        if isinstance(optimizer, LBFGS) and resized and optimizer.state:
            optimizer.state.clear()
            optimizer._numel_cache = None  # the size that it remembers of all parameters
            return [f"the history of {name} begins anew: parameters were cut"]
        lost = 0
        for parameter, cuts in resized.items():
            state = optimizer.state.get(parameter, {})
            parts = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
            whole = self._shapes.get(parameter)  # type: ignore[call-overload]
            if all(value.shape == whole for value in parts.values()):
                state.update({key: cut(value, cuts) for key, value in parts.items()})
            else:
                del optimizer.state[parameter]
                lost += 1
        return [f"the state of {name} begins anew for {lost} parameters: it doesn't have their shape"] if lost else []

    def rates(self) -> Callable[[Tensor], float]:
        """The learning rate of each parameter as it is now: 0 for one that no optimizer trains, 1 for all where no
        optimizer follows."""
        found = {parameter: float(group["lr"]) for optimizer in self.optimizers for group in optimizer.param_groups
                 for parameter in group["params"]}
        default = 0.0 if self.optimizers else 1.0
        return lambda parameter: found.get(parameter, default)

    def forget(self) -> None:
        """Drop the state of every parameter, after its value was set from outside."""
        for optimizer in self.optimizers:
            for parameter in self.module.parameters():
                optimizer.state.pop(parameter, None)
