"""`remove blocks(S)`: which there are, that they leave as if cut out by hand, which ones leave, what is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torchvision
import transformers
from blocks_nets import KINDS, Tower, skipping
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress
from fxcompress import FxcError, capture
from fxcompress import compile as compile_
from fxcompress.graph.captured import Captured
from fxcompress.graph.residual_blocks import find_blocks
from fxcompress.passes import Remove

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
IMAGE = (torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)),)
WORDS = {"input_ids": torch.arange(16).reshape(2, 8)}


def labels(captured: Captured) -> list[str]:
    return [block.label for block in find_blocks(captured).blocks]


def dropped(captured: Captured, selector: str, **options: Any) -> Captured:
    return Remove(**{"ratio": 1.0, **options}).apply(captured, selector, "blocks")


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else next(iter(
        result.values() if isinstance(result, dict) else result))


def run(module: nn.Module, example: Any) -> Tensor:
    with torch.no_grad():
        return first(module(**example) if isinstance(example, dict) else module(*example))


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 4, 2, 32, 64, num_classes=7)


# Against models cut by hand: module -> nn.Identity

IDENTITIES = {
    "resnet18": ("layer3.1", 5), "resnet50": ("layer3.2", 12), "convnext_tiny": ("features.5.3", 18),
    "mobilenet_v2": ("features.9", 10), "efficientnet_b0": ("features.4.2", 9), "swin_t": ("features.5.4", 12),
    "regnet_x_400mf": ("trunk_output.block3.block3-2", 18),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_equals_torchvision_with_an_identity_in_the_place_of_the_block(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=7).eval()
    path, count = IDENTITIES[name]
    captured = capture(model, IMAGE)
    assert len(labels(captured)) == count and path in labels(captured)
    removed = dropped(captured, f'"{path}.**"')
    by_hand = copy.deepcopy(model)
    owner, _, child = path.rpartition(".")
    by_hand.get_submodule(owner)._modules[child] = nn.Identity()
    assert torch.equal(run(removed.module, IMAGE), run(by_hand, IMAGE))
    assert list(removed.module.state_dict()) == list(by_hand.state_dict())
    assert path not in dict(removed.module.named_modules())
    assert removed.facts.params == sum(parameter.numel() for parameter in by_hand.parameters())
    assert removed.facts.macs == capture(by_hand, IMAGE).facts.macs < captured.facts.macs
    assert labels(removed) == [label for label in labels(captured) if label != path]


def test_the_last_block_of_a_stage_as_a_shorter_sequential() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=7).eval()
    removed = dropped(capture(model, IMAGE), '"layer3.5.**"')
    by_hand = copy.deepcopy(model)
    by_hand.layer3 = by_hand.layer3[:5]
    assert torch.equal(run(removed.module, IMAGE), run(by_hand, IMAGE))
    assert list(removed.module.state_dict()) == list(by_hand.state_dict())


def test_vision_transformer_loses_whole_encoder_layers() -> None:
    torch.manual_seed(0)
    model, example = vit().eval(), (torch.randn(2, 3, 32, 32),)
    captured = capture(model, example)
    assert labels(captured) == [f"encoder.layers.encoder_layer_{number}" for number in range(4)]
    removed = dropped(captured, 'multihead_attention[name ~ "**.encoder_layer_2.*"]')
    by_hand = copy.deepcopy(model)
    del by_hand.encoder.layers.encoder_layer_2
    assert torch.equal(run(removed.module, example), run(by_hand, example))
    assert list(removed.module.state_dict()) == list(by_hand.state_dict())


def hugging_face(name: str) -> tuple[nn.Module, Any, str]:
    """A small model, an example, and where its list of layers is."""
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, use_cache=False)
        return transformers.LlamaForCausalLM(config).eval(), WORDS, "model.layers"
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=50, n_positions=16, use_cache=False,
                                         bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config).eval(), WORDS, "transformer.h"
    small = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8)
    return transformers.ViTModel(config).eval(), (torch.randn(2, 3, 32, 32),), "layers"


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_pre_norm_transformers_lose_layers_of_their_list(name: str) -> None:
    model, example, path = hugging_face(name)
    captured = capture(model, example)
    assert labels(captured) == [f"{path}.{number}" for number in range(4)]
    removed = dropped(captured, f'"{path}.1.**" | "{path}.3.**"')
    by_hand = copy.deepcopy(model)
    layers = by_hand.get_submodule(path)
    for number in (3, 1):
        del layers[number]
    torch.testing.assert_close(run(removed.module, example), run(by_hand, example), rtol=1e-5, atol=1e-6)
    left = {re.sub(rf"({re.escape(path)}\.)\d+", r"\1*", key) for key in by_hand.state_dict()}
    mine = removed.module.state_dict()
    assert {re.sub(rf"({re.escape(path)}\.)\d+", r"\1*", key) for key in mine} == left
    assert {key.split(f"{path}.")[1][0] for key in mine if f"{path}." in key} == {"0", "2"}


def test_post_norm_layers_lose_their_branches_and_keep_their_norms() -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False).eval()
    captured = capture(model, WORDS)
    assert labels(captured) == [f"encoder.layer.{number}" for number in range(4)]
    removed = dropped(captured, '"encoder.layer.2.**"')
    layer = model.encoder.layer[2]
    for linear in (layer.attention.output.dense, layer.output.dense):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    torch.testing.assert_close(run(removed.module, WORDS), run(model, WORDS))
    kept = {key for key in removed.module.state_dict() if key.startswith("encoder.layer.2.")}
    assert kept == {f"encoder.layer.2.{norm}.LayerNorm.{name}" for norm in ("attention.output", "output")
                    for name in ("weight", "bias")}


def test_t5_has_its_branches_as_blocks_and_keeps_what_the_next_block_reads() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=50,
                                   use_cache=False)
    model = transformers.T5Model(config).eval()
    example = {**WORDS, "decoder_input_ids": torch.arange(12).reshape(2, 6)}
    captured = capture(model, example)
    assert len(labels(captured)) == 10
    removed = dropped(captured, '"encoder.block.0.layer.0.**" | "decoder.block.1.layer.1.**"')
    nn.init.zeros_(model.encoder.block[0].layer[0].SelfAttention.o.weight)
    nn.init.zeros_(model.decoder.block[1].layer[1].EncDecAttention.o.weight)
    torch.testing.assert_close(run(removed.module, example), run(model, example))
    gone = set(captured.module.state_dict()) - set(removed.module.state_dict())
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert bias not in gone and "encoder.block.0.layer.0.SelfAttention.q.weight" in gone


def test_calls_of_one_shared_layer_are_blocks_of_their_own_and_its_weights_stay() -> None:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(**SMALL, embedding_size=16)
    model = transformers.AlbertModel(config, add_pooling_layer=False).eval()
    captured = capture(model, WORDS)
    path = "encoder.albert_layer_groups.0.albert_layers.0"
    assert labels(captured) == [path, *(f"{path} (call {number})" for number in (2, 3, 4))]
    removed = dropped(captured, f'"{path}.**"', ratio=0.5)
    assert list(removed.module.state_dict()) == list(captured.module.state_dict())
    assert len(labels(removed)) == 2
    # two of four equal linear calls are left
    count = sum(node.target == f"{path}.ffn" for node in removed.graph.nodes)
    assert count == 2


def test_layers_of_torchs_own_encoder() -> None:
    for norm_first in (False, True):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
        model, x = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), torch.randn(2, 5, 16)
        captured = capture(model, (x,))
        assert labels(captured) == ["layers.0", "layers.1", "layers.2"]
        removed = dropped(captured, '"layers.1.**"')
        for linear in (model.layers[1].self_attn.out_proj, model.layers[1].linear2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        torch.testing.assert_close(run(removed.module, (x,)), run(model, (x,)))


class Long(nn.Module):
    """A stage with a long shortcut around its blocks, whose code adds for a list; the end adds what isn't unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(6, 6) for _ in range(3)),
                                    "last": nn.Linear(6, 6)})
        self.table = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.table
        for block in self.stage["blocks"]:
            y = y + torch.relu(block(y))
        y = x + self.stage["last"](y)
        return y + 0.044715 * torch.tanh(y) + 2 * y + torch.relu(y * 2)


def test_a_long_shortcut_is_no_block_and_neither_is_pointwise_arithmetic() -> None:
    captured = capture(Long().eval(), (torch.randn(2, 6),))
    assert labels(captured) == [f"stage.blocks.{number}" for number in range(3)]


# Random nets against their own code with the branches left out


@st.composite
def towers(draw: st.DrawFn) -> tuple[Tower, set[int], set[int]]:
    """A net, blocks to drop, and blocks before which to cut channels or none."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=2, max_size=6))
    steps = draw(st.sets(st.integers(0, len(kinds) - 1), max_size=2))
    gone = draw(st.sets(st.integers(0, len(kinds) - 1), min_size=1))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    net = Tower(kinds, steps)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, -1, 1)
            nn.init.normal_(module.bias)
    return net, gone, steps


@settings(max_examples=40, deadline=None)
@given(towers())
def test_random_nets_equal_their_own_code_without_the_branches(case: tuple[Tower, set[int], set[int]]) -> None:
    net, gone, steps = case
    x = torch.randn(2, 3, 8, 8)
    captured = capture(net.eval(), (x,))
    found = find_blocks(captured)
    assert [block.label for block in found.blocks] == [f"blocks.{place}" for place in range(len(net.blocks))]
    assert len(found.refused) == len(steps)
    removed = dropped(captured, " | ".join(f'"blocks.{place}.**"' for place in sorted(gone)))
    torch.testing.assert_close(run(removed.module, (x,)), run(skipping(net, gone), (x,)))
    state = net.state_dict()
    for key, value in removed.module.state_dict().items():
        assert torch.equal(value, state[key])
    assert not [key for key in removed.module.state_dict() for place in gone if key.startswith(f"blocks.{place}.conv")]
    removed.module.train()
    removed.module(x).sum().backward()
    assert all(parameter.grad is not None for name, parameter in removed.module.named_parameters())


# Which blocks leave


def scaled(model: nn.Module, paths: dict[str, float]) -> nn.Module:
    """All weights under each path times a number."""
    with torch.no_grad():
        for path, factor in paths.items():
            for parameter in model.get_submodule(path).parameters():
                parameter.mul_(factor)
    return model


def gone(before: Captured, after: Captured) -> set[str]:
    return set(labels(before)) - set(labels(after))


@pytest.mark.parametrize("by", ["l1", "l2", "bn_scale"])
def test_blocks_of_small_weights_leave(by: str) -> None:
    torch.manual_seed(0)
    model = scaled(torchvision.models.resnet18().eval(), {"layer1.1": 0.5, "layer4.1": 0.1})
    captured = capture(model, IMAGE)
    removed = dropped(captured, "*", ratio=0.4, scope="global", by=by, normalize="none")
    expected = {"l1": {"layer1.0", "layer1.1"}, "l2": {"layer1.1", "layer4.1"}, "bn_scale": {"layer1.1", "layer4.1"}}
    assert gone(captured, removed) == expected[by]
    assert gone(captured, dropped(captured, '"layer1.**"', ratio=0.5, by=by)) == {"layer1.1"}


def test_the_score_is_the_criterion_of_whole_weights() -> None:
    """`by = l2` is the Frobenius norm of each kernel, the mean over those of a block."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    norms = {path: sum(model.get_submodule(path).get_parameter(f"conv{number}.weight").norm().item() / 2
                       for number in (1, 2)) for path in ("layer1.0", "layer1.1")}
    captured = capture(model, IMAGE)
    assert gone(captured, dropped(captured, '"layer1.**"', ratio=0.5)) == {min(norms, key=lambda path: norms[path])}


def test_taylor_ranks_by_weight_times_gradient_and_wants_gradients() -> None:
    torch.manual_seed(0)
    captured = capture(torchvision.models.resnet18().train(), IMAGE)
    with pytest.raises(FxcError, match="FXC0343"):
        dropped(captured, '"layer1.**"', ratio=0.5, by="taylor")
    captured.module(*IMAGE).square().mean().backward()
    sums = {path: sum((p * p.grad).abs().sum().item() for name, p in captured.module.named_parameters()
                      if name.startswith(path) and "conv" in name) for path in ("layer1.0", "layer1.1")}
    removed = dropped(captured, '"layer1.**"', ratio=0.5, by="taylor")
    assert gone(captured, removed) == {min(sums, key=lambda path: sums[path])}


def test_the_ratio_holds_over_all_stages_together() -> None:
    """Five stages of 2, 1, 1 and 1 blocks: 50 % are three blocks, not one and all single ones."""
    captured = capture(torchvision.models.resnet18().eval(), IMAGE)
    for ratio, count in ((0.2, 1), (0.5, 3), (0.8, 4), (1.0, 5)):
        assert len(gone(captured, dropped(captured, "*", ratio=ratio))) == count
    assert gone(captured, dropped(captured, "*", ratio=1.0, max_ratio=0.5)) == {"layer1.0"} or gone(
        captured, dropped(captured, "*", ratio=1.0, max_ratio=0.5)) == {"layer1.1"}


def test_random_follows_its_seed() -> None:
    captured = capture(Tower(["plain"] * 4).eval(), (torch.randn(2, 3, 8, 8),))
    choices = [frozenset(gone(captured, dropped(captured, "*", ratio=0.5, by="random", seed=seed)))
               for seed in (0, 0, 1, 2, 3, 4)]
    assert choices[0] == choices[1] and len(set(choices)) > 1 and all(len(choice) == 2 for choice in choices)


# What is refused


def refusal(captured: Captured, selector: str, **options: Any) -> str:
    with pytest.raises(FxcError) as error:
        dropped(captured, selector, **options)
    found = error.value.diagnostics[0]
    return "\n".join([found.code, found.message, *found.notes])


def test_projections_are_named() -> None:
    captured = capture(torchvision.models.resnet18().eval(), IMAGE)
    text = refusal(captured, '"layer2.0.**"')
    assert text.startswith("FXC0342") and "layer2.0.downsample.0" in text and "resnet.py:102" in text
    result = compile_("policy p { remove blocks(*) { ratio = 20% } }", captured)
    assert sum("stays: its shortcut is a projection" in note for note in result.notes) == 3


class Tapped(nn.Module):
    """A block whose inside is read from outside, one that scales what it adds to, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.fine = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.one(x))
        x = x + self.two(inner)
        x = 0.5 * x + self.three(x)
        x = self.fine(x) + x
        return x + inner


def test_what_is_read_from_outside_or_changed_on_its_way_stays() -> None:
    captured = capture(Tapped().eval(), (torch.randn(2, 4),))
    assert labels(captured) == ["fine"]
    assert "is read by add at test_remove_blocks.py" in refusal(captured, '"one"')
    assert "its shortcut changes the value: mul" in refusal(captured, '"three"')
    assert "blocks that can leave: fine" in refusal(captured, '"three"')


@pytest.mark.parametrize(("options", "code"), [
    ({"align": 8}, "FXC0347"), ({"min_channels": 4}, "FXC0347"), ({"couple": "skip"}, "FXC0347"),
    ({"by": "lamp"}, "FXC0347"), ({"by": "fpgm"}, "FXC0347"), ({"ratio": 0.05}, "FXC0340"),
    ({"max_ratio": 0.1}, "FXC0340")])
def test_what_means_nothing_for_blocks_is_refused(options: dict[str, Any], code: str) -> None:
    captured = capture(torchvision.models.resnet18().eval(), IMAGE)
    assert refusal(captured, "*", **{"ratio": 0.5, **options}).startswith(code)


def test_a_model_without_blocks_says_so() -> None:
    captured = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(2, 4),))
    assert "the model has no block that can leave" in refusal(captured, "*")
    with pytest.raises(FxcError, match="FXC0342"):
        fxcompress.plan("policy p { remove blocks(stem) { ratio = 50% }\n let stem = linear }", captured)
