"""A teacher made ready to stand in a student's graph: evaluated for good, cut behind its last tap, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.diagnostics import Diagnostic, PlanError
from fxcompress.graph.captured import Captured, Example
from fxcompress.graph.distilled import is_control
from fxcompress.graph.facts import NodeFact, shapes
from fxcompress.graph.ops import arguments, call, kind_of, module_of, path_of
from fxcompress.graph.propagate import device_of, drop_dead
from fxcompress.graph.teacher import Teacher
from fxcompress.graph.tree import named_tensors
from fxcompress.nn.frozen import ChannelsLast, Constant, Frozen, freeze
from fxcompress.passes.shared.distill_sharing import frontier_of, shared_nodes
from fxcompress.passes.shared.fold_norms import fold
from fxcompress.passes.shared.inference import bake_evaluation
from fxcompress.passes.shared.weights import absorb

_FOLDED = ("conv1d", "conv2d", "conv3d", "linear")
_MODELESS = ("conv", "linear", "bilinear", "layernorm", "groupnorm", "rmsnorm", "prelu", "embedding")
_FRESH = ("conv", "linear", "batchnorm", "add", "max_pool")  # they give a tensor of their own, never a view of another
_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")
_ACTIVATIONS = ("relu", "relu6", "silu", "hardswish", "hardtanh", "leaky_relu", "elu", "mish")


@dataclass
class Prepared:
    """A teacher's graph that gives its taps, as a tuple; `sources` are the student's nodes that feed its inputs, in
    their order, and `shared` those of them that stand for a stage of the teacher's."""

    module: nn.Module
    graph: fx.Graph
    sources: list[fx.Node]
    shared: list[fx.Node]
    notes: list[str]


def prepare(teacher: Teacher, taps: Sequence[str], student: Captured, share: bool) -> Prepared:
    """The teacher with the taps (nodes of `teacher.captured`, by name). Raises PlanError (FXC0353) where its inputs
    aren't the student's."""
    assert teacher.captured is not None
    captured = teacher.captured.copy() if student.concrete else teacher.captured.skeleton()
    captured.teachers = None
    captured.module.eval()
    if student.concrete:
        captured.module.to(device_of(student.module, student.example))
    inputs = _inputs(teacher, captured, student)
    whole = captured.facts
    nodes = {node.name: node for node in captured.graph.nodes}
    end = next(iter(reversed(captured.graph.nodes)))
    end.args = (tuple(nodes[name] for name in taps),)
    bake_evaluation(captured)
    captured.refresh()
    notes = [f"of the teacher: {note}" for note in captured.notes if teacher.captured is not student]
    if captured.fixed_batch and not student.fixed_batch:
        notes.append(f"the teacher only takes batches of {captured.example.batch}: {captured.fixed_batch}")
    notes += _cut_notes(captured, whole, nodes)
    found = shared_nodes(captured, student, teacher.same, inputs) if share else dict(inputs)
    sources, shared = _take_over(captured, student, found, inputs)
    captured.refresh()
    layers = [node for node in captured.graph.nodes if kind_of(node) in _FOLDED]
    for node in dict.fromkeys(node for node, _ in fold(captured, layers)):
        absorb(captured, node)
    _pool_first(captured.graph)
    captured.refresh()
    if shared:
        notes.append(f"computed once for both: {', '.join(path_of(node) or node.name for node in shared)}, and what "
                     "leads there")
    _work_in_place(captured.graph)
    _lay_out(captured)
    _freeze(captured.module, captured.graph)
    return Prepared(captured.module, captured.graph, sources, shared, notes)


def _inputs(teacher: Teacher, captured: Captured, student: Captured) -> dict[fx.Node, fx.Node]:
    """The teacher's inputs, and the student's that stand for them."""
    theirs = [node for node in captured.graph.nodes if node.op == "placeholder" and not is_control(node)]
    mine = [node for node in student.graph.nodes if node.op == "placeholder" and not is_control(node)]
    fits = len(theirs) == len(mine) and all(_shape(a) == _shape(b) for a, b in zip(theirs, mine, strict=True))
    if not fits:
        raise PlanError([Diagnostic(
            "FXC0353", f"`{teacher.name}` can't be a teacher: its inputs are not the student's",
            notes=(f"its are {', '.join(f'{node.name} {_shape(node)}' for node in theirs)}",
                   f"the student's are {', '.join(f'{node.name} {_shape(node)}' for node in mine)}"),
            help="capture both on the same example inputs")])
    return dict(zip(theirs, mine, strict=True))


def _shape(node: fx.Node) -> Any:
    return getattr(node.meta.get("fxc"), "shape", None)


def _cut_notes(captured: Captured, whole: Any, before: dict[str, fx.Node]) -> list[str]:
    """What of the teacher isn't computed."""
    kept = {node.name for node in captured.graph.nodes}
    gone = [str(node.target) for name, node in before.items() if name not in kept and node.op == "call_module"
            and node.meta["fxc"].params]
    left = captured.facts
    if not gone:
        return []
    few = ", ".join(gone[:4]) + (f" and {len(gone) - 4} more" if len(gone) > 4 else "")
    return [f"of the teacher {left.params:,} of {whole.params:,} parameters are left, {left.macs:,} of {whole.macs:,} "
            f"MACs a sample: no tap needs {few}"]


def _take_over(captured: Captured, student: Captured, found: dict[fx.Node, fx.Node], inputs: dict[fx.Node, fx.Node],
               ) -> tuple[list[fx.Node], list[fx.Node]]:
    """Let the student's nodes stand in: each stage that is read from outside becomes an input, and so does each tap;
    every input's edge is detached."""
    graph = captured.graph
    extra: dict[str, Tensor] = {}
    sources = list(inputs.values())
    frontier = frontier_of(found)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for node in frontier:
        with graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes))):
            given = graph.placeholder(f"shared_{len(extra)}")
        last = [given]
        fact: NodeFact = node.meta["fxc"]
        extra[given.name] = torch.empty(fact.shape, dtype=fact.dtype, device="meta")
        given.meta["fxc"] = fact
        node.replace_all_uses_with(given)
        sources.append(found[node])
    drop_dead(graph)
    first = last[-1].next if last else next(iter(graph.nodes))
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        dtype = getattr(node.meta.get("fxc"), "dtype", None)
        if isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex):
            users = list(node.users)
            with graph.inserting_before(first):
                cut = call(graph, "detach", node)
            for user in users:
                user.replace_input_with(node, cut)
    example = captured.example
    captured.example = Example(example.args, {**example.kwargs, **extra})
    return sources, [found[node] for node in frontier]


def _pool_first(graph: fx.Graph) -> None:
    """Let rectifiers follow the pooling that they stand before: max(relu(x)) is relu(max(x)), of a quarter as many."""
    for pool in list(graph.nodes):
        relu = pool.all_input_nodes[0] if pool.all_input_nodes else None
        if relu is not None and kind_of(pool) in _POOLS and kind_of(relu) == "relu" and len(relu.users) == 1 and (
                pool.op == relu.op == "call_function" and not arguments(pool).get("return_indices")):
            pool.replace_input_with(relu, relu.all_input_nodes[0])
            pool.replace_all_uses_with(relu)
            relu.replace_input_with(relu.all_input_nodes[0], pool)
            pool.append(relu)


def _work_in_place(graph: fx.Graph) -> None:
    """Let activations overwrite what a layer has just made and nothing else reads: no gradient asks for it here."""
    for node in graph.nodes:
        source = node.all_input_nodes[0] if node.op == "call_function" and node.all_input_nodes else None
        if source is not None and len(source.users) == 1 and kind_of(source).startswith(_FRESH) and (
                kind_of(node) in _ACTIVATIONS):
            node.kwargs = {**node.kwargs, "inplace": True}


def _lay_out(captured: Captured) -> None:
    """Let a teacher that pools again and again compute with channels last on the CPU: torch's pooling of the plain
    layout isn't vectorised. Not where features are compared, for the student's lie otherwise."""
    pools = [node for node in captured.graph.nodes if kind_of(node) == "max_pool2d"]
    inputs = [node for node in captured.graph.nodes if kind_of(node) == "detach" and _dims(node) == 4]
    taps = next(iter(reversed(captured.graph.nodes))).args[0]
    example = captured.example
    if len(pools) < 2 or not captured.concrete or device_of(captured.module, example).type != "cpu" or any(
            _dims(tap) != 2 for tap in taps):
        return
    for number, node in enumerate(inputs):
        captured.module.add_module(f"_layout_{number}", ChannelsLast())
        users = list(node.users)
        with captured.graph.inserting_after(node):
            laid = captured.graph.call_module(f"_layout_{number}", (node,))
        for user in users:
            user.replace_input_with(node, laid)
    for node in captured.graph.nodes:
        if inputs and kind_of(node) == "conv2d" and node.op == "call_module":
            module_of(node).to(memory_format=torch.channels_last)


def _dims(node: fx.Node) -> int:
    return len(_shape(node) or ())


def _freeze(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Let nothing of the teacher be trained, saved or acting by its mode, in place."""
    loose = named_tensors(module).all
    for node in list(graph.nodes):
        if node.op == "get_attr":
            name = f"_held_{str(node.target).replace('.', '_')}"
            if name not in module._modules:
                module.add_module(name, Constant(loose[str(node.target)].detach()))
            with graph.inserting_before(node):
                held = graph.call_module(name)
            node.replace_all_uses_with(held)
            graph.erase_node(node)
        elif node.op == "call_module" and not kind_of(node).startswith(_MODELESS):
            owner, _, leaf = str(node.target).rpartition(".")
            inner = module_of(node)
            if not isinstance(inner, Frozen):
                setattr(module.get_submodule(owner), leaf, Frozen(inner))
    used = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for path, child in list(module.named_modules()):
        if path in used:
            freeze(child)


def hang(box: nn.Module, path: str, module: nn.Module) -> None:
    """Hang `module` into `box` at `path`, and nothing else that stood around it."""
    *owners, leaf = path.split(".")
    for name in owners:
        if name not in box._modules:
            box.add_module(name, nn.Module())
        box = box.get_submodule(name)
    box._modules[leaf] = module


def prepare_whole(teacher: Teacher, parts: Sequence[tuple[str, ...]], student: Captured) -> Prepared:
    """A teacher that couldn't be captured, as one module; each tap is a part of its result."""
    assert teacher.whole is not None
    graph = fx.Graph()
    mine = [node for node in student.graph.nodes if node.op == "placeholder" and not is_control(node)]
    given = [graph.placeholder(f"input_{place}") for place in range(len(mine))]
    count = len(student.example.args)
    kwargs: dict[str, Any] = dict(zip(student.example.kwargs, given[count:], strict=True))
    result = graph.call_module("whole", tuple(given[:count]), kwargs)
    taps = []
    for keys in parts:
        value: Any = result
        for key in keys:
            value = call(graph, "getitem", value, int(key) if key.isdecimal() else key)
        taps.append(value)
    graph.output(tuple(taps))
    root = nn.Module()
    root.add_module("whole", teacher.whole)
    return Prepared(root, graph, mine, [], [f"the teacher stays one module, for it can't be captured: {teacher.why}"])


def part_of(result: Any, end: str) -> tuple[tuple[str, ...], Tensor] | str:
    """The keys of the part of `result` that `end` (`output`, `output.logits`) names, and it; or why there is none."""
    keys: list[str] = []
    for key in end.split(".")[1:]:
        table = result if isinstance(result, dict) else dict(enumerate(result)) if isinstance(
            result, tuple | list) else {}
        known = {str(name): value for name, value in table.items()}
        if key not in known:
            return f"its result has no `{key}`"
        keys, result = [*keys, key], known[key]
    if isinstance(result, Tensor):
        return tuple(keys), result
    if isinstance(result, dict):
        for name in ("logits", "out"):
            if isinstance(result.get(name), Tensor):
                return (*keys, name), result[name]
    return f"it gives {shapes(result)}: name a part, such as `output.0`"
