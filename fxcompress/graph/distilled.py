"""Where a graph meets its teacher: the call of a `Distillation`, and the inputs that only it reads.

    def forward(self, x, targets=None, losses=False):
        ...                                   # the student, as it was
        return self.distill(fc, targets, losses, x, layer3)

The call gives back its first argument unless losses are asked for. To everything that walks the graph it is one
operator that gives back what it is given, and whose other arguments it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import fx

from ..diagnostics import Diagnostic, Label, PlanError
from ..nn.distillation import Distillation
from ..nn.frozen import Frozen, FrozenTeacher
from .ops import kind_of, module_of, path_of
from .tree import named_tensors

if TYPE_CHECKING:
    from .captured import Captured
    from .site import Site

TARGETS, LOSSES, TEACHER = "targets", "losses", "teacher."
FLOAT = "float"  # in `meta` of an input of a `Distillation`: whether a gradient could flow through it
LOGITS = "teacher_logits"
CONTROLS = {TARGETS: None, LOSSES: False, LOGITS: None}  # the inputs of distillations alone, and their defaults


def is_distillation(node: fx.Node) -> bool:
    """Whether `node` calls a `Distillation`."""
    return node.op == "call_module" and node.graph.owning_module is not None and isinstance(
        module_of(node), Distillation)


def is_control(node: fx.Node) -> bool:
    """Whether `node` is an input that only distillations read."""
    return (node.op == "placeholder" and node.target in CONTROLS and bool(node.args) and bool(node.users)
            and all(map(is_distillation, node.users)))


def distillations(graph: fx.Graph) -> list[fx.Node]:
    """Every call of a `Distillation`, in graph order."""
    return [node for node in graph.nodes if is_distillation(node)]


def result_of(graph: fx.Graph) -> Any:
    """What the student gives: a node, or nested containers of nodes, before any distillation."""
    value: Any = next(iter(reversed(graph.nodes))).args[0]
    while isinstance(value, fx.Node) and is_distillation(value):
        value = value.args[0]
    return value


def append(module: fx.GraphModule, name: str, distillation: Distillation, values: tuple[fx.Node, ...]) -> fx.Node:
    """Let what `module` gives pass through `distillation`, which reads `values`; gives its call."""
    graph = module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    end = next(iter(reversed(graph.nodes)))
    wanted = [key for key in CONTROLS if key != LOGITS or distillation.cache is not None]
    controls = {str(node.target): node for node in inputs if is_control(node)}
    before = inputs[-1].next if inputs else next(iter(graph.nodes))
    with graph.inserting_before(before):
        for key in wanted:
            if key not in controls:
                controls[key] = graph.placeholder(key, default_value=CONTROLS[key])
    module.add_module(name, distillation)
    with graph.inserting_before(end):
        call = graph.call_module(name, (end.args[0], *(controls[key] for key in wanted), *values))
    end.args = (call,)
    return call


def detach(module: fx.GraphModule, call: fx.Node) -> None:
    """Undo `append`, in place."""
    graph, given = module.graph, call.args[0]
    controls = [node for node in graph.nodes if is_control(node)]
    for user in list(call.users):
        user.args, user.kwargs = fx.node.map_arg(
            (user.args, user.kwargs), lambda node: given if node is call else node)
    graph.erase_node(call)
    module.delete_submodule(path_of(call))
    for node in controls:
        if not node.users:
            graph.erase_node(node)


def exposed(module: Distillation) -> Iterator[str]:
    """Why the teacher of `module` could be trained, saved or reached by a gradient; nothing where it is apart."""
    yield from _exposed(module.fused, TEACHER)
    if isinstance(module.teacher, fx.GraphModule):
        yield from _exposed(module.teacher, "")


def _exposed(part: fx.GraphModule, prefix: str) -> Iterator[str]:
    """The same of a graph whose modules are the teacher's where their paths begin with `prefix`."""
    graph, saved = part.graph, part.state_dict()
    yield from (f"the teacher's `{name}` is a parameter" for name, _ in part.named_parameters()
                if name.startswith(prefix))
    yield from (f"the teacher's `{name}` would be saved" for name in saved if name.startswith(prefix))
    called = {node: part.get_submodule(str(node.target)) for node in graph.nodes
              if node.op == "call_module" and str(node.target).startswith(prefix)}
    yield from (f"the teacher's `{node.target}` is in training mode" for node, inner in called.items()
                if isinstance(inner, Frozen) and any(each.training for each in inner.modules()))
    met: set[fx.Node] = set()
    rest = [node for node, inner in called.items() if not isinstance(inner, FrozenTeacher)]
    while rest:
        node = rest.pop()
        if node.op == "placeholder" and node.meta.get(FLOAT, True):
            yield f"`{node.name}` goes into the teacher without a detach"
        if node not in met and kind_of(node) != "detach":
            rest.extend(source for source in node.all_input_nodes if source not in met)
        met.add(node)


def stage_of(node: fx.Node) -> list[fx.Node]:
    """`node` and everything that it is computed from, save for inputs."""
    met: dict[fx.Node, None] = {}
    rest = [node]
    while rest:
        at = rest.pop()
        if at not in met and at.op != "placeholder":
            met[at] = None
            rest.extend(at.all_input_nodes)
    return list(met)


def mark(student: Captured, node: fx.Node) -> str:
    """What `node` computes with, as a text that changes when a rewrite changes it. Sums stand for values, which are
    unknown in a plan."""
    held = node.op in ("get_attr", "call_module")
    tensors = [tensor for name, tensor in named_tensors(student.module).all.items()
               if held and (name == str(node.target) or name.startswith(f"{node.target}."))]
    sums = [f"{float(tensor.detach().double().sum()):.17g} {float(tensor.detach().double().abs().sum()):.17g}"
            for tensor in tensors if student.concrete]
    return f"{node.op} {node.target} {node.args} {dict(node.kwargs)} {sums}"


def require_stages(captured: Captured, verb: str, site: Site) -> None:
    """Raise PlanError (FXC0356) where `verb` has changed at `site` what a teacher reads in the place of its own."""
    nodes = {node.name: node for node in captured.graph.nodes}
    for call in distillations(captured.graph):
        module = module_of(call)
        assert isinstance(module, Distillation)
        for name, was in module.shared.items():
            if name not in nodes or mark(captured, nodes[name]) != was:
                raise PlanError([Diagnostic(
                    "FXC0356", f"`{verb}` changes `{path_of(nodes[name]) if name in nodes else name}`, which the "
                    "teacher shares while it teaches", Label(site.span) if site.span is not None else None,
                    notes=("both models have the same frozen tensors there, and compute them once",),
                    help="leave that layer out of the selection, put the action into a phase that ends before the "
                         "teaching begins, or say `share = false` in `distill`")])
