"""Small networks, each with one construction that structured removal has to follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


class Net(nn.Module):
    """A network from its parts and a function `forward(parts, x)`."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


def conv(a: int, b: int, k: int = 3, **rest: int) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **rest)


def picture(channels: int = 3) -> tuple[Tensor, ...]:
    return (torch.randn(2, channels, 8, 8),)


def tokens(width: int = 16) -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, width),)


def head(m: Net, x: Tensor) -> Tensor:
    return m.fc(x.mean((2, 3)))


Build = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
NETS: dict[str, Build] = {}


def net(build: Build) -> Build:
    NETS[build.__name__] = build
    return build


@net
def residual():
    def run(m, x):
        x = m.a(x)
        x = x + m.c(F.relu(m.b(x)))
        return head(m, F.relu(x))

    return Net(run, a=conv(3, 16), b=conv(16, 16), c=conv(16, 16), fc=nn.Linear(16, 5)), picture()


@net
def dense_concatenation():
    def run(m, x):
        x = m.a(x)
        for layer in (m.b, m.c):
            x = torch.cat([x, F.relu(layer(x))], 1)
        return head(m, m.bn(x))

    parts = {"a": conv(3, 12), "b": conv(12, 8), "c": conv(20, 8), "bn": nn.BatchNorm2d(28), "fc": nn.Linear(28, 5)}
    return Net(run, **parts), picture()


@net
def unequal_split():
    def run(m, x):
        a, b = m.a(x).split([4, 12], 1)
        return head(m, torch.cat([m.b(b), a, F.relu(b)], 1))

    return Net(run, a=conv(3, 16), b=conv(12, 6), fc=nn.Linear(22, 5)), picture()


@net
def chunk_and_gate():
    def run(m, x):
        a, b = m.a(x).chunk(2, dim=1)
        return head(m, m.b(a * torch.sigmoid(b)))

    return Net(run, a=conv(3, 24), b=conv(12, 8), fc=nn.Linear(8, 5)), picture()


@net
def glu():
    parts = {"a": conv(3, 24), "b": conv(12, 8), "fc": nn.Linear(8, 5)}
    return Net(lambda m, x: head(m, m.b(F.glu(m.a(x), dim=1))), **parts), picture()


@net
def channel_shuffle():
    def run(m, x):
        x = m.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b = x.chunk(2, 1)
        return head(m, torch.cat([a, m.b(b)], 1))

    return Net(run, a=conv(3, 24), b=conv(12, 12), fc=nn.Linear(24, 5)), picture()


@net
def shuffle_module():
    return nn.Sequential(conv(3, 24), nn.ChannelShuffle(3), conv(24, 8, groups=2), nn.Flatten(),
                         nn.Linear(512, 5)), picture()


@net
def roll_and_flip():
    def run(m, x):
        x = torch.roll(m.a(x), 5, 1)
        return head(m, m.b(torch.flip(x, [1])))

    return Net(run, a=conv(3, 16), b=conv(16, 8), fc=nn.Linear(8, 5)), picture()


@net
def one_sided_slice():
    def run(m, x):
        x = m.a(x)
        return head(m, m.b(x[:, 4:]) + m.c(x[:, :-6]))

    return Net(run, a=conv(3, 16), b=conv(12, 8), c=conv(10, 8), fc=nn.Linear(8, 5)), picture()


@net
def repeated():
    def run(m, x):
        x = m.a(x)
        return head(m, m.b(x.repeat(1, 2, 1, 1)) + m.c(x.repeat_interleave(3, dim=1)))

    return Net(run, a=conv(3, 12), b=conv(24, 8), c=conv(36, 8), fc=nn.Linear(8, 5)), picture()


@net
def flatten_channels_last():
    def run(m, x):
        return m.fc(m.a(x).permute(0, 2, 3, 1).flatten(1))

    return Net(run, a=conv(3, 12), fc=nn.Linear(12 * 64, 5)), picture()


@net
def flatten_channels_first():
    return nn.Sequential(conv(3, 12), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 16, 9), nn.ReLU(),
                         nn.Linear(9, 5)), picture()


@net
def pixel_shuffle():
    return nn.Sequential(conv(3, 32), nn.PixelShuffle(2), conv(8, 6), nn.PixelUnshuffle(4), conv(96, 8), nn.Flatten(),
                         nn.Linear(8 * 16, 5)), picture()


@net
def grouped():
    return nn.Sequential(conv(3, 24), conv(24, 48, groups=8), nn.ReLU(), conv(48, 16, groups=2), nn.Flatten(),
                         nn.Linear(16 * 64, 5)), picture()


@net
def depthwise_multiplier():
    return nn.Sequential(conv(3, 12), conv(12, 36, groups=12), nn.BatchNorm2d(36), conv(36, 8), nn.Flatten(),
                         nn.Linear(512, 5)), picture()


@net
def transposed():
    return nn.Sequential(
        conv(3, 12), nn.ConvTranspose2d(12, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 3, groups=2, padding=1),
        nn.ConvTranspose2d(8, 8, 3, groups=8), conv(8, 4), nn.Flatten(), nn.Linear(4 * 18 * 18, 5)), picture()


@net
def one_and_three_dimensions():
    def run(m, x):
        x = m.b(F.relu(m.a(x)))
        x = m.c(x.flatten(2)).unsqueeze(-1).unsqueeze(-1)
        return m.fc(m.e(m.d(x)).mean((2, 3, 4)))

    return Net(run, a=nn.Conv3d(2, 8, 3), b=nn.BatchNorm3d(8), c=nn.Conv1d(8, 8, 3), d=nn.ConvTranspose3d(8, 6, 2),
               e=nn.InstanceNorm3d(6, affine=True), fc=nn.Linear(6, 5)), (torch.randn(2, 2, 5, 5, 5),)


@net
def squeeze_excitation():
    def run(m, x):
        x = m.a(x)
        gate = m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))
        return head(m, x * F.hardsigmoid(gate))

    return Net(run, a=conv(3, 16), down=conv(16, 8, 1), up=conv(8, 16, 1), fc=nn.Linear(16, 5)), picture()


@net
def padded_shortcut():
    def run(m, x):
        x = m.a(x)
        wide = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return head(m, F.relu(m.b(x)[:, :, ::2, ::2] + wide))

    return Net(run, a=conv(3, 8), b=conv(8, 16), fc=nn.Linear(16, 5)), picture()


@net
def group_norm():
    return nn.Sequential(conv(3, 16), nn.GroupNorm(8, 16), nn.ReLU(), conv(16, 8), nn.GroupNorm(8, 8), nn.Flatten(),
                         nn.Linear(512, 5)), picture()


@net
def prelu_and_dropout():
    return nn.Sequential(conv(3, 16), nn.PReLU(16), nn.Dropout2d(), conv(16, 8), nn.PReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(32, 5)), picture()


@net
def shared_module():
    def run(m, x):
        x = m.a(x)
        for _ in range(3):
            x = F.relu(m.b(x))
        return head(m, x)

    return Net(run, a=conv(3, 16), b=conv(16, 16), fc=nn.Linear(16, 5)), picture()


@net
def raw_parameters():
    def run(m, x):
        x = F.conv2d(x, m.w, m.b, padding=1)
        x = (x * m.scale).flatten(2).transpose(1, 2)
        return ((x @ m.inner) + m.shift) @ m.outer

    shapes = {"w": (12, 3, 3, 3), "b": (12,), "scale": (12, 1, 1), "inner": (12, 10), "shift": (10,), "outer": (10, 5)}
    return Net(run, **{name: nn.Parameter(torch.randn(*shape)) for name, shape in shapes.items()}), picture()


@net
def einsum_mixing():
    def run(m, x):
        x = torch.einsum("nchw,dc->ndhw", m.a(x), m.w)
        return head(m, F.relu(x))

    return Net(run, a=conv(3, 12), w=nn.Parameter(torch.randn(8, 12)), fc=nn.Linear(8, 5)), picture()


@net
def computed_weights():
    return nn.Sequential(weight_norm(conv(3, 12)), nn.ReLU(), weight_norm(nn.Conv2d(12, 8, 3)), nn.Flatten(),
                         nn.Linear(8 * 36, 5)), picture()


@net
def spectral():
    return nn.Sequential(conv(3, 12), nn.ReLU(), spectral_norm(nn.Conv2d(12, 8, 3)), nn.ReLU(), conv(8, 8),
                         nn.Flatten(), nn.Linear(8 * 36, 5)), picture()


@net
def hand_made_attention():
    def run(m, x):
        x = m.embed(x)
        n, t, _ = x.shape
        q, k, v = m.qkv(x).reshape(n, t, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * 8 ** -0.5 + m.table).softmax(-1)
        return m.fc(m.proj((weights @ v).transpose(1, 2).reshape(n, t, 32)))

    return Net(run, embed=nn.Linear(16, 12), qkv=nn.Linear(12, 96), proj=nn.Linear(32, 12), fc=nn.Linear(12, 5),
               table=nn.Parameter(torch.randn(4, 5, 5))), tokens()


@net
def grouped_queries():
    def run(m, x):
        n, t, _ = x.shape
        q = m.q(x).view(n, t, 8, 4).transpose(1, 2)
        k = m.k(x).view(n, t, 2, 4).transpose(1, 2)
        v = m.v(x).view(n, t, 2, 4).transpose(1, 2)
        k = k[:, :, None].expand(n, 2, 4, t, 4).reshape(n, 8, t, 4)
        v = v[:, :, None].expand(n, 2, 4, t, 4).reshape(n, 8, t, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.fc(F.silu(m.o(x.transpose(1, 2).reshape(n, t, 32))))

    return Net(run, q=nn.Linear(16, 32), k=nn.Linear(16, 8), v=nn.Linear(16, 8), o=nn.Linear(32, 12),
               fc=nn.Linear(12, 5)), tokens()


@net
def attention_module():
    def run(m, x):
        x = m.embed(x)
        y = m.first(x, x, x, need_weights=False)[0]
        padding = torch.zeros(2, 5, dtype=torch.bool, device=x.device)
        z, _ = m.second(y, x, x, attn_mask=m.mask, key_padding_mask=padding)
        return m.fc(z)

    model = Net(run, embed=nn.Linear(16, 24), first=nn.MultiheadAttention(24, 4, batch_first=True),
                second=nn.MultiheadAttention(24, 6, batch_first=True, dropout=0.1), fc=nn.Linear(24, 5))
    model.register_buffer("mask", torch.triu(torch.full((5, 5), float("-inf")), 1))
    return model, tokens()


@net
def recurrent():
    def run(m, x):
        x, _ = m.lstm(m.embed(x))
        x, last = m.gru(x)
        y, _ = m.rnn(x)
        return m.fc(y) + m.fc2(last[-1])[:, None]

    return Net(run, embed=nn.Linear(16, 12), lstm=nn.LSTM(12, 10, num_layers=2, bidirectional=True, batch_first=True),
               gru=nn.GRU(20, 8, batch_first=True), rnn=nn.RNN(8, 8, batch_first=True), fc=nn.Linear(8, 5),
               fc2=nn.Linear(8, 5)), tokens()


@net
def token_mixing():
    def run(m, x):
        x = m.embed(x)
        x = x + m.t2(F.gelu(m.t1(x.transpose(1, 2)))).transpose(1, 2)
        return m.fc(x + m.c2(F.gelu(m.c1(x))))

    return Net(run, embed=nn.Linear(16, 12), t1=nn.Linear(5, 16), t2=nn.Linear(16, 5), c1=nn.Linear(12, 24),
               c2=nn.Linear(24, 12), fc=nn.Linear(12, 5)), tokens()


@net
def tokens_and_tables():
    def run(m, x):
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
        x = torch.where(m.keep, x, x * m.gamma)
        return m.fc(m.up(x).masked_fill(~m.keep, 0.0)[:, 0])

    model = Net(run, patch=nn.Conv2d(3, 12, 4, stride=4), token=nn.Parameter(torch.randn(1, 1, 12)),
                position=nn.Parameter(torch.randn(1, 5, 12)), gamma=nn.Parameter(torch.randn(12)), up=nn.Linear(12, 16),
                fc=nn.Linear(16, 5))
    model.register_buffer("keep", torch.tensor([True, False, True, True, False])[:, None])
    return model, picture()


@net
def windows():
    def run(m, x):
        x = m.a(x).permute(0, 2, 3, 1)
        n = x.shape[0]
        x = torch.roll(x, (-2, -2), (1, 2)).view(n, 2, 4, 2, 4, 12).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 12)
        x = m.mix(x)
        x = x.view(n, 2, 2, 4, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(n, 8, 8, 16)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return m.fc(m.reduce(x).mean((1, 2)))

    return Net(run, a=conv(3, 12), mix=nn.Linear(12, 16), reduce=nn.Linear(64, 10), fc=nn.Linear(10, 5)), picture()


@net
def stacked_branches():
    def run(m, x):
        x = torch.stack([m.a(x), m.b(x)], 1)
        weights = m.attend(x.sum(1).mean((2, 3))).view(-1, 2, 12).softmax(1)
        return head(m, (x * weights[..., None, None]).sum(1))

    return Net(run, a=conv(3, 12), b=conv(3, 12, 5), attend=nn.Linear(12, 24), fc=nn.Linear(12, 5)), picture()
