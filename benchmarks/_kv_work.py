"""The model and the contents that benchmarks of caches share. It imports nothing of headwise, for peers that cannot."""

from functools import cache
from typing import Any

import torch

from benchmarks import setting

LAYERS, HEADS, KEY_HEADS, SIZE, WIDTH, VOCABULARY = 4, 8, 4, 64, 512, 1024
LENGTHS = (1024, 4096, 16384, 32768)
NEW, ROOM = 8, 512


@cache
def model() -> Any:
    """A Llama with random weights and grouped keys: 8 KiB of cache for each token in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=SIZE,
        max_position_embeddings=LENGTHS[-1] + ROOM,
    )  # fmt: skip
    made: Any = LlamaForCausalLM(config).eval()
    return made.to(setting.device, getattr(torch, setting.dtype))


def contents(layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of the last 64 tokens, keys and values of a layer."""
    generator = torch.Generator().manual_seed(layer)
    kind = {"device": setting.device, "dtype": getattr(torch, setting.dtype)}
    query = torch.randn(1, HEADS, 64, SIZE, generator=generator).to(**kind)
    key, value = (torch.randn(1, KEY_HEADS, length, SIZE, generator=generator).to(**kind) for _ in range(2))
    return query, key, value
