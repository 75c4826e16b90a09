"""The `planted-llama` specimen: the planted heads in a Llama with rotary positions and grouped keys.

Four query heads a layer, two share a key head. Token one-hots lie in rotary pairs so slow that they hardly turn (3e-4
rad over 256 positions); the previous-token head lives in the fast pairs, its query turned by one position, so that its
score is a sum of cosines with the maximum at distance one. Constants come from biases: RMSNorm subtracts no mean.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.specimens import planted

NAME = "planted-llama"
SUMMARY = "the planted heads in a grouped-query Llama, four query heads a layer on two key heads, four of them idle"
VOCABULARY, POSITIONS = planted.VOCABULARY, planted.POSITIONS
THETA = 1e12
FAST = 16  # rotary pairs of the previous-token head
SHARPNESS = 40.0

# The two layers use different groups, so that an address that forgets the grouping is wrong somewhere.
PREVIOUS, DUPLICATE = Head(0, 0, key=0), Head(0, 1, key=0)
INDUCTION, SINK = Head(1, 2, key=1), Head(1, 3, key=1)
IDLE = (Head(0, 2, key=1), Head(0, 3, key=1), Head(1, 0, key=0), Head(1, 1, key=0))
# As `planted.TRUTH`; here the scores are reached to 0.999, not exactly.
TRUTH: dict[str, dict[Head, float]] = {
    "previous": {PREVIOUS: 1.0},
    "duplicate": {DUPLICATE: 0.5},
    "induction": {INDUCTION: 1.0},
    "sink": {SINK: 1.0},
    "dormant": {SINK: 1.0},
}
NEEDED = (PREVIOUS, INDUCTION)


def build(vocabulary: int = VOCABULARY, positions: int = POSITIONS) -> nn.Module:
    """The model in float32. Token 0 is BOS, which the sink looks for: a Llama knows no absolute positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, size, heads, groups = 3 * vocabulary, 4 * vocabulary, 4, 2
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        attention_bias=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    half = size // 2  # transformers pairs entry i with entry i + half; pair i turns by THETA ** (-i / half) a position
    slow = half - vocabulary
    token, previous, output = 0, vocabulary, 2 * vocabulary
    eye = torch.eye(vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        model.model.embed_tokens.weight[:, token : token + vocabulary] = eye
        model.lm_head.weight[:, output : output + vocabulary] = planted.GAIN * eye
        for layer, ones in enumerate([1, 2]):
            spread = math.sqrt(ones / hidden + config.rms_norm_eps)
            query = SHARPNESS * math.sqrt(size) * spread**2
            attention = model.model.layers[layer].self_attn
            q = attention.q_proj.weight.view(heads, size, hidden)
            k, v = (p.weight.view(groups, size, hidden) for p in (attention.k_proj, attention.v_proj))
            o = attention.o_proj.weight.view(hidden, heads, size)
            q_bias, k_bias = attention.q_proj.bias.view(heads, size), attention.k_proj.bias.view(groups, size)
            if layer == 0:
                head, twin, group = PREVIOUS.head, DUPLICATE.head, 0
                angle = THETA ** (-torch.arange(FAST) / half)
                amplitude = SHARPNESS * math.sqrt(size) / float((1 - angle.cos()).sum())  # the gap to distance 0 or 2
                # A query turned back by one position meets the key of one position before unturned.
                q_bias[head, :FAST] = amplitude * angle.cos()
                q_bias[head, half : half + FAST] = -amplitude * angle.sin()
                k_bias[group, :FAST] = 1.0
                v[group, :vocabulary, token : token + vocabulary] = spread * eye
                o[previous : previous + vocabulary, head, :vocabulary] = eye
                # The duplicate head shares k and v: its tokens lie beside the positions, and it writes nothing.
                q[twin, slow:half, token : token + vocabulary] = query * eye
                k[group, slow:half, token : token + vocabulary] = eye
            else:
                head, twin, group = INDUCTION.head, SINK.head, 1
                q[head, slow:half, token : token + vocabulary] = query * eye
                k[group, slow:half, previous : previous + vocabulary] = eye
                v[group, :vocabulary, token : token + vocabulary] = spread * eye
                o[output : output + vocabulary, head, :vocabulary] = eye
                # The sink's key is BOS itself, in the other entry of the slowest pair.
                q_bias[twin, size - 1] = query / spread
                k[group, size - 1, token] = 1.0
    return model.eval()


def patterns(input_ids: Int[Tensor, "b t"]) -> dict[Head, Float[Tensor, "b t t"]]:
    """The attention that was planted; idle heads spread evenly. Tokens other than the first must not be BOS."""
    known = planted.patterns(input_ids)
    pairs = [
        (PREVIOUS, planted.PREVIOUS), (DUPLICATE, planted.DUPLICATE),
        (INDUCTION, planted.INDUCTION), (SINK, planted.SINK),
    ]  # fmt: skip
    length = input_ids.shape[1]
    even = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
    return {here: known[there] for here, there in pairs} | {head: even.expand_as(known[planted.SINK]) for head in IDLE}


def names() -> tuple[str, ...]:
    return planted.names()


def card() -> dict[str, Any]:
    return {
        "summary": SUMMARY,
        "seed": None,
        "minutes": 0,
        "recipe": "written by hand: headwise/specimens/planted_llama.py",
        "heads": {
            "previous": str(PREVIOUS),
            "duplicate": str(DUPLICATE),
            "induction": str(INDUCTION),
            "sink": str(SINK),
        },
        "idle": [str(head) for head in IDLE],
        "truth": {probe: {str(head): score for head, score in heads.items()} for probe, heads in TRUTH.items()},
    }


def train(out: str | Path, *, seed: int = 0, log: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Write the model to a folder. There is nothing to train, so the seed changes nothing."""
    from headwise.specimens.registry import write_specimen

    return write_specimen(Path(out), build(), names(), card(), NAME)
