"""Stages that student and teacher both compute from the very same frozen tensors: found, so that one does.

Two nodes are one stage where they do the same to the same: the same operator with the same settings, on inputs that are
shared already (the models' inputs are), with parameters that are the same tensors in both models and aren't trained. An
operator that acts otherwise in training (batch norm, dropout) ends the stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.graph.captured import Captured
from fxcompress.graph.modules import leaf_of
from fxcompress.graph.ops import arguments, kind_of, module_of, op_of
from fxcompress.graph.tree import named_tensors

_BY_MODE = ("batchnorm", "instancenorm", "dropout", "alpha_dropout", "feature_alpha_dropout", "stochastic_depth",
            "rrelu", "lstm", "gru", "rnn", "multihead_attention", "rand", "bernoulli", "normal", "uniform",
            "embedding_bag")


def shared_nodes(teacher: Captured, student: Captured, same: Mapping[str, str],
                 inputs: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """The teacher's nodes that a node of the student stands for, beginning with `inputs`; `same` names the student's
    tensors that are the teacher's."""
    tensors = _Tensors(teacher, student, same)
    found = dict(inputs)
    for node in teacher.graph.nodes:
        if node.op == "get_attr":
            other = next((other for other in student.graph.nodes if other.op == "get_attr"
                          and tensors.are_one(str(node.target), str(other.target))), None)
            if other is not None:
                found[node] = other
        elif node.op in ("call_module", "call_function") and node.all_input_nodes:
            first = found.get(node.all_input_nodes[0])
            other = next((user for user in first.users if _alike(node, user, found, tensors)), None) if first else None
            if other is not None:
                found[node] = other
    return found


def frontier_of(found: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """Of the shared nodes `found` those whose values others read. Only what is computed with parameters is worth it,
    and only tensors are handed over: where a stage ends in something else (the parts of a split), it ends before."""
    worth: set[fx.Node] = set()
    for node in found:
        own = node.op == "get_attr" or (node.op == "call_module" and bool(
            [*module_of(node).parameters(), *module_of(node).buffers()]))
        if own or any(source in worth for source in node.all_input_nodes):
            worth.add(node)
    while True:
        ends = [node for node in worth if node.op != "get_attr" and any(user not in worth for user in node.users)]
        odd = [node for node in ends if not isinstance(getattr(node.meta.get("fxc"), "dtype", None), torch.dtype)]
        if not odd:
            return [node for node in found if node in ends]
        worth.difference_update(odd)


class _Tensors:
    """Which tensors of both models are one, and stay as they are."""

    def __init__(self, teacher: Captured, student: Captured, same: Mapping[str, str]) -> None:
        self.mine, self.theirs = named_tensors(student.module).all, named_tensors(teacher.module).all
        self.same = same
        self.concrete = student.concrete and teacher.concrete

    def are_one(self, theirs: str, mine: str) -> bool:
        """Whether the teacher's tensor `theirs` is the student's `mine`, which isn't trained."""
        one, other = self.mine.get(mine), self.theirs.get(theirs)
        if self.same.get(mine) != theirs or one is None or other is None or one.shape != other.shape:
            return False
        if isinstance(one, nn.Parameter) and one.requires_grad:
            return False
        return not self.concrete or torch.equal(one.to(other.device), other)  # a rewrite may have changed its values


def _alike(theirs: fx.Node, mine: fx.Node, found: Mapping[fx.Node, fx.Node], tensors: _Tensors) -> bool:
    kind = kind_of(theirs)
    if theirs.op != mine.op or kind != kind_of(mine) or kind.startswith(_BY_MODE):
        return False
    if theirs.op == "call_function":
        one, other = arguments(theirs), arguments(mine)
        return theirs.target == mine.target and op_of(theirs) is not None and _same_values(one, other, found)
    one_module, other_module = module_of(theirs), module_of(mine)
    if leaf_of(type(one_module)) is None or type(one_module) is not type(other_module):
        return False
    names = {**one_module._parameters, **one_module._buffers}
    if names.keys() != {**other_module._parameters, **other_module._buffers}.keys() or one_module._modules:
        return False
    held = all((value is None) == (getattr(other_module, name) is None) for name, value in names.items()) and all(
        tensors.are_one(f"{theirs.target}.{name}", f"{mine.target}.{name}")
        for name, value in names.items() if value is not None)
    one, other = ({name: value for name, value in arguments(node).items() if not isinstance(value, Tensor)}
                  for node in (theirs, mine))
    return held and _same_values(one, other, found)


def _same_values(one: dict[str, Any], other: dict[str, Any], found: Mapping[fx.Node, fx.Node]) -> bool:
    if any(node not in found for value in one.values() for node in _nodes(value)):
        return False
    return repr(fx.map_arg(one, lambda node: found[node])) == repr(other)


def _nodes(value: Any) -> list[fx.Node]:
    met: list[fx.Node] = []

    def meet(node: fx.Node) -> fx.Node:
        met.append(node)
        return node

    fx.map_arg(value, meet)
    return met
