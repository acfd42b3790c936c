"""What the recovery keys of `quantize` want to have in the graph before quantizers go in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from torch import fx

from fxcompress.graph.captured import Captured
from fxcompress.graph.interpret import evaluated
from fxcompress.graph.ops import arguments
from fxcompress.passes.shared.fold_norms import own_bias
from fxcompress.passes.shared.masking import parameter_of
from fxcompress.passes.shared.recovery import RECOVERY, Recovery
from fxcompress.passes.shared.recovery_smooth import make_room
from fxcompress.passes.shared.weights import expose

if TYPE_CHECKING:
    from fxcompress.passes.quantize import Quantize


def prepare(settings: Quantize, captured: Captured, products: Sequence[fx.Node]) -> None:
    """Keep with each of `products` what is asked for it; biases of zeros for `correct_bias`, and room for `smooth`."""
    asked = Recovery(**{field.name: getattr(settings, field.name) for field in fields(Recovery)})
    for node in products:
        node.meta[RECOVERY] = asked
        if asked.correct_bias and parameter_of(node, "weight") is not None:
            source = expose(captured, node)
            if arguments(node).get("bias") is None:
                own_bias(captured, node, evaluated(captured.module, source))
    make_room(captured, products)
    captured.refresh()
