"""The rewrite of `distill`: teacher, adapters and weighted terms become one module behind the student's result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxcompress.diagnostics import Diagnostic, Label, PlanError
from fxcompress.graph.captured import Captured
from fxcompress.graph.distilled import CONTROLS, FLOAT, LOGITS, append, is_control, mark, stage_of
from fxcompress.graph.distilled import detach as detach_node
from fxcompress.graph.ops import call as canonical
from fxcompress.graph.ops import path_of
from fxcompress.graph.propagate import device_of
from fxcompress.graph.provenance import touch
from fxcompress.graph.site import Change, Outcome, Scheduled, Site
from fxcompress.graph.tree import graph_module
from fxcompress.nn.adapters import Adapter
from fxcompress.nn.distillation import Cache, Distillation, Weight
from fxcompress.nn.temperature import AdaptiveTemperature, LearnedTemperature, Temperature
from fxcompress.passes.shared.distill_adapting import show
from fxcompress.passes.shared.distill_caching import cache_of, teacher_apart
from fxcompress.passes.shared.distill_teacher import Prepared, hang, prepare, prepare_whole
from fxcompress.passes.shared.distill_terms import Term, terms_of
from fxcompress.policy.values import Call, Ramp

if TYPE_CHECKING:
    from fxcompress.passes.distill import Distill

IGNORED = "_ddp_params_and_buffers_to_ignore"  # what DistributedDataParallel need not send about: it never changes


def distill(settings: Distill, captured: Captured, site: Site) -> Outcome:
    """Join the terms of `settings` to `captured`, in place. Raises PlanError as `Distill.rewrite` says."""
    _check_inputs(captured, site)
    terms = terms_of(settings, captured, site)
    cache = cache_of(settings, terms, captured, site)
    prepared = _prepared(settings, terms, captured, site, share=settings.share and cache is None)
    builder = _Builder(captured, prepared, site.seed, cache)
    distillation = builder.build(terms)
    name = next(name for name in (f"distill{(n and f'_{n}') or ''}" for n in range(1000))
                if name not in captured.module._modules)
    node = append(captured.module, name, distillation, tuple(builder.sources))
    touch(node, settings, site, f"terms {', '.join(term.name for term in terms)}")
    _ignore_in_ddp(captured.module)
    captured.refresh()
    changes = tuple(Change(path_of(term.student) or term.student.name, term.student.meta["fxc"].kind, "loss", "none",
                           term.name, "selected") for term in terms)
    kept = [] if cache is None else [f"what the teacher gives is kept by sample ({cache.place}"
                                     + (f", the {cache.top_k} greatest of each)" if cache.top_k else ")")]
    return Outcome(changes, (*map(_note, terms), *kept, *prepared.notes), scheduled=tuple(builder.scheduled))


def remove_distillation(captured: Captured, call: fx.Node) -> list[fx.Node]:
    """Take a distillation out, in place; the student is what it was. The caller refreshes. Returns no nodes: none
    computes anything else than before."""
    detach_node(captured.module, call)
    _ignore_in_ddp(captured.module)
    return []


def _check_inputs(captured: Captured, site: Site) -> None:
    for node in captured.graph.nodes:
        if node.op == "placeholder" and node.target in CONTROLS and not is_control(node):
            raise PlanError([Diagnostic(
                "FXC0355", f"the model has an input `{node.target}`, which a distillation wants for itself",
                Label(site.span) if site.span is not None else None,
                help="rename that input of the model's `forward`, or leave it out of the example inputs")])


def _prepared(settings: Distill, terms: Sequence[Term], captured: Captured, site: Site, share: bool) -> Prepared:
    """The teacher's part, giving a tuple of one value for each term that reads it."""
    ends = [term.teacher for term in terms if term.teacher is not None]
    if not ends or site.teacher is None:
        return Prepared(nn.Module(), fx.Graph(), [], [], [])
    if site.teacher.captured is None:
        return prepare_whole(site.teacher, [end for end in ends if isinstance(end, tuple)], captured)
    return prepare(site.teacher, [end for end in ends if isinstance(end, str)], captured, share)


def _note(term: Term) -> str:
    """A term, as the plan shows it."""
    parts = [f"`{term.name}`: {term.pair.values['loss']} of `{term.pair.student}` {show(term.student_shape)}"]
    other = f"the teacher's `{term.pair.teacher}` {show(term.teacher_shape)}"
    parts[0] += f" and {other if term.teacher is not None else 'the labels'}"
    parts.append(f"weight {_shown(term.value('weight'))}")
    if term.loss.soft:
        temperature = term.value("temperature")
        parts.append(f"T {_shown(term.loss.default_temperature if temperature is None else temperature)}")
    if not term.adapter.empty:
        parts.append(f"adapter {term.adapter}"
                     + (f" ({term.adapter.parameters:,} parameters)" if term.adapter.parameters else ""))
    return ", ".join(parts)


def _shown(value: object) -> str:
    if isinstance(value, Ramp):
        rate = f", by {value.rate:g} per {value.per[:-1]}" if hasattr(value, "rate") and hasattr(value, "per") else ""
        return f"{value.shape}({value.start:g} -> {value.end:g}{rate})"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass
class _Builder:
    """Makes the graph of a `Distillation`. `sources` are the student's nodes that feed it."""

    captured: Captured
    prepared: Prepared
    seed: int
    cache: Cache | None = None
    sources: list[fx.Node] = field(default_factory=list)
    scheduled: list[Scheduled] = field(default_factory=list)
    graph: fx.Graph = field(default_factory=fx.Graph)
    tree: nn.Module = field(default_factory=nn.Module)

    def build(self, terms: Sequence[Term]) -> Distillation:
        """The module of all terms."""
        needs = any(term.loss.labels for term in terms)
        targets = self.graph.placeholder("targets") if needs else None
        students = [term.student for term in terms]
        taps: Iterator[fx.Node]
        if self.cache is None:
            given = {node: self._input(node) for node in dict.fromkeys([*self.prepared.sources, *students])}
            taps = iter(self._teacher(given))
        else:  # its inputs go past the graph
            self.sources.extend(self.prepared.sources)
            taps = itertools.repeat(self.graph.placeholder(LOGITS))
            given = {node: self._input(node) for node in dict.fromkeys(students)}
        weighted, found = [], []
        for term in terms:
            value = next(taps) if term.teacher is not None else None
            one = self._term(term, given[term.student], value, targets)
            found.append(one)
            weighted.append(self._call("weights", term.name, self._weight(term), one))
        total = weighted[0]
        for other in weighted[1:]:
            total = canonical(self.graph, "add", total, other)
        if len(weighted) > 1:
            total._rename("total")
        self.graph.output((total, *found))
        self.graph.lint()
        fused = graph_module(self.tree, self.graph, "Fused")
        fused.recompile()
        stages = {node.name: mark(self.captured, node) for source in self.prepared.shared for node in stage_of(source)}
        apart = teacher_apart(self.prepared) if self.cache is not None else None
        distillation = Distillation(fused, tuple(term.name for term in terms), needs, stages, self.cache, apart,
                                    len(self.prepared.sources) if self.cache is not None else 0)
        return distillation.train(self.captured.module.training)

    def _input(self, node: fx.Node) -> fx.Node:
        self.sources.append(node)
        made = self.graph.placeholder(f"student_{node.name}")
        dtype = node.meta["fxc"].dtype
        made.meta[FLOAT] = isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
        return made

    def _child(self, name: str) -> nn.Module:
        if name not in self.tree._modules:
            self.tree.add_module(name, nn.Module())
        return self.tree.get_submodule(name)

    def _call(self, group: str, name: str, module: nn.Module, *args: Any) -> fx.Node:
        self._child(group).add_module(name, module)
        return self.graph.call_module(f"{group}.{name}", args)

    def _teacher(self, given: dict[fx.Node, fx.Node]) -> tuple[fx.Node, ...]:
        """The teacher's nodes, copied in under `teacher.`; gives its taps."""
        box, sources = self._child("teacher"), iter(self.prepared.sources)
        nodes: dict[fx.Node, fx.Node] = {}
        for node in self.prepared.graph.nodes:
            if node.op == "placeholder":
                nodes[node] = given[next(sources)]
            elif node.op == "output":
                return tuple(nodes[tap] for tap in node.args[0])
            else:
                made = nodes[node] = self.graph.node_copy(node, lambda old: nodes[old])
                if node.op == "call_module":
                    made.target = f"teacher.{node.target}"
                    hang(box, str(node.target), self.prepared.module.get_submodule(str(node.target)))
        return ()

    def _term(self, term: Term, student: fx.Node, teacher: fx.Node | None, targets: fx.Node | None) -> fx.Node:
        """The node of a term, not weighted."""
        if not term.adapter.empty:
            student = self._call("adapters", term.name, self._adapter(term), student)
        temperature = None
        if term.loss.soft:
            temperature = self._call("temperatures", term.name, self._temperature(term), student, teacher)
        settings = {key: term.value(key) for key in ("alpha", "beta")}
        if term.loss.smooths:
            settings["label_smoothing"] = term.value("label_smoothing")
        labels = targets if term.loss.labels else None
        made = self._call("losses", term.name, term.loss(**settings), student, teacher, temperature, labels)
        made._rename(term.name)
        return made

    @property
    def _device(self) -> torch.device:
        captured = self.captured
        return device_of(captured.module, captured.example) if captured.concrete else torch.device("meta")

    def _adapter(self, term: Term) -> Adapter:
        """Its weights are drawn by the run's seed, whatever was drawn before."""
        plan = term.adapter
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = Adapter(plan.rank, plan.channels, plan.pool, plan.interpolate, dtype=term.student.meta["fxc"].dtype)
        return made.to(self._device)

    def _weight(self, term: Term) -> Weight:
        value = term.value("weight")
        made = Weight(value.start if isinstance(value, Ramp) else value, self._device)
        self._schedule(term, "weight", value, made)
        return made

    def _temperature(self, term: Term) -> Temperature:
        value = term.value("temperature")
        if isinstance(value, Call):
            return AdaptiveTemperature(1.0, self._device)
        if value == "learned":
            return LearnedTemperature(device=self._device)
        value = term.loss.default_temperature if value is None else value
        made = Temperature(value.start if isinstance(value, Ramp) else value, self._device)
        self._schedule(term, "temperature", value, made)
        return made

    def _schedule(self, term: Term, what: str, value: object, module: Weight | Temperature) -> None:
        if isinstance(value, Ramp):
            self.scheduled.append(Scheduled(f"{what} of `{term.name}`", value, module.put, percent=False))


def _ignore_in_ddp(module: fx.GraphModule) -> None:
    """Tell DistributedDataParallel of the teachers' tensors, which are the same everywhere."""
    homes = [f"{name}.{home}" for name, child in module.named_modules() if isinstance(child, Distillation)
             for home in ("teacher.", "fused.teacher.")]
    names = [name for name, _ in module.named_buffers() if name.startswith(tuple(homes))]
    if names:
        module.__dict__[IGNORED] = names
    else:
        module.__dict__.pop(IGNORED, None)
