"""Small models that write things in awkward ways: both ways of capture compute what the model computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.graph import Captured, capture
from fxcompress.graph.ops import kind_of

WAYS = ("fx", "export")


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    if isinstance(value, Mapping):
        return tensors(list(value.values()))
    return [t for item in value for t in tensors(item)] if isinstance(value, tuple | list) else []


def assert_same(model: nn.Module, captured: Captured, *args: Any, gradients: bool = True, **kwargs: Any) -> None:
    """Outputs, in both modes, and gradients are equal bit for bit, with the same random numbers."""
    module = captured.module
    assert list(module.state_dict()) == list(model.state_dict())
    assert module.training == model.training
    for training in (False, True):
        model.train(training), module.train(training)
        results = []
        for each in (model, module):
            each.zero_grad()
            torch.manual_seed(7)
            results.append(tensors(each(*args, **kwargs)))
            if gradients:
                sum(out.float().sum() for out in results[-1] if out.requires_grad).backward()
        assert len(results[0]) == len(results[1]) > 0
        for left, right in zip(*results, strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
        grads = dict(module.named_parameters())
        for name, parameter in model.named_parameters():
            other = grads[name].grad
            assert (parameter.grad is None) == (other is None), name
            assert parameter.grad is None or torch.equal(parameter.grad, other), name


class Net(nn.Module):
    """A model made of one function of itself and its inputs, and of the modules it is given."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3, padding=1)


def _aliased_residual(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    kept = y
    y += 1
    return kept * y  # `kept` is `y`


def _written_slice(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    y[:, 1:3] = 0.5
    y[:, 0, 1] = x[:, 0, 1]
    y[..., -1] += 2
    return y * 2


def _written_view(m: Any, x: Tensor) -> Tensor:
    y = m.c(x).clone()
    part = y[:, :2]
    part.mul_(3).add_(1, alpha=2)
    return y + 1


def _written_mask(m: Any, x: Tensor) -> Tensor:
    y = m.c(x).clone()
    y[y < 0] = 0
    return y


def dynamic_sizes(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    flat = m.c(x).view(b, -1)
    zeros = torch.zeros(b, 2, device=x.device)
    steps = torch.arange(b, device=x.device).unsqueeze(1).to(x.dtype) / b
    assert flat.size(0) == b and c == 3 and len(x.shape) == 4 and (h // 2) * 2 == w
    return torch.cat([flat, zeros, steps, flat.new_ones(b, h)], 1).reshape(b * 3, -1)


def _constants(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[-2:], device=x.device).tril().bool()
    bias = x.new_zeros(x.shape[1], 1, 1)
    bias[1] = 3
    positions = torch.arange(x.shape[-1]).view(1, -1)
    return (m.c(x + bias)).masked_fill(~mask, 0.0) + positions


def _arithmetic(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    z = 1 - y / 3 + torch.add(y, x[:, :1], alpha=2) - torch.sub(y, 1, alpha=3) + torch.rsub(y, 2, alpha=0.5)
    whole = x[:, :1].int()
    z = z + (y.detach() // 0.5) + (whole // 2) + torch.div(whole, 3, rounding_mode="floor")
    z = z + 2 / (y.abs() + 1) + y.square() ** 0.5 + 2.0 ** y.sigmoid() + (y % 0.3)
    z = z + torch.div(y, 2, rounding_mode="floor") + torch.where(y > 0, y, y.exp() - 1)
    z = z + (-y).clip(-1, 1).clamp_min(-0.5) + y.var((2, 3), keepdim=True, unbiased=False) + y.std(dim=1, keepdim=True)
    return z + torch.max(y, x[:, :1]) + y.max(dim=1, keepdim=True).values + y.amax((2, 3), True)


def _shapes(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    a, b = y.chunk(2, dim=1)
    c, d = torch.split(y, [1, 3], 1)
    e = torch.stack([a.mean(1), b.mean(1)], 1).flip(-1).roll((1, 2), (2, 3))
    f = torch.einsum("bchw,bchv->bwv", y, y).unsqueeze(1)
    g = y.permute(0, 2, 3, 1).contiguous().view(y.shape[0], -1, y.shape[1]).mT.unflatten(2, (y.shape[2], -1))
    h = F.pad(d[:, 0:2, ::2], (0, 0, 0, y.shape[2] - y.shape[2] // 2))
    return torch.cat([e, f, g, h, c.expand(-1, 2, -1, -1), y.swapaxes(2, 3), y.mT.repeat(1, 2, 1, 1)], dim=1)


def _dropouts(m: Any, x: Tensor) -> Tensor:
    y = F.dropout(m.c(x), 0.3, m.training)
    q = y.flatten(2)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.25 if m.training else 0.0)


def _without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.c(x) * 2
    return m.c(x) * target.detach() + target


def _twice(m: Any, x: Tensor) -> Tensor:
    return m.act(m.same(m.act(m.same(x))))


def _numbers(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    return {"out": y.sum(), "n": x.shape[1], "batch": (y, [y + 1, None])}


def _random(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    keep = y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.5)
    return y * keep + torch.randn_like(y) + torch.rand(x.shape[-1], device=x.device)


def _functional(m: Any, x: Tensor) -> Tensor:
    y = F.embedding((x.abs() * 2).long().clamp(max=3)[:, 0], m.e.weight, padding_idx=0)
    a, b, c = y.tensor_split(3, dim=-1)
    d, e = y.split_with_sizes([2, 1], -1)
    z = F.elu(y, 0.5) + F.layer_norm(y, (3,), m.e.weight[0]) + torch.cat([a, b, c], -1) + torch.cat([d, e], dim=-1)
    w = m.e.weight
    z = z + z.mT.mH.swapaxes(axis0=1, axis1=2).swapdims(1, 2).adjoint().mT + (z.flatten(0, 2).T.H.t().t()).mean()
    return torch.einsum("bhwc,vc->bhwv", z, w) + F.linear(z, w)


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "aliased residual": (_aliased_residual, {"c": conv}),
    "written slice": (_written_slice, {"c": conv}),
    "written view": (_written_view, {"c": conv}),
    "written mask": (_written_mask, {"c": conv}),
    "dynamic sizes": (dynamic_sizes, {"c": conv}),
    "constants": (_constants, {"c": conv}),
    "arithmetic": (_arithmetic, {"c": conv}),
    "shapes": (_shapes, {"c": conv}),
    "dropouts": (_dropouts, {"c": conv}),
    "no gradient": (_without_gradient, {"c": conv}),
    "one module twice": (_twice, {"same": lambda: nn.Conv2d(3, 3, 1), "act": nn.ReLU}),
    "numbers": (_numbers, {"c": conv}),
    "random": (_random, {"c": conv}),
    "checkpoint": (lambda m, x: torch.utils.checkpoint.checkpoint(m.c, x, use_reentrant=False) + x[:, :1], {"c": conv}),
    "functional": (_functional, {"e": lambda: nn.Embedding(4, 3)}),
    "group norm": (lambda m, x: m.n(m.c(x)), {"c": conv, "n": lambda: nn.GroupNorm(2, 4)}),
    "instance norm": (lambda m, x: m.n(m.c(x)), {"c": conv, "n": lambda: nn.InstanceNorm2d(4, affine=True)}),
    "transposed": (lambda m, x: m.t(m.c(x)), {"c": conv, "t": lambda: nn.ConvTranspose2d(4, 2, 2, 2)}),
    "resize": (lambda m, x: F.interpolate(m.c(x), scale_factor=2, mode="bilinear") + F.interpolate(x, (16, 16))[:, :1],
               {"c": conv}),
    "pools": (lambda m, x: m.a(m.p(m.c(x))).flatten(1),
              {"c": conv, "p": lambda: nn.MaxPool2d(2), "a": lambda: nn.AdaptiveAvgPool2d((1, 1))}),
    "identity": (lambda m, x: m.i(m.c(x)), {"c": conv, "i": nn.Identity}),
    "weight norm": (lambda m, x: m.c(x), {"c": lambda: nn.utils.parametrizations.weight_norm(conv())}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_form(form: str, way: str) -> None:
    torch.manual_seed(0)
    function, modules = FORMS[form]
    model = Net(function, **{name: make() for name, make in modules.items()})
    captured = capture(model, (torch.randn(2, 3, 8, 8),), way)  # type: ignore[arg-type]
    assert captured.way == way and not captured.fixed_batch and not captured.notes
    assert not [kind for node in captured.graph.nodes if "." in (kind := kind_of(node))], "no canonical name"
    assert_same(model, captured, torch.randn(3, 3, 8, 8))
    captured.refresh()
    assert_same(model, captured, torch.randn(5, 3, 8, 8))
