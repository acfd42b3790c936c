"""Layer after layer: the float model and the rounded one run side by side over the calibration data.

At each quantized layer a step sees what it reads in both, and may write its parameters; the rounded model goes on with
what was written. So every layer makes up for the rounding of those before it, in two forward passes for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from fxcompress.graph.calibration import Calibration, inputs_of
from fxcompress.graph.captured import Captured
from fxcompress.graph.interpret import evaluated, evaluating, last_uses
from fxcompress.graph.ops import arguments, kind_of, op_of
from fxcompress.graph.propagate import device_of
from fxcompress.passes.shared.recovery import Layer
from fxcompress.passes.shared.switching import without_rounding
from fxcompress.passes.shared.weights import of_parameters

SAMPLES = 64  # of the calibration data that are walked with: all of them are in memory at once


@dataclass(frozen=True)
class Sight:
    """What a layer reads in both models, and what it gives in the float one, before its activation: a tensor for each
    batch."""

    floats: list[Tensor]
    rounded: list[Tensor]
    gives: list[Tensor]


Act = Callable[[Layer, Sight], None]
_Env = dict[fx.Node, Any]


def walk(captured: Captured, data: Calibration, layers: Iterable[Layer], act: Act) -> None:
    """Call `act` at each of `layers`, in graph order, on the first `SAMPLES` samples of `data`.

    Raises PlanError (FXC0570) for a batch that doesn't fit.
    """
    wanted = {layer.node: layer for layer in layers}
    if not wanted:
        return
    inputs = some_inputs(captured, data, SAMPLES)
    with evaluating(captured.module):
        _Walk(captured, wanted, act).run(inputs)


def some_inputs(captured: Captured, data: Calibration, samples: int) -> list[list[Any]]:
    """The inputs of the first batches of `data`, on the model's device, until there are `samples` samples; the last
    batch is cut, unless the graph only works for its own batch size."""
    device = device_of(captured.module, captured.example)
    found, left = [], samples
    for number, batch in enumerate(data.batches, 1):
        inputs = inputs_of(captured, batch, number)
        size = next((value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim()), 1)
        if size > left and not captured.fixed_batch:
            inputs = [value[:left] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value
                      for value in inputs]
        found.append(tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs))
        left -= size
        if left <= 0:
            break
    return found


@dataclass
class _Walk:
    captured: Captured
    layers: Mapping[fx.Node, Layer]
    act: Act

    def run(self, inputs: list[list[Any]]) -> None:
        graph = self.captured.graph
        constant = {node for node in graph.nodes if of_parameters(node)}
        nodes = [node for node in graph.nodes if node not in constant]
        end = max(nodes.index(node) for node in self.layers)
        nodes = nodes[:end + 1]
        ends = last_uses(nodes)
        runs = [fx.Interpreter(self.captured.module) for _ in inputs]
        for run, values in zip(runs, inputs, strict=True):
            run.args_iter = iter(values)
        both: list[tuple[_Env, _Env]] = [({}, {}) for _ in inputs]
        for node in nodes:
            self._node(node, runs, both, constant)
            for dead in ends.get(node, ()):
                for env in (env for pair in both for env in pair):
                    env.pop(dead, None)

    def _node(self, node: fx.Node, runs: list[fx.Interpreter], both: list[tuple[_Env, _Env]],
              constant: set[fx.Node]) -> None:
        read = [source for source in node.all_input_nodes if source in constant]
        with without_rounding(self.captured):
            fixed = {source: evaluated(self.captured.module, source) for source in read}
        for run, (floats, rounded) in zip(runs, both, strict=True):
            floats.update(fixed)
            if node.op == "placeholder":
                floats[node] = rounded[node] = run.run_node(node)
            else:
                passed = kind_of(node) == "quantizer"
                floats[node] = floats[node.all_input_nodes[0]] if passed else _run(run, floats, node)
        if node.op == "placeholder":
            return
        if node in self.layers:
            layer = self.layers[node]
            self.act(layer, Sight([floats[layer.data] for floats, _ in both], [r[layer.data] for _, r in both],
                                  [floats[node] for floats, _ in both]))
        fixed = {source: evaluated(self.captured.module, source) for source in read}
        for run, (_, rounded) in zip(runs, both, strict=True):
            rounded.update(fixed)
            rounded[node] = _run(run, rounded, node)


def _run(run: fx.Interpreter, env: _Env, node: fx.Node) -> Any:
    run.env = env
    return run.run_node(node)


def product(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `layer` computes of `x` with this weight and bias, before its activation."""
    op = op_of(layer.node)
    assert op is not None
    args, kwargs = op.normal({**arguments(layer.node), "input": x, "weight": weight, "bias": bias})
    target: Any = layer.node.target
    with torch.no_grad():
        return target(*args, **kwargs)  # type: ignore[no-any-return]
