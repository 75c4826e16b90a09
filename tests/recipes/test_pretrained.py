"""Going on with a trained classifier: converted, tuned, saved, loaded again."""

import json
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from headwise.cli import run
from headwise.errors import InputError
from headwise.models.small_vit import SmallViT, SmallViTConfig
from headwise.recipes.image_classification import load_images, train_image_classifier
from headwise.recipes.pretrained import load_image_classifier, normalised


def tiny_vit(labels: int = 7) -> Any:
    torch.manual_seed(0)
    sizes: Any = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_labels": labels,
    }
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **sizes)).eval()


def routers(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "router" in name}


def test_a_learned_router_is_tuned_by_the_command(tmp_path, capsys):
    torch.manual_seed(0)
    SmallViT(SmallViTConfig()).save_pretrained(tmp_path / "dense")
    words = ["train", "image-classifier", "--from", str(tmp_path / "dense"), "--steps", "2", "--json"]
    words += ["--convert", "mixture-of-head:router=learned,active=0.75", "--out", str(tmp_path / "moh")]
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["attention"] == "mixture-of-head"
    tuned = load_image_classifier(tmp_path / "moh")
    assert tuned.config.attention == ["MixtureOfHeads"] * 2 and len(routers(tuned)) > 0
    dense: Any = SmallViT.from_pretrained(tmp_path / "dense")
    assert not torch.equal(tuned.blocks[0].attn.qkv.weight, dense.blocks[0].attn.qkv.weight)
    with pytest.raises(ValueError, match="is a mixture of heads already"):
        load_image_classifier(tmp_path / "moh", to="mixture-of-head")


def test_a_model_of_transformers_keeps_its_router(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "dense")
    data = load_images("scenes", train=8, size=16)
    model = load_image_classifier(tmp_path / "dense", to="mixture-of-head", router="learned")
    start = routers(model)
    found = train_image_classifier(data, model=model, steps=3, learning_rate=1e-2, out=tmp_path / "moh")
    assert found.model is model and 0 <= found.accuracy <= 1
    moved = routers(model)
    assert moved and any(not torch.equal(moved[name], start[name]) for name in moved)
    again = load_image_classifier(tmp_path / "moh").eval()
    images = torch.stack([data.test[index]["pixel_values"] for index in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model(images).logits)
    model.save_pretrained(tmp_path / "renamed")  # under the names of old checkpoints of ViT
    with pytest.raises(InputError, match=r"its weights have no vit\.layers\.0\.attention\.head_router"):
        load_image_classifier(tmp_path / "renamed")


def test_other_classes_get_a_new_last_layer(tmp_path):
    model = tiny_vit(labels=3)
    model.save_pretrained(tmp_path)
    same = load_image_classifier(tmp_path, classes=["LABEL_0", "LABEL_1", "LABEL_2"])
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    other = load_image_classifier(tmp_path, classes=["a", "b"])
    assert other.config.id2label == {0: "a", 1: "b"} and other.classifier.out_features == 2
    assert torch.equal(other.vit.layernorm.weight, model.vit.layernorm.weight)


def test_images_are_normalised_as_the_checkpoint_says(tmp_path):
    data = load_images("scenes", train=4, size=16)
    assert normalised(data, tmp_path) is data
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5, 0.0], "image_std": [0.5] * 3})
    )
    shown = normalised(data, tmp_path)
    pixels = data.train[1]["pixel_values"]
    expected = torch.stack([2 * pixels[0] - 1, 2 * pixels[1] - 1, 2 * pixels[2]])
    torch.testing.assert_close(shown.train[1]["pixel_values"], expected)
    assert shown.train[1]["labels"] == data.train[1]["labels"] and len(shown.test) == len(data.test)


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"nothing is no model .*give a folder with config.json"):
        load_image_classifier(tmp_path / "nothing")
    tiny_vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model takes images of 3 x 16 x 16, digits has 1 x 8 x 8"):
        train_image_classifier(load_images("digits", train=200), model=tiny_vit())
    with pytest.raises(ValueError, match="the model has 3 classes, scenes has 7"):
        train_image_classifier(load_images("scenes", train=4, size=16), model=tiny_vit(labels=3))
    start = ["train", "image-classifier", "--data", "scenes", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    for words, said in [
        (["--from", str(tmp_path), "--convert", "mixture-of-heads"], "there are"),
        (["--from", str(tmp_path), "--convert", "mixture-of-head:router"], "write NAME:key=value"),
        (["--from", str(tmp_path), "--convert", "mixture-of-head:rooter=learned"], "'rooter' is no option"),
        (["--from", str(tmp_path), "--convert", "mixture-of-head:active=1.5"], "1.5"),
        (["--from", str(tmp_path), "--attention", "ReluAttention"], "--attention is for a model from nothing"),
        (["--convert", "mixture-of-head"], "say which by --from"),
        (["--backbone", "davit"], "--backbone is not an option of image-classifier, which takes --data"),
    ]:
        assert run([*start, *words]) == 2
        error = capsys.readouterr().err
        assert said in error.splitlines()[-1] and error.count("headwise: ") == 1, error
