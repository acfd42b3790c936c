"""From a tree to a checked policy: every error of the text in one run, nothing bound to a model yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..diagnostics import Diagnostic, Fix, Label, PolicyError, Sink, nearest
from ..source import Source, Span
from . import ast, model, selector
from .actions import Context, check_action, find_verb, kinds_of, unsolvable
from .conditions import read_budget, read_expect
from .convert import PARAMETER_TYPES, Given, coerce, read_value
from .kinds import INPUT_DTYPES, KINDS, PRECISIONS, TARGETS
from .library import Library, Preset, identity
from .parsing import parse_file
from .phases import in_order, read_window
from .places import check_places
from .selectors import Scope, read_selector
from .settings import read_settings
from .timing import START, timing_problems
from .types import Choice
from .values import Unset
from .words import RESERVED, quoted

MAX_LETS_DEEP = 64


@dataclass(frozen=True)
class Checked:
    """What `check_source` found: a policy if the text has a whole one, and every diagnostic."""

    policy: model.Policy | None
    diagnostics: tuple[Diagnostic, ...]
    file: ast.File

    @property
    def is_good(self) -> bool:
        """Whether there is no error; there may be warnings."""
        return all(item.severity != "error" for item in self.diagnostics)


def check_source(source: Source, params: Mapping[str, object] | None = None) -> Checked:
    """Parse and check a text. `params` are values for the policy's parameters: Python values, or texts in the policy's
    syntax. Parameters without value or default are checked by their type, and are `Unset` in the result."""
    parsed = parse_file(source)
    sink = Sink(list(parsed.diagnostics))
    check_places(parsed.file.items, "file", sink)
    checker = _Checker(source, sink, dict(params or {}), parsed.broken_words)
    policy = checker.file(parsed.file)
    return Checked(policy, _sorted(sink.items, source), parsed.file)


def _sorted(items: Iterable[Diagnostic], source: Source) -> tuple[Diagnostic, ...]:
    """In the order of the text, those of other files and of no place last."""
    def key(item: Diagnostic) -> tuple[bool, int]:
        here = item.primary is not None and item.primary.span.source is source
        return not here, item.primary.span.start if item.primary is not None else 0

    return tuple(sorted(items, key=key))


@dataclass
class _Checker:
    """One run over one file."""

    source: Source
    sink: Sink
    params: dict[str, object]
    broken: frozenset[str]
    declared: dict[str, tuple[str, Span]] = field(default_factory=dict)  # every name, what it is and where
    presets: dict[str, Preset] = field(default_factory=dict)
    scope: Scope = field(init=False)

    def __post_init__(self) -> None:
        self.scope = Scope(self.sink, broken=self.broken)

    # Files

    def file(self, file: ast.File) -> model.Policy | None:
        library = Library(self.sink, {identity(self.source): None})
        for item in file.items:
            if isinstance(item, ast.Use):
                for used in library.use(item, self.source):
                    self._preset(used)
            elif isinstance(item, ast.PresetDecl):
                self._preset(item)
        policies = [item for item in file.items if isinstance(item, ast.PolicyDecl)]
        for extra in policies[1:]:
            self.sink.error("FXC0140", "a file holds one policy", extra.name.span, "a second one",
                            secondary=(Label(policies[0].name.span, "the first"),),
                            help="move it into a file of its own")
        lets = [item for item in file.items if isinstance(item, ast.Let)]
        if policies:
            return self._policy(policies[0], lets)
        for item in file.items:
            if isinstance(item, ast.Broken) and item.body is not None:
                self._body("", item.body, lets)
                return None
        self._lets(lets)
        return None

    def _preset(self, preset: ast.PresetDecl) -> None:
        self._declare(preset.name, "preset")
        cls = find_verb(preset.verb, self.scope)
        if cls is not None:
            found = read_settings(preset.body.items, cls.parameters(), f"verb `{preset.verb.text}`", self.scope)
            self.presets[preset.name.text] = Preset(preset.name.text, preset.verb.text, found.values, found.spans,
                                                    preset.name.span)
        elif preset.name.text not in self.presets:
            self.scope.broken |= {preset.name.text}

    def _declare(self, name: ast.Name, what: str) -> bool:
        """Take a name; one that is taken, reserved or an operator kind is reported."""
        other = self.declared.get(name.text)
        if name.text in RESERVED:
            self.sink.error("FXC0142", f"`{name.text}` is a word of the language", name.span, f"can't name a {what}",
                            help=f"choose another name, such as `my_{name.text}`")
        elif what == "let" and name.text in KINDS:
            self.sink.error("FXC0108", f"`{name.text}` is an operator kind", name.span, "would hide it",
                            help=f"choose another name, such as `my_{name.text}`")
        elif other is not None:
            self.sink.error("FXC0108", f"`{name.text}` is defined twice", name.span, f"a {what} of the same name",
                            secondary=(Label(other[1], f"first defined here, as a {other[0]}"),),
                            help="choose another name")
        else:
            self.declared[name.text] = (what, name.span)
            return True
        return False

    # Policies

    def _policy(self, policy: ast.PolicyDecl, lets: list[ast.Let]) -> model.Policy | None:
        self.scope.given = self._parameters(policy)
        found = self._body(policy.name.text, policy.body, lets)
        self._unused()
        if any(item.severity == "error" for item in self.sink.items):
            return None
        params = {name: item.value for name, item in self.scope.given.items()}
        return replace(found, params=params, warnings=tuple(self.sink.items))

    def _parameters(self, policy: ast.PolicyDecl) -> dict[str, Given]:
        found: dict[str, Given] = {}
        for parameter in policy.parameters:
            name = parameter.name.text
            fine = self._declare(parameter.name, "parameter")
            if parameter.type.text not in PARAMETER_TYPES:
                known = nearest(parameter.type.text, PARAMETER_TYPES, 1)
                self.sink.error("FXC0132", f"unknown type `{parameter.type.text}`", parameter.type.span, "not a type",
                                notes=(f"types: {', '.join(PARAMETER_TYPES)}",),
                                help=f"did you mean `{known[0]}`?" if known else "write one of the types",
                                fixes=(Fix(parameter.type.span, known[0]),) if known else ())
                self.scope.broken |= {name}
            elif fine:
                found[name] = Given(parameter, parameter.type.text, self._value(parameter))
        for name in self.params:
            if name not in found and name not in self.scope.broken:
                known = nearest(name, found, 1)
                self.sink.error("FXC0133", f"policy `{policy.name.text}` has no parameter `{name}`", policy.name.span,
                                notes=(f"parameters: {', '.join(found)}",) if found else ("it has none",),
                                help=f"did you mean `{known[0]}`?" if known else "leave it out, or declare it")
        return found

    def _value(self, parameter: ast.Parameter) -> object:
        """The value given, else the default, else `Unset`."""
        name, type_ = parameter.name.text, PARAMETER_TYPES[parameter.type.text]
        default: object = None
        if parameter.default is not None and type_ is None:
            self.sink.error("FXC0105", f"`{name}`: a model has no default", parameter.default.span, "not a model",
                            help=f"leave it out, and give the model: `params={{\"{name}\": model}}`")
        elif parameter.default is not None and type_ is not None:
            default = read_value(type_, parameter.default, {}, self.sink, name)
        if name not in self.params:
            return Unset((name,)) if default is None else default
        given = self.params[name]
        if type_ is None or isinstance(given, Unset):
            return given
        try:
            return coerce(type_, given, name)
        except PolicyError as error:
            self.sink.items.extend(
                Diagnostic(item.code, f"the value given for {item.message}", Label(parameter.span, "declared here"),
                           notes=item.notes, help=item.help) for item in error.diagnostics)
        return Unset((name,))

    def _body(self, name: str, body: ast.Block, lets: list[ast.Let]) -> model.Policy:
        """The policy that the statements of a block make, as far as they are right."""
        items = list(_flattened(body.items))
        bound = self._lets([*lets, *(item for item in items if isinstance(item, ast.Let))])
        kinds: dict[str, frozenset[str] | None] = {}
        for let, selected in bound.items():
            kinds[let] = kinds_of(selected, kinds)
        context = Context(self.scope, self.presets, kinds)
        budgets = [read_budget(item, self.scope) for item in items if isinstance(item, ast.Budget)]
        expects = [read_expect(item, self.scope) for item in items if isinstance(item, ast.Expect)]
        phases = self._phases(items, context)
        if not any(isinstance(item, ast.Budget) for item in items):
            self.sink.items.extend(unsolvable(phases))
        return model.Policy(name, self.source, self._target(items), self._precision(items), self._inputs(items), bound,
                            phases, tuple(filter(None, budgets)), tuple(filter(None, expects)))

    def _target(self, items: list[ast.Statement]) -> str:
        targets = [item for item in items if isinstance(item, ast.Target)]
        for again in targets[1:]:
            self.sink.error("FXC0104", "`target` stands twice", again.span, "again",
                            secondary=(Label(targets[0].span, "first here"),), help="keep one of the two")
        for item in targets:
            if item.name.text not in TARGETS:
                known = nearest(item.name.text, TARGETS, 1)
                self.sink.error("FXC0127", f"unknown target `{item.name.text}`", item.name.span,
                                f"expected {quoted(TARGETS)}",
                                help=f"did you mean `{known[0]}`?" if known else f"write {quoted(TARGETS)}",
                                fixes=(Fix(item.name.span, known[0]),) if known else ())
        return targets[0].name.text if targets else "cpu"

    def _precision(self, items: list[ast.Statement]) -> str | None:
        settings = [item for item in items if isinstance(item, ast.Setting) and item.key.text == "precision"]
        for again in settings[1:]:
            self.sink.error("FXC0104", "`precision` is set twice", again.key.span, "set again",
                            secondary=(Label(settings[0].span, "first set here"),), help="keep one of the two")
        values = [read_value(Choice(PRECISIONS), item.value, self.scope.given, self.sink, "precision")
                  for item in settings]
        self.scope.used |= {item.value.text for item in settings if isinstance(item.value, ast.Name)}
        return values[0] if values and isinstance(values[0], str) else None

    def _inputs(self, items: list[ast.Statement]) -> tuple[model.InputSpec, ...]:
        found: dict[str, model.InputSpec] = {}
        for item in items:
            if not isinstance(item, ast.Input):
                continue
            if item.name.text in found:
                self.sink.error("FXC0104", f"the input `{item.name.text}` is declared twice", item.name.span, "again",
                                secondary=(Label(found[item.name.text].span, "first here"),),
                                help="keep one of the two")
            if item.dtype.text not in INPUT_DTYPES:
                known = nearest(item.dtype.text, INPUT_DTYPES, 1)
                self.sink.error("FXC0128", f"unknown element type `{item.dtype.text}`", item.dtype.span, "not a type",
                                notes=(f"types: {', '.join(INPUT_DTYPES)}",),
                                help=f"did you mean `{known[0]}`?" if known else "write one of the types",
                                fixes=(Fix(item.dtype.span, known[0]),) if known else ())
            dims = [dim.text if isinstance(dim, ast.Name) else dim.value for dim in item.dims]
            for dim, node in zip(dims, item.dims, strict=True):
                if not isinstance(dim, str) and (isinstance(dim, float) or dim < 1):
                    self.sink.error("FXC0128", "a dimension is a whole number above 0, or a name", node.span,
                                    "not a size",
                                    help="a name such as `N` stands for a size that may change")
            shape = tuple(dim if isinstance(dim, str) else int(dim) for dim in dims)
            found[item.name.text] = model.InputSpec(item.name.text, item.dtype.text, shape, item.span)
        return tuple(found.values())

    # Lets

    def _lets(self, lets: list[ast.Let]) -> dict[str, selector.Selector]:
        """The checked `let`s, each after those it refers to."""
        fine = {item.name.text: item for item in lets if self._declare(item.name, "let")}
        self.scope.lets = fine
        read: dict[str, selector.Selector | None] = {}
        refers: dict[str, tuple[str, ...]] = {}
        for name, item in fine.items():
            used, self.scope.used = self.scope.used, set()
            read[name] = read_selector(item.value, self.scope)
            refers[name] = tuple(sorted(self.scope.used & fine.keys()))
            self.scope.used |= used
        ordered = self._ordered(fine, refers)
        return {name: found for name in ordered if (found := read[name]) is not None}

    def _ordered(self, lets: Mapping[str, ast.Let], refers: Mapping[str, tuple[str, ...]]) -> list[str]:
        """The names, each after those it refers to; those in cycles, or too deep, are reported and left out."""
        depth: dict[str, int] = {}
        waiting = dict(refers)
        while waiting:
            ready = [name for name, others in waiting.items() if all(other in depth for other in others)]
            if not ready:
                self._let_cycle(lets, waiting)
                break
            for name in ready:
                depth[name] = 1 + max((depth[other] for other in waiting.pop(name)), default=0)
            if depth[ready[0]] > MAX_LETS_DEEP:
                self.sink.error("FXC0008", f"`let`s refer to each other more than {MAX_LETS_DEEP} deep",
                                lets[ready[0]].span,
                                "one too many", help="write some of them out")
                break
        return list(depth)

    def _let_cycle(self, lets: Mapping[str, ast.Let], waiting: Mapping[str, tuple[str, ...]]) -> None:
        name = next(iter(waiting))
        path: list[str] = []
        while name not in path:
            path.append(name)
            name = next(other for other in waiting[name] if other in waiting)
        path = path[path.index(name):]
        chain = " -> ".join(f"`{item}`" for item in [*path, path[0]])
        self.sink.error("FXC0109", f"`let`s that define each other: {chain}", lets[path[0]].name.span,
                        "has no beginning",
                        secondary=tuple(Label(lets[item].name.span) for item in path[1:]), help="write one of them out")

    def _unused(self) -> None:
        """Warn of names that nothing uses, once there are no errors: those may be why nothing does."""
        if any(item.severity == "error" for item in self.sink.items):
            return
        for name, (what, span) in self.declared.items():
            if what in ("let", "parameter") and name not in self.scope.used and span.source is self.source:
                self.sink.error("FXC0110", f"unused {what} `{name}`", span, "nothing refers to it", severity="warning",
                                help="take it out, or use it")

    # Phases

    def _phases(self, items: list[ast.Statement], context: Context) -> tuple[model.Phase, ...]:
        phases: dict[str, ast.Phase] = {}
        for item in items:
            if isinstance(item, ast.Phase):
                other = phases.get(item.name.text)
                if other is not None:
                    self.sink.error("FXC0108", f"phase `{item.name.text}` is defined twice", item.name.span, "again",
                                    secondary=(Label(other.name.span, "first here"),), help="choose another name")
                elif item.name.text in RESERVED:
                    self._declare(item.name, "phase")
                phases.setdefault(item.name.text, item)
        windows = {name: read_window(phase, self.sink) for name, phase in phases.items()}
        actions = {name: self._actions(phase.body.items, context) for name, phase in phases.items()}
        ordered = in_order(list(phases.values()), windows, self.broken, self.sink)
        found = [model.Phase(phase.name.text, windows[phase.name.text],
                             tuple(name.text for clause in phase.clauses if isinstance(clause, ast.After)
                                   for name in clause.names), actions[phase.name.text], phase.name.span)
                 for phase in ordered]
        at_once = self._actions(items, context)
        if at_once:
            found.insert(0, model.Phase(START, None, (), at_once, at_once[0].span))
        if not any(item.severity == "error" for item in self.sink.items):
            self.sink.items.extend(timing_problems(found))
        return tuple(found)

    def _actions(self, items: Iterable[ast.Statement], context: Context) -> tuple[model.Action, ...]:
        checked = [check_action(item, context) for item in items if isinstance(item, ast.Action)]
        return tuple(action for action in checked if action is not None)


def _flattened(items: Iterable[ast.Statement]) -> Iterator[ast.Statement]:
    """The statements, with those in blocks whose head could not be read."""
    for item in items:
        if isinstance(item, ast.Broken) and item.body is not None:
            yield from _flattened(item.body.items)
        else:
            yield item
