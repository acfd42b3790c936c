"""The same training on two processes as on one: `accelerate launch`, on the CPU, over gloo."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_nets import POLICY, SETTINGS, environment

from fxcompress.passbase import VERBS

HERE = Path(__file__).parent


def command(folder: Path, output: str) -> list[str]:
    """A training with gradients that are clipped, masks by magnitude and by gradient, and channels that leave by Taylor
    scores while it goes on."""
    (folder / "small.fxc").write_text(POLICY)
    return ["train", str(folder / "small.fxc"), "--model", f"{HERE}/train_nets.py:plain", "--data",
            f"{HERE}/train_nets.py:data", "--epochs", "6", "--batch", "16", "--optimizer", "SGD(lr=0.05, momentum=0.9)",
            "--scheduler", "CosineAnnealingLR", "--clip", "1.0", "--accumulate", "2", "--device", "cpu", "-o",
            str(folder / output)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where both processes wrote, and what they printed."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # On a machine without a GPU this is the launcher of several CPU processes too: `--cpu` would want MPI.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
              str(port)]
    done = subprocess.run([*launch, HERE / "train_ranks.py", folder, *command(folder, "two")], check=False, text=True,
                          capture_output=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / name, weights_only=True)
    return found


@pytest.mark.parametrize("name", ["command", "norm", "resumed", *(["distill"] if "distill" in VERBS else [])])
def test_both_processes_end_alike(ranks: tuple[Path, str], name: str) -> None:
    one, two = (read(ranks[0], f"{name}{rank}.pt") for rank in (0, 1))
    assert one["code"] == two["code"] and one["history"] == two["history"]
    assert one["state"].keys() == two["state"].keys()
    for key, value in one["state"].items():  # weights, masks, what is left of channels, running statistics
        assert torch.equal(value, two["state"][key]), key
    assert any(key.endswith("mask") and not bool(value.all()) for key, value in one["state"].items())


def test_one_process_comes_to_the_same_weights(ranks: tuple[Path, str], tmp_path: Path) -> None:
    from test_train import run

    assert run(command(tmp_path, "one")) == 0
    ours, theirs = read(tmp_path / "one", "checkpoint.pt"), read(ranks[0] / "two", "checkpoint.pt")
    for mine, other in zip(ours["history"], theirs["history"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["validation"] == pytest.approx(other["validation"], rel=1e-4)  # 40 samples, two batches and a half
    one, two = ours["model"], theirs["model"]
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.endswith(".mask"):
            assert torch.equal(value, two[name]), name
        elif value.is_floating_point():
            assert value.shape == two[name].shape
            torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)
    assert one["conv1.weight"].shape[0] == 4 and one["conv1.weight_mask.evidence"].abs().max() > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_are_resumed_with_the_random_numbers_of_each(ranks: tuple[Path, str], rank: int) -> None:
    whole, resumed = read(ranks[0], f"norm{rank}.pt"), read(ranks[0], f"resumed{rank}.pt")
    assert whole["history"] == resumed["history"]  # with dropout, which draws otherwise on each process
    assert all(torch.equal(value, resumed["state"][name]) for name, value in whole["state"].items())


def test_one_process_speaks(ranks: tuple[Path, str]) -> None:
    lines = ranks[1].splitlines()
    assert sum(line.startswith("epoch 6/6") for line in lines) == 1
    assert sum(line.startswith("the artifact is in") for line in lines) == 1
    assert (ranks[0] / "two" / "artifact" / "weights.safetensors").exists() and SETTINGS["epochs"] == 6


_LEAVES = """
import atexit, sys, torch
atexit.register(lambda: print("there" if torch.distributed.is_initialized() else "left"))  # comes last
from fxcompress.training import Settings, setup
from fxcompress import parse
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
setup.accelerator_for(parse("policy p { }"), Settings(epochs=1, batch=4, device="cpu"))
assert torch.distributed.is_initialized()
"""


def test_a_process_leaves_its_group_before_it_ends(tmp_path: Path) -> None:
    """One that ends with the threads of its group aborts now and then."""
    done = subprocess.run([sys.executable, "-c", _LEAVES, str(tmp_path / "store")], check=False, text=True,
                          capture_output=True, env=environment())
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr
