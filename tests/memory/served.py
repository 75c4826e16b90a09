"""Small decoders and texts for caches with a budget, and reading in pieces."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers as hf
from tests.zoo import BOS, EOS, PAD, VOCAB, enlarge
from torch import Tensor

from headwise.hf.inputs import with_cache

SMALL: dict[str, Any] = {"sink": 2, "recent": 4, "window": 3}
LOGITS: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
REFUSED = {  # family -> what the refusal names
    "mistral": "sliding-window", "qwen3": "sliding-window", "gemma2": "sliding-window", "gemma3": "sliding-window",
    "gpt_oss": "sliding-window", "qwen3_next": "Linear", "deepseek_v3": "latents", "t5": "encoder-decoder",
    "bart": "encoder-decoder", "bert": "causal text decoder",
}  # fmt: skip


def llama(kv: int = 2, groups: int = 2, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=8 * kv * groups, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=kv * groups, num_key_value_heads=kv, head_dim=8, max_position_embeddings=256,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = hf.LlamaForCausalLM(config)
    enlarge(model, seed, 1.5)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def text(batch: int, length: int, seed: int = 0, padding: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Ids `[b t]` and which are real; row i begins with `padding[i]` pads."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, VOCAB, (batch, length), generator=generator)
    pads = torch.tensor([*padding, *[0] * batch][:batch])
    real = torch.arange(length) >= pads[:, None]
    return ids.masked_fill(~real, PAD), real


def read(model: Any, cache: Any, ids: Tensor, real: Tensor, cuts: Sequence[int], start: int = 0) -> Tensor:
    """Logits `[b t v]` of a text that comes in pieces of these lengths, from position `start` on."""
    found = []
    for cut in cuts:
        end = start + cut
        given: dict[str, Any] = {"input_ids": ids[:, start:end]}
        if not bool(real.all()):
            given["attention_mask"] = real[:, :end].long()
            given["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)[:, start:end]
        with torch.no_grad():
            found.append(model(**given, **with_cache(model, cache)).logits)
        start = end
    return torch.cat(found, 1)
