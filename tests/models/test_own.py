"""Checkpoints of headwise's own networks are found by their type, and scanned like any model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.api import scan
from headwise.attention.neighborhood import NeighborhoodAttention
from headwise.errors import InputError, UnsupportedModel
from headwise.hf.addresses import layout, tower_kinds
from headwise.hf.load import load
from headwise.models.own import own_class
from headwise.models.saisa import SaisaConfig, SaisaForConditionalGeneration
from headwise.models.small_vit import SmallViT, SmallViTConfig


def small(**options: Any) -> SmallViT:
    torch.manual_seed(0)
    return SmallViT(SmallViTConfig(image_size=[16, 16], num_channels=3, patch_size=4, **options)).eval()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        image.effect_noise((20, 20), 60.0 + number).convert("RGB").save(folder / f"{number}.png")
    return folder


def test_a_classifier_is_loaded_and_scanned(tmp_path: Path, pictures: Path):
    model = small()
    model.save_pretrained(tmp_path / "vit")
    loaded: Any = load(str(tmp_path / "vit")).model
    assert isinstance(loaded, SmallViT)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())
    found = scan(str(tmp_path / "vit"), images=pictures, probes=["entropy", "contribution", "previous"])
    heads = found.layout.heads()
    assert len(heads) == sum(layout(model).main.heads)
    entropies = torch.tensor([found.of("entropy")[head] for head in heads])
    assert bool((entropies > 0).all()) and bool((entropies <= 1 + 1e-6).all())


def test_a_mechanism_without_rows_of_weights_still_has_outputs(tmp_path: Path, pictures: Path):
    model = small(attention="AgentAttention", attention_options={"num_agents": 4})
    found = scan(model, images=pictures, probes=["contribution"])
    assert set(found.of("contribution")) == set(layout(model).heads())
    with pytest.raises(UnsupportedModel, match="without one softmax"):
        scan(model, images=pictures, probes=["entropy"])


def test_causality_is_that_of_the_mechanism():
    assert tower_kinds(small()) == {"": "bidirectional"}
    rows = torch.nn.Sequential(NeighborhoodAttention(16, 2, 3, is_causal=True))
    assert tower_kinds(rows) == {"": "causal"} and layout(rows).main.heads == (2,)


def test_a_multimodal_network_is_loaded(tmp_path: Path):
    SaisaForConditionalGeneration(SaisaConfig.example()).save_pretrained(tmp_path)
    assert isinstance(load(str(tmp_path)).model, SaisaForConditionalGeneration)


def test_what_this_release_has_not(tmp_path: Path):
    with pytest.raises(InputError, match="Later of type headwise-later is none that this headwise release has"):
        own_class("headwise-later", "Later")
    for odd in ("headwise-", "headwise-small-vit.deep", "headwise-../davit"):
        with pytest.raises(InputError, match="is none that this headwise release has"):
            own_class(odd, "SmallViT")
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["torch"]}))
    with pytest.raises(InputError, match="torch of type headwise-small-vit"):
        load(str(tmp_path))
