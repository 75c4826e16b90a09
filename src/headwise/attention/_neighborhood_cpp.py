"""The C++ kernel of neighbourhood attention, forward and backward; how it comes to be there stands in `_cpp.py`.

The backward takes the weights from the log-sum-exp, a block of queries at a time, as the tiles' backward does. It is
least ahead of that one with large kernels and many channels, and where gradients of keys and values outgrow the second
cache (112 x 112 with 64 channels). `headwise bench neighborhood --input training` has both.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from headwise.attention._cpp import Kernel, spread
from headwise.attention._neighborhood_axes import Axis, groups_of

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_long
_GEOMETRY = (_POINTER, _POINTER, _POINTER, ctypes.c_float, _NUMBER, _NUMBER, _NUMBER)
KERNEL = Kernel(
    "neighborhood",
    {
        "headwise_neighborhood_forward": (*(_POINTER,) * 6, *_GEOMETRY),
        "headwise_neighborhood_backward": (*(_POINTER,) * 11, *_GEOMETRY),
    },
)
unavailable, ready = KERNEL.unavailable, KERNEL.ready


@lru_cache(maxsize=256)
def _windows(axes: tuple[Axis, ...]) -> list[Tensor]:
    """start and stop of three axes, int32; missing leading axes have length 1."""
    with torch.inference_mode(False):
        found = [torch.tensor([edge], dtype=torch.int32) for _ in range(3 - len(axes)) for edge in (0, 1)]
        return found + [edge.to(torch.int32).contiguous() for axis in axes for edge in axis.windows()]


class _Grid:
    """The numbers of one grid without dilation, as the kernel reads them, and how it is shared among threads."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...]) -> None:
        missing = 3 - len(axes)
        grid = [1] * missing + [axis.length for axis in axes]
        self.sizes = (ctypes.c_long * 8)(q.shape[0], q.shape[1], k.shape[1], *grid, q.shape[-1], v.shape[-1])
        self.kernel = (ctypes.c_long * 3)(*[1] * missing, *(axis.kernel for axis in axes))
        self.edges = _windows(axes)
        self.windows = (ctypes.c_void_p * 6)(*(edge.data_ptr() for edge in self.edges))
        pairs = q.shape[0] * k.shape[1]
        self.parts = max(1, min(grid[0] * grid[1], -(-torch.get_num_threads() // pairs)))
        self.items = pairs * self.parts

    def run(self, name: str, tensors: Sequence[Tensor | None], scale: float) -> None:
        function = getattr(KERNEL.library(), name)
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        geometry = [ctypes.addressof(x) for x in (self.sizes, self.windows, self.kernel)]
        spread(lambda begin, end: function(*pointers, *geometry, scale, self.parts, begin, end), self.items)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: Sequence[Axis], scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs `[b h *S e]` and log-sum-exp `[b h *S]` of float32 tensors on the CPU, as `tiles_forward` gives them."""
    if all(axis.dilation == 1 for axis in axes):
        return _group(q, k, v, bias, tuple(axes), scale)
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])
    for where, inner in groups_of(axes):
        places = (slice(None), slice(None), *where)
        out[places], lse[places] = _group(q[places], k[places], v[places], bias, inner, scale)
    return out, lse


def _group(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: tuple[Axis, ...], scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])
    if not out.numel():
        return out, lse
    bias = None if bias is None else bias.contiguous()
    _Grid(q, k, v, axes).run("headwise_neighborhood_forward", (q, k, v, out, lse, bias), scale)
    return out, lse


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    axes: Sequence[Axis],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients for q, k, v and the relative bias, as `tiles_backward` gives them."""
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    offset = torch.linalg.vecdot(grad_out, out)
    if grad_lse is not None:
        offset = offset - grad_lse
    if all(axis.dilation == 1 for axis in axes):
        return _group_backward(grad_out, offset, q, k, v, bias, lse, tuple(axes), scale)
    grad_q, grad_k, grad_v = grads = [x.new_empty(x.shape) for x in (q, k, v)]
    grad_bias = None if bias is None else torch.zeros_like(bias)
    for where, inner in groups_of(axes):
        places = (slice(None), slice(None), *where)
        cut = [x[places] for x in (grad_out, offset, q, k, v)]
        *found, more = _group_backward(cut[0], cut[1], cut[2], cut[3], cut[4], bias, lse[places], inner, scale)
        for whole, one in zip(grads, found, strict=True):
            whole[places] = one
        if grad_bias is not None and more is not None:
            grad_bias += more
    return grad_q, grad_k, grad_v, grad_bias


def _group_backward(
    grad_out: Tensor,
    offset: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    grad_out, offset, q, k, v, lse = (x.contiguous() for x in (grad_out, offset, q, k, v, lse))
    bias = None if bias is None else bias.contiguous()
    if not q.numel() or not v.numel():
        none = None if bias is None else torch.zeros_like(bias)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), none
    grid = _Grid(q, k, v, axes)
    # An item adds up its own keys, values and bias; the parts of one pair of batch and head are added here.
    grad_q = torch.empty_like(q)
    of_k, of_v = (x.new_empty(grid.parts, *x.shape) for x in (k, v))
    grad_bias = None if bias is None else bias.new_zeros(q.shape[0] * grid.parts, *bias.shape)
    tensors = (q, k, v, grad_out, lse, offset, grad_q, of_k, of_v, grad_bias, bias)
    grid.run("headwise_neighborhood_backward", tensors, scale)
    grad_k, grad_v = (x[0] if grid.parts == 1 else x.sum(0) for x in (of_k, of_v))
    return grad_q, grad_k, grad_v, None if grad_bias is None else grad_bias.sum(0)
