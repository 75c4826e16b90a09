"""The recipe for image classification: sources, a short training through the Trainer, what is refused."""

import json
import sys

import pytest
import torch
from PIL import Image

from headwise.cli import run
from headwise.errors import InputError
from headwise.models.small_vit import SmallViT
from headwise.recipes.image_classification import compare_attention, load_images, train_image_classifier


def picture(path, colour, size=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        picture(tmp_path / "red" / f"{index}.png", (200 + index, 10, 10))
        picture(tmp_path / "blue" / "deep" / f"{index}.jpg", (10, 10, 200 + index))
    return tmp_path


def test_digits_are_learned_and_written(tmp_path):
    found = train_image_classifier(load_images("digits", train=600), steps=220, out=tmp_path, seed=1)
    assert found.accuracy > 0.5
    again = SmallViT.from_pretrained(tmp_path).eval()
    test = load_images("digits").test
    images = torch.stack([test[index]["pixel_values"] for index in range(9)])
    torch.testing.assert_close(again(images).logits, found.model(images).logits)
    assert again.config.id2label[3] == "3"


def test_the_same_seed_gives_the_same_network():
    data = load_images("digits", train=200)
    one, two = (train_image_classifier(data, steps=5, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_scenes_hold_one_object_of_a_named_shape():
    data = load_images("scenes", train=20, size=16)
    assert data.size == (3, 16, 16) and len(data.train) == 20 and len(data.test) == 10
    assert {int(data.train[index]["labels"]) for index in range(20)} <= set(range(len(data.classes)))


def test_a_folder_of_pictures(folder, capsys):
    data = load_images(str(folder), size=8)
    assert data.classes == ("blue", "red") and (len(data.train), len(data.test)) == (8, 4)
    item = data.train[0]
    assert item["pixel_values"].shape == (3, 8, 8) and item["labels"] == 0
    found = train_image_classifier(data, steps=40, batch=8, learning_rate=1e-2)
    assert found.accuracy == 1
    assert capsys.readouterr().out == ""


def test_a_folder_with_its_own_test_part(folder):
    for name in ("red", "blue"):
        (folder / "train").mkdir(exist_ok=True)
        (folder / name).rename(folder / "train" / name)
    picture(folder / "val" / "red" / "0.png", (255, 0, 0))
    data = load_images(str(folder), size=8)
    assert (len(data.train), len(data.test)) == (12, 1)
    picture(folder / "val" / "green" / "0.png", (0, 255, 0))
    with pytest.raises(InputError, match="'green'"):
        load_images(str(folder))


def test_mechanisms_end_in_one_table():
    data = load_images("digits", train=200)
    table = compare_attention(data, ["SoftmaxAttention", "ReluAttention"], seeds=(0, 1), steps=3)
    assert [row["mechanism"] for row in table] == ["SoftmaxAttention", "ReluAttention"]
    for row in table:
        assert len(row["accuracies"]) == 2 and row["accuracy"] == sum(row["accuracies"]) / 2
    wide = compare_attention(data, {"wide": {"network": {"hidden_size": 64}}}, seeds=(0,), steps=2)[0]
    assert wide["flops"] > table[0]["flops"] and wide["parameters"] > table[0]["parameters"]


def test_what_holds_no_classes_is_refused(tmp_path, folder):
    with pytest.raises(InputError, match="is no folder; expected digits, scenes, shapes"):
        load_images(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="holds 0 folders of pictures"):
        load_images(str(folder / "red"))
    (folder / "red" / "0.png").write_text("no picture")
    data = load_images(str(folder))
    with pytest.raises(InputError, match=r"0\.png cannot be read"):
        for index in range(len(data.test)):
            data.test[index]


def test_what_is_not_installed_is_named(folder, monkeypatch):
    data = load_images(str(folder))
    monkeypatch.setattr("transformers.utils.import_utils.is_accelerate_available", lambda: False)
    with pytest.raises(InputError, match=r"accelerate is not installed; pip install .headwise\[train\]"):
        train_image_classifier(data, steps=1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"pillow is not installed; pip install .headwise\[vision\]"):
        data.train[0]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["train", "image-classifier", "--data", "digits", "--steps", "2", "--out", "o", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["attention"] == "SoftmaxAttention" and 0 <= said["metrics"]["accuracy"] <= 1
    assert (tmp_path / "o" / "model.safetensors").is_file()
    assert run(["train", "image-classifier", "--data", "digets"]) == 2
    assert run(["train", "image-classifier", "--attention", "Softmax"]) == 2
    assert run(["train", "tasks", "--data", "digits"]) == 2
    errors = capsys.readouterr().err
    assert "digets is no folder" in errors and "'Softmax'" in errors and "tasks has its own data" in errors
