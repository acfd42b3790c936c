"""`quantize`: convolutions and linear layers in integers. The graph shows where numbers are rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fxcompress.diagnostics import Diagnostic, PolicyError
from fxcompress.passbase import Facet, Pass, param
from fxcompress.policy.types import Bits, Boolean, CallOf, Choice, Integer, OneOf, Percent, Registered, Time
from fxcompress.policy.values import Call, Duration

if TYPE_CHECKING:
    from fxcompress.graph.captured import Captured
    from fxcompress.graph.site import Outcome, Site


AUTO = "auto"  # of `mixed`
MODES = ("static", "dynamic", "qat", "weight_only")
# Key -> the modes it says something in; elsewhere it has to stay as it is by default.
MEANT: Mapping[str, tuple[str, ...]] = {
    "bits": ("static", "dynamic", "qat"), "dtype": ("static", "qat"), "activations": ("dynamic",),
    "observer": ("static", "qat"), "delay": ("qat",), "freeze": ("qat",),
    "equalize": ("static",), "relu6_to_relu": ("static",), "smooth": ("static", "dynamic"),
    "adaround": ("static", "weight_only"), "gptq": ("static", "dynamic", "weight_only"),
    "correct_bias": ("static",), "mixed": ("static",), "fit_pairs": ("static", "dynamic"),
    "attention": ("static", "qat"),
}
RECOVERIES = ("equalize", "smooth", "adaround", "gptq", "correct_bias", "mixed")  # what data can win back


@dataclass(frozen=True)
class Quantize(Pass):
    """Compute the selected layers in integers: batch norms are folded, activations fused, and what layers read and give
    is rounded to a grid that calibration, training or the values themselves find; `finalize` replaces them by integer
    kernels. Of `multihead_attention` the projections are quantized, as linear layers: select
    `linear | multihead_attention` for all of a transformer. `attention` adds the products of queries, keys and
    values."""

    verb: ClassVar[str] = "quantize"
    facet: ClassVar[Facet] = Facet.NUMERIC
    kinds: ClassVar[tuple[str, ...]] = ("conv2d", "linear", "multihead_attention", "conv1d", "conv3d",
                                        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "addmm",
                                        "embedding")

    mode: str = param(
        Choice(MODES), "`static`: ranges from calibration data; `dynamic`: those of what linear layers read are found "
        "when they run; `qat`: rounding is trained with; `weight_only`: weights are held as integers, values stay "
        "floats", "static")
    bits: int | None = param(
        Bits(low=2, high=8), "of the integers that layers read and give, which kernels hold in bytes; without it 8, or "
        "in `qat` 7 where the CPU's products of bytes saturate (no VNNI instructions)", None)
    weight_bits: int = param(Bits(low=2, high=8), "of the weights' integers, which kernels hold in bytes; those of "
                             "`weight_only` two in a byte up to 4 bits", 8)
    fit_pairs: bool | None = param(
        Boolean(), "scales of weights such that no two neighbours sum to more than 128: then products of bytes "
        "saturate on no CPU, and 8 bits give the same numbers on all; without it, done where this CPU's would (no VNNI "
        "instructions)", None)
    dtype: str = param(Choice(("quint8", "qint8")), "whether the integers of values count from 0, or from the negative "
                       "half; it is the same grid, and kernels count from 0", "quint8")
    granularity: str | Call = param(
        OneOf((Choice(("per_channel", "per_tensor")), CallOf("per_group", (Integer(low=2),)))),
        "one scale for each output of a weight, for all of it, or for that many neighbours along the inputs of an "
        "output (in `weight_only`, and for linear layers in `dynamic`)", "per_channel")
    activations: str = param(Choice(("per_tensor", "per_token")), "in `dynamic`, one range for all that a layer reads, "
                             "or one for each row of it", "per_tensor")
    symmetric: bool = param(Boolean(), "give values of both signs a range as long on both sides of zero; in "
                            "`weight_only`, weights", False)
    attention: bool = param(Boolean(), "round also what attention multiplies, where a selected layer gives its values: "
                            "queries, keys, values, and the weights of the softmax; exported files multiply them as "
                            "integers, torch has no kernel for that", False)
    calibrate: Duration | None = param(Time(("samples",)), "how many inputs of the calibration data of `compile` are "
                                       "looked at; without it all", None)
    delay: float = param(Percent(), "in `qat`, the share of the phase that trains in floats, while ranges are watched",
                         0.0)
    freeze: float = param(Percent(), "in `qat`, the share of the phase after which ranges and the statistics of batch "
                          "norms stay as they are", 0.75)
    observer: str | Call = param(
        OneOf((Registered("OBSERVERS"), CallOf("percentile", (Percent(),)))),
        "how the range of what layers read and give is found in the calibration data", "histogram")
    weight_observer: str | Call = param(
        OneOf((Registered("OBSERVERS"), CallOf("percentile", (Percent(),)))),
        "how the range of a weight is found in its values", "minmax")
    equalize: bool = param(Boolean(), "scale the channels between two layers, so that none wastes the range it shares "
                           "with others", False)
    relu6_to_relu: bool = param(Boolean(), "between layers that `equalize` scales, which their bound would hinder; it "
                                "changes what the model computes, and is noted", False)
    smooth: float = param(Percent(), "how much of the outliers of what linear layers read behind a norm goes over into "
                          "their weights: 50% is usual", 0.0)
    adaround: bool = param(Boolean(), "learn on calibration data which weights are rounded up and which down",
                           False)
    gptq: bool = param(Boolean(), "round weights one input after another, so that those to come make up for the error "
                       "on calibration data", False)
    correct_bias: bool = param(Boolean(), "take off biases what rounding shifts means by, on calibration data",
                               False)
    mixed: float | str = param(
        OneOf((Percent(), Choice((AUTO,)))), "the share of the selected layers' MACs that may stay in float: the "
        "layers that lose the most by rounding, each tried on calibration data; `auto` for as few of them as the "
        "policy's `expect drift(output)` needs", 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [*self._meaningless(), *self._group_problems()]
        if self.delay > self.freeze:
            problems.append(Diagnostic("FXC0373", "ranges would be frozen before anything is rounded: `delay` is later "
                                       "than `freeze`", help="let `delay` end first: both are shares of the phase"))
        if self.relu6_to_relu and not self.equalize:
            problems.append(Diagnostic("FXC0371", "`relu6_to_relu` says nothing without `equalize`",
                                       help="add `equalize = true`, or leave it out"))
        if self.adaround and self.gptq:
            problems.append(Diagnostic("FXC0375", "`adaround` and `gptq` both decide how weights are rounded",
                                       help="choose one: `gptq` for linear layers, `adaround` for convolutions"))
        if problems:
            raise PolicyError(problems)

    @property
    def group(self) -> int:
        """How many weights of an output share a scale; 0 where it isn't `per_group`."""
        return int(str(self.granularity.args[0])) if isinstance(self.granularity, Call) else 0

    def _meaningless(self) -> Iterator[Diagnostic]:
        defaults = {parameter.name: parameter.default for parameter in self.parameters()}
        for key, modes in MEANT.items():
            if self.mode not in modes and getattr(self, key) != defaults[key]:
                yield Diagnostic("FXC0371", f"`{key}` says nothing in `mode = {self.mode}`", notes=(
                    f"it is for {' and '.join(f'`{mode}`' for mode in modes)}",),
                    help=f"leave `{key}` out, or choose another mode")

    def _group_problems(self) -> Iterator[Diagnostic]:
        if self.group and self.mode not in ("weight_only", "dynamic"):
            yield Diagnostic("FXC0372", f"`granularity = {self.granularity}` has no kernel in `mode = {self.mode}`",
                             notes=("a product of integers is summed over all inputs before it is scaled",),
                             help="use `per_channel`, or `mode = weight_only` or `dynamic`")

    def rewrite(self, graph: Captured, site: Site) -> Outcome:
        """Fold, fuse and insert the quantizers. Raises PlanError: FXC0370 where nothing selected can be quantized."""
        from fxcompress.passes.shared.quantizing import quantize

        return quantize(self, graph, site)
