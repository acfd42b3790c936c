"""Modules that stay in rewritten models. They import torch alone."""

from __future__ import annotations

from .attention import RoundedAttention as RoundedAttention
from .cuda import CudaInt8Linear as CudaInt8Linear
from .cuda import Sparse24Linear as Sparse24Linear
from .cuda import ToInt8 as ToInt8
from .cuda_weights import CudaInt4Linear as CudaInt4Linear
from .cuda_weights import CudaInt8WeightLinear as CudaInt8WeightLinear
from .dynamic import DynamicLinear as DynamicLinear
from .dynamic import DynamicQuantizer as DynamicQuantizer
from .integer import IntConv2d as IntConv2d
from .integer import IntLinear as IntLinear
from .mask import Mask as Mask
from .mode import ByMode as ByMode
from .moving import IntAdaptiveMean as IntAdaptiveMean
from .moving import Interleave as Interleave
from .moving import IntMaxPool2d as IntMaxPool2d
from .moving import IntMean as IntMean
from .moving import ToFloat as ToFloat
from .moving import ToInteger as ToInteger
from .packed import PackedConv2d as PackedConv2d
from .quantizer import Quantizer as Quantizer
from .quantizer import WeightQuantizer as WeightQuantizer
from .reorder import Reorder as Reorder
from .trained import FreezingBatchNorm1d as FreezingBatchNorm1d
from .trained import FreezingBatchNorm2d as FreezingBatchNorm2d
from .trained import TrainedQuantizer as TrainedQuantizer
from .weight_only import WeightOnlyConv2d as WeightOnlyConv2d
from .weight_only import WeightOnlyEmbedding as WeightOnlyEmbedding
from .weight_only import WeightOnlyLinear as WeightOnlyLinear
