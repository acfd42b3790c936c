"""Saved and loaded: the same outputs, weights, gradients, modes and memory, without the model's source."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.backends.artifact import from_files, to_files
from fxcompress.backends.artifact_json import Cursor
from fxcompress.backends.artifact_modules import CLASSES, build, describe
from fxcompress.backends.artifact_ops import why_not
from fxcompress.diagnostics import ArtifactError
from fxcompress.graph.modules import MODULES
from fxcompress.graph.ops import OPS
from fxcompress.passes import Mask, Remove

CPU = torch.device("cpu")


def again(module: fx.GraphModule) -> fx.GraphModule:
    return from_files(to_files(module), CPU)


def assert_same(loaded: fx.GraphModule, saved: fx.GraphModule) -> None:
    """Keys, tensors, modes, gradients wanted, facts and provenance."""
    assert list(loaded.state_dict()) == list(saved.state_dict())
    for (name, one), two in zip(loaded.state_dict().items(), saved.state_dict().values(), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two), name
        assert one.stride() == two.stride(), name
    wants = {name: p.requires_grad for name, p in loaded.named_parameters(remove_duplicate=False)}
    assert wants == {name: p.requires_grad for name, p in saved.named_parameters(remove_duplicate=False)}
    assert {n: m.training for n, m in loaded.named_modules()} == {n: m.training for n, m in saved.named_modules()}
    for one, two in zip(loaded.graph.nodes, saved.graph.nodes, strict=True):
        assert (one.op, one.name, str(one.target)) == (two.op, two.name, str(two.target))
        for key in ("fxc", "origins", "path", "source"):
            assert one.meta.get(key) == two.meta.get(key), (one.name, key)


def vit_small() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10),
    "shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=10),
    "regnet_y_400mf": lambda: torchvision.models.regnet_y_400mf(num_classes=10),  # module names with a dash
    "vit": vit_small,
}


@pytest.fixture(scope="module", params=MODELS)
def captured(request: pytest.FixtureRequest) -> fxcompress.Captured:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    return fxcompress.capture(model, (torch.randn(2, 3, 32, 32),))


def test_outputs_gradients_and_state_are_equal(captured: fxcompress.Captured) -> None:
    saved = captured.module
    loaded = again(saved)
    assert_same(loaded, saved)
    assert loaded.code == saved.code
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for mode in (False, True):
        results = []
        for module in (saved, loaded):
            module.train(mode)
            module.zero_grad()
            torch.manual_seed(2)  # of dropout
            out = module(x)
            out.square().mean().backward()
            results.append((out, {name: p.grad for name, p in module.named_parameters()}))
        (out, grads), (other, other_grads) = results
        assert torch.equal(out, other)
        assert all(torch.equal(grads[name], other_grads[name]) for name in grads)
    saved.eval()


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16)
    model = transformers.BertForMaskedLM(config).eval()  # its decoder is tied to its embedding
    ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("way", ["export", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_transformer_with_tied_weights_and_a_dict_of_outputs(way: Any) -> None:
    torch.manual_seed(0)
    model, inputs = bert()
    saved = fxcompress.graph.capture(model, inputs, way=way).module
    loaded = again(saved)
    assert_same(loaded, saved)
    out, other = saved(**inputs), loaded(**inputs)
    assert out.keys() == other.keys() == {"logits"}
    assert torch.equal(out["logits"], other["logits"])
    assert torch.allclose(other["logits"], model(**inputs).logits, atol=1e-5)
    shared = [name for name, p in loaded.named_parameters(remove_duplicate=False)
              if p is loaded.get_parameter("bert.embeddings.word_embeddings.weight")]
    assert len(shared) == 2  # tied, not only equal


def test_resnet_by_export() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    saved = fxcompress.graph.capture(model, (torch.randn(2, 3, 32, 32),), way="export").module
    loaded = again(saved)
    assert_same(loaded, saved)
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(loaded(x), saved(x))


class Everything(nn.Module):
    """Tied weights, a frozen one, buffers of all kinds, a parameter of the root, several inputs and outputs, None."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.rnn = nn.LSTM(4, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("ones", torch.ones(4, dtype=torch.float16))
        self.register_buffer("yes", torch.tensor([True, False, True, True]))

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], scale: float = 1.0) -> dict[str, Any]:
        y = self.second(torch.relu(self.first(x))) * self.scale + self.table
        z, (h, _) = self.rnn(y)
        a, _ = self.attention(y, y, y, need_weights=False)
        chosen = torch.where(self.yes, y, pair[0]) + self.ones.to(torch.float32)
        return {"y": y[:, :-1, ..., None], "both": (z, [h, a]), "chosen": chosen + float("-inf") * 0 + pair[1],
                "none": y.masked_fill(y > 3, float("-inf"))}


def test_odd_parts_of_models() -> None:
    torch.manual_seed(0)
    model = Everything()
    model.rnn.eval()
    x, pair = torch.randn(2, 3, 4), (torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    saved = fxcompress.capture(model, (x, pair)).module
    loaded = again(saved)
    assert_same(loaded, saved)
    assert loaded.get_parameter("second.weight") is loaded.get_parameter("first.weight")
    assert not loaded.get_parameter("scale").requires_grad
    assert "table" not in loaded.state_dict() and torch.equal(loaded.get_buffer("table"), torch.arange(4.0))
    saved.eval(), loaded.eval()
    out, other = saved(x, pair), loaded(x, pair)
    assert out.keys() == other.keys() and type(other["both"]) is tuple and type(other["both"][1]) is list
    assert torch.equal(out["y"], other["y"]) and torch.equal(out["both"][1][1], other["both"][1][1])
    assert torch.equal(out["none"], other["none"])
    other["both"][0].sum().backward()  # the LSTM's own list of weights is that of its parameters
    assert loaded.get_parameter("rnn.weight_ih_l0").grad is not None


def test_memory_format_and_dtypes_are_kept() -> None:
    model = torchvision.models.resnet18(num_classes=4).to(memory_format=torch.channels_last).to(torch.bfloat16)
    saved = fxcompress.capture(model, (torch.randn(2, 3, 32, 32, dtype=torch.bfloat16),)).module
    loaded = again(saved)
    assert_same(loaded, saved)
    assert loaded.get_parameter("conv1.weight").is_contiguous(memory_format=torch.channels_last)


def test_a_module_called_twice_is_one_module() -> None:
    linear = nn.Linear(4, 4)
    saved = fxcompress.capture(nn.Sequential(linear, nn.ReLU(), linear, nn.Tanh()), (torch.randn(2, 4),)).module
    loaded = again(saved)
    assert_same(loaded, saved)
    assert len(list(loaded.parameters())) == 2


def test_masks_and_removed_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    dense = fxcompress.capture(torchvision.models.resnet18(num_classes=10).eval(), (x,))
    cut = Remove(ratio=0.5).apply(dense, 'conv2d[name ~ "layer1.**"]', what="channels")
    masked = Mask(sparsity=0.5).apply(cut, "conv2d")
    fxcompress.save(masked.module, tmp_path / "out")
    loaded = fxcompress.load(tmp_path / "out")
    assert_same(loaded, masked.module)
    assert torch.equal(loaded(x), masked.module(x))
    assert any(node.meta.get("origins") for node in loaded.graph.nodes)


def test_a_fresh_process_without_the_models_source(tmp_path: Path) -> None:
    (tmp_path / "zoo.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(3, 4, 3)\n"
        "        self.head = torch.nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        return self.head(torch.relu(self.conv(x)).mean((2, 3)))\n")
    save = ("import sys, torch, fxcompress\n"
            "sys.path.insert(0, sys.argv[1])\n"
            "import zoo\n"
            "torch.manual_seed(0)\n"
            "module = fxcompress.capture(zoo.Net().eval(), (torch.randn(2, 3, 8, 8),)).module\n"
            "fxcompress.save(module, sys.argv[1] + '/out')\n"
            "print(module(torch.ones(1, 3, 8, 8)).tolist())\n")
    load = ("import sys, torch, fxcompress\n"
            "module = fxcompress.load(sys.argv[1] + '/out')\n"
            "assert 'zoo' not in sys.modules and 'pickle' not in module.code\n"
            "print(module(torch.ones(1, 3, 8, 8)).tolist())\n")

    def run(code: str) -> str:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    first = run(save)
    (tmp_path / "zoo.py").unlink()
    assert run(load) == first


def test_policy_plan_and_report_travel(tmp_path: Path) -> None:
    policy = 'policy p {\n    # a comment that is kept\n    mask linear { sparsity = 50% }\n}\n'
    result = fxcompress.compile(policy, nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.randn(2, 8),))
    deployed = result.finalize(target="cpu")
    fxcompress.save(deployed, tmp_path / "out")
    assert (tmp_path / "out" / "policy.fxc").read_text() == policy
    loaded = fxcompress.load(tmp_path / "out")
    assert loaded.meta["fxcompress"] == deployed.meta["fxcompress"]
    assert int((loaded.get_parameter("0.weight") == 0).sum()) == 32
    assert [o.verb for node in loaded.graph.nodes for o in node.meta.get("origins", ())] == ["mask", "finalize"]


def test_a_save_is_the_same_bytes_again(captured: fxcompress.Captured) -> None:
    files = to_files(captured.module)
    assert to_files(from_files(files, CPU)) == {**files, "plan.json": b"null\n", "report.json": b"null\n"}


# Each class of leaf module, by its own constructor.
SAMPLES: dict[type[nn.Module], Callable[[], nn.Module]] = {
    nn.Bilinear: lambda: nn.Bilinear(2, 3, 4, bias=False), nn.Linear: lambda: nn.Linear(3, 4),
    nn.LayerNorm: lambda: nn.LayerNorm((3, 4), eps=1e-3, bias=False), nn.RMSNorm: lambda: nn.RMSNorm(4),
    nn.GroupNorm: lambda: nn.GroupNorm(2, 4, affine=False), nn.PReLU: lambda: nn.PReLU(3),
    nn.RReLU: lambda: nn.RReLU(0.1, 0.2), nn.Embedding: lambda: nn.Embedding(5, 3, padding_idx=1),
    nn.EmbeddingBag: lambda: nn.EmbeddingBag(5, 3, mode="sum"), nn.RNN: lambda: nn.RNN(2, 3, nonlinearity="relu"),
    nn.LSTM: lambda: nn.LSTM(2, 4, 2, bias=False, proj_size=3), nn.GRU: lambda: nn.GRU(2, 3, dropout=0.1, num_layers=2),
    nn.LSTMCell: lambda: nn.LSTMCell(2, 3), nn.GRUCell: lambda: nn.GRUCell(2, 3, bias=False),
    nn.RNNCell: lambda: nn.RNNCell(2, 3, nonlinearity="relu"),
    nn.MultiheadAttention: lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True, kdim=3, vdim=5),
    nn.Conv2d: lambda: nn.Conv2d(4, 6, (3, 1), 2, "valid", groups=2, padding_mode="reflect"),
    nn.ConvTranspose2d: lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, bias=False),
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(3, momentum=None, affine=False),
    torchvision.ops.StochasticDepth: lambda: torchvision.ops.StochasticDepth(0.2, "batch"),
}


def sample(cls: type[nn.Module]) -> nn.Module:
    if cls in SAMPLES:
        return SAMPLES[cls]()
    if "Conv" in cls.__name__:
        return cls(2, 4, 3, bias=False)  # type: ignore[call-arg]
    return cls(0.3) if "Drop" in cls.__name__ else cls(4)  # type: ignore[call-arg]


@pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
def test_every_leaf_class_is_rebuilt_as_it_was(cls: type[nn.Module]) -> None:
    module = sample(cls)
    name, arguments = describe(module)
    assert json.loads(json.dumps(arguments)) == arguments
    built = build(Cursor(name, "here"), Cursor(arguments, "here"))
    assert type(built) is cls and repr(built) == repr(module)
    assert {n: t.shape for n, t in built.state_dict().items()} == {n: t.shape for n, t in module.state_dict().items()}
    assert all(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))
    hidden = {"_parameters", "_buffers", "_modules", "_flat_weights", "training"}
    settings = {key: value for key, value in vars(module).items() if key not in hidden and not key.startswith("_flat")}
    assert {key: vars(built)[key] for key in settings} == settings


def test_classes_have_distinct_names() -> None:
    assert len({row.cls for row in CLASSES.values()}) == len(CLASSES)


@pytest.mark.parametrize(("name", "why"), [
    ("aten.add_.Tensor", "changes"), ("aten.relu.out", "changes"), ("aten.from_file.default", "memory"),
    ("aten._embedding_bag.default", "internal"), ("aten.convolution_backward.default", "internal"),
    ("aten.as_strided.default", "memory"), ("aten.empty.memory_format", "memory"), ("aten.resize.default", "memory"),
    ("aten.set.source_Storage", "memory"), ("aten.rand.generator", "Generator"),
    ("aten.div.Tensor_mode", "str"), ("aten.fbgemm_linear_fp16_weight.default", "internal"),
    ("aten.bernoulli.default", "Generator"), ("aten.frexp.Tensor", None), ("aten.cumprod.default", None),
])
def test_which_aten_operators_may_be_saved(name: str, why: str | None) -> None:
    _, base, overload = name.split(".")
    packet = getattr(torch.ops.aten, base)
    if not hasattr(packet, overload):
        pytest.skip(f"this torch has no {name}")
    found = why_not(getattr(packet, overload))
    assert found is None if why is None else found is not None and why in found


def graph_of(build_graph: Callable[[fx.Graph, fx.Node], Any], root: nn.Module | None = None) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(build_graph(graph, x))
    return fx.GraphModule(root or nn.Module(), graph)


def own(x: Tensor) -> Tensor:
    return x + 1


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


ADD = OPS["add"].target
UNSAVEABLE: dict[str, tuple[Callable[[], fx.GraphModule], str]] = {
    "a function of one's own": (lambda: graph_of(lambda g, x: g.call_function(own, (x,))), "own"),
    "an ATen operator that writes": (
        lambda: graph_of(lambda g, x: g.call_function(torch.ops.aten.add_.Tensor, (x, 1))), "changes"),
    "a method": (lambda: graph_of(lambda g, x: g.call_method("tolist", (x,))), "tolist"),
    "a class of one's own": (
        lambda: graph_of(lambda g, x: g.call_module("own", (x,)), nn.ModuleDict({"own": Own(2, 2)})), "Own"),
    "bytes": (lambda: graph_of(lambda g, x: g.call_function(ADD, (x, b"bytes"))), "bytes"),
    "a number beyond 64 bits": (
        lambda: graph_of(lambda g, x: g.call_function(ADD, (x, 2**70))), "64 bits"),
}


@pytest.mark.parametrize("name", UNSAVEABLE)
def test_what_no_artifact_may_hold_is_refused_at_save(name: str, tmp_path: Path) -> None:
    make, word = UNSAVEABLE[name]
    with pytest.raises(ArtifactError) as error:
        fxcompress.save(make(), tmp_path / "out")
    (found,) = error.value.diagnostics
    assert found.code == "FXC0610" and word in found.message and found.help
    assert not (tmp_path / "out").exists()


def test_a_module_whose_settings_lie_is_refused() -> None:
    saved = fxcompress.capture(nn.Sequential(nn.Conv2d(3, 4, 3)), (torch.randn(1, 3, 8, 8),)).module
    conv = saved.get_submodule("0")
    conv.weight = nn.Parameter(torch.randn(2, 3, 3, 3))
    conv.bias = nn.Parameter(torch.randn(2))
    with pytest.raises(ArtifactError, match=r"0\.weight of shape \[2, 3, 3, 3\].*say \[4, 3, 3, 3\]"):
        to_files(saved)


def test_load_to_a_device_moves_weights_and_constants() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.embed(torch.arange(3, device=x.device))

    saved = fxcompress.capture(Positions(), (torch.randn(2, 3, 4),)).module
    loaded = from_files(to_files(saved), torch.device("meta"))
    assert all(p.is_meta for p in loaded.parameters())
    assert loaded(torch.randn(2, 3, 4, device="meta")).is_meta
