"""The pass protocol and the registry of verbs. A verb is a frozen dataclass; its fields are its parameters.

Nothing here imports torch: `check`, `fmt` and `verbs` read the registry in milliseconds. For the same reason a verb's
module keeps torch out of its top level and imports its rewrite inside `rewrite`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from .diagnostics import Diagnostic, FxcError
from .policy.model import Pair
from .policy.types import ValueType

T = TypeVar("T")
SizesFrom = Literal["shapes", "weights", "training"]

if TYPE_CHECKING:
    from .graph.captured import Captured
    from .graph.site import Outcome, Site


class Facet(StrEnum):
    """What of a node an action writes. Two actions that write one facet of one node are in conflict."""

    TOPOLOGY = "topology"
    SHAPE = "shape"
    MASK = "mask"
    LOSS = "loss"
    NUMERIC = "numeric"


FACET_ORDER: tuple[Facet, ...] = tuple(Facet)  # the order actions of one phase run in


@dataclass(frozen=True)
class Param:
    """A parameter of a verb as the language sees it."""

    name: str
    type: ValueType
    doc: str
    default: object
    required: bool


def param(type_: ValueType, doc: str, default: Any = MISSING) -> Any:
    """Declare a field of a pass as a parameter of its verb: its language type, its doc line, its default."""
    metadata = {"type": type_, "doc": doc}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Pass:
    """Base of every verb. Subclass as a frozen dataclass whose fields are declared with `param`.

    `rewrite` changes `graph` in place on the nodes of `site` and says what it did. It must run on fake weights too
    (`graph.concrete` is False during `plan`): there it makes an arbitrary choice of the right size and marks what
    depends on weights as unknown.
    """

    verb: ClassVar[str]
    facet: ClassVar[Facet]
    whats: ClassVar[Mapping[str, str]] = {}  # `channels` in `remove channels(S)`: name -> doc line; empty: none
    kinds: ClassVar[tuple[str, ...]] = ()  # operator kinds it works on; empty: any
    pairs: ClassVar[bool] = False  # takes `pair student <- teacher { ... }` in its block
    pair_params: ClassVar[tuple[Param, ...]] = ()  # the settings of a pair
    takes_teacher: ClassVar[bool] = False  # takes `from teacher`, and may do without a selector
    lever: ClassVar[str] = ""  # the share that the planner solves from the policy's budgets where it is left out

    def __post_init__(self) -> None:
        """Check and convert every parameter: Python values and texts in the policy's syntax alike (`"60%"`). Raises
        PolicyError. A subclass that checks more calls this first."""
        from .policy.convert import coerce

        for parameter in self.parameters():
            value = getattr(self, parameter.name)
            if parameter.required or value is not parameter.default:
                object.__setattr__(self, parameter.name, coerce(parameter.type, value, parameter.name))

    @classmethod
    def parameters(cls) -> tuple[Param, ...]:
        """The verb's parameters in the order of their declaration."""
        return tuple(
            Param(f.name, f.metadata["type"], f.metadata["doc"], None if f.default is MISSING else f.default,
                  f.default is MISSING)
            for f in fields(cls) if "type" in f.metadata
        )

    @property
    def free(self) -> bool:
        """Whether its lever was left out, so that it has to be solved before the pass can run."""
        return bool(self.lever) and getattr(self, self.lever) is None

    def with_share(self, share: float, spread: float) -> Pass:
        """This pass with its lever at `share`. Passes that round may let `spread`, in [0, 1), say how ties are broken,
        so that sizes which would all change at one share change at slightly different ones."""
        return replace(self, **{self.lever: share})

    def untested(self) -> Pass:
        """This pass as it leaves the graph in the end, without the checks of its own result that take time: for
        searches, whose results are dropped."""
        return self

    def sizes_from(self) -> SizesFrom:
        """What decides how much the pass leaves of each layer: shapes alone, the values of weights too, or what only
        training or data give (gradients, responses)."""
        return "shapes"

    def rewrite(self, graph: Captured, site: Site) -> Outcome:
        """Rewrite `graph` in place on `site`; raise FxcError with a diagnostic where that can't be done."""
        raise NotImplementedError

    def with_pairs(self, pairs: tuple[Pair, ...]) -> Pass:
        """This pass with the pairs of its block."""
        return self

    def check(self, graph: Captured, site: Site) -> Iterable[Diagnostic]:
        """What `check --model` says of this pass at `site`, beside its selector; nothing is rewritten. `graph` is the
        model as it was captured."""
        return ()

    def data_need(self) -> str:
        """Which of its settings can't do without calibration data (`by = activation`); empty if all can."""
        return ""

    def apply(self, captured: Captured, selector: str = "*", what: str | None = None, *,
              calibration: object = None, teacher: object = None) -> Captured:
        """A copy of `captured` with this pass applied to what `selector` (a text in the policy language) selects,
        verified. Values that change in time (ramps) are applied at their end. `calibration` is an iterable of batches,
        as in `compile`; `teacher` a model, for a verb that learns from one (or the text `original`)."""
        from .graph.apply import apply_pass

        return apply_pass(self, captured, selector, what, calibration, teacher)


class Registry(Generic[T]):
    """Names to things loaded on demand: built in by `module:attribute`, or from an entry-point group of any installed
    package, or registered at run time. Names are known without importing anything."""

    def __init__(self, noun: str, group: str, builtin: Mapping[str, str]) -> None:
        self.noun, self.group = noun, group
        self._builtin = dict(builtin)
        self._added: dict[str, T] = {}

    def register(self, name: str, thing: T) -> T:
        """Add or replace `name` for this process."""
        self._added[name] = thing
        return thing

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        """What installed packages offer; looking takes milliseconds, so it is done once, and only when asked for."""
        return {entry.name: entry for entry in entry_points(group=self.group)}

    def unregister(self, name: str) -> None:
        """Take a name that was registered at run time away again."""
        del self._added[name]

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted({*self._added, *self._builtin, *self._entries})

    def __contains__(self, name: object) -> bool:
        return name in self._added or name in self._builtin or name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> T:
        if name not in self._added:
            self._added[name] = self._load(name)
        return self._added[name]

    def _load(self, name: str) -> T:
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            found: T = getattr(import_module(module), attribute)
            return found
        if name not in self._entries:
            raise KeyError(f"no {self.noun} named {name!r}")
        entry = self._entries[name]
        try:
            loaded: T = entry.load()
        except (ImportError, AttributeError) as error:
            package = entry.dist.name if entry.dist is not None else entry.module
            raise FxcError([Diagnostic(
                "FXC0145", f"the {self.noun} `{name}` of the package `{package}` can't be loaded: {error}",
                help=f"mend or uninstall `{package}`")]) from error
        return loaded


VERBS: Registry[type[Pass]] = Registry(
    "verb", "fxcompress.verbs",
    {"distill": "fxcompress.passes.distill:Distill", "mask": "fxcompress.passes.mask:Mask",
     "quantize": "fxcompress.passes.quantize:Quantize", "remove": "fxcompress.passes.remove:Remove"},
)

SCORES: Registry[Any] = Registry(  # `fxcompress.passes.shared.scores.Score`, or a function of the weight alone
    "score", "fxcompress.scores",
    {name: f"fxcompress.passes.shared.scores:{name.upper()}"
     for name in ("magnitude", "l2", "random", "gradient", "movement")},
)
CRITERIA: Registry[Any] = Registry(  # `fxcompress.passes.shared.criteria.Criterion`, or a function of a `Scoring`
    "criterion", "fxcompress.criteria",
    {name: f"fxcompress.passes.shared.criteria:{name.upper()}"
     for name in ("l1", "l2", "random", "bn_scale", "taylor", "hessian", "lamp", "fpgm", "activation")},
)
OBSERVERS: Registry[Any] = Registry(  # classes of `fxcompress.nn.observers.Observer`
    "observer", "fxcompress.observers",
    {name: f"fxcompress.nn.observers:{attribute}"
     for name, attribute in (("minmax", "MinMax"), ("moving_average", "MovingAverage"), ("percentile", "Percentile"),
                             ("histogram", "Histogram"), ("mse", "Mse"), ("kl", "Kl"))},
)


LOSSES: Registry[Any] = Registry(  # classes of `fxcompress.nn.losses.Loss`
    "loss", "fxcompress.losses",
    {name: f"fxcompress.nn.losses:{attribute}"
     for name, attribute in (
         ("kl", "KL"), ("soft_cross_entropy", "SoftCrossEntropy"), ("cross_entropy", "CrossEntropy"), ("mse", "MSE"),
         ("cosine", "Cosine"), ("hint", "Hint"), ("attention", "Attention"), ("similarity", "Similarity"),
         ("relation", "Relation"), ("decoupled", "Decoupled"), ("nst", "NST"),
         ("logit_standardized", "LogitStandardized"), ("activation_kl", "ActivationKL"), ("dist", "Dist"))},
)


def register_loss(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: make a subclass of `fxcompress.nn.losses.Loss` a value of `loss` in the pairs of `distill` for
    this process. Packages use the entry point `fxcompress.losses`.

    The class says what it takes (see `Loss`); `forward` gives the term, 0-dim, which the pair's weight is multiplied
    to.

        @fxcompress.register_loss("huber")
        class Huber(Loss):
            def forward(self, student, teacher, temperature, targets):
                return torch.nn.functional.huber_loss(student, teacher)
    """
    return lambda cls: LOSSES.register(name, cls)


def register_observer(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: make a subclass of `fxcompress.nn.observers.Observer` a value of `observer` and
    `weight_observer` of `quantize` for this process. Packages use the entry point `fxcompress.observers`.

    It is made with (rows, device), takes the values of each batch by `update`, [rows, n], and says by `range` which
    (low, high), each [rows], the integers of a scheme should cover. The base keeps the least and the greatest value in
    `low` and `high`.

        @fxcompress.register_observer("spread")
        class Spread(Observer):
            def range(self, scheme):
                return 0.9 * self.low, 0.9 * self.high
    """
    return lambda cls: OBSERVERS.register(name, cls)


def register_verb(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make `cls` a verb of the language for this process. Packages use an entry point instead."""
    return VERBS.register(cls.verb, cls)
