"""Why a selector selects nothing, and what comes nearest: one explanation for each form of selector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..diagnostics import Diagnostic, Fix, Label, nearest
from ..policy.selector import Everything, Flow, Helper, Kind, Path, Predicate, Ref, Selector, SetOp, Where
from .ops import kind_of, path_of
from .pattern import glob, regex
from .predicates import Value
from .select import Bound, Nodes, Selecting, consumers, label, quoted

FEW = 8  # names listed in one message


@dataclass(frozen=True)
class Near:
    """What comes nearest to a name: a note, a way out, and the name itself where one is near enough."""

    note: str
    help: str
    name: str | None = None


class Explaining:
    """Explanations on one state of one graph; they go to the sink of `selecting`."""

    def __init__(self, selecting: Selecting, used: Label | None) -> None:
        self.at = selecting
        self.used = (used,) if used is not None else ()
        self.model = selecting.captured.model_name or "this model"

    def nothing(self, selector: Selector) -> None:
        """Report that `selector` selects nothing, and why."""
        _EXPLAIN[type(selector)](self, selector)

    def _report(self, code: str, message: str, selector: Selector | Predicate, text: str = "", *,
                notes: Iterable[str] = (), help: str | None = None, fixes: tuple[Fix, ...] = ()) -> None:
        found = Diagnostic(code, message, Label(selector.span, text or "selects nothing"), self.used, tuple(notes),
                           help or "write `optional` before the action if it may come to nothing", fixes)
        if found not in self.at.sink.items:
            self.at.sink.items.append(found)

    # One method for each form

    def _everything(self, selector: Everything) -> None:
        self._report("FXC0201", f"{self.model} has no operators", selector)

    def _kind(self, selector: Kind) -> None:
        near = nearest(selector.name, self.at.kinds)
        self._report("FXC0201", f"{self.model} has no `{selector.name}`", selector, notes=[f"it has {self._census()}"],
                     help=f"did you mean {quoted(near)}?" if near else None,
                     fixes=(Fix(selector.span, near[0]),) if near else ())

    def _census(self) -> str:
        """`20 conv2d, 20 batchnorm2d, ...`, most frequent first."""
        counts = {kind: len(self.at.operators.intersection(nodes)) for kind, nodes in self.at.kinds.items()}
        common = sorted((kind for kind, count in counts.items() if count), key=lambda kind: -counts[kind])
        more = f" and {len(common) - FEW} other kinds" if len(common) > FEW else ""
        return ", ".join(f"{counts[kind]} {kind}" for kind in common[:FEW]) + more

    def _ref(self, selector: Ref) -> None:
        let = self.at.lets[selector.name]
        inner = Explaining(self.at, Label(selector.span, "used here"))
        inner.nothing(let.selector if isinstance(let, Bound) else let)

    def _path(self, selector: Path) -> None:
        near = nearest_path(selector.glob, self.at.prefixes)
        fix = (Fix(selector.span, f'"{near.name}"'),) if near.name else ()
        self._report("FXC0202", f'{self.model} has no layer or module "{selector.glob}"', selector, notes=[near.note],
                     help=near.help, fixes=fix)

    def _where(self, selector: Where) -> None:
        base = self.at.evaluate(selector.base)
        if not base:
            self.nothing(selector.base)
            return
        lenient = self.at.is_open(selector.base)
        nodes, notes, near = base, [], None
        what = _kinds_text(nodes)
        for predicate in selector.predicates:
            left = self.at.satisfying(nodes, predicate, lenient)
            notes.append(f"`{predicate.span.text}` holds for {len(left)} of {len(nodes)} {what}"
                         + self._closest_fact(nodes, left, predicate))
            if not left:
                near = self._nearest_name(nodes, predicate)
                break
            nodes = left
        culprit = selector.predicates[len(notes) - 1]
        code = "FXC0202" if near is not None else "FXC0203"
        rest = "" if len(notes) == 1 else " among those left"
        message = f"{self.model} has no {what} with `{culprit.span.text}`{rest}"
        fixes: tuple[Fix, ...] = ()
        if near is not None and near.name:
            fixes = (Fix(culprit.span, f'{culprit.key} {culprit.op} "{near.name}"'),)
        self._report(code, message, culprit, "no layer is left here",
                     notes=[*notes, *([near.note] if near else [])], help=near.help if near else None, fixes=fixes)

    def _closest_fact(self, nodes: Nodes, left: Nodes, predicate: Predicate) -> str:
        """`; the largest is 512` where no node satisfies a comparison."""
        if left or predicate.key == "name":
            return ""
        found = [self.at.value(node, predicate.key) for node in self.at.sorted(nodes)]
        values = [value for value in found if value is not None]
        if not values:
            return "; none of them has that fact"
        if predicate.op in (">", ">=") and all(isinstance(value, int | float) for value in values):
            return f"; the largest is {_plain(max(values))}"
        if predicate.op in ("<", "<=") and all(isinstance(value, int | float) for value in values):
            return f"; the smallest is {_plain(min(values))}"
        distinct = list(dict.fromkeys(_plain(value) for value in values))
        return f"; they have {', '.join(distinct[:FEW])}" + (", ..." if len(distinct) > FEW else "")

    def _nearest_name(self, nodes: Nodes, predicate: Predicate) -> Near | None:
        """What comes nearest to a name predicate that keeps none of `nodes`; None for another fact."""
        if predicate.key != "name" or predicate.op == "!=":
            return None
        paths = sorted({path_of(node) for node in nodes} - {""})
        text = str(predicate.value)
        if not predicate.is_regex:
            return nearest_path(text, paths)
        found = [path for path in paths if regex(text).search(path)]
        if found:
            return Near(f"a regular expression must match the whole path; this one matches within {_some(found)}",
                        f'write `{predicate.key} ~ re".*{text}.*"`')
        return Near(f"there are {_some(paths)}", "dots in paths are written `\\.` in a regular expression")

    def _flow(self, selector: Flow) -> None:
        parts = [self.at.evaluate(part) for part in selector.parts]
        for part, nodes in zip(selector.parts, parts, strict=True):
            if not nodes:
                self.nothing(part)
                return
        chain, reason = self._best_chain(parts, [part.span.text for part in selector.parts])
        matched = " >> ".join(f"`{label(node)}`" for node in chain)
        self._report("FXC0204", f"nothing in {self.model} has the form `{selector.span.text}`", selector,
                     notes=[f"the best partial match is {matched} ({len(chain)} of {len(parts)} parts)", reason],
                     help="a part must be the only reader of the part before it; shorten the pattern, or name what is "
                          "really there")

    def _best_chain(self, parts: list[Nodes], texts: list[str]) -> tuple[list[fx.Node], str]:
        """The longest chain that matches the first parts, the earliest of those in the graph, and why it ends."""
        best: list[fx.Node] = []
        for start in self.at.sorted(parts[0]):
            chain = [start]
            while (following := consumers(chain[-1])) and len(following) == 1 and following[0] in parts[len(chain)]:
                chain.append(following[0])
            if len(chain) > len(best):
                best = chain
        end, wanted = best[-1], texts[len(best)]
        following = consumers(end)
        if not following:
            return best, f"nothing reads `{label(end)}`"
        if len(following) > 1:
            return best, (f"`{label(end)}` is read by {len(following)} operators, "
                          f"{_some([label(node) for node in following])}: not by `{wanted}` alone")
        reader = following[0]
        source = getattr(reader.meta.get("fxc"), "source", "")
        where = f", at {source}" if source else ""
        return best, f"`{label(end)}` is read by `{label(reader)}`, a {kind_of(reader)}, not by `{wanted}`{where}"

    def _set(self, selector: SetOp) -> None:
        sizes = [(part, self.at.evaluate(part)) for part in selector.parts]
        empty = [part for part, nodes in sizes if not nodes]
        if selector.op == "|" or (selector.op == "&" and empty) or (selector.op == "-" and not sizes[0][1]):
            for part in empty if selector.op != "-" else empty[:1]:
                self.nothing(part)
            return
        notes = [f"`{part.span.text}` selects {_some([label(node) for node in self.at.sorted(nodes)])}"
                 for part, nodes in sizes]
        message = (f"`{selector.parts[0].span.text}` has nothing left when the rest is taken away" if selector.op == "-"
                   else f"the parts of `{selector.span.text}` have no operator in common")
        self._report("FXC0205", message, selector, notes=notes)

    def _helper(self, selector: Helper) -> None:
        inner = selector.args[0]
        if isinstance(inner, int):
            return
        nodes = self.at.evaluate(inner)
        if not nodes:
            self.nothing(inner)
            return
        found = _some([label(node) for node in self.at.sorted(nodes)])
        self._report("FXC0205", f"`{selector.span.text}` selects nothing", selector,
                     notes=[f"`{inner.span.text}` selects {found}; no operator with parameters feeds them"])


_EXPLAIN: Mapping[type, Callable[[Explaining, Any], None]] = {
    Everything: Explaining._everything, Kind: Explaining._kind, Ref: Explaining._ref, Path: Explaining._path,
    Where: Explaining._where, Flow: Explaining._flow, SetOp: Explaining._set, Helper: Explaining._helper,
}


def nearest_path(pattern: str, paths: Iterable[str]) -> Near:
    """What comes nearest to a glob that matches none of `paths`: how far its parts match, and what is there instead."""
    known = {".".join(path.split(".")[:count]) for path in paths for count in range(1, path.count(".") + 2)}
    parts = pattern.split(".")
    for count in range(len(parts) - 1, 0, -1):
        prefix = glob(".".join(parts[:count]))
        matched = {path for path in known if prefix.matches(path)}
        if not matched:
            continue
        below = sorted({path for path in known if path.rpartition(".")[0] in matched})
        if not below:
            return Near(f"`{prefix.text}` is there, with nothing inside", _did_you_mean(nearest(pattern, known)))
        ends = list(dict.fromkeys(path.rpartition(".")[2] for path in below))
        return Near(f"`{prefix.text}` is there; in it are {_some(ends)}", *_mended(parts, count, ends))
    same_end = [path for path in sorted(known) if path.endswith(f".{pattern}")]
    if same_end:
        return Near(f"a path is written whole: there are {_some(same_end)}", f'write "**.{pattern}" for all of them')
    tops = list(dict.fromkeys(path.split(".")[0] for path in sorted(known)))
    return Near(f"at the top are {_some(tops)}", *_mended(parts, 0, tops))


def _mended(parts: list[str], place: int, there: list[str]) -> tuple[str, str | None]:
    """A help line and the pattern with the part at `place` replaced by the nearest of `there`."""
    stems = [f"{name.rstrip('0123456789')}*" for name in there]  # `layr*` is meant as `layer*`, not as `layer4`
    near = nearest(parts[place], stems) if parts[place].endswith("*") else nearest(parts[place], there)
    names = [".".join([*parts[:place], name, *parts[place + 1:]]) for name in near]
    return _did_you_mean(names), names[0] if names else None


def _did_you_mean(names: list[str]) -> str:
    if names:
        return f"did you mean {quoted(names)}?"
    return "name one that is there, or write `optional` before the action if it may come to nothing"


def _some(names: list[str]) -> str:
    """`` `a`, `b` ... and 12 more``."""
    shown = [f"`{name}`" for name in names[:FEW]]
    rest = len(names) - len(shown)
    if rest:
        return f"{', '.join(shown)} and {rest} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _kinds_text(nodes: Nodes) -> str:
    """`conv2d`, or `operators` for a mixture."""
    kinds = {kind_of(node) for node in nodes}
    return kinds.pop() if len(kinds) == 1 else "operators"


def _plain(value: Value) -> str:
    if isinstance(value, tuple):
        return "×".join(_plain(size) for size in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
