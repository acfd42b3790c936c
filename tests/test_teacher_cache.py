"""A teacher's logits kept by sample: the same training without the teacher, and when that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from train_nets import Net, Teacher, data, noisy, samples, state_of, trainer

import fxcompress
from fxcompress.diagnostics import PlanError
from fxcompress.nn.distillation import Distillation
from fxcompress.training import Kept, keep_teacher
from fxcompress.training.run import Run

POLICY = """policy taught(teacher: model) {
    phase learn over epochs 0..4 {
        distill from teacher {
            %s
            pair output <- output { loss = kl, temperature = linear(8 -> 1), weight = 0.9 }
            pair output <- output { loss = similarity, weight = 0.1 }
            pair output <- targets { loss = cross_entropy, weight = 0.1 }
        }
        mask linear { sparsity = linear(0%% -> 50%%), every = 2 steps }
    }
}
"""
PLAIN = """policy p(teacher: model) {
    distill from teacher {
        cache = memory
        pair output <- output { loss = kl }
    }
}"""
MEMORY, DISK = POLICY % "cache = memory", POLICY % "cache = disk"


class Stop(Exception):  # noqa: N818 (nothing went wrong)
    """In place of a crash."""



def fused(trained_or_run: Any) -> Distillation:
    return next(each for each in trained_or_run.result.module.modules() if isinstance(each, Distillation))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_training_on_kept_logits_gives_the_same_weights(tmp_path: Path, place: str) -> None:
    seen: list[bool] = []

    def look(run: Run, moment: str) -> None:
        if run.result.terms:
            seen.append(fused(run).teacher is None)

    expected = trainer(policy=POLICY % "", teacher=Teacher()).fit()
    kept = trainer(tmp_path, POLICY % f"cache = {place}", teacher=Teacher()).fit(told=look)
    assert same(state_of(kept), state_of(expected)) and seen and all(seen)
    files = [*tmp_path.glob("teacher-*.safetensors")]
    assert len(files) == (place == "disk")
    if files:
        held = load_file(files[0])["values"]
        torch.testing.assert_close(held, Teacher()(data()[0].tensors[0]).detach())


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_run_with_kept_logits_is_resumed(tmp_path: Path, place: str) -> None:
    def stop(run: Run, moment: str) -> None:
        if moment == "step" and run.steps == 10:
            raise Stop

    policy = POLICY % f"cache = {place}"
    whole = trainer(policy=MEMORY, teacher=Teacher()).fit()
    with pytest.raises(Stop):
        trainer(tmp_path, policy, teacher=Teacher(), checkpoint_every=3).fit(told=stop)
    again = trainer(tmp_path, policy, teacher=Teacher()).fit(resume=True)
    assert same(state_of(again), state_of(whole)) and again.history == whole.history


def test_kept_logits_are_those_of_the_teacher_and_the_data(tmp_path: Path) -> None:
    trainer(tmp_path, DISK, teacher=Teacher(), epochs=4).fit()
    other = (samples(96, 7), samples(40, 3))
    with pytest.raises(PlanError, match=r"FXC0810.*\n?.*data differ"):
        trainer(tmp_path, DISK, teacher=Teacher(), given=other, epochs=4).fit()
    changed = Teacher()
    changed.fc.bias.data += 1
    trainer(tmp_path, DISK, teacher=changed, epochs=4).fit()  # in a file of its own
    files = [*tmp_path.glob("teacher-*.safetensors")]
    assert len(files) == 2
    for file in files:
        file.write_bytes(b"\x80\x04.")
    with pytest.raises(PlanError, match="can't be read"):
        trainer(tmp_path, DISK, teacher=Teacher(), epochs=4).fit()


class Secret(Dataset[Any]):
    """Random numbers of a generator of its own."""

    def __init__(self) -> None:
        self.samples, self.generator = samples(96, 2), torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.samples[index]
        return image + torch.randn((), generator=self.generator), label


@pytest.mark.parametrize(("given", "why"), [(noisy, "random numbers of Python"),
                                            (lambda: (Secret(), samples(40, 3)), "another each time")])
def test_data_that_are_drawn_anew_are_refused(given: Any, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        trainer(policy=MEMORY, teacher=Teacher(), given=given()).fit()


def test_disk_needs_a_folder() -> None:
    with pytest.raises(PlanError, match="no output folder"):
        trainer(policy=DISK, teacher=Teacher()).fit()


@pytest.mark.parametrize(("settings", "pairs", "why"), [
    ("cache = memory", 'pair output <- output { loss = kl }\npair "conv" <- "conv" { loss = hint }', "a feature of it"),
    ("cache = memory", "pair output <- targets { loss = cross_entropy }", "no pair reads the teacher"),
    ("top_k = 2", "pair output <- output { loss = kl }", "nothing says where"),
    ("cache = memory\ntop_k = 4", "pair output <- output { loss = kl }", "top_k = 4"),
])
def test_what_cannot_be_kept_is_refused_before_any_work(settings: str, pairs: str, why: str) -> None:
    text = f"policy p(teacher: model) {{\ndistill from teacher {{\n{settings}\n{pairs}\n}}\n}}"
    with pytest.raises(PlanError, match="FXC0357") as error:
        fxcompress.plan(text, Net(), torch.zeros(2, 1, 6, 6), teacher=Teacher())
    assert why in str(error.value)


def test_a_loop_of_ones_own() -> None:
    train, _ = data()
    result = fxcompress.compile(PLAIN, Net(dropout=0.0), train.tensors[0][:2], teacher=Teacher())
    module, index = result.module.eval(), torch.tensor([5, 90, 5])
    images = train.tensors[0][index]
    before = module(images, losses=True).total
    kept = keep_teacher(result, train, batch=16)
    found = module(images, losses=True, teacher_logits=kept[index])
    assert isinstance(found.total, Tensor) and len(kept) == 96
    torch.testing.assert_close(found.total, before)
    torch.testing.assert_close(kept[index], Teacher()(images).detach())
    with pytest.raises(ValueError, match="teacher_logits"):
        module(images, losses=True)
    with pytest.raises(PlanError, match="FXC0810"):
        keep_teacher(result, train)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, losses=True, teacher_logits=kept[index]).total, before)
    assert list(result.strip().state_dict()) == list(Net().state_dict())


def test_the_teacher_of_a_cache_is_apart() -> None:
    module = fxcompress.compile(PLAIN, Net(), torch.zeros(2, 1, 6, 6), teacher=Teacher()).module
    assert list(module.state_dict())[:len(Net().state_dict())] == list(Net().state_dict())
    assert not [name for name in module.state_dict() if ".teacher" in name]
    assert len([*module.parameters()]) == len([*Net().parameters()])


def test_the_greatest_logits_keep_their_probabilities() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 4
    found = Kept.of(logits, 5)[torch.arange(6)]
    values, classes = logits.topk(5)
    assert torch.equal(found.gather(1, classes), values)
    torch.testing.assert_close(F.softmax(found, 1).gather(1, classes), F.softmax(logits, 1).gather(1, classes))
    others = F.softmax(found, 1).scatter(1, classes, 0.0)
    torch.testing.assert_close(others.sum(1), 1 - F.softmax(logits, 1).gather(1, classes).sum(1))


def test_training_on_the_greatest_logits() -> None:
    trained = trainer(policy=POLICY % "cache = memory\n            top_k = 2", teacher=Teacher()).fit()
    assert set(trained.history[0]["terms"]) == {"output_kl", "output_similarity", "output_cross_entropy"}
    assert isinstance(trained.deployed, nn.Module)
