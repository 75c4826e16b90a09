"""Steering methods beside plain generation, and beside the same methods written on materialised weights.

A Llama of 2 layers, hidden size 512 and 8 heads with random weights reads a prompt of 640 or 2,048 tokens, or decodes
tokens one by one after it. Every ratio is to the same work with plain fused attention. "on weights" is the method as
its paper's code has it: eager attention, every head's map formed, changed and multiplied with the values.

Aims: a constant bias or a head factor at most 1.1, edits that depend on masses 1.25, attention calibration 1.5 of a
prompt with a third of the heads, and 1.1 a decoded token for all.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import Benchmark, Variant, setting
from headwise.attend.edit import Edit
from headwise.attend.edits import BiasGroup, ScaleHeads
from headwise.attend.groups import spans
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.session import attach, steer
from headwise.steering.attention_calibration import AttentionCalibration
from headwise.steering.imbalanced_attention import ImbalancedAttention
from headwise.steering.vision_head_reinforcement import VisionAwareHeadReinforcement
from headwise.steering.visual_attention_redistribution import VisualAttentionRedistribution, redistribute_attention
from headwise.steering.zero_tuning import ZeroTuning

LENGTHS = (640, 2048)
DECODED = 32
LAYERS, HIDDEN, HEADS, VOCABULARY = 2, 512, 8, 4096
THIRD = "0.0-2,1.0-2"  # of the heads, in whole numbers
IMAGE = (16, 16 + 576)  # tokens of a picture in the prompt
BETA, RELATIVE = 0.4, 5.0  # a key is a sink above five even shares, as in the text of the paper: 4 to 17 a head here
VISUAL_SINKS = (0, 80, 300)  # the first token and two of the picture
LOCAL, SUMMARY = (16, 160), (300, 320)  # what a vision tower would single out
OnWeights = Callable[[Tensor, int], Tensor]  # weights [b h t s], layer -> weights


@dataclass(frozen=True)
class Method:
    """A method as an edit, and as its authors write it: on a map of weights, or on head outputs (None: neither)."""

    edit: Callable[[], Edit]
    on_weights: OnWeights | None = None
    aim: float = 1.1


def zero_tuning(weights: Tensor, layer: int) -> Tensor:
    changed = weights.clone()
    changed[..., 0] *= 1.6
    return changed / changed.sum(-1, keepdim=True)


def boost(weights: Tensor, layer: int) -> Tensor:
    changed = weights.clone()
    changed[..., IMAGE[0] : IMAGE[1]] *= 1.5
    return changed / changed.sum(-1, keepdim=True)


def calibrate(weights: Tensor, layer: int) -> Tensor:
    """Column means of one head after the other, as the published code takes them; a decoded row judges by itself."""
    changed = weights.clone()
    for head in range(3):
        a = weights[0, head]
        t, s = a.shape
        sinks = a.sum(0) / (torch.arange(s, 0, -1, device=a.device) if t == s else t) > RELATIVE / s
        sinks[0] = False
        rest = a.masked_fill(sinks, 0)
        freed = (1 - BETA) * a[:, sinks].sum(1, keepdim=True)
        changed[0, head] = torch.where(sinks, BETA * a, rest + freed * rest / rest.sum(1, keepdim=True).clamp_min(1e-9))
    return changed


def redistribute(weights: Tensor, layer: int) -> Tensor:
    t, s = weights.shape[-2:]
    column = torch.arange(s, device=weights.device)[None]
    sinks = torch.isin(column, torch.tensor(VISUAL_SINKS, device=weights.device))
    image = (column >= IMAGE[0]) & (column < IMAGE[1])
    return redistribute_attention(
        weights, sinks, image, non_sink_ratio=0.0, min_image_mass=0.0, rows=column[:, s - t :] >= IMAGE[1]
    )


# One entry a method; head scale and token boost show what its machinery costs at the least.
METHODS: dict[str, Method] = {
    "zero-tuning": Method(lambda: ZeroTuning(gamma=1.6), zero_tuning),
    "head scale": Method(lambda: ScaleHeads(scale=1.5, heads=THIRD)),
    "token boost": Method(lambda: BiasGroup(spans([IMAGE]), 0.405), boost),
    "attention-calibration, a third of the heads": Method(
        lambda: AttentionCalibration(heads=THIRD, beta=BETA, relative=True), calibrate, aim=1.5
    ),
    "attention-calibration, running, a third of the heads": Method(
        lambda: AttentionCalibration(heads=THIRD, beta=BETA, relative=True, statistics="running"), aim=1.5
    ),
    "visual-attention-redistribution": Method(
        lambda: VisualAttentionRedistribution(
            image=spans([IMAGE]),
            sinks=spans([(sink, sink + 1) for sink in VISUAL_SINKS]),
            layers=slice(None),
            non_sink_ratio=0.0,
            min_image_mass=0.0,
        ),
        redistribute,
        aim=1.25,
    ),
    "imbalanced-attention": Method(
        lambda: ImbalancedAttention(
            local_group=spans([LOCAL]), summary_group=spans([SUMMARY]), image=spans([IMAGE]), layers=slice(None)
        )
    ),
    "imbalanced-attention, bias": Method(
        lambda: ImbalancedAttention(
            local_group=spans([LOCAL]),
            summary_group=spans([SUMMARY]),
            image=spans([IMAGE]),
            layers=slice(None),
            mode="bias",
        )
    ),
    # Its aim is beside the second forward without the picture: 64 of 640 tokens, or 1,472 of 2,048.
    "vision-aware-head-reinforcement": Method(
        lambda: VisionAwareHeadReinforcement(alpha=2.0, layers="all", group=spans([IMAGE]))
    ),
}


@cache
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    made: Any = LlamaForCausalLM(config).eval()
    return made.to(setting.device, getattr(torch, setting.dtype))


@cache
def ids(n: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, n), generator=torch.Generator().manual_seed(n)).to(setting.device)


@contextmanager
def on_weights(change: OnWeights | None):
    """Eager attention of the model with its weights changed: the forward function of its file with one more line."""
    subject = model()
    module = sys.modules[type(subject).__module__]
    original = module.eager_attention_forward

    def forward(
        attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **options: Any
    ) -> tuple[Tensor, Tensor]:
        scores = query @ key.mT * scaling
        if mask is not None:
            scores = scores + mask
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        if change is not None:
            weights = change(weights, int(attention.layer_idx))  # pyright: ignore[reportArgumentType]
        return (weights @ value).transpose(1, 2).contiguous(), weights

    module.eager_attention_forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    subject.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.eager_attention_forward = original  # pyright: ignore[reportAttributeAccessIssue]
        subject.set_attn_implementation("sdpa")


@torch.no_grad()
def prompt(n: int, subject: Any) -> Any:
    return subject(input_ids=ids(n), use_cache=True, logits_to_keep=1)


def reading(n: int, method: Method | None, weights: bool = False) -> Callable[[], Any]:
    def run() -> Any:
        with under(method, weights):
            return prompt(n, model())

    return run


def under(method: Method | None, weights: bool) -> Any:
    """The context in which a variant runs."""
    if method is None:
        return nullcontext()
    return on_weights(method.on_weights) if weights else steer(model(), method.edit())


def decoding(n: int, method: Method | None, weights: bool = False) -> Callable[[], Any]:
    """So many tokens after a prompt; it is read in the first call, outside the time, and every call goes on from there.

    All variants have caches of the same length in every round. An edit stays open, as in `generate`, on a model of its
    own.
    """
    kept: list[Any] = []
    subject = model()
    if method is not None and not weights:
        subject = copy.deepcopy(subject)
        attach(subject, method.edit())

    @torch.no_grad()
    def run() -> Any:
        with under(method, True) if weights else nullcontext():
            if not kept:
                kept.append(cache_of(prompt(n, subject)))
            for t in range(DECODED):
                out = subject(input_ids=ids(n)[:, t : t + 1], **with_cache(subject, kept[0]))
            return out.logits

    return run


def variants(work: Callable[..., Callable[[], Any]], n: int, decoded: bool) -> list[Variant]:
    found = [Variant("plain", partial(work, n, None)), Variant("eager", partial(work, n, Method(ZeroTuning), True))]
    for name, method in METHODS.items():
        found.append(Variant(f"{name} (aim {1.1 if decoded else method.aim:g})", partial(work, n, method)))
        if method.on_weights is not None:
            found.append(Variant(f"{name}, on weights", partial(work, n, method, True)))
    return found


def check() -> None:
    """Every method is what its authors' code makes of the weights."""
    for name, method in METHODS.items():
        if method.on_weights is None:
            continue
        n = 700  # the picture is in it
        plain, found, expected = reading(n, None)(), reading(n, method)(), reading(n, method, True)()
        bound = 1e-3 if setting.dtype == "float32" else 0.1
        apart = (found.logits - expected.logits).norm() / expected.logits.norm()
        moved = (plain.logits - expected.logits).norm() / expected.logits.norm()
        if not apart < bound or not moved > 2 * apart:
            raise RuntimeError(f"steering: {name} is {apart:.2g} from its weights, which moved by {moved:.2g}")


def benchmark() -> Benchmark:
    inputs = {f"prompt of {n}": partial(variants, reading, n, False) for n in LENGTHS}
    inputs |= {f"tokens after {n}": partial(variants, decoding, n, True) for n in LENGTHS}
    return Benchmark("steering", inputs, check)
