"""Plans: a checked policy bound to a captured graph, dry-run on fake tensors.

`fxcompress.plan(policy, model, example_inputs)` calls this package (docs/adr/plan-is-a-callable-package.md).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .bind import Binder
from .check import check_model
from .lower import Step, lower
from .make import plan, read_policy
from .model import Plan, Totals, policy_hash

__all__ = ["Binder", "Plan", "Step", "Totals", "check_model", "lower", "plan", "policy_hash", "read_policy"]


class _Callable(ModuleType):
    """The package as a function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Plan:
        """See `make.plan`."""
        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
