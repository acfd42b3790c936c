"""Random networks for the property test of `remove`: a trunk of random blocks, drawn with their sizes from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[..., Tensor]
SIDE = 4


class RandomNet(nn.Module):
    """Blocks on (N, C, 4, 4). `steps` are functions of the network and the value, and hold no module themselves."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self.free = nn.ParameterList()
        self.width = self.draw.choice((8, 12, 16))
        self.steps: list[Step] = [self.add(nn.Conv2d(3, self.width, 3, padding=1))]
        for _ in range(self.draw.randint(2, 6)):
            self.steps.append(self.draw.choice(BLOCKS)(self))
        self.steps.append(self.draw.choice(HEADS)(self))

    def add(self, module: nn.Module) -> Step:
        self.layers.append(module)
        place = len(self.layers) - 1
        return lambda m, *inputs, **named: m.layers[place](*inputs, **named)

    def parameter(self, *shape: int) -> Callable[[RandomNet], Tensor]:
        self.free.append(nn.Parameter(torch.randn(*shape)))
        place = len(self.free) - 1
        return lambda m: m.free[place]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(self, x)
        return x

    def divisor(self, most: int = 4) -> int:
        return self.draw.choice([n for n in range(1, most + 1) if self.width % n == 0])


def activation(net: RandomNet) -> Step:
    function = net.draw.choice((F.relu, F.gelu, torch.sigmoid, F.hardswish, F.leaky_relu))
    return lambda m, x: function(x)


def plain(net: RandomNet) -> Step:
    a, act = net.width, activation(net)
    net.width = net.draw.choice((6, 8, 12, 16, 20))
    layer = net.add(nn.Conv2d(a, net.width, net.draw.choice((1, 3)), padding="same", bias=net.draw.random() < 0.5))
    norm = net.add(nn.BatchNorm2d(net.width)) if net.draw.random() < 0.5 else lambda m, x: x
    return lambda m, x: act(m, norm(m, layer(m, x)))


def residual(net: RandomNet) -> Step:
    inner, act = net.draw.choice((6, 10, 16)), activation(net)
    a, b = net.add(nn.Conv2d(net.width, inner, 3, padding=1)), net.add(nn.Conv2d(inner, net.width, 1))
    scale = net.parameter(net.width, 1, 1) if net.draw.random() < 0.5 else lambda m: 1.0
    return lambda m, x: act(m, x + scale(m) * b(m, act(m, a(m, x))))


def concatenation(net: RandomNet) -> Step:
    grow = net.draw.choice((4, 6, 8))
    layer, first = net.add(nn.Conv2d(net.width, grow, 3, padding=1)), net.draw.random() < 0.5
    net.width += grow
    return lambda m, x: torch.cat([layer(m, x), x] if first else [x, layer(m, x)], 1)


def split_and_mix(net: RandomNet) -> Step:
    left = net.draw.randint(1, net.width - 1)
    rest, made = net.width - left, net.draw.choice((4, 6))
    a = net.add(nn.Conv2d(left, made, 1))
    net.width = made + rest

    def step(m: RandomNet, x: Tensor) -> Tensor:
        one, two = x.split([left, rest], 1)
        return torch.cat([two, F.relu(a(m, one))], 1)

    return step


def gate(net: RandomNet) -> Step:
    layer, half = net.add(nn.Conv2d(net.width, 16, 1)), 8
    net.width = half
    if net.draw.random() < 0.5:
        return lambda m, x: F.glu(layer(m, x), 1)

    def step(m: RandomNet, x: Tensor) -> Tensor:
        a, b = layer(m, x).chunk(2, 1)
        return a * torch.tanh(b)

    return step


def shuffle(net: RandomNet) -> Step:
    groups, width = net.divisor(), net.width
    return lambda m, x: x.view(-1, groups, width // groups, SIDE, SIDE).transpose(1, 2).reshape(-1, width, SIDE, SIDE)


def grouped(net: RandomNet) -> Step:
    groups = net.divisor()
    made = net.draw.choice((1, 2)) * net.width
    layer = net.add(nn.Conv2d(net.width, made, 3, padding=1, groups=groups))
    net.width = made
    return layer


def depthwise(net: RandomNet) -> Step:
    times = net.draw.choice((1, 1, 2))
    layer = net.add(nn.Conv2d(net.width, times * net.width, 3, padding=1, groups=net.width))
    net.width *= times
    return layer


def excite(net: RandomNet) -> Step:
    a, b = net.add(nn.Linear(net.width, 8)), net.add(nn.Linear(8, net.width))
    return lambda m, x: x * torch.sigmoid(b(m, F.relu(a(m, x.mean((2, 3))))))[:, :, None, None]


def move(net: RandomNet) -> Step:
    by = net.draw.randint(-5, 5)
    return net.draw.choice((lambda m, x: torch.roll(x, by, 1), lambda m, x: torch.flip(x, (1,)),
                            lambda m, x: torch.roll(x, (by, 1), (1, 2)), lambda m, x: x.movedim(1, 3).movedim(3, 1)))


def cut(net: RandomNet) -> Step:
    start = net.draw.randint(0, 2)
    net.width -= start
    if net.draw.random() < 0.5:
        return lambda m, x: x[:, start:]
    stop = -start or None
    return lambda m, x: x[:, :stop]


def widen(net: RandomNet) -> Step:
    left, right = net.draw.randint(0, 3), net.draw.randint(0, 3)
    net.width += left + right
    layer = net.add(nn.Conv2d(net.width, net.width, 1))
    return lambda m, x: layer(m, F.pad(x, (0, 0, 0, 0, left, right)))


def again(net: RandomNet) -> Step:
    if net.draw.random() < 0.5:
        net.width *= 2
        return lambda m, x: x.repeat(1, 2, 1, 1)
    net.width *= 2
    return lambda m, x: x.repeat_interleave(2, 1)


def pixels(net: RandomNet) -> Step:
    layer = net.add(nn.Conv2d(net.width, 24, 1))
    net.width = 24
    return lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(layer(m, x), 2), 2)


def attention(net: RandomNet) -> Step:
    heads, width = net.draw.choice(((2, 4), (4, 2), (3, 4))), net.width
    h, d = heads
    qkv, out = net.add(nn.Linear(width, 3 * h * d)), net.add(nn.Linear(h * d, width))
    bias = net.parameter(h, SIDE * SIDE, SIDE * SIDE)
    fused, packed = net.draw.random() < 0.5, net.draw.random() < 0.5

    def step(m: RandomNet, x: Tensor) -> Tensor:
        n = x.shape[0]
        t = x.flatten(2).transpose(1, 2)
        if packed:
            q, k, v = qkv(m, t).view(n, -1, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (part.unflatten(-1, (h, d)).transpose(1, 2) for part in qkv(m, t).chunk(3, -1))
        if fused:
            t = F.scaled_dot_product_attention(q, k, v, attn_mask=bias(m))
        else:
            t = ((q @ k.mT) * d ** -0.5 + bias(m)).softmax(-1) @ v
        return x + out(m, t.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(n, width, SIDE, SIDE)

    return step


def module_attention(net: RandomNet) -> Step:
    width = net.width
    mha = net.add(nn.MultiheadAttention(width, net.divisor(), batch_first=True, bias=net.draw.random() < 0.5))

    def step(m: RandomNet, x: Tensor) -> Tensor:
        t = x.flatten(2).transpose(1, 2)
        return mha(m, t, t, t, need_weights=False)[0].transpose(1, 2).reshape(-1, width, SIDE, SIDE)

    return step


def twice(net: RandomNet) -> Step:
    layer = net.add(nn.Conv2d(net.width, net.width, 3, padding=1))
    return lambda m, x: layer(m, F.relu(layer(m, x)))


def product(net: RandomNet) -> Step:
    weight = net.parameter(net.width, 10)
    net.width = 10
    if net.draw.random() < 0.5:
        return lambda m, x: torch.einsum("nchw,cd->ndhw", x, weight(m))
    return lambda m, x: (x.permute(0, 2, 3, 1) @ weight(m)).permute(0, 3, 1, 2)


def branches(net: RandomNet) -> Step:
    a, b = net.add(nn.Conv2d(net.width, 8, 1)), net.add(nn.Conv2d(net.width, 8, 3, padding=1))
    net.width = 8
    return lambda m, x: torch.stack([a(m, x), b(m, x)], 1).sum(1)


def pooled(net: RandomNet) -> Step:
    layer = net.add(nn.Linear(net.width, 5))
    return lambda m, x: layer(m, x.mean((2, 3)))


def flat(net: RandomNet) -> Step:
    last = net.draw.random() < 0.5
    layer = net.add(nn.Linear(net.width * SIDE * SIDE, 5))
    return lambda m, x: layer(m, (x.permute(0, 2, 3, 1) if last else x).flatten(1))


def two_outputs(net: RandomNet) -> Step:
    a, b = net.add(nn.Linear(net.width, 5)), net.add(nn.Conv2d(net.width, 5, 1))
    return lambda m, x: a(m, x.amax((2, 3))) + b(m, x).mean((2, 3))


BLOCKS = (plain, plain, residual, residual, concatenation, split_and_mix, gate, shuffle, grouped, depthwise, excite,
          move, cut, widen, again, pixels, attention, module_attention, twice, product, branches)
HEADS = (pooled, flat, two_outputs)
