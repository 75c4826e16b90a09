"""Agent-DeiT: a DeiT whose first layers, or all, attend through agents.

Modules have the names of the official code, so that its state dicts load as they are.

Paper: headwise/papers/agent_attention.py (Han et al., ECCV 2024).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from headwise.attention.agent import AgentAttention
from headwise.attention.softmax import SoftmaxAttention

__all__ = ["AgentDeiT", "AgentDeiTConfig", "agent_deit_state"]

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "drop_path_rate": 0.0},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "drop_path_rate": 0.1},
    "base": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_agents": 81,
        "num_agent_layers": 4,
        "drop_path_rate": 0.3,
    },
}


class AgentDeiTConfig(PreTrainedConfig):
    """Sizes; the defaults are Agent-DeiT-T's, `preset` gives the paper's three.

    image_size, patch_size: pixels of a square. num_agents: a square number. num_agent_layers: so many layers from the
    first on have agents, the others softmax; None is all. num_labels: classes, 1,000 unless given. distilled: a second
    prefix token and head, as DeiT's.
    drop_path_rate: share of samples that skip the last layer's branches in training; the first layer's is 0.
    """

    model_type = "headwise-agent-deit"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_size: int = 192,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 3,
        mlp_ratio: float = 4.0,
        num_agents: int = 49,
        num_agent_layers: int | None = None,
        distilled: bool = False,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("id2label") is None:  # a saved config has the classes by name
            kwargs.setdefault("num_labels", 1000)
        super().__init__(**kwargs)
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.mlp_ratio, self.qkv_bias = num_attention_heads, mlp_ratio, qkv_bias
        self.num_agents, self.num_agent_layers, self.distilled = num_agents, num_agent_layers, distilled
        self.attention_dropout, self.hidden_dropout = attention_dropout, hidden_dropout
        self.drop_path_rate = drop_path_rate

    @classmethod
    def preset(cls, size: Literal["tiny", "small", "base"], **changes: Any) -> "AgentDeiTConfig":
        """Agent-DeiT-T, -S or -B as the official configs have them: B has 81 agents, in its first four layers only."""
        if size not in PRESETS:
            raise ValueError(f"AgentDeiTConfig.preset: {size!r}; choose {', '.join(PRESETS)}")
        return cls(**{**PRESETS[size], **changes})

    @classmethod
    def example(cls) -> "AgentDeiTConfig":
        """A small one."""
        return cls(
            image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_agents=4,
            num_agent_layers=1, num_labels=5, distilled=True,
        )  # fmt: skip

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(f"AgentDeiT: patch_size {self.patch_size} does not divide image_size {self.image_size}")
        return self.image_size // self.patch_size, self.image_size // self.patch_size


class _PatchEmbed(nn.Module):
    def __init__(self, config: AgentDeiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)


class _Mlp(nn.Module):
    def __init__(self, config: AgentDeiTConfig) -> None:
        super().__init__()
        hidden = int(config.hidden_size * config.mlp_ratio)
        self.fc1, self.fc2 = nn.Linear(config.hidden_size, hidden), nn.Linear(hidden, config.hidden_size)
        self.drop = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        return self.drop(self.fc2(self.drop(nn.functional.gelu(self.fc1(x)))))


class _Block(nn.Module):
    def __init__(self, config: AgentDeiTConfig, layer: int) -> None:
        super().__init__()
        width, heads, count = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        shared: dict[str, Any] = {"qkv_bias": config.qkv_bias, "dropout": config.attention_dropout}
        if config.num_agent_layers is None or layer < config.num_agent_layers:
            self.attn = AgentAttention(
                width,
                heads,
                config.num_agents,
                grid_size=config.grid_size,
                num_prefix_tokens=2 if config.distilled else 1,
                **shared,
            )
        else:
            self.attn = SoftmaxAttention(width, heads, **shared)
        self.mlp = _Mlp(config)
        self.drop = nn.Dropout(config.hidden_dropout)
        self.skipped = config.drop_path_rate * layer / max(1, count - 1)

    def _branch(self, x: Tensor) -> Tensor:
        if not self.training or not self.skipped:
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.skipped
        return x * kept.to(x.dtype) / (1 - self.skipped)

    def forward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        x = x + self._branch(self.drop(self.attn(self.norm1(x))))
        return x + self._branch(self.mlp(self.norm2(x)))


class AgentDeiT(PreTrainedModel):
    """Image classifier `[b c h w]` -> logits `[b n]`. Its heads can be probed and edited.

    A checkpoint of another resolution loads through `agent_deit_state(state, config)`, which fits its tables.
    With distillation the logits are the mean of both heads (in training those of the class token alone; the other
    head's are `distillation_logits`).
    """

    config_class = AgentDeiTConfig
    config: Any
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: AgentDeiTConfig) -> None:
        super().__init__(config)
        width, (rows, columns) = config.hidden_size, config.grid_size
        self.patch_embed = _PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width)) if config.distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns + (2 if config.distilled else 1), width))
        self.pos_drop = nn.Dropout(config.hidden_dropout)
        self.blocks = nn.ModuleList(_Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        labels: Any = config.num_labels
        self.head = nn.Linear(width, labels)
        self.head_dist = nn.Linear(width, labels) if config.distilled else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal of std 0.02 and zero biases for linear layers and tokens; convolutions keep torch's own."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif module is self:
            for token in (self.cls_token, self.pos_embed, self.dist_token):
                if token is not None:
                    nn.init.trunc_normal_(token, std=0.02)

    def forward_features(self, pixel_values: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        """Tokens after the last norm: class, distillation where there is one, then the patches in rows.

        Raises ValueError for images of another size than the model's.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (self.config.num_channels, size, size):
            raise ValueError(
                f"AgentDeiT: pixel_values are {tuple(pixel_values.shape[1:])}, expected "
                f"({self.config.num_channels}, {size}, {size})"
            )
        x = self.patch_embed.proj(pixel_values).flatten(2).mT
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        x = self.pos_drop(torch.cat([*prefix, x], 1) + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def distillation_logits(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b n"]:
        """Logits of the distillation token, from `forward_features`. Raises ValueError for a model without one."""
        if self.head_dist is None:
            raise ValueError("AgentDeiT.distillation_logits: config.distilled is False")
        return self.head_dist(tokens[:, 1])

    def forward(
        self, pixel_values: Float[Tensor, "b c h w"], labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Logits, and the cross-entropy where labels `[b]` are given."""
        tokens = self.forward_features(pixel_values)
        logits = self.head(tokens[:, 0])
        if self.head_dist is not None and not self.training:
            logits = (logits + self.distillation_logits(tokens)) / 2
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        out = ImageClassifierOutput(loss=loss, logits=logits)
        return out.to_tuple() if return_dict is False else out


def agent_deit_state(state: Mapping[str, Any], config: AgentDeiTConfig) -> dict[str, Tensor]:
    """An official state dict as `AgentDeiT(config).load_state_dict` takes it, its tables fitted to the config's grid.

    state: the tensors, or what holds them under "model" or "state_dict"; a prefix "module." is dropped.
    Raises ValueError for position embeddings of another number of prefix tokens.
    """
    for holder in ("model", "state_dict"):
        state = state.get(holder, state)
    found = {name.removeprefix("module."): value for name, value in state.items()}
    rows, columns = config.grid_size
    made = {}
    for name, value in found.items():
        last = name.rsplit(".", 1)[-1]
        if last == "pos_embed":
            value = _resize_positions(value, (rows, columns), 2 if config.distilled else 1)
        elif last in ("ah_bias", "aw_bias"):
            size = (rows, 1) if last == "ah_bias" else (1, columns)
            value = _resize(value[0], size)[None]
        elif last in ("ha_bias", "wa_bias"):
            size = (rows, 1) if last == "ha_bias" else (1, columns)
            value = _resize(value[0].permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)[None].contiguous()
        made[name] = value
    return made


def _resize(table: Tensor, size: tuple[int, int]) -> Tensor:
    return table if table.shape[2:] == size else nn.functional.interpolate(table, size, mode="bilinear")


def _resize_positions(table: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    side = round((table.shape[1] - prefix) ** 0.5)
    if side * side + prefix != table.shape[1]:
        raise ValueError(
            f"agent_deit_state: pos_embed has {table.shape[1]} places, which are not {prefix} prefix tokens and a "
            "square grid; is config.distilled right?"
        )
    picture = table[:, prefix:].mT.unflatten(-1, (side, side))
    return torch.cat([table[:, :prefix], _resize(picture, grid).flatten(2).mT], 1)
