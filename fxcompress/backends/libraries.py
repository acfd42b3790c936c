"""The libraries of extras: said plainly where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from ..diagnostics import Diagnostic, PlanError

_EXTRA = {"onnx": "export", "onnxscript": "export", "onnxruntime": "export", "openvino": "openvino"}


def has(*names: str) -> bool:
    """Whether all of these modules can be imported."""
    return not _missing(names)


def need(*names: str) -> None:
    """Raise PlanError (FXC0640) where one of these modules isn't installed."""
    missing = _missing(names)
    if missing:
        extras = ",".join(dict.fromkeys(_EXTRA[name] for name in missing))
        raise PlanError([Diagnostic("FXC0640", f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not "
                                    "installed", help=f"pip install 'fxcompress[{extras}]'")])


def _missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not _found(name)]


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # in sys.modules, as None
        return False
