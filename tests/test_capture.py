"""Capture of whole models, by both ways: the captured model computes what the model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
import transformers
from test_capture_forms import assert_same
from torch import Tensor, nn

from fxcompress.graph import capture
from fxcompress.graph.ops import kind_of, path_of

FIRST_WAY = ("resnet18", "vgg11", "mobilenet_v2", "shufflenet_v2_x0_5", "vit_b_16", "swin_t", "fcn_resnet50")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "small_vit":  # the layers of vit_b_16
        return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
    options: dict[str, Any] = {"weights_backbone": None} if name.startswith("fcn") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def images(name: str, batch: int) -> Tensor:
    return torch.randn(batch, 3, *{"vit_b_16": (224, 224), "small_vit": (32, 32)}.get(name, (64, 64)))


@pytest.mark.parametrize("name", FIRST_WAY)
def test_torchvision_by_the_first_way(name: str) -> None:
    model = make(name).eval()
    captured = capture(model, (images(name, 2),))
    assert captured.way == "fx" and not captured.fixed_batch and not captured.notes
    assert all("." not in kind_of(node) for node in captured.graph.nodes), "an operator without a canonical name"
    assert all(node.op != "call_method" for node in captured.graph.nodes)
    if name in ("vgg11", "vit_b_16", "fcn_resnet50"):  # large: outputs alone
        x = images(name, 1)
        with torch.no_grad():
            expected, found = model(x), captured.module(x)
        assert torch.equal(*(out["out"] if isinstance(out, dict) else out for out in (expected, found)))
        assert list(captured.module.state_dict()) == list(model.state_dict())
    else:
        assert_same(model, captured, images(name, 3))


@pytest.mark.parametrize("name", ["resnet18", "small_vit"])
def test_torchvision_by_the_second_way(name: str) -> None:
    model = make(name).eval()
    first, second = (capture(model, (images(name, 2),), way) for way in ("fx", "export"))  # type: ignore[arg-type]
    assert second.way == "export" and not second.fixed_batch
    assert_same(model, second, images(name, 3))
    described = [[(kind_of(n), path_of(n), n.meta["fxc"].shape) for n in c.graph.nodes] for c in (first, second)]
    if name == "resnet18":
        assert described[0] == described[1]
        assert first.fingerprint() == second.fingerprint()
    else:  # where a size is read differs
        assert [row for row in described[0] if row[0] != "size"] == [row for row in described[1] if row[0] != "size"]
    assert first.facts.macs == second.facts.macs and first.facts.params == second.facts.params


def test_the_whole_vit_by_the_second_way() -> None:
    model = make("vit_b_16").eval()
    captured = capture(model, images("vit_b_16", 2), "export")
    x = images("vit_b_16", 1)
    with torch.no_grad():
        assert torch.equal(model(x), captured.module(x))
    assert sum(kind_of(node) == "multihead_attention" for node in captured.graph.nodes) == 12


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32,
        use_cache=False, tie_word_embeddings=True))


@pytest.mark.parametrize("way", ["auto", "export"])
@pytest.mark.parametrize("factory", [bert, llama])
def test_transformers(factory: Any, way: str) -> None:
    torch.manual_seed(0)
    model = factory().eval()
    ids = torch.randint(0, 50, (5, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[3, 2:] = 0
    captured = capture(model, {"input_ids": ids[:2], "attention_mask": mask[:2]}, way)  # type: ignore[arg-type]
    assert captured.way == ("fx" if way == "auto" else "export") and not captured.notes
    assert type(captured.module(input_ids=ids, attention_mask=mask)) is dict
    assert_same(model, captured, input_ids=ids, attention_mask=mask)
    kinds = {kind_of(node) for node in captured.graph.nodes if node.op == "call_module"}
    assert {"linear", "embedding"} <= kinds


def test_outputs_without_a_place_in_a_graph_are_noted() -> None:
    torch.manual_seed(0)
    model = llama().eval()
    model.config.use_cache = True  # type: ignore[union-attr]
    ids = torch.randint(0, 50, (2, 7))
    for way in ("fx", "export"):
        captured = capture(model, {"input_ids": ids}, way)  # type: ignore[arg-type]
        assert list(captured.module(input_ids=ids)) == ["logits"]
        assert any("past_key_values" in note for note in captured.notes)
        assert torch.equal(captured.module(input_ids=ids)["logits"], model(ids).logits)


def test_a_model_with_another_way_in_training_says_so() -> None:
    model = torchvision.models.GoogLeNet(num_classes=3, init_weights=False).eval()
    captured = capture(model, (torch.randn(2, 3, 64, 64),))
    assert any("another way" in note for note in captured.notes)
    assert any("aux1" in note for note in captured.notes)
    x = torch.randn(3, 3, 64, 64)
    assert torch.equal(model(x), captured.module(x))


def test_copies_and_skeletons() -> None:
    model = make("mobilenet_v2").eval()
    captured = capture(model, (images("", 2),))
    before = captured.module.state_dict()
    light = capture(model, (images("", 2),), skeleton=True)
    assert not light.concrete
    for other in (captured.copy(), captured.skeleton(), captured.skeleton().skeleton(), light):
        other.refresh()
        assert [node.name for node in other.graph.nodes] == [node.name for node in captured.graph.nodes]
        assert other.fingerprint() == captured.fingerprint() and other.facts == captured.facts
        assert list(other.module.state_dict()) == list(before)
        for name, tensor in other.module.state_dict().items():
            assert tensor.is_meta or tensor.data_ptr() != before[name].data_ptr()
    skeleton = captured.skeleton()
    assert not skeleton.concrete and all(p.is_meta for p in skeleton.module.parameters())
    x = images("", 3)
    assert torch.equal(captured.copy().module(x), model(x))


def test_a_fingerprint_knows_the_architecture_and_not_the_weights() -> None:
    one, two = (capture(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)) for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    others = [nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 5, 3)]
    assert len({capture(nn.Sequential(m), torch.randn(2, 3, 8, 8)).fingerprint()
                for m in (nn.Conv2d(3, 4, 3), *others)}) == 4
