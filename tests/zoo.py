"""Tiny random-init models of the classes that go through transformers' attention interface.

``FAMILIES[name].build(seed)`` gives a model in float32 and eval mode, with weights so large that attention patterns,
softcaps and sinks show; ``FAMILIES[name].inputs(model, batch, length, padding)`` gives what its forward takes.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["FAMILIES", "OFF_INTERFACE", "Family", "families"]

VOCAB = 64
PAD, BOS, EOS, IMAGE, VISION_START, VISION_END, VIDEO, FIRST_WORD = 0, 1, 2, 3, 4, 5, 6, 8
WINDOW = 6

Padding = Literal["left", "right"] | None
Kind = Literal["decoder", "encoder", "seq2seq", "speech", "vision", "dual", "multimodal"]

QUERY_KEY = re.compile(
    r"(^|\.)(q_proj|k_proj|q_b_proj|kv_b_proj|query|key|q_lin|k_lin|c_attn|qkv_proj|query_key_value|qkv|Wqkv|q|k)\.weight$"
)
QUERY_KEY_NORM = re.compile(r"(q|k)_norm\.weight$")


_BUILT: dict[tuple[str, int], Any] = {}


@dataclass(frozen=True)
class Family:
    """One model class of the zoo, and what is known about it without looking inside."""

    name: str
    kind: Kind
    make: Callable[[], PreTrainedModel]
    """The model as transformers initialises it."""
    towers: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Tower -> query heads per layer, key heads per layer; main tower first."""
    causal: dict[str, str]
    """Tower -> "causal", "bidirectional" or "cross"."""
    gain: float = 2.0
    """Standard deviation of queries and keys; the scores' is about its square."""
    generates: bool = False
    sliding_window: int | None = None
    softcap: bool = False
    sinks: bool = False
    hybrid: bool = False
    """Some layers have no attention."""
    implementation: str = "sdpa"
    """What transformers chooses when nobody asks."""
    padded: bool = True
    """The text side takes a padding mask."""
    image_tokens: int = 0
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def decoder(self) -> bool:
        """The main tower is a causal text decoder without an encoder."""
        return self.generates and self.kind in ("decoder", "multimodal")

    def build(self, seed: int = 0) -> Any:
        """A model of its own; the weights follow from the seed."""
        if (self.name, seed) not in _BUILT:
            _BUILT[self.name, seed] = self._build(seed)
        return copy.deepcopy(_BUILT[self.name, seed])

    def _build(self, seed: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make()
        enlarge(model, seed, self.gain)
        if self.generates and model.generation_config is not None:
            for name in ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
                setattr(model.generation_config, name, None)
            model.generation_config.pad_token_id = PAD
            model.generation_config.bos_token_id = BOS
        return model.float().eval()

    def inputs(
        self, model: Any, batch: int = 2, length: int = 12, padding: Padding = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Keyword arguments of the forward. With padding, row i has 2 i + 1 padded positions (row 0: one)."""
        generator = torch.Generator().manual_seed(seed)
        given: dict[str, Tensor] = {}
        if self.kind in ("vision", "dual"):
            given["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=generator)
        if self.kind == "speech":
            frames = 2 * model.config.max_source_positions
            given["input_features"] = torch.randn(batch, model.config.num_mel_bins, frames, generator=generator)
            given["decoder_input_ids"] = words(batch, length, generator)
            if padding is not None:
                given["decoder_attention_mask"] = padding_mask(batch, length, padding)
        if self.kind in ("decoder", "encoder", "seq2seq", "dual", "multimodal"):
            given["input_ids"] = words(batch, length, generator)
            if padding is not None:
                mask = padding_mask(batch, length, padding)
                given["attention_mask"] = mask
                given["input_ids"] = given["input_ids"].masked_fill(mask == 0, PAD)
        if self.kind == "seq2seq":
            given["decoder_input_ids"] = words(batch, length - 3, generator)
        if "decoder_input_ids" in given:  # generate puts the start token in front where it is missing
            given["decoder_input_ids"][:, 0] = model.config.decoder_start_token_id
        if self.kind == "dual" and self.name == "clip":
            given["input_ids"][:, -1] = EOS  # the text tower pools at the end token
        if self.kind == "multimodal":
            self._put_images(given, batch, length, generator)
        return given

    def _put_images(self, given: dict[str, Tensor], batch: int, length: int, generator: torch.Generator) -> None:
        """One picture per row, in the middle, after every padded position."""
        start = length - self.image_tokens - 3
        if start < 1:
            raise ValueError(f"zoo: {self.name} needs at least {self.image_tokens + 4} tokens, length is {length}")
        ids = given["input_ids"]
        ids[:, start : start + self.image_tokens] = IMAGE
        mask = given.get("attention_mask")
        if mask is not None and not bool(mask[:, start : start + self.image_tokens].all()):
            raise ValueError(f"zoo: padding reaches the picture of {self.name}; use a longer text")
        if self.name == "llava":
            given["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=generator)
            return
        ids[:, start - 1], ids[:, start + self.image_tokens] = VISION_START, VISION_END
        rows, columns = self.extras["grid"]
        given["pixel_values"] = torch.randn(batch * rows * columns, 3 * 2 * 4 * 4, generator=generator)
        given["image_grid_thw"] = torch.tensor([[1, rows, columns]] * batch)
        given["mm_token_type_ids"] = (ids == IMAGE).long()


def words(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random words with repeats: the vocabulary is small, so that rows have earlier equal tokens."""
    return torch.randint(FIRST_WORD, FIRST_WORD + 24, (batch, length), generator=generator)


def padding_mask(batch: int, length: int, padding: Padding) -> Tensor:
    count = (2 * torch.arange(batch) + 1).clamp(max=length // 2)
    position = torch.arange(length).expand(batch, length)
    keep = position >= count[:, None] if padding == "left" else position < length - count[:, None]
    return keep.long()


def enlarge(model: nn.Module, seed: int, gain: float) -> None:
    """Redraw the weights: unit variance through every layer, `gain` for queries and keys, small random biases."""
    generator = torch.Generator().manual_seed(1000 + seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    columns_first = {id(m.weight) for m in model.modules() if isinstance(m, hf.pytorch_utils.Conv1D)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() < 2 or min(weight.shape) == 1:
                weight.mul_(gain if QUERY_KEY_NORM.search(name) else 1.0).add_(0.2 * noise)
            elif id(weight) in embeddings:
                weight.copy_(noise)
                weight[PAD] = 0  # as trained checkpoints have it
            else:
                fan_in = weight.shape[0] if id(weight) in columns_first else weight[0].numel()
                spread = gain if QUERY_KEY.search(name) else 1.0
                weight.copy_(noise * spread / math.sqrt(fan_in))


# --- configurations -------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4, "num_channels": 3,
}  # fmt: skip
TEXT_TOWER = {"": ((4, 4), (4, 4))}
GROUPED_TOWER = {"": ((4, 4), (2, 2))}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def made(model: str, config: str, options: dict[str, Any]) -> PreTrainedModel:
    return getattr(hf, model)(getattr(hf, config)(**options))


def decoder(name: str, model: str, config: str, options: dict[str, Any], **facts: Any) -> Family:
    """A causal language model; four heads over two key heads unless `towers` says otherwise."""
    towers = facts.pop("towers", GROUPED_TOWER)
    make = partial(made, model, config, options)
    return Family(name, "decoder", make, towers, {"": "causal"}, generates=True, **facts)


def encoder(name: str, model: str, config: str, options: dict[str, Any], **facts: Any) -> Family:
    towers = facts.pop("towers", TEXT_TOWER)
    return Family(name, "encoder", partial(made, model, config, options), towers, {"": "bidirectional"}, **facts)


def vision(name: str, model: str, config: str, options: dict[str, Any], **facts: Any) -> Family:
    make = partial(made, model, config, options)
    return Family(name, "vision", make, TEXT_TOWER, {"": "bidirectional"}, padded=False, **facts)


def encoder_decoder(name: str, kind: Kind, model: str, config: str, options: dict[str, Any], **facts: Any) -> Family:
    towers = {tower: ((4, 4), (4, 4)) for tower in ("decoder", "encoder", "cross")}
    causal = {"decoder": "causal", "encoder": "bidirectional", "cross": "cross"}
    make = partial(made, model, config, options)
    return Family(name, kind, make, towers, causal, generates=True, **facts)


def dual(name: str, prefix: str, **facts: Any) -> Family:
    text = {**SMALL, "projection_dim": 16, "projection_size": 32}
    both = {"text_config": text, "vision_config": {**VISION, "projection_dim": 16}, "projection_dim": 16}
    make = partial(made, f"{prefix}Model", f"{prefix}Config", both)
    towers = {tower: ((4, 4), (4, 4)) for tower in ("text", "vision")}
    causal = {"text": facts.pop("text"), "vision": "bidirectional"}
    return Family(name, "dual", make, towers, causal, **facts)


def multimodal(name: str, model: str, config: str, options: dict[str, Any], **facts: Any) -> Family:
    towers = {"": ((4, 4), (2, 2)), "vision": ((4, 4), (4, 4))}
    causal = {"": "causal", "vision": "bidirectional"}
    make = partial(made, model, config, options)
    return Family(name, "multimodal", make, towers, causal, generates=True, image_tokens=4, **facts)


def qwen_vl(name: str, prefix: str, vision_options: dict[str, Any], grid: tuple[int, int], **facts: Any) -> Family:
    options = {
        "text_config": {**GROUPED, "head_dim": 8, "rope_parameters": dict(MROPE)},
        "vision_config": {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, **vision_options},
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END, "tie_word_embeddings": False,
    }  # fmt: skip
    class_name, config_name = f"{prefix}ForConditionalGeneration", f"{prefix}Config"
    family = multimodal(name, class_name, config_name, options, extras={"grid": grid}, **facts)
    return replace(family, image_tokens=grid[0] * grid[1] // 4)


ALTERNATING = ["sliding_attention", "full_attention"]
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
SPEECH = {
    "vocab_size": VOCAB, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 64, "d_model": 32,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": BOS, "pad_token_id": PAD,
    "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
HYBRID = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": BOS,
    "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
BART = {key: value for key, value in SPEECH.items() if not key.startswith(("num_mel", "max_"))}
T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": PAD,
    "pad_token_id": PAD, "eos_token_id": EOS,
}  # fmt: skip
TWO_ROPES = {"rope_parameters": {"sliding_attention": dict(ROPE), "full_attention": dict(ROPE)}}
ENCODER = {key: value for key, value in SMALL.items() if key != "eos_token_id"}
CLIP_VISION = {**VISION, "patch_size": 8, "model_type": "clip_vision_model"}
QWEN2_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
QWEN25_VISION = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "window_size": 16,
    "fullatt_block_indexes": [1],
}  # fmt: skip
QWEN3_VISION = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip

_ALL = [
    decoder("llama", "LlamaForCausalLM", "LlamaConfig", GROUPED),
    decoder("mistral", "MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": WINDOW}, sliding_window=6),
    decoder("qwen2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    decoder(
        "qwen3", "Qwen3ForCausalLM", "Qwen3Config",
        {**GROUPED, "head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        sliding_window=WINDOW,
    ),
    decoder(
        "gemma2", "Gemma2ForCausalLM", "Gemma2Config",
        {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW,
         "attn_logit_softcapping": 5.0, "layer_types": ALTERNATING},
        sliding_window=WINDOW, softcap=True, implementation="eager",
    ),
    decoder(
        "gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW,
         "layer_types": ALTERNATING, **TWO_ROPES},
        sliding_window=WINDOW,
    ),
    decoder(
        "gpt_oss", "GptOssForCausalLM", "GptOssConfig",
        {**GROUPED, **MOE, "rope_parameters": dict(ROPE), "head_dim": 8, "sliding_window": WINDOW,
         "layer_types": ALTERNATING},
        sliding_window=WINDOW, sinks=True, implementation="eager",
    ),
    decoder("phi3", "Phi3ForCausalLM", "Phi3Config", GROUPED),
    decoder("phi", "PhiForCausalLM", "PhiConfig", GROUPED),
    decoder("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL, towers=TEXT_TOWER),
    decoder(
        "gpt_neox_serial", "GPTNeoXForCausalLM", "GPTNeoXConfig", {**SMALL, "use_parallel_residual": False},
        towers=TEXT_TOWER,
    ),
    decoder("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2, towers=TEXT_TOWER),
    decoder(
        "opt", "OPTForCausalLM", "OPTConfig", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, towers=TEXT_TOWER,
    ),
    decoder("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", {**SMALL, **MLA}, towers=TEXT_TOWER),
    decoder(
        "qwen3_next", "Qwen3NextForCausalLM", "Qwen3NextConfig", {**GROUPED, **HYBRID},
        towers={"": ((0, 4), (0, 2))}, hybrid=True,
    ),
    decoder("mixtral", "MixtralForCausalLM", "MixtralConfig", {**GROUPED, **MOE}),
    decoder("olmo2", "Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    decoder(
        "granite", "GraniteForCausalLM", "GraniteConfig",
        {**GROUPED, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.3},
    ),
    decoder("cohere", "CohereForCausalLM", "CohereConfig", GROUPED),
    encoder("bert", "BertForMaskedLM", "BertConfig", ENCODER),
    encoder("roberta", "RobertaForMaskedLM", "RobertaConfig", ENCODER),
    encoder(
        "albert", "AlbertForMaskedLM", "AlbertConfig", {**ENCODER, "embedding_size": 16},
        towers={"": ((4,), (4,))},  # one module, called once per layer
    ),
    encoder(
        "distilbert", "DistilBertForMaskedLM", "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128,
         "pad_token_id": PAD},
    ),
    encoder(
        "modernbert", "ModernBertForMaskedLM", "ModernBertConfig",
        {**SMALL, "cls_token_id": BOS, "sep_token_id": EOS, "local_attention": WINDOW,
         "layer_types": ["full_attention", "sliding_attention"], **TWO_ROPES},
        sliding_window=WINDOW // 2,
    ),
    encoder_decoder("t5", "seq2seq", "T5ForConditionalGeneration", "T5Config", T5, gain=1.0),
    encoder_decoder(
        "bart", "seq2seq", "BartForConditionalGeneration", "BartConfig",
        {**BART, "max_position_embeddings": 128, "forced_eos_token_id": None},
    ),
    encoder_decoder("whisper", "speech", "WhisperForConditionalGeneration", "WhisperConfig", SPEECH),
    vision("vit", "ViTForImageClassification", "ViTConfig", VISION),
    vision("dinov2", "Dinov2Model", "Dinov2Config", {**VISION, "mlp_ratio": 2}),
    dual("clip", "CLIP", text="causal"),
    dual("siglip", "Siglip", text="bidirectional"),
    multimodal(
        "llava", "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {**GROUPED, "model_type": "llama"}, "vision_config": CLIP_VISION, "image_token_index": IMAGE,
         "vision_feature_layer": -1},
    ),
    qwen_vl("qwen2_vl", "Qwen2VL", QWEN2_VISION, (4, 4)),
    qwen_vl("qwen2_5_vl", "Qwen2_5_VL", QWEN25_VISION, (4, 8)),
    qwen_vl("qwen3_vl", "Qwen3VL", QWEN3_VISION, (4, 4)),
]  # fmt: skip

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def families(**facts: Any) -> list[str]:
    """Names of the families whose attributes have the given values, for parametrising tests."""
    return [name for name, family in FAMILIES.items() if all(getattr(family, k) == v for k, v in facts.items())]


OFF_INTERFACE: dict[str, Callable[[], Any]] = {
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)),
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=VOCAB, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]],
            max_position_embeddings=32,
        )
    ),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ),
    "plain": lambda: nn.TransformerEncoderLayer(16, 4, batch_first=True),
}  # fmt: skip
"""Models that transformers' attention interface does not reach."""
