"""A target of 24 x 40 latents with 2 to 5 subjects of a fifth each, and their references: three ways to one softmax."""

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks import Benchmark, Variant, setting
from headwise.attention.isolation import isolation_mask, reference_attention

HEADS, DIM, SIZE = 10, 64, (24, 40)  # a decoder layer of SDXL at 768 x 1280 pixels, 960 tokens
INPUTS = {"2 subjects": 2, "5 subjects": 5}
BOX = (12, 16)  # rows and columns of a subject: a fifth of the picture


def prepared(label: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    place = {"device": setting.device, "dtype": getattr(torch, setting.dtype)}
    s, tokens = INPUTS[label], SIZE[0] * SIZE[1]
    make = lambda *shape: torch.randn(*shape, tokens, DIM, **place)  # noqa: E731
    target, reference = (torch.zeros(1, s, *SIZE, dtype=torch.bool, device=setting.device) for _ in range(2))
    for i in range(s):
        top, left = 12 * (i // 3), 12 * (i % 3)
        target[0, i, top : top + 12, left : left + 12] = True
        reference[0, i, 6 : 6 + BOX[0], 10 : 10 + BOX[1]] = True
    made = {"q": make(1, HEADS), "k": make(1, HEADS), "v": make(1, HEADS)}
    made |= {"k_ref": make(1, s, HEADS), "v_ref": make(1, s, HEADS)}
    return made | {"subjects": target.flatten(2), "references": reference.flatten(2)}


def ours(x: dict[str, torch.Tensor], implementation: str = "auto") -> torch.Tensor:
    return reference_attention(*x.values(), implementation=implementation)  # pyright: ignore[reportArgumentType]


def materialised(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """As released: scores of every key of every reference; the least number is added where they are hidden."""
    s, n = x["subjects"].shape[1:]
    keys, values = (torch.cat([*x[f"{name}_ref"].unbind(1), x[name]], 2) for name in ("k", "v"))
    scores = x["q"] @ keys.mT * DIM**-0.5
    least = torch.finfo(scores.dtype).min
    for i in range(s):
        shown = x["subjects"][:, i, :, None] & x["references"][:, i, None]
        scores[..., i * n : (i + 1) * n] += torch.where(shown, 0.0, least)[:, None].to(scores.dtype)
    scores[..., s * n :] += torch.where(isolation_mask(x["subjects"]), 0.0, least)[:, None].to(scores.dtype)
    return scores.softmax(-1) @ values


def target_alone(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.scaled_dot_product_attention(x["q"], x["k"], x["v"])


def variants(label: str) -> list[Variant]:
    def of(function):
        return lambda: torch.no_grad()(partial(function, prepared(label)))

    return [
        Variant("target alone, fused", of(target_alone)),
        Variant("headwise, gathered", of(ours)),
        Variant("one call under a mask", of(partial(ours, implementation="masked"))),
        Variant("materialised, as released", of(materialised)),
    ]


@torch.no_grad()
def check() -> None:
    for label in INPUTS:
        x = prepared(label)
        for implementation in ("gathered", "masked"):
            torch.testing.assert_close(ours(x, implementation), materialised(x), atol=1e-5, rtol=1e-4)


def benchmark() -> Benchmark:
    return Benchmark("isolation", {label: partial(variants, label) for label in INPUTS}, check)
