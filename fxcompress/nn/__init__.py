"""Modules that stay in rewritten models. They import torch alone."""

from __future__ import annotations

from .dynamic import DynamicLinear as DynamicLinear
from .dynamic import DynamicQuantizer as DynamicQuantizer
from .integer import IntConv2d as IntConv2d
from .integer import IntLinear as IntLinear
from .integer import IntMaxPool2d as IntMaxPool2d
from .integer import ToFloat as ToFloat
from .integer import ToInteger as ToInteger
from .mask import Mask as Mask
from .mode import ByMode as ByMode
from .quantizer import Quantizer as Quantizer
from .quantizer import WeightQuantizer as WeightQuantizer
from .reorder import Reorder as Reorder
from .trained import FreezingBatchNorm1d as FreezingBatchNorm1d
from .trained import FreezingBatchNorm2d as FreezingBatchNorm2d
from .trained import TrainedQuantizer as TrainedQuantizer
from .weight_only import WeightOnlyConv2d as WeightOnlyConv2d
from .weight_only import WeightOnlyEmbedding as WeightOnlyEmbedding
from .weight_only import WeightOnlyLinear as WeightOnlyLinear
