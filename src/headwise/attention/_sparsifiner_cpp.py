"""The C++ kernel of Sparsifiner in use: the choice of keys and attention over them; `_cpp.py` builds it.

One operator of torch without a gradient, counted by torch's FLOP counter.
"""

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.attention._cpp import Kernel, spread

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_long
KERNEL = Kernel(
    "sparsifiner",
    {
        "headwise_sparsifiner_choose": (*(_POINTER,) * 4, _NUMBER, _NUMBER),
        "headwise_sparsifiner_attend": (*(_POINTER,) * 8, ctypes.c_float, _NUMBER, _NUMBER),
    },
)
ROWS = 128  # queries that the kernel works on together


def choose(
    coefficients: Float[Tensor, "b h p m"], basis: Float[Tensor, "m n"], few: int, width: int
) -> Int[Tensor, "b h p w"]:
    """Keys that each query keeps, ascending: the width largest sums of its `few` largest coefficients' basis vectors.

    Of equal numbers the earlier is kept, of vectors and of keys. float32 on a CPU, numbers from 0 on.
    Raises ValueError for more vectors or keys than there are.
    """
    coefficients, basis = _checked(coefficients, basis, few, width)
    m, n = basis.shape
    found = torch.empty(*coefficients.shape[:3], width, dtype=torch.int32)
    run = KERNEL.library().headwise_sparsifiner_choose
    sizes = (ctypes.c_long * 4)(n, m, few, width)
    pointers = (coefficients.data_ptr(), basis.data_ptr(), found.data_ptr(), ctypes.addressof(sizes))
    spread(lambda begin, end: run(*pointers, begin, end), found.numel() // width)
    return found


def attention(
    q: Float[Tensor, "b h p d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    coefficients: Float[Tensor, "b h p m"],
    basis: Float[Tensor, "m n"],
    few: int,
    width: int,
    scale: float,
) -> Float[Tensor, "b h p e"]:
    """Softmax attention of every query over the keys that `choose` finds for it; float32 on a CPU, any strides.

    Not-a-number among a query's coefficients comes out as such. Raises ValueError for shapes that do not fit.
    """
    return _operator(q, k, v, coefficients, basis, few, width, scale)


def _checked(coefficients: Tensor, basis: Tensor, few: int, width: int) -> tuple[Tensor, Tensor]:
    m, n = basis.shape
    if coefficients.shape[-1] != m or not 1 <= few <= m or not 1 <= width <= n:
        raise ValueError(
            f"sparsifiner: {few} of {m} basis vectors, with {coefficients.shape[-1]} coefficients, and {width} of {n} "
            "keys; expected as many coefficients as vectors, and 1 to all of both"
        )
    for name, x in (("coefficients", coefficients), ("basis", basis)):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"sparsifiner: {name} are {x.dtype} on {x.device}; the C++ kernel takes float32 on a CPU")
    return coefficients.contiguous(), basis.contiguous()


def _attention(q, k, v, coefficients, basis, few, width, scale):
    coefficients, basis = _checked(coefficients, basis, few, width)
    (b, h, p, d), n, e = q.shape, basis.shape[1], v.shape[-1]
    wanted = ((b, h, n, d), (b, h, n, e), (b, h, p, basis.shape[0]))
    if tuple(tuple(x.shape) for x in (k, v, coefficients)) != wanted or {x.dtype for x in (q, k, v)} != {torch.float32}:
        raise ValueError(
            f"sparsifiner: q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}, "
            f"coefficients {tuple(coefficients.shape)}, basis {tuple(basis.shape)}; the C++ kernel takes float32, and "
            "batches, heads, queries and keys must agree"
        )
    out = q.new_empty(b, h, p, e)
    if not out.numel() or not d:
        return out.zero_()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    sizes = (ctypes.c_long * 8)(n, basis.shape[0], few, width, h, p, d, e)
    steps = (ctypes.c_long * 9)(*(step for x in (q, k, v) for step in x.stride()[:3]))
    run = KERNEL.library().headwise_sparsifiner_attend
    pointers = [x.data_ptr() for x in (coefficients, basis, q, k, v, out)]
    pointers += [ctypes.addressof(sizes), ctypes.addressof(steps)]
    spread(lambda begin, end: run(*pointers, scale, begin, end), b * h * -(-p // ROWS))
    return out


_operator = torch.library.custom_op(
    "headwise::sparsifiner_attention",
    _attention,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor coefficients, Tensor basis, int few, int width, float scale) "
    "-> Tensor",
)


@_operator.register_fake
def _(q, k, v, coefficients, basis, few, width, scale):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@register_flop_formula(torch.ops.headwise.sparsifiner_attention)
def _(q, k, v, coefficients, basis, few, width, *args, out_shape=None, **kwargs) -> int:
    return 2 * q[0] * q[1] * q[2] * width * (q[3] + v[-1])
