"""The `planted` specimen: a GPT-2 whose four heads are written by hand, so that every measurement has a known answer.

The residual stream is four blocks of one-hots: token, position, previous token, output. Every vector in it is a sum of
the same number of one-hots, so LayerNorm only rescales it (what it subtracts cancels in softmax). MLPs are zero.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.tasks.symbols import Symbols

NAME = "planted"
SUMMARY = "two layers of two heads written by hand: previous token, duplicate token, induction, sink"
VOCABULARY, POSITIONS = 64, 256
SHARPNESS = 40.0  # logit of a match, in nats: every other key together weighs less than 1e-14
GAIN = 8.0  # of the unembedding

PREVIOUS, DUPLICATE, INDUCTION, SINK = Head(0, 0), Head(0, 1), Head(1, 0), Head(1, 1)
# On BOS and `segment` different random tokens told twice: what the probes must find, of the heads that were planted.
TRUTH: dict[str, dict[Head, float]] = {
    "previous": {PREVIOUS: 1.0},
    "duplicate": {DUPLICATE: 0.5},  # a causal head splits between the earlier token and itself
    "induction": {INDUCTION: 1.0},
    "sink": {SINK: 1.0},
    "dormant": {SINK: 1.0},
}
# Which heads the copying needs: without one of these its accuracy is 0, without any other it stays 1.
NEEDED = (PREVIOUS, INDUCTION)


def build(vocabulary: int = VOCABULARY, positions: int = POSITIONS) -> nn.Module:
    """The model in float32; deterministic, built in milliseconds. Token 0 is BOS."""
    from transformers import GPT2Config, GPT2LMHeadModel

    hidden = 3 * vocabulary + positions
    size = math.ceil(max(vocabulary, positions) / 2) * 2
    hidden += hidden % 2
    if hidden // 2 < size:
        hidden = 2 * size
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=hidden,
        n_layer=2,
        n_head=2,
        n_inner=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
    )
    model: Any = GPT2LMHeadModel(config)
    token, position = 0, vocabulary
    previous, output = position + positions, position + positions + vocabulary
    size = hidden // 2
    eye_v, eye_p = torch.eye(vocabulary), torch.eye(positions)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
            parameter.fill_(1.0 if is_gain else 0.0)
        model.transformer.wte.weight[:, token : token + vocabulary] = eye_v
        model.transformer.wpe.weight[:, position : position + positions] = eye_p
        model.lm_head.weight[:, output : output + vocabulary] = GAIN * eye_v
        for layer, ones in enumerate([2, 3]):  # one-hots in the residual that this layer reads
            mean = ones / hidden
            spread = math.sqrt(mean - mean**2 + config.layer_norm_epsilon)
            query = SHARPNESS * math.sqrt(size) * spread**2
            value = spread  # an attended one-hot arrives as a one-hot
            attention = model.transformer.h[layer].attn
            # Conv1D weights are [in, out]; out of c_attn is q, k, v, each head after head.
            q, k, v = attention.c_attn.weight.split(hidden, dim=1)
            if layer == 0:
                # 0.0: position t asks for position t - 1; position 0 has only itself.
                shifted = torch.roll(eye_p, -1, dims=1)
                shifted[0] = eye_p[0]
                q[position : position + positions, :positions] = query * shifted
                k[position : position + positions, :positions] = eye_p
                v[token : token + vocabulary, :vocabulary] = value * eye_v
                attention.c_proj.weight[:vocabulary, previous : previous + vocabulary] = eye_v
                # 0.1: a token asks for itself and writes nothing.
                q[token : token + vocabulary, size : size + vocabulary] = query * eye_v
                k[token : token + vocabulary, size : size + vocabulary] = eye_v
            else:
                # 1.0: a token asks for the key whose previous token it is, and copies that key's token.
                q[token : token + vocabulary, :vocabulary] = query * eye_v
                k[previous : previous + vocabulary, :vocabulary] = eye_v
                v[token : token + vocabulary, :vocabulary] = value * eye_v
                attention.c_proj.weight[:vocabulary, output : output + vocabulary] = eye_v
                # 1.1: a constant question for position 0, from the bias, because LayerNorm would change its sign.
                attention.c_attn.bias[size] = query / spread
                k[position, size] = 1.0
    return model.eval()


def patterns(input_ids: Int[Tensor, "b t"]) -> dict[Head, Float[Tensor, "b t t"]]:
    """The attention that was planted, written from its definition: what eager attention must show for every head."""
    before = torch.cat([input_ids[:, :1], input_ids[:, :-1]], dim=1)
    same = input_ids[:, :, None] == input_ids[:, None, :]
    follows = input_ids[:, :, None] == before[:, None, :]
    length = input_ids.shape[1]
    step = torch.arange(length)
    one_back = (step[:, None] - 1).clamp(min=0) == step[None, :]
    first = (step[None, :] == 0).expand(length, length)
    return {
        PREVIOUS: _even(one_back.expand_as(same)),
        DUPLICATE: _even(same),
        INDUCTION: _even(follows),
        SINK: _even(first.expand_as(same)),
    }


def _even(wanted: Tensor) -> Float[Tensor, "b t t"]:
    """Rows spread evenly over the wanted keys that they may see; over all keys where they see none."""
    causal = torch.ones(wanted.shape[-2:], dtype=torch.bool).tril()
    seen = wanted & causal
    seen = torch.where(seen.any(-1, keepdim=True), seen, causal)
    return seen / seen.sum(-1, keepdim=True)


def repeated(batch: int = 64, segment: int = 16, *, seed: int = 0, vocabulary: int = VOCABULARY) -> Int[Tensor, "b t"]:
    """BOS and a segment of different random tokens, told twice: the text that `TRUTH` speaks of."""
    generator = torch.Generator().manual_seed(seed)
    body = torch.rand(batch, vocabulary - 2, generator=generator).argsort(-1)[:, :segment] + 2  # no BOS, no unknown
    return torch.cat([torch.zeros(batch, 1, dtype=torch.long), body, body], dim=1)


@torch.no_grad()
def copy_accuracy(model: nn.Module, input_ids: Int[Tensor, "b t"]) -> float:
    """Share of the second telling that is predicted right; its first token cannot be known."""
    segment = (input_ids.shape[1] - 1) // 2
    rows = slice(segment + 1, 2 * segment)
    guess = model(input_ids=input_ids).logits[:, rows].argmax(-1)
    return float((guess == input_ids[:, segment + 2 :]).float().mean())


def names(vocabulary: int = VOCABULARY) -> tuple[str, ...]:
    """Readable tokens: BOS, the unknown word, then words."""
    return ("<bos>", "<unk>", *Symbols.names[1 : vocabulary - 1])


def card() -> dict[str, Any]:
    return {
        "summary": SUMMARY,
        "seed": None,
        "minutes": 0,
        "recipe": "written by hand: headwise/specimens/planted.py",
        "heads": {
            "previous": str(PREVIOUS),
            "duplicate": str(DUPLICATE),
            "induction": str(INDUCTION),
            "sink": str(SINK),
        },
        "truth": {probe: {str(head): score for head, score in heads.items()} for probe, heads in TRUTH.items()},
    }


def train(out: str | Path, *, seed: int = 0, log: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Write the model to a folder. There is nothing to train, so the seed changes nothing."""
    from headwise.specimens.registry import write_specimen

    return write_specimen(Path(out), build(), names(), card(), NAME)
