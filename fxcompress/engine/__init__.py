"""Running a plan: phases and ramps in training, finished models. `docs/design.md` has the way of the data."""

from .exporting import export
from .result import Result
from .run import compile

__all__ = ["Result", "compile", "export"]
