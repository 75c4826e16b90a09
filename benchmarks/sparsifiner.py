"""Sparsifiner's layers beside layers of fused attention over all keys and the released form, which masks a dense map;
6 heads of 64 channels as in DeiT-S, a quarter of the keys and a twentieth. Then attention alone, the choice made
beforehand, and the C++ kernel that makes it too.

The share of multiply-adds that the closed formula leaves stands in the name of those inputs. Choosing keys goes through
each row of scores, which the formula does not count.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import Benchmark, Variant, setting
from benchmarks._parts import OURS, Part, Way, Work, benchmark_of, draw, of_module, place
from headwise.attention import SoftmaxAttention
from headwise.attention import _sparsifiner_cpp as cpp
from headwise.attention.softmax import split_heads
from headwise.attention.sparsifiner import (
    ConnectivityPredictor,
    SparsifinerAttention,
    attention_products,
    connectivity_from_indices,
    gathered_attention,
)

HEADS, WIDTH = 6, 64
Implementation = Literal["auto", "masked", "gather", "cpp"]
TOKENS, KEEPS = (197, 577, 2305), (0.25, 0.05)
RELEASED = "as released: a dense map, masked"
TORCH = "headwise, torch alone"


def layer(tokens: int, keep: float) -> SparsifinerAttention:
    torch.manual_seed(0)
    made = SparsifinerAttention(HEADS * WIDTH, HEADS, tokens, keep=keep).eval()
    with torch.no_grad():  # a basis that is not all below the threshold, as after training
        made.mask_predictor.proj_back_n.normal_(std=0.05)
    return made


def released(layer: SparsifinerAttention, x: Tensor) -> Tensor:
    """Approximate scores of all pairs, their largest as a mask on the dense map, which is renormalised."""
    predictor = layer.mask_predictor
    q, k, v = (split_heads(part, HEADS) for part in layer.qkv(x).chunk(3, -1))
    with torch.no_grad():
        s = predictor.coefficients(q, k)
        kept, places = s.topk(predictor.coef_topk)
        rough = torch.zeros_like(s).scatter(-1, places, kept) @ predictor.sparse_basis().mT
        mask = torch.zeros_like(rough).scatter(-1, rough.topk(predictor.budget).indices, 1.0)
        mask = torch.cat([torch.ones_like(mask[:, :, :1]), mask], 2)
    weights = (q @ k.mT * WIDTH**-0.5).masked_fill(mask == 0, -torch.inf).softmax(-1)
    return layer.proj((weights @ v).transpose(1, 2).flatten(2))


def work(tokens: int, keep: float, as_released: bool, implementation: Implementation = "auto") -> Work:
    x, made = draw((1, tokens, HEADS * WIDTH))[0], layer(tokens, keep)
    made.implementation = implementation
    return of_module(made, x, function=released if as_released else None)


def ways(keep: float, tokens: int) -> dict[str, Way]:
    return {
        OURS: partial(work, tokens, keep, False),
        TORCH: partial(work, tokens, keep, False, "masked"),
        RELEASED: partial(work, tokens, keep, True),
    }


def softmax(tokens: int) -> Way:
    def make() -> Work:
        torch.manual_seed(0)
        return of_module(SoftmaxAttention(HEADS * WIDTH, HEADS), draw((1, tokens, HEADS * WIDTH))[0])

    return make


def operations(keep: float, tokens: int) -> float:
    counted = attention_products(tokens, HEADS * WIDTH, HEADS, keep=keep)
    return 8 * tokens * (HEADS * WIDTH) ** 2 + 2 * (counted.predictor + counted.sparse)


PARTS = [
    Part(
        f"sparsifiner, {100 * keep:.0f} %",
        TOKENS,
        "{} tokens".format,
        partial(ways, keep),
        (RELEASED,),
        softmax,
        partial(operations, keep),
        int,
        training=keep == KEEPS[0],
    )
    for keep in KEEPS
]


@cache
def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = draw(*[(1, HEADS, tokens, WIDTH)] * 3, gradients=False)
    return q, k, v


@cache
def predictor(tokens: int, keep: float) -> ConnectivityPredictor:
    torch.manual_seed(0)
    return ConnectivityPredictor(WIDTH, tokens, HEADS, keep=keep).eval().to(**place())


def dense(tokens: int) -> Callable[[], Any]:
    q, k, v = inputs(tokens)
    return lambda: scaled_dot_product_attention(q, k, v)


def given(tokens: int, keep: float, gather: bool) -> Callable[[], Any]:
    """Attention alone, the choice made beforehand."""
    q, k, v = inputs(tokens)
    indices = predictor(tokens, keep)(q, k)
    mask = connectivity_from_indices(indices, tokens)
    if gather:
        return lambda: gathered_attention(q, k, v, indices)
    return lambda: scaled_dot_product_attention(q, k, v, mask)


def choice(tokens: int, keep: float) -> Callable[[], Any]:
    q, k, _ = inputs(tokens)
    return lambda: predictor(tokens, keep)(q, k)


def compiled(tokens: int, keep: float) -> Callable[[], Any]:
    q, k, v = inputs(tokens)
    return lambda: predictor(tokens, keep).attend_compiled(q, k, v, WIDTH**-0.5)


def no_kernel() -> str | None:
    if setting.device != "cpu" or setting.dtype != "float32":
        return "for float32 on processors"
    return cpp.KERNEL.unavailable()


def variants(tokens: int, keep: float) -> list[Variant]:
    return [
        Variant("fused, all keys", partial(dense, tokens)),
        Variant("chosen keys, masked", partial(given, tokens, keep, False)),
        Variant("chosen keys, gathered", partial(given, tokens, keep, True)),
        Variant("choosing them", partial(choice, tokens, keep)),
        Variant("choosing and attending, C++ kernel", partial(compiled, tokens, keep), no_kernel()),
    ]


def name_of(tokens: int, keep: float) -> str:
    left = 1 - attention_products(tokens, HEADS * WIDTH, HEADS, keep=keep).saved
    return f"{tokens} tokens, {keep:.0%} of the keys, {left:.0%} of the products"


@torch.no_grad()
def check() -> None:
    """Masked, gathered and released are the same attention."""
    bound = 1e-5 if setting.dtype == "float32" else 2e-2
    masked, gathered = (given(197, 0.25, gather)() for gather in (False, True))
    torch.testing.assert_close(gathered, masked, rtol=bound, atol=bound)
    if no_kernel() is None:
        torch.testing.assert_close(compiled(197, 0.25)(), masked, rtol=bound, atol=bound)
    if setting.dtype == "float32":  # narrower scores tie, and ties may be cut differently
        torch.testing.assert_close(work(197, 0.25, True)[0](), work(197, 0.25, False)[0](), rtol=1e-3, atol=bound)


def benchmark() -> Benchmark:
    cases = [(tokens, keep) for tokens in TOKENS for keep in KEEPS]
    return benchmark_of("sparsifiner", PARTS, check, {name_of(*one): partial(variants, *one) for one in cases})
