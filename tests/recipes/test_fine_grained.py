"""The recipe for fine-grained classes: training with and without dual cross-attention, the command."""

import json

import torch

from headwise.cli import run
from headwise.models.dual_cross_attention import DualCrossAttention
from headwise.recipes.fine_grained import train_fine_grained
from headwise.recipes.image_classification import load_images

NETWORK = {"hidden_size": 32, "num_hidden_layers": 2}


def test_digits_are_learned_and_written(tmp_path):
    data = load_images("digits", train=200)
    found = train_fine_grained(data, steps=80, network=NETWORK, out=tmp_path, seed=1)
    assert found.accuracy > 0.3 and found.alone > 0.3
    again = DualCrossAttention.from_pretrained(tmp_path).eval()
    images = torch.stack([data.test[index]["pixel_values"] for index in range(9)])
    torch.testing.assert_close(again(images).logits, found.model(images).logits)
    assert again.config.id2label[3] == "3" and again.config.local_ratio == 0.1


def test_without_the_method_both_figures_are_one():
    data = load_images("digits", train=200)
    found = train_fine_grained(data, dual=False, steps=2, network=NETWORK)
    assert found.accuracy == found.alone and found.model.loss_weights is None


def test_accuracy_is_that_of_the_votes():
    data = load_images("digits", train=200)
    found = train_fine_grained(data, steps=20, network=NETWORK)
    images = torch.stack([data.test[index]["pixel_values"] for index in range(len(data.test))])
    labels = torch.stack([data.test[index]["labels"] for index in range(len(data.test))])
    with torch.no_grad():
        said = found.model(images)
    votes = said.branch_logits["self"].softmax(-1) + said.branch_logits["local"].softmax(-1)
    assert found.accuracy == float((votes.argmax(-1) == labels).double().mean())
    assert found.alone == float((said.branch_logits["self"].argmax(-1) == labels).double().mean())


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["train", "fine-grained", "--steps", "1", "--no-baseline"]) == 0
    shown = capsys.readouterr().out
    assert "DCAL, self-attention alone" in shown and "baseline" not in shown
    assert (tmp_path / "headwise-out" / "fine-grained" / "model.safetensors").is_file()
    assert run(["train", "fine-grained", "--steps", "1", "--json", "--out", "o"]) == 0
    assert set(json.loads(capsys.readouterr().out)["metrics"]) == {"DCAL", "baseline"}
    assert run(["train", "fine-grained", "--size", "24x24"]) == 2
    assert run(["train", "fine-grained", "--backbone", "none/"]) == 2
    errors = capsys.readouterr().err
    assert "expected the side of a square" in errors and "there is no folder none/" in errors
