"""Selectors on a captured graph: `select(captured, selector)` gives the nodes, in graph order.

* A kind (`conv2d`) selects every node of that canonical kind, `*` every operator: any call but those that only prepare
  parameters (a mask on a weight).
* A string is a glob on module paths. It selects the operators at the paths it matches, and those inside the modules it
  matches: `"layer3"` is everything in `layer3`, `"layer*.0.conv1"` the first convolution of each layer.
* `name ~ "layer*.**"` and `name ~ re"..."` match whole paths (see `pattern.py`); other predicates ask for a fact of
  `predicates.PROPERTIES`. Where the base names kinds, a fact that one of its nodes lacks is an error; in `*[...]`,
  `"layer3"[...]` and `inside(...)[...]` a node without the fact doesn't match.
* `a >> b >> c` selects the nodes of `a` whose result goes to a node of `b` and to nothing else, and so on. Nodes that
  only read sizes are no consumers.
* Helpers: `first(s)`, `first(s, 3)`, `last(s)` in graph order; `inside(s)`: the operators in the modules that `s`
  stands in; `inputs_of(s)`: the nearest operators with parameters that feed `s`; `coupled(s)`: `s` and the operators
  whose output channels must leave together with those of `s`.

Everything is linear in the graph, and what matches nothing is explained by `select_explain.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import fx

from ..diagnostics import Label, PolicyError, Sink
from ..policy import parse_selector
from ..policy.selector import (
    Everything,
    Flow,
    Helper,
    Kind,
    Path,
    Predicate,
    Ref,
    Selector,
    SetOp,
    Where,
)
from .captured import Captured
from .ops import MODULES, ON_WEIGHTS, kind_of, path_of
from .pattern import PatternError, glob
from .predicates import PROPERTIES, Value, holds, matches

if TYPE_CHECKING:
    from ..source import Span

SIZE_KINDS = frozenset({"size", "getattr", "numel"})  # they read shapes, not values
_LAYER_KINDS = frozenset(leaf.kind for leaf in MODULES.values() if leaf.tensors)

Nodes = frozenset[fx.Node]
NOTHING: Nodes = frozenset()


@dataclass(frozen=True)
class Bound:
    """A `let` that was bound before: its nodes, followed through the rewrites since, and what it said."""

    nodes: tuple[fx.Node, ...]
    selector: Selector


Lets = Mapping[str, Selector | Bound]


def select(captured: Captured, selector: Selector | str, lets: Lets | None = None, optional: bool = False,
           ) -> tuple[fx.Node, ...]:
    """The nodes of `captured` that `selector` (or the text of one) selects, in graph order.

    Raises PolicyError (FXC02xx) for a selector that can't be evaluated and, unless `optional`, for one that selects
    nothing; the error says what comes nearest.
    """
    if isinstance(selector, str):
        selector = parse_selector(selector)
    sink = Sink()
    nodes = Selecting(captured, lets or {}, sink).select(selector, optional)
    sink.raise_if_errors(PolicyError)
    return nodes


class Selecting:
    """Selections on one state of one graph. What is wrong goes to `sink`, so that one run shows all of it."""

    def __init__(self, captured: Captured, lets: Lets, sink: Sink) -> None:
        self.captured, self.lets, self.sink = captured, lets, sink
        self.graph = captured.module.graph
        self.order = {node: place for place, node in enumerate(self.graph.nodes)}
        self.names = frozenset(node.name for node in self.graph.nodes)
        self.kinds: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            self.kinds.setdefault(kind_of(node), []).append(node)
        self.operators: Nodes = frozenset(operators(self.graph))
        self._whole: dict[str, Mapping[fx.Node, Value]] = {}

    def select(self, selector: Selector, optional: bool = False, used: Label | None = None) -> tuple[fx.Node, ...]:
        """The nodes in graph order; what is wrong is in the sink. `used` is where a `let` is used, for the message."""
        from .select_explain import Explaining

        before = len(self.sink.items)
        nodes = self.evaluate(selector)
        if len(self.sink.items) == before and not optional:
            explaining = Explaining(self, used)
            for part in self._strict(selector):
                explaining.nothing(part)
            if not nodes and len(self.sink.items) == before:
                explaining.nothing(selector)
        return self.sorted(nodes)

    def sorted(self, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        """In graph order."""
        return tuple(sorted(nodes, key=self.order.__getitem__))

    def evaluate(self, selector: Selector) -> Nodes:
        """The set of nodes; empty where something is wrong, which is then in the sink."""
        return _EVALUATE[type(selector)](self, selector)

    def _strict(self, selector: Selector) -> list[Selector]:
        """Parts of a union or difference that select nothing though they should: names, and what is taken away. A name
        that isn't there is a mistake even where the rest of the selection is not empty."""
        found: list[Selector] = []
        if isinstance(selector, SetOp):
            for place, part in enumerate(selector.parts):
                must = (selector.op == "-" and place > 0) or (selector.op != "&" and names_layers(part))
                if must and not self.evaluate(part):
                    found.append(part)
                else:
                    found.extend(self._strict(part))
        return found

    def is_open(self, selector: Selector) -> bool:
        """Whether the selection is by place rather than by kind: nodes that lack a fact, or that a verb doesn't work
        on, are then passed over."""
        inner: tuple[Selector, ...]
        match selector:
            case Kind():
                return False
            case Everything() | Path() | Helper(name="inside" | "inputs_of" | "coupled"):
                return True
            case Ref(name=name):
                let = self.lets[name]
                inner = (let.selector if isinstance(let, Bound) else let,)
            case Where(base=base):
                inner = (base,)
            case SetOp(op="|" | "&", parts=parts):
                inner = parts
            case Flow(parts=parts) | SetOp(parts=parts):
                inner = parts[:1]
            case Helper(args=args):
                inner = tuple(arg for arg in args if not isinstance(arg, int))
        combine = all if isinstance(selector, SetOp) and selector.op == "&" else any
        return combine(self.is_open(part) for part in inner)

    # Names

    def _kind(self, selector: Kind) -> Nodes:
        return frozenset(self.kinds.get(selector.name, ()))

    def _everything(self, selector: Everything) -> Nodes:
        return self.operators

    def _ref(self, selector: Ref) -> Nodes:
        let = self.lets[selector.name]
        return frozenset(let.nodes) if isinstance(let, Bound) else self.evaluate(let)

    def _path(self, selector: Path) -> Nodes:
        try:
            pattern = glob(selector.glob)
        except PatternError as error:
            self._bad_pattern(error, selector.span)
            return NOTHING
        return self._under({path for path in self.prefixes if pattern.matches(path)})

    def _under(self, modules: set[str]) -> Nodes:
        """The operators whose path, or the path of a module around them, is in `modules`."""
        return frozenset(node for node in self.operators if not modules.isdisjoint(prefixes_of(path_of(node))))

    @cached_property
    def paths(self) -> frozenset[str]:
        """The paths of all operators."""
        return frozenset(path for path in map(path_of, self.operators) if path)

    @cached_property
    def prefixes(self) -> frozenset[str]:
        """The paths of all operators and of the modules around them."""
        return frozenset(prefix for path in self.paths for prefix in prefixes_of(path))

    def _bad_pattern(self, error: PatternError, span: Span) -> None:
        self.sink.error("FXC0207", str(error), span, help=error.help)

    # Predicates

    def _where(self, selector: Where) -> Nodes:
        nodes = self.evaluate(selector.base)
        for predicate in selector.predicates:
            nodes = self.satisfying(nodes, predicate, self.is_open(selector.base))
        return nodes

    def satisfying(self, nodes: Nodes, predicate: Predicate, lenient: bool) -> Nodes:
        """Those of `nodes` that satisfy `predicate`; nodes without the fact don't if `lenient`, else are an error."""
        if predicate.key == "name":
            return self._named(nodes, predicate)
        values = {node: self.value(node, predicate.key) for node in nodes}
        lacking = self.sorted(node for node, value in values.items() if value is None)
        if lacking and not lenient:
            self._lacks(lacking[0], predicate)
            return NOTHING
        return frozenset(node for node, value in values.items() if value is not None and holds(predicate, value))

    def value(self, node: fx.Node, key: str) -> Value:
        """The fact `key` of `node`, None if it has none."""
        prop = PROPERTIES[key]
        if prop.whole is None:
            return prop.get(node)
        if key not in self._whole:
            self._whole[key] = prop.whole(self.captured)
        return self._whole[key][node]

    def _named(self, nodes: Nodes, predicate: Predicate) -> Nodes:
        if predicate.op != "~":
            equal = frozenset(node for node in nodes if predicate.value in names_of(node))
            return equal if predicate.op == "==" else nodes - equal
        try:
            return frozenset(node for node in nodes if any(matches(predicate, name) for name in names_of(node)))
        except PatternError as error:
            self._bad_pattern(error, predicate.span)
            return NOTHING

    def _lacks(self, node: fx.Node, predicate: Predicate) -> None:
        has = [key for key in PROPERTIES if key != "name" and self.value(node, key) is not None]
        kind = kind_of(node)
        self.sink.error("FXC0206", f"{kind} has no `{predicate.key}`", predicate.span, f"`{label(node)}` is a {kind}",
                        notes=(f"the facts of {kind} are {', '.join(['name', *has])}",),
                        help=f"narrow the kinds first, or write `*[{predicate.span.text}]`: there, operators without "
                             f"`{predicate.key}` just don't match")

    # Dataflow, sets, helpers

    def _flow(self, selector: Flow) -> Nodes:
        parts = [self.evaluate(part) for part in selector.parts]
        matching = parts[-1]
        for part in reversed(parts[:-1]):
            matching = frozenset(node for node in part if sole_consumer(node) in matching)
        return matching

    def _set(self, selector: SetOp) -> Nodes:
        combine = _SETS[selector.op]
        nodes, *rest = [self.evaluate(part) for part in selector.parts]
        for other in rest:
            nodes = combine(nodes, other)
        return nodes

    def _helper(self, selector: Helper) -> Nodes:
        inner, count = selector.args[0], selector.args[1] if len(selector.args) > 1 else 1
        assert not isinstance(inner, int) and isinstance(count, int), "the language checks what a helper takes"
        return HELPERS[selector.name](self, self.evaluate(inner), count)

    def _first(self, nodes: Nodes, count: int) -> Nodes:
        return frozenset(self.sorted(nodes)[:count])

    def _last(self, nodes: Nodes, count: int) -> Nodes:
        return frozenset(self.sorted(nodes)[-count:])

    def _inside(self, nodes: Nodes, count: int) -> Nodes:
        return self._under({path for node in nodes if (path := path_of(node))})

    def _inputs_of(self, nodes: Nodes, count: int) -> Nodes:
        """Upstream, through operators without parameters."""
        found, seen = set(), set(nodes)
        ahead = [source for node in nodes for source in node.all_input_nodes]
        while ahead:
            node = ahead.pop()
            if node in seen or node not in self.operators:
                continue
            seen.add(node)
            if self.value(node, "params"):
                found.add(node)
            else:
                ahead.extend(node.all_input_nodes)
        return frozenset(found)

    def _coupled(self, nodes: Nodes, count: int) -> Nodes:
        """`nodes`, and those that make channels of the same components of `coupling.py`."""
        from .coupling import analyse

        coupling = analyse(self.captured)
        touched = coupling.touched(made.labels for node in nodes for made in coupling.produced.get(node, ()))
        return nodes | {node for node, made in coupling.produced.items() if node in self.operators
                        and any(coupling.meets(touched, one.labels) for one in made)}


_SETS: Mapping[str, Callable[[Nodes, Nodes], Nodes]] = {"|": operator.or_, "&": operator.and_, "-": operator.sub}
HELPERS: Mapping[str, Callable[[Selecting, Nodes, int], Nodes]] = {
    "first": Selecting._first, "last": Selecting._last, "inside": Selecting._inside,
    "inputs_of": Selecting._inputs_of, "coupled": Selecting._coupled,
}
_EVALUATE: Mapping[type, Callable[[Selecting, Any], Nodes]] = {
    Everything: Selecting._everything, Kind: Selecting._kind, Ref: Selecting._ref, Path: Selecting._path,
    Where: Selecting._where, Flow: Selecting._flow, SetOp: Selecting._set, Helper: Selecting._helper,
}


def operators(graph: fx.Graph) -> list[fx.Node]:
    """Every call of `graph` but those that only prepare parameters: their arguments all come from parameters, and they
    have none of their own; those of quantizers, which belong to what they round, and those of a teacher."""
    weights: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        if node.op == "get_attr":
            weights.add(node)
        elif node.op not in ("placeholder", "output"):
            inputs = node.all_input_nodes
            if inputs and weights.issuperset(inputs) and (node.op != "call_module" or kind_of(node) in ON_WEIGHTS):
                weights.add(node)
            elif kind_of(node) not in ("quantizer", "distillation"):
                found.append(node)
    return found


def sole_consumer(node: fx.Node) -> fx.Node | None:
    """The one node that reads `node`'s value, None if there are several or none; reading its size doesn't count."""
    users = consumers(node)
    return users[0] if len(users) == 1 else None


def consumers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read `node`'s value, not only its size; what a teacher is compared with doesn't count."""
    return [user for user in node.users if kind_of(user) not in SIZE_KINDS and kind_of(user) != "distillation"]


def prefixes_of(path: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def names_of(node: fx.Node) -> tuple[str, ...]:
    """What `name` predicates see: the module path, and for a function also the node's own name."""
    path = path_of(node)
    return (path,) if node.op == "call_module" else (path, node.name)


def label(node: fx.Node) -> str:
    """How messages call a node: the path of a layer (masked or not), the node's own name for a plain function."""
    path = path_of(node)
    return path if path and (node.op == "call_module" or kind_of(node) in _LAYER_KINDS) else node.name


def names_layers(selector: Selector) -> bool:
    """Whether `selector` asks for layers by name: then it is a mistake when there are none."""
    match selector:
        case Path() | Helper(name="inside"):
            return True
        case Where(base=base, predicates=predicates):
            return names_layers(base) or any(p.key == "name" and p.op != "!=" for p in predicates)
    return False


def quoted(names: Iterable[str], last: str = "or") -> str:
    """`` `a`, `b` or `c` ``."""
    words = [f"`{name}`" for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
