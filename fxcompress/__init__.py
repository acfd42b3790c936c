"""fxcompress: a declarative graph-rewrite compiler for neural-network compression.

The names below are the whole public surface; `docs/design.md` says what lies under them. They are loaded when first
used (PEP 562), so that `import fxcompress` imports no torch and `fxcompress check` starts at once.

    policy = fxcompress.parse(text)                       # or load_policy(path)
    plan = fxcompress.plan(policy, model, example_inputs)
    result = fxcompress.compile(policy, model, example_inputs)
    deployed = result.finalize(target="cpu")
    fxcompress.save(deployed, "out/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import passes as passes
    from .backends import load as load
    from .backends import save as save
    from .diagnostics import ArtifactError as ArtifactError
    from .diagnostics import CaptureError as CaptureError
    from .diagnostics import Diagnostic as Diagnostic
    from .diagnostics import FxcError as FxcError
    from .diagnostics import PlanError as PlanError
    from .diagnostics import PolicyError as PolicyError
    from .diagnostics import RewriteError as RewriteError
    from .engine import Result as Result
    from .engine import compile as compile
    from .engine import export as export
    from .graph import Captured as Captured
    from .graph import capture as capture
    from .nn.affine import dequantize as dequantize
    from .nn.affine import quantize_tensor as quantize_tensor
    from .passbase import Pass as Pass
    from .passbase import param as param
    from .passbase import register_loss as register_loss
    from .passbase import register_observer as register_observer
    from .passbase import register_verb as register_verb
    from .passes.shared.criteria import register_criterion as register_criterion
    from .passes.shared.scores import register_score as register_score
    from .plan import Plan as Plan
    from .plan import plan as plan
    from .policy import format_policy as format_policy
    from .policy import load_policy as load_policy
    from .policy import parse as parse
    from .policy.model import Policy as Policy
    from .training import Trainer as Trainer

__version__ = "0.1.0"

_HOMES = {
    "policy": ("format_policy", "load_policy", "parse"),
    "policy.model": ("Policy",),
    "diagnostics": ("ArtifactError", "CaptureError", "Diagnostic", "FxcError", "PlanError", "PolicyError",
                    "RewriteError"),
    "nn.affine": ("dequantize", "quantize_tensor"),
    "passbase": ("Pass", "param", "register_loss", "register_observer", "register_verb"),
    "passes.shared.criteria": ("register_criterion",),
    "passes.shared.scores": ("register_score",),
    "graph": ("Captured", "capture"),
    "plan": ("Plan",),
    "engine": ("Result", "compile", "export"),
    "backends": ("load", "save"),
    "training": ("Trainer",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("passes", "plan")  # `fxcompress.plan` is a package that can be called: plan(policy, model, inputs)

__all__ = sorted([*_HOME, *_MODULES, "__version__"])  # noqa: PLE0605 (from the table: names stand in one place)


if not TYPE_CHECKING:  # type checkers know the names above, and no others

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__name__", "__file__"]
