"""The residual stream of a model: the channels that residual adds carry from block to block."""

from __future__ import annotations

from torch import fx

from fxcompress.graph.coupling import Coupling, Mask
from fxcompress.graph.coupling_flow import tracked
from fxcompress.graph.ops import arguments, kind_of


def stream(coupling: Coupling) -> Mask:
    """The components that at least one residual add carries, heads of attentions left out.

    An add is residual if one of its operands is computed from the other through a contraction (a linear layer, a
    convolution, an attention): `x + f(x)`, whatever moves, scales, normalises or drops `x` on either way. The sum of
    two branches of one value (as with a projected shortcut), of a value and a parameter (a position embedding) or of a
    value and a pointwise function of it (inside an activation) is none. As all adds of one stream are tied to each
    other and to what makes its first value, their components are the width of the model, wherever it is used.
    """
    contracting = {entry.node for entry in coupling.flow.consumed}
    adds = [node for node in coupling.flow.nodes
            if kind_of(node) in ("add", "sub") and _is_residual(coupling, node, contracting)]
    carried = coupling.touched(labels for node in adds for labels in tracked(coupling.flow.values[node]))
    return carried & ~coupling.heads


def _is_residual(coupling: Coupling, node: fx.Node, contracting: set[fx.Node]) -> bool:
    """Whether the later operand of an add comes from the earlier one through one of the nodes `contracting`. Looks at
    the nodes between the two only, so that a chain of blocks takes linear time."""
    index = coupling.flow.index
    args = arguments(node)
    operands = [value for value in (args["input"], args["other"]) if coupling.flow.is_tensor(value)]
    if len(operands) != 2:
        return False
    skip, branch = sorted(operands, key=index.__getitem__)
    if skip.op == "get_attr":
        return False
    reached = {skip: False}  # node -> whether a contraction lies on a way from `skip` to it
    for between in coupling.flow.nodes[index[skip] + 1 : index[branch] + 1]:
        ways = [reached[source] for source in between.all_input_nodes if source in reached]
        if ways:
            reached[between] = any(ways) or between in contracting
    return reached.get(branch, False)
