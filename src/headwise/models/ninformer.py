"""NiNformer: a vision backbone without attention, each block gated by what an MLP-Mixer makes of all its tokens.

    x <- x + MixerGate(LN x)        x <- x + FF(LN x)

By default both LN are one module, as in the official code.

Paper: headwise/papers/ninformer.py (Abdullah and Aydin, 2025).
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from headwise.attention.mixer_gate import MixerGate

__all__ = ["NiNformerConfig", "NiNformerForImageClassification", "ninformer_state"]


class NiNformerConfig(PreTrainedConfig):
    """Sizes; the defaults are the official ones for CIFAR-10.

    image_size, patch_size: pixels of a square. dim: width of the tokens. ffn_dim: hidden size of every feed-forward,
    the mixings included. depth: blocks. dropout: in the mixings as well, where it acts twice in a row. share_norm:
    one LayerNorm for both halves of a block (the official code), or one each. num_labels: classes, 10 unless given;
    `num_classes` is another name for it.
    """

    model_type = "headwise-ninformer"

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        in_channels: int = 3,
        num_classes: int | None = None,
        dim: int = 256,
        ffn_dim: int = 512,
        depth: int = 4,
        dropout: float = 0.5,
        share_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        if num_classes is not None:
            kwargs["num_labels"] = num_classes
        if kwargs.get("id2label") is None:  # a saved config has the classes by name
            kwargs.setdefault("num_labels", 10)
        super().__init__(**kwargs)
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels
        self.dim, self.ffn_dim, self.depth = dim, ffn_dim, depth
        self.dropout, self.share_norm = dropout, share_norm

    @classmethod
    def example(cls) -> "NiNformerConfig":
        """A small one."""
        return cls(image_size=16, patch_size=4, num_classes=5, dim=32, ffn_dim=48, depth=2)

    @property
    def num_tokens(self) -> int:
        """Patches of an image. Raises ValueError where the patches do not fill it."""
        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(f"NiNformer: patch_size {self.patch_size} does not divide image_size {self.image_size}")
        return (self.image_size // self.patch_size) ** 2


class _Block(nn.Module):
    def __init__(self, config: NiNformerConfig) -> None:
        super().__init__()
        width, hidden = config.dim, config.ffn_dim
        self.norm = nn.LayerNorm(width)
        self.norm2 = None if config.share_norm else nn.LayerNorm(width)
        self.gate = MixerGate(width, config.num_tokens, hidden, hidden, config.dropout)
        self.up, self.down, self.dropout = (
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x + self.gate(self.norm(x))
        norm = self.norm if self.norm2 is None else self.norm2
        return x + self.dropout(self.down(self.dropout(nn.functional.gelu(self.up(norm(x))))))


class NiNformerForImageClassification(PreTrainedModel):
    """Image classifier `[b c h w]` -> logits `[b n]`. It has no position embedding, class token or last norm.

    Official weights load through `ninformer_state`.
    """

    config_class = NiNformerConfig
    config: Any
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: NiNformerConfig) -> None:
        super().__init__(config)
        if min(config.dim, config.ffn_dim, config.depth, config.in_channels) < 1 or not 0 <= config.dropout < 1:
            raise ValueError(
                f"NiNformer: dim {config.dim}, ffn_dim {config.ffn_dim}, depth {config.depth}, in_channels "
                f"{config.in_channels}, dropout {config.dropout}; expected 1 or more, and a share below 1"
            )
        _ = config.num_tokens  # refuses patches that do not fit, before anything is made of them
        labels: Any = config.num_labels
        self.patcher = nn.Conv2d(config.in_channels, config.dim, config.patch_size, config.patch_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.classifier = nn.Linear(config.dim, labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own initialisation is the paper's."""

    def forward_features(self, pixel_values: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Tokens after the last block, in rows of the grid.

        Raises ValueError for images of another size: the mixing weights belong to positions.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (self.config.in_channels, size, size):
            raise ValueError(
                f"NiNformer: pixel_values are {tuple(pixel_values.shape[1:])}; this model mixes "
                f"{self.config.num_tokens} tokens and takes ({self.config.in_channels}, {size}, {size}); resize the "
                "images, or make a model of their size"
            )
        x = self.patcher(pixel_values).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x

    def forward(
        self, pixel_values: Float[Tensor, "b c h w"], labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Logits, and the cross-entropy where labels `[b]` are given."""
        logits = self.classifier(self.forward_features(pixel_values).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        out = ImageClassifierOutput(loss=loss, logits=logits)
        return out.to_tuple() if return_dict is False else out


# Official name -> ours, within a block.
NAMES = {
    "norm": "norm",
    "mgu.proj": "gate.proj",
    "mgu.Mixer.token_mix.0": "gate.token_norm",
    "mgu.Mixer.token_mix.2.net.0": "gate.token_up",
    "mgu.Mixer.token_mix.2.net.3": "gate.token_down",
    "mgu.Mixer.channel_mix.0": "gate.channel_norm",
    "mgu.Mixer.channel_mix.1.net.0": "gate.channel_up",
    "mgu.Mixer.channel_mix.1.net.3": "gate.channel_down",
    "ffn.net.0": "up",
    "ffn.net.3": "down",
}


def ninformer_state(state: Mapping[str, Tensor], *, share_norm: bool = True) -> dict[str, Tensor]:
    """An official state dict with our names. share_norm: of the model that loads it; False doubles the norms.

    Raises ValueError for a name that the official network does not have.

    >>> sorted(ninformer_state({"model.0.norm.bias": torch.zeros(2)}, share_norm=False))
    ['blocks.0.norm.bias', 'blocks.0.norm2.bias']
    """
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"model\.(\d+)\.(.+)\.(weight|bias)", name)
        if found is None and name.split(".")[0] in ("patcher", "classifier"):
            made[name] = value
        elif found is not None and found[2] in NAMES:
            made[f"blocks.{found[1]}.{NAMES[found[2]]}.{found[3]}"] = value
            if found[2] == "norm" and not share_norm:
                made[f"blocks.{found[1]}.norm2.{found[3]}"] = value.clone()
        else:
            raise ValueError(f"ninformer_state: {name!r} is no parameter of the official NiNformer classifier")
    return made
