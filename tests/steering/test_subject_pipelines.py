"""SubjectAttention on whole pipelines of diffusers with tiny random weights, called as a user calls them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headwise.steering import SubjectAttention

diffusers = pytest.importorskip("diffusers", reason="extra diffusion: diffusers is not installed")

SIDE, TEXT, WIDTH = 8, 3, 32
LAID = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
LAID[0, :4, :4], LAID[1, 4:, 4:] = True, True
ELSEWHERE = LAID.flip(-1)
STEPS = 3


def shaken(module: nn.Module) -> Any:
    """Weights without the zeros that hide what attention does."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else 0.0
        parameter.data = mean + 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def decoder() -> Any:
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def unet(**more: Any) -> Any:
    return shaken(
        diffusers.UNet2DConditionModel(
            sample_size=SIDE, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
            norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH, attention_head_dim=4, **more,
        )
    )  # fmt: skip


def stable_diffusion() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=decoder(), text_encoder=None, tokenizer=None, unet=unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> Any:
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=decoder(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=network,
        scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def pixart() -> Any:
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=SIDE,
        patch_size=2, cross_attention_dim=16, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=decoder(), transformer=shaken(network),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    )  # fmt: skip


def flux() -> Any:
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=decoder(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=shaken(network),
    )  # fmt: skip


PIPELINES = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "pixart": pixart, "flux": flux}


def words(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, TEXT, WIDTH, generator=torch.Generator().manual_seed(seed))


def generate(pipe: Any) -> Tensor:
    """Latents of two references and the target after a few steps, with guidance where the pipeline has any."""
    pipe.set_progress_bar_config(disable=True)
    said, unsaid = words(3, 1), words(3, 2)
    given: dict[str, Any] = {"prompt_embeds": said}
    if isinstance(pipe, diffusers.FluxPipeline):
        given["pooled_prompt_embeds"] = said[:, 0]
        size = 2 * SIDE  # this pipeline packs 2 x 2 latents into a token
    else:
        given["negative_prompt_embeds"], size = unsaid, SIDE
    if isinstance(pipe, diffusers.StableDiffusionXLPipeline):
        given |= {"pooled_prompt_embeds": said[:, 0], "negative_pooled_prompt_embeds": unsaid[:, 0]}
    if isinstance(pipe, diffusers.PixArtAlphaPipeline):
        whole = torch.ones(3, TEXT)
        given |= {"prompt_attention_mask": whole, "negative_prompt_attention_mask": whole}
        given |= {"negative_prompt": None, "use_resolution_binning": False}
    return pipe(
        **given, height=size, width=size, num_inference_steps=STEPS, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler scheduler
@pytest.mark.parametrize("kind", PIPELINES)
def test_the_target_follows_its_references_and_they_stay_as_they_were(kind: str):
    pipe = PIPELINES[kind]()
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    before = {name: type(each) for name, each in network.attn_processors.items()}
    plain = generate(pipe)
    with SubjectAttention(pipe, LAID, ELSEWHERE, start_layer=0) as handle:
        steered = generate(pipe)
        assert handle.step == STEPS - 1, "steps are counted as the pipeline takes them"
        assert torch.equal(generate(pipe), steered), "a second picture begins anew"
    torch.testing.assert_close(steered[:2], plain[:2], atol=2e-3, rtol=1e-3)
    assert torch.isfinite(steered).all()
    assert (steered[2] - plain[2]).abs().max() > 10 * (steered[:2] - plain[:2]).abs().max()
    assert torch.equal(generate(pipe), plain)
    assert {name: type(each) for name, each in network.attn_processors.items()} == before


def test_one_prompt_too_few_is_refused_before_anything_is_drawn():
    pipe = stable_diffusion()
    masks = LAID[:1].repeat(3, 1, 1)
    with (
        SubjectAttention(pipe, masks, masks, overlap="later"),
        pytest.raises(ValueError, match="batch is 6; expected 4"),
    ):
        generate(pipe)
    assert torch.isfinite(generate(pipe)).all()
