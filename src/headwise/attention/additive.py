"""Additive attention: scores from a tanh layer, w^T tanh(W1 h + W2 q + b), one row for a sequence or one per query.

    a_ts = w . tanh(W1 x_s + b + W2 q_t),   out_t = sum_s softmax(a_t)_s x_s

Without a query, a sequence has one row of scores, a_s = w . tanh(W1 x_s + b): the attention of the paper's classifiers.
With one (a question, a hypothesis) it is the paper's pair attention, Bahdanau's form. O(t s a) for width a.

Paper: headwise/papers/attention_adversarial_training.py (Kitada and Iyatomi, 2021).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["AdditiveAttention", "additive_scores", "weigh"]


def additive_scores(
    keys: Float[Tensor, "b s a"], vector: Float[Tensor, " a"], query: Float[Tensor, "b t a"] | None = None
) -> Float[Tensor, "b r s"]:
    """w . tanh(k_s + q_t): `[b t s]`, or `[b 1 s]` without a query."""
    hidden = keys[:, None] if query is None else keys[:, None] + query[:, :, None]
    return hidden.tanh() @ vector


def weigh(scores: Float[Tensor, "b t s"]) -> Float[Tensor, "b t s"]:
    """Softmax over positions; a row in which all are -inf has weights 0, with gradient 0."""
    hidden = torch.isneginf(scores)
    empty = hidden.all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(hidden, 0)


class AdditiveAttention(nn.Module):
    """Attention by a tanh layer, over values that are the inputs themselves.

    attention_size: width of the tanh layer; None is half of embed_dim, as in the paper (256 to 128).
    query_dim: width of a query; None: no query, all rows have the scores of the sequence.
    is_causal: row i sees positions up to i (self-attention only).
    The scores pass `score_point`, -inf where masked: a forward hook there reads or changes them before the softmax.
    """

    patterns = ("noncausal self", "causal self", "noncausal cross")

    def __init__(
        self,
        embed_dim: int,
        attention_size: int | None = None,
        *,
        query_dim: int | None = None,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        size = max(1, embed_dim // 2) if attention_size is None else attention_size
        if min(embed_dim, size, 1 if query_dim is None else query_dim) < 1:
            raise ValueError(
                f"AdditiveAttention: embed_dim {embed_dim}, attention_size {attention_size}, query_dim {query_dim}; "
                "widths are 1 or more"
            )
        self.is_causal = is_causal
        self.key_proj = nn.Linear(embed_dim, size)
        self.query_proj = None if query_dim is None else nn.Linear(query_dim, size, bias=False)
        self.vector = nn.Linear(size, 1, bias=False)
        self.score_point = nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b s c"],
        attention_mask: Bool[Tensor, "b s"] | None = None,
        *,
        query: Float[Tensor, "b t q"] | None = None,
    ) -> Float[Tensor, "b r c"]:
        """A context for each query `[b t c]`; without one, for each position, `[b s c]`.

        attention_mask: True for real positions of x. Raises ValueError for a query that the module has no layer for,
        a missing one, and a query in a causal module.
        """
        if query is not None and self.is_causal:
            raise ValueError("AdditiveAttention: is_causal is about one sequence; leave the query out, or is_causal")
        weights = self._weights(x, attention_mask, query, rows=x.shape[1] if self.is_causal else 1)
        out = weights @ x
        return out if query is not None else out.expand(-1, x.shape[1], -1)

    def pool(
        self,
        x: Float[Tensor, "b s c"],
        attention_mask: Bool[Tensor, "b s"] | None = None,
        query: Float[Tensor, "b q"] | None = None,
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b s"]]:
        """One context for a sequence, and its weights. query: one for each sequence of a pair."""
        weights = self._weights(x, attention_mask, None if query is None else query[:, None], rows=1)
        return (weights @ x)[:, 0], weights[:, 0]

    def _weights(self, x: Tensor, mask: Tensor | None, query: Tensor | None, rows: int) -> Tensor:
        if (query is None) != (self.query_proj is None):
            raise ValueError(
                f"AdditiveAttention: query is {'missing' if query is None else 'given'}, but query_dim was "
                f"{None if self.query_proj is None else self.query_proj.in_features}; a pair needs both, one sequence "
                "neither"
            )
        projected = None if query is None or self.query_proj is None else self.query_proj(query)
        scores = additive_scores(self.key_proj(x), self.vector.weight[0], projected)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if rows > 1:
            later = torch.ones(rows, rows, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.expand(-1, rows, -1).masked_fill(later, -torch.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        return weigh(self.score_point(scores)).to(x.dtype)
