"""The Gaussian adaptive transformer: frozen features of an encoder's layers, re-weighted by density, then classified.

    features of all layers -> Gaussian adaptive blocks -> (grouped-query attention) -> layers weighed -> mean over time

With `num_attention_heads` it is the paper's combination with dot-product attention: every block attends with grouped
queries first and is re-weighted after. The Importance Factor ranks layers, times and features. The released code has
the attention only; how the network joins its parts is reconstructed from the paper's description.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from headwise.attention.gaussian_adaptive import GaussianAdaptiveAttention, importance_factor
from headwise.attention.softmax import SoftmaxAttention

__all__ = ["GaussianAdaptiveConfig", "GaussianAdaptiveOutput", "GaussianAdaptiveTransformer"]


class GaussianAdaptiveConfig(PreTrainedConfig):
    """Sizes of a `GaussianAdaptiveTransformer`.

    feature_size: of the encoder. num_feature_layers: how many of its layers are given. hidden_size: of the classifier's
    inner layer. num_heads, num_gaussians: of the Gaussian attention, whose heads are groups of features; dim: what it
    normalises over, "time" or "feature". num_attention_heads: of the grouped-query attention before it, None for none;
    num_kv_heads: its keys, None is one for each head.
    """

    model_type = "headwise-gaussian-adaptive"

    def __init__(
        self,
        feature_size: int = 768,
        num_feature_layers: int = 13,
        num_blocks: int = 1,
        num_heads: int = 8,
        num_gaussians: int = 4,
        dim: str = "time",
        combine: str = "product",
        num_attention_heads: int | None = None,
        num_kv_heads: int | None = None,
        hidden_size: int = 256,
        **kwargs: Any,
    ) -> None:
        self.feature_size, self.num_feature_layers, self.hidden_size = feature_size, num_feature_layers, hidden_size
        self.num_blocks, self.num_heads, self.num_gaussians = num_blocks, num_heads, num_gaussians
        self.dim, self.combine = dim, combine
        self.num_attention_heads, self.num_kv_heads = num_attention_heads, num_kv_heads
        super().__init__(**kwargs)

    @staticmethod
    def example() -> "GaussianAdaptiveConfig":
        return GaussianAdaptiveConfig(
            feature_size=16,
            num_feature_layers=3,
            num_heads=2,
            num_gaussians=2,
            num_attention_heads=4,
            num_kv_heads=2,
            hidden_size=12,
        )


@dataclass
class GaussianAdaptiveOutput(ModelOutput):
    """logits `[b n]`, the loss where labels were given, and the weights of the last block `[b l t c]` where asked."""

    logits: Tensor | None = None
    loss: Tensor | None = None
    weights: Tensor | None = None


class _Block(nn.Module):
    def __init__(self, config: GaussianAdaptiveConfig) -> None:
        super().__init__()
        if config.dim not in ("time", "feature"):
            raise ValueError(f"GaussianAdaptiveTransformer: dim is {config.dim!r}; choose 'time' or 'feature'")
        self.attention = None
        if config.num_attention_heads is not None:
            self.norm = nn.LayerNorm(config.feature_size)
            self.attention = SoftmaxAttention(
                config.feature_size, config.num_attention_heads, num_kv_heads=config.num_kv_heads
            )
        self.gaussian = GaussianAdaptiveAttention(
            config.num_heads,
            config.num_gaussians,
            1 if config.dim == "time" else 2,
            head_dim_axis=2,
            combine=config.combine,
            rescale=True,
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[m t c]` and the weights of the same shape."""
        if self.attention is not None:
            x = x + self.attention(self.norm(x), mask)
        out, weights = self.gaussian(x, mask, return_weights=True)
        return x + out, weights


class GaussianAdaptiveTransformer(PreTrainedModel):
    """Classifies sequences from the hidden states of a frozen encoder."""

    config_class = GaussianAdaptiveConfig
    main_input_name = "input_features"
    input_modalities = "audio"

    def __init__(self, config: GaussianAdaptiveConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_blocks))
        self.layer_logits = nn.Parameter(torch.zeros(config.num_feature_layers))
        self.head = nn.Sequential(
            nn.LayerNorm(config.feature_size),
            nn.Linear(config.feature_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, int(config.num_labels or 0)),
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules keep the start that their class gives them."""
        if module is self:
            nn.init.zeros_(self.layer_logits)

    def forward(
        self,
        input_features: Float[Tensor, "b l t c"] | Sequence[Float[Tensor, "b t c"]],
        attention_mask: Bool[Tensor, "b t"] | None = None,
        labels: Tensor | None = None,
        output_weights: bool = False,
        return_dict: bool | None = None,
    ) -> GaussianAdaptiveOutput | tuple[Tensor, ...]:
        """input_features: stacked, or the tuple that `output_hidden_states=True` gives. attention_mask: True = real.

        Raises ValueError for another number of layers or features.
        """
        x = input_features if isinstance(input_features, Tensor) else torch.stack(tuple(input_features), 1)
        wanted = (self.config.num_feature_layers, self.config.feature_size)
        if x.ndim != 4 or (x.shape[1], x.shape[3]) != wanted:
            raise ValueError(
                f"GaussianAdaptiveTransformer: input_features are {tuple(x.shape)}; expected [batch, "
                f"{wanted[0]} layers, time, {wanted[1]}]"
            )
        b, layers = x.shape[:2]
        mask = None if attention_mask is None else attention_mask.bool()
        each = None if mask is None else mask.repeat_interleave(layers, 0)
        rows, weights = x.flatten(0, 1), x
        for block in self.blocks:
            rows, weights = block(rows, each)
        share = self.layer_logits.softmax(0)
        mixed = torch.einsum("bltc,l->btc", rows.unflatten(0, (b, layers)), share)
        if mask is None:
            pooled = mixed.mean(1)
        else:
            pooled = torch.where(mask[..., None], mixed, 0).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        logits = self.head(pooled)
        out = GaussianAdaptiveOutput(
            logits=logits,
            loss=None if labels is None else nn.functional.cross_entropy(logits, labels),
            weights=weights.unflatten(0, (b, layers)) if output_weights else None,
        )
        return out.to_tuple() if return_dict is False else out

    @torch.no_grad()
    def importance(
        self, input_features: Tensor | Sequence[Tensor], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "b l t c"]:
        """The Importance Factor of every layer, time and feature: the last block's weights scaled to [0, 1] by input.

        Means over other axes rank features (`.mean((0, 1, 2))`), times or layers.
        """
        out = self(input_features, attention_mask, output_weights=True)
        return importance_factor(out.weights)
