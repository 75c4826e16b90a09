"""Neighbourhood attention: every token attends to its nearest neighbours on a grid of one, two or three axes.

    out_i = sum over j in N(i) of softmax_j(scale q_i . k_j + bias[j - i]) v_j,      |N(i)| = prod(kernel_size)

A window that would leave the grid is moved inside it, not cut, so every query of a non-causal grid sees the same number
of keys. Cost O(n prod(kernel_size)); the scores are never kept. The rules of one axis (kernel, stride, dilation,
causal) stand in `_neighborhood_axes.py`.

Paper: headwise/papers/neighborhood_attention.py (Hassani, Hwu and Shi, NeurIPS 2024); the operator of NATTEN and of
NAT, DiNAT (dilated) and generalized neighbourhood attention (strided).
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.call import Call
from headwise.attend.kernels import attention_with_lse
from headwise.attend.point import HeadPoint
from headwise.attention import _neighborhood_cpp as cpp
from headwise.attention import _neighborhood_flex as flex
from headwise.attention._neighborhood_axes import Axis
from headwise.attention._neighborhood_tiles import tiled
from headwise.attention.softmax import check_heads

__all__ = [
    "NeighborhoodAttention",
    "natten2dav",
    "natten2dqkrpb",
    "neighborhood_attention",
    "neighborhood_backends",
    "neighborhood_mask",
    "neighborhood_mask_mod",
]

Size = int | Sequence[int]
Flag = bool | Sequence[bool]
BACKENDS = ("auto", "reference", "tiled", "cpp", "flex", "natten")
# Query-key pairs of all heads from which a call compiles the C++ kernel, which takes 3 to 4 seconds once on a machine
# (1,500 calls of 28 x 28 with kernel 7 repay it). Calling it is ahead of tiles at every size: 1.7 times at 4 x 4.
CPP_PAIRS = 2**17


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Size,
    *,
    stride: Size = 1,
    dilation: Size = 1,
    is_causal: Flag = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    layout: str = "heads_last",
    clip_window: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the neighbours of every position: q's shape with the size of v.

    q, k, v: `[b *S heads size]`, or `[b heads *S size]` with layout "heads_first"; S has one to three axes, and the
    key heads divide the heads (query head i reads key head i * n // h).
    kernel_size, stride, dilation, is_causal: for every axis, or one for all. kernel_size: keys of a window; even ones
    reach k // 2 to the left and k // 2 - 1 to the right; 1 returns v. stride: queries that share a window
    (stride = kernel_size is blocked attention). dilation: distance between the keys of a window. is_causal: the window
    of an axis ends at the query, and the first queries see fewer keys.
    scale: multiplies scores, None is size ** -0.5. bias: `[h, 2 k - 1, ...]` for every axis, added to the score of
    (query, key) at key - query + k - 1, in units of dilation. extra_kv: keys `[b m n d]` and values `[b m n e]` (heads
    first: `[b n m d]`) that every query sees too, in the same softmax.
    clip_window: where kernel * dilation exceeds an axis, take the largest kernel that fits, and crop the bias.
    backend: "reference" makes every score; "tiled" is plain torch and fast; "cpp" a kernel compiled at first use
    (float32 on CPUs, forward and backward); "flex" FlexAttention, for CUDA; "natten" NATTEN's CUDA library.
    "auto": flex on CUDA without bias; cpp on CPUs in float32, where a compiler is found and the call is large enough
    to compile the kernel (`CPP_PAIRS`), or was compiled before, on this machine; else tiled.

    Not-a-number is not looked for: a key that holds one reaches every query of its tile, not only those that see it.

    Returns out, and with return_lse the natural log of the softmax denominator `[b *S h]` (heads first: `[b h *S]`).
    Raises ValueError for shapes and windows that do not fit (kernel * dilation <= length, stride <= kernel), naming
    the axis; TypeError for integer tensors; RuntimeError for a backend that is not available.

    >>> x = torch.randn(1, 6, 8, 2, 4)
    >>> neighborhood_attention(x, x, x, (3, 5), is_causal=(True, False)).shape
    torch.Size([1, 6, 8, 2, 4])
    """
    if layout not in ("heads_last", "heads_first"):
        raise ValueError(f"neighborhood_attention: layout is {layout!r}; choose 'heads_last' or 'heads_first'")
    if backend not in BACKENDS:
        raise ValueError(f"neighborhood_attention: backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    last = layout == "heads_last"
    _check_tensors(q, k, v, last)
    if last:
        q, k, v = (x.movedim(-2, 1) for x in (q, k, v))
    axes = axes_of(q.shape[2:-1], kernel_size, stride, dilation, is_causal, clip_window=clip_window)
    bias = _check_bias(bias, q.shape[1], kernel_size, axes, clip_window)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    extra = None if extra_kv is None else _check_extra(extra_kv, q, k, v, last)
    chosen = _choose(backend, q, v, bias, axes)
    if q.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(q.device.type):
        wanted = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(wanted) for x in (q, k, v))
        extra = None if extra is None else (extra[0].to(q.dtype), extra[1].to(q.dtype))
    out, lse = _run(chosen, q, k, v, bias, axes, factor)
    if extra is not None:
        out, lse = _merge(out, lse, *_attend_all(q, *extra, factor))
    if last:
        out, lse = out.movedim(1, -2), lse.movedim(1, -1)
    return (out, lse) if return_lse else out


def _run(
    backend: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: list[Axis], scale: float
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return _reference(q, k, v, bias, axes, scale)
    if backend == "flex":
        return flex.flex(q, k, v, axes, scale)
    if backend == "natten":
        return flex.natten(q, k, v, axes, scale)
    return tiled(q, k, v, bias, axes, scale, backend == "cpp")


def _reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: list[Axis], scale: float
) -> tuple[Tensor, Tensor]:
    """Every score and a mask: the definition."""
    grid, rank = q.shape[2:-1], len(axes)
    mask = _dense_mask(axes, q.device)[None, None]
    added = None if bias is None else _dense_bias(bias, axes)[None]
    flat = [x.flatten(2, 1 + rank) for x in (q, k, v)]
    repeats = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in flat[1:])
    scores = flat[0] @ keys.mT * scale
    if added is not None:
        scores = scores + added
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp().to(values.dtype) @ values
    return out.unflatten(2, grid), lse.unflatten(2, grid)


def _attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query with every extra key: `[b h *S e]`, `[b h *S]`."""
    grid, rank = q.shape[2:-1], q.ndim - 3
    out, lse = attention_with_lse(q.flatten(2, 1 + rank), k, v, scale=scale)
    return out.unflatten(2, grid), lse.unflatten(2, grid)


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of one softmax joined by their log-sum-exp."""
    share = torch.sigmoid(lse - other_lse)[..., None]
    return (share * out + (1 - share) * other).to(out.dtype), torch.logaddexp(lse, other_lse)


def _choose(backend: str, q: Tensor, v: Tensor, bias: Tensor | None, axes: list[Axis]) -> str:
    """The backend that does the work. Raises where the one asked for cannot."""
    if backend == "auto":
        if q.device.type == "cuda" and bias is None and q.shape[-1] == v.shape[-1] and q.shape[-1] >= 16:
            return "flex"
        pairs = math.prod(q.shape[:-1]) * math.prod([axis.kernel for axis in axes])
        suits = q.device.type == "cpu" and q.dtype == torch.float32
        # Under autocast the call is not in float32; while tracing nothing may be compiled.
        suits = suits and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
        return "cpp" if suits and (cpp.unavailable() is None if pairs >= CPP_PAIRS else cpp.ready()) else "tiled"
    if backend in ("flex", "natten") and bias is not None:
        raise ValueError(f"neighborhood_attention: backend {backend!r} takes no bias; use 'tiled'")
    reasons = {"cpp": cpp.unavailable, "natten": flex.natten_unavailable}
    reason = reasons[backend]() if backend in reasons else None
    if backend == "cpp" and reason is None and (q.dtype != torch.float32 or q.device.type != "cpu"):
        reason = f"it is for float32 on the CPU, and q is {q.dtype} on {q.device}"
    if reason is not None:
        raise RuntimeError(f"neighborhood_attention: backend {backend!r} cannot be used: {reason}; use 'tiled'")
    return backend


def neighborhood_backends() -> dict[str, str | None]:
    """Backend -> None where it can be used here, else the reason why not. Compiles the C++ kernel at the first call."""
    return {
        "reference": None,
        "tiled": None,
        "cpp": cpp.unavailable(),
        "flex": None if torch.cuda.is_available() else "compiled for CUDA only, and there is no CUDA device",
        "natten": flex.natten_unavailable(),
    }


def neighborhood_mask(
    shape: Size, kernel_size: Size, stride: Size = 1, dilation: Size = 1, is_causal: Flag = False
) -> Bool[Tensor, "n n"]:
    """Which keys every query sees, `[prod(shape), prod(shape)]` in row-major order. For small grids: to look at.

    >>> neighborhood_mask(4, 3).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    """
    lengths = (shape,) if isinstance(shape, int) else tuple(shape)
    return _dense_mask(axes_of(lengths, kernel_size, stride, dilation, is_causal), torch.device("cpu"))


def neighborhood_mask_mod(
    shape: Size, kernel_size: Size, stride: Size = 1, dilation: Size = 1, is_causal: Flag = False
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same as a FlexAttention `mask_mod(b, h, q_index, kv_index)`, tokens in row-major order."""
    lengths = (shape,) if isinstance(shape, int) else tuple(shape)
    axes = axes_of(lengths, kernel_size, stride, dilation, is_causal)

    return lambda b, h, q_index, kv_index: _sees(axes, q_index, kv_index)


def _sees(axes: Sequence[Axis], i: Tensor, j: Tensor) -> Tensor:
    """Whether queries i see keys j, both in row-major order."""
    seen = torch.ones((), dtype=torch.bool, device=i.device)
    for axis in reversed(axes):
        seen = seen & axis.sees(i % axis.length, j % axis.length)
        i, j = i // axis.length, j // axis.length
    return seen


def _dense_mask(axes: Sequence[Axis], device: torch.device) -> Tensor:
    rank, seen = len(axes), torch.ones((), dtype=torch.bool, device=device)
    for number, axis in enumerate(axes):
        at = torch.arange(axis.length, device=device)
        shape = [1] * (2 * rank)
        shape[number] = shape[rank + number] = axis.length
        seen = seen & axis.sees(at[:, None], at).view(shape)
    return seen.reshape(math.prod(axis.length for axis in axes), -1)


def _dense_bias(bias: Tensor, axes: Sequence[Axis]) -> Tensor:
    """`[h n n]` what the table adds to every score (something of it also outside the windows)."""
    rank, index = len(axes), torch.zeros((), dtype=torch.long)
    for number, axis in enumerate(axes):
        shape = [1] * (2 * rank)
        shape[number] = shape[rank + number] = axis.length
        index = index * (2 * axis.kernel - 1) + axis.offsets().view(shape)
    n = math.prod(axis.length for axis in axes)
    return bias.flatten(1)[:, index.reshape(n, n).to(bias.device)]


# What is allowed


def axes_of(
    lengths: Sequence[int],
    kernel_size: Size,
    stride: Size = 1,
    dilation: Size = 1,
    is_causal: Flag = False,
    *,
    clip_window: bool = False,
) -> list[Axis]:
    """One `Axis` for every axis of the grid, with everything checked."""
    where, rank = "neighborhood_attention", len(lengths)
    if rank not in (1, 2, 3):
        raise ValueError(f"{where}: {rank} axes of positions; expected 1, 2 or 3 between batch, heads and size")
    kernels = _per_axis("kernel_size", kernel_size, rank)
    strides, dilations = _per_axis("stride", stride, rank), _per_axis("dilation", dilation, rank)
    if isinstance(is_causal, bool):
        causal = (is_causal,) * rank
    else:
        causal = tuple(bool(one) for one in is_causal)
        if len(causal) != rank:
            raise ValueError(f"{where}: is_causal has {len(causal)} values for a grid of {rank} axes")
    axes = []
    for number, (length, kernel, step, apart) in enumerate(zip(lengths, kernels, strides, dilations, strict=True)):
        if clip_window and kernel * apart > length:
            kernel = length // apart
            step = min(step, kernel)
        if kernel < 1 or kernel * apart > length:
            raise ValueError(
                f"{where}: axis {number}: kernel_size {kernel} times dilation {apart} is {kernel * apart}, more than "
                f"its length {length}"
                if kernel
                else f"{where}: axis {number}: dilation {apart} exceeds its length {length}"
            ) from None
        if step > kernel:
            raise ValueError(f"{where}: axis {number}: stride {step} exceeds kernel_size {kernel}")
        axes.append(Axis(int(length), kernel, step, apart, causal[number]))
    return axes


def _per_axis(name: str, value: Size, rank: int) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise ValueError(f"neighborhood_attention: {name} has {len(values)} values for a grid of {rank} axes")
    for axis, one in enumerate(values):
        if isinstance(one, bool) or not isinstance(one, int) or one < 1:
            raise ValueError(f"neighborhood_attention: {name} of axis {axis} is {one!r}; expected an integer from 1 on")
    return values


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, last: bool) -> None:
    where, shapes = "neighborhood_attention", f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (4 <= q.ndim <= 6) or k.ndim != q.ndim or v.ndim != q.ndim:
        raise ValueError(f"{where}: {shapes}; expected batch, one to three axes of positions, heads and size, alike")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_floating_point():
            raise TypeError(f"{where}: {name} is {x.dtype}; expected floating-point numbers")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{where}: q is {q.dtype} on {q.device} but {name} is {x.dtype} on {x.device}")
    heads = -2 if last else 1
    positions = slice(1, -2) if last else slice(2, -1)
    for axis, sizes in enumerate(zip(*(x.shape[positions] for x in (q, k, v)), strict=True)):
        if len(set(sizes)) > 1:
            raise ValueError(f"{where}: axis {axis} has {sizes[0]} queries, {sizes[1]} keys and {sizes[2]} values")
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{where}: {shapes}; batches, and the sizes of q and k, must be alike")
    if k.shape[heads] != v.shape[heads] or not k.shape[heads] or q.shape[heads] % k.shape[heads]:
        raise ValueError(
            f"{where}: {q.shape[heads]} query heads, {k.shape[heads]} key heads, {v.shape[heads]} value heads; "
            "keys and values need as many, a divisor of the query heads"
        )


def _check_bias(
    bias: Tensor | None, heads: int, kernel_size: Size, axes: Sequence[Axis], clip_window: bool
) -> Tensor | None:
    if bias is None:
        return None
    asked = _per_axis("kernel_size", kernel_size, len(axes))
    expected = (heads, *(2 * kernel - 1 for kernel in asked))
    if tuple(bias.shape) != expected:
        raise ValueError(f"neighborhood_attention: bias has shape {tuple(bias.shape)}; expected {expected}")
    if clip_window:
        for number, (kernel, axis) in enumerate(zip(asked, axes, strict=True)):
            bias = bias.narrow(1 + number, kernel - axis.kernel, 2 * axis.kernel - 1)
    return bias


def _check_extra(extra: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """Extra keys and values with heads first."""
    keys, values = extra
    for name, x, like in (("keys", keys, k), ("values", values, v)):
        heads = (x.shape[2] if last else x.shape[1]) if x.ndim == 4 else -1
        if x.ndim != 4 or (x.shape[0], heads, x.shape[-1]) != (like.shape[0], like.shape[1], like.shape[-1]):
            order = "[batch, extras, heads, size]" if last else "[batch, heads, extras, size]"
            raise ValueError(
                f"neighborhood_attention: extra {name} have shape {tuple(x.shape)}; expected {order} with batch "
                f"{like.shape[0]}, {like.shape[1]} heads and size {like.shape[-1]}"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"neighborhood_attention: extra {name} are {x.dtype} and q is {q.dtype}")
    if keys.shape != (*values.shape[:-1], keys.shape[-1]):
        raise ValueError(
            f"neighborhood_attention: extra keys {tuple(keys.shape)} and values {tuple(values.shape)} differ in number"
        )
    return (keys.transpose(1, 2), values.transpose(1, 2)) if last else (keys, values)


# The layer


class NeighborhoodAttention(nn.Module):
    """Multi-head neighbourhood attention over `[b *S c]`, or over `[b n c]` with a grid_size.

    kernel_size, stride, dilation, is_causal: as in `neighborhood_attention`. grid_size: the grid of a flattened
    sequence in row-major order; None reads it off the input. relative_bias: a learned table `rpb`, as in NAT and DiNAT,
    `[heads, 2 k - 1, ...]`, which starts at 0; it needs a kernel_size for every axis or a grid_size. dropout: on the
    output, as in NATTEN; there is none on weights. Parameters are named as NATTEN names them: qkv, rpb, proj.
    There is no padding mask: where a padded sequence ends, its windows would have to move.
    """

    patterns = ("causal self", "noncausal self")
    layout = "b n c"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        dilation: Size = 1,
        is_causal: Flag = False,
        num_kv_heads: int | None = None,
        grid_size: Size | None = None,
        relative_bias: bool = False,
        clip_window: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = check_heads("NeighborhoodAttention", embed_dim, num_heads, num_kv_heads)
        self.head_dim = embed_dim // num_heads
        self.kernel_size, self.stride, self.dilation, self.is_causal = kernel_size, stride, dilation, is_causal
        self.clip_window, self.backend = clip_window, backend
        self.grid_size = None
        if grid_size is not None:
            self.grid_size = (grid_size,) if isinstance(grid_size, int) else tuple(grid_size)
            self.num_tokens = math.prod(self.grid_size)
            axes_of(self.grid_size, kernel_size, stride, dilation, is_causal, clip_window=clip_window)
        self.qkv = nn.Linear(embed_dim, embed_dim + 2 * self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.rpb = None
        if relative_bias:
            if isinstance(kernel_size, int) and self.grid_size is None:
                raise ValueError(
                    f"NeighborhoodAttention: kernel_size is {kernel_size} and there is no grid_size, so the axes of "
                    "the relative bias are not known; give kernel_size a value for every axis"
                )
            rank = len(self.grid_size) if isinstance(kernel_size, int) else len(kernel_size)  # pyright: ignore[reportArgumentType]
            widths = [2 * kernel - 1 for kernel in _per_axis("kernel_size", kernel_size, rank)]
            self.rpb = nn.Parameter(torch.zeros(num_heads, *widths))
        self.head_point = HeadPoint(num_heads, self.num_kv_heads)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(dropout)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, is_causal={self.is_causal}"

    def forward(self, x: Float[Tensor, "b *S c"]) -> Float[Tensor, "b *S c"]:
        """Raises ValueError where the tokens do not make the grid, or a window does not fit it."""
        shape = x.shape
        grid = tuple(shape[1:-1])
        if self.grid_size is not None and x.ndim == 3:
            if shape[1] != self.num_tokens:
                raise ValueError(
                    f"NeighborhoodAttention: {shape[1]} tokens, and grid_size {self.grid_size} has {self.num_tokens}"
                )
            grid = self.grid_size
        width, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = self.qkv(x).view(shape[0], *grid, width + 2 * kv).split([width, kv, kv], -1)
        q, k, v = (
            one.unflatten(-1, (heads, self.head_dim))
            for one, heads in zip(parts, (self.num_heads, self.num_kv_heads, self.num_kv_heads), strict=True)
        )
        out = neighborhood_attention(
            q,
            k,
            v,
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            bias=self.rpb,
            clip_window=self.clip_window,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)  # no log-sum-exp was asked for
        out = out.flatten(1, -3)
        mixed = self.proj(self.head_point(out, lambda: self._call(q, k, v), self.proj).flatten(2))
        return self.proj_drop(mixed).view(shape)

    def _call(self, q: Tensor, k: Tensor, v: Tensor) -> Call:
        """The same attention as one softmax under a dense mask, for probes and edits of weights."""
        axes = axes_of(
            q.shape[1:-2], self.kernel_size, self.stride, self.dilation, self.is_causal, clip_window=self.clip_window
        )
        mask = _dense_mask(axes, q.device)[None, None]
        bias = _check_bias(self.rpb, self.num_heads, self.kernel_size, axes, self.clip_window)
        if bias is not None:
            mask = _dense_bias(bias, axes)[None].to(q.dtype).masked_fill(~mask, -torch.inf)
        q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        causal = all(axis.causal for axis in axes)
        return Call(q, k, v, mask, False, self.head_dim**-0.5, kind="causal" if causal else "bidirectional")


# The two halves that NAT and DiNAT are written with


def natten2dqkrpb(
    query: Float[Tensor, "b h x y d"],
    key: Float[Tensor, "b h x y d"],
    rpb: Float[Tensor, "h r r"] | None,
    kernel_size: int,
    dilation: int,
) -> Float[Tensor, "b h x y n"]:
    """Scores of every query with the kernel_size ** 2 keys of its window, in row-major order, the bias added.

    query: scaled already. The function of this name of NATTEN up to 0.17, which transformers' DiNAT asks for; with
    `natten2dav` it keeps all scores, so `neighborhood_attention` is what new code should call.
    """
    axes = axes_of(query.shape[2:4], kernel_size, 1, dilation)
    index = _window_index(axes, query.device)  # [n, prod k]
    rows, columns = query.shape[2:4]
    flat = key.flatten(2, 3)
    near = flat[:, :, index]  # [b h n w d]
    scores = (near @ query.flatten(2, 3)[..., None])[..., 0]
    if rpb is not None:
        bias = _check_bias(rpb, query.shape[1], kernel_size, axes, False)
        assert bias is not None
        dense = _dense_bias(bias, axes)
        scores = scores + dense.gather(2, index[None].expand(len(dense), -1, -1)).to(scores.dtype)
    return scores.unflatten(2, (rows, columns))


def natten2dav(
    attention: Float[Tensor, "b h x y n"], value: Float[Tensor, "b h x y e"], kernel_size: int, dilation: int
) -> Float[Tensor, "b h x y e"]:
    """Weights of `natten2dqkrpb` times the values that they belong to."""
    axes = axes_of(value.shape[2:4], kernel_size, 1, dilation)
    near = value.flatten(2, 3)[:, :, _window_index(axes, value.device)]
    out = (attention.flatten(2, 3)[..., None, :] @ near)[..., 0, :]
    return out.unflatten(2, value.shape[2:4])


def _window_index(axes: Sequence[Axis], device: torch.device) -> Tensor:
    """`[n, prod(kernel)]` the keys of every query, ascending; for grids without causal axes."""
    index = torch.zeros(1, 1, dtype=torch.long)
    for axis in axes:
        start = torch.empty(axis.length, dtype=torch.long)
        for number in range(axis.dilation):
            start[number :: axis.dilation] = axis.group(number).windows()[0] * axis.dilation + number
        near = start[:, None] + torch.arange(axis.kernel) * axis.dilation
        n, w = index.shape
        index = index[:, None, :, None] * axis.length + near[None, :, None]
        index = index.reshape(n * axis.length, w * axis.kernel)
    return index.to(device)
