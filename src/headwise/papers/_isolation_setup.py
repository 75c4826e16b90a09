"""What isolation_reposition_attention.py measures on: a small UNet and a small rotary transformer of diffusers.

Both are trained here by flow matching on scenes of up to five subjects. A prompt names each subject's shape, cell and
size, never its look. An image of 18 x 18 pixels is given to the networks as 9 x 9 tokens of 2 x 2 pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise.tasks.subject_consistency import SubjectScenes, draw_subjects
from headwise.training import OptimiserSpec, fit, warmup_cosine

BATCH, STEPS, RATE = 32, 600, 2e-3
TOKENS, CELLS, TEXT = 9, 9, 32
PATCH = 2
KINDS = ("unet", "rotary")
Kind = Literal["unet", "rotary"]


@dataclass(frozen=True)
class Prompts:
    """What n prompts say: `[n s]` shapes, cells and sizes; -1 is no subject."""

    shapes: Tensor
    cells: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, scenes: SubjectScenes) -> "Prompts":
        return cls(scenes.shapes, scenes.cells, scenes.sizes)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Prompts":
        return Prompts(change(self.shapes), change(self.cells), change(self.sizes))


class Painter(nn.Module):
    """A network of diffusers with an embedding of prompts: noisy tokens, times and prompts to clean tokens.

    The UNet reads one text token for each subject and, with its picture, the coordinates of each place. The rotary
    transformer reads one text token for each cell, whose rotary position is the middle of that cell.
    """

    def __init__(self, kind: Kind, text: int = TEXT) -> None:
        super().__init__()
        self.kind = kind
        self.network = _unet(text) if kind == "unet" else _rotary(text)
        self.shape, self.cell, self.size = nn.Embedding(4, text), nn.Embedding(CELLS, text), nn.Embedding(2, text)
        self.nothing = nn.Parameter(torch.randn(text))
        place = torch.linspace(-1, 1, TOKENS)
        self.register_buffer("grid", torch.stack(torch.meshgrid(place, place, indexing="ij")), persistent=False)
        self.register_buffer("ids", _ids(torch.arange(TOKENS)), persistent=False)
        self.register_buffer("words", _ids(torch.arange(1, TOKENS, 3)), persistent=False)

    def text(self, prompts: Prompts) -> Tensor:
        """`[n words text]`."""
        given = (prompts.cells >= 0)[..., None]
        cells = prompts.cells.clamp_min(0)
        token = self.shape(prompts.shapes.clamp_min(0)) + self.size(prompts.sizes)
        if self.kind == "unet":
            return torch.where(given, token + self.cell(cells), self.nothing)
        placed = F.one_hot(cells, CELLS).to(token.dtype) * given  # n s cells
        empty = 1 - placed.sum(1)
        return torch.einsum("nsc,nst->nct", placed, token) + empty[..., None] * self.nothing

    def forward(self, x: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """x: `[n 12 9 9]`. t: `[n]` from 0, a picture, to 1, noise."""
        text = self.text(prompts)
        if self.kind == "unet":
            x = torch.cat([x, self.grid.expand(len(x), -1, -1, -1)], 1)
            return self.network(x, 1000 * t, encoder_hidden_states=text).sample
        out = self.network(
            hidden_states=x.flatten(2).mT,
            encoder_hidden_states=text,
            pooled_projections=text.mean(1),
            timestep=t,
            img_ids=self.ids,
            txt_ids=self.words,
        ).sample
        return out.mT.unflatten(-1, (TOKENS, TOKENS))


def _ids(places: Tensor) -> Tensor:
    """Positions `[k * k, 3]` of a grid, as Flux numbers them."""
    return F.pad(torch.cartesian_prod(places, places).float(), (1, 0))


def _unet(text: int) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=TOKENS,
        in_channels=3 * PATCH**2 + 2,  # and the two coordinates
        out_channels=3 * PATCH**2,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text,
        attention_head_dim=4,
    )


def _rotary(text: int) -> Any:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=3 * PATCH**2,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=text,
        pooled_projection_dim=text,
        axes_dims_rope=(4, 6, 6),
    )


def to_tokens(images: Tensor) -> Tensor:
    return F.pixel_unshuffle(images, PATCH)


def to_images(tokens: Tensor) -> Tensor:
    return F.pixel_shuffle(tokens, PATCH).clamp(-1, 1)


def flow_loss(painter: Any, batch: tuple[Tensor, Prompts, Tensor, Tensor]) -> Tensor:
    """Squared error of the picture at a random time of the straight path from it to noise."""
    x, prompts, t, noise = batch
    place = t[:, None, None, None]
    return F.mse_loss(painter((1 - place) * x + place * noise, t, prompts), x)


def scene_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Prompts, Tensor, Tensor]:
    scenes = draw_subjects(BATCH, generator)
    x = to_tokens(scenes.images)
    t = torch.rand(BATCH, generator=generator)
    return x, Prompts.of(scenes), t, torch.randn(x.shape, generator=generator)


def train_painter(kind: Kind, seed: int, steps: int = STEPS, log: Any = None) -> Painter:
    torch.manual_seed(seed)
    painter = Painter(kind)
    rule, schedule = OptimiserSpec(lr=RATE, betas=(0.9, 0.99)), warmup_cosine(min(50, steps // 4))
    fit(painter, scene_batch, flow_loss, steps=steps, seed=seed, optimiser=rule, schedule=schedule, log=log)
    return painter.eval()


@torch.no_grad()
def paint(painter: Painter, prompts: Prompts, noise: Tensor, steps: int) -> Tensor:
    """Pictures `[n 3 18 18]` from noise, by Euler's steps along the straight path to what is seen as the picture."""
    x = noise
    for i in range(steps):
        clean = painter(x, torch.full((len(x),), 1 - i / steps), prompts)
        x = x + (clean - x) / (steps - i)
    return to_images(x)
