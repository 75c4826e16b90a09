"""The recipe for segmentation: scenes, folders of masks, a short training, equal parameters, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from headwise.cli import run
from headwise.errors import InputError
from headwise.models.segmenter import BACKBONES, Segmenter, SegmenterConfig
from headwise.recipes.backbones import sized_backbone
from headwise.recipes.segmentation import compare_backbones, load_masks, train_segmenter
from headwise.tasks.scenes import object_scenes
from headwise.tasks.segmentation import class_scores, class_table

TINY = {"depths": [1], "hidden_sizes": [16], "num_heads": [2], "window_size": 4, "drop_path_rate": 0.0}


def write_pair(root, name, labels, image=None, palette=False):
    """Class k is painted in one colour of its own."""
    labels = np.asarray(labels, dtype=np.uint8)
    colours = np.array([[20, 20, 20], [220, 30, 30], [30, 60, 220]], dtype=np.uint8)
    image = colours[np.minimum(labels, 2)] if image is None else image
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / "images" / f"{name}.png")
    mask = Image.fromarray(labels)
    if palette:
        mask = mask.convert("P")
        mask.putdata(labels.flatten().tolist())
        mask.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255] + [99] * 759)
    mask.save(root / "masks" / f"{name}.png")


@pytest.fixture
def folder(tmp_path):
    for index in range(10):
        labels = np.zeros((16, 16))
        labels[4 * (index % 2) : 8 + 4 * (index % 2), 4:12] = 1 + index % 2
        labels[15] = 255
        write_pair(tmp_path, str(index), labels, palette=index % 3 == 0)
    return tmp_path


def test_classes_of_scenes_are_shapes():
    data = load_masks("scenes", train=6, size=32, seed=3)
    assert data.classes[:3] == ("background", "disc", "square") and (len(data.train), len(data.test)) == (6, 3)
    made = object_scenes(9, size=32, seed=3)
    for index in range(9):
        item = data.train[index] if index < 6 else data.test[index - 6]
        assert torch.equal(item["pixel_values"], made.image[index, 0])
        for place in range(5):
            here = item["labels"][made.labels[index, 0] == place]
            assert (here == (0 if place == 0 else 1 + int(made.shape[index, place - 1]))).all()


def test_a_folder_of_masks_is_learned(folder, tmp_path, capsys):
    data = load_masks(str(folder), size=16)
    assert data.classes == ("0", "1", "2") and (len(data.train), len(data.test)) == (8, 2)
    assert (data.train[0]["labels"][15] == 255).all() and data.train[0]["pixel_values"].shape == (3, 16, 16)
    found = train_segmenter(
        data, backbone_config=TINY, steps=80, batch=8, learning_rate=1e-2, weight_decay=0.0, out=tmp_path / "out"
    )
    assert found.pixel_accuracy > 0.85 and found.miou > 0.6
    assert capsys.readouterr().out == ""
    again = Segmenter.from_pretrained(tmp_path / "out").eval()
    table = torch.zeros(3, 3, dtype=torch.long)
    for item in (data.test[index] for index in range(2)):
        table = table + class_table(item["labels"], again(item["pixel_values"][None]).logits.argmax(1)[0], 3)
    scores = class_scores(table)
    assert (scores.miou, scores.pixel_accuracy) == (found.miou, found.pixel_accuracy)
    assert list(found.iou.values()) == pytest.approx(list(scores.iou), nan_ok=True)


def test_parts_and_names_of_a_folder(folder):
    for part in ("train", "val"):
        for name in ("0", "1", "2")[: 2 if part == "train" else 1]:
            write_pair(folder / part, name, np.ones((8, 8)))
    (folder / "classes.txt").write_text("ground\nred\n\nblue\nsky\n")
    data = load_masks(str(folder), size=8)
    assert (len(data.train), len(data.test)) == (2, 1) and data.classes == ("ground", "red", "blue", "sky")
    (folder / "classes.txt").unlink()
    assert load_masks(str(folder), size=8, classes=5).classes == ("0", "1", "2", "3", "4")


def built(name, sizes):
    return Segmenter(SegmenterConfig(name, sizes, num_labels=8))


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_about_equal_size(name):
    for wanted in (60_000, 150_000):
        sizes = sized_backbone(name, lambda own: built(name, own), size=32, parameters=wanted)
        off = sum(p.numel() for p in built(name, sizes).parameters()) / wanted - 1
        assert abs(off) <= (0.1 if "resnet" in name else 0.01), f"{wanted}: {off:+.3f}"


def test_a_comparison_has_a_row_for_each():
    data = load_masks("scenes", train=8, size=16)
    rows = compare_backbones(data, ["davit", "small-vit"], parameters=40_000, seeds=(0, 1), steps=2, batch=4)
    assert [row["backbone"] for row in rows] == ["davit", "small-vit"]
    for row in rows:
        assert row["miou"] == pytest.approx(sum(row["runs"]["miou"]) / 2) and abs(row["parameters"] / 40_000 - 1) < 0.01
        assert row["flops"] > 0 and len(row["runs"]["pixel_accuracy"]) == 2


def test_the_same_seed_gives_the_same_network():
    data = load_masks("scenes", train=8, size=16)
    one, two = (train_segmenter(data, parameters=40_000, steps=2, batch=4, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="the model has 8 classes, other has 3"):
        train_segmenter(
            type(data)("other", data.train, data.test, ("a", "b", "c"), 16),
            model=one.model,
        )


def test_bad_folders_are_refused(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")

    def refused(root, message, **options):
        with pytest.raises(InputError, match=message) as error:
            data = load_masks(str(root), size=16, **options)
            [part[index] for part in (data.train, data.test) for index in range(len(part))]
        assert "\n" not in str(error.value)

    refused(other / "none", "is no folder; expected scenes")
    refused(other, "has no folder images")
    (other / "images").mkdir()
    refused(other, "has no folder masks")
    (other / "masks").mkdir()
    refused(other, "holds no pictures")
    write_pair(other, "0", np.ones((8, 8)))
    refused(other, "holds 1 image with a mask")
    write_pair(other, "1", np.zeros((8, 8)), image=np.zeros((8, 9, 3), dtype=np.uint8))
    refused(other, r"1\.png is 8 x 8 pixels, its image 9 x 8")
    Image.new("RGB", (9, 8)).save(other / "masks" / "1.png")
    refused(other, r"1\.png has the colours RGB")
    (other / "masks" / "1.png").unlink()
    refused(other, r"1\.png has no mask; expected .*masks/1\.png")
    (other / "masks" / "1.png").write_text("no picture")
    refused(other, r"1\.png cannot be read")

    refused(folder, r"holds the label 2; there are 2 classes, 0 to 1, and 255", classes=2)
    refused(folder, "expected 2 to 255 labels", classes=300)
    (folder / "classes.txt").write_text("ground\nred\n")
    refused(folder, "holds the label 2; there are 2 classes")
    refused(folder, "3 was given, but .*classes.txt names 2", classes=3)
    (folder / "classes.txt").write_text("ground\nground\n")
    refused(folder, "names 2 classes; expected two or more, each once")
    with pytest.raises(InputError, match="scenes have 8"):
        load_masks("scenes", classes=3)


def test_budgets_out_of_reach_are_refused():
    def build(sizes):
        return built("davit", sizes)

    with pytest.raises(ValueError, match="the nearest davit to 100 parameters has"):
        sized_backbone("davit", build, size=16, parameters=100)
    with pytest.raises(ValueError, match="images are 20 pixels wide"):
        sized_backbone("davit", build, size=20, parameters=10_000)
    with pytest.raises(ValueError, match="backbone is 'vgg'"):
        sized_backbone("vgg", build, size=16, parameters=10_000)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "segmentation", "--data", str(folder), "--size", "16", "--steps", "2", "--parameters", "40000"]
    assert run([*words, "--backbone", "neighborhood", "--out", "o", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["backbone"] == "neighborhood" and set(said["metrics"]["iou"]) == {"0", "1", "2"}
    assert run([*words[:8], "--from", "o", "--out", "more", "--json"]) == 0
    capsys.readouterr()
    assert run([*words, "--compare", "--backbone", "davit,swin", "--seeds", "1", "--out", "t", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["backbone"] for row in said["rows"]] == ["davit", "swin"] and said["seeds"] == [0]
    stored = json.loads((tmp_path / "t" / "segmentation-table.json").read_text())
    assert stored["rows"] == said["rows"] and "--backbone davit,swin" in stored["command"]

    (folder / "empty" / "images").mkdir(parents=True)
    (folder / "empty" / "masks").mkdir()
    for words, message in [
        (["--backbone", "davitt"], "backbone: 'davitt' is unknown; there are davit"),
        (["--data", str(folder / "empty")], "holds no pictures"),
        (["--data", str(folder), "--classes", "2", "--steps", "2", "--size", "16"], "holds the label 2"),
        (["--data", "scene"], "scene is no folder; expected scenes"),
        (["--from", "o", "--parameters", "1000"], "--parameters is for a backbone from nothing"),
        (["--from", "nothing"], "from: nothing is no model"),
        (["--attention", "ReluAttention"], "--attention is not an option of segmentation, which takes --data"),
    ]:
        assert run(["train", "segmentation", *words]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1], error
