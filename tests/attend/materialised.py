"""The oracle: attention with every weight written out, in float64, from the definition alone."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

MASKS = ("none", "key", "left", "dense", "window", "float", "float_key", "per_head", "rows")


def repeat(x: Tensor, heads: int) -> Tensor:
    """Each grouped key head once for every query head that reads it."""
    return x[:, [i * x.shape[1] // heads for i in range(heads)]]


def logits(q, k, *, mask=None, causal=False, scale=None, softcap=None) -> Tensor:
    """`[b h t s]` scores as the softmax sees them."""
    b, h, t, d = q.shape
    s = k.shape[2]
    scores = torch.einsum("bhtd,bhsd->bhts", q.double(), repeat(k.double(), h))
    scores = scores * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        mask = mask.expand(b, h, t, s)
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        for i in range(t):
            scores[:, :, i, i + 1 :] = -torch.inf
    return scores


def weights(scores: Tensor) -> Tensor:
    """Softmax whose rows without any key are 0."""
    total = torch.softmax(scores, -1)
    return torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, total)


def attention(q, k, v, **options) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64."""
    scores = logits(q, k, **options)
    return weights(scores) @ repeat(v.double(), q.shape[1]), torch.logsumexp(scores, -1)


def make_mask(kind: str, b: int, h: int, t: int, s: int) -> Tensor | None:
    """A random mask of one kind; several of them leave rows without a key."""
    if kind == "none":
        return None
    if kind == "key":
        return torch.rand(b, 1, 1, s) > 0.4
    if kind == "left":  # left padding, one sequence without any
        return (torch.arange(s) >= torch.randint(0, s + 1, (b, 1)) * (torch.arange(b)[:, None] > 0))[:, None, None]
    if kind == "dense":
        return torch.rand(b, 1, t, s) > 0.6
    if kind == "window":
        return ((torch.arange(t)[:, None] - torch.arange(s)).abs() < 3)[None, None]
    if kind == "float":
        return torch.randn(1, h, t, s).masked_fill(torch.rand(t, s) > 0.7, -torch.inf)
    if kind == "float_key":
        return 3 * torch.randn(b, h, 1, s)
    if kind == "per_head":
        return torch.rand(1, h, t, s) > 0.5
    return torch.rand(b, 1, t, 1) > 0.3


@dataclass
class Case:
    """One drawn call: tensors and options of `attention_with_lse`."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.options)


@st.composite
def cases(draw, masks=MASKS, softcaps=(None, 1.5), same_size=False, loud=(1.0, 30.0)) -> Case:
    """Shapes (odd lengths included), groups, masks, scales and loudness of the scores; float64."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    b, n, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    t, s = draw(st.integers(1, 19)), draw(st.integers(1, 19))
    d = draw(st.sampled_from([1, 3, 8, 17]))
    e = d if same_size else draw(st.sampled_from([d, 5, 8, 24]))
    q = torch.randn(b, n * group, t, d, dtype=torch.float64) * draw(st.sampled_from(loud))
    k, v = (torch.randn(b, n, s, size, dtype=torch.float64) for size in (d, e))
    options = {
        "mask": make_mask(draw(st.sampled_from(masks)), b, n * group, t, s),
        "causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.3])),
        "softcap": draw(st.sampled_from(softcaps)),
    }
    return Case(q, k, v, options)
