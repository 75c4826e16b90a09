"""The positional transformer, and the standard one of the same form, for algorithms on numbers.

    X <- MLP([X ; attention(X)]),   a linear layer before the first block and one after the last

No residual, no norm: numbers far outside training keep their scale. A blank node stands after the tokens as scratch
paper. `attention="standard"` makes weights of the tokens, with the encodings beside the input; "rope" turns queries and
keys by position, which the official code's baseline did by head and so not at all.

Paper: headwise/papers/positional_attention.py.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from headwise.attend.point import HeadPoint
from headwise.attention.positional import PositionalAttention

__all__ = ["PositionalConfig", "PositionalOutput", "PositionalTransformer"]


class PositionalConfig(PreTrainedConfig):
    """Sizes; the defaults are the official code's for 8 numbers.

    in_dim, out_dim: features of a token. length: tokens, without the blank node. num_layers: None is
    floor(log2 length) + 1. pos_dim: width of given encodings; None is length + 1, unit vectors.
    attention: "positional", "standard" or "rope"; in the latter two each head has queries and keys as wide as the
    network, as in the official code, so they are larger.
    """

    model_type = "headwise-positional"

    def __init__(
        self,
        in_dim: int = 1,
        out_dim: int = 1,
        length: int = 8,
        hidden_size: int = 64,
        num_heads: int = 2,
        num_layers: int | None = None,
        mlp_hidden: int = 64,
        mlp_layers: int = 2,
        pos_dim: int | None = None,
        attention: str = "positional",
        **kwargs: Any,
    ) -> None:
        if attention not in ("positional", "standard", "rope"):
            raise ValueError(f"PositionalConfig: attention is {attention!r}; choose positional, standard or rope")
        if min(in_dim, out_dim, length, hidden_size, num_heads, mlp_hidden, mlp_layers) < 1:
            raise ValueError("PositionalConfig: in_dim, out_dim, length, hidden_size and the MLP's sizes are 1 or more")
        self.in_dim, self.out_dim, self.length, self.hidden_size = in_dim, out_dim, length, hidden_size
        self.num_heads, self.mlp_hidden, self.mlp_layers, self.attention = num_heads, mlp_hidden, mlp_layers, attention
        self.num_layers = length.bit_length() if num_layers is None else num_layers
        self.pos_dim = length + 1 if pos_dim is None else pos_dim
        super().__init__(**kwargs)

    @staticmethod
    def example() -> "PositionalConfig":
        return PositionalConfig(in_dim=16, length=16, hidden_size=32, num_layers=2, mlp_hidden=32)


@dataclass
class PositionalOutput(ModelOutput):
    """What every token gives, `[... n d]`, without the blank node."""

    values: Tensor | None = None


class _TokenAttention(nn.Module):
    """Attention by tokens, in plain products: a small network that is trained by vmap."""

    def __init__(self, width: int, heads: int, rope: bool) -> None:
        super().__init__()
        if width % heads or (rope and width % 2):
            raise ValueError(f"PositionalTransformer: num_heads {heads} do not divide hidden_size {width}")
        self.heads, self.rope = heads, rope
        self.qk = nn.Linear(width, 2 * width * heads)
        self.v_proj = nn.Linear(width, width)
        self.head_point = HeadPoint(heads)
        self.proj = nn.Linear(width, width)
        for layer in (self.qk, self.v_proj, self.proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k = self.qk(x).unflatten(-1, (2, self.heads, -1)).movedim(-3, 0).transpose(-2, -3).unbind(0)
        if self.rope:
            q, k = turned(q), turned(k)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        out = scores.softmax(-1) @ self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        return self.proj(self.head_point(out.transpose(-2, -3), None, self.proj).flatten(-2))


def turned(x: Float[Tensor, "... n d"], base: float = 10_000.0) -> Float[Tensor, "... n d"]:
    """Pairs of features (i, i + d / 2) turned by position times base^(-2 i / d): along tokens, the axis before last."""
    n, half = x.shape[-2], x.shape[-1] // 2
    speed = base ** -(torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angle = torch.arange(n, dtype=x.dtype, device=x.device)[:, None] * speed
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()], -1)


class _Block(nn.Module):
    def __init__(self, config: PositionalConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = (
            PositionalAttention(width, config.num_heads, config.pos_dim)
            if config.attention == "positional"
            else _TokenAttention(width, config.num_heads, config.attention == "rope")
        )
        sizes = [2 * width, *[config.mlp_hidden] * (config.mlp_layers - 1), width]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        if isinstance(self.attention, PositionalAttention):
            mixed = self.attention(x, positions, mask)
        else:
            mixed = self.attention(x, mask)
        return self.mlp(torch.cat([x, mixed], -1))


class PositionalTransformer(PreTrainedModel):
    """Maps tokens `[... n d_in]` to `[... n d_out]`, with a blank node of its own."""

    config_class = PositionalConfig
    main_input_name = "values"
    input_modalities = "text"

    def __init__(self, config: PositionalConfig) -> None:
        super().__init__(config)
        beside = 0 if config.attention == "positional" else config.pos_dim
        self.encode = nn.Linear(config.in_dim + beside, config.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.decode = nn.Linear(config.hidden_size, config.out_dim)
        self._encodings: dict[Any, Tensor] = {}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules keep the start that their class gives them."""

    def encodings(self, count: int) -> Float[Tensor, "n p"]:
        """Unit vectors of count tokens and of the blank node, which always has the last one."""
        like = self.encode.weight
        key = count, like.dtype, like.device
        if key in self._encodings:
            return self._encodings[key]
        unit = torch.eye(self.config.pos_dim, dtype=like.dtype, device=like.device)
        made = torch.cat([unit[:count], unit[-1:]])
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            # The same tensor each time, by which layers know that the weights they kept still hold.
            self._encodings[key] = made
        return made

    def forward(
        self,
        values: Float[Tensor, "*b n d"],
        positions: Float[Tensor, "m p"] | None = None,
        attention_mask: Bool[Tensor, "*b n"] | None = None,
        return_dict: bool | None = None,
    ) -> PositionalOutput | tuple[Tensor, ...]:
        """positions: encodings of all tokens and, last, of the blank node; None: unit vectors. attention_mask: True =
        real tokens of sequences of several lengths.

        Raises ValueError for another width, more tokens than unit vectors, and positions that do not fit.
        """
        count, config = values.shape[-2], self.config
        if values.shape[-1] != config.in_dim:
            raise ValueError(f"PositionalTransformer: values have width {values.shape[-1]}, expected {config.in_dim}")
        if positions is None and count >= config.pos_dim:
            raise ValueError(
                f"PositionalTransformer: {count} tokens and a blank node for pos_dim {config.pos_dim}; at most "
                f"{config.pos_dim - 1} tokens have unit vectors, give positions for more"
            )
        if positions is not None and positions.shape != (count + 1, config.pos_dim):
            raise ValueError(
                f"PositionalTransformer: positions are {tuple(positions.shape)}; expected ({count + 1}, "
                f"{config.pos_dim}): the tokens' and the blank node's"
            )
        given = self.encodings(count) if positions is None else positions
        lead = values.shape[:-2]
        x = nn.functional.pad(values.reshape(-1, count, config.in_dim), (0, 0, 0, 1))
        mask = None
        if attention_mask is not None:
            mask = nn.functional.pad(attention_mask.reshape(-1, count).bool(), (0, 1), value=True)
        if config.attention != "positional":
            x = torch.cat([x, given.expand(len(x), -1, -1)], -1)
        x = self.encode(x)
        for block in self.blocks:
            x = block(x, given, mask)
        out = self.decode(x)[:, :-1].reshape(*lead, count, config.out_dim)
        return (out,) if return_dict is False else PositionalOutput(values=out)
