"""`quantize`: convolutions and linear layers in integers. The graph shows where numbers are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fxcompress.diagnostics import Diagnostic, PolicyError
from fxcompress.passbase import Facet, Pass, param
from fxcompress.policy.types import Bits, Boolean, CallOf, Choice, OneOf, Percent, Registered
from fxcompress.policy.values import Call

if TYPE_CHECKING:
    from fxcompress.graph.captured import Captured
    from fxcompress.graph.site import Outcome, Site


@dataclass(frozen=True)
class Quantize(Pass):
    """Compute the selected layers in integers: batch norms are folded, activations fused, and what layers read and give
    is rounded to a grid that calibration finds; `finalize` replaces them by integer kernels. Of `multihead_attention`
    the projections are quantized, as linear layers: select `linear | multihead_attention` for all of a transformer."""

    verb: ClassVar[str] = "quantize"
    facet: ClassVar[Facet] = Facet.NUMERIC
    kinds: ClassVar[tuple[str, ...]] = ("conv2d", "linear", "multihead_attention", "conv1d", "conv3d",
                                        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "addmm")

    bits: int | None = param(
        Bits(low=2, high=8), "of the integers that layers read and give, which kernels hold in bytes; without it 8, or "
        "7 where the CPU's products of bytes saturate (no VNNI instructions)", None)
    weight_bits: int = param(Bits(low=2, high=8), "of the weights' integers, which kernels hold in bytes", 8)
    granularity: str = param(Choice(("per_channel", "per_tensor")), "one scale for each output of a weight, or one for "
                             "all of it", "per_channel")
    symmetric: bool = param(Boolean(), "give values of both signs a range as long on both sides of zero", False)
    observer: str | Call = param(
        OneOf((Registered("OBSERVERS"), CallOf("percentile", (Percent(),)))),
        "how the range of what layers read and give is found in the calibration data", "histogram")
    weight_observer: str | Call = param(
        OneOf((Registered("OBSERVERS"), CallOf("percentile", (Percent(),)))),
        "how the range of a weight is found in its values", "minmax")
    equalize: bool = param(Boolean(), "scale the channels between two layers, so that none wastes the range it shares "
                           "with others", False)
    smooth: float = param(Percent(), "how much of the outliers of what linear layers read behind a norm goes over into "
                          "their weights: 50% is usual", 0.0)
    adaround: bool = param(Boolean(), "learn on calibration data which weights are rounded up, and which down", False)
    gptq: bool = param(Boolean(), "round weights one input after the other, so that those to come make up for the error "
                       "on calibration data", False)
    correct_bias: bool = param(Boolean(), "take off biases what rounding shifts means by, on calibration data", False)
    mixed: float = param(Percent(), "the share of the selected layers' multiply-accumulates that may stay in float: the "
                         "layers that lose the most by rounding, each tried on calibration data", 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaround and self.gptq:
            raise PolicyError([Diagnostic("FXC0375", "`adaround` and `gptq` both decide how weights are rounded",
                                          help="choose one: `gptq` for linear layers, `adaround` for convolutions")])

    def rewrite(self, graph: Captured, site: Site) -> Outcome:
        """Fold, fuse and insert the quantizers. Raises PlanError: FXC0370 where nothing selected can be quantized."""
        from fxcompress.passes.shared.quantizing import quantize

        return quantize(self, graph, site)
