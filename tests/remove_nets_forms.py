"""More of `remove_nets`: rarer forms of attention, recurrence, tables, weights and shuffles. Importing it registers
them."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from remove_nets import Net, conv, head, net, picture, tokens
from remove_nets_sequences import NETS
from torch import nn

__all__ = ["NETS"]


@net
def projected_state():
    def run(m, x):
        x, (state, cell) = m.lstm(m.embed(x))
        return m.fc(x) + m.fc2(state[-1])[:, None] + m.fc3(cell[-1])[:, None]

    lstm = nn.LSTM(12, 10, num_layers=2, proj_size=6, bidirectional=True, batch_first=True)
    return Net(run, embed=nn.Linear(16, 12), lstm=lstm, fc=nn.Linear(12, 5), fc2=nn.Linear(6, 5),
               fc3=nn.Linear(10, 5)), tokens()


@net
def given_states():
    def run(m, x):
        state, cell = m.state(x[:, 0])[None], m.cell.expand(-1, x.shape[0], -1).contiguous()
        return m.fc(m.lstm(x, (state, cell))[0])

    return Net(run, state=nn.Linear(16, 12), cell=nn.Parameter(torch.randn(1, 1, 12)),
               lstm=nn.LSTM(16, 12, batch_first=True), fc=nn.Linear(12, 5)), tokens()


@net
def attention_with_learned_keys():
    def run(m, x):
        y = m.first(m.q(x), m.k(x), m.v(x), attn_mask=m.mask)[0]
        z = m.second(*[y.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1)
        return m.fc(z) + m.fc2(m.third(y[0], y[0], y[0])[0])

    def attention(heads, **rest):
        return nn.MultiheadAttention(24, heads, add_bias_kv=True, **rest)

    model = Net(run, q=nn.Linear(16, 24), k=nn.Linear(16, 10), v=nn.Linear(16, 14), fc=nn.Linear(24, 5),
                first=attention(4, kdim=10, vdim=14, batch_first=True), second=attention(4, add_zero_attn=True),
                third=attention(3), fc2=nn.Linear(24, 5))
    model.register_buffer("mask", torch.triu(torch.ones(5, 5, dtype=torch.bool), 1))
    return model, tokens()


@net
def grouped_queries_by_the_operator():
    def run(m, x):
        n, t, _ = x.shape
        q, k, v = (part.view(n, t, -1, 4).transpose(1, 2) for part in (m.q(x), m.k(x), m.v(x)))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.fc(F.silu(m.o(mixed.transpose(1, 2).reshape(n, t, 32))))

    return Net(run, q=nn.Linear(16, 32), k=nn.Linear(16, 8), v=nn.Linear(16, 8), o=nn.Linear(32, 12),
               fc=nn.Linear(12, 5)), tokens()


@net
def relative_positions():
    """A table read by an index of positions (Swin), an embedding of them (T5), a product with queries (BoTNet)."""
    def run(m, x):
        q, k, v = (part.view(*x.shape[:2], 4, 8).transpose(1, 2) for part in (m.q(x), m.k(x), m.v(x)))
        bias = m.table[m.places.view(-1)].view(5, 5, -1).permute(2, 0, 1) + m.buckets(m.places).permute(2, 0, 1)
        scores = q @ k.transpose(-1, -2) + bias + torch.einsum("bhqd,qkd->bhqk", q, m.keys)
        return m.fc((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    parts = {name: nn.Linear(16, 32) for name in "qkv"}
    model = Net(run, **parts, table=nn.Parameter(torch.randn(9, 4)), buckets=nn.Embedding(9, 4),
                keys=nn.Parameter(torch.randn(5, 5, 8)), fc=nn.Linear(32, 5))
    model.register_buffer("places", torch.arange(5)[:, None] - torch.arange(5) + 4)
    return model, tokens()


@net
def tokens_picked_by_number():
    def run(m, x):
        x = m.mix(F.gelu(m.embed(x)))
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position[:, : x.shape[1] + 1]
        last, order = x[torch.arange(x.shape[0], device=x.device), m.at], m.order
        return m.fc(last) + m.fc2(x[:, order].sum(1)) + m.fc(x[:, 0])

    model = Net(run, embed=nn.Linear(16, 14), mix=nn.Linear(14, 12), token=nn.Parameter(torch.randn(1, 1, 12)),
                position=nn.Parameter(torch.randn(1, 9, 12)), fc=nn.Linear(12, 5), fc2=nn.Linear(12, 5))
    model.register_buffer("at", torch.tensor([3]))
    model.register_buffer("order", torch.tensor([2, 0, 4]))
    return model, tokens()


@net
def gated_along_a_picture():
    return Net(lambda m, x: head(m, m.b(F.glu(m.a(x), dim=2))), a=conv(3, 16), b=conv(16, 8),
               fc=nn.Linear(8, 5)), picture()


@net
def gmlp():
    def run(m, x):
        gate, value = m.up(F.gelu(m.embed(x))).chunk(2, -1)
        return m.fc(F.gelu(m.down(gate * m.tokens(value.transpose(1, 2)).transpose(1, 2))))

    return Net(run, embed=nn.Linear(16, 12), up=nn.Linear(12, 40), tokens=nn.Linear(5, 5), down=nn.Linear(20, 12),
               fc=nn.Linear(12, 5)), tokens()


@net
def hidden_width_over_tokens():
    def run(m, x):
        x = F.relu(m.embed(x))
        return m.fc(x + m.t2(F.gelu(m.t1(x.transpose(1, 2)))).transpose(1, 2))

    return Net(run, embed=nn.Linear(16, 12), t1=nn.Linear(5, 32), t2=nn.Linear(32, 5), fc=nn.Linear(12, 5)), tokens()


@net
def einsum_forms():
    def run(m, x):
        x = torch.einsum("bti,oi->bto", x, m.a)
        x = torch.einsum("...i,io", F.relu(x), m.b)
        return m.fc(torch.einsum("bth,h,bth->bth", x, m.c, x.sigmoid()))

    return Net(run, a=nn.Parameter(torch.randn(12, 16)), b=nn.Parameter(torch.randn(12, 10)),
               c=nn.Parameter(torch.randn(10)), fc=nn.Linear(10, 5)), tokens()


@net
def products_of_tensors():
    def run(m, x):
        y = torch.tensordot(F.relu(m.a(x)), m.w, dims=1)
        return m.fc(m.pair(y, m.b(x)))

    return Net(run, a=nn.Linear(16, 12), b=nn.Linear(16, 9), w=nn.Parameter(torch.randn(12, 10)),
               pair=nn.Bilinear(10, 9, 8), fc=nn.Linear(8, 5)), tokens()


@net
def bag_of_words():
    return Net(lambda m, x: m.fc(F.relu(m.a(m.bag(x)))), bag=nn.EmbeddingBag(20, 16, mode="sum"), a=nn.Linear(16, 12),
               fc=nn.Linear(12, 5)), (torch.randint(0, 20, (2, 5)),)


@net
def slices_from_either_end():
    def run(m, x):
        x = m.a(x)
        return head(m, m.b(x[:, :4]) + m.c(x[:, -5:]) + m.d(x.narrow(1, 2, 9)))

    return Net(run, a=conv(3, 16), b=conv(4, 8), c=conv(5, 8), d=conv(9, 8), fc=nn.Linear(8, 5)), picture()


@net
def tiles_rolls_and_expansions():
    def run(m, x):
        x = m.b(m.a(x).tile(1, 2, 1, 1)) + m.p.expand(x.shape[0], 8, 8, 8) + m.q.expand(-1, -1, 8, 8)
        return m.fc(torch.roll(x, (3, 1), (2, 1)).flip(1, -1).roll(-1, 3).sum((2, 3)))

    return Net(run, a=conv(3, 12), b=conv(24, 8), p=nn.Parameter(torch.randn(1, 8, 1, 1)),
               q=nn.Parameter(torch.randn(1, 8, 1, 1)), fc=nn.Linear(8, 5)), picture()


@net
def maxout():
    def run(m, x):
        return m.fc(m.a(x).view(*x.shape[:2], 12, 2).amax(-1))  # pairs of channels leave, not the half of each pair

    return Net(run, a=nn.Linear(16, 24), fc=nn.Linear(12, 5)), tokens()


@net
def groups_that_only_leave_whole():
    """Heads beside the same heads through a convolution of a group for each of q, k and v (EfficientViT)."""
    def run(m, x):
        x = m.a(x)
        x = torch.cat([x, m.mix(x)], 1).reshape(x.shape[0], -1, 48, 64).transpose(-1, -2)
        q, k, v = x.chunk(3, dim=-1)
        return m.fc(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)).sum(1)

    return Net(run, a=conv(3, 192), mix=conv(192, 192, 1, groups=12), fc=nn.Linear(128, 5)), picture()


@net
def depth_to_space_by_hand():
    def run(m, x):
        x = m.a(x)
        n, c, h, w = x.shape
        return head(m, m.b(x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, h * 2, w * 2)))

    return Net(run, a=conv(3, 32), b=conv(8, 8), fc=nn.Linear(8, 5)), picture()


@net
def pixels_by_hand():
    """Space to depth written out."""
    def run(m, x):
        x = m.a(x)
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, c * 4, h // 2, w // 2)
        return head(m, m.b(x))

    return Net(run, a=conv(3, 12), b=conv(48, 8), fc=nn.Linear(8, 5)), picture()


@net
def transposed_groups():
    return nn.Sequential(conv(3, 24), nn.ConvTranspose2d(24, 48, 3, groups=12), nn.ReLU(),
                         nn.ConvTranspose2d(48, 12, 2, groups=3), conv(12, 4), nn.Flatten(),
                         nn.Linear(4 * 121, 5)), picture()


@net
def volumes():
    return nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.Conv3d(8, 16, 3, groups=8, padding=1), nn.BatchNorm3d(16),
                         nn.ReLU(), nn.Conv3d(16, 8, 1, groups=2), nn.MaxPool3d(2), nn.Flatten(),
                         nn.Linear(8 * 8, 5)), (torch.randn(2, 2, 5, 5, 5),)


@net
def raw_kernels():
    def run(m, x):
        x = F.conv_transpose2d(F.conv2d(x, m.w1, None, padding=1).relu(), m.w2, m.b2, stride=2)
        return F.linear(torch.matmul(m.left, x.flatten(2) @ m.right).sum(2), m.out)

    shapes = {"w1": (12, 3, 3, 3), "w2": (12, 10, 2, 2), "b2": (10,), "right": (256, 7), "left": (9, 10), "out": (5, 9)}
    return Net(run, **{name: nn.Parameter(torch.randn(*shape)) for name, shape in shapes.items()}), picture()


@net
def older_computed_weights():
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        layers = [nn.utils.weight_norm(layer) for layer in (conv(3, 12), nn.Conv2d(12, 8, 3), nn.Linear(8 * 36, 6))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Flatten(), layers[2], nn.Linear(6, 5)), picture()


@net
def older_spectral():
    return nn.Sequential(nn.utils.spectral_norm(conv(3, 12)), nn.ReLU(), nn.utils.spectral_norm(nn.Conv2d(12, 8, 3)),
                         nn.ReLU(), conv(8, 8), nn.Flatten(), nn.Linear(8 * 36, 5)), picture()


class _Standardised(nn.Conv2d):
    """Qiao et al., "Weight Standardization", 2019."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@net
def standardised():
    return nn.Sequential(_Standardised(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), _Standardised(12, 16, 3), nn.ReLU(),
                         conv(16, 8), nn.Flatten(), nn.Linear(128, 5)), picture()
