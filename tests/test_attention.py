"""`attention = true`: rounded queries, keys, values and weights, against torch's own attention and exact integers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress
from fxcompress.backends import cuda
from fxcompress.backends.runtimes import RUNTIMES
from fxcompress.diagnostics import PolicyError
from fxcompress.graph.captured import Captured
from fxcompress.graph.ops import kind_of
from fxcompress.inspect import quantization_of, report
from fxcompress.nn import Quantizer, RoundedAttention, TrainedQuantizer
from fxcompress.nn.attention import rounding
from fxcompress.passes.shared import quantizing
from fxcompress.passes.shared.attention import attentions
from fxcompress.passes.shared.switching import without_rounding

ALL = "policy p { quantize linear | multihead_attention { attention = true%s } }"
LENGTH, WIDTH, HEADS = 6, 16, 2


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def kinds(graph: Captured | Any) -> list[str]:
    return [kind_of(node) for node in graph.graph.nodes]


class Attends(nn.Module):
    """Projections, attention in one of the ways it is asked for, and a way out; the values are of another width."""

    def __init__(self, mask: str = "none", **more: Any) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.value = nn.Linear(WIDTH, WIDTH)
        self.mask, self.more = mask, more

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.heads(layer(x)) for layer in (self.query, self.key, self.value))
        keep = (torch.arange(x.shape[1], device=x.device) < x.shape[1] - 2)[None]
        mask = {"bool": keep, "float": torch.where(keep, 0.0, -1e9)}.get(self.mask)
        made = F.scaled_dot_product_attention(query, key, value, mask, is_causal=self.mask == "causal", **self.more)
        return self.out(made.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def compressed(model: nn.Module, x: Tensor, more: str = "", train: bool = False) -> fxcompress.Result:
    return fxcompress.compile(ALL % more, model.train(train), x, calibration=[x])


def notes(result: fxcompress.Result) -> str:
    return "\n".join(note for step in result.plan.steps for note in step.notes)


def integers(module: nn.Module, part: str) -> Quantizer:
    found, = (quantizer for name, quantizer in module.named_modules() if name.endswith(f"_{part}_quantizer"))
    assert isinstance(found, Quantizer)
    return found


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_unrounded_it_is_torchs_own(mask: str, scale: float | None) -> None:
    torch.manual_seed(0)
    model, x = Attends(mask, scale=scale).eval(), noise(3, LENGTH, WIDTH)
    result = compressed(model, x)
    assert "scaled_dot_product_attention" not in kinds(result.captured)
    with without_rounding(result.captured):
        assert torch.allclose(result.module(x), model(x), atol=1e-6)
    assert 0 < apart(result.module(x), model(x)) < 0.05


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_products_are_those_of_exact_integers(batch: int, length: int, width: int, masks: bool, seed: int) -> None:
    """The lowered module under `rounding` against torch's own integers, multiplied in 64 bits."""
    torch.manual_seed(seed)
    model = nn.Sequential(Attends("bool" if masks and length > 2 else "none")).eval()
    x = noise(batch, length, WIDTH, seed=seed) * width
    result = compressed(model, x)
    module = result.module
    grids = {part: integers(module, part) for part in ("query", "key", "value", "weights")}

    def whole(part: str, floats: Tensor) -> tuple[Tensor, float]:
        grid = grids[part]
        dtype = torch.qint8 if grid.scheme.signed else torch.quint8
        found = torch.quantize_per_tensor(floats, float(grid.scale), int(grid.zero_point), dtype).int_repr().long()
        return found - int(grid.zero_point), float(grid.scale)

    found, = attentions(result.captured)
    seen: dict[str, Tensor] = {}

    class See(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    See(module).run(x)
    query, key, value = ([node.args[0] for node in found.rounded.values()][place] for place in range(3))
    (q, s), (k, t) = whole("query", seen[str(query)]), whole("key", seen[str(key)])
    scores = (q @ k.transpose(-2, -1)).double() * (s * t * found.scale)
    if found.mask is not None:
        scores = scores.masked_fill(~seen[found.mask.name], -torch.inf)
    (p, s), (v, t) = whole("weights", scores.softmax(-1).float()), whole("value", seen[str(value)])
    expected = (p @ v).double() * (s * t)
    step = s * float(v.abs().max()) * t  # a weight at the edge between two integers may be either
    assert float((seen[found.end.name] - expected).abs().max()) <= 1.01 * step
    assert float(((seen[found.end.name] - expected).abs() > 1e-4 * step).double().mean()) < 0.2


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_files_compute_the_simulation_in_integers(mask: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attends(mask).eval(), noise(4, LENGTH, WIDTH)
    result = compressed(model, x)
    small = result.finalize(target="cpu")
    with torch.no_grad():
        simulated = result.module.eval()(x)
        step = float(simulated.max() - simulated.min()) / 255
        for file, runtime in (("small.onnx", "onnxruntime"), ("small.xml", "openvino")):
            exported = fxcompress.export(small, tmp_path / file)
            assert exported.gap is not None and exported.gap < 0.02
            found, = RUNTIMES[runtime](exported.path)([x])
            assert float((found - simulated).abs().max()) < 2 * step, runtime
    multiplied = [node for node in onnx.load(str(tmp_path / "small.onnx")).graph.node if node.op_type == "MatMul"]
    assert len(multiplied) == 4 + 2
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), options, providers=["CPUExecutionProvider"])
    left = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert "MatMul" not in left, "every product is of integers"


def test_torch_computes_it_unrounded_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attends("causal").eval(), noise(4, LENGTH, WIDTH)
    result = compressed(model, x)
    small = result.finalize(target="cpu")
    layer, = (part for part in small.modules() if isinstance(part, RoundedAttention))
    assert kinds(small).count("rounded_attention") == 1 and "softmax" not in kinds(small)
    q, k, v = (noise(2, 5, 4, seed=seed) for seed in range(3))
    assert torch.equal(layer(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale))
    with torch.no_grad(), rounding(small):
        assert apart(small(x), result.module.eval()(x)) < 1e-2
    assert "1 attention in float here, unrounded" in report(small).show()
    fxcompress.save(small, tmp_path / "small")
    loaded = fxcompress.load(tmp_path / "small")
    assert torch.equal(loaded(x), small(x)) and torch.equal(copy.deepcopy(small)(x), small(x))
    with rounding(loaded), rounding(small):
        assert torch.equal(loaded(x), small(x))


def test_compiled_and_as_a_program_it_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attends("bool").eval(), noise(4, LENGTH, WIDTH)
    result = compressed(model, x)
    small = result.finalize(target="cpu")
    exported = fxcompress.export(small, tmp_path / "small.pt2")
    assert exported.gap is not None and exported.gap < 1e-2
    with torch.no_grad():
        assert apart(result.finalize(target="cpu", compile=True)(x), small(x)) < 1e-2


def test_the_simulation_is_saved_with_its_grids(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attends("bool").eval(), noise(4, LENGTH, WIDTH)
    result = compressed(model, x)
    fxcompress.save(result.module, tmp_path / "model")
    assert torch.equal(fxcompress.load(tmp_path / "model").eval()(x), result.module.eval()(x))


def test_modules_are_written_out_and_drop_in_training() -> None:
    """A packed projection gives queries, keys and values: each has a grid of its own."""
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.5, batch_first=True), noise(4, LENGTH, WIDTH)
    result = compressed(model, x, train=True)
    assert kinds(result.captured).count("matmul") == 2
    assert "multihead_attention written out: the projections are linear layers\n" in notes(result) + "\n"
    assert len({id(integers(result.module, part)) for part in ("query", "key", "value", "weights")}) == 4
    first, second = result.module.train()(x), result.module(x)
    assert not torch.equal(first, second), "weights are dropped"
    evaluated = result.module.eval()(x)
    assert torch.equal(evaluated, result.module(x)) and apart(evaluated, model.eval()(x)) < 0.1
    small = result.finalize(target="cpu")
    assert kinds(small).count("rounded_attention") == 1 and apart(small(x), model(x)) < 0.1


class ByHand(Attends):
    """Attention written out in one of the ways that models do."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.drop = way, nn.Dropout(0.5)
        self.register_buffer("hides", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Any:
        query, key, value = (self.heads(layer(x)) for layer in (self.query, self.key, self.value))
        if self.way == "three dimensions":
            query, key, value = (part.flatten(0, 1) for part in (query, key, value))
            weights = torch.softmax(torch.bmm(query * 0.5, key.transpose(1, 2)), dim=-1)
            return self.out(torch.bmm(weights, value).unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2))
        if self.way == "another einsum":
            weights = self.weights(torch.einsum("bhid,bhjd->bhij", query, key))
            return self.out(torch.einsum("bhji,bhjd->bhid", weights, value).transpose(1, 2).flatten(2))
        if self.way == "einsum":
            weights = self.weights(torch.einsum("b h i d, b h j d -> b h i j", query, key))
            return self.out(torch.einsum("...ij,...jd->...id", weights, value).transpose(1, 2).flatten(2))
        turned = key.permute(0, 1, 3, 2) if self.way == "permuted" else key.transpose(-2, -1)
        weights = self.weights(query @ turned)
        made = self.out((weights @ value).transpose(1, 2).flatten(2))
        return (made, weights) if self.way == "gives its weights" else made

    def weights(self, scores: Tensor) -> Tensor:
        hides: Any = self.hides
        if self.way == "another dimension":
            return scores.softmax(2)
        if self.way == "more between":
            return scores.tanh().softmax(-1)
        if self.way == "scaled behind the mask":
            return ((scores + hides * -1e4) * 0.5).softmax(-1)
        scores = 0.25 * scores if self.way == "permuted" else scores / 8**0.5
        scores = {"filled": lambda: scores.masked_fill(hides, float("-inf")),
                  "filled by little": lambda: scores.masked_fill(hides, -100.0),
                  "added": lambda: scores + hides[None, None] * torch.finfo(torch.float32).min,
                  "added first": lambda: hides * -1e4 + scores}.get(self.way, lambda: scores)()
        weights = F.softmax(scores, dim=3, dtype=torch.float32).to(scores.dtype)
        if self.way == "drops by a module":
            return self.drop(weights)
        if self.way == "drops by mode":
            return F.dropout(weights, 0.5 if self.training else 0.0, training=self.training)
        return F.dropout(weights, 0.5, self.way == "always drops" or self.training)


FORMS = ("plain", "permuted", "einsum", "three dimensions", "filled", "added", "added first", "drops by a module",
         "drops by mode")


@pytest.mark.parametrize("way", FORMS)
def test_attention_that_a_model_writes_out(way: str) -> None:
    torch.manual_seed(0)
    model, x = ByHand(way).eval(), noise(3, LENGTH, WIDTH)
    result = compressed(model, x)
    assert "1 attention: queries, keys, values and weights in 8 bits" in notes(result)
    with without_rounding(result.captured):
        assert torch.allclose(result.module.eval()(x), model(x), atol=1e-6)
        assert torch.equal(result.module.train()(x), result.module(x)) == (way == "three dimensions"), "weights drop"
    expected = result.module.eval()(x)
    small = result.finalize(target="cpu")
    assert kinds(small).count("rounded_attention") == 1 and apart(small(x), model(x)) < 0.05
    with rounding(small):
        assert apart(small(x), expected) < 1e-3
    assert set(model.state_dict()) <= set(result.module.state_dict())


@pytest.mark.parametrize(("way", "why"), [
    ("gives its weights", "is read elsewhere too"),
    ("another dimension", "its softmax isn't over the keys, in float32"),
    ("another einsum", "between its products is more than"),
    ("more between", "between its products is more than a scale, a mask, a softmax and a dropout"),
    ("scaled behind the mask", "between its products is more than"),
    ("filled by little", "masked scores become -100.0: the scores would not be lost in it"),
    ("always drops", "its dropout acts in evaluation too")])
def test_what_is_written_out_otherwise_stays_and_is_named(way: str, why: str) -> None:
    torch.manual_seed(0)
    model, x = ByHand(way).eval(), noise(3, LENGTH, WIDTH)
    result = compressed(model, x)
    assert "attention stays in float (softmax): the model writes it out, and " in notes(result) and why in notes(result)
    assert "scaled_dot_product_attention" not in kinds(result.captured) and not list(attentions(result.captured))


def test_attention_of_layers_that_are_not_selected_stays_as_it_is() -> None:
    model, x = ByHand("plain").eval(), noise(3, LENGTH, WIDTH)
    result = fxcompress.compile('policy p { quantize "query" { attention = true } }', model, x, calibration=[x])
    assert "scaled_dot_product_attention" not in kinds(result.captured) and "matmul" in kinds(result.captured)


class Grouped(Attends):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.heads(layer(x)) for layer in (self.query, self.key, self.value))
        made = F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], enable_gqa=True)
        return self.out(made.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("model", "why"), [
    (Attends(dropout_p=0.1), "attention stays in float (scaled_dot_product_attention): its dropout acts in evaluation"),
    (Grouped(), "attention stays in float (scaled_dot_product_attention): its queries have more heads"),
    (nn.Sequential(nn.Linear(WIDTH, WIDTH)), "`attention = true` changes nothing: no selected layer gives values"),
])
def test_what_is_not_rounded_is_said(model: nn.Module, why: str) -> None:
    torch.manual_seed(0)
    result = compressed(model.eval(), noise(2, LENGTH, WIDTH))
    assert why in notes(result)
    assert not list(attentions(result.captured))
    assert not [name for name in result.module.state_dict() if "weights_quantizer" in name]


def test_the_layer_of_the_values_decides() -> None:
    torch.manual_seed(0)
    model, x = Attends().eval(), noise(2, LENGTH, WIDTH)
    for selected, count in (("value", 1), ("query", 0), ("out", 0)):
        policy = f'policy p {{ quantize "{selected}" {{ attention = true }} }}'
        result = fxcompress.compile(policy, model, x, calibration=[x])
        assert len(list(attentions(result.captured))) == count, selected
    assert not list(attentions(fxcompress.compile("policy p { quantize linear }", model, x, calibration=[x]).captured))


def test_the_plan_and_the_table_show_it() -> None:
    torch.manual_seed(0)
    model, x = Attends().eval(), noise(4, LENGTH, WIDTH)
    result = compressed(model, x)
    change, = (change for step in result.plan.steps for change in step.changes if change.what == "products")
    assert (change.path, change.before, change.after) == ("scaled_dot_product_attention", "float", "int8")
    assert "1 attention: queries, keys, values and weights in 8 bits" in notes(result)
    small = result.finalize(target="cpu")
    measured = quantization_of(small)
    assert measured is not None
    rows = {row.layer: row for row in measured.rows}
    for name, lowest in (("scaled_dot_product_attention_scores", -5), ("scaled_dot_product_attention_result", 0)):
        row = rows[name]
        assert row.kernel == "float" and "no product of two tensors of integers" in row.why
        assert row.reads is not None and row.reads.error.sqnr > 20 and row.reads.low < lowest + 5


def test_fewer_bits_where_products_of_bytes_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "saturates", lambda: True)
    torch.manual_seed(0)
    model, x = Attends().eval(), noise(4, LENGTH, WIDTH)
    result = compressed(model, x)
    bits = {part: integers(result.module, part).scheme.bits for part in ("query", "key", "value", "weights")}
    assert bits == {"query": 7, "key": 8, "value": 8, "weights": 7}
    assert "queries and weights of attention in 7 bits: this CPU has no VNNI" in notes(result)
    top = {part: integers(result.module, part).scheme.high for part in ("query", "weights")}
    assert all(2 * high * 128 < 2**15 for high in top.values())


def test_ranges_are_trained() -> None:
    torch.manual_seed(0)
    model, x = Attends(), noise(4, LENGTH, WIDTH)
    policy = "policy p { phase all over steps 0..4 { quantize linear { mode = qat, attention = true } } }"
    result = fxcompress.compile(policy, model, x)
    optimizer = torch.optim.SGD(result.module.parameters(), 0.1)
    assert isinstance(integers(result.module, "weights"), TrainedQuantizer)
    for seed in range(4):
        result.module.train()(noise(4, LENGTH, WIDTH, seed=seed)).square().mean().backward()
        optimizer.step()
        result.step()
    small = result.finalize(target="cpu")
    layer, = (part for part in small.modules() if isinstance(part, RoundedAttention))
    assert layer.weights.scale == pytest.approx(float(integers(result.module, "weights").scale))
    assert 1 / 255 / 20 < layer.weights.scale < 1.01 / 255 and layer.query.scale > 0
    with pytest.raises(PolicyError, match="`attention` says nothing in `mode = dynamic`"):
        fxcompress.parse("policy p { quantize linear { mode = dynamic, attention = true } }")


def test_layers_in_float_leave_attention_rounded() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Attends(), nn.Linear(WIDTH, WIDTH)).eval(), noise(8, LENGTH, WIDTH)
    result = compressed(model, x, ", mixed = 40%")
    assert all(integers(result.module, part).on for part in ("query", "key", "value", "weights"))
    assert not all(quantizer.on for quantizer in result.module.modules() if isinstance(quantizer, Quantizer))
    small = result.finalize(target="cpu")
    assert kinds(small).count("rounded_attention") == 1


def test_for_a_gpu_it_is_torchs_own_again() -> None:
    torch.manual_seed(0)
    model, x = Attends("float", scale=0.3).eval(), noise(4, LENGTH, WIDTH)
    result = compressed(model, x)
    lowered, done = result.captured.copy(), cuda.OnCuda()
    lowered.module.eval()
    cuda.lower(lowered, done)
    lowered.refresh()
    found = kinds(lowered)
    assert found.count("scaled_dot_product_attention") == 1 and "matmul" not in found and "softmax" not in found
    assert "1 attention in half precision: torch's kernel takes no integers" in done.notes
    with torch.no_grad():
        assert apart(lowered.module(x).float(), model(x)) < 0.1


def test_counts_of_multiplications_stay() -> None:
    torch.manual_seed(0)
    model, x = Attends().eval(), noise(4, LENGTH, WIDTH)
    result = compressed(model, x)
    small = result.finalize(target="cpu")
    per_sample = 4 * LENGTH * WIDTH * WIDTH + 2 * LENGTH * LENGTH * WIDTH
    for graph in (result.captured.graph, small.graph):
        assert sum(node.meta["fxc"].macs for node in graph.nodes) == 4 * per_sample
