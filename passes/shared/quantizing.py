"""The rewrite of `quantize`: norms folded, regions found, quantizers on the edges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from fxcompress.diagnostics import Diagnostic, Label, PlanError
from fxcompress.graph.captured import Captured
from fxcompress.graph.interpret import evaluated
from fxcompress.graph.ops import kind_of, path_of
from fxcompress.graph.provenance import origins_of, touch
from fxcompress.graph.site import Change, Outcome, Site
from fxcompress.nn.integer import saturates
from fxcompress.nn.quantizer import Quantizer
from fxcompress.nn.scheme import Scheme
from fxcompress.passes.shared.calibrating import calibrate, observer_of
from fxcompress.passes.shared.fold_norms import fold
from fxcompress.passes.shared.integer import Grids, Region, regions_of, role_of
from fxcompress.passes.shared.normalizing import channels_of, few, normalize, weight_name
from fxcompress.passes.shared.preparing import prepare
from fxcompress.passes.shared.weights import expose
from fxcompress.policy.values import Call

_SAFE_BITS = 7  # of activations, where two products of bytes don't fit 16 bits

if TYPE_CHECKING:
    from fxcompress.passes.quantize import Quantize


def quantize(settings: Quantize, captured: Captured, site: Site) -> Outcome:
    """Quantize the layers of `site`; see `Quantize.rewrite`."""
    normal = normalize(settings, captured, site)
    products, notes = normal.products, normal.lines()
    if not products:
        raise PlanError([Diagnostic("FXC0370", "nothing selected can be quantized",
                                    Label(site.span) if site.span is not None else None, notes=tuple(notes[:8]),
                                    help="select convolutions (conv2d) or linear layers that aren't quantized yet")])
    there = set(captured.graph.nodes)
    for node, norm in fold(captured, products):
        touch(node, settings, site, f"the batch norm {norm} folded into its weight", was=(norm.replace(".", "_"),))
    prepare(settings, captured, products)
    regions = regions_of(products)
    grids = Grids(regions)
    changes = [_weight(settings, captured, site, node) for node in products]
    _place(settings, captured, site, grids)
    captured.refresh()
    for node in captured.graph.nodes:
        if node not in there and not origins_of(node):
            touch(node, settings, site, "made for a quantizer", was=(user.name for user in node.users))
    if settings.bits is None and saturates():
        notes.append(f"values in {_SAFE_BITS} bits: this CPU has no VNNI instructions, its products of bytes saturate")
    unknown: tuple[str, ...] = ("the ranges of what layers read and give",)
    if captured.concrete and site.calibration is not None:
        notes += calibrate(captured, site.calibration)
        unknown = ()
    return Outcome(tuple(changes), (*notes, *_breaks(regions, grids)), unknown=unknown)


def _bits(settings: Quantize) -> int:
    return settings.bits if settings.bits is not None else _SAFE_BITS if saturates() else 8


def _spec(spec: str | Call) -> tuple[str, tuple[float, ...]]:
    """An observer's name and its arguments: of `histogram`, of `percentile(99.9%)`."""
    return (spec.name, tuple(float(str(arg)) for arg in spec.args)) if isinstance(spec, Call) else (spec, ())


def _weight(settings: Quantize, captured: Captured, site: Site, node: fx.Node) -> Change:
    """A quantizer on the weight; its range is that of the values it has now."""
    source = expose(captured, node)
    name = weight_name(node)
    weight = evaluated(captured.module, source)
    axis = channels_of(node) if settings.granularity == "per_channel" else None
    rows = 1 if axis is None else weight.shape[axis]
    scheme = Scheme(settings.weight_bits, signed=True, symmetric=True, narrow=True)
    quantizer = Quantizer(scheme, rows, axis, *_spec(settings.weight_observer), device=weight.device)
    if captured.concrete:
        observer = observer_of(quantizer)
        observer.update(quantizer.in_rows(weight))
        quantizer.cover(*observer.range(scheme))
    path = f"{name}_quantizer"
    _put(captured, path, quantizer)  # for a layer that is called twice the second is the same
    with captured.graph.inserting_before(node):
        call = captured.graph.call_module(path, (source,))
    call.meta["path"] = path_of(node)
    node.replace_input_with(source, call)
    touch(call, settings, site, f"rounds to {settings.weight_bits} bits", was=(node.name,))
    touch(node, settings, site, f"weight in {settings.weight_bits} bits, {settings.granularity}")
    return Change(path_of(node), kind_of(node), "weight", "float", f"int{settings.weight_bits}", "selected")


def _place(settings: Quantize, captured: Captured, site: Site, grids: Grids) -> None:
    """One quantizer for each grid, called behind each of its sources."""
    paths: dict[int, str] = {}
    scheme = Scheme(_bits(settings), signed=False, symmetric=settings.symmetric)
    ends = {region.end for region in grids.regions}
    readers = _readers(grids)
    device = next((tensor.device for tensor in captured.module.parameters()), None)
    for source, grid in grids.sources.items():
        if grid not in paths:
            paths[grid] = f"{_where(source)}quantizer"
            name, arguments_ = _spec(settings.observer)
            _put(captured, paths[grid], Quantizer(scheme, observer=name, arguments=arguments_, device=device))
        with captured.graph.inserting_after(source):
            call = captured.graph.call_module(paths[grid], (source,))
        call.meta["path"] = path_of(source)
        for user in list(source.users):
            if user is not call and (source in ends or user in readers):
                user.replace_input_with(source, call)
        touch(call, settings, site, f"rounds to {_bits(settings)} bits", was=(source.name,))


def _readers(grids: Grids) -> set[fx.Node]:
    """The nodes that read integers: products, what they add, and all between them and the sources."""
    found: set[fx.Node] = set()
    stack: list[fx.Node] = []
    for region in grids.regions:
        stack += [region.product] if region.add is None or region.end not in grids.sources else [
            region.product, region.add]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack += [source for source in node.all_input_nodes
                  if source not in grids.sources and role_of(source) in ("passes", "joins")]
    return found


def _where(source: fx.Node) -> str:
    """The beginning of the path of a quantizer behind `source`: in its module, or at the top."""
    if source.op == "call_module":
        return f"{source.target}."
    return f"{source.name}_"


def _put(captured: Captured, path: str, quantizer: Quantizer) -> None:
    owner, _, leaf = path.rpartition(".")
    captured.module.get_submodule(owner).add_module(leaf, quantizer)


def _breaks(regions: list[Region], grids: Grids) -> list[str]:
    """One line for each value that floats give to a quantized layer: where integers begin."""
    ends = {region.end for region in regions}
    found: dict[str, list[str]] = {}
    for source in grids.sources:
        if source not in ends and source.op != "placeholder":
            found.setdefault(kind_of(source), []).append(path_of(source) or source.name)
    return [f"integers begin anew behind {len(paths)} {kind} ({few(paths)}), which computes in float"
            for kind, paths in found.items()]
