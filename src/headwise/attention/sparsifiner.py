"""Sparsifiner: a low-rank predictor picks, for every image and head, the keys that each query attends to.

    q' = q W_q, k' = k W_k (heads share the weights), S = softmax(h^-1/2 q' (k'^T P)) over m basis vectors
    learning:  A = S U^T, regressed on the dense attention (squared error)
    in use:    A = top_8(S) |U|^T with small entries of |U| dropped; a query keeps its ceil(keep n) largest entries

Attention itself is the ordinary one over the kept keys; prefix tokens (the class token) keep all keys as queries and
have no privilege as keys. No gradient flows through the choice.

Paper: headwise/papers/sparsifiner.py (Wei et al., CVPR 2023).
Notes: h in the scale is the number of heads, as in the official code. Of equal scores the lower key is kept: a fresh
basis has deviation 0.02 and the threshold is 0.02, so that many scores are 0. Where tokens were pruned they are gone,
here; in the official code they stay as zeros, which take weight in the row of the class token.
Time: a quarter of the keys is no gain on a processor. Beside a layer of fused attention (one thread, 6 heads of 64
channels; `headwise bench sparsifiner`) the C++ kernel's layer takes 1.1 to 1.35 times as long from 197 to 2,305 tokens,
plain torch 1.9 to 4.4 times. It is ahead at no size, for the choice grows with n^2 as dense attention does
(coefficients, sums of basis vectors, counting for the threshold). With a twentieth of the keys the kernel is ahead at
2,305 tokens (0.95). Gathered keys in plain torch are behind everywhere.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from headwise.attend.call import Call
from headwise.attend.point import HeadPoint
from headwise.attention import _sparsifiner_cpp as cpp
from headwise.attention.softmax import SoftmaxAttention, check_heads, split_heads

__all__ = [
    "AttentionProducts",
    "ConnectivityPredictor",
    "SparsifinerAttention",
    "attention_products",
    "connectivity_from_indices",
    "gathered_attention",
    "predictor_loss",
]

Mode = Literal["dense", "predict", "sparse"]
BLOCK = 64  # rows whose scores, or gathered keys, exist at one time
COEFFICIENTS = 256  # rows whose coefficients exist at one time
CPP_PAIRS = 2**20  # query-key pairs of all heads from which a call compiles the C++ kernel, once on a machine


class ConnectivityPredictor(nn.Module):
    """Which keys each query keeps.

    keep: share of the keys, (0, 1]. token_reduction: tokens per basis vector. channel_reduction: of the head's width.
    basis_threshold: entries of |U| up to it count as 0. coef_topk: basis vectors that a query uses.
    num_prefix_tokens: 1 for a class token in front, 0 for none. share_basis: U is P.
    Raises ValueError for sizes that do not fit; one predictor is for one number of tokens (`resize_tokens`).
    """

    layout = "q, k -> indices"  # part of a mechanism, not one

    def __init__(
        self,
        head_dim: int,
        num_tokens: int,
        num_heads: int,
        *,
        keep: float = 0.25,
        token_reduction: int = 6,
        channel_reduction: int = 2,
        basis_threshold: float = 0.02,
        coef_topk: int = 8,
        num_prefix_tokens: int = 1,
        share_basis: bool = False,
    ) -> None:
        super().__init__()
        rank, width = num_tokens // max(token_reduction, 1), head_dim // max(channel_reduction, 1)
        if not 0 < keep <= 1 or min(token_reduction, channel_reduction, rank, width) < 1:
            raise ValueError(
                f"ConnectivityPredictor: keep {keep}, token_reduction {token_reduction} of {num_tokens} tokens, "
                f"channel_reduction {channel_reduction} of {head_dim} channels; keep lies in (0, 1], reductions in 1 "
                "to what they reduce"
            )
        if not 1 <= coef_topk <= rank:
            raise ValueError(f"ConnectivityPredictor: coef_topk {coef_topk}; there are {rank} basis vectors")
        if num_prefix_tokens not in (0, 1) or num_tokens <= num_prefix_tokens:
            raise ValueError(
                f"ConnectivityPredictor: num_prefix_tokens {num_prefix_tokens} of {num_tokens}; expected 1 (a class "
                "token) or 0"
            )
        self.num_tokens, self.num_heads, self.prefix, self.keep = num_tokens, num_heads, num_prefix_tokens, keep
        self.basis_threshold, self.coef_topk = basis_threshold, coef_topk
        self.proj_c_q, self.proj_c_k = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        self.proj_n = nn.Parameter(torch.zeros(num_tokens, rank))
        self.proj_back_n = self.proj_n if share_basis else nn.Parameter(torch.zeros(num_tokens, rank))
        for weight in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(weight, std=0.02)

    @property
    def budget(self) -> int:
        """Keys that a query keeps."""
        return math.ceil(self.keep * self.num_tokens - 1e-9)

    def coefficients(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], positions: Int[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b h p m"]:
        """Weights of the basis vectors for the queries after the prefix; each row sums to 1.

        positions: which tokens these are, where some were pruned; prefix included. Raises ValueError for another number
        of tokens than the predictor's.
        """
        queries, keys = self._low_rank(q, k, positions)
        return (queries @ keys).softmax(-1)

    def _low_rank(self, q: Tensor, k: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Two factors whose product are the logits of the coefficients, `[b h p c]` and `[b h c m]`."""
        if positions is None and q.shape[2] != self.num_tokens:
            raise ValueError(
                f"ConnectivityPredictor: {q.shape[2]} tokens, its weights are for {self.num_tokens}; resize_tokens "
                "makes them fit another number"
            )
        down = self.proj_n if positions is None else self.proj_n[positions][:, None]
        return self.proj_c_q(q)[:, :, self.prefix :] * self.num_heads**-0.5, self.proj_c_k(k).mT @ down

    def _in_turn(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> Iterator[Tensor]:
        """The coefficients of a block of queries after another, without gradient: all at once leave the caches."""
        with torch.no_grad():
            queries, keys = self._low_rank(q, k, positions)
        for some in queries.split(COEFFICIENTS, 2):
            s = some @ keys
            yield torch.softmax(s, -1, out=s) if _plain(s) else s.softmax(-1)

    def reconstruct(self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h p n"]:
        """The approximate attention that is regressed on the dense one: signed, from the whole basis."""
        return self.coefficients(q, k) @ self.proj_back_n.mT

    def sparse_basis(self) -> Float[Tensor, "n m"]:
        """|U| without its small entries."""
        return nn.functional.threshold(self.proj_back_n.detach().abs(), self.basis_threshold, 0.0)

    def density(self) -> float:
        """Share of the entries of the sparse basis that are not 0."""
        return float((self.sparse_basis() != 0).double().mean())

    @torch.no_grad()
    def forward(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], positions: Int[Tensor, "b n"] | None = None
    ) -> Int[Tensor, "b h p w"]:
        """Keys that each query after the prefix keeps, best first; at most the tokens that are there.

        Scores exist for a block of queries at a time. Of equal scores the earlier key is kept.
        """
        width = min(self.budget, q.shape[2])
        found = [
            rows.sort(dim=-1, descending=True, stable=True).indices[..., :width]
            for rows in self._scores(q, k, positions)
        ]
        shape = (*q.shape[:2], q.shape[2] - self.prefix, width)
        return torch.cat(found, 2) if found else torch.zeros(shape, dtype=torch.long, device=q.device)

    @torch.no_grad()
    def mask(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], positions: Int[Tensor, "b n"] | None = None
    ) -> Bool[Tensor, "b h n n"]:
        """`connectivity_from_indices` of the same keys; on a CPU without sorting them, in a third of the time."""
        n = q.shape[2]
        if q.is_cuda or q.shape[0] == 0:
            return connectivity_from_indices(self(q, k, positions), n, self.prefix)
        width = min(self.budget, n)
        found = [_largest(rows, width) for rows in self._scores(q, k, positions)]
        return torch.cat([found[0].new_ones(*q.shape[:2], self.prefix, n), *found], 2)

    def _scores(self, q: Tensor, k: Tensor, positions: Tensor | None) -> Iterator[Tensor]:
        """What queries after the prefix are taken to give each key, block by block."""
        basis = self.sparse_basis()
        table = basis.mT.contiguous() if positions is None else None
        basis = basis if positions is None else basis[positions][:, None]
        for s in self._in_turn(q, k, positions):
            kept, places = _few(s, self.coef_topk)
            if table is not None and _plain(s):  # the sum of a few basis vectors: m / coef_topk times fewer operations
                for some, weights in zip(places.split(BLOCK, 2), kept.split(BLOCK, 2), strict=True):
                    index, weight = (one.reshape(-1, self.coef_topk) for one in (some, weights))
                    rows = nn.functional.embedding_bag(index, table, per_sample_weights=weight, mode="sum")
                    yield rows.view(*some.shape[:3], self.num_tokens)
                continue
            for rows in torch.zeros_like(s).scatter(-1, places, kept).split(BLOCK, 2):
                yield rows @ basis.mT

    @torch.no_grad()
    def attend_compiled(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n e"], scale: float
    ) -> Float[Tensor, "b h n e"]:
        """Attention over the keys of `mask`, in the C++ kernel; float32 on a CPU, without gradient."""
        table, first = self.sparse_basis().mT.contiguous(), self.prefix
        out = [scaled_dot_product_attention(q[:, :, :first], k, v, scale=scale)] if first else []
        for s in self._in_turn(q, k):
            rows = q[:, :, first : first + s.shape[2]]
            out.append(cpp.attention(rows, k, v, s, table, self.coef_topk, self.budget, scale))
            first += s.shape[2]
        return torch.cat(out, 2)

    @torch.no_grad()
    def resize_tokens(self, num_tokens: int) -> None:
        """Fit the weights to another number of tokens, by interpolation along the tokens (prefix kept); m stays.

        A start for tuning at another resolution, not a choice that the paper makes.
        """
        if num_tokens <= self.prefix:
            raise ValueError(f"resize_tokens: {num_tokens} tokens; expected more than the prefix, {self.prefix}")
        shared = self.proj_back_n is self.proj_n

        def resized(weight: Tensor) -> nn.Parameter:
            rest = weight[self.prefix :].mT[None]
            rest = nn.functional.interpolate(rest, num_tokens - self.prefix, mode="linear", align_corners=False)
            return nn.Parameter(torch.cat([weight[: self.prefix], rest[0].mT]))

        self.proj_n = resized(self.proj_n)
        self.proj_back_n = self.proj_n if shared else resized(self.proj_back_n)
        self.num_tokens = num_tokens


def _plain(x: Tensor) -> bool:
    """Whether a processor works on it, eagerly, in a dtype that numpy has."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()


def _few(s: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest coefficients of each row and where they are; on a processor ascending, the earlier of equal ones, so
    that sums over them are rounded as the C++ kernel rounds its own."""
    if _plain(s) and bool((chosen := _largest(s, count)).sum(-1).eq(count).all()):  # else some are not numbers
        shape = (*s.shape[:-1], count)
        return s[chosen].view(shape), chosen.nonzero()[:, -1].view(shape)
    return s.topk(count, sorted=False)


def _largest(rows: Tensor, width: int) -> Tensor:
    """Where the `width` largest of each row are, the earlier of equal ones."""
    place = rows.shape[-1] - width
    if _plain(rows):  # in half the time of kthvalue
        least = torch.from_numpy(np.partition(rows.numpy(), place, -1)[..., place : place + 1])
    else:
        least = rows.kthvalue(place + 1, -1, keepdim=True).values
    kept = rows >= least
    if not (rows.is_meta or torch.compiler.is_compiling()) and bool((kept.sum(-1) == width).all()):
        return kept
    above = rows > least
    ties = kept & ~above
    return above | (ties & (ties.cumsum(-1) <= width - above.sum(-1, keepdim=True)))


def connectivity_from_indices(
    indices: Int[Tensor, "b h p w"], num_tokens: int, num_prefix_tokens: int = 1
) -> Bool[Tensor, "b h n s"]:
    """The boolean mask: kept keys of every query, all keys for the prefix."""
    b, h, p, _ = indices.shape
    mask = torch.zeros(b, h, p, num_tokens, dtype=torch.bool, device=indices.device).scatter(-1, indices, True)
    return torch.cat([mask.new_ones(b, h, num_prefix_tokens, num_tokens), mask], 2)


def gathered_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h s d"],
    v: Float[Tensor, "b h s e"],
    indices: Int[Tensor, "b h p w"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """Softmax attention over the kept keys alone, gathered; the first n - p queries see every key.

    No `[n s]` matrix is made for the others: products are w / s of the dense ones. O(p w d) memory in blocks of rows.
    """
    n, d = q.shape[2:]
    prefix = n - indices.shape[2]
    factor = d**-0.5 if scale is None else scale
    out = [scaled_dot_product_attention(q[:, :, :prefix], k, v, scale=factor)] if prefix else []
    for start in range(0, indices.shape[2], BLOCK):
        rows = indices[:, :, start : start + BLOCK]
        flat = rows.flatten(2)[..., None]
        keys = k.gather(2, flat.expand(-1, -1, -1, d)).unflatten(2, rows.shape[2:])
        values = v.gather(2, flat.expand(-1, -1, -1, v.shape[-1])).unflatten(2, rows.shape[2:])
        query = q[:, :, prefix + start : prefix + start + BLOCK, None]
        out.append(((query @ keys.mT * factor).softmax(-1) @ values)[:, :, :, 0])
    return torch.cat(out, 2)


class SparsifinerAttention(nn.Module):
    """Self-attention of a vision transformer over the keys that a predictor keeps; weights named as in timm.

    mode: "sparse" attends to the kept keys; "predict" attends to all and keeps in `reconstruction` what the predictor
    is trained on (`predictor_loss`); "dense" attends to all. implementation of "sparse": "masked" is fused attention
    with the mask, "gather" is `gathered_attention`, "cpp" a kernel compiled at first use (float32 on CPUs, no gradient
    and no pruned tokens), "auto" the fastest that can be used, as measured: the kernel, where a compiler is found and
    the call is large enough to compile it (`CPP_PAIRS`) or was compiled before, on this machine; else the mask. While
    heads are probed or edited all are the mask.
    """

    layout = "b n c, choice without gradient"  # the contracts ask for a gradient of every parameter
    patterns = ("noncausal self",)

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_tokens: int,
        *,
        keep: float = 0.25,
        token_reduction: int = 6,
        channel_reduction: int = 2,
        basis_threshold: float = 0.02,
        coef_topk: int = 8,
        num_prefix_tokens: int = 1,
        share_basis: bool = False,
        qkv_bias: bool = True,
        implementation: Literal["auto", "masked", "gather", "cpp"] = "auto",
    ) -> None:
        super().__init__()
        check_heads("SparsifinerAttention", embed_dim, num_heads)
        self.num_heads, self.head_dim, self.num_tokens = num_heads, embed_dim // num_heads, num_tokens
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.mask_predictor = ConnectivityPredictor(
            self.head_dim,
            num_tokens,
            num_heads,
            keep=keep,
            token_reduction=token_reduction,
            channel_reduction=channel_reduction,
            basis_threshold=basis_threshold,
            coef_topk=coef_topk,
            num_prefix_tokens=num_prefix_tokens,
            share_basis=share_basis,
        )
        self.head_point = HeadPoint(num_heads)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.mode: Mode = "sparse"
        self.implementation = implementation
        self.reconstruction: Tensor | None = None

    def __getstate__(self) -> dict:
        """A copy does not take the graph of the last loss with it."""
        return self.__dict__ | {"reconstruction": None}

    def load_dense(self, dense: nn.Module) -> None:
        """Take over `qkv` and `proj` of a dense attention with timm's names; the predictor stays as it is."""
        if isinstance(dense, SoftmaxAttention) and dense.num_kv_heads != dense.num_heads:
            raise ValueError("SparsifinerAttention: grouped keys have no place here; num_kv_heads must be num_heads")
        for name in ("qkv", "proj"):
            getattr(self, name).load_state_dict(getattr(dense, name).state_dict())

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Raises ValueError for another number of tokens than the predictor's."""
        return self.attend(x)[0]

    def attend(
        self, x: Float[Tensor, "b n c"], positions: Int[Tensor, "b n"] | None = None, *, scores: bool = False
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b p"] | None]:
        """The output and, where asked for, the weight of each patch in the class token's row, averaged over heads.

        positions: which tokens these are where some were pruned, the class token's 0 among them.
        """
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        scale, mask, indices, compiled = self.head_dim**-0.5, None, None, False
        self.reconstruction = None
        if self.mode == "sparse" and self._compiled(q, k, v, positions):
            compiled = True
        elif self.mode == "sparse" and (self.implementation != "gather" or self.head_point.visit is not None):
            mask = self.mask_predictor.mask(q, k, positions)
        elif self.mode == "sparse":
            indices = self.mask_predictor(q, k, positions)
        elif self.mode == "predict":
            self.reconstruction = self._error(q.detach(), k.detach(), scale)
        if compiled:
            out = self.mask_predictor.attend_compiled(q, k, v, scale)
        elif indices is not None:
            out = gathered_attention(q, k, v, indices, scale=scale)
        else:
            out = scaled_dot_product_attention(q, k, v, mask, scale=scale)
        call = lambda: Call(q, k, v, mask, False, scale, kind="bidirectional")  # noqa: E731
        mixed = self.proj(self.head_point(out.transpose(1, 2), call, self.proj).flatten(2))
        if not scores:
            return mixed, None
        row = (q[:, :, :1] @ k.mT * scale).softmax(-1)
        return mixed, row[:, :, 0, 1:].mean(1)

    def _compiled(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> bool:
        """Whether the C++ kernel does the work. Raises RuntimeError where it was asked for and cannot."""
        own = isinstance(self.mask_predictor, ConnectivityPredictor)  # experiments put others in its place
        if self.implementation not in ("auto", "cpp") or self.head_point.visit is not None or not own:
            return False
        reason = None
        if q.dtype != torch.float32 or q.device.type != "cpu" or self.mask_predictor.proj_n.dtype != q.dtype:
            reason = f"it is for float32 on the CPU, and q is {q.dtype} on {q.device}"
        elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            reason = "it has no gradient"
        elif positions is not None or not q.numel():
            reason = "tokens were pruned" if positions is not None else "the input is empty"
        elif torch.compiler.is_compiling():
            reason = "it is not for compiled models"
        if self.implementation == "cpp":
            reason = reason or cpp.KERNEL.unavailable()
            if reason is not None:
                raise RuntimeError(f"SparsifinerAttention: 'cpp' cannot be used: {reason}; use 'auto' or 'masked'")
        if reason is not None:
            return False
        pairs = q.shape[0] * self.num_heads * q.shape[2] ** 2
        asked = self.implementation == "cpp" or pairs >= CPP_PAIRS
        return cpp.KERNEL.unavailable() is None if asked else cpp.KERNEL.ready()

    def _error(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Summed squared error of the approximate attention; the sum goes over the batch too, as in the paper."""
        rows = (q[:, :, self.mask_predictor.prefix :] @ k.mT * scale).softmax(-1)
        return (self.mask_predictor.reconstruct(q, k) - rows).square().sum()


def predictor_loss(model: nn.Module) -> Float[Tensor, ""]:
    """Mean over layers of the summed squared error of the predictors, of the last forward in mode "predict".

    The paper weighs it with 0.01. While the rest of the model stays as it was, its own dense attention is the
    teacher's.
    Raises ValueError where there is none.
    """
    parts = [one.reconstruction for one in model.modules() if isinstance(one, SparsifinerAttention)]
    found = [one for one in parts if one is not None]
    if not found:
        raise ValueError(
            f"predictor_loss: {type(model).__name__} has {len(parts)} layers of SparsifinerAttention, and none has a "
            'loss; call it after a forward in mode "predict"'
        )
    return torch.stack(found).mean()


class AttentionProducts(NamedTuple):
    """Multiply-adds of one layer's attention (scores and weighted values) for one image, projections left out."""

    dense: float
    predictor: float
    sparse: float

    @property
    def saved(self) -> float:
        """Share of the dense products that is saved, the predictor's own counted."""
        return 1 - (self.predictor + self.sparse) / self.dense


def attention_products(
    num_tokens: int,
    embed_dim: int,
    num_heads: int,
    *,
    keep: float = 0.25,
    token_reduction: int = 6,
    channel_reduction: int = 2,
    coef_topk: int = 8,
    num_prefix_tokens: int = 1,
    density: float = 1.0,
    present: int | None = None,
) -> AttentionProducts:
    """The closed formula. density: share of the basis that is not 0. present: tokens left of num_tokens, None is all.

    Choosing the largest scores is O(n^2) for each head and multiplies nothing; it is not in here.

    >>> [round(attention_products(197, 384, 6, density=share).saved, 2) for share in (1.0, 0.0)]
    [0.44, 0.5]
    """
    n = num_tokens if present is None else present
    d, rank = embed_dim // num_heads, num_tokens // token_reduction
    c, queries = d // channel_reduction, n - num_prefix_tokens
    predictor = num_heads * (2 * n * d * c + n * c * rank + queries * c * rank + queries * coef_topk * density * n)
    budget = min(math.ceil(keep * num_tokens - 1e-9), n)
    sparse = 2 * embed_dim * (queries * budget + num_prefix_tokens * n)
    return AttentionProducts(2 * n * n * embed_dim, predictor, sparse)
