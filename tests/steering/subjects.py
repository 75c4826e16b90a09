"""Tiny random networks of diffusers: a UNet with text, a DiT and a Flux transformer; and masks for them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="extra diffusion: diffusers is not installed")

SIDE = 8
KINDS = ("unet", "dit", "flux")
EXACT: dict[str, Any] = {"mask_dropout": 0.0, "start_layer": 0}


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, attention_head_dim=4,
    ).eval()  # fmt: skip


def dit() -> Any:
    torch.manual_seed(0)
    made = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, norm_num_groups=4,
        sample_size=SIDE, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    for parameter in made.parameters():  # gates of 0 would hide what attention does
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


def flux() -> Any:
    torch.manual_seed(0)
    made = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    for name, parameter in made.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm_" in name and parameter.ndim == 1 else 0.0, std=0.2)
    return made.eval()


NETWORKS = {"unet": unet, "dit": dit, "flux": flux}
TEXT = 3


@torch.no_grad()
def run(network: Any, batch: int, time: float = 500.0, seed: int = 1, states: Tensor | None = None) -> Tensor:
    """One call with another picture in each place of the batch; what it says, `[batch, channels, rows, columns]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, SIDE, SIDE, generator=generator) if states is None else states
    words = torch.randn(batch, TEXT, 32, generator=generator)
    if isinstance(network, diffusers.UNet2DConditionModel):
        return network(x, time, encoder_hidden_states=words[..., :24]).sample
    if isinstance(network, diffusers.DiTTransformer2DModel):
        times = torch.full((batch,), int(time))
        return network(x, timestep=times, class_labels=torch.arange(batch) % 10).sample
    ids = torch.zeros(SIDE**2, 3)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    out = network(
        hidden_states=x.flatten(2).mT, encoder_hidden_states=words, pooled_projections=words[:, 0],
        timestep=torch.full((batch,), time / 1000), img_ids=ids, txt_ids=torch.zeros(TEXT, 3),
    ).sample  # fmt: skip
    return out.mT.unflatten(-1, (SIDE, SIDE))


def masks(*corners: tuple[int, int, int, int], side: int = SIDE) -> Tensor:
    made = torch.zeros(len(corners), side, side, dtype=torch.bool)
    for i, (top, bottom, left, right) in enumerate(corners):
        made[i, top : bottom + 1, left : right + 1] = True
    return made


TWO = masks((0, 3, 0, 3), (4, 7, 4, 7))
ELSEWHERE = masks((4, 7, 0, 3), (0, 3, 4, 7))


def processors(network: Any) -> dict[str, Any]:
    return {name: module.processor for name, module in network.named_modules() if hasattr(module, "set_processor")}
