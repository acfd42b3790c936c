"""`mode = qat`: rounding that is trained with. What moves in training, and what is folded after it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import module_of
from fxcompress.graph.propagate import drop_dead
from fxcompress.graph.site import Outcome, Scheduled, Site
from fxcompress.nn.trained import TrainedQuantizer, _Freezing, freezing
from fxcompress.passes.shared.fold_norms import fold
from fxcompress.policy.values import Ramp

if TYPE_CHECKING:
    from fxcompress.passes.quantize import Quantize


def norm_arguments(captured: Captured, node: fx.Node, norm: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes in front of `node` that read the running variance and the factors of the norm behind it, which becomes one
    that can be frozen."""
    path, module = str(norm.target), freezing(module_of(norm))
    owner, _, leaf = path.rpartition(".")
    setattr(captured.module.get_submodule(owner), leaf, module)
    reads = []
    for name in ("running_var", "weight"):
        if getattr(module, name) is not None:
            with captured.graph.inserting_before(node):
                reads.append(captured.graph.get_attr(f"{path}.{name}"))
            reads[-1].meta["path"] = path
    return tuple(reads)


@dataclass(frozen=True)
class Switching:
    """Writes how far a phase is to the switches of what it trains."""

    captured: Captured
    paths: tuple[str, ...]
    delay: float
    freeze: float

    def __call__(self, progress: float) -> bool:
        """Watch up to `delay`, then round; move up to `freeze`."""
        moves = progress < self.freeze
        for path in self.paths:
            module = self.captured.module.get_submodule(path)
            if isinstance(module, TrainedQuantizer):
                module.switch(moves=moves, rounds=progress >= self.delay)
            elif isinstance(module, _Freezing):
                module.freeze(not moves)
        return True


def scheduled(settings: Quantize, captured: Captured, site: Site, nodes: Iterable[fx.Node]) -> Outcome:
    """What moves in the phase, the modules that `nodes` call, or a note that it has no time."""
    if site.window is None:
        return Outcome((), ("ranges and the statistics of norms move in training until `finalize`: the phase has no "
                            "time, `over epochs 0..10`, in which they could be frozen",))
    paths = dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module")
    write = Switching(captured, tuple(paths), settings.delay, settings.freeze)
    name = f"rounding of {site.selection or 'the selection'}"
    return Outcome((), scheduled=(Scheduled(name, Ramp("linear", 0.0, 1.0), write),))


def fold_training(captured: Captured) -> list[fx.Node]:
    """Stop quantizers that trained at the ranges they have now, and fold the norms that they counted in, with the
    statistics they have now; in place. Returns the nodes that changed or are new. The caller refreshes."""
    calls = [node for node in captured.graph.nodes
             if node.op == "call_module" and isinstance(module_of(node), TrainedQuantizer)]
    counted = {node: user for node in calls if len(node.args) > 1 for user in node.users}
    for call in calls:
        module = module_of(call)
        assert isinstance(module, TrainedQuantizer)
        module.switch(moves=False, rounds=True)
        call.args = call.args[:1]
    drop_dead(captured.graph)
    there = set(captured.graph.nodes)
    for call, layer in counted.items():
        layer.replace_input_with(call, call.args[0])
    folded = fold(captured, counted.values())
    for call, layer in counted.items():
        layer.replace_input_with(call.args[0], call)
    new = [node for node in captured.graph.nodes if node not in there]
    return [*calls, *(node for node, _ in folded), *new]
