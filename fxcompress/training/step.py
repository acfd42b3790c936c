"""The module as Accelerate trains it: wrapped anew whenever a pass changed its parameters, and equal on all processes.

Passes rewrite the module in place: they cut parameters, take some away and add others, and change the code of its
forward pass. Two things of Accelerate hold on to what was there before. `DistributedDataParallel` has its buckets and
its hooks on the parameters, and mixed precision puts a forward function of its own onto the module that it is given. So
Accelerate never gets the rewritten module itself, but `Whole` around it, and gets a new one, with new buckets, behind
every rewrite that changed the parameters; optimizer and loader stay.

All processes decide the same because they see the same. Gradients are averaged by DDP before a step is taken. What
else decides is kept in buffers (running statistics, the evidence that scores by gradient collect): they are averaged
over the processes behind each step, before the policy moves on. Parameters are those of the first process at the
beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..diagnostics import Diagnostic, PlanError
from ..engine import Result
from ..graph.distilled import LOGITS
from .settings import Loss

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

Signature = tuple[tuple[int, torch.Size, bool], ...]


def terms_of(result: Result) -> tuple[str, ...]:
    """The loss terms that are in the graph now; empty where nothing is distilled."""
    return tuple(getattr(result, "terms", ()))


class Whole(nn.Module):
    """Module and loss in one forward pass, so that both run under mixed precision."""

    def __init__(self, result: Result, loss: Loss) -> None:
        """The module stays that of `result`, whatever becomes of its graph."""
        super().__init__()
        self.module: fx.GraphModule = result.module
        self._result, self._loss = (result,), loss  # in a tuple: it is no submodule

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any,
                logits: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a number, and its terms by name (empty where nothing is distilled); `logits` are the teacher's,
        where they are kept."""
        if terms_of(self._result[0]):
            kept = {} if logits is None else {LOGITS: logits}
            found = self.module(*args, **kwargs, targets=target, losses=True, **kept)
            return found.total, dict(found.terms)
        return self._loss(prediction(self.module(*args, **kwargs)), target), {}


def prediction(output: Any) -> Any:
    """The tensor that a loss is taken of: the output, or its `logits`, or the first of several."""
    if isinstance(output, Mapping):
        return output.get("logits", next(iter(output.values()), None))
    return getattr(output, "logits", output[0] if isinstance(output, tuple | list) and output else output)


class Wrapped:
    """What runs a step: `fit()` before each one, then `whole(...)`."""

    def __init__(self, accelerator: Accelerator, result: Result, loss: Loss, optimizer: AcceleratedOptimizer) -> None:
        """Wraps at the first `fit`."""
        self.accelerator, self.result, self.loss, self.optimizer = accelerator, result, loss, optimizer
        self.whole: nn.Module | None = None
        self.times = 0  # that it was wrapped
        self._signature: Signature = ()
        self._terms: tuple[str, ...] = ()

    def fit(self) -> nn.Module:
        """The wrapped module, made anew if its parameters or its loss terms changed."""
        now, terms = signature(self.result.module), terms_of(self.result)
        if self.whole is None or now != self._signature or terms != self._terms:
            require_alike(self.accelerator, self.result)
            # The old one first: its hooks keep the autograd nodes of the parameters, which know the old sizes.
            self.whole = None
            self.accelerator.free_memory()
            self.accelerator.prepare_optimizer(self.optimizer)
            self.accelerator.ddp_handler = self._handler(terms)
            self.whole = self.accelerator.prepare_model(Whole(self.result, self.loss))
            self._signature, self._terms, self.times = now, terms, self.times + 1
        return self.whole

    def _handler(self, terms: tuple[str, ...]) -> Any:
        from accelerate import DistributedDataParallelKwargs

        # Buffers are brought in line by `agree`; parameters that the loss doesn't reach get no gradient.
        return DistributedDataParallelKwargs(
            broadcast_buffers=False, find_unused_parameters=bool(terms) or has_unread(self.result.module))


def signature(module: nn.Module) -> Signature:
    """What the buckets of DDP hang on."""
    return tuple((id(parameter), parameter.shape, parameter.requires_grad) for parameter in module.parameters())


def has_unread(module: fx.GraphModule) -> bool:
    """Whether there are parameters that no node of the graph reads."""
    read = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    return any(name not in read and not any(name.startswith(f"{path}.") for path in read)
               for name, parameter in module.named_parameters() if parameter.requires_grad)


def agree(accelerator: Accelerator, module: nn.Module) -> None:
    """Average the floating-point buffers of the state over all processes, in place, in one message a dtype."""
    if accelerator.num_processes == 1:
        return
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and name not in names and value.is_floating_point() and value.numel():
            by_dtype.setdefault(value.dtype, []).append(value)
    for buffers in by_dtype.values():
        mean = accelerator.reduce(torch.cat([buffer.detach().flatten() for buffer in buffers]), reduction="mean")
        for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.detach().copy_(part.view_as(buffer))


def begin_alike(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every process the weights of the first one."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast

    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            value.detach().copy_(broadcast(value.detach().clone()))


def require_alike(accelerator: Accelerator, result: Result) -> None:
    """Raise PlanError (FXC0806) where the processes have come to different graphs: sizes that were solved from measured
    times, say."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    found = gather_object([result.captured.fingerprint()])
    if len(set(found)) > 1:
        raise PlanError([Diagnostic(
            "FXC0806", "the processes have rewritten the model differently",
            notes=("sizes that are solved from measured times differ from machine to machine",),
            help="give the ratio in the policy, or train with one process")])
