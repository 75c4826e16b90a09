"""SAISA: a LLaVA whose image tokens are keys and values only, with a projector of image features for every layer.

    layer i:  K, V = W RMSNorm([text rows; P_i(Z)]),  Q = W_q RMSNorm(text rows);  residual and FFN on text rows only
    P_i = Linear -> GELU -> Linear, from features Z of the vision tower to the input of layer i

The text rows run through the language model as transformers has it; the keys and values of images, which no text
touches, are made beforehand and put in at their places. After the prefill the cache is an ordinary one.

Paper: headwise/papers/saisa.py (Yuan et al., 2025).
Notes: as in the authors' code, except that images may be several and stand anywhere, also first, that batches may be
padded, and that image tokens have no hidden states, where theirs hold what the next layer overwrites. Names of weights
are LLaVA's; `saisa_state` reads the authors' checkpoints.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaMultiModalProjector

from headwise.attention.naavit import TextRows, naavit_mask, text_rows, text_rows_mask
from headwise.hf.steps import CACHE_NAMES
from headwise.models._saisa_layers import (
    ImageRows,
    WithImages,
    cached_tokens,
    check_language_model,
    image_states,
    keep_image_rows,
    key_mask,
    own_padding,
    project,
)

__all__ = ["SaisaConfig", "SaisaForConditionalGeneration", "saisa_state"]

Alignment = Literal["saisa", "naavit", "embedding"]
ALIGNMENTS = ("saisa", "naavit", "embedding")
IMPLEMENTATIONS = ("auto", "compressed", "reference")
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(LlavaModel.forward).parameters)
IMAGES = "image_outputs" if hasattr(LlavaCausalLMOutputWithPast(), "image_outputs") else "image_hidden_states"
FEATURE_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")


class SaisaConfig(LlavaConfig):
    """LLaVA's config and how image features meet the language model.

    alignment: "saisa", one projector for each layer; "naavit", one projector, and image tokens that pass through the
    feed-forward layers without attending; "embedding", LLaVA as it is. implementation: "auto" computes text rows only,
    except where whole rows are asked for (probes, edits, attentions, hidden states, gradient checkpointing);
    "compressed" and "reference" always do the one or the other.
    Raises ValueError for another alignment or implementation.
    """

    model_type = "headwise-saisa"

    def __init__(
        self,
        alignment: str = "saisa",
        implementation: str = "auto",
        **kwargs: Any,
    ) -> None:
        if alignment not in ALIGNMENTS:
            raise ValueError(f"SaisaConfig: alignment is {alignment!r}; choose {', '.join(ALIGNMENTS)}")
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"SaisaConfig: implementation is {implementation!r}; choose {', '.join(IMPLEMENTATIONS)}")
        super().__init__(**kwargs)
        self.alignment, self.implementation = alignment, implementation

    @property
    def vocab_size(self) -> int:
        """Tokens that the language model knows."""
        text: Any = self.text_config
        return text.vocab_size

    @classmethod
    def example(cls, alignment: Alignment = "saisa", **changes: Any) -> "SaisaConfig":
        """A small one: 16 image tokens of a 2-layer CLIP tower, a Llama of 3 layers with grouped keys."""
        vision = {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "projection_dim": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
        }  # fmt: skip
        text = {
            "model_type": "llama", "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
        }  # fmt: skip
        sizes = {
            "vision_config": vision, "text_config": text, "image_token_index": 1, "image_seq_length": 16,
            "vision_feature_layer": -1,
        }  # fmt: skip
        return cls(alignment, **{**sizes, **changes})


class LayerProjectors(nn.ModuleList):
    """One projector for each layer of the language model, `[n c]` -> `[n d]`.

    Called, it hands features on as they are: they are projected where a layer needs them.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(LlavaMultiModalProjector(config) for _ in range(config.text_config.num_hidden_layers))

    def forward(self, features: Tensor) -> Tensor:
        return features


class SaisaModel(LlavaModel):
    """The network without the output head: vision tower, projectors, language model."""

    config_class = SaisaConfig
    config: Any
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: SaisaConfig) -> None:
        super().__init__(config)
        if config.alignment == "saisa":
            self.multi_modal_projector = LayerProjectors(config)
        self.align()
        self.post_init()

    def align(self) -> None:
        """Prepare the language model's layers. Raises UnsupportedModel for layers that are not of Llama's form."""
        if self.config.alignment != "embedding":
            check_language_model(self.language_model)
            keep_image_rows(self.language_model)

    def layer_inputs(self, features: Float[Tensor, "n c"]) -> list[Float[Tensor, "n d"]]:
        """What image tokens are at the input of each layer; no text has a part in it.

        features: of `get_image_features`, those of all images one after the other.
        Raises ValueError where there are more or fewer projectors than layers.
        """
        language_model: Any = self.language_model
        layers = list(language_model.layers)
        if self.config.alignment == "saisa":
            projectors: Any = self.multi_modal_projector
            if len(projectors) != len(layers):
                raise ValueError(
                    f"SaisaModel: {len(projectors)} projectors for {len(layers)} layers; give each its own"
                )
            return [project(projector, features) for projector in projectors]
        x, inputs = features, []
        for layer in layers:
            inputs.append(x)
            if len(inputs) < len(layers):
                x = x + layer.mlp(layer.post_attention_layernorm(x))
        return inputs

    def project_images(self, features: Float[Tensor, "n c"]) -> Float[Tensor, "n l e"]:
        """Keys and values of image tokens for every layer, side by side, before rotary embedding."""
        return image_states(self.language_model, self.layer_inputs(features))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As LLaVA's. The last hidden states of image tokens are zeros; with "embedding" they are LLaVA's.

        mm_encoder_outputs: {"image": what `get_image_features` or `encode_images` gave}.
        Raises ValueError where image tokens and features differ in number, or a sequence ends with an image.
        """
        cache = next((found for name in CACHE_NAMES if (found := kwargs.pop(name, None)) is not None), None)
        kwargs |= {CACHE: cache, "attention_mask": attention_mask, "position_ids": position_ids}
        if pixel_values is not None:
            if (mm_encoder_outputs or {}).get("image") is not None:
                raise ValueError("SaisaModel: give pixel_values, or mm_encoder_outputs with an image, not both")
            options: Any = {name: kwargs.pop(name) for name in FEATURE_OPTIONS if kwargs.get(name) is not None}
            options |= {"pixel_values": pixel_values, "return_dict": True}
            images = self.get_image_features(**options)
            mm_encoder_outputs = {**(mm_encoder_outputs or {}), "image": images}
        images = (mm_encoder_outputs or {}).get("image")
        visual = None
        if self.config.alignment != "embedding":
            visual = self.visual_mask(input_ids, inputs_embeds, images)
            mm_encoder_outputs = None
        if visual is None:
            plain: Any = {**kwargs, "input_ids": input_ids, "inputs_embeds": inputs_embeds, "return_dict": return_dict}
            return super().forward(mm_encoder_outputs=mm_encoder_outputs, **plain)
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        features = torch.cat(list(images.pooler_output)).to(embeds.device)  # type: ignore[union-attr]
        run = self._all_rows if self._wants_all_rows(kwargs) else self._text_rows
        out = run(embeds, visual, features, kwargs)
        out[IMAGES] = images if IMAGES == "image_outputs" else features
        return out.to_tuple() if return_dict is False else out

    def visual_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, images: Any) -> Tensor | None:
        """`[b s]` which tokens of a forward are image tokens; None where it is text only."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("SaisaModel: give either input_ids or inputs_embeds")
        if images is None and (input_ids is None or input_ids.shape[1] == 1):
            return None  # embeddings, or a decode step
        visual = self.image_places(input_ids, inputs_embeds)
        count = int(visual.sum())
        features = 0 if images is None else sum(len(one) for one in images.pooler_output)
        if count != features:
            raise ValueError(
                f"SaisaModel: {count} image tokens in the prompt but {features} image features; the processor puts "
                "in one image token for each feature"
            )
        return visual if count else None

    def image_places(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """`[b s]` where ids, or embeddings, are those of the image token."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.full((), self.config.image_token_id, device=inputs_embeds.device)  # type: ignore[union-attr]
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _wants_all_rows(self, kwargs: Mapping[str, Any]) -> bool:
        if self.config.implementation != "auto":
            return self.config.implementation == "reference"
        text = self.language_model.config
        names = ("output_attentions", "output_hidden_states")
        asked = any(kwargs.get(name, getattr(text, name, False)) for name in names)
        layers: Any = self.language_model.layers
        checkpointed = self.training and any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
        return asked or checkpointed or (text._attn_implementation or "").startswith("headwise")

    def _rows(self, visual: Tensor, kwargs: Mapping[str, Any]) -> tuple[TextRows, Tensor | None]:
        """The text rows of this forward, and which of its tokens are real."""
        real = own_padding(kwargs["attention_mask"], cached_tokens(kwargs[CACHE]), visual.shape[1])
        rows = text_rows(visual, real)
        last = (visual * torch.arange(1, visual.shape[1] + 1, device=visual.device)).amax(1) - 1
        if rows.index.shape[1] == 0 or bool((last > rows.index[:, -1]).any()):
            raise ValueError(
                "SaisaModel: a sequence ends with an image, whose tokens are asked nothing; put text after it"
            )
        return rows, real

    def _mask(self, own: Tensor, rows: Tensor, length: int, dtype: torch.dtype, kwargs: Mapping[str, Any]) -> Tensor:
        return key_mask(self.language_model.config, kwargs[CACHE], own, length, kwargs["attention_mask"], rows, dtype)

    def _text_rows(self, embeds: Tensor, visual: Tensor, features: Tensor, kwargs: dict[str, Any]) -> Any:
        """The text rows alone, which find keys and values of the images in every layer."""
        language_model: Any = self.language_model
        length, cache = embeds.shape[1], kwargs[CACHE]
        rows, real = self._rows(visual, kwargs)
        positions = kwargs["position_ids"]
        if positions is None:
            past = cached_tokens(cache)
            positions = torch.arange(past, past + length, device=embeds.device)[None]
        wanted = kwargs.get("use_cache")
        if cache is None and (language_model.config.use_cache if wanted is None else wanted):
            cache = DynamicCache(config=language_model.config)
        states = features if features.ndim == 3 else self.project_images(features)
        cos, sin = language_model.rotary_emb(embeds, position_ids=positions)
        own = text_rows_mask(rows, length, real)
        given = {
            "inputs_embeds": rows.gather(embeds),
            "attention_mask": self._mask(own, rows.index, length, embeds.dtype, {**kwargs, CACHE: cache}),
            "position_ids": positions.expand(len(embeds), -1).gather(1, rows.index),
            CACHE: WithImages(cache, rows, visual, states, cos, sin, language_model.config),
        }
        out: Any = super().forward(**{**kwargs, **given})
        out.last_hidden_state = rows.spread(out.last_hidden_state, length)
        out[CACHE] = cache
        return out

    def _all_rows(self, embeds: Tensor, visual: Tensor, features: Tensor, kwargs: dict[str, Any]) -> Any:
        """Every row: image rows are set before each layer, see nothing and are not updated by attention."""
        if features.ndim == 3:
            raise ValueError(
                "SaisaModel: encode_images gave keys and values, but whole rows are asked for (probes, edits, "
                "attentions, hidden states or gradient checkpointing); give pixel_values or get_image_features"
            )
        _, real = self._rows(visual, kwargs)
        columns = torch.arange(visual.shape[1], device=visual.device).expand_as(visual)
        inputs = self.layer_inputs(features) if self.config.alignment == "saisa" else [features]
        given = {
            "inputs_embeds": embeds.masked_fill(visual[..., None], 0),
            "attention_mask": self._mask(naavit_mask(visual, real), columns, visual.shape[1], embeds.dtype, kwargs),
            "image_rows": ImageRows(visual, inputs),
        }
        out: Any = super().forward(**{**kwargs, **given})
        out.last_hidden_state = out.last_hidden_state.masked_fill(visual[..., None], 0)
        return out


class SaisaForConditionalGeneration(LlavaForConditionalGeneration):
    """SAISA, NAAViT or LLaVA (`config.alignment`) with an output head; used, trained and saved as LLaVA is.

    Images that come up in several turns are encoded once: `images = model.encode_images(pixel_values)`, then
    `model.generate(ids, mm_encoder_outputs={"image": images})`, which computes text rows only. A trained LLaVA becomes
    one of these by `headwise.convert(model, to="naavit")`, at once, or `to="saisa"`, to be trained.
    """

    config_class = SaisaConfig
    config: Any
    model: Any
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: SaisaConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        text: Any = config.text_config
        self.model = SaisaModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor, **options: Any) -> Any:
        """Keys and values of images in every layer, for `mm_encoder_outputs={"image": ...}`, in any number of turns.

        Beam search changes what it is given: hand it a `copy.copy`. Raises ValueError for alignment "embedding", where
        image tokens depend on the text before them.
        """
        if self.config.alignment == "embedding":
            raise ValueError("encode_images: with alignment 'embedding' the keys of an image depend on the text before")
        images = self.model.get_image_features(pixel_values=pixel_values, return_dict=True, **options)
        images.pooler_output = [self.model.project_images(one) for one in images.pooler_output]
        return images

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits `[b s v]`, zeros at image tokens, which predict nothing; and the loss of the text tokens.

        labels: `[b s]`, -100 where nothing is asked. The first token after an image is predicted by none.
        """
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        given |= {"pixel_values": pixel_values, "mm_encoder_outputs": mm_encoder_outputs}
        outputs = self.model(input_ids, **given, **kwargs)
        hidden, size, loss, visual = outputs[0], self.config.text_config.vocab_size, None, None
        logits: Any
        pictured = pixel_values is not None or (mm_encoder_outputs or {}).get("image") is not None
        whole = isinstance(logits_to_keep, int) and not logits_to_keep
        if pictured and whole and self.config.alignment != "embedding":
            visual = self.model.image_places(input_ids, inputs_embeds)
        if visual is None:
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        else:
            said = self.lm_head(hidden[~visual])
            logits = torch.index_put(hidden.new_zeros(*hidden.shape[:2], size), (~visual,), said)
            if labels is not None:
                following = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:][~visual]
                loss = self.loss_function(said, None, size, shift_labels=following, **kwargs)
        out = LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE), IMAGES: outputs.get(IMAGES)},
        )
        return out.to_tuple() if return_dict is False else out


def saisa_state(state: Mapping[str, Any], config: SaisaConfig) -> dict[str, Tensor]:
    """A state dict of the authors' layout, as `SaisaForConditionalGeneration(config).load_state_dict` takes it.

    Their layers hold their projectors (`model.layers.3.mm_projector.0`), and their vision tower may be kept apart: then
    its weights are missing here, and `strict=False` leaves those of the model. A shared projector, which the authors'
    network does not use, is dropped. Raises ValueError for a state without a projector in every layer.
    """
    layers: int = config.text_config.num_hidden_layers  # type: ignore[union-attr]
    made, found = {}, set()
    for name, value in state.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mm_projector\.([02])\.(weight|bias)", name):
            number, place, kind = match.groups()
            found.add(int(number))
            made[f"model.multi_modal_projector.{number}.linear_{1 if place == '0' else 2}.{kind}"] = value
        elif match := re.match(r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)", name):
            made[f"model.vision_tower.{match[1]}"] = value
        elif name.startswith("model.mm_projector.") or name.endswith("rotary_emb.inv_freq"):
            continue
        else:
            made[re.sub(r"^model\.", "model.language_model.", name)] = value
    if lacking := sorted(set(range(layers)) - found):
        raise ValueError(f"saisa_state: layer {lacking[0]} of {layers} has no mm_projector; is it a SAISA checkpoint?")
    return made
