"""`remove` on transformers as Hugging Face writes them, small and random: compared with the dense models whose
readers are zeroed by hand and with models that transformers makes at the smaller size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from remove_check import apart, kept_indices, remove, wake, zeroed
from torch import Tensor, nn

from fxcompress.graph.capture import capture
from fxcompress.graph.captured import Captured

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


class Logits(nn.Module):
    """A model that gives its logits back, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs).logits


class Translating(Logits):
    """The same for a model with an encoder and a decoder."""

    def forward(self, ids: Tensor, answer: Tensor) -> Tensor:
        return self.model(input_ids=ids, decoder_input_ids=answer).logits


def words(*lengths: int) -> tuple[Tensor, ...]:
    return tuple(torch.randint(0, 40, (2, length)) for length in lengths)


def bert() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = transformers.BertConfig(**SMALL, max_position_embeddings=16)
    return Logits(transformers.BertForSequenceClassification(config)), words(7)


def vit() -> tuple[nn.Module, tuple[Tensor, ...]]:
    sizes = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    return Logits(transformers.ViTForImageClassification(config)), (torch.randn(2, 3, 32, 32),)


def llama(**sizes: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Grouped queries (two a key), RMSNorm, a gated perceptron, tied embeddings."""
    config = transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 2, "head_dim": 8, **sizes}, use_cache=False,
                                      max_position_embeddings=16, tie_word_embeddings=True)
    return Logits(transformers.LlamaForCausalLM(config)), words(7)


def t5() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Relative positions shared by the layers of an encoder and a decoder, attention across, tied embeddings."""
    config = transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                   use_cache=False)
    return Translating(transformers.T5ForConditionalGeneration(config)), words(7, 5)


FAMILIES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {"bert": bert, "vit": vit, "llama": llama,
                                                                           "t5": t5}
WHATS = ("channels", "heads", "head_dim", "hidden", "embedding")
QUERIES = (".query", ".q_proj", ".q")
PARTS = {  # what of a family's layers each kind of removal halves: (module, width before)
    "heads": {"bert": "query", "vit": "q_proj", "llama": "q_proj", "t5": "q"},
    "head_dim": {"bert": "query", "vit": "q_proj", "llama": "q_proj", "t5": "q"},
    "hidden": {"bert": "intermediate.dense", "vit": "fc1", "llama": "up_proj", "t5": "wi"},
    "embedding": {"bert": "output.dense", "vit": "fc2", "llama": "down_proj", "t5": "wo"},
}


@cache
def dense(family: str) -> tuple[nn.Module, tuple[Tensor, ...], Captured]:
    torch.manual_seed(0)
    model, inputs = FAMILIES[family]()
    wake(model)
    for parameter in model.parameters():  # transformers starts with weights of 0.02, with which blocks hardly matter
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 0.3)
    return model, inputs, capture(model, inputs)


class OverKept(nn.Module):
    """A normalisation over the indices that are kept: what it gives for the others is zero."""

    def __init__(self, norm: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.kept, self.norm = kept, copy.deepcopy(norm)
        for name, parameter in self.norm.named_parameters():
            setattr(self.norm, name, nn.Parameter(parameter[kept]))
        if isinstance(norm, nn.LayerNorm):
            self.norm.normalized_shape = (len(kept),)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_copy(-1, self.kept, self.norm(x[..., self.kept]))


def reference(model: nn.Module, kept: dict[str, dict[int, Tensor]], what: str) -> nn.Module:
    """The dense model without what is removed, in torch alone: readers zeroed, norms over what is kept, and where heads
    get thinner their queries zeroed."""
    queries = {f"{name}.{part}": 0 for name, module in model.named_modules() if name.endswith(QUERIES)
               for part, _ in module.named_parameters()}
    result = zeroed(model, kept, queries if what == "head_dim" else None)
    for path, module in model.named_modules():
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and f"{path}.weight" in kept:
            result.set_submodule(path, OverKept(module, kept[f"{path}.weight"][0]))
    return result


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_dense_model_without_what_left(family: str, what: str) -> None:
    model, inputs, captured = dense(family)
    result, outcome = remove(captured, what)
    proven = "not proven: everything that leaves is inexact" if what == "embedding" else "proven equal"
    assert any(note.startswith(proven) for note in outcome.notes)
    assert any(note.startswith("inexact: ") for note in outcome.notes) is (what in ("channels", "embedding"))
    for name, module in model.named_modules():
        if what != "channels" and name.endswith(f".{PARTS[what][family]}"):
            thin = result.module.get_submodule(name)
            assert thin.weight.shape[0] * 2 == module.weight.shape[0], name
    with torch.no_grad():
        expected = reference(model, kept_indices(result, outcome), what)(*inputs)
        found, whole = result.module(*inputs), model(*inputs)
    assert apart(expected, found) < 1e-4
    assert apart(whole, found) > 1e-2, "nothing that matters was removed: the test would show nothing"


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_stays_trainable(family: str, what: str) -> None:
    _, inputs, captured = dense(family)
    result, _ = remove(captured, what)
    result.module.train()(*inputs).square().mean().backward()
    missing = [name for name, p in result.module.named_parameters() if p.grad is None or p.grad.shape != p.shape]
    assert not missing
