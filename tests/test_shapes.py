"""The rules of shapes against what torch's own functions give on real tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.ops import StochasticDepth

import fxcompress
from fxcompress.graph.ops import OPS
from fxcompress.graph.probe import Fakes
from fxcompress.graph.shapes import RULES
from fxcompress.graph.shapes_modules import MODULE_RULES, rule_of
from fxcompress.nn.distillation import Distillation

R = torch.randn
Call = tuple[tuple[Any, ...], dict[str, Any]]


def c(*args: Any, **kwargs: Any) -> Call:
    """The arguments of one call."""
    return args, kwargs


X, WIDE = R(2, 6, 5, 4), R(2, 6, 5, 4).permute(0, 2, 3, 1)  # contiguous, and channels last
UNARY: list[Call] = [c(X), c(WIDE), c(torch.ones(3, dtype=torch.int32)), c(R(()))]
BINARY: list[Call] = [c(X, X), c(X, 2), c(2.5, X), c(X, R(6, 1, 1)), c(R(3, 1), R(1, 4)), c(WIDE, WIDE), c(WIDE, R(6)),
                      c(X, X.double()), c(X, R(())), c(torch.ones(3, dtype=torch.int64), 2.5), c(X, R(3))]
TENSORS = [call for call in BINARY if all(isinstance(item, Tensor) for item in call[0])]
COMPARED: list[Call] = [c(X, 0), c(X, X), c(WIDE, 1.5), c(torch.ones(3).long(), 2)]
REDUCED: list[Call] = [c(X, 1), c(X, (2, 3)), c(X, (-1, -2), True), c(X, -1, keepdim=True), c(WIDE, 2), c(X, 4)]
CONVOLUTIONS: list[Call] = [
    c(X, R(4, 6, 3, 3)), c(X, R(4, 6, 3, 3), R(4), stride=2, padding=1), c(X, R(12, 2, 1, 3), groups=3, padding=(0, 1)),
    c(X, R(4, 6, 3, 3), padding="same"), c(X, R(4, 6, 2, 2), padding="valid", dilation=2), c(X[0], R(4, 6, 3, 3)),
    c(X, R(4, 5, 3, 3)), c(X, R(4, 6, 9, 3)), c(X, R(4, 6, 3, 3), R(5)), c(X.double(), R(4, 6, 3, 3)),
    c(X.to(memory_format=torch.channels_last), R(4, 6, 3, 3)), c(X, R(4, 6, 3, 3), stride=(2, 1))]
TRANSPOSED: list[Call] = [
    c(X, R(6, 4, 3, 3)), c(X, R(6, 2, 3, 2), R(4), stride=2, padding=1, output_padding=1, groups=2),
    c(X, R(6, 4, 3, 3), dilation=(2, 1)), c(X, R(5, 4, 3, 3)), c(X, R(6, 4, 3, 3), output_padding=1),
    c(X[0], R(6, 4, 3, 3))]
NORMED: list[Call] = [c(X, (4,)), c(X, (5, 4), R(5, 4)), c(WIDE, (6,), R(6)), c(X, (3,)), c(X, (4,), R(5))]
Q = R(2, 3, 5, 8)
CASES: Mapping[str, Sequence[Call]] = {
    **dict.fromkeys("eq ne lt le gt ge".split(), tuple(COMPARED)),
    **dict.fromkeys("add sub mul div pow".split(), tuple(BINARY)),
    "maximum": TENSORS, "minimum": TENSORS,
    "conv2d": CONVOLUTIONS, "conv_transpose2d": TRANSPOSED,
    "conv1d": [c(R(2, 3, 9), R(4, 3, 2), dilation=3, stride=2), c(R(3, 9), R(4, 3, 2))],
    "conv3d": [c(R(2, 3, 4, 5, 6), R(4, 3, 2, 3, 1), padding=(1, 0, 2))],
    "conv_transpose1d": [c(R(2, 3, 9), R(3, 4, 2), stride=3, output_padding=2)],
    "conv_transpose3d": [c(R(2, 3, 4, 5, 6), R(3, 4, 2, 3, 1), padding=(1, 0, 0))],
    "linear": [c(X, R(7, 4), R(7)), c(R(4), R(7, 4)), c(WIDE, R(7, 6)), c(X, R(7, 5)), c(X, R(7, 4), R(3)), c(X, R(4))],
    "bmm": [c(R(2, 3, 4), R(2, 4, 5)), c(R(2, 3, 4), R(2, 3, 5)), c(R(2, 3, 4), R(3, 4, 5))],
    "batchnorm": [c(X, R(6), R(6), R(6), R(6)), c(WIDE, R(5), R(5)), c(X, R(5), R(5)), c(X, None, None, training=True)],
    "layernorm": NORMED, "rmsnorm": NORMED,
    "groupnorm": [c(X, 3, R(6), R(6)), c(X, 4), c(X, 2, R(5)), c(WIDE, 5)],
    "scaled_dot_product_attention": [
        c(Q, Q, Q), c(Q, R(2, 3, 7, 8), R(2, 3, 7, 6)), c(Q, Q, Q, R(5, 5)), c(Q[0], Q[0], Q[0]), c(Q, Q, Q, R(5, 4)),
        c(Q, R(2, 3, 7, 8), R(2, 3, 6, 8)), c(R(2, 6, 5, 8), Q, Q, enable_gqa=True), c(Q, Q, Q, is_causal=True)],
    "softmax": [c(X, 1), c(WIDE, -1), c(X, 4), c(X, 1, dtype=torch.float64)], "log_softmax": [c(X, 1), c(X, -5)],
    "cat": [c((X, X), 1), c([X, R(2, 1, 5, 4)], 1), c((X, X), -1), c((X, R(2, 6, 5, 3)), 1), c((WIDE, WIDE), 1),
            c((X, X.double())), c((X, R(0)))],
    "stack": [c((X, X), 1), c((X, X), -1), c((X, X[0])), c((X, X), 5)],
    "mean": [*REDUCED, c(X), c(torch.ones(3).long(), dtype=torch.float32)],
    "sum": [*REDUCED, c(X), c(torch.ones(3) > 0)],
    "amax": [*REDUCED, c(X)], "amin": [*REDUCED, c(X)],
    "adaptive_avg_pool1d": [c(R(2, 3, 9), 4)], "adaptive_avg_pool3d": [c(R(2, 3, 4, 5, 6), (1, 2, 3))],
    "adaptive_avg_pool2d": [c(X, 1), c(X, (3, 2)), c(X, (None, 1)), c(X[0], 1)],
    "interpolate": [c(X, 7), c(X, (3, 9), mode="bilinear"), c(X, scale_factor=1.5), c(X, scale_factor=0.4),
                    c(X, scale_factor=(2, 0.5)), c(X, size=(4, 4), mode="bicubic", align_corners=True),
                    c(R(2, 3, 9), 4, mode="linear"), c(R(2, 3, 2, 3, 4), 3, mode="trilinear"), c(X, 3, mode="linear"),
                    c(R(1, 1, 10, 7), scale_factor=1.1)],
    "masked_fill": [c(X, X > 0, 1.0), c(X, R(4) > 0, 2), c(R(4), X > 0, 1.0), c(WIDE, WIDE > 0, -1.0)],
    "roll": [c(X, 1, 2), c(X, (1, -2), (1, 3)), c(X, 3), c(WIDE, 1, 1)],
    "dropout": [c(X, 0.5, True), c(X, 0.5, False), c(WIDE, 0.0, True)],
    "threshold": [c(X, 0.1, 2.0), c(WIDE, 0.1, 2.0)],
    "clamp": [c(X, 0, 1), c(X, min=R(4)), c(torch.ones(3).long(), 0.5)],
}
OPERATORS = sorted(name for name, op in OPS.items() if op.target in RULES)


def described(value: Any) -> Any:
    """Shapes, dtypes, and the order in memory of every tensor in `value`."""
    def one(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        real = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
        return tuple(tensor.shape), tensor.dtype, real

    return pytree.tree_map(one, value)


def on_meta(value: Any) -> Any:
    return pytree.tree_map(lambda item: item.to("meta") if isinstance(item, Tensor) else item, value)


def check(run: Any, rule: Any, call: Call) -> bool:
    """Compare a rule with the real thing; whether the rule took the call."""
    args, kwargs = on_meta(call)
    found = rule(*args, **kwargs)
    if found is None:
        return False
    assert described(found) == described(run(*call[0], **call[1]))  # raises where the call is wrong
    return True


@pytest.mark.parametrize("name", OPERATORS)
def test_rules_give_what_torch_gives(name: str) -> None:
    op = OPS[name]
    calls = CASES.get(name) or UNARY
    taken = [check(op.target, RULES[op.target], call) for call in calls]
    assert any(taken)


MODULES: list[tuple[nn.Module, list[Call]]] = [
    (nn.Conv2d(6, 4, 3, padding=1), [c(X), c(X[0]), c(R(2, 5, 4, 4))]),
    (nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), [c(X)]),
    (nn.Conv1d(3, 4, 2), [c(R(2, 3, 9))]), (nn.Conv3d(3, 4, 2), [c(R(2, 3, 4, 4, 4))]),
    (nn.ConvTranspose1d(3, 4, 2), [c(R(2, 3, 9))]), (nn.ConvTranspose3d(3, 4, 2), [c(R(2, 3, 4, 4, 4))]),
    (nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1), [c(X), c(X, output_size=[11, 9])]),
    (nn.Linear(4, 3), [c(X), c(WIDE)]), (nn.BatchNorm2d(6), [c(X), c(WIDE), c(X[0])]),
    (nn.BatchNorm1d(6), [c(R(3, 6)), c(R(3, 6, 2)), c(X)]), (nn.BatchNorm3d(6), [c(R(2, 6, 2, 2, 2))]),
    (nn.InstanceNorm1d(6, affine=True), [c(R(3, 6, 4))]), (nn.InstanceNorm2d(6), [c(X)]),
    (nn.InstanceNorm3d(3), [c(R(2, 3, 4, 4, 4))]), (nn.LayerNorm(4), [c(X), c(R(3))]), (nn.RMSNorm(6), [c(WIDE)]),
    (nn.GroupNorm(3, 6), [c(X), c(R(2, 9, 4))]), (nn.PReLU(6), [c(X), c(R(2, 5, 4))]), (nn.RReLU(), [c(X)]),
    (nn.Embedding(9, 4), [c(torch.arange(6).view(2, 3)), c(R(3))]),
    (nn.Embedding(9, 4, max_norm=1.0), [c(torch.arange(6))]),
    (StochasticDepth(0.5, "row"), [c(X)]),
    *((cls(0.3), [c(X)]) for cls in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)),
    (nn.Dropout1d(0.3), [c(R(2, 3, 4))]), (nn.Dropout3d(0.3), [c(R(2, 3, 4, 4, 4))]),
    *((cls(4, 3, 2, bidirectional=two, batch_first=first), [c(R(2, 5, 4)), c(R(5, 4)), c(R(2, 5, 3))])
      for cls in (nn.LSTM, nn.GRU, nn.RNN) for two, first in ((True, False), (False, True))),
    (nn.LSTM(4, 6, proj_size=3, bidirectional=True), [c(R(2, 5, 4)), c(R(2, 5, 4), (R(2, 5, 3), R(2, 5, 6)))]),
    (nn.MultiheadAttention(8, 2, batch_first=True), [c(R(2, 5, 8), R(2, 5, 8), R(2, 5, 8), need_weights=False)]),
    (nn.MultiheadAttention(8, 2), [c(R(2, 5, 8), R(2, 5, 8), R(2, 5, 8)), c(R(2, 5, 8), R(2, 5, 6), R(2, 5, 6)),
                                   c(*[R(2, 5, 8)] * 3, average_attn_weights=False), c(*[R(2, 5, 6)] * 3)]),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", range(len(MODULES)), ids=lambda place: f"{type(MODULES[place][0]).__name__}{place}")
def test_module_rules_give_what_the_module_gives(place: int, training: bool) -> None:
    module, calls = MODULES[place]
    module.train(training)
    rule = rule_of(module)
    assert rule is not None
    for call in calls:
        check(module, lambda *args, **kwargs: rule(module, *args, **kwargs), call)


def test_every_rule_is_tested() -> None:
    kinds = {type(module) for module, _ in MODULES}
    assert kinds >= MODULE_RULES.keys() - {nn.SyncBatchNorm, Distillation}  # which want a GPU, and a teacher


def test_what_learns_gives_what_the_student_gives() -> None:
    result = fxcompress.compile("policy p { distill from original { pair output <- output { loss = kl } } }",
                                nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    module = next(part for part in result.module.modules() if isinstance(part, Distillation))
    rule = rule_of(module)
    assert rule is not None
    output = torch.randn(2, 3)
    assert rule(module, output, None, False).shape == module(output, None, False).shape == (2, 3)


def test_every_operator_is_tested() -> None:
    assert {name for name in OPERATORS if name not in CASES} <= {
        name for name in OPERATORS if OPS[name].family == "elementwise"}


def test_a_module_with_hooks_or_computed_weights_is_left_to_torch() -> None:
    hooked = nn.Linear(3, 4)
    hooked.register_forward_hook(lambda module, args, output: output[..., :2])
    assert rule_of(hooked) is None
    fakes = Fakes((1, 2), torch.device("cpu"))
    assert fakes.run_module(hooked, (torch.empty(2, 3, device="meta"),), {}).shape == (2, 2)
    assert rule_of(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))) is None


def test_what_meta_refuses_runs_on_fake_tensors() -> None:
    fakes = Fakes((1, 2), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="reduction dim"):
        fakes.call(torch.mm, (torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta")), {})
    with pytest.raises(RuntimeError, match="running_mean should contain 5 elements not 6"):
        fakes.run_module(nn.BatchNorm2d(6).train(), (torch.empty(2, 5, 3, 3, device="meta"),), {})
