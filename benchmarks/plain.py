"""The alternative: a Llama of the same shape in plain PyTorch, short enough to read, for `torch.compile`."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from trainer import SHAPE


class Plain(nn.Module):
    """The 15.6M-parameter model; `forward` gives the mean loss of tokens and labels [b, s].

    Args:
        length: the longest sequence.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        hidden = SHAPE["hidden"]
        self.embedding = nn.Embedding(SHAPE["vocabulary"], hidden)
        self.layers = nn.ModuleList(Layer() for _ in range(SHAPE["layers"]))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.output = nn.Linear(hidden, SHAPE["vocabulary"], bias=False)
        head = hidden // SHAPE["heads"]
        angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, head, 2) / head))
        self.register_buffer("turn", torch.stack([angles.cos(), angles.sin()]), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.turn)
        logits = self.output(self.norm(x)).float()
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


class Layer(nn.Module):
    """Attention and SwiGLU, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        hidden, ffn = SHAPE["hidden"], SHAPE["ffn"]
        self.head = hidden // SHAPE["heads"]
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, eps=1e-5) for _ in range(2))
        self.qkv = nn.Linear(hidden, (SHAPE["heads"] + 2 * SHAPE["groups"]) * self.head, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """[b, s, h] to [b, s, h], with cosines and sines [2, s, d/2]."""
        x = x + self.attend(self.norms[0](x), turn)
        gate, up = self.up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)

    def attend(self, x: Tensor, turn: Tensor) -> Tensor:
        """Causal attention of normalised [b, s, h]."""
        heads, groups = SHAPE["heads"], SHAPE["groups"]
        qkv = self.qkv(x).unflatten(-1, (heads + 2 * groups, self.head)).transpose(1, 2)
        q, k, v = qkv.split([heads, groups, groups], dim=1)
        q, k = (rotate(each, *turn.to(x.dtype)) for each in (q, k))
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(found.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
