"""The table of a quantized model against formulas written out, counts by brute force, and the bytes of state dicts."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fxcompress
from fxcompress.backends.int8 import Lowered
from fxcompress.diagnostics import ArtifactError
from fxcompress.engine import quantization as engine
from fxcompress.engine.quantization_rows import FLOAT, Error, LayerRow, Quantization, Rounding
from fxcompress.graph.calibration import Calibration
from fxcompress.graph.ops import kind_of
from fxcompress.inspect import html_page, plots, quantization_of, report
from fxcompress.inspect.quantization import HEADING, Shown, decibels, duration, share
from fxcompress.nn import Quantizer
from fxcompress.nn.observers import Observer
from fxcompress.nn.scheme import Scheme
from fxcompress.passbase import OBSERVERS

Golden = Callable[[str, str], None]
POLICY = 'policy small { quantize (conv2d | linear) - last(linear) { bits = 7 bits, observer = mse } }'


class Net(nn.Module):
    """A branch that is added, a pooling between, and two linear layers, of which the policy leaves the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.hidden = nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.body(x) + x)
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net().train()
    with torch.no_grad():
        for seed in range(3):
            net(noise(8, 3, 10, 10, seed=seed))
    return net.eval()


BATCHES = [noise(4, 3, 10, 10, seed=11), noise(3, 3, 10, 10, seed=12)]


@pytest.fixture(scope="module")
def result(model: nn.Module) -> fxcompress.Result:
    return fxcompress.compile(POLICY, model, BATCHES[0][:2], calibration=BATCHES)


@pytest.fixture(scope="module")
def deployed(result: fxcompress.Result) -> Any:
    return result.finalize(target="cpu")


@pytest.fixture(scope="module")
def found(deployed: Any) -> Quantization:
    read = quantization_of(deployed)
    assert read is not None
    return read


@pytest.fixture(scope="module")
def artifact(deployed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "small"
    fxcompress.save(deployed, folder)
    return folder


def row(found: Quantization, layer: str) -> LayerRow:
    (one,) = [row for row in found.rows if row.layer == layer]
    return one


def rounded(part: Rounding, x: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, int]:
    """x on its grid, and how many of its numbers lie beyond, number by number in Python."""
    low, high = (0, 2**part.bits - 1) if not part.signed else (1 - 2 ** (part.bits - 1), 2 ** (part.bits - 1) - 1)
    values, count = np.empty_like(x), 0
    for place, value in np.ndenumerate(x):
        step, middle = scale[place], zero[place]
        whole = round(float(np.float32(value) * np.float32(1 / step))) + int(middle)
        count += not low <= whole <= high
        values[place] = (min(max(whole, low), high) - middle) * step
    return values, count


def sqnr(x: np.ndarray, q: np.ndarray) -> float:
    x, q = x.astype(np.float64), q.astype(np.float64)
    return 10 * math.log10((x**2).sum() / ((x - q) ** 2).sum())


def quantizer_behind(result: fxcompress.Result, name: str) -> Quantizer:
    (module,) = [module for path, module in result.module.named_modules() if path == name]
    assert isinstance(module, Quantizer)
    return module


def folded(model: nn.Module) -> nn.Conv2d:
    """The first convolution with its norm in it, by torch."""
    net = copy.deepcopy(model)
    return fuse_conv_bn_eval(net.get_submodule("stem"), net.get_submodule("norm"))  # type: ignore[type-var]


def test_what_a_layer_reads_is_held_against_the_formula(model: nn.Module, result: fxcompress.Result,
                                                        found: Quantization) -> None:
    """The stem reads the images, and `body` what the stem gives in float: all batches together."""
    images = torch.cat(BATCHES)
    with torch.no_grad():
        inside = torch.relu(folded(model)(images))
    for layer, x in (("stem", images), ("body", inside)):
        part = row(found, layer).reads
        assert part is not None and (part.bits, part.signed, part.symmetric, part.granularity) == (
            7, False, False, "per_tensor")
        scale = (part.high - part.low) / 127
        zero = round(-part.low / scale)
        x_ = x.numpy()
        q, beyond = rounded(part, x_, np.full(x_.shape, scale, np.float32), np.full(x_.shape, zero))
        assert part.error.sqnr == pytest.approx(sqnr(x_, q), abs=0.02)  # the scale comes back from a rounded range
        assert part.clipped == pytest.approx(beyond / x_.size, abs=2 / x_.size)
        assert part.error.signal == pytest.approx(float((x_.astype(np.float64) ** 2).sum()), rel=1e-5)
    assert row(found, "stem").reads.clipped > 0  # type: ignore[union-attr]  # `mse` clips normal noise


def test_weights_are_held_against_the_formula(model: nn.Module, result: fxcompress.Result,
                                              found: Quantization) -> None:
    with torch.no_grad():
        weight = folded(model).weight.numpy()
    part = row(found, "stem").weight
    assert part is not None and (part.bits, part.signed, part.symmetric, part.granularity, part.clipped) == (
        8, True, True, "per_channel", 0)
    scale = np.abs(weight).max((1, 2, 3), keepdims=True) / np.float32(127)
    q, beyond = rounded(part, weight, np.broadcast_to(scale, weight.shape), np.zeros(weight.shape))
    assert not beyond and part.error.sqnr == pytest.approx(sqnr(weight, q), abs=0.01)
    assert part.high == -part.low == pytest.approx(float(np.abs(weight).max()), rel=1e-5)


def test_what_is_clipped_is_counted(result: fxcompress.Result) -> None:
    """A grid with its zero point inside, and numbers on the edges: half a step beyond the last integer still rounds to
    it (to even), more doesn't."""
    quantizer = Quantizer(Scheme(4, signed=False, symmetric=False))
    quantizer.cover(torch.tensor([-1.0]), torch.tensor([14.0]))
    assert (float(quantizer.scale), int(quantizer.zero_point)) == (1.0, 1)
    x = torch.tensor([-9.0, -1.51, -1.5, -1.49, -1.0, 0.0, 13.9, 14.0, 14.49, 14.51, 30.0])
    wanted = [round(value) + 1 not in range(16) for value in x.tolist()]
    assert engine.clipped(quantizer, x).flatten().tolist() == wanted and sum(wanted) == 5


def test_what_a_layer_gives_has_the_rounding_before_it(model: nn.Module, result: fxcompress.Result,
                                                       found: Quantization) -> None:
    """The result against the model as it was, in torch; the simulation in the module that `compile` gives."""
    images = torch.cat(BATCHES)
    with torch.no_grad():
        exact, simulated = model(images).numpy(), result.module(images).numpy()
    assert found.gives.sqnr == pytest.approx(sqnr(exact, simulated), abs=0.01)
    assert row(found, "head").gives == found.gives
    stem = row(found, "stem")
    with torch.no_grad():
        inside = torch.relu(folded(model)(images))
        part = result.module.get_submodule("stem.weight_quantizer")(folded(model).weight)
        first = next(module for module in result.module.modules() if isinstance(module, Quantizer)
                     and module.axis is None and float(module.scale * (0 - module.zero_point)) == pytest.approx(
                         stem.reads.low))  # type: ignore[union-attr]
        grid = row(found, "body").reads
        assert grid is not None
        given = torch.relu(nn.functional.conv2d(first(images), part, folded(model).bias, padding=1))
        step = grid.high / 127
        given = (given / step).round().clamp(0, 127) * step
    assert stem.gives is not None and stem.gives.sqnr == pytest.approx(sqnr(inside.numpy(), given.numpy()), abs=0.1)


def test_sizes_are_those_of_the_state_dicts(model: nn.Module, deployed: Any, found: Quantization) -> None:
    state = deployed.state_dict()
    for layer in ("stem", "body", "hidden", "head"):
        held = [tensor for name, tensor in state.items() if name.startswith(f"{layer}.")]
        assert row(found, layer).bytes[1] == sum(tensor.numel() * tensor.element_size() for tensor in held)
        before = sum(4 * p.numel() for p in model.get_submodule(layer).parameters())
        assert row(found, layer).bytes[0] == before + (4 * 8 if layer == "stem" else 0)  # the folded norm's bias
    assert row(found, "head").bytes == (112, 112)


def test_layers_left_in_float_say_why(found: Quantization, model: nn.Module) -> None:
    assert [item.layer for item in found.rows] == ["stem", "body", "hidden", "head"]
    head = row(found, "head")
    assert (head.kernel, head.why, head.reads, head.weight) == (FLOAT, "no rule selects it", None, None)
    assert all(item.kernel != FLOAT and item.seconds is not None and item.seconds > 0 for item in found.rows[:3])

    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.matmul(x, x.transpose(1, 2)))

    x = noise(3, 4, 5)
    read = quantization_of(fxcompress.compile("policy p { quantize linear { } }", Gram(), x,
                                              calibration=[x]).finalize(target="cpu"))
    assert read is not None
    assert [(item.kernel == FLOAT, item.why) for item in read.rows[:1]] == [
        (True, "there is no integer kernel for matmul")]


def test_quantizers_without_a_range_show_that_of_the_values(model: nn.Module) -> None:
    """One that takes its grid from what it reads, row by row, in the place of the one behind the images."""

    class Rows(nn.Module):
        fxc_kind = "quantizer"
        scheme, per_token = Scheme(8, signed=False, symmetric=False), True

        def forward(self, x: Tensor) -> Tensor:
            low, high = (end.clamp(*bounds) for end, bounds in zip(
                x.aminmax(dim=-1, keepdim=True), ((None, 0), (0, None)), strict=True))
            scale = (high - low) / 255
            zero = (-low / scale).round()
            return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale

    captured = fxcompress.compile(POLICY, model, BATCHES[0], calibration=BATCHES).captured
    (call,) = [node for node in captured.graph.nodes if kind_of(node) == "quantizer"
               and node.args[0].op == "placeholder"]
    captured.module.set_submodule(str(call.target), Rows())
    part = row(engine.measure(captured, captured, Lowered(), Calibration(BATCHES)), "stem").reads
    assert part is not None and (part.granularity, part.clipped, part.bits) == ("per_token", 0, 8)
    images = torch.cat(BATCHES)
    assert (part.low, part.high) == (pytest.approx(float(images.min())), pytest.approx(float(images.max())))
    assert part.error.sqnr == pytest.approx(sqnr(images.numpy(), Rows()(images).numpy()), abs=0.01)
    kinds = [Quantizer(Scheme()), Quantizer(Scheme(), 4, 0)]
    assert [engine.granularity(one) for one in kinds] == ["per_tensor", "per_channel"]
    kinds[1].group = 32
    assert engine.granularity(kinds[1]) == "per_group(32)"


def test_reasons_of_passes_are_told() -> None:
    rows = tuple(LayerRow(name, "conv2d", kernel, "no rule", (4, 4)) for name, kernel in (
        ("a", FLOAT), ("b", FLOAT), ("c", "int_conv2d")))
    told = Quantization(1, 1, 0.0, Error(1, 0), rows, ()).explained(
        ["a stays in float: it costs 12 dB", "c stays in float: not so", "something else"])
    assert [item.why for item in told.rows] == ["it costs 12 dB", "no rule", "no rule"]


def test_measuring_stops_at_enough_samples(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            for number, batch in enumerate(BATCHES):
                seen.append(number)
                yield batch

    monkeypatch.setattr(engine, "SAMPLES", 4)
    held = fxcompress.compile(POLICY, model, BATCHES[0][:2], calibration=Loader())
    seen.clear()
    read = quantization_of(held.finalize(target="cpu"))
    assert read is not None and read.samples == 4 and 1 not in seen


def test_histograms_hold_every_number(result: fxcompress.Result, found: Quantization) -> None:
    counts = {(item.layer, item.what): item for item in found.histograms}
    assert set(counts) == {(layer, what) for layer in ("stem", "body", "hidden") for what in ("reads", "weight")}
    images = torch.cat(BATCHES).numpy()
    item = counts["stem", "reads"]
    wanted = np.histogram(images, bins=engine.BINS, range=(images.min(), images.max()))[0]
    assert sum(item.counts) == images.size and np.abs(wanted - np.array(item.counts)).sum() <= 4  # on the edges
    assert item.low == pytest.approx(float(images.min())) and item.high == pytest.approx(float(images.max()))
    assert sum(counts["body", "weight"].counts) == 8 * 8 * 9 and counts["body", "weight"].reach == (-127, 127)
    assert [found.histograms[0].layer] == [min(found.rows, key=lambda one: one.own).layer]


def test_infinite_numbers_are_passed_over_and_infinite_results_are_not() -> None:
    total = engine._Sum()
    total.add(torch.tensor([3.0, -math.inf, 4.0]), torch.tensor([3.0, 7.0, 3.0]))
    assert total.error == Error(pytest.approx(25.0), pytest.approx(1.0))
    total.add(torch.tensor([1.0]), torch.tensor([math.inf]))
    assert math.isfinite(total.noise) and total.error.sqnr < -700
    json.dumps(total.noise, allow_nan=False)


def test_ratios_that_have_no_number() -> None:
    assert Error(1, 0).sqnr == Error(0, 0).sqnr == math.inf and Error(0, 1).sqnr == -math.inf
    assert Error(1e-300, 1e300).sqnr == pytest.approx(-6000)
    assert Error(100, 1).sqnr == pytest.approx(20) and Error(1, 100).sqnr == pytest.approx(-20)
    assert [decibels(None), decibels(Error(2, 0)), decibels(Error(1000, 1))] == ["-", "exact", "30.0"]


def test_numbers() -> None:
    assert [duration(1.234e-3), duration(56.7e-6), duration(2.5), duration(0.9996e-3)] == [
        "1.23 ms", "56.7 µs", "2.5 s", "1 ms"]
    assert [share(0.0), share(1e-6), share(0.00123), share(1.0)] == ["0", "<0.01%", "0.12%", "100.00%"]


# Shown


def normal(text: str, folder: Path) -> str:
    """Without what differs from run to run and from CPU to CPU: times, libraries, rounding of the kernels."""
    text = text.replace(str(folder), folder.name)
    text = re.sub(r"[\d.]+ (µs|ms|s) for 2 samples, \d+%", "<time> for 2 samples, <share>", text)
    text = re.sub(r" *[\d.]+ (µs|ms|s)(?=  |$)", "  <time>", text, flags=re.MULTILINE)
    text = re.sub(r" +time +kernel +why", "  time  kernel  why", text)
    text = re.sub(r"(int_\w+) \(\w+\).*", r"\1", text)
    return re.sub(r"(<time>) +", r"\1  ", text)


def table_of(text: str) -> str:
    return text[text.index("3 of 4 layers"):text.index("SQNR in dB against float")]


def test_table(artifact: Path, golden: Golden) -> None:
    golden("inspect/quantization.txt", table_of(normal(report(artifact).show(), artifact)))


def test_the_artifact_says_what_the_model_says(artifact: Path, found: Quantization) -> None:
    assert quantization_of(fxcompress.load(artifact)) == found
    data = json.loads(json.dumps(report(artifact).to_json()))["quantization"]
    assert data == found.to_json() and data["rows"][0]["reads"]["bits"] == 7


def test_the_page_has_the_table(artifact: Path) -> None:
    page = html_page(artifact)
    assert all(f"<th>{word}</th>" in page or f"<th class=n>{word}</th>" in page for word in HEADING)
    assert "3 of 4 layers" in page and "no rule selects it" in page


def test_schemes_stand_in_the_rows_where_they_differ(found: Quantization) -> None:
    def one(bits: int) -> Rounding:
        return Rounding(bits, True, True, "per_channel", -1.0, 1.0, 0.0, Error(100, 1))

    rows = tuple(LayerRow(f"l{bits}", "linear", "int_linear", "", (8, 2), None, None, one(bits)) for bits in (8, 4))
    table = Shown(Quantization(1, 1, 0.0, Error(1, 1), rows, ())).table()
    assert [cells[5] for cells in table.rows] == ["qint8 symmetric per_channel [-1, 1]",
                                                  "qint4 symmetric per_channel [-1, 1]"]
    uniform = Shown(Quantization(1, 1, 0.0, Error(1, 1), rows[:1], ()))
    assert uniform.table().rows[0][5] == "[-1, 1]" and "weights in qint8 symmetric per_channel" in uniform.text()


def test_models_without_have_no_table(model: nn.Module) -> None:
    masked = fxcompress.compile("policy p { mask linear { sparsity = 50% } }", model, BATCHES[0]).finalize(target="cpu")
    assert quantization_of(masked) is None and "SQNR" not in report(masked).show()
    assert report(masked).to_json()["quantization"] is None


@pytest.mark.parametrize("damage", [
    lambda data: data.update(samples="many"), lambda data: data["rows"][0].pop("why"),
    lambda data: data["rows"][0]["reads"].update(bits=0), lambda data: data["rows"][0].update(bytes=[1]),
    lambda data: data["rows"][0].update(extra=1), lambda data: data["histograms"][0].update(what="all"),
    lambda data: data["histograms"][0].update(low=1.0, high=-1.0),
    lambda data: data["histograms"][0].update(high=1e300)])
def test_a_damaged_table_is_a_diagnostic(artifact: Path, damage: Callable[[Any], object]) -> None:
    module = fxcompress.load(artifact)
    damage(module.meta["fxcompress"]["report"]["quantization"])
    with pytest.raises(ArtifactError, match="FXC0604"):
        report(module)


# Pictures


def test_pictures(artifact: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    drawn = plots(artifact, tmp_path / "deep" / "pictures")
    assert [path.name for path in drawn] == ["sqnr.png", "sqnr.svg", "histograms.png", "histograms.svg"]
    for path in drawn[::2]:
        picture = imread(path)
        assert min(picture.shape[:2]) > 500 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100
    depth, histograms = (path.read_text(encoding="utf-8") for path in drawn[1::2])
    assert all(f">{layer}</text>" in depth for layer in ("stem", "body", "hidden", "head")) and "left in float" in depth
    assert ">body: weight, in steps</text>" in histograms and "% clipped</text>" in histograms
    again = plots(artifact, tmp_path / "again")
    assert [path.read_bytes() for path in again[1::2]] == [path.read_bytes() for path in drawn[1::2]]


def test_bars_are_red_where_numbers_are_clipped(found: Quantization) -> None:
    """The numbers outside of the range stand in the red steps, all others in the blue ones."""
    from fxcompress.inspect.quantization_plots import worst

    figure = worst(found)
    (item,) = [item for item in found.histograms if (item.layer, item.what) == ("stem", "reads")]
    (axes,) = [axes for axes in figure.axes if axes.get_title("left") == "stem: what it reads"]
    inside, beyond = ([int(value) for value in step.get_data().values] for step in axes.patches if hasattr(
        step, "get_data"))
    assert [one + other for one, other in zip(inside, beyond, strict=True)] == list(item.counts)
    width = (item.high - item.low) / len(item.counts)
    middles = [item.low + (place + 0.5) * width for place in range(len(item.counts))]
    wanted = sum(count for count, at in zip(item.counts, middles, strict=True)
                 if not item.reach[0] <= at <= item.reach[1])
    assert sum(beyond) == wanted > 0
    ends = sorted(line.get_xdata()[0] for line in axes.lines)
    assert ends == pytest.approx(item.reach)


def test_pictures_of_one_layer_with_nothing_to_clip(tmp_path: Path) -> None:
    x = noise(4, 4)
    small = fxcompress.compile("policy p { quantize linear { observer = minmax } }", nn.Sequential(nn.Linear(4, 4)), x,
                               calibration=[x]).finalize(target="cpu")
    assert len(plots(small, tmp_path)) == 4
    assert "nothing clipped" in (tmp_path / "histograms.svg").read_text(encoding="utf-8")


def test_names_of_strangers_are_plain_text(artifact: Path, tmp_path: Path) -> None:
    module = fxcompress.load(artifact)
    data = module.meta["fxcompress"]["report"]["quantization"]
    for item in (data["rows"][0], data["histograms"][0], data["histograms"][1]):
        item["layer"] = "$\\frac{<b>$\x1b[31m"
    plots(module, tmp_path)
    pages = (tmp_path / "sqnr.svg").read_text(encoding="utf-8"), html_page(module)
    assert all("\x1b" not in page and "<b>" not in page and "frac{" in page for page in pages)
    assert "\x1b" not in report(module).show()


def test_layers_called_twice_have_a_row_each() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(torch.relu(self.one(x))))

    x = noise(4, 4)
    read = quantization_of(fxcompress.compile('policy p { quantize linear[name ~ "two"] { } }', Twice(), x,
                                              calibration=[x]).finalize(target="cpu"))
    assert read is not None and [item.layer for item in read.rows] == ["one", "one_1", "two"]


def test_the_command_draws(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fxcompress import commands

    assert commands.inspect(artifact, plots=tmp_path) == 0
    out, err = capsys.readouterr()
    assert "3 of 4 layers" in out and err.count("drawn: ") == 4


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_function_is_told_of_each_batch(model: nn.Module) -> None:
    held = fxcompress.compile(POLICY, model, BATCHES[0], calibration=BATCHES)
    told: list[tuple[int, int | None]] = []
    held.calibrate(BATCHES, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]

    class Stream:
        def __iter__(self) -> Any:
            return iter(BATCHES)

    told.clear()
    held.calibrate(Stream(), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, None), (2, None)]


def test_a_bar_on_a_terminal_and_nothing_elsewhere(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    held = fxcompress.compile(POLICY, model, BATCHES[0], calibration=BATCHES)
    plain, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stderr", plain)
    held.calibrate(BATCHES, progress=True)
    assert plain.getvalue() == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    held.calibrate(BATCHES)
    assert terminal.getvalue() == ""
    held.calibrate(BATCHES, progress=True)
    assert "calibrating" in terminal.getvalue() and "100%" in terminal.getvalue()


FACTORY = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

data = [torch.randn(2, 3, 8, 8) for _ in range(3)]
"""


def test_the_command_shows_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxcompress import commands

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    Path("zoo.py").write_text(FACTORY)
    Path("p.fxc").write_text("policy p {\n    input input: f32[N, 3, 8, 8]\n    quantize conv2d { }\n}\n")
    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert commands.compile(Path("p.fxc"), "zoo.py:net", calibration="zoo.py:data") == 0
        assert ("calibrating" in stream.getvalue()) is shown and "error" not in stream.getvalue()


def test_data_are_kept_for_finalize_without_the_bar(model: nn.Module) -> None:
    held = fxcompress.compile(POLICY, model, BATCHES[0], calibration=BATCHES)
    told: list[int] = []
    held.calibrate(BATCHES[:1], progress=lambda done, total: told.append(done))
    kept = held._executor.calibration
    assert isinstance(kept, Calibration) and kept.watch is None
    read = quantization_of(held.finalize(target="cpu"))
    assert told == [1] and read is not None and read.samples == 4


# Observers of others


def test_others_add_observers(model: nn.Module) -> None:
    @fxcompress.register_observer("tenth")
    class Tenth(Observer):
        """A tenth of what was seen."""

        def range(self, scheme: Any) -> tuple[Tensor, Tensor]:
            return self.low / 10, self.high / 10

    try:
        images = torch.cat(BATCHES)
        held = fxcompress.compile("policy p { quantize conv2d { bits = 7 bits, observer = tenth } }", model, BATCHES[0],
                                  calibration=BATCHES)
        read = quantization_of(held.finalize(target="cpu"))
        assert read is not None
        part = row(read, "stem").reads
        assert part is not None and OBSERVERS["tenth"] is Tenth
        assert part.high - part.low == pytest.approx(float(images.max() - images.min()) / 10, rel=1e-5)
        assert part.clipped > 0.5
    finally:
        OBSERVERS.unregister("tenth")
    with pytest.raises(fxcompress.PolicyError):
        fxcompress.parse("policy p { quantize conv2d { observer = tenth } }")
