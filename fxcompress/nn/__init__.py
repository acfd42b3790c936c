"""Modules that stay in rewritten models. They import torch alone."""

from __future__ import annotations

from .mask import Mask as Mask
from .mode import ByMode as ByMode
from .reorder import Reorder as Reorder
