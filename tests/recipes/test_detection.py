"""The recipe for detection: scenes, folders as COCO writes them, a short training, what is refused."""

import json

import pytest
import torch
from PIL import Image

from headwise.cli import run
from headwise.errors import InputError
from headwise.models.detector import Detector
from headwise.recipes.detection import compare_detectors, load_boxes, train_detector
from headwise.tasks.scenes import object_scenes

TINY = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0}


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of 32 x 16 pixels, each with one red or blue square; ids of COCO need not be counted from 0."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for index in range(10):
        kind, x = index % 2, 2 * (index % 5)
        picture = Image.new("RGB", (32, 16), (20, 20, 20))
        picture.paste([(220, 30, 30), (30, 60, 220)][kind], (x, 4, x + 12, 12))
        picture.save(tmp_path / "images" / f"{index}.png")
        images.append({"id": 100 + index, "file_name": f"{index}.png", "width": 32, "height": 16})
        annotations.append({"id": index, "image_id": 100 + index, "category_id": 3 + kind, "bbox": [x, 4, 12, 8]})
    annotations.append({"id": 99, "image_id": 100, "category_id": 3, "bbox": [0, 0, 32, 16], "iscrowd": 1})
    categories = [{"id": 4, "name": "blue"}, {"id": 3, "name": "red"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    return tmp_path


def changed(folder, **parts):
    path = folder / "annotations.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


def test_boxes_of_scenes():
    data = load_boxes("scenes", train=6, size=32, seed=3)
    made = object_scenes(9, size=32, seed=3)
    assert data.classes[0] == "disc" and (len(data.train), len(data.test)) == (6, 3)
    for index in range(9):
        item = data.train[index] if index < 6 else data.test[index - 6]
        assert torch.equal(item["boxes"], made.box[index, 0])
        assert torch.equal(item["labels"] >= 0, made.present[index])
        assert torch.equal(item["labels"][made.present[index]], made.shape[index][made.present[index]])


def test_a_folder_is_read_and_learned(folder, tmp_path, capsys):
    data = load_boxes(str(folder), size=16)
    assert data.classes == ("red", "blue") and (len(data.train), len(data.test)) == (8, 2)
    for part in (data.train, data.test):
        for index in range(len(part)):
            item = part[index]
            assert item["labels"].shape == (1,) and item["boxes"][0, 1::2].tolist() == [0.25, 0.75]
            x = int(item["boxes"][0, 0] * 16)  # the picture is squeezed to 16 x 16
            assert (item["pixel_values"][0 if item["labels"] == 0 else 2, 6, x + 1 : x + 5] > 0.5).all()
    found = train_detector(data, backbone_config=TINY, steps=120, batch=8, learning_rate=1e-2, out=tmp_path / "out")
    assert found.ap50 > 0.6 and set(found.by_class) == {"red", "blue"}
    assert capsys.readouterr().out == ""
    again = Detector.from_pretrained(tmp_path / "out").eval()
    image = data.test[0]["pixel_values"][None]
    torch.testing.assert_close(again(image).pred_boxes, found.model(image).pred_boxes)
    assert again.config.id2label == {0: "red", 1: "blue"}


def test_parts_of_a_folder(folder, tmp_path):
    root = tmp_path / "parted"
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        (root / part / "images").symlink_to(folder / "images")
        (root / part / "annotations.json").write_text((folder / "annotations.json").read_text())
    assert (len(load_boxes(str(root)).train), len(load_boxes(str(root)).test)) == (10, 10)
    changed(root / "test", categories=[{"id": 3, "name": "red"}, {"id": 4, "name": "green"}])
    with pytest.raises(InputError, match=r"has the categories \['red', 'green'\], .* has \['red', 'blue'\]"):
        load_boxes(str(root))


def test_a_comparison_has_a_row_for_each():
    data = load_boxes("scenes", train=8, size=16)
    rows = compare_detectors(data, ["davit", "agent"], parameters=60_000, seeds=(0, 1), steps=2, batch=4)
    assert [row["backbone"] for row in rows] == ["davit", "agent"]
    for row in rows:
        assert row["ap"] == pytest.approx(sum(row["runs"]["ap"]) / 2) and abs(row["parameters"] / 60_000 - 1) < 0.01


def test_bad_folders_are_refused(folder, tmp_path):
    def refused(message, root=folder):
        with pytest.raises(InputError, match=message) as error:
            load_boxes(str(root), size=16)
        assert "\n" not in str(error.value)

    refused("is no folder; expected scenes", tmp_path / "none")
    refused("has no annotations.json", folder / "images")
    good = json.loads((folder / "annotations.json").read_text())
    box = good["annotations"][0]
    changed(folder, annotations=[{**box, "bbox": [28, 4, 12, 8]}])
    refused(r"has the box \[28, 4, 12, 8\] in an image of 32 x 16 pixels")
    changed(folder, annotations=[{**box, "category_id": 7}])
    refused("is not as COCO writes it .*7")
    changed(folder, annotations=[{**box, "image_id": 7}])
    refused("is not as COCO writes it .*7")
    changed(folder, annotations=[], categories=[])
    refused("lists 0 categories and 10 images")
    changed(folder, **{**good, "images": [*good["images"], {**good["images"][0], "id": 1, "file_name": "x.png"}]})
    refused(r"names x\.png, which is not in")
    changed(folder, images=[{**one, "width": 40} for one in good["images"]])
    refused(r"0\.png is 32 x 16 pixels, annotations\.json says 40 x 16")
    changed(folder, **{**good, "images": good["images"][:1], "annotations": good["annotations"][:1]})
    refused("lists 1 images; expected two or more")


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "detection", "--data", str(folder), "--size", "16", "--steps", "2"]
    assert run([*words, "--parameters", "40000", "--backbone", "swin", "--out", "o", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["backbone"] == "swin" and set(said["metrics"]) >= {"ap", "ap50", "ap75", "by_class"}
    assert run([*words, "--from", "o", "--out", "more", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backbone"] == "swin"
    assert run([*words, "--from", "o", "--data", "scenes"]) == 2
    assert run(["train", "detection", "--classes", "3"]) == 2
    errors = capsys.readouterr().err
    assert "the model has 2 classes, scenes has 7" in errors
    assert "--classes is not an option of detection, which takes --data" in errors
