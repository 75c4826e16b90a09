"""A gate made by token mixing: a whole MLP-Mixer block computes one multiplier for each token and channel.

    G(z) = (W z + b) * M(z)
    M(z) = z1 + FF_c(LN z1)      z1 = z + T(FF_t(T(LN z)))      (T swaps tokens and channels)

No activation on the gate, and M keeps its residuals: the multipliers are unbounded and contain z itself. The mixing
weights belong to positions, so the number of tokens is fixed. O(n) in tokens, for hidden sizes that do not grow.

Paper: headwise/papers/ninformer.py (Abdullah and Aydin, 2025).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["MixerGate"]


class MixerGate(nn.Module):
    """The gating unit, in the place of attention: `[b n c]` to the same shape.

    token_hidden, channel_hidden: hidden sizes of the two mixings; None is twice `dim`, as in the paper. dropout: after
    each linear layer of the mixings, in training.
    """

    layout = "b n c"
    patterns = ("noncausal self",)

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        token_hidden: int | None = None,
        channel_hidden: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        token_hidden = 2 * dim if token_hidden is None else token_hidden
        channel_hidden = 2 * dim if channel_hidden is None else channel_hidden
        if min(dim, num_tokens, token_hidden, channel_hidden) < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"MixerGate: dim {dim}, num_tokens {num_tokens}, token_hidden {token_hidden}, channel_hidden "
                f"{channel_hidden}, dropout {dropout}; expected sizes of 1 or more and a share below 1"
            )
        self.dim, self.num_tokens = dim, num_tokens
        self.token_norm, self.channel_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token_up, self.token_down = nn.Linear(num_tokens, token_hidden), nn.Linear(token_hidden, num_tokens)
        self.channel_up, self.channel_down = nn.Linear(dim, channel_hidden), nn.Linear(channel_hidden, dim)
        self.dropout = nn.Dropout(dropout)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """M(x): a standard MLP-Mixer block, the multipliers. Raises ValueError for another number of tokens."""
        self._check(x)
        # Matrices from the left mix tokens where they are: no copy of the transpose.
        hidden = self.token_up.weight @ self.token_norm(x) + self.token_up.bias[:, None]
        hidden = self.dropout(nn.functional.gelu(hidden))
        x = x + self.dropout(self.token_down.weight @ hidden + self.token_down.bias[:, None])
        hidden = self.dropout(nn.functional.gelu(self.channel_up(self.channel_norm(x))))
        return x + self.dropout(self.channel_down(hidden))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """The gated tokens. The product of half-precision factors is formed in float32, where it cannot overflow."""
        value, gate = self.proj(x), self.mix(x)
        if value.dtype == torch.float16 or gate.dtype == torch.float16:
            return (value.float() * gate.float()).to(value.dtype)
        return value * gate

    def _check(self, x: Tensor) -> None:
        if x.shape[1] != self.num_tokens:
            raise ValueError(
                f"MixerGate: {x.shape[1]} tokens; its mixing weights belong to {self.num_tokens} positions, so give so "
                "many, or make one with another num_tokens"
            )
