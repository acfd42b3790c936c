"""Modules that stay in rewritten models. They import torch alone."""

from __future__ import annotations

from .integer import IntConv2d as IntConv2d
from .integer import IntLinear as IntLinear
from .integer import IntMaxPool2d as IntMaxPool2d
from .integer import ToFloat as ToFloat
from .integer import ToInteger as ToInteger
from .mask import Mask as Mask
from .mode import ByMode as ByMode
from .quantizer import Quantizer as Quantizer
from .reorder import Reorder as Reorder
