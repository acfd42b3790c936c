"""Training that runs a whole policy, on Hugging Face Accelerate. `docs/training.md` is its manual."""

from .data import Data
from .settings import Settings
from .trainer import Trained, Trainer

__all__ = ["Data", "Settings", "Trained", "Trainer"]
