"""LSTM, GRU and RNN: the gates are blocks of one hidden width, which all layers and directions share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx, nn

from ..coupling_edit import Edit, resize
from ..coupling_flow import Dim, Dims, Flow, Value, rule

_GATES = {"lstm": 4, "gru": 3, "rnn": 1, "lstm_cell": 4, "gru_cell": 3, "rnn_cell": 1}


@rule("lstm", "gru", "rnn")
def layers(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """Input (..., input_size) -> output (..., directions · state), then the last states (layers, ..., state). The state
    is as wide as the cell, which is `hidden`, or a projection of it."""
    module = flow.module()
    assert isinstance(module, nn.RNNBase)
    gates = _GATES[node.meta["fxc"].kind]
    hidden = flow.fresh(module.hidden_size)
    state = flow.fresh(module.proj_size) if module.proj_size else hidden
    directions = 2 if module.bidirectional else 1
    fed: Dim = flow.of(args["input"])[-1]
    output: Dim = None if state is None else np.tile(state, directions)
    for layer in range(module.num_layers):
        for direction in range(directions):
            suffix = f"_l{layer}{'_reverse' if direction else ''}"
            _layer(flow, f"{node.target}.", suffix, gates, hidden, fed, state)
        fed = output
    _states(flow, args["hx"], [state, hidden])
    shape = node.meta["fxc"].shape
    result = (*(None,) * (len(shape[0]) - 1), output)
    last = [(*(None,) * (_rank(shape[1]) - 1), labels) for labels in (state, hidden)]
    return [result, last if isinstance(module, nn.LSTM) else last[0]]


def _rank(shape: Any) -> int:
    return len(shape[0]) if isinstance(shape[0], tuple) else len(shape)


def _layer(flow: Flow, prefix: str, suffix: str, gates: int, hidden: Dim, fed: Dim, state: Dim) -> None:
    """One layer in one direction: weight_ih (gates · hidden, in), weight_hh (gates · hidden, state), biases, and
    weight_hr (state, hidden) of a projection."""
    rows = None if hidden is None else np.tile(hidden, gates)
    into, within = flow.tensor(f"{prefix}weight_ih{suffix}"), flow.tensor(f"{prefix}weight_hh{suffix}")
    flow.consume(f"{prefix}weight_ih{suffix}", 1, flow.tie(into[1], fed))
    flow.tie(into[0], rows)
    flow.tie(within[0], rows)
    flow.consume(f"{prefix}weight_hh{suffix}", 1, flow.tie(within[1], state))
    for name in (f"{prefix}bias_ih{suffix}", f"{prefix}bias_hh{suffix}"):
        if flow.has(name):
            flow.tie(flow.tensor(name)[0], rows)
    flow.produce(hidden, (f"{prefix}weight_ih{suffix}", 0), (f"{prefix}weight_hh{suffix}", 0))
    projection = f"{prefix}weight_hr{suffix}"
    if flow.has(projection):
        out, inner = flow.tensor(projection)
        flow.consume(projection, 1, flow.tie(inner, hidden))
        flow.produce(flow.tie(out, state), (projection, 0))


def _states(flow: Flow, given: Any, widths: list[Dim]) -> None:
    """Tie given first states: of an LSTM two, the second that of the cell."""
    parts = list(given) if isinstance(given, tuple | list) else [given]
    for part, labels in zip(parts, widths, strict=False):
        dims: Dims = flow.of(part)
        if dims:
            flow.tie(dims[-1], labels)


@rule("lstm_cell", "gru_cell", "rnn_cell")
def cell(flow: Flow, node: fx.Node, args: Mapping[str, Any]) -> Value:
    """One step: input (..., in), state (..., hidden) -> the new state, and the cell's for an LSTM."""
    module = flow.module()
    assert isinstance(module, nn.RNNCellBase)
    hidden = flow.fresh(module.hidden_size)
    source = flow.of(args["input"])
    _layer(flow, f"{node.target}.", "", _GATES[node.meta["fxc"].kind], hidden, source[-1], hidden)
    _states(flow, args["hx"], [hidden, hidden])
    result = (*source[:-1], hidden)
    return [result, result] if isinstance(module, nn.LSTMCell) else result


@resize("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell")
def resize_recurrent(edit: Edit, node: fx.Node, args: Mapping[str, Any]) -> None:
    """The module's sizes follow its parameters."""
    suffix = "" if node.meta["fxc"].kind.endswith("cell") else "_l0"
    module = edit.flow.captured.module.get_submodule(str(node.target))
    into = edit.flow.tensor(f"{node.target}.weight_ih{suffix}")
    within = edit.flow.tensor(f"{node.target}.weight_hh{suffix}")
    gates = _GATES[node.meta["fxc"].kind]
    sizes = {"input_size": edit.size(into[1], int(module.input_size)),  # type: ignore[arg-type]
             "hidden_size": edit.size(within[0], gates * int(module.hidden_size)) // gates}  # type: ignore[arg-type]
    if getattr(module, "proj_size", 0):
        sizes["proj_size"] = edit.size(within[1], int(module.proj_size))  # type: ignore[arg-type]
    if any(getattr(module, name) != size for name, size in sizes.items()):
        edit.modules[str(node.target)] = sizes
