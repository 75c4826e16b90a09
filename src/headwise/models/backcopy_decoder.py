"""The decoder on which attention sinks are studied: pre-norm, learned positions, no biases, with its insides in reach.

Paper: headwise/papers/active_dormant_heads.py (Guo et al., 2024), as in the authors' `BBM/model.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["BackcopyDecoder", "Trace"]

Hold = Literal["value", "weight"] | None
Instead = Literal["zero", "first", "random"] | None


@dataclass
class Trace:
    """What a forward did: weights `[b h t t]` and values `[b h t d]` of each layer; layers + 1 residual states."""

    weights: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, attention: str, hold: Hold):
        super().__init__()
        self.heads, self.attention, self.hold = heads, attention, hold
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, trace: Trace | None, instead: Instead) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * (c // self.heads) ** -0.5
        visible = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        seen = visible.sum(-1, keepdim=True)
        if self.attention == "relu":
            weights = torch.where(visible, scores.relu(), 0) / seen
        else:
            weights = torch.where(visible, scores, -torch.inf).softmax(-1)
        if self.hold == "weight":  # BOS gets what an even row gives it; the other keys share the rest as they would
            rest = weights[..., 1:] / weights[..., 1:].sum(-1, keepdim=True).clamp_min(1e-9)
            even = (1 / seen).expand_as(weights[..., :1])
            weights = torch.cat([even, rest * (1 - even)], -1)
        if self.hold == "value":  # BOS's value keeps its direction, at the mean length of the others
            size = v[:, :, 1:].norm(dim=-1, keepdim=True).mean(2, keepdim=True)
            first = v[:, :, :1]
            v = torch.cat([first / first.norm(dim=-1, keepdim=True).clamp_min(1e-9) * size, v[:, :, 1:]], 2)
        if instead == "zero":
            weights = torch.zeros_like(weights)
        elif instead is not None:
            column = torch.zeros(t, dtype=torch.long, device=x.device)
            if instead == "random":  # an earlier token of each row, BOS left out
                draws = torch.rand(t, generator=torch.Generator().manual_seed(0)).to(x.device)
                column = 1 + (draws * (torch.arange(t, device=x.device) - 1).clamp_min(1)).long()
            weights = nn.functional.one_hot(column, t).to(weights).expand_as(weights)
        if trace is not None:
            trace.weights.append(weights)
            trace.values.append(v)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, c))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, attention: str, hold: Hold):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads, attention, hold)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.ReLU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor, trace: Trace | None, instead: Instead) -> Tensor:
        x = x + self.attention(self.attention_norm(x), trace, instead)
        return x + self.mlp(self.mlp_norm(x))


class BackcopyDecoder(nn.Module):
    """A decoder of one to three layers whose attention can be changed while it trains.

    attention: "softmax", or "relu" for ReLU weights divided by the row index. hold: "value" keeps the value of the
    first token at the mean norm of the others, "weight" keeps its weight at that of an even row: the two halves of the
    paper's mutual reinforcement, taken apart.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        *,
        width: int = 64,
        layers: int = 1,
        heads: int = 1,
        attention: str = "softmax",
        hold: Hold = None,
    ) -> None:
        super().__init__()
        if attention not in ("softmax", "relu"):
            raise ValueError(f"BackcopyDecoder: attention is {attention!r}; choose softmax or relu")
        if width % heads:
            raise ValueError(f"BackcopyDecoder: width {width} does not divide into {heads} heads")
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads, attention, hold) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:  # with larger weights the sink takes many times as long to grow
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self, ids: Int[Tensor, "b t"], *, trace: Trace | None = None, instead: Instead = None
    ) -> Float[Tensor, "b t v"]:
        """trace: filled with weights, values and residual states. instead: run with every head's weights zero, all on
        the first token, or all on a random earlier token."""
        if ids.shape[1] > self.positions.num_embeddings:
            raise ValueError(
                f"BackcopyDecoder: {ids.shape[1]} tokens, but it has {self.positions.num_embeddings} positions"
            )
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            if trace is not None:
                trace.residuals.append(x)
            x = block(x, trace, instead)
        if trace is not None:
            trace.residuals.append(x)
        return self.unembed(self.norm(x))
