"""The recipe for re-identification: whose pictures a folder holds, the batches, training, the protocol, refusals."""

import json
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image

from headwise.cli import run
from headwise.errors import InputError
from headwise.models.dual_cross_attention import DualCrossAttention
from headwise.recipes._pictures import InMemory
from headwise.recipes.reidentification import (
    IdentitySampler,
    IdentitySet,
    SeenBy,
    load_identities,
    train_reidentification,
)

SIZE = (24, 12)
NETWORK = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def picture(folder, name, colour=(120, 60, 20)):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 32), colour).save(folder / name)


@pytest.fixture
def market(tmp_path):
    """Two people to train on, two others to find, a distractor and junk."""
    for identity in ("0002", "0007"):
        for place in range(3):
            picture(tmp_path / "bounding_box_train", f"{identity}_c{place + 1}s1_00045{place}_00.jpg")
    picture(tmp_path / "bounding_box_train", "-1_c1s1_000401_03.jpg")
    for part in ("query", "bounding_box_test"):
        for camera in (1, 2):
            picture(tmp_path / part, f"0001_c{camera}s1_00105{camera}_00.jpg", (255, 0, 0))
            picture(tmp_path / part, f"1501_c{camera}s3_00205{camera}_00.jpg", (0, 0, 255))
    picture(tmp_path / "bounding_box_test", "0000_c3s1_000001_02.jpg", (0, 20, 254))
    picture(tmp_path / "bounding_box_test", "-1_c4s1_000002_04.jpg", (0, 0, 255))
    (tmp_path / "bounding_box_test" / "Thumbs.db").write_text("")
    return tmp_path


def test_a_folder_named_as_market_1501(market):
    data = load_identities(str(market), size=SIZE)
    assert data.people == 2 and data.identities == (0, 0, 0, 1, 1, 1) and len(data.train) == 6  # junk is not learned
    assert set(data.query.identities) == {1, 1501} and set(data.query.cameras) == {0, 1}
    assert Counter(data.gallery.identities) == {1: 2, 1501: 2, 0: 1, -1: 1}
    item = data.train[5]
    assert item["pixel_values"].shape == (3, *SIZE) and item["labels"] == 1
    assert load_identities(str(market)).size == (3, 256, 128)


def test_a_folder_laid_out_as_veri_776(market):
    for old, new in (
        ("bounding_box_train", "image_train"),
        ("query", "image_query"),
        ("bounding_box_test", "image_test"),
    ):
        (market / old).rename(market / new)
    assert load_identities(str(market), size=SIZE).people == 2


def test_distractors_count_as_wrong_and_junk_not_at_all(market):
    """Colours find everybody at once; a distractor that looks more like one person than himself comes first."""
    data = load_identities(str(market), size=SIZE)

    def scores(data):
        from headwise.recipes.reidentification import _scores

        means = [
            torch.stack([part.images[i]["pixel_values"].mean((1, 2)) for i in range(len(part.identities))])
            for part in (data.query, data.gallery)
        ]
        return _scores(data, *means)

    found = scores(data)
    assert found["queries"] == 4
    assert found["mAP"] == 1  # the distractor is a shade away from blue; junk is as blue as can be
    picture(market / "bounding_box_test", "1501_c2s3_002052_00.jpg", (0, 90, 200))  # now further than the distractor
    less = scores(load_identities(str(market), size=SIZE))
    assert less["rank-1"] == 0.75 and less["mAP"] == pytest.approx((3 + 1 / 2) / 4)


def test_drawn_people_are_asked_for_once_by_each_camera():
    data = people()
    assert data.people == 48 and len(data.query.identities) == len(data.gallery.identities) == 48 * 4
    asked = Counter(zip(data.query.identities, data.query.cameras, strict=True))
    assert set(asked.values()) == {1} and len(asked) == 192


def test_batches_hold_some_images_of_each_of_some_identities():
    identities = [index % 5 for index in range(40)] + [5]  # the last has one image
    sampler = IdentitySampler(identities, batch=8, images=4, seed=3)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 40
    seen: Counter[int] = Counter()
    for start in range(0, 40, 8):
        counts = Counter(identities[index] for index in drawn[start : start + 8])
        assert set(counts.values()) == {4} and len(counts) == 2
        seen.update(counts.keys())
        own = [index for index in drawn[start : start + 8] if identities[index] != 5]
        assert len(set(own)) == len(own)  # no image twice where there are enough
    assert set(seen) == set(range(6)) and max(seen.values()) <= 2
    assert list(sampler) != drawn  # the next pass is another
    assert list(IdentitySampler(identities, batch=8, images=4, seed=3)) == drawn
    for wrong in ({"batch": 10}, {"batch": 4}, {"batch": 32}, {"batch": 8, "images": 0}):
        with pytest.raises(ValueError, match="IdentitySampler: batch"):
            IdentitySampler(identities, **{"images": 4, **wrong})


@cache
def people() -> IdentitySet:
    return load_identities("people")


def few(count: int) -> IdentitySet:
    """The first drawn people alone, in training and in testing."""
    data = people()

    def part(images, identities: tuple[int, ...], cameras: tuple[int, ...]) -> SeenBy:
        kept = [index for index, identity in enumerate(identities) if identity < count]
        whose = tuple(identities[index] for index in kept)
        return SeenBy(InMemory(images.images[kept], torch.tensor(whose)), whose, tuple(cameras[i] for i in kept))

    train = part(data.train, data.identities, data.identities)
    query, gallery = (part(one.images, one.identities, one.cameras) for one in (data.query, data.gallery))
    return IdentitySet("few", train.images, train.identities, query, gallery, data.size)


def test_training_finds_better_and_is_written(tmp_path):
    data = few(12)
    start, after = (
        train_reidentification(data, steps=steps, batch=16, out=tmp_path, network=NETWORK, seed=1) for steps in (1, 90)
    )
    assert after.metrics["mAP"] > start.metrics["mAP"] + 0.05
    again = DualCrossAttention.from_pretrained(tmp_path).eval()
    images = torch.stack([data.query.images[index]["pixel_values"] for index in range(3)])
    torch.testing.assert_close(again(images).features, after.model(images).features)
    assert again.config.objective == "reidentification" and again.config.local_ratio == 0.3


def test_without_the_method_the_network_is_the_backbone_alone():
    data = few(8)
    plain, dual = (train_reidentification(data, dual=dual, steps=2, batch=8, network=NETWORK) for dual in (False, True))
    assert plain.metrics == plain.alone
    assert plain.model.loss_weights is None and not plain.model.config.pwca
    assert dual.model(torch.rand(2, 3, *SIZE)).features.shape == (2, 32)
    added = [one for name, one in dual.model.named_parameters() if name.startswith(("local_blocks", "local_norm"))]
    block = sum(one.numel() for one in added)
    classifier = 16 * 8 + 8
    assert dual.parameters - plain.parameters == block + classifier + 3  # and a weight for each loss


def test_the_same_seed_gives_the_same_network():
    data = few(8)
    one, two = (train_reidentification(data, steps=3, batch=8, network=NETWORK, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_a_checkpoint_of_another_size_with_its_own_scale(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes: dict[str, Any] = {"intermediate_size": 32, "image_size": 16, "patch_size": 4, **NETWORK}
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3, size={"height": 16, "width": 16}).save_pretrained(
        tmp_path
    )
    seen = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0]) if type(module).__name__ == "ViTPatchEmbeddings" else None
    )
    data = few(8)
    try:
        found = train_reidentification(data, backbone=str(tmp_path), steps=1, batch=8)
    finally:
        handle.remove()
    assert found.model.config.backbone_config.image_size == 16
    asked = torch.stack([data.query.images[index]["pixel_values"] for index in range(32)])
    # The network, whose own images are 16 x 16, read the queries as they are, at the checkpoint's scale.
    assert any(one.shape == asked.shape and torch.allclose(one, (asked - 0.5) / 0.25) for one in seen)
    with pytest.raises(InputError, match="sizes hidden_size are given beside the checkpoint"):
        train_reidentification(data, backbone=str(tmp_path), network={"hidden_size": 8})


def test_what_holds_no_identities_is_refused(tmp_path, market):
    with pytest.raises(InputError, match="is no folder; expected people"):
        load_identities(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="has no bounding_box_train, query, bounding_box_test"):
        load_identities(str(market / "query"))
    with pytest.raises(InputError, match="leave out 64x32"):
        load_identities("people", size=(64, 32))
    for path in (market / "bounding_box_train").glob("0007*"):
        path.unlink()
    with pytest.raises(InputError, match="holds 1 identities"):
        load_identities(str(market))


def test_the_command(tmp_path, monkeypatch, capsys, market):
    monkeypatch.chdir(tmp_path)
    asked = ["train", "reidentification", "--steps", "1", "--out", "o"]
    assert run([*asked, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["data"] == "people" and set(said["metrics"]) == {"DCAL", "baseline"}
    assert 0 < said["metrics"]["DCAL"]["mAP"] < 1 and said["metrics"]["DCAL"]["queries"] == 192
    assert said["metrics"]["baseline"]["parameters"] < said["metrics"]["DCAL"]["parameters"]
    assert {path.parent.name for path in (tmp_path / "o").rglob("model.safetensors")} == {"o", "baseline"}
    wrong = {
        "none": "none is no folder",
        "people --size 64x": "size: '64x'; expected height x width",
        "people --size 64": "leave out 64x64",
        "people --attention csa": "--attention is not an option of reidentification",
        "people --backbone none/": "there is no folder none/",
        f"{market} --size 24x12": "expected a multiple of it with 2 to 2 identities",
    }
    for arguments, message in wrong.items():
        assert run([*asked, "--data", *arguments.split()]) == 2
        shown = capsys.readouterr()
        assert message in shown.err and shown.err.count("headwise: ") == 1 and not shown.out
