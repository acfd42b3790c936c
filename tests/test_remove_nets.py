"""`remove` on one small network a construction: equal to the dense model with its readers zeroed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from remove_check import apart, captured_of, kept_indices, makers, remove, wake, zeroed
from remove_nets_forms import NETS

# Read along these, besides modules.
RAW = {"raw_parameters": {"inner": 0, "outer": 0}, "einsum_mixing": {"w": 1}, "einsum_forms": {"b": 0},
       "products_of_tensors": {"w": 0, "pair.weight": 2},
       "raw_kernels": {"w2": 0, "left": 1, "right": 1, "out": 1}}
# What has no channels: masks, positions, a matrix from token to token, one slope for all.
STAYS = {"mask", "keep", "places", "at", "order", "keys", "tokens.weight", "4.weight"}
# Their norm notices a zeroed column: see the tests below.
NORMALISED_WEIGHTS = ("computed_weights", "spectral", "older_computed_weights", "older_spectral", "standardised")


def built(name):
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    return wake(model), inputs


@pytest.mark.parametrize("name", [name for name in NETS if name not in NORMALISED_WEIGHTS])
def test_equals_the_dense_model_with_readers_zeroed(name):
    model, inputs = built(name)
    before = copy.deepcopy(model.state_dict())
    captured = captured_of(model, inputs)
    result, outcome = remove(captured)
    assert sum(p.numel() for p in result.module.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())
    state = result.module.state_dict()
    whole = {key for key, value in before.items() if value.dim() and value.shape == state[key].shape}
    assert all(key.endswith("bias") or key in STAYS for key in whole), "a construction was a barrier"
    dense = zeroed(model, kept_indices(result, outcome), RAW.get(name))
    with torch.no_grad():
        expected, found, uncut = dense(*inputs), result.module(*inputs), model(*inputs)
    assert apart(expected, found) < 1e-4
    assert apart(uncut, found) > 1e-2, "nothing that matters was removed: the test would show nothing"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(captured.module.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", list(NETS))
def test_stays_trainable_and_can_be_removed_from_again(name):
    model, inputs = built(name)
    result, outcome = remove(captured_of(model, inputs))
    result.module.train()
    result.module(*inputs).square().mean().backward()
    parameters = dict(result.module.named_parameters())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters.values())
    assert set(parameters) <= set(dict(model.named_parameters()))
    result.module.eval()
    again, _ = remove(result, ratio=0.34)
    assert any("proven equal" in note for note in outcome.notes)
    assert sum(p.numel() for p in again.module.parameters()) < sum(p.numel() for p in parameters.values())
    assert again.module(*inputs).shape == model(*inputs).shape


@pytest.mark.parametrize("name", NORMALISED_WEIGHTS)
def test_a_weight_normalised_over_what_leaves_is_reported_as_inexact(name):
    model, inputs = built(name)
    _, outcome = remove(captured_of(model, inputs))
    assert any(note.startswith("inexact: ") for note in outcome.notes)


@pytest.mark.parametrize("name", list(NETS))
def test_works_on_a_skeleton_and_gives_the_same_shapes(name):
    model, inputs = built(name)
    captured = captured_of(model, inputs)
    skeleton, outcome = remove(captured.skeleton(), nodes=makers(captured))
    real, expected = remove(captured)
    shapes = [{key: value.shape for key, value in part.module.state_dict().items()} for part in (skeleton, real)]
    assert shapes[0] == shapes[1]
    assert outcome.changes == expected.changes
    assert outcome.unknown
