"""A small vision transformer with the attention of your choice, so that mechanisms are compared in one network.

Patches, learned positions, pre-norm blocks, mean over tokens, one linear layer. `attention` is the name of a class of
`headwise.attention` that maps `[b t c]` to the same shape; it gets the width, the heads, and what its signature asks
for of the token grid (`grid_size`, `num_tokens`), then `attention_options`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

import headwise.attention

__all__ = ["SmallViT", "SmallViTConfig"]


class SmallViTConfig(PreTrainedConfig):
    """Sizes of a `SmallViT`. The defaults are the digits' (8 x 8 pixels, 16 tokens).

    num_labels: classes, 10 unless given. image_size, patch_size: pixels, or (height, width). attention: a class of
    `headwise.attention`, or a list of them, one for each layer. attention_options: further arguments of the class.
    mlp_ratio: width of the MLP over hidden_size.
    """

    model_type = "headwise-small-vit"

    def __init__(
        self,
        image_size: int | Sequence[int] = 8,
        patch_size: int | Sequence[int] = 2,
        num_channels: int = 1,
        hidden_size: int = 32,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 8,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        attention: str | Sequence[str] = "SoftmaxAttention",
        attention_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("id2label") is None:  # a saved config has the classes by name
            kwargs.setdefault("num_labels", 10)
        super().__init__(**kwargs)
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.mlp_ratio, self.dropout = num_attention_heads, mlp_ratio, dropout
        self.attention, self.attention_options = attention, attention_options or {}

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width = _pair(self.image_size)
        rows, columns = _pair(self.patch_size)
        if height % rows or width % columns:
            raise ValueError(f"SmallViT: patch_size {rows}x{columns} does not divide image_size {height}x{width}")
        return height // rows, width // columns


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _attention(config: SmallViTConfig, layer: int) -> nn.Module:
    names = config.attention
    if not isinstance(names, str) and len(names) != config.num_hidden_layers:
        raise ValueError(
            f"SmallViT: attention names {len(names)} layers, num_hidden_layers is {config.num_hidden_layers}"
        )
    name = names if isinstance(names, str) else names[layer]
    cls = getattr(headwise.attention, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(
            f"SmallViT: attention is {name!r}; expected a class of headwise.attention, as SoftmaxAttention"
        )
    rows, columns = config.grid_size
    known = {
        "embed_dim": config.hidden_size,
        "dim": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "grid_size": (rows, columns),
        "num_tokens": rows * columns,
    }
    wanted = inspect.signature(cls).parameters
    given = {key: value for key, value in known.items() if key in wanted} | config.attention_options
    return cls(**given)


class _Block(nn.Module):
    def __init__(self, config: SmallViTConfig, layer: int) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _attention(config, layer)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(hidden, width)
        )

    def forward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(PreTrainedModel):
    """Image classifier `[b c h w]` -> logits `[b n]`; heads can be probed and edited where the mechanism has heads."""

    config_class = SmallViTConfig
    config: Any
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: SmallViTConfig) -> None:
        super().__init__(config)
        rows, columns = config.grid_size
        labels: Any = config.num_labels
        patch = _pair(config.patch_size)
        self.patch_embed = nn.Conv2d(config.num_channels, config.hidden_size, patch, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns, config.hidden_size))
        self.blocks = nn.ModuleList(_Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Mechanisms keep the start that their class gives them."""
        if module is self:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward_features(self, pixel_values: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        """Tokens after the last norm, in rows of the grid.

        Raises ValueError for images of another size than the model's.
        """
        size = _pair(self.config.image_size)
        if pixel_values.shape[1:] != (self.config.num_channels, *size):
            raise ValueError(
                f"SmallViT: pixel_values are {tuple(pixel_values.shape[1:])}, expected "
                f"({self.config.num_channels}, {size[0]}, {size[1]})"
            )
        x = self.patch_embed(pixel_values).flatten(2).mT + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(
        self, pixel_values: Float[Tensor, "b c h w"], labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Logits, and the cross-entropy where labels `[b]` are given."""
        logits = self.head(self.forward_features(pixel_values).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        out = ImageClassifierOutput(loss=loss, logits=logits)
        return out.to_tuple() if return_dict is False else out
