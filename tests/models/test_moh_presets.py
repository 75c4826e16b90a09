"""The paper's head counts: the percentage in each name is what they come to, and every split can be built."""

import pytest

from headwise.attention.mixture_of_head import LearnedRouter, QueryNormRouter
from headwise.models.moh_presets import MOH_PRESETS, activated_heads


@pytest.mark.parametrize("name", MOH_PRESETS)
def test_the_name_says_how_many_heads_are_active(name):
    assert round(100 * activated_heads(MOH_PRESETS[name])) == int(name.rsplit("-", 1)[1])


def test_it_is_no_mean_over_layers():
    layers = MOH_PRESETS["moh-vit-b-75"]
    assert sum(split.active for split in layers) / len(layers) == pytest.approx(0.803, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "layers", "heads"),
    [("moh-vit-b-50", 38, 588), ("moh-vit-s-80", 37, 429), ("moh-dit-xl-90", 28, 448), ("moh-llama3-8b-75", 32, 1024)],
)
def test_layers_and_heads(name, layers, heads):
    splits = MOH_PRESETS[name]
    assert len(splits) == layers and sum(split.heads for split in splits) == heads
    router = QueryNormRouter if "llama" in name else lambda *split: LearnedRouter(8, *split)
    for split in set(splits):
        assert router(*split).split == split
