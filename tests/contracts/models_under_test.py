"""Tiny decoders for the contracts: random weights, grouped keys, patterns strong enough to see."""

from typing import Any

import torch
from torch import Tensor

HEAD_DIM = 8
LAYERS, HEADS = 2, 4


def tiny_llama(seed: int = 0, config: Any = None) -> Any:
    """A Llama of 2 layers, 4 query heads and 2 key heads, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = config or LlamaConfig(
        vocab_size=40,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def text(batch: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    """Token ids that start with BOS and repeat words."""
    ids = torch.randint(2, 12, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Texts of different lengths as one batch that ends at the same column, with the positions that generate gives."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
