"""`quantize`: convolutions and linear layers in integers. The graph shows where numbers are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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

    def rewrite(self, graph: Captured, site: Site) -> Outcome:
        """Fold, fuse and insert the quantizers. Raises PlanError: FXC0370 where nothing selected can be quantized."""
        from fxcompress.passes.shared.quantizing import quantize

        return quantize(self, graph, site)
