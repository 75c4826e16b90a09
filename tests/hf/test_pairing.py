"""Pairs through the attention interface: any order of single and paired images, masks, and everything undone."""

from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTModel

from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules
from headwise.hf.pairing import pair_attention

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vit():
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4, initializer_range=0.3)).eval()
    model.set_attn_implementation("sdpa")
    return model


def run(model, images):
    with torch.no_grad():
        return model(images).last_hidden_state


def test_single_and_paired_images_in_one_batch(vit):
    plain, partner = run(vit, X), torch.tensor([1, 2, 0])
    with pair_attention(vit, partner):
        paired = run(vit, X)
    with pair_attention(vit, partner, single=3):
        both = run(vit, torch.cat([X, X]))
    torch.testing.assert_close(both[:3], plain)
    torch.testing.assert_close(both[3:], paired)
    assert not torch.allclose(paired, plain, atol=1e-3)
    assert torch.equal(run(vit, X), plain)


def test_padding_of_the_partner_is_hidden_too(vit):
    """Four patches and a class token: the last patch of image 1 is hidden."""
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 4] = 0
    partner = torch.tensor([1, 0, 2])
    for implementation in ("sdpa", "eager"):
        vit.set_attn_implementation(implementation)
        outs = []
        for change in (0.0, 5.0):
            images = X.clone()
            images[1, :, 4:, 4:] += change
            with torch.no_grad(), pair_attention(vit, partner):
                outs.append(vit(images, attention_mask=mask).last_hidden_state[0])
        torch.testing.assert_close(*outs)


def test_queries_and_keys_are_recorded(vit):
    vit.set_attn_implementation("eager")
    with torch.no_grad():
        maps = vit(X, output_attentions=True).attentions
    with pair_attention(vit, torch.tensor([1, 2, 0]), single=3, record=True) as seen:
        vit(torch.cat([X, X]))
    for (q, k, scale), expected in zip(seen, maps, strict=True):
        assert not q.requires_grad
        torch.testing.assert_close((q @ k.mT * scale).softmax(-1), expected)


def test_everything_is_undone_after_an_error(vit):
    modules = attention_modules(vit)
    with (
        pytest.raises(ValueError, match="partner has 2 entries for 3 paired images"),
        pair_attention(vit, torch.arange(2)),
    ):
        vit(X)
    assert not any(id(module) in dispatch._handlers for module in modules)
    assert vit.config._attn_implementation == "sdpa"


def test_pairs_within_pairs_are_refused(vit):
    with (
        pair_attention(vit, torch.arange(3)),
        pytest.raises(RuntimeError, match="already are"),
        pair_attention(vit, torch.arange(3)),
    ):
        pass
