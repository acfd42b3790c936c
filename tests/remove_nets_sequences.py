"""More of `remove_nets`: sequences, gates, recurrence and attention in other forms. Importing it registers them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from remove_nets import NETS, Net, conv, head, net, picture, tokens
from torch import nn

__all__ = ["NETS"]


@net
def gated_along_channels_and_tokens():
    def run(m, x):
        x = F.glu(m.b(F.glu(m.a(x), dim=-1)), dim=1)  # halves of the channels, then of the tokens
        return m.fc(x)

    return Net(run, a=nn.Linear(16, 24), b=nn.Linear(12, 10), fc=nn.Linear(10, 5)), (torch.randn(2, 6, 16),)


@net
def uneven_chunk():
    def run(m, x):
        a, b, c = m.a(x).chunk(3, dim=1)  # 5, 5 and 3 channels
        return head(m, torch.cat([m.b(a + b), m.c(c)], 1))

    return Net(run, a=conv(3, 13), b=conv(5, 6), c=conv(3, 4), fc=nn.Linear(10, 5)), picture()


@net
def einsum_attention():
    def run(m, x):
        q, k, v = (part.unflatten(-1, (4, 8)) for part in (m.q(x), m.k(x), m.v(x)))
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) * 8 ** -0.5).softmax(-1)
        return m.fc(torch.relu(m.o(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))))

    return Net(run, q=nn.Linear(16, 32), k=nn.Linear(16, 32), v=nn.Linear(16, 32), o=nn.Linear(32, 12),
               fc=nn.Linear(12, 5)), tokens()


@net
def recurrent_alone():
    def run(m, x):
        x, (last, _) = m.lstm(x)
        y, _ = m.rnn(x)
        return m.fc(torch.relu(m.mix(y[:, -1]))) + m.fc2(last[-1])

    return Net(run, lstm=nn.LSTM(16, 12, batch_first=True), rnn=nn.RNN(12, 10, nonlinearity="relu", batch_first=True),
               mix=nn.Linear(10, 8), fc=nn.Linear(8, 5), fc2=nn.Linear(12, 5)), tokens()


@net
def recurrent_cells():
    def run(m, x):
        h = m.gru(x[:, 0])
        h = m.gru(x[:, 1], h)
        a, _ = m.lstm(h)
        return m.fc(torch.relu(m.rnn(a)))

    return Net(run, gru=nn.GRUCell(16, 12), lstm=nn.LSTMCell(12, 10), rnn=nn.RNNCell(10, 8),
               fc=nn.Linear(8, 5)), tokens()


@net
def mlp_mixer():
    def run(m, x):
        x = m.patch(x).flatten(2).transpose(1, 2)
        for tokens_in, tokens_out, up, down in ((m.t1, m.t2, m.c1, m.c2), (m.t3, m.t4, m.c3, m.c4)):
            x = x + tokens_out(F.gelu(tokens_in(x.transpose(1, 2)))).transpose(1, 2)
            x = x + down(F.gelu(up(x)))
        return m.fc(x.mean(1))

    mixing = {f"t{i}": nn.Linear(*((4, 16) if i % 2 else (16, 4))) for i in range(1, 5)}
    mixing |= {f"c{i}": nn.Linear(*((12, 24) if i % 2 else (24, 12))) for i in range(1, 5)}
    return Net(run, patch=nn.Conv2d(3, 12, 4, stride=4), **mixing, fc=nn.Linear(12, 5)), picture()
