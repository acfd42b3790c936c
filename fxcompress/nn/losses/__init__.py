"""The terms of a distillation: see `base.Loss`. They import torch alone."""

from __future__ import annotations

from .base import Loss as Loss
from .features import MSE as MSE
from .features import NST as NST
from .features import Attention as Attention
from .features import Cosine as Cosine
from .features import Hint as Hint
from .relations import Relation as Relation
from .relations import Similarity as Similarity
from .responses import KL as KL
from .responses import ActivationKL as ActivationKL
from .responses import CrossEntropy as CrossEntropy
from .responses import Decoupled as Decoupled
from .responses import Dist as Dist
from .responses import LogitStandardized as LogitStandardized
from .responses import SoftCrossEntropy as SoftCrossEntropy
