"""The check of one action: its verb, what it works on, its clauses, its settings and its pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..diagnostics import Diagnostic, Fix, FxcError, Label, nearest
from ..source import Span
from . import ast, model, schema, selector
from .library import Preset
from .selectors import Scope, read_selector
from .settings import Values, missing, read_settings
from .values import Unset
from .words import ORIGINAL, OUTPUT, TARGETS, quoted

if TYPE_CHECKING:
    from ..passbase import Pass


@dataclass(frozen=True)
class Context:
    """What an action may refer to besides the names of its scope."""

    scope: Scope
    presets: Mapping[str, Preset]
    kinds: Mapping[str, frozenset[str] | None]  # what kinds each `let` can select, see `kinds_of`


def check_action(action: ast.Action, context: Context) -> model.Action | None:
    """The checked action, or None after errors, which go to the sink of the scope."""
    scope = context.scope
    before = len(scope.sink.items)
    cls = find_verb(action.verb, scope)
    modifiers = _modifiers(action, scope)
    items = action.body.items if action.body is not None else ()
    if cls is None:
        if action.operand is not None and not isinstance(action.operand, ast.Call):
            read_selector(action.operand, scope)
        return None
    what, selected = _operand(action, cls, context)
    preset, teacher = _clauses(action, cls, context)
    owner = f"verb `{action.verb.text}`"
    found = read_settings(items, cls.parameters(), owner, scope)
    values = {**(preset.values if preset is not None else {}), **found.values}
    absent = missing(values, found, cls.parameters(), owner, action.head, scope)
    pairs = _pairs(items, cls, scope)
    if len(scope.sink.items) == before and not absent and found.whole:
        _own_check(cls, values, found, action.head, scope)
    if any(item.severity == "error" for item in scope.sink.items[before:]):
        return None
    return model.Action(
        action.verb.text, selected, values, action.head, what, preset.name if preset is not None else None, teacher,
        pairs,
        "override" in modifiers, "optional" in modifiers,
        {**(preset.spans if preset is not None else {}), **found.spans},
    )


def unsolvable(phases: Iterable[model.Phase]) -> Iterator[Diagnostic]:
    """The actions of a policy without budgets that leave it to the planner how much they do."""
    for action in (action for phase in phases for action in phase.actions):
        cls = schema.verb(action.verb)
        if cls is not None and cls.lever and cls.lever not in action.values:
            example = next(parameter.type.example for parameter in cls.parameters() if parameter.name == cls.lever)
            yield Diagnostic(
                "FXC0146", f"`{action.verb}` has neither a `{cls.lever}` nor a budget to find it from",
                Label(action.span, "how much?"),
                help=f"add `{cls.lever} = {example}` to its block, or a budget to the policy: "
                     "`budget macs <= 50% of dense`")


def find_verb(verb: ast.Name, scope: Scope) -> type[Pass] | None:
    """The verb's class; one that is unknown, or that its package can't load, is reported."""
    try:
        cls = schema.verb(verb.text)
    except FxcError as error:
        scope.sink.items.extend(replace(item, primary=Label(verb.span)) for item in error.diagnostics)
        return None
    if cls is None and verb.text not in scope.broken:
        known = schema.verb_names()
        near = nearest(verb.text, known, 1)
        scope.sink.error("FXC0101", f"unknown verb `{verb.text}`", verb.span, "no pass has this name",
                         notes=(f"verbs: {', '.join(known)}",),
                         help=f"did you mean `{near[0]}`?" if near else
                         "write one of the verbs; a package adds its own by the entry point `fxcompress.verbs`",
                         fixes=(Fix(verb.span, near[0]),) if near else ())
    return cls


def _modifiers(action: ast.Action, scope: Scope) -> set[str]:
    seen: dict[str, ast.Name] = {}
    for modifier in action.modifiers:
        if modifier.text in seen:
            scope.sink.error("FXC0104", f"`{modifier.text}` stands twice", modifier.span, "again",
                             secondary=(Label(seen[modifier.text].span, "first here"),), help="take one out")
        seen[modifier.text] = modifier
    return set(seen)


def _operand(action: ast.Action, cls: type[Pass], context: Context) -> tuple[str | None, selector.Selector | None]:
    """What of the layers is meant (`channels`), and the selector."""
    scope, operand = context.scope, action.operand
    if operand is None:
        if not cls.takes_teacher:
            example = f"{next(iter(cls.whats))}(conv2d)" if cls.whats else "conv2d"
            scope.sink.error("FXC0144", f"`{action.verb.text}` does not say what it works on", action.verb.span,
                             "a selector is missing", help=f"write a selector: `{action.verb.text} {example}`")
        return None, None
    what = None
    if cls.whats:
        if not isinstance(operand, ast.Call) or operand.name.text not in cls.whats:
            return _no_what(action, operand, cls, scope)
        if len(operand.args) != 1 or isinstance(operand.args[0], ast.Keyword):
            scope.sink.error("FXC0115", f"`{operand.name.text}` takes one selector", operand.span, "",
                             help=f"write `{operand.name.text}(a | b)` to take several together")
            return None, None
        what, operand = operand.name.text, operand.args[0]
    selected = read_selector(operand, scope)
    if selected is not None and cls.kinds:
        _possible(action, selected, cls, context)
    return what, selected


def _no_what(action: ast.Action, operand: ast.Expr, cls: type[Pass], scope: Scope) -> tuple[None, None]:
    whats = quoted(cls.whats)
    verb = action.verb.text
    if isinstance(operand, ast.Call):
        near = nearest(operand.name.text, cls.whats, 1)
        if near:
            scope.sink.error("FXC0115", f"`{verb}` knows no `{operand.name.text}`", operand.name.span,
                             f"expected {whats}",
                             help=f"did you mean `{near[0]}`?", fixes=(Fix(operand.name.span, near[0]),))
            return None, None
    fix = f"{next(iter(cls.whats))}({operand.span.text})"
    scope.sink.error("FXC0115", f"`{verb}` wants to be told what of the layers: {whats}", operand.span,
                     "the layers alone",
                     notes=tuple(f"`{name}`: {doc}" for name, doc in cls.whats.items()), help=f"write `{verb} {fix}`",
                     fixes=(Fix(operand.span, fix),))
    return None, None


def _possible(action: ast.Action, selected: selector.Selector, cls: type[Pass], context: Context) -> None:
    """Report a selector that can only select kinds which the verb does not work on."""
    kinds = kinds_of(selected, context.kinds)
    if kinds is None or kinds & set(cls.kinds):
        return
    place = selected.span
    context.scope.sink.error("FXC0137", f"`{action.verb.text}` does not work on {quoted(sorted(kinds))}", place,
                             "selects nothing else", notes=(f"it works on {', '.join(cls.kinds)}",),
                             help="select layers of these kinds")


def kinds_of(selected: selector.Selector, lets: Mapping[str, frozenset[str] | None]) -> frozenset[str] | None:
    """The operator kinds that a selector can select, None where its text alone doesn't say; `lets` has those of the
    names it refers to."""
    match selected:
        case selector.Kind(name=name):
            return frozenset({name})
        case selector.Ref(name=name):
            return lets.get(name)
        case selector.Where(base=first) | selector.Flow(parts=(first, *_)) | selector.SetOp(op="-", parts=(first, *_)):
            return kinds_of(first, lets)
        case selector.Helper(name="first" | "last", args=(first, *_)) if not isinstance(first, int):
            return kinds_of(first, lets)
        case selector.SetOp(op="|", parts=parts):
            every = [kinds_of(part, lets) for part in parts]
            return None if None in every else frozenset().union(*(kinds for kinds in every if kinds))
    return None


def _clauses(action: ast.Action, cls: type[Pass], context: Context) -> tuple[Preset | None, str | None]:
    scope = context.scope
    seen: dict[str, ast.Clause] = {}
    for clause in action.clauses:
        if clause.word in seen:
            scope.sink.error("FXC0104", f"`{clause.word}` stands twice", clause.span, "again",
                             secondary=(Label(seen[clause.word].span, "first here"),), help="keep one of the two")
        else:
            seen[clause.word] = clause
    preset = _preset(seen["as"].name, action.verb, context) if "as" in seen else None
    return preset, _teacher(seen.get("from"), action, cls, scope)


def _preset(name: ast.Name, verb: ast.Name, context: Context) -> Preset | None:
    sink, preset = context.scope.sink, context.presets.get(name.text)
    if preset is None:
        if name.text not in context.scope.broken:
            known = nearest(name.text, context.presets, 1)
            sink.error("FXC0117", f"unknown preset `{name.text}`", name.span, "not declared, and not used from a file",
                       notes=(f"presets: {', '.join(context.presets)}",) if context.presets else (),
                       help=f"did you mean `{known[0]}`?" if known else
                       'declare it with `preset`, or bring it in: `use "std/prune.fxc"`',
                       fixes=(Fix(name.span, known[0]),) if known else ())
        return None
    if preset.verb != verb.text:
        fitting = [other.name for other in context.presets.values() if other.verb == verb.text]
        sink.error("FXC0118", f"the preset `{preset.name}` is for `{preset.verb}`, not for `{verb.text}`", name.span,
                   "does not fit the verb", secondary=(Label(preset.span, "declared here"),),
                   help=f"presets for `{verb.text}`: {quoted(fitting, 'and')}" if fitting else
                   f"declare one: `preset ... for {verb.text} {{ }}`")
        return None
    return preset


def _teacher(clause: ast.Clause | None, action: ast.Action, cls: type[Pass], scope: Scope) -> str | None:
    if clause is None:
        if cls.takes_teacher:
            scope.sink.error("FXC0136", f"`{action.verb.text}` does not say which model it learns from", action.head,
                             "`from` is missing", help=f"write `{action.verb.text} from teacher`, and declare "
                             f"`policy name(teacher: model)`; or `from {ORIGINAL}`: the model before it is rewritten")
        return None
    name = clause.name.text
    scope.used.add(name)
    if cls.takes_teacher and name == ORIGINAL and name not in scope.given:
        return name
    if not cls.takes_teacher:
        scope.sink.error("FXC0136", f"`{action.verb.text}` takes no teacher", clause.span, "nothing to learn from",
                         help="take it out")
    elif (name not in scope.given or scope.given[name].type != "model") and name not in scope.broken:
        models = [item.declared.name.text for item in scope.given.values() if item.type == "model"]
        scope.sink.error("FXC0136", f"`{name}` is no model", clause.name.span, "no parameter of type `model`",
                         help=f"write {quoted(models)}" if models else f"declare it: `policy name({name}: model)`")
    return name


def _pairs(items: tuple[ast.Statement, ...], cls: type[Pass], scope: Scope) -> tuple[model.Pair, ...]:
    pairs = []
    for item in items:
        if not isinstance(item, ast.Pair):
            continue
        if not cls.pairs:
            scope.sink.error("FXC0135", f"`{cls.verb}` takes no pairs", item.span, "a pair of a student and a teacher",
                             help="take it out; pairs stand in verbs that compare two models")
            continue
        inner = item.body.items if item.body is not None else ()
        found = read_settings(inner, cls.pair_params, "`pair`", scope)
        missing(found.values, found, cls.pair_params, "`pair`", item.student.span.to(item.teacher.span), scope)
        ends = _end(item.student, scope), _end(item.teacher, scope, (OUTPUT, TARGETS))
        pairs.append(model.Pair(*ends, found.values, item.span))
    return tuple(pairs)


def _end(end: ast.Name | ast.String, scope: Scope, words: tuple[str, ...] = (OUTPUT,)) -> str:
    """One end of a pair: one of `words`, or a path as a text."""
    if isinstance(end, ast.Name) and end.text not in words:
        scope.sink.error("FXC0135", f"`{end.text}` is no end of a pair", end.span,
                         f"expected {quoted(words)} or a path",
                         help=f'a module path is written as a text: `"{end.text}"`',
                         fixes=(Fix(end.span, f'"{end.text}"'),))
    return end.text if isinstance(end, ast.Name) else end.value


def _own_check(cls: type[Pass], values: Mapping[str, object], found: Values, head: Span, scope: Scope) -> None:
    """What the verb itself says of its values together, shown at the action."""
    if any(isinstance(value, Unset) for value in values.values()):
        return
    try:
        cls(**values)
    except FxcError as error:
        scope.sink.items.extend(
            item if item.primary is not None else
            replace(item, primary=Label(head), secondary=tuple(Label(span) for span in found.spans.values()))
            for item in error.diagnostics)
