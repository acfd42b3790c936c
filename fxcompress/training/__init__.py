"""Training that runs a whole policy, on Hugging Face Accelerate. `docs/training.md` is its manual."""

from .data import Data
from .settings import Settings
from .teacher_cache import Kept, keep_teacher
from .trainer import Trained, Trainer

__all__ = ["Data", "Kept", "Settings", "Trained", "Trainer", "keep_teacher"]
