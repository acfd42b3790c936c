"""Residual blocks taken out of a graph, with their modules; and the proof that it is the same as branches that give
zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .captured import Captured
from .comparing import Proof, Run, difference, inputs_of, proven, side_by_side, worst_apart
from .ops import kind_of
from .propagate import drop_dead
from .residual_blocks import Block, Residual, operand

_IDEMPOTENT = frozenset({"relu", "relu6"})  # applied twice is applied once

_REPORT = ("this is a defect in how blocks are found: please report it with the model; until then leave the blocks at "
           "fault out of the selection")


def drop_blocks(captured: Captured, blocks: Sequence[Block]) -> list[fx.Node]:
    """Let the users of every add of `blocks` read what it adds to, in place; nodes, modules and parameters that nothing
    reads any more go, `state_dict` keys of the rest stay. `blocks` may be those of a graph that `captured` is a copy
    of. Facts are fresh afterwards. Returns the nodes that read something else now."""
    before = _targets(captured)
    place = {node.name: number for number, node in enumerate(captured.graph.nodes)}
    nodes = {node.name: node for node in captured.graph.nodes}
    changed: dict[fx.Node, None] = {}
    for one in sorted((one for block in blocks for one in block.residuals), key=lambda one: place[one.add.name]):
        add = nodes[one.add.name]
        users = list(add.users)
        _bypass(captured, add, operand(add, one.skip))
        changed.update(dict.fromkeys(users))
        for user in users:
            if _repeats(user):
                changed.update(dict.fromkeys(user.users))
                _bypass(captured, user, user.all_input_nodes[0])
    drop_dead(captured.graph)
    _sweep(captured.module, before - _targets(captured))
    captured.refresh()
    alive = set(captured.graph.nodes)
    return [node for node in changed if node in alive and node.op != "output"]


def prove_dropped(original: Captured, rewritten: Captured, blocks: Sequence[Block], *, double: bool = False) -> Proof:
    """Compare `rewritten` with `original`, in which the branches of `blocks` give zero; with `double` in float64.

    Raises RewriteError (FXC0541) if they differ by more than rounding. Both are left as they were.
    """
    residuals = [one for block in blocks for one in block.residuals]

    def compare(dtype: torch.dtype | None) -> Proof:
        inputs = inputs_of(original, None, dtype)
        with side_by_side(original, rewritten, dtype):
            silenced = _Silenced(original.module, residuals, dtype)
            return worst_apart(silenced, Run(rewritten.module, dtype), inputs, lambda _, *values: difference(*values))

    what = "the model without these blocks differs from the model in which their branches give zero"
    return proven(compare, what, _REPORT, double)


class _Silenced(Run):
    """Runs a graph in which the branches of some residual adds give zero."""

    def __init__(self, module: fx.GraphModule, residuals: Sequence[Residual], dtype: torch.dtype | None) -> None:
        super().__init__(module, dtype)
        self.branches = {one.add: one.branch for one in residuals}

    def run_node(self, n: fx.Node) -> Any:
        """Run `n`; an add among them on zeros in the place of its branch."""
        branch = self.branches.get(n)
        if branch is None:
            return super().run_node(n)
        held: Tensor = self.env[branch]
        self.env[branch] = torch.zeros_like(held)
        result = super().run_node(n)
        self.env[branch] = held
        return result


def _repeats(node: fx.Node) -> bool:
    """Whether `node` does again what the node it reads has done."""
    sources = node.all_input_nodes
    return kind_of(node) in _IDEMPOTENT and len(sources) == 1 and kind_of(sources[0]) == kind_of(node)


def _bypass(captured: Captured, node: fx.Node, source: fx.Node) -> None:
    """Take `node` away; its users read `source`."""
    node.replace_all_uses_with(source)
    captured.graph.erase_node(node)
    captured.moved[node.name] = (source.name,)


# Modules


def _targets(captured: Captured) -> set[str]:
    return {str(node.target) for node in captured.graph.nodes if node.op in ("get_attr", "call_module")}


def _sweep(root: fx.GraphModule, gone: set[str]) -> None:
    """Take away what only the targets `gone` have read, and modules that hold nothing any more."""
    kept = {prefix for node in root.graph.nodes if node.op in ("get_attr", "call_module")
            for prefix in _prefixes(str(node.target))}
    calls = {str(node.target) for node in root.graph.nodes if node.op == "call_module"}
    for target in sorted(_unread(root, gone, kept), reverse=True):
        if calls.isdisjoint(_prefixes(target)):
            owner, _, name = target.rpartition(".")
            delattr(root.get_submodule(owner), name)
            while owner and owner not in kept and _is_empty(root.get_submodule(owner)):
                root.delete_submodule(owner)
                owner = owner.rpartition(".")[0]


def _unread(root: fx.GraphModule, gone: set[str], kept: set[str]) -> set[str]:
    """`gone`, and of modules among them of which a part is still read the other parts."""
    found = gone - kept
    for target in gone & kept:
        part = root.get_submodule(target)
        state = (*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False))
        found |= {f"{target}.{name}" for name, _ in state} - kept
    return found


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _is_empty(module: nn.Module) -> bool:
    """Whether it holds no state, nor modules that are called."""
    return not any(True for _ in module.parameters()) and not any(True for _ in module.buffers()) and not any(
        True for _ in module.children())
