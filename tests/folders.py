"""Model folders as transformers writes them: tiny, random, each with a small tokenizer beside it."""

import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["ARCHITECTURES", "CONTEXT", "save_model", "small_tokenizer"]

CONTEXT = 96
IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, **IDS,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}

# Name -> model from the size of a vocabulary.
ARCHITECTURES: dict[str, Any] = {
    "llama": lambda v: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=v, **GROUPED)),
    "mistral": lambda v: hf.MistralForCausalLM(hf.MistralConfig(vocab_size=v, sliding_window=24, **GROUPED)),
    "qwen2": lambda v: hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=v, **GROUPED)),
    "gpt2": lambda v: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=v, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, **IDS)
    ),
    "gpt-neox": lambda v: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(vocab_size=v, **SMALL)),
}
OTHERS: dict[str, Any] = {
    "bert": lambda v: hf.BertForMaskedLM(hf.BertConfig(vocab_size=v, **{k: x for k, x in SMALL.items()})),
    "bart": lambda v: hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=v, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=CONTEXT,
            decoder_start_token_id=1, forced_eos_token_id=None, **IDS,
        )
    ),
    "bloom": lambda v: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=v, hidden_size=32, n_layer=1, n_head=4)),
    "vit": lambda v: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
            patch_size=4,
        )
    ),
    "clip": lambda v: hf.CLIPModel(
        hf.CLIPConfig(
            text_config={**SMALL, "vocab_size": v, "projection_dim": 16},
            vision_config={
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                "image_size": 16, "patch_size": 4, "projection_dim": 16,
            },
            projection_dim=16,
        )
    ),
}  # fmt: skip


def small_tokenizer(size: int = 400) -> Any:
    """A byte-level BPE learned from the shipped page; it has a beginning-of-text token but does not add it."""
    page = (files("headwise.specimens") / "texts" / "page.txt").read_text(encoding="utf-8")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([page], trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def save_model(name: str, folder: Path, tokenizer: Any, *, chat_template: str | None = None) -> Path:
    """Write a model of an architecture, and a tokenizer where it reads text, into `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = {**ARCHITECTURES, **OTHERS}[name](len(tokenizer))
    if getattr(model, "generation_config", None) is not None:  # what is written must not end early
        model.generation_config.eos_token_id = None
        model.config.eos_token_id = None
    model.save_pretrained(folder)
    if name != "vit":
        own = copy.deepcopy(tokenizer)
        own.chat_template = chat_template
        own.save_pretrained(folder)
    return folder
