"""DaViT: a pyramid of blocks that attend over space in windows and over channels in groups, in turn.

    x += depthwise 3x3 (x);  x += attention(norm(x));  x += depthwise 3x3 (x);  x += mlp(norm(x))

Paper: headwise/papers/davit.py (Ding et al., ECCV 2022). Parameters are named as timm names them;
`convert_davit_state_dict` reads the official layout and those of Florence-2, whose vision tower is a variant.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput

from headwise.attention.channel import ChannelAttention
from headwise.attention.window import WindowAttention

__all__ = ["DaViT", "DaViTConfig", "DaViTForImageClassification", "convert_davit_state_dict"]

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (1, 1, 3, 1), "hidden_sizes": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)},
    "small": {"depths": (1, 1, 9, 1), "hidden_sizes": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)},
    "base": {"depths": (1, 1, 9, 1), "hidden_sizes": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)},
    "large": {
        "depths": (1, 1, 9, 1), "hidden_sizes": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48), "window_size": 12,
    },
    "huge": {"depths": (1, 1, 9, 1), "hidden_sizes": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64)},
    "giant": {"depths": (1, 1, 12, 3), "hidden_sizes": (384, 768, 1536, 3072), "num_heads": (12, 24, 48, 96)},
    "florence2-base": {
        "depths": (1, 1, 9, 1), "hidden_sizes": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), "window_size": 12,
        "variant": "florence2",
    },
}  # fmt: skip


class DaViTConfig(BackboneConfigMixin, PreTrainedConfig):
    """Sizes of a `DaViT`; the defaults are those of DaViT-Tiny, `DaViTConfig.preset("base")` gives others.

    depths: pairs of a spatial and a channel block in every stage. num_heads: heads of a spatial block; num_groups:
    groups of a channel block, None is num_heads. window_size: 7, or 12 at 384 pixels. drop_path_rate: stochastic depth
    of the last block, rising linearly from 0 over all blocks. variant: "davit", or "florence2" with its channel
    attention and its 3 x 3 downsampling. num_labels: 0 makes no classifier.
    """

    model_type = "headwise-davit"

    def __init__(
        self,
        num_channels: int = 3,
        depths: Sequence[int] = (1, 1, 3, 1),
        hidden_sizes: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        num_groups: Sequence[int] | None = None,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.1,
        variant: str = "davit",
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.depths, self.hidden_sizes, self.num_heads = list(depths), list(hidden_sizes), list(num_heads)
        self.num_groups = list(num_heads if num_groups is None else num_groups)
        self.window_size, self.mlp_ratio, self.qkv_bias = window_size, mlp_ratio, qkv_bias
        self.drop_path_rate, self.variant = drop_path_rate, variant
        self.layer_norm_eps, self.initializer_range = layer_norm_eps, initializer_range
        self.stage_names = [f"stage{number + 1}" for number in range(len(self.depths))]
        kwargs.pop("stage_names", None)
        super().__init__(**kwargs)
        self.set_output_features_output_indices(out_features, out_indices)
        lists = {key: getattr(self, key) for key in ("depths", "hidden_sizes", "num_heads", "num_groups")}
        if len({len(one) for one in lists.values()}) != 1 or not self.depths:
            raise ValueError(f"DaViTConfig: {lists} must have one value for every stage")
        for key in ("num_heads", "num_groups"):
            for stage, (width, parts) in enumerate(zip(self.hidden_sizes, lists[key], strict=True)):
                if parts < 1 or width % parts:
                    raise ValueError(f"DaViTConfig: {key}[{stage}] is {parts}, which does not divide {width} channels")
        if window_size < 1:
            raise ValueError(f"DaViTConfig: window_size is {window_size}; expected 1 or more")
        if variant not in ("davit", "florence2"):
            raise ValueError(f"DaViTConfig: variant is {variant!r}; choose 'davit' or 'florence2'")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DaViTConfig":
        """The sizes of a released network: tiny, small, base, large, huge, giant, florence2-base."""
        if name not in PRESETS:
            raise ValueError(f"DaViTConfig: no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @staticmethod
    def example() -> "DaViTConfig":
        return DaViTConfig(depths=(1, 1), hidden_sizes=(16, 32), num_heads=(2, 4), window_size=3, num_labels=5)

    @property
    def least_size(self) -> int:
        """Pixels below which the last stage would be all padding."""
        return 4 * 2 ** (len(self.depths) - 1)


class _DepthwisePosition(nn.Module):
    """x + a depthwise 3 x 3 convolution of it: the only thing that tells positions apart."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "b y x c"]) -> Float[Tensor, "b y x c"]:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _DropPath(nn.Module):
    """Leaves a branch out for some items of a batch while training, and scales it up for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    """A spatial or a channel block on `[b y x c]`."""

    def __init__(self, config: DaViTConfig, stage: int, attention: nn.Module, drop_path: float) -> None:
        super().__init__()
        dim, eps = config.hidden_sizes[stage], config.layer_norm_eps
        self.cpe1, self.norm1 = _DepthwisePosition(dim), nn.LayerNorm(dim, eps)
        self.attn = attention
        self.cpe2, self.norm2 = _DepthwisePosition(dim), nn.LayerNorm(dim, eps)
        self.mlp = _Mlp(dim, int(dim * config.mlp_ratio))
        self.drop_path = _DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b y x c"]) -> Float[Tensor, "b y x c"]:
        x = self.cpe1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Stem(nn.Module):
    """7 x 7 convolution of stride 4, then a norm; `[b c y x]` to `[b y x c]`."""

    def __init__(self, config: DaViTConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.num_channels, config.hidden_sizes[0], 7, 4, 3)
        self.norm = nn.LayerNorm(config.hidden_sizes[0], config.layer_norm_eps)

    def forward(self, x: Float[Tensor, "b c y x"]) -> Float[Tensor, "b u v d"]:
        height, width = x.shape[2:]
        x = nn.functional.pad(x, (0, -width % 4, 0, -height % 4))
        return self.norm(self.conv(x).permute(0, 2, 3, 1).contiguous())


class _Downsample(nn.Module):
    """A norm, then a convolution of stride 2: 2 x 2, or 3 x 3 in Florence-2."""

    def __init__(self, config: DaViTConfig, stage: int) -> None:
        super().__init__()
        width, out = config.hidden_sizes[stage - 1 : stage + 1]
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.wide = config.variant == "florence2"
        self.conv = nn.Conv2d(width, out, 3 if self.wide else 2, 2, 1 if self.wide else 0)

    def forward(self, x: Float[Tensor, "b y x c"]) -> Float[Tensor, "b u v d"]:
        height, width = x.shape[1:3]
        x = self.norm(x).permute(0, 3, 1, 2)
        if not self.wide:
            x = nn.functional.pad(x, (0, -width % 2, 0, -height % 2))
        return self.conv(x).permute(0, 2, 3, 1).contiguous()


class _Stage(nn.Module):
    def __init__(self, config: DaViTConfig, stage: int, rates: Sequence[float]) -> None:
        super().__init__()
        dim = config.hidden_sizes[stage]
        self.downsample = _Downsample(config, stage) if stage else nn.Identity()
        blocks = []
        for pair in range(config.depths[stage]):
            window = WindowAttention(dim, config.window_size, config.num_heads[stage], qkv_bias=config.qkv_bias)
            channel = ChannelAttention(dim, config.num_groups[stage], qkv_bias=config.qkv_bias, variant=config.variant)
            two = rates[2 * pair : 2 * pair + 2]
            made = [_Block(config, stage, one, rate) for one, rate in zip((window, channel), two, strict=True)]
            blocks.append(nn.Sequential(*made))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class _Head(nn.Module):
    """Mean over positions, a norm, one linear layer."""

    def __init__(self, config: DaViTConfig) -> None:
        super().__init__()
        width = config.hidden_sizes[-1]
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.fc = nn.Linear(width, config.num_labels) if config.num_labels else nn.Identity()

    def forward(self, x: Float[Tensor, "b y x c"]) -> Tensor:
        return self.fc(self.norm(x.mean((1, 2))))


class DaViT(BackboneMixin, PreTrainedModel):
    """The pyramid: `[b c y x]` to maps of strides 4, 8, 16, 32 for those stages that `out_features` names.

    By default the last map only. Maps are not normalised. Heads and groups can be probed and edited; a layer of
    addresses is a block, spatial ones even, channel ones odd.
    """

    config_class = DaViTConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    has_attentions = False

    def __init__(self, config: DaViTConfig) -> None:
        super().__init__(config)
        blocks = 2 * sum(config.depths)
        rates = [config.drop_path_rate * block / max(1, blocks - 1) for block in range(blocks)]
        self.num_features = list(config.hidden_sizes)
        self.stem = _Stem(config)
        stages = []
        for stage, depth in enumerate(config.depths):
            stages.append(_Stage(config, stage, rates[: 2 * depth]))
            rates = rates[2 * depth :]
        self.stages = nn.Sequential(*stages)
        self._add_head(config)
        self.post_init()

    def _add_head(self, config: DaViTConfig) -> None:
        """The pyramid has none."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_maps(self, pixel_values: Float[Tensor, "b c y x"]) -> list[Float[Tensor, "b u v d"]]:
        """The map of every stage, channels last. Raises ValueError for too small images and other channels."""
        channels, *size = pixel_values.shape[1:]
        least = self.config.least_size
        if channels != self.config.num_channels:
            raise ValueError(f"DaViT: pixel_values have {channels} channels, expected {self.config.num_channels}")
        if min(size) < least:
            raise ValueError(f"DaViT: images are {size[0]} x {size[1]} pixels; at least {least} x {least} are needed")
        maps, x = [], self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, pixel_values: Float[Tensor, "b c y x"]) -> Float[Tensor, "b d u v"]:
        """The last map, channels first."""
        return self.forward_maps(pixel_values)[-1].permute(0, 3, 1, 2)

    def forward(self, pixel_values: Float[Tensor, "b c y x"], return_dict: bool | None = None, **kwargs: Any) -> Any:
        """`BackboneOutput` with `feature_maps`, channels first."""
        maps = self.forward_maps(pixel_values)
        names = self.config.out_features
        chosen = [x for name, x in zip(self.config.stage_names, maps, strict=True) if name in names]
        out = BackboneOutput(feature_maps=tuple(x.permute(0, 3, 1, 2) for x in chosen))  # pyright: ignore[reportArgumentType]
        return out.to_tuple() if return_dict is False else out


class DaViTForImageClassification(DaViT):
    """DaViT with its classifier: `[b c y x]` to logits `[b n]`."""

    def _add_head(self, config: DaViTConfig) -> None:
        self.head = _Head(config)

    def forward(
        self,
        pixel_values: Float[Tensor, "b c y x"],
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the cross-entropy where labels `[b]` are given."""
        logits = self.head(self.forward_maps(pixel_values)[-1])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        out = ImageClassifierOutput(loss=loss, logits=logits)
        return out.to_tuple() if return_dict is False else out


# Checkpoints of others

OFFICIAL = (
    (r"^patch_embeds\.0\.proj\.", "stem.conv."),
    (r"^patch_embeds\.0\.", "stem."),
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^patch_embeds\.(\d+)\.", r"stages.\1.downsample."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^norms\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
FLORENCE = (
    (r"^convs\.0\.(?:proj|conv)\.", "stem.conv."),
    (r"^convs\.0\.", "stem."),
    (r"^convs\.(\d+)\.(?:proj|conv)\.", r"stages.\1.downsample.conv."),
    (r"^convs\.(\d+)\.", r"stages.\1.downsample."),
    (r"^blocks\.(\d+)\.(\d+)\.spatial_block\.", r"stages.\1.blocks.\2.0."),
    (r"^blocks\.(\d+)\.(\d+)\.channel_block\.", r"stages.\1.blocks.\2.1."),
    (r"\.conv([12])\.(?:fn\.dw\.)?(?=weight|bias)", r".cpe\1.proj."),
    (r"\.(?:window|channel)_attn\.norm\.", ".norm1."),
    (r"\.(?:window|channel)_attn\.(?:fn\.)?", ".attn."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.(?:fn\.net\.)?", ".mlp."),
    (r"^norms\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
KNOWN = re.compile(
    r"(stem|stages\.\d+\.downsample)\.(conv|norm)\.(weight|bias)|head\.(norm|fc)\.(weight|bias)|"
    r"stages\.\d+\.blocks\.\d+\.[01]\.(cpe[12]\.proj|norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
)


def convert_davit_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the official code, of timm, of Florence-2's hub files or of transformers' Florence-2, to those here.

    The layout is told by the keys. Of a whole Florence-2 model the vision tower is taken. Values are not copied.
    Raises ValueError for a layout that is none of these, and lists the keys that have no place.
    """
    towers = [key.split("vision_tower.")[0] + "vision_tower." for key in state if "vision_tower." in key]
    prefix = towers[0] if towers else "module." if state and all(k.startswith("module.") for k in state) else ""
    keys = {key: key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    inner = keys.values()
    rules: tuple[tuple[str, str], ...]
    if any(key.startswith("patch_embeds.") for key in inner):
        rules = OFFICIAL
    elif any(key.startswith("convs.") for key in inner):
        rules = FLORENCE
    elif any(key.startswith("stem.") for key in inner):
        rules = ()
    else:
        raise ValueError(
            f"convert_davit_state_dict: keys such as {sorted(state)[:3]} are of no layout that is known; expected "
            "'patch_embeds.' (official), 'stem.' (timm) or 'convs.' (Florence-2)"
        )
    found: dict[str, Tensor] = {}
    for key, name in keys.items():
        for pattern, into in rules:
            name = re.sub(pattern, into, name)
        found[name] = state[key]
    strange = sorted(name for name in found if not KNOWN.fullmatch(name))
    if strange:
        raise ValueError(f"convert_davit_state_dict: {len(strange)} keys have no place here: {', '.join(strange[:8])}")
    return found
