"""`quantize`: against torch's fusion, exact integer arithmetic, and a model that was trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fxcompress
from fxcompress.diagnostics import PlanError
from fxcompress.engine import integers
from fxcompress.graph.ops import kind_of, module_of
from fxcompress.inspect import report
from fxcompress.nn import IntConv2d, IntLinear, Quantizer, engines, quantized_dtypes
from fxcompress.nn.integer import FLOATS, After, Grid
from fxcompress.nn.moving import IntAdaptiveMean, IntMaxPool2d, IntMean, ToInteger
from fxcompress.nn.pairs import saturates
from fxcompress.nn.scheme import Scheme
from fxcompress.passes import Quantize
from fxcompress.passes.shared.fold_norms import fold

POLICY = 'use "std/quant.fxc" { int8 }\npolicy small { quantize conv2d | linear as int8 { } }'
TOP = 127 if saturates() else 255


def settled(model: nn.Module, *shape: int) -> nn.Module:
    """The model in evaluation mode, its norms with the statistics of some data."""
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, *shape))
    return model.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def deployed(model: nn.Module, x: Tensor, policy: str = POLICY) -> tuple[fxcompress.Result, Any]:
    result = fxcompress.compile(policy, model, x, calibration=[x])
    return result, result.finalize(target="cpu")


def kinds(module: Any) -> list[str]:
    return [kind_of(node) for node in module.graph.nodes]


# Folding


def test_folding_is_that_of_torch() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1),
                                  nn.BatchNorm2d(4)), 3, 9, 9)
    captured = fxcompress.capture(model, noise(2, 3, 9, 9))
    folded = fold(captured, [node for node in captured.graph.nodes if kind_of(node) == "conv2d"])
    captured.refresh()
    assert [path for _, path in folded] == ["1", "4"] and "batchnorm2d" not in kinds(captured.module)
    for conv, norm in ((0, 1), (3, 4)):
        expected = fuse_conv_bn_eval(model[conv], model[norm])  # type: ignore[index]
        assert torch.allclose(captured.module.get_parameter(f"{conv}.weight"), expected.weight, atol=1e-6)
        assert torch.allclose(captured.module.get_parameter(f"{conv}.bias"), expected.bias, atol=1e-6)
    x = noise(2, 3, 9, 9, seed=5)
    assert torch.allclose(captured.module(x), model(x), atol=1e-5)


class Shared(nn.Module):
    """One convolution, two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.conv(x)) + self.two(self.conv(x + 1))


def test_what_is_shared_is_not_folded() -> None:
    model = settled(Shared(), 3, 5, 5)
    captured = fxcompress.capture(model, noise(2, 3, 5, 5))
    assert not fold(captured, [node for node in captured.graph.nodes if kind_of(node) == "conv2d"])


# Kernels


ACTIVATIONS: dict[str, tuple[tuple[float, ...], Callable[[Tensor], Tensor]]] = {
    "none": ((), lambda x: x), "relu": ((), F.relu), "hardtanh": ((0.0, 6.0), F.relu6), "hardswish": ((), F.hardswish),
    "swish": ((), F.silu),
}
GELU: dict[str, tuple[tuple[float, ...], Callable[[Tensor], Tensor]]] = {  # of linear layers alone
    "gelu": ((), F.gelu), "gelu_tanh": ((), lambda x: F.gelu(x, approximate="tanh")),
}


def exact(total: Tensor, after: After, other: Tensor | None, activation: Callable[[Tensor], Tensor]) -> Tensor:
    if other is not None and after.adds is not None:
        total = total + (other.double() - after.adds.zero_point) * after.adds.scale
    total = activation(total)
    if after.gives is None:
        return total
    return ((total / after.gives.scale).round() + after.gives.zero_point).clamp(after.gives.low, after.gives.high)


def check(found: Tensor, expected: Tensor, after: After) -> None:
    """Equal to rounding: a float32 sum may lie on the other side of a half in one of ten thousand."""
    if after.gives is None:
        assert found.dtype == torch.float32 and apart(found.double(), expected) < 1e-6
        return
    off = (found.double() - expected).abs()
    assert found.dtype == torch.uint8 and float(off.max()) <= 1 and float((off > 0).double().mean()) < 1e-3


@pytest.fixture(params=["few", "many", "many, on plain bytes"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So few products that FBGEMM computes them, where it can, and so many that oneDNN does, by either of its
    operators."""
    few = 1e12 if request.param == "few" else 0
    monkeypatch.setattr(engines, "FEW_PRODUCTS", few)
    monkeypatch.setattr(engines, "FEW_DEPTHWISE", few)
    if "bytes" in request.param:
        monkeypatch.setattr(quantized_dtypes, "available", lambda engine: engine == "fbgemm")


@pytest.fixture(params=["on plain bytes", "on quantized dtypes"])
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Additions by either of oneDNN's operators."""
    if "bytes" in request.param:
        monkeypatch.setattr(quantized_dtypes, "available", lambda engine: engine == "fbgemm")


# Of all numbers, of those that a byte keeps, and those of 7 bits: with both signs, and behind a ReLU.
GIVES = [None, Grid(0.37, 11), Grid(0.37, 0), Grid(0.9, 60, 0, 127), Grid(0.9, 0, 0, 127)]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("gives", GIVES)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("groups", "stride", "size"), [(1, 1, 3), (8, 2, 3), (2, 1, 1)])
def test_convolutions_in_exact_arithmetic(groups: int, stride: int, size: int, activation: str, gives: Grid | None,
                                          extreme: bool) -> None:
    torch.manual_seed(2)
    q = torch.randint(0, TOP + 1, (2, 8, 11, 11), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (16, 8 // groups, size, size), dtype=torch.int8)
    if extreme:
        q, weight = torch.full_like(q, TOP), torch.full_like(weight, 127)
    scale, bias, reads = torch.rand(16) * 0.02 + 1e-3, torch.randn(16), Grid(0.05, 7)
    numbers, function = ACTIVATIONS[activation]
    after = After(gives, activation=activation, numbers=numbers)
    layer = IntConv2d(weight.shape, True, reads, after, (stride, stride), (1, 1), (1, 1), groups)
    layer.fill(weight, scale, bias)
    total = F.conv2d(q.double() - 7, weight.double(), None, stride, 1, 1, groups)
    total = total * (0.05 * scale.double())[:, None, None] + bias.double()[:, None, None]
    expected = exact(total, after, None, function)
    for _ in range(2):  # what is prepared at the first call is used at the next
        check(layer(q.to(memory_format=torch.channels_last)), expected, after)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("top", "most"), [(255, 127), (127, 127), (255, 63)])
def test_depthwise_convolutions_in_exact_arithmetic(top: int, most: int) -> None:
    """FBGEMM's saturate where two products don't fit 16 bits, with VNNI instructions too."""
    weight = torch.full((8, 1, 3, 3), most, dtype=torch.int8)
    q = torch.full((2, 8, 9, 9), top, dtype=torch.uint8).to(memory_format=torch.channels_last)
    after = After(Grid(1.0, 0))
    layer = IntConv2d(weight.shape, False, Grid(0.05, 0, 0, top), after, (1, 1), (1, 1), (1, 1), 8)
    layer.fill(weight, torch.full((8,), 0.01), None)
    total = F.conv2d(q.double(), weight.double(), None, 1, 1, 1, 8) * 0.05 * float(torch.tensor(0.01))
    found = layer(q)
    if top < 255 or most < 127 or not saturates():  # these alone are asked of a CPU without VNNI
        check(found, exact(total, after, None, lambda x: x), after)


def test_bytes_in_a_chain_are_read_on_their_own_grid() -> None:
    """A layer remembers the quantized tensor that its bytes were; the next one may read them on another grid."""
    torch.manual_seed(6)
    q = torch.randint(0, TOP + 1, (1, 8, 6, 6), dtype=torch.uint8).to(memory_format=torch.channels_last)
    weight = torch.randint(-9, 10, (8, 8, 1, 1), dtype=torch.int8)
    gives = Grid(0.5, 3)

    def layer(reads: Grid) -> IntConv2d:
        made = IntConv2d(weight.shape, False, reads, After(gives), (1, 1), (0, 0), (1, 1), 1)
        made.fill(weight, torch.full((8,), 0.01), None)
        return made

    first = layer(Grid(0.05, 7))(q)
    for reads in (gives, Grid(0.25, 9)):
        total = F.conv2d(first.double() - reads.zero_point, weight.double()) * reads.scale * float(torch.tensor(0.01))
        check(layer(reads)(first), exact(total, After(gives), None, lambda x: x), After(gives))
        changed = first.clone().fill_(TOP)
        total = F.conv2d(changed.double() - reads.zero_point, weight.double()) * reads.scale * float(torch.tensor(0.01))
        check(layer(reads)(changed), exact(total, After(gives), None, lambda x: x), After(gives))


@pytest.mark.parametrize("channels", [5, 32, 64])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "ceil"), [
    (3, 2, 1, 1, False), (2, 2, 0, 1, True), (3, 1, 1, 2, False)])
def test_pooling_of_bytes(channels: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> None:
    """By torch's operator and by slices: the same as on floats."""
    q = torch.randint(0, 256, (2, channels, 13, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    q = q.to(memory_format=torch.channels_last)
    pool = IntMaxPool2d(*((number, number) for number in (kernel, stride, padding, dilation)), ceil)
    expected = F.max_pool2d(q.float(), kernel, stride, padding, dilation, ceil).to(torch.uint8)
    assert torch.equal(pool(q), expected) and torch.equal(pool._by_slices(q), expected)


@pytest.mark.parametrize("size", [7, 300])
@pytest.mark.parametrize("keepdim", [False, True])
def test_means_of_bytes_are_exact(size: int, keepdim: bool) -> None:
    q = torch.randint(0, 256, (2, 4, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))
    q[:, 0] = 255
    expected = (q.double().mean((2, 3), keepdim=keepdim) - 9) * 0.125
    found = IntMean(Grid(0.125, 9), keepdim)(q.to(memory_format=torch.channels_last))
    assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [(13, 11), (5, 4), (13, 3), (1, 1)])
def test_means_over_windows_stay_in_bytes(size: tuple[int, int]) -> None:
    q = torch.randint(0, 256, (2, 4, 13, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))
    found = IntAdaptiveMean(size)(q)
    assert found.dtype == torch.uint8
    assert torch.equal(found, F.adaptive_avg_pool2d(q.double(), size).round().to(torch.uint8))


def test_pooling_to_the_same_places_passes_integers() -> None:
    """As VGG's between its features and its classifier; images of another size are pooled in integers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((6, 6)), nn.Flatten(),
                          nn.Linear(288, 5)).eval()
    x, larger = noise(4, 3, 6, 6), noise(4, 3, 12, 12)
    result = fxcompress.compile("policy p { quantize conv2d | linear }", model, x, calibration=[x])
    module = result.finalize(target="cpu")
    kinds = [getattr(part, "fxc_kind", "") for part in module.modules()]
    assert kinds.count("to_integer") == 1 and "to_float" not in kinds and "int_adaptive_mean" in kinds
    with torch.no_grad():
        for images in (x, larger):
            assert apart(module(images), result.module.eval()(images)) < 0.02


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_images_become_bytes_in_the_order_of_products(channels: int) -> None:
    x = noise(2, channels, 6, 5)
    found = ToInteger(Grid(0.05, 30, 0, 127))(x)
    assert torch.equal(found, (torch.quantize_per_tensor(x, 0.05, 30, torch.quint8).int_repr()).clamp(0, 127))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("gives", GIVES)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("copies", [True, False])
def test_additions_in_exact_arithmetic(activation: str, gives: Grid | None, copies: bool) -> None:
    torch.manual_seed(3)
    engine = torch.backends.quantized.engine
    q = torch.randint(0, TOP + 1, (2, 8, 9, 9), dtype=torch.uint8).to(memory_format=torch.channels_last)
    weight = torch.randint(-127, 128, (8, 8, 3, 3), dtype=torch.int8)
    other: Tensor = torch.randint(0, 256, (2, 8, 9, 9), dtype=torch.uint8)
    adds = Grid(0.21, 99)
    if gives is None:
        other, adds = torch.randn(2, 8, 9, 9), Grid(1.0, 0)
    other = other.to(memory_format=torch.channels_last)
    _, function = ACTIVATIONS[activation]
    after = After(gives, adds, copies, activation)
    layer = IntConv2d(weight.shape, False, Grid(0.05, 7), after, (1, 1), (1, 1), (1, 1), 1)
    layer.fill(weight, torch.full((8,), 0.01), None)
    total = F.conv2d(q.double() - 7, weight.double(), None, 1, 1) * 0.05 * float(torch.tensor(0.01))
    was = other.clone()
    check(layer(q, other), exact(total, after, was, function), after)
    assert not copies or torch.equal(other, was)
    with quantized_dtypes._SETTING:  # as when another thread packs, or adds
        other = was.clone()
        check(layer(q, other), exact(total, after, was, function), after)
        assert not copies or torch.equal(other, was)
    assert torch.backends.quantized.engine == engine


def test_many_threads_at_once_compute_the_same() -> None:
    model, x = settled(torchvision.models.resnet18(num_classes=10), 3, 64, 64), noise(2, 3, 64, 64)
    _, small = deployed(model, x)
    with torch.inference_mode():
        expected = small(x)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: small(x), range(16)))
    assert all(torch.allclose(each, expected, atol=1e-2 * float(expected.abs().max())) for each in found)


@pytest.mark.parametrize("rows", [(5,), (2, 3)])
@pytest.mark.parametrize("gives", GIVES)
@pytest.mark.parametrize("activation", ["none", "relu", "hardswish", *GELU])
def test_linear_layers_in_exact_arithmetic(rows: tuple[int, ...], gives: Grid | None, activation: str) -> None:
    torch.manual_seed(4)
    q = torch.randint(0, TOP + 1, (*rows, 24), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (10, 24), dtype=torch.int8)
    scale, bias = torch.rand(10) * 0.02 + 1e-3, torch.randn(10)
    after = After(gives, activation=activation)
    layer = IntLinear(weight.shape, True, Grid(0.05, 7), after)
    layer.fill(weight, scale, bias)
    total = F.linear(q.double() - 7, weight.double()) * (0.05 * scale.double()) + bias.double()
    check(layer(q), exact(total, after, None, (ACTIVATIONS | GELU)[activation][1]), after)


@pytest.mark.parametrize("turned", ["neither", "what it reads", "what it adds"])
@pytest.mark.parametrize("gives", GIVES)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("copies", [False, True])
def test_linear_layers_that_add_in_exact_arithmetic(turned: str, gives: Grid | None, activation: str,
                                                    copies: bool) -> None:
    """In whatever order the numbers lie in memory: grid attention adds behind a transpose."""
    torch.manual_seed(4)
    reads, adds = torch.randint(0, TOP + 1, (2, 40, 24), dtype=torch.uint8), Grid(0.11, 50)
    other = torch.randint(0, 256, (2, 40, 10), dtype=torch.uint8)
    if gives is None:
        other, adds = torch.randn(2, 40, 10), FLOATS
    if turned != "neither":
        reads, other = (x.transpose(0, 1).contiguous().transpose(0, 1) if turned == which else x
                        for x, which in ((reads, "what it reads"), (other, "what it adds")))
    weight = torch.randint(-127, 128, (10, 24), dtype=torch.int8)
    scale, bias = torch.rand(10) * 0.02 + 1e-3, torch.randn(10)
    after = After(gives, adds, copies, activation)
    layer = IntLinear(weight.shape, True, Grid(0.05, 7), after)
    layer.fill(weight, scale, bias)
    total = F.linear(reads.double() - 7, weight.double()) * (0.05 * scale.double()) + bias.double()
    expected, kept = exact(total, after, other, ACTIVATIONS[activation][1]), other.clone()
    check(layer(reads, other), expected, after)
    assert not copies or torch.equal(other, kept)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_gelu_is_computed_by_the_linear_layer_before_it(approximate: str) -> None:
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(approximate), nn.Linear(32, 8)).eval()
    x = noise(80, 16)
    result, small = deployed(model, x)
    assert kinds(small).count("gelu") == 0 and kinds(small).count("to_integer") == 1
    assert [layer.after.activation for layer in small.modules() if isinstance(layer, IntLinear)] == [
        "gelu" if approximate == "none" else "gelu_tanh", "none"]
    assert apart(small(x), result.module.eval()(x)) < 0.01 and apart(small(x), model(x)) < 0.03


def test_a_gelu_behind_a_convolution_stays_in_floats() -> None:
    """oneDNN's integer convolutions have none."""
    torch.manual_seed(8)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 1)).eval(), noise(2, 3, 9, 9)
    _, small = deployed(model, x)
    assert kinds(small).count("gelu") == 1 and kinds(small).count("int_conv2d") == 2
    assert apart(small(x), model(x)) < 0.03


# Where integers go


@pytest.mark.parametrize(("name", "layers", "changes"), [
    ("resnet18", 21, 2), ("mobilenet_v2", 53, 2), ("vgg11", 11, 2), ("squeezenet1_1", 26, 1)])
def test_integers_are_not_left_between_layers(name: str, layers: int, changes: int) -> None:
    """Every layer is in integers; floats become integers at the input, and behind an average pooling alone."""
    model = settled(torchvision.models.get_model(name, num_classes=10), 3, 64, 64)
    x = noise(2, 3, 64, 64)
    result, small = deployed(model, x)
    found = kinds(small)
    assert found.count("int_conv2d") + found.count("int_linear") == layers
    assert found.count("to_integer") == changes and not {"conv2d", "linear", "batchnorm2d", "quantizer"} & set(found)
    assert apart(small(x), result.module.eval()(x)) < 0.05
    assert apart(small(x), model(x)) < 0.12
    assert any("in integer kernels" in note for note in result.notes)


class Branches(nn.Module):
    """Concatenation, pooling, chunks, and a residual whose other side is read again later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.last, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.left(x) + x)
        z = torch.cat([x, F.max_pool2d(F.relu(self.right(y)), 3, 1, 1)], 1)
        a, b = self.last(z).chunk(2, 1)
        return self.head(torch.cat([a, b], 1).flatten(1))


def test_branches_share_grids() -> None:
    torch.manual_seed(0)
    model, x = Branches().eval(), noise(4, 3, 4, 4)
    result, small = deployed(model, x)
    found = kinds(small)
    assert found.count("to_integer") == 1 and "to_float" not in found
    added = next(module for module in small.modules() if isinstance(module, IntConv2d) and module.after.adds)
    assert added.after.copies  # `x` is read again by the concatenation
    assert apart(small(x), result.module.eval()(x)) < 0.03
    grids = {module_of(node) for node in result.captured.graph.nodes if kind_of(node) == "quantizer"
             and module_of(node).axis is None}
    assert len(grids) == 4  # the input; x with what is pooled; y; what the head reads


def test_a_selection_leaves_the_rest_in_float() -> None:
    torch.manual_seed(0)
    model, x = Branches().eval(), noise(4, 3, 4, 4)
    result, small = deployed(model, x, "policy some { quantize linear }")
    found = kinds(small)
    assert (found.count("int_linear"), found.count("packed_conv2d"), found.count("to_integer")) == (1, 4, 1)
    assert apart(small(x), result.module.eval()(x)) < 1e-5


# What it is worth


def test_accuracy_on_digits(tmp_path: Path) -> None:
    """A small network trained on real digits keeps its accuracy in integers; saved, copied and loaded it gives the very
    same."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(6):
        for part in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    model.eval()
    result = fxcompress.compile(POLICY, model, x[:64], calibration=list(x[:256].split(64)))
    small = result.finalize(target="cpu")

    def accuracy(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(x[1200:]).argmax(1) == y[1200:]).double().mean())

    assert accuracy(model) > 0.9 and accuracy(small) >= accuracy(model) - 0.005
    fxcompress.save(small, tmp_path / "small")
    for other in (fxcompress.load(tmp_path / "small"), copy.deepcopy(small)):
        assert torch.equal(other(x[1200:]), small(x[1200:]))
    dense, bytes_ = (sum(t.numel() * t.element_size() for t in module.state_dict().values())
                     for module in (model, small))
    assert bytes_ < 0.3 * dense
    shown = report(small, before=fxcompress.capture(model, x[:2]))
    assert shown.after.sizes.params == sum(p.numel() for p in small.parameters()) == 9_930


def test_later_calibration_and_other_observers() -> None:
    model, x = settled(torchvision.models.resnet18(num_classes=10), 3, 32, 32), noise(4, 3, 32, 32)
    result = fxcompress.compile("policy p { quantize conv2d { observer = percentile(99.99%), weight_observer = mse, "
                                "granularity = per_tensor, symmetric = true } }", model, x)
    with pytest.raises(PlanError) as error:
        result.finalize(target="cpu")
    (found,) = error.value.diagnostics
    assert found.code == "FXC0572" and "x_quantizer" in str(found.notes)
    result.calibrate([x])
    assert apart(result.finalize(target="cpu")(x), model(x)) < 0.3


def test_masked_and_thinned_models() -> None:
    """Zeros stay zeros, and what was removed stays away."""
    model, x = settled(torchvision.models.resnet18(num_classes=10), 3, 32, 32), noise(4, 3, 32, 32)
    result, small = deployed(model, x, """policy p {
        remove channels(conv2d) { ratio = 25% }
        mask conv2d { sparsity = 50% }
        quantize conv2d | linear
    }""")
    assert apart(small(x), result.module.eval()(x)) < 0.05
    layer = small.get_submodule("layer1.0.conv1")
    assert isinstance(layer, IntConv2d) and layer.weight.shape[0] == 48
    assert float((layer.weight == 0).double().mean()) >= 0.5


def test_gradients_pass_through() -> None:
    """The straight-through estimate: 1 inside of the range, 0 outside."""
    quantizer = Quantizer(Scheme(4, signed=False, symmetric=False))
    quantizer.cover(torch.tensor([-1.0]), torch.tensor([2.0]))
    x = torch.tensor([-3.0, -0.5, 0.0, 1.5, 4.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


# Refusals


def test_a_kernel_that_departs_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = settled(torchvision.models.resnet18(num_classes=10), 3, 32, 32), noise(4, 3, 32, 32)
    fill = IntConv2d.fill

    def wrong(self: IntConv2d, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        fill(self, weight, scale * (3 if weight.shape[:2] == (128, 128) else 1), bias)

    monkeypatch.setattr(IntConv2d, "fill", wrong)
    result = fxcompress.compile(POLICY, model, x, calibration=[x])
    with pytest.raises(PlanError) as error:
        result.finalize(target="cpu")
    (found,) = error.value.diagnostics
    assert found.code == "FXC0573" and "layer2_0_conv2" in str(found.notes)
    assert integers.TOLERANCE < 1


def test_refusals() -> None:
    x = noise(4, 3, 4, 4)
    model = Branches().eval()
    result = fxcompress.compile("policy p { mask conv2d { sparsity = 50% } }", model, x)
    with pytest.raises(PlanError, match="FXC0574"):
        result.calibrate([x])
    with pytest.raises(PlanError, match="FXC0571"):
        fxcompress.compile(POLICY, model, x, calibration=[x * float("nan")])
    twice = Quantize().apply(fxcompress.capture(model, x), "linear")
    with pytest.raises(PlanError, match="FXC0370"):
        Quantize().apply(twice, "linear")


class Around(nn.Module):
    """A residual around one convolution: what is added is what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.third(F.relu(x + self.second(x)))


def test_a_sum_isnt_written_into_what_is_still_multiplied() -> None:
    torch.manual_seed(0)
    x = noise(4, 3, 16, 16)
    result, module = deployed(Around().eval(), x)
    with torch.no_grad():
        assert apart(module(x), result.module.eval()(x)) < 1e-3
