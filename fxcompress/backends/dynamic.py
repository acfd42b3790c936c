"""`mode = dynamic`: linear layers that round what they read when they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..graph.captured import Captured
from ..graph.ops import arguments, kind_of, module_of
from ..nn.dynamic import DynamicLinear, DynamicQuantizer
from ..nn.pairs import SAFE_BITS, fit, saturates
from .float_io import bias_of, layers_of, put_kernel, rounded

if TYPE_CHECKING:
    from .int8 import Lowered


def lower_dynamic(captured: Captured, done: Lowered) -> None:
    """Put integer layers in the place of linear layers whose inputs a `DynamicQuantizer` rounds, in place; writes into
    `done`. The caller drops what is dead and refreshes."""
    for node, quantizer in layers_of(captured):
        data = arguments(node)["input"]
        rounding = module_of(data) if isinstance(data, fx.Node) and data.op == "call_module" else None
        if kind_of(node) != "linear" or not isinstance(rounding, DynamicQuantizer):
            continue
        integers, scale, _ = rounded(captured, node, quantizer)
        bits = rounding.scheme.bits, quantizer.scheme.bits
        if saturates() and not fit(quantizer.outputs(integers), rounding.scheme.high):
            done.left[node.name] = (f"{bits[0]} bits by {bits[1]} saturate on this CPU; {SAFE_BITS} in all are safe")
            continue
        bias = bias_of(captured, node)
        made = DynamicLinear(integers.shape, bias is not None, rounding.scheme, rounding.per_token, quantizer.group)
        made.fill(integers, scale, bias)
        done.kernels[node.name] = put_kernel(captured, node, made, data.args[0])
