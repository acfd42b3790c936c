"""Finished GraphModules compiled by Inductor, their weights frozen into the code, so that they are packed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves


class Frozen:
    """Calls `run`, an `nn.Module`'s `_call_impl`, compiled for each new shape of its inputs: at its first call with
    one, which takes from seconds to minutes. Without gradients."""

    def __init__(self, run: Callable[..., Any]) -> None:
        """Compiles nothing yet."""
        self._run: Any = torch.compile(run, fullgraph=True, dynamic=False)
        self._seen: set[tuple[Any, ...]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        shapes = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf
                       for leaf in tree_leaves((args, kwargs)))
        with torch.no_grad():
            if shapes in self._seen:
                return self._run(*args, **kwargs)
            # The tracer looks at the setting too, so that the `options` of `torch.compile` are not enough.
            with torch._inductor.config.patch(freezing=True):
                made = self._run(*args, **kwargs)
            self._seen.add(shapes)
            return made


def compile_in_place(module: fx.GraphModule) -> fx.GraphModule:
    """Let calls of `module` run compiled, as `nn.Module.compile` does; returns it. Copies and what is saved aren't
    compiled."""
    module._compiled_call_impl = Frozen(module._call_impl)
    return module
