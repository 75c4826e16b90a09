"""Sparsifiner's network: a DeiT whose layers attend to the keys that predictors keep, and which may prune tokens.

Names of weights are those of timm's DeiT and, for the predictors, of the official code, so that both kinds of state
load as they are. Tokens are pruned as in DynamicViT's hierarchy: at layers 3, 6 and 9 a share token_keep, its square
and its cube of the patches stay, those that the class token attends to most.

Paper: headwise/papers/sparsifiner.py (Wei et al., CVPR 2023).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from headwise.attention.sparsifiner import Mode, SparsifinerAttention, attention_products

__all__ = ["SparsifinerConfig", "SparsifinerViT", "distillation_loss"]

SIZES = {"deit-ti": (192, 3), "deit-s": (384, 6), "deit-b": (768, 12)}  # width, heads; 12 layers each


class SparsifinerConfig(PreTrainedConfig):
    """Sizes; the defaults are the paper's DeiT-S at keep 0.25 without token pruning. num_labels: 1,000 unless given.

    keep, token_reduction, channel_reduction, basis_threshold, coef_topk: of `ConnectivityPredictor`. token_keep: share
    of the patches that stay at the first pruning layer, 1.0 for all; pruning_layers: after their attention.
    initializer_range: deviation of the linear layers' start, DeiT's; narrow networks want more.
    """

    model_type = "headwise-sparsifiner"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_size: int = 384,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        mlp_ratio: float = 4.0,
        keep: float = 0.25,
        token_reduction: int = 6,
        channel_reduction: int = 2,
        basis_threshold: float = 0.02,
        coef_topk: int = 8,
        token_keep: float = 1.0,
        pruning_layers: Sequence[int] = (3, 6, 9),
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("id2label") is None:
            kwargs.setdefault("num_labels", 1000)
        super().__init__(**kwargs)
        if image_size % patch_size or not 0 < token_keep <= 1:
            raise ValueError(
                f"SparsifinerConfig: image_size {image_size}, patch_size {patch_size}, token_keep {token_keep}; "
                "patches must tile the image, token_keep lies in (0, 1]"
            )
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.mlp_ratio, self.layer_norm_eps = num_attention_heads, mlp_ratio, layer_norm_eps
        self.keep, self.token_reduction, self.channel_reduction = keep, token_reduction, channel_reduction
        self.basis_threshold, self.coef_topk = basis_threshold, coef_topk
        self.initializer_range = initializer_range
        self.token_keep, self.pruning_layers = token_keep, list(pruning_layers)

    @staticmethod
    def named(size: str, **options: Any) -> "SparsifinerConfig":
        """A DeiT by name: "deit-ti", "deit-s" or "deit-b"."""
        if size not in SIZES:
            raise ValueError(f"SparsifinerConfig: {size!r} is unknown; choose {', '.join(SIZES)}")
        width, heads = SIZES[size]
        return SparsifinerConfig(hidden_size=width, num_attention_heads=heads, **options)

    @staticmethod
    def example() -> "SparsifinerConfig":
        """A small one for tests."""
        sizes: dict[str, Any] = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2}
        return SparsifinerConfig(**sizes, num_attention_heads=4, num_labels=5, token_reduction=2, coef_topk=4)

    @property
    def num_tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def patches_after(self, layer: int) -> int:
        """Patches that are left after a layer."""
        power = sum(place <= layer for place in self.pruning_layers)
        return math.ceil(self.token_keep**power * (self.num_tokens - 1) - 1e-9)


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, config: SparsifinerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(2))
        self.attn = SparsifinerAttention(
            width,
            config.num_attention_heads,
            config.num_tokens,
            keep=config.keep,
            token_reduction=config.token_reduction,
            channel_reduction=config.channel_reduction,
            basis_threshold=config.basis_threshold,
            coef_topk=config.coef_topk,
        )
        self.mlp = _Mlp(width, int(width * config.mlp_ratio))


class _Patches(nn.Module):
    def __init__(self, config: SparsifinerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)


class SparsifinerViT(PreTrainedModel):
    """Image classifier `[b c h w]` -> logits `[b n]`. `set_mode` chooses what all layers do."""

    config_class = SparsifinerConfig
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: SparsifinerConfig) -> None:
        super().__init__(config)
        width, labels = config.hidden_size, config.num_labels
        self.patch_embed = _Patches(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, int(labels or 0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As in DeiT; predictors keep the start that their class gives them."""
        if isinstance(module, nn.Linear) and not any(
            module is part for layer in self.attentions() for part in layer.mask_predictor.children()
        ):
            nn.init.trunc_normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)
        if module is self:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def attentions(self) -> list[SparsifinerAttention]:
        """The attention of every layer."""
        return [part for part in self.modules() if isinstance(part, SparsifinerAttention)]

    def predictor_parameters(self) -> list[nn.Parameter]:
        """What the first stage trains, and the second leaves alone."""
        return [weight for layer in self.attentions() for weight in layer.mask_predictor.parameters()]

    def set_mode(self, mode: Mode) -> "SparsifinerViT":
        """ "dense" (the teacher), "predict" (first stage) or "sparse" (second stage, and in use) for every layer.

        Which parameters want a gradient follows: all in "dense", the predictors in "predict", the others in "sparse".
        """
        if mode not in ("dense", "predict", "sparse"):
            raise ValueError(f"set_mode: {mode!r}; choose dense, predict or sparse")
        for layer in self.attentions():
            layer.mode = mode
        predictors = {id(weight) for weight in self.predictor_parameters()}
        for weight in self.parameters():
            weight.requires_grad_(mode == "dense" or (id(weight) in predictors) == (mode == "predict"))
        return self

    def load_dense(self, state: Mapping[str, Tensor]) -> None:
        """Load a DeiT's state (timm's names); the predictors stay. Raises ValueError for weights that do not fit."""
        missing, unexpected = self.load_state_dict(dict(state), strict=False)
        missing = [name for name in missing if ".mask_predictor." not in name]
        if missing or unexpected:
            raise ValueError(
                f"load_dense: missing {missing[:3]}, unexpected {unexpected[:3]}; expected a DeiT's weights"
            )

    def forward_features(
        self, pixel_values: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b n"]]:
        """Tokens after the last norm, the class token first, and which tokens they are.

        Raises ValueError for images of another size than the model's.
        """
        config = self.config
        size = (config.num_channels, config.image_size, config.image_size)
        if tuple(pixel_values.shape[1:]) != size:
            raise ValueError(f"SparsifinerViT: pixel_values are {tuple(pixel_values.shape[1:])}, expected {size}")
        x = self.patch_embed.proj(pixel_values).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        for layer, block in enumerate(self.blocks):
            x, positions = self._block(block, layer, x, positions)
        return self.norm(x), positions

    def _block(self, block: Any, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        attention: SparsifinerAttention = block.attn
        keep = self.config.patches_after(layer)
        prunes = attention.mode != "predict" and keep < x.shape[1] - 1
        given = positions if x.shape[1] < self.config.num_tokens else None
        mixed, scores = attention.attend(block.norm1(x), given, scores=prunes)
        x = x + mixed
        if prunes and scores is not None:  # the pruned leave before the MLP, which acts on each token alone
            stay = scores.sort(dim=-1, descending=True, stable=True).indices[:, :keep].sort(-1).values + 1
            stay = torch.cat([torch.zeros_like(stay[:, :1]), stay], 1)
            x = x.gather(1, stay[..., None].expand(-1, -1, x.shape[-1]))
            positions = positions.gather(1, stay)
        return x + block.mlp(block.norm2(x)), positions

    def forward(
        self, pixel_values: Float[Tensor, "b c h w"], labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Logits, and the cross-entropy where labels `[b]` are given."""
        logits = self.head(self.forward_features(pixel_values)[0][:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        out = ImageClassifierOutput(loss=loss, logits=logits)
        return out.to_tuple() if return_dict is False else out

    def products(self, *, dense: bool = False, density: float | None = None) -> float:
        """Multiply-adds for one image, everything counted. dense: without both sparsities.

        density: share of the basis that is not 0, for the predictors' own products; None is as it is.
        """
        config = self.config
        n = config.num_tokens
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        total = (n - 1) * width * config.num_channels * config.patch_size**2 + width * self.head.out_features
        for layer, attention in enumerate(self.attentions()):
            after = n if dense else config.patches_after(layer) + 1
            now = n if dense or not layer else config.patches_after(layer - 1) + 1
            sparse = attention.mode == "sparse" and not dense
            found = attention_products(
                n,
                width,
                config.num_attention_heads,
                keep=config.keep,
                token_reduction=config.token_reduction,
                channel_reduction=config.channel_reduction,
                coef_topk=config.coef_topk,
                density=attention.mask_predictor.density() if sparse and density is None else density or 0.0,
                present=now,
            )
            total += found.predictor + found.sparse if sparse else found.dense
            total += 4 * now * width**2 + 2 * after * width * inner
        return float(total)


def distillation_loss(
    student: SparsifinerViT, teacher: SparsifinerViT, pixel_values: Tensor, labels: Tensor, label_smoothing: float = 0.1
) -> Float[Tensor, ""]:
    """Second stage: cross-entropy + 0.5 KL(teacher || student) + 0.5 MSE of the patch tokens after the last norm.

    Tokens that the student pruned count nowhere. The teacher is the dense model that the student started from.
    """
    tokens, positions = student.forward_features(pixel_values)
    with torch.no_grad():
        wanted, _ = teacher.forward_features(pixel_values)
        goal = teacher.head(wanted[:, 0]).log_softmax(-1)
        wanted = wanted.gather(1, positions[..., None].expand(-1, -1, wanted.shape[-1]))
    logits = student.head(tokens[:, 0])
    task = nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    apart = nn.functional.kl_div(logits.log_softmax(-1), goal, reduction="batchmean", log_target=True)
    return task + 0.5 * apart + 0.5 * nn.functional.mse_loss(tokens[:, 1:], wanted[:, 1:])
