"""SmallViT: sizes, the choice of attention, what is refused. Saving, loading and batches are the contract's."""

import pytest
import torch

import headwise as hw
from headwise.attend import Ablate
from headwise.models import SmallViT, SmallViTConfig


def test_attention_is_chosen_by_the_name_of_its_class():
    model = SmallViT(SmallViTConfig(attention=["SoftmaxAttention", "ReluAttention"]))
    assert [type(block.attn).__name__ for block in model.blocks] == ["SoftmaxAttention", "ReluAttention"]
    model = SmallViT(SmallViTConfig(attention_options={"num_kv_heads": 2}))
    assert model.blocks[0].attn.qkv.out_features == 32 + 2 * 8


def test_options_may_differ_from_layer_to_layer():
    model = SmallViT(SmallViTConfig(attention_options=[None, {"num_kv_heads": 2}]))
    assert [block.attn.num_kv_heads for block in model.blocks] == [8, 2]


def test_grids_may_be_rectangular():
    model = SmallViT(SmallViTConfig(image_size=[8, 12], patch_size=[2, 4], num_labels=3))
    assert model.config.grid_size == (4, 3)
    assert model(torch.randn(2, 1, 8, 12)).logits.shape == (2, 3)


def test_heads_are_edited():
    model, x = SmallViT(SmallViTConfig()).eval(), torch.randn(2, 1, 8, 8)
    plain = model(x).logits
    with hw.steer(model, Ablate(heads="1.0", mode="zero")):
        assert not torch.allclose(model(x).logits, plain)
    assert torch.equal(model(x).logits, plain)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "Softmax"}, "'Softmax'"),
        ({"attention": ["SoftmaxAttention"]}, "names 1 layers"),
        ({"attention_options": [{}, {}, {}]}, "attention_options has 3 layers"),
        ({"patch_size": 3}, "3x3 does not divide"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SmallViT(SmallViTConfig(**options))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 9, 8\), expected \(1, 8, 8\)"):
        SmallViT(SmallViTConfig())(torch.randn(1, 1, 9, 8))
