"""The normal form that `quantize` wants: attention as linear layers, paddings as settings of their convolutions.

What is selected comes out as calls that a quantizer can be put on the weight of; what can't be is named with its
reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import OPS, arguments, call, kind_of, module_of, op_of, path_of
from fxcompress.graph.provenance import touch
from fxcompress.graph.rules.attention_rewrite import write_out
from fxcompress.graph.select import label
from fxcompress.graph.site import Site
from fxcompress.passes.shared.masking import parameter_of
from fxcompress.passes.shared.weights import expose, of_parameters, unexposable

if TYPE_CHECKING:
    from fxcompress.passbase import Pass
    from fxcompress.passes.quantize import Quantize

ATTENTION, ADDMM = "multihead_attention", "addmm"
SHOWN = 4  # names in a line of a report
_CONVS: Mapping[str, int] = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass
class Normal:
    """What is left to quantize, and what isn't: `left` has the names of layers by the reason why they stay in float,
    `apart` those with a padding in front that couldn't become their own, `notes` what else should be known."""

    products: list[fx.Node] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def leave(self, node: fx.Node, why: str) -> None:
        """`node` stays in float."""
        self.left.setdefault(why, []).append(label(node))

    def lines(self) -> list[str]:
        """One line for each reason, and the notes."""
        found = [f"{few(names)} stay{'s' * (len(names) == 1)} in float: {why}" for why, names in self.left.items()]
        if self.apart:
            found.append(f"the padding in front of {few(self.apart)} stays apart: it isn't the same on both sides")
        return [*found, *self.notes]


def few(names: list[str]) -> str:
    """`a, b`, or `a, b, c, d and 8 more`."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def normalize(settings: Quantize, captured: Captured, site: Site) -> Normal:
    """Bring what is selected into the normal form, in place; facts are up to date afterwards.

    `nn.MultiheadAttention` becomes its projections and `scaled_dot_product_attention`, `addmm` on parameters a linear
    layer; zero padding in front of a convolution, and padding that it has by name (`same`), becomes its numbers, where
    that is the same.
    """
    normal, there = Normal(), set(captured.graph.nodes)
    nodes = list(_written_out(captured, site.nodes, normal, settings.attention))
    captured.refresh()
    _mark(settings, captured, site, there, "written as linear layers")
    there = set(captured.graph.nodes)
    for node in nodes:
        why = _why_not(captured, node)
        if why is None:
            why = _pad_inside(settings, captured, site, node, normal)
        if why is None:
            normal.products.append(node)
        else:
            normal.leave(node, why)
    captured.refresh()
    _mark(settings, captured, site, there, "a setting became an argument")
    _hint(captured, site, normal)
    return normal


def _mark(settings: Pass, captured: Captured, site: Site, there: set[fx.Node], detail: str) -> None:
    """Say of the nodes that weren't `there` how they came to be."""
    for node in captured.graph.nodes:
        if node not in there:
            touch(node, settings, site, detail, was=(path_of(node).replace(".", "_"),))


def _written_out(captured: Captured, nodes: Iterable[fx.Node], normal: Normal, rounds: bool) -> Iterable[fx.Node]:
    """`nodes`, with the projections of attention modules in the place of these, and linear layers in that of `addmm`s
    on parameters. `rounds` says whether attention itself will be rounded."""
    count = 0
    for node in list(nodes):
        if kind_of(node) != ATTENTION:
            if kind_of(node) == ADDMM:
                _linear(captured, node)
            yield node
            continue
        module: Any = module_of(node)
        count += 1
        yield from write_out(captured, node, module, module.num_heads, module.head_dim)
    if count:
        normal.notes.append(f"{count} {ATTENTION} written out: the projections are linear layers" + (
            "" if rounds else ", the product of queries, keys and values computes in float"))


def _linear(captured: Captured, node: fx.Node) -> None:
    """Make `addmm` on parameters, b + x·W (transformers' `Conv1D`), a linear layer on the transposed weight."""
    values = arguments(node)
    bias, weight = values["input"], values["mat2"]
    shape = getattr(bias.meta.get("fxc"), "shape", ()) if isinstance(bias, fx.Node) else ()
    fits = (values["beta"], values["alpha"]) == (1, 1) and len(shape) == 1 and _computes_in_float32(node)
    if not (fits and of_parameters(bias) and of_parameters(weight)):
        return
    with captured.graph.inserting_before(node):
        turned = call(captured.graph, "transpose", weight, 0, 1)
    turned.meta["path"] = path_of(node)
    node.target = OPS["linear"].target
    node.args, node.kwargs = OPS["linear"].normal({"input": values["mat1"], "weight": turned, "bias": bias})


def _why_not(captured: Captured, node: fx.Node) -> str | None:
    """Why `node` can't be quantized, or None."""
    if kind_of(node) == ADDMM:
        return "it isn't a product with parameters, plus a bias"
    if node.op == "call_module" and (why := unexposable(node)) is not None:
        return why
    value = arguments(node).get("weight")
    if isinstance(value, fx.Node) and kind_of(value) == "quantizer":
        return "it is quantized already"
    if parameter_of(node, "weight") is None and not of_parameters(value):
        return "the weight depends on more than parameters"
    return None if _computes_in_float32(node) else "it doesn't compute in float32"


def _computes_in_float32(node: fx.Node) -> bool:
    return getattr(node.meta.get("fxc"), "dtype", None) is torch.float32


def weight_name(node: fx.Node) -> str:
    """How the weight that `node` reads is called: a parameter, masked or not, or, where it is computed from parameters
    (the rows of a packed projection, standardised filters), what it would be called at the layer's path."""
    name, root = parameter_of(node, "weight"), node.graph.owning_module
    if name is not None:
        return name
    try:
        home = root.get_submodule(path_of(node)) if root is not None and path_of(node) else None
    except AttributeError:
        home = None
    if home is None:
        return f"{node.name}_weight"
    taken = "weight_quantizer" in home._modules  # another product of the same module has it
    return f"{path_of(node)}.{f'{node.name}_weight' if taken else 'weight'}"


def channels_of(node: fx.Node) -> int | None:
    """The dimension of the weight of `node` that its output channels lie along; None where they lie along none."""
    if not kind_of(node).startswith("conv_transpose"):
        return 0
    return 1 if arguments(node)["groups"] == 1 else None


# Padding


def _pad_inside(settings: Pass, captured: Captured, site: Site, node: fx.Node, normal: Normal) -> str | None:
    """Make the padding of a convolution numbers of its own. Returns why it can't be computed in integers, or None."""
    rank = _CONVS.get(kind_of(node))
    if rank is None:
        return None
    values = arguments(node)
    if values.get("padding_mode", "zeros") != "zeros":
        expose(captured, node)  # that is a `pad` of its own from now on
        return None
    given, source = values["padding"], values["input"]
    own = _numbers(values, rank)
    if own is None:
        return f"the padding `{given}` is not the same on both sides"
    outer: tuple[int, ...] | None = None
    if isinstance(source, fx.Node) and kind_of(source) == "pad" and _is_zeros(arguments(source)):
        outer = _symmetric(arguments(source), rank)
        if outer is None:
            normal.apart.append(label(node))
    if outer is None and not isinstance(given, str):
        return None
    expose(captured, node)
    values, op = arguments(node), op_of(node)
    assert op is not None
    if outer is not None and isinstance(source, fx.Node):
        values["input"] = arguments(source)["input"]
        touch(node, settings, site, f"the padding {source.name} became its own", was=(source.name,))
    values["padding"] = tuple(a + b for a, b in zip(own, outer or (0,) * rank, strict=True))
    node.args, node.kwargs = op.normal(values)
    return None


def _numbers(values: Mapping[str, Any], rank: int) -> tuple[int, ...] | None:
    """The padding of a convolution on each side of each dimension; None where the sides differ."""
    padding = values["padding"]
    if padding == "valid":
        return (0,) * rank
    if padding != "same":
        return _many(padding, rank)
    kernel = _kernel_of(values["weight"])[-rank:]
    total = [dilation * (size - 1) for dilation, size in zip(_many(values["dilation"], rank), kernel, strict=True)]
    return None if any(each % 2 for each in total) else tuple(each // 2 for each in total)


def _kernel_of(weight: Any) -> tuple[int, ...]:
    return tuple(weight.meta["fxc"].shape if isinstance(weight, fx.Node) else weight.shape)


def _many(value: Any, rank: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * rank if len(numbers) == 1 else numbers


def _is_zeros(pad: Mapping[str, Any]) -> bool:
    return pad["mode"] == "constant" and not pad["value"] and all(isinstance(n, int) for n in pad["pad"])


def _symmetric(pad: Mapping[str, Any], rank: int) -> tuple[int, ...] | None:
    """The zeros that a `pad` of zeros puts on both sides of each of the last `rank` dimensions; None where the sides
    differ, or it pads others."""
    sides = list(zip(pad["pad"][::2], pad["pad"][1::2], strict=True))
    sides += [(0, 0)] * (rank - len(sides))
    if any(a != b or a < 0 for a, b in sides) or any(a for a, _ in sides[rank:]):
        return None
    return tuple(a for a, _ in reversed(sides[:rank]))


def _hint(captured: Captured, site: Site, normal: Normal) -> None:
    """Say so where all linear layers were asked for and those inside of attention modules weren't."""
    chosen = set(site.nodes)
    rest = [node for node in captured.graph.nodes if kind_of(node) == ATTENTION]
    linear = [node for node in captured.graph.nodes if node.op == "call_module" and kind_of(node) == "linear"]
    if rest and linear and chosen.issuperset(linear):
        normal.notes.append(f"{len(rest)} {ATTENTION} compute in float: `linear | {ATTENTION}` selects them too")
