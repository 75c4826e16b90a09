"""Token merging: join the tokens of a picture that are most alike, compute on fewer, and spread the result again.

One token of each cell of the grid is a destination, the others are sources; the sources most similar (cosine) to some
destination are averaged into it. This is the bipartite soft matching of token merging for Stable Diffusion (Bolya and
Hoffman, 2023), with the second, stronger merge of the same matching that gives agent attention its agents.

Paper: headwise/papers/agent_attention.py (Han et al., ECCV 2024).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["TokenMerging", "match_tokens"]


@dataclass(frozen=True)
class TokenMerging:
    """A matching of t tokens: which are sources, in order of their similarity, and which destination each is near.

    sources `[b s]`: positions, the most similar first. nearest `[b s]`: the number of its destination. destinations
    `[b d]`: positions. merged: how many sources are merged.
    """

    sources: Int[Tensor, "b s"]
    nearest: Int[Tensor, "b s"]
    destinations: Int[Tensor, "b d"]
    merged: int

    @property
    def tokens(self) -> int:
        """How many tokens are left."""
        return self.sources.shape[1] - self.merged + self.destinations.shape[1]

    def merge(self, x: Float[Tensor, "b t c"], merged: int | None = None) -> Float[Tensor, "b m c"]:
        """The unmerged sources, then the destinations, each the mean of itself and what is merged into it.

        merged: merge so many sources instead; more give the agents.
        """
        count = self.merged if merged is None else merged
        if not 0 <= count <= self.sources.shape[1]:
            raise ValueError(
                f"TokenMerging.merge: merged is {count}; there are {self.sources.shape[1]} sources, give 0 to so many"
            )
        src, dst = _take(x, self.sources), _take(x, self.destinations)
        index = self.nearest[:, :count, None].expand(-1, -1, x.shape[-1])
        joined = dst.scatter_reduce(1, index, src[:, :count], "mean") if count else dst
        return torch.cat([src[:, count:], joined], 1)

    def unmerge(self, x: Float[Tensor, "b m c"]) -> Float[Tensor, "b t c"]:
        """Spread tokens after `merge` over all places: a merged one gets its destination's."""
        kept = self.sources.shape[1] - self.merged
        if x.shape[1] != self.tokens:
            raise ValueError(f"TokenMerging.unmerge: {x.shape[1]} tokens; this matching leaves {self.tokens}")
        unmerged, dst = x[:, :kept], x[:, kept:]
        src = torch.cat([_take(dst, self.nearest[:, : self.merged]), unmerged], 1)
        places = torch.cat([self.sources, self.destinations], 1)
        everything = torch.cat([src, dst], 1)
        return torch.zeros_like(everything).scatter(1, places[..., None].expand_as(everything), everything)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


@torch.no_grad()
def match_tokens(
    metric: Float[Tensor, "b t c"],
    grid: tuple[int, int],
    merged: int,
    *,
    stride: tuple[int, int] = (2, 2),
    generator: torch.Generator | None = None,
) -> TokenMerging:
    """Match the tokens of a grid of (rows, columns) by the cosine similarity of `metric`.

    merged: how many tokens to remove; at most all sources are. stride: rows and columns of a cell, of which one token
    is a destination; rows and columns beyond the last whole cell hold sources only. generator: draws the destination of
    each cell, the same for the whole batch (it may live on the CPU); None takes the first token of each.
    Raises ValueError where the grid has not t places, or has no whole cell.
    """
    b, t, _ = metric.shape
    rows, columns = grid
    cells = (rows // stride[0], columns // stride[1]) if min(stride) > 0 else (0, 0)
    if rows * columns != t:
        raise ValueError(f"match_tokens: {t} tokens do not fill a grid of {rows} x {columns}")
    if min(cells) < 1 or merged < 0:
        raise ValueError(
            f"match_tokens: stride {stride}, merged {merged}; expected a cell within {rows} x {columns}, and 0 or more"
        )
    chosen = torch.zeros(cells, dtype=torch.long)
    if generator is not None:
        chosen = torch.randint(stride[0] * stride[1], cells, generator=generator, device=generator.device)
    chosen = chosen.to(metric.device)
    row = torch.arange(cells[0], device=metric.device)[:, None] * stride[0] + chosen // stride[1]
    column = torch.arange(cells[1], device=metric.device) * stride[1] + chosen % stride[1]
    destinations = (row * columns + column).flatten().sort().values
    others = torch.ones(t, dtype=torch.bool, device=metric.device).index_fill(0, destinations, False)
    sources = torch.arange(t, device=metric.device)[others]
    unit = torch.nn.functional.normalize(metric, dim=-1)
    similarity, nearest = (unit[:, sources] @ unit[:, destinations].mT).max(-1)
    order = similarity.sort(dim=-1, descending=True, stable=True).indices
    return TokenMerging(sources[order], nearest.gather(1, order), destinations.expand(b, -1), min(merged, len(sources)))
