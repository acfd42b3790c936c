"""`remove` on transformers as Hugging Face writes them, small and random: compared with the dense models whose
readers are zeroed by hand and with models that transformers makes at the smaller size."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import pytest
import torch
from remove_check import apart, kept_indices, remove, wake, zeroed
from remove_nets import conv
from torch import Tensor, nn

import fxcompress
from fxcompress.diagnostics import PlanError
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


@pytest.mark.parametrize(("what", "smaller"), [
    ("heads", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ("hidden", {"intermediate_size": 24}),
    ("embedding", {"hidden_size": 16}),
])
def test_is_the_llama_that_transformers_makes_at_that_size(what: str, smaller: dict[str, int]) -> None:
    _, inputs, captured = dense("llama")
    result, _ = remove(captured, what)
    small, _ = llama(**smaller)
    small.load_state_dict(result.module.state_dict())
    with torch.no_grad():
        assert apart(small.eval()(*inputs), result.module(*inputs)) < 1e-5
    assert result.module.model.lm_head.weight is result.module.model.model.embed_tokens.weight


@pytest.mark.parametrize(("queries", "keys", "kept"), [(8, 4, (6, 3)), (8, 1, (6, 1)), (4, 4, (3, 3))])
def test_groups_of_queries_stay_whole(queries: int, keys: int, kept: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, inputs = llama(num_attention_heads=queries, num_key_value_heads=keys, num_hidden_layers=1)
    result, outcome = remove(capture(wake(model), inputs), "heads", ratio=0.25)
    attention = result.module.get_submodule("model.model.layers.0.self_attn")
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == tuple(8 * heads for heads in kept)
    assert attention.v_proj.out_features == 8 * kept[1] and attention.o_proj.in_features == 8 * kept[0]
    assert any(note.startswith("proven equal") for note in outcome.notes)


def test_the_stream_is_refused_where_it_must_be_exact() -> None:
    _, _, captured = dense("vit")
    with pytest.raises(PlanError, match="FXC0341"):
        remove(captured, "embedding", exact=True)


class Residual(nn.Module):
    """A stream, and sums that are none: of branches of one value, and inside an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 10), conv(3, 10)
        self.last, self.inner, self.outer = conv(10, 6), conv(6, 14), conv(14, 6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x) + self.right(x)
        x = self.last(x + x ** 3)
        return self.head(x + self.outer(self.inner(x).relu()))


def test_the_stream_is_what_adds_of_a_value_and_its_branch_carry() -> None:
    torch.manual_seed(0)
    captured = capture(wake(Residual()), (torch.randn(2, 3, 8, 8),))
    _, outcome = remove(captured, "embedding")
    changed = {change.path for change in outcome.changes if change.what == "out_channels"}
    assert changed == {"last", "outer"}
    assert any(note.startswith("proven equal") for note in outcome.notes)
    with pytest.raises(PlanError, match="no channels of a residual stream"):
        remove(captured, "embedding", nodes=(captured.node("left"), captured.node("inner")))


def test_follows_a_policy_without_weights() -> None:
    with torch.device("meta"):
        model, _ = llama()
    shown = fxcompress.plan(POLICY, model, words(7)).to_json()
    assert "24" in shown and "gate_proj" in shown


POLICY = """policy thin {
    remove hidden(linear[name ~ "**.gate_proj"]) { ratio = 50% }
    remove heads(linear[name ~ "**.k_proj"]) { ratio = 50% }
}"""

BILLION = """
import resource, sys
import torch, transformers
import fxcompress
from fxcompress.graph.capture import capture

with torch.device("meta"):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, use_cache=False))
assert sum(p.numel() for p in model.parameters()) > 1_000_000_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = fxcompress.plan(sys.argv[1], model, (torch.zeros(1, 16, dtype=torch.int64),))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
print(plan.show())
"""


@pytest.mark.slow
def test_a_llama_of_a_billion_parameters_is_planned_without_its_weights() -> None:
    done = subprocess.run([sys.executable, "-c", BILLION, POLICY], capture_output=True, text=True, check=True)
    grown, _, shown = done.stdout.partition("\n")
    assert int(grown) < 1024, "MiB of memory"
    assert "5632" in shown and "2816" in shown
