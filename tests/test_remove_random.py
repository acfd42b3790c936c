"""The proof as a property: on random networks, what a random removal leaves equals the dense model, readers zeroed."""

from __future__ import annotations

import random

import pytest
import torch
from remove_check import apart, captured_of, kept_indices, remove, wake, zeroed
from remove_random import RandomNet

from fxcompress.diagnostics import PlanError


def check(seed: int) -> bool:
    """Whether anything could be removed; fails where the result is wrong."""
    draw = random.Random(seed + 1_000_000)
    model, inputs = wake(RandomNet(seed), seed), (torch.randn(2, 3, 4, 4),)
    settings = {"ratio": draw.choice((0.2, 0.5, 0.8)), "by": draw.choice(("l1", "l2", "random")), "seed": seed,
                "align": draw.choice((1, 1, 2, 4)), "scope": draw.choice(("local", "global")), "verify": "off"}
    captured = captured_of(model, inputs)
    try:
        result, outcome = remove(captured, **settings)
    except PlanError as error:
        assert error.diagnostics[0].code == "FXC0340"
        return False
    kept = kept_indices(result, outcome)
    raw = {f"free.{place}": 0 for place, p in enumerate(model.free) if p.dim() == 2}
    heads = {name: 1 for name, _ in model.named_parameters() if name.endswith("out_proj.weight")}
    dense = zeroed(model, kept, {**raw, **heads})
    found = result.module.double()(*(x.double() for x in inputs))
    expected = dense.double()(*(x.double() for x in inputs))
    assert apart(expected.detach(), found.detach()) < 1e-9, (seed, settings)
    found.sum().backward()
    return True


@pytest.mark.parametrize("start", range(0, 100, 10))
def test_a_hundred_random_networks(start):
    removed = [check(seed) for seed in range(start, start + 10)]
    assert sum(removed) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 2000, 50))
def test_a_thousand_random_networks(start):
    removed = [check(seed) for seed in range(start, start + 50)]
    assert sum(removed) >= 40
