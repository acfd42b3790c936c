"""The rewrite of `quantize`: norms folded, regions found, quantizers on the edges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from fxcompress.diagnostics import Diagnostic, Label, PlanError
from fxcompress.graph.calibration import Calibration
from fxcompress.graph.captured import Captured
from fxcompress.graph.interpret import evaluated
from fxcompress.graph.ops import arguments, kind_of, module_of, path_of
from fxcompress.graph.provenance import origins_of, touch
from fxcompress.graph.select import label
from fxcompress.graph.site import Change, Outcome, Site
from fxcompress.nn.dynamic import DynamicQuantizer
from fxcompress.nn.pairs import SAFE_BITS, saturates
from fxcompress.nn.quantizer import Quantizer, WeightQuantizer, groups_of
from fxcompress.nn.scheme import Scheme
from fxcompress.nn.trained import TrainedQuantizer
from fxcompress.passes.shared import attention
from fxcompress.passes.shared.attention_forms import gather
from fxcompress.passes.shared.calibrating import calibrate, cover_weight
from fxcompress.passes.shared.fold_norms import fold, norms_behind
from fxcompress.passes.shared.integer import Grids, Region, averages, data_of, regions_of, role_of
from fxcompress.passes.shared.normalizing import Normal, channels_of, few, normalize, weight_name
from fxcompress.passes.shared.preparing import prepare
from fxcompress.passes.shared.training_rounds import norm_arguments, scheduled
from fxcompress.passes.shared.weights import expose
from fxcompress.policy.values import Call

BYTE = 8  # bits

if TYPE_CHECKING:
    from fxcompress.passes.quantize import Quantize


def quantize(settings: Quantize, captured: Captured, site: Site) -> Outcome:
    """Quantize the layers of `site`; see `Quantize.rewrite`."""
    normal = normalize(settings, captured, site)
    products = [node for node in normal.products if _has_mode(settings, node, normal)]
    notes = normal.lines()
    if not products:
        raise PlanError([Diagnostic("FXC0370", "nothing selected can be quantized",
                                    Label(site.span) if site.span is not None else None, notes=tuple(notes[:8]),
                                    help="select convolutions (conv2d) or linear layers that aren't quantized yet")])
    there = set(captured.graph.nodes)
    outcome = _REWRITES[settings.mode](settings, captured, site, products)
    captured.refresh()
    for node in captured.graph.nodes:
        if node not in there and not origins_of(node):
            touch(node, settings, site, "made for a quantizer", was=(user.name for user in node.users))
    return replace(outcome, notes=(*notes, *outcome.notes))


def _static(settings: Quantize, captured: Captured, site: Site, products: list[fx.Node]) -> Outcome:
    _fold(settings, captured, site, products)
    prepare(settings, captured, products)
    attended, notes = _attention(settings, captured, site, products)
    regions = regions_of(products)
    grids = Grids(regions)
    changes = [_weight(settings, captured, site, node) for node in products]
    _place(settings, captured, site, grids)
    captured.refresh()
    unknown: tuple[str, ...] = ("the ranges of what layers read and give",)
    found: list[str] = []
    if captured.concrete and site.calibration is not None:
        found += calibrate(captured, _some(settings, site.calibration))
        unknown = ()
    return Outcome((*changes, *attended), (*_saturation(settings), *_breaks(regions, grids), *notes, *found),
                   unknown=unknown)


def _qat(settings: Quantize, captured: Captured, site: Site, products: list[fx.Node]) -> Outcome:
    """Quantizers whose ranges move in training; calibration data, where there are some, say where they begin."""
    there, norms = set(captured.graph.nodes), norms_behind(captured, products)
    attended, said = _attention(settings, captured, site, products)
    regions = regions_of(products, norms)
    grids = Grids(regions)
    changes = [_weight(settings, captured, site, node, norms.get(node)) for node in products]
    for norm in norms.values():
        touch(norm, settings, site, "its factors are counted in where the weight before it is rounded")
    _place(settings, captured, site, grids)
    captured.refresh()
    unknown: tuple[str, ...] = ("the ranges of what layers read and give",)
    if captured.concrete and site.calibration is not None:
        calibrate(captured, _some(settings, site.calibration))
        unknown = ()
    made = [node for node in captured.graph.nodes if node not in there]
    moving = scheduled(settings, captured, site, [*made, *norms.values()])
    notes = (*_saturation(settings), *_breaks(regions, grids), *said, *moving.notes)
    return replace(moving, changes=(*changes, *attended), notes=notes, unknown=unknown)


def _weight_only(settings: Quantize, captured: Captured, site: Site, products: list[fx.Node]) -> Outcome:
    prepare(settings, captured, products)
    changes = tuple(_weight(settings, captured, site, node) for node in products)
    return Outcome(changes, tuple(_recovered(settings, captured, site)))


def _dynamic(settings: Quantize, captured: Captured, site: Site, products: list[fx.Node]) -> Outcome:
    """A quantizer of run-time ranges on what each layer reads; layers that read one value share it."""
    _fold(settings, captured, site, products)
    prepare(settings, captured, products)
    changes = [_weight(settings, captured, site, node) for node in products]
    scheme = Scheme(bits_of(settings), signed=False, symmetric=settings.symmetric)
    made: dict[fx.Node, fx.Node] = {}
    for node in products:
        source = arguments(node)["input"]
        if source not in made:
            path = f"{path_of(node)}.input_quantizer"
            put(captured, path, DynamicQuantizer(scheme, settings.activations == "per_token"))
            with captured.graph.inserting_before(node):
                made[source] = captured.graph.call_module(path, (source,))
            made[source].meta["path"] = path_of(node)
            touch(made[source], settings, site, f"rounds to {scheme.bits} bits, {settings.activations}",
                  was=(source.name,))
        node.replace_input_with(source, made[source])
    return Outcome(tuple(changes), (*_saturation(settings), *_recovered(settings, captured, site)))


def _recovered(settings: Quantize, captured: Captured, site: Site) -> list[str]:
    """Do on calibration data, where there are some, what the recovery keys ask for; returns what to note."""
    captured.refresh()
    from fxcompress.passes.quantize import RECOVERIES

    if not any(getattr(settings, key) for key in RECOVERIES) or not captured.concrete or site.calibration is None:
        return []
    return calibrate(captured, _some(settings, site.calibration))


_REWRITES: Mapping[str, Callable[[Quantize, Captured, Site, list[fx.Node]], Outcome]] = {
    "static": _static, "dynamic": _dynamic, "qat": _qat, "weight_only": _weight_only,
}


def _fold(settings: Quantize, captured: Captured, site: Site, products: list[fx.Node]) -> None:
    for node, norm in fold(captured, products):
        touch(node, settings, site, f"the batch norm {norm} folded into its weight", was=(norm.replace(".", "_"),))


def _saturation(settings: Quantize) -> Iterator[str]:
    """What to note of a CPU whose products of bytes saturate."""
    why = "this CPU has no VNNI instructions, its products of bytes saturate"
    if not saturates():
        return
    if settings.fit_pairs is None and fits_pairs(settings):
        yield f"scales of weights are such that no two neighbours sum to more than 128: {why}"
    elif bits_of(settings) + settings.weight_bits > SAFE_BITS and not fits_pairs(settings):
        yield (f"values in {bits_of(settings)} bits times weights in {settings.weight_bits}: {why} beyond {SAFE_BITS} "
               f"bits in all; layers where they would are computed in floats")
    elif settings.bits is None and bits_of(settings) < BYTE:
        yield f"values in {bits_of(settings)} bits: {why}"


def _some(settings: Quantize, data: Calibration) -> Calibration:
    return data if settings.calibrate is None else replace(data, samples=int(settings.calibrate.count))


# Kind -> the modes that have a simulation for it, and why there are no others.
_MODES_OF: Mapping[str, tuple[tuple[str, ...], str]] = {
    "linear": (("static", "dynamic", "qat", "weight_only"), ""),
    "conv2d": (("static", "qat", "weight_only"), "a convolution reads each value many times, and no kernel "
               "rounds as it reads"),
    "embedding": (("weight_only",), "an embedding looks weights up and multiplies nothing"),
}


_OTHERS = (("static",), "there is a simulation of that mode for convolutions of images and linear layers alone")


def _has_mode(settings: Quantize, node: fx.Node, normal: Normal) -> bool:
    modes, reason = _MODES_OF.get(kind_of(node), _OTHERS)
    if settings.mode in modes:
        return True
    normal.leave(node, f"`mode = {settings.mode}` isn't for {kind_of(node)}: {reason}")
    return False


def bits_of(settings: Quantize) -> int:
    """The bits of values: a byte, if the policy doesn't say; while weights are trained, as many as the products with
    any weights allow."""
    if settings.bits is not None:
        return settings.bits
    return min(BYTE, SAFE_BITS - settings.weight_bits) if saturates() and settings.mode == "qat" else BYTE


def fits_pairs(settings: Quantize) -> bool:
    """Whether the scales of weights are such that no sum of two products saturates 16 bits."""
    from fxcompress.passes.quantize import MEANT

    if settings.fit_pairs is not None:
        return settings.fit_pairs
    needed = saturates() and bits_of(settings) + settings.weight_bits > SAFE_BITS
    return needed and settings.mode in MEANT["fit_pairs"]


def _spec(spec: str | Call) -> tuple[str, tuple[float, ...]]:
    """An observer's name and its arguments: of `histogram`, of `percentile(99.9%)`."""
    return (spec.name, tuple(float(str(arg)) for arg in spec.args)) if isinstance(spec, Call) else (spec, ())


def _weight(settings: Quantize, captured: Captured, site: Site, node: fx.Node, norm: fx.Node | None = None) -> Change:
    """A quantizer on the weight, which counts in the `norm` behind the layer; its range is that of the values now."""
    source = expose(captured, node)
    name = weight_name(node)
    counted = norm_arguments(captured, node, norm) if norm is not None else ()
    value, *factors = (evaluated(captured.module, read) for read in (source, *counted))
    quantizer = weight_quantizer(settings, value, channels_of(node), norm)
    if captured.concrete:
        cover_weight(quantizer, quantizer.folded(value, *factors) if isinstance(quantizer, TrainedQuantizer) else value)
    path = f"{name}_quantizer"
    put(captured, path, quantizer)  # for a layer that is called twice the second is the same
    with captured.graph.inserting_before(node):
        call = captured.graph.call_module(path, (source, *counted))
    call.meta["path"] = path_of(node)
    node.replace_input_with(source, call)
    touch(call, settings, site, f"rounds to {settings.weight_bits} bits", was=(node.name,))
    touch(node, settings, site, f"weight in {settings.weight_bits} bits, {settings.granularity}")
    return Change(path_of(node), kind_of(node), "weight", "float", f"int{settings.weight_bits}", "selected")


def weight_quantizer(settings: Quantize, weight: Tensor, channels: int | None = 0,
                     norm: fx.Node | None = None) -> Quantizer:
    """A quantizer without a range for a weight whose outputs lie along the dimension `channels`, behind which `norm`
    stands. Of layers that multiply integers weights are symmetric."""
    symmetric = settings.mode != "weight_only" or settings.symmetric
    scheme = Scheme(settings.weight_bits, signed=True, symmetric=symmetric, narrow=symmetric,
                    pairs=fits_pairs(settings))
    observer, arguments_ = _spec(settings.weight_observer)
    if settings.granularity == "per_tensor" or channels is None:
        rows, axis = 1, None
    else:
        rows, axis = weight.shape[channels] * groups_of(weight[0].numel(), settings.group), channels
    if settings.mode == "static":
        return Quantizer(scheme, rows, axis, observer, arguments_, device=weight.device)
    if settings.mode == "qat":
        eps = float(module_of(norm).eps) if norm is not None else 0.0  # type: ignore[arg-type]
        return TrainedQuantizer(scheme, rows, axis, observer, arguments_, averages=False, eps=eps, device=weight.device)
    return WeightQuantizer(scheme, rows, axis, observer, arguments_, group=settings.group, device=weight.device)


def _place(settings: Quantize, captured: Captured, site: Site, grids: Grids) -> None:
    """One quantizer for each grid, called behind each of its sources."""
    paths: dict[int, str] = {}
    scheme = Scheme(bits_of(settings), signed=settings.dtype == "qint8", symmetric=settings.symmetric)
    ends = {region.end for region in grids.regions}
    readers = _readers(grids)
    leaving = {region.norm for region in grids.regions}
    for source, grid in grids.sources.items():
        if grid not in paths:
            paths[grid] = f"{_where(source, leaving)}quantizer"
            put(captured, paths[grid], _value_quantizer(settings, captured, scheme))
        with captured.graph.inserting_after(source):
            call = captured.graph.call_module(paths[grid], (source,))
        call.meta["path"] = path_of(source)
        for user in list(source.users):
            if user is not call and (source in ends or user in readers):
                user.replace_input_with(source, call)
        touch(call, settings, site, f"rounds to {bits_of(settings)} bits", was=(source.name,))


def _value_quantizer(settings: Quantize, captured: Captured, scheme: Scheme) -> Quantizer:
    """A quantizer without a range for values."""
    kind = TrainedQuantizer if settings.mode == "qat" else Quantizer
    name, arguments_ = _spec(settings.observer)
    device = next((tensor.device for tensor in captured.module.parameters()), None)
    return kind(scheme, observer=name, arguments=arguments_, device=device)


def _attention(settings: Quantize, captured: Captured, site: Site,
               products: list[fx.Node]) -> tuple[list[Change], list[str]]:
    """Quantizers on what attention multiplies, where that is asked for; and what to note."""
    if not settings.attention:
        return [], []
    changes: list[Change] = []
    left: dict[str, list[str]] = {}
    schemes, bits = _attention_schemes(settings), bits_of(settings)
    for node in attention.by_hand(captured, products):
        made = gather(captured, node)
        if isinstance(made, str):
            left.setdefault(f"the model writes it out, and {made}", []).append(label(node))
        else:
            touch(made, settings, site, "attention that was written out, as one call", was=(node.name,))
    captured.refresh()
    found = attention.fed_by(captured, products)
    for node in found:
        why = attention.why_not(node)
        if why is not None:
            left.setdefault(why, []).append(label(node))
            continue
        changes.append(Change(label(node), kind_of(node), "products", "float", f"int{bits}",
                              "its values are of a selected layer"))
        quantizers = {part: _value_quantizer(settings, captured, scheme) for part, scheme in schemes.items()}
        for made in attention.Writer(captured, node).write(quantizers):
            touch(made, settings, site, "attention written out, what it multiplies rounded", was=(node.name,))
    captured.refresh()
    notes = [f"attention stays in float ({few(names)}): {why}" for why, names in left.items()]
    if not found and not left:
        notes.append("`attention = true` changes nothing: no selected layer gives values to attention")
    if changes:
        notes.append(f"{len(changes)} attention{'s' * (len(changes) != 1)}: queries, keys, values and weights in "
                     f"{bits} bits, which exported files multiply as integers")
    if changes and schemes["query"].bits < bits:
        notes.append(f"queries and weights of attention in {schemes['query'].bits} bits: this CPU has no VNNI "
                     "instructions, its products of bytes saturate")
    return changes, notes


def _attention_schemes(settings: Quantize) -> Mapping[str, Scheme]:
    """Of what attention multiplies, by its part. Keys and values can't be scaled so that no sum of products saturates,
    as weights can: what they are multiplied by has fewer bits where it would."""
    bits = bits_of(settings)
    read = min(bits, SAFE_BITS - bits) if saturates() else bits
    return {"query": Scheme(read, signed=False), "key": Scheme(bits), "value": Scheme(bits),
            "weights": Scheme(read, signed=False, symmetric=False)}


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


def _where(source: fx.Node, leaving: set[fx.Node | None]) -> str:
    """The beginning of the path of a quantizer behind `source`: in its module, or at the top for one that is to leave
    the model."""
    if source.op == "call_module" and source not in leaving:
        return f"{source.target}."
    return f"{source.name}_"


def put(captured: Captured, path: str, quantizer: nn.Module) -> None:
    """Make `quantizer` the module at `path`."""
    owner, _, leaf = path.rpartition(".")
    captured.module.get_submodule(owner).add_module(leaf, quantizer)


def _breaks(regions: list[Region], grids: Grids) -> list[str]:
    """What each kernel will compute, and one line for each kind of value that floats give to a quantized layer: where
    integers begin."""
    fused = Counter(" + ".join(kind_of(node) for node in (region.product, region.norm, region.add, region.activation)
                               if node is not None) for region in regions)
    shown = ", ".join(f"{count} {kinds}" for kinds, count in fused.most_common())
    ends = {region.end for region in regions}
    found: dict[str, list[str]] = {}
    for source in grids.sources:
        if source not in ends and source.op != "placeholder" and not (
                averages(source) and data_of(source)[0] in grids.sources):
            found.setdefault(kind_of(source), []).append(path_of(source) or source.name)
    return [f"{len(regions)} region{'s' * (len(regions) != 1)} in integers, one kernel each: {shown}",
            *(f"integers begin anew behind {len(paths)} {kind} ({few(paths)}), which computes in float"
              for kind, paths in found.items())]
