"""Magnified attention at the paper's sizes, for a prompt and a generated token, beside the official two softmaxes."""

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks import Benchmark, Variant, setting
from headwise.attention import magnified_attention

HEADS, DIM, COARSE, FINE, TEXT = 32, 128, 128, 4, 64  # Llama-2-7B, 128 coarse tokens of four fine ones
INPUTS = {"prompt": TEXT, "generated token": 1}
SHARE = 0.25  # of the regions, for each row


def prepared(label: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    place = {"device": setting.device, "dtype": getattr(torch, setting.dtype)}
    rows, keys = INPUTS[label], COARSE + TEXT
    make = lambda n: torch.randn(1, HEADS, n, DIM, **place)  # noqa: E731
    select = (torch.rand(1, rows, COARSE, device=setting.device) < SHARE).repeat_interleave(FINE, -1)
    mask = torch.ones(keys, keys, dtype=torch.bool, device=setting.device).tril()[-rows:][None, None]
    made = {"q": make(rows), "k": make(keys), "v": make(keys), "k_fine": make(COARSE * FINE)}
    return made | {"v_fine": make(COARSE * FINE), "select": select, "mask": mask}


def ours(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return magnified_attention(x["q"], x["k"], x["v"], x["k_fine"], x["v_fine"], x["select"], x["mask"])


def two_softmaxes(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """All scores twice: with the fine keys hidden, for the selector, and with the selected ones."""
    k, v = torch.cat([x["k"], x["k_fine"]], 2), torch.cat([x["v"], x["v_fine"]], 2)
    scores = x["q"] @ k.mT * DIM**-0.5
    hidden = torch.zeros_like(x["select"])[:, None]
    shown = torch.cat([x["mask"], x["select"][:, None]], -1)
    plain = scores.masked_fill(~torch.cat([x["mask"], hidden], -1), -torch.inf).softmax(-1) @ v
    both = scores.masked_fill(~shown, -torch.inf).softmax(-1) @ v
    return both + 0 * plain


def one_masked(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """Fused attention over all keys under a mask; it leaves no log-sum-exp for the selector."""
    k, v = torch.cat([x["k"], x["k_fine"]], 2), torch.cat([x["v"], x["v_fine"]], 2)
    mask = torch.cat([x["mask"], x["select"][:, None]], -1)
    return F.scaled_dot_product_attention(x["q"], k, v, mask)


def plain(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], x["mask"])


def variants(label: str) -> list[Variant]:
    def of(function):
        return lambda: torch.no_grad()(partial(function, prepared(label)))

    return [
        Variant("coarse keys only, fused", of(plain)),
        Variant("headwise", of(ours)),
        Variant("two softmaxes over all keys", of(two_softmaxes)),
        Variant("fused over all keys, masked", of(one_masked)),
    ]


@torch.no_grad()
def check() -> None:
    for label in INPUTS:
        x = prepared(label)
        torch.testing.assert_close(ours(x), two_softmaxes(x), atol=1e-5, rtol=1e-4)


def benchmark() -> Benchmark:
    return Benchmark("magnifier", {label: partial(variants, label) for label in INPUTS}, check)
