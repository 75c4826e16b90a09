"""The table of mechanisms: which stand in it, that budgets are met, and the command that makes it."""

import json

import pytest
import torch
from tests.contracts.discovery import exported
from tests.contracts.mechanisms import layout_of
from torch import nn

from headwise.attention import SoftmaxAttention
from headwise.cli import run
from headwise.models.small_vit import SmallViT, SmallViTConfig
from headwise.ops.counting import flops
from headwise.recipes.image_classification import load_images
from headwise.recipes.mechanisms import LEFT_OUT, attention_table, mechanisms_for, table_text


def test_every_mechanism_that_fits_has_its_row():
    fit = {cls.__name__ for cls in exported("attention", nn.Module) if layout_of(cls).startswith(("b t c", "b n c"))}
    routers = {name for name in fit if name.endswith("Router")}  # give gates, not tokens
    named = set(mechanisms_for((4, 4)))
    assert {name for name in named if "+" not in name} == fit - routers - set(LEFT_OUT)
    for grid in ((4, 4), (8, 8)):
        for own in mechanisms_for(grid).values():
            model = SmallViT(SmallViTConfig(image_size=2 * grid[0], patch_size=2, **own)).eval()
            assert flops(model, (torch.zeros(1, 1, 2 * grid[0], 2 * grid[1]),)) > 0, "the table counts without numbers"


def test_what_is_left_out_as_softmax_is_softmax():
    from headwise import attention

    for name in ("GlobalLocalCrossAttention", "PairwiseCrossAttention"):
        assert "softmax" in LEFT_OUT[name]
        one, other = getattr(attention, name)(32, 4), SoftmaxAttention(32, 4)
        shapes = [{key: value.shape for key, value in made.state_dict().items()} for made in (one, other)]
        assert shapes[0] == shapes[1]


def test_both_budgets_are_met(tmp_path):
    data = load_images("digits", train=200)
    rows = attention_table(data, ["AgentAttention", "WindowAttention+ChannelAttention"], seeds=(0, 1), steps=2)
    assert [(row["mechanism"], row["budget"]) for row in rows] == [
        ("SoftmaxAttention", "both"),
        ("AgentAttention", "parameters"),
        ("AgentAttention", "operations"),
        ("WindowAttention+ChannelAttention", "parameters"),
        ("WindowAttention+ChannelAttention", "operations"),
    ]
    control = rows[0]
    for row in rows:
        assert row["budget"] == "both" or abs(row[f"of_{row['budget']}"] - 1) <= 0.005
        assert row["of_parameters"] == row["parameters"] / control["parameters"]
        assert len(row["accuracies"]) == 2 and row["spread"] == pytest.approx(
            abs(row["accuracies"][0] - row["accuracies"][1]) / 2**0.5
        )
    # Counted again, from nothing but what a row says.
    own = mechanisms_for((4, 4))["AgentAttention"]
    sizes = {"hidden_size": rows[2]["hidden_size"], "mlp_ratio": rows[2]["mlp_ratio"], "num_attention_heads": 8}
    model = SmallViT(SmallViTConfig(image_size=8, patch_size=2, num_labels=10, **own, **sizes))
    assert sum(p.numel() for p in model.parameters()) == rows[2]["parameters"]
    assert flops(model, (data.train[0]["pixel_values"][None],)) == rows[2]["operations"]
    text = table_text(rows)
    assert text.count("\n") == 7 and "| AgentAttention | operations |" in text


def test_unknown_names_are_refused():
    data = load_images("digits", train=200)
    with pytest.raises(ValueError, match="attention is 'Softmax'; choose among SoftmaxAttention"):
        attention_table(data, ["Softmax"])
    with pytest.raises(ValueError, match="budget is 'time'; choose parameters, operations"):
        attention_table(data, ["AgentAttention"], budgets=["time"])


def test_the_command(tmp_path, capsys):
    words = ["train", "image-classifier", "--compare", "--attention", "ReluAttention", "--seeds", "1", "--steps", "2"]
    assert run([*words, "--out", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "attention-table.json").read_text())
    assert said["tables"] == stored["tables"] and [len(rows) for rows in stored["tables"].values()] == [3]
    assert stored["command"].startswith("headwise train image-classifier --attention ReluAttention --compare")
    assert "| ReluAttention | parameters |" in (tmp_path / "attention-table.md").read_text()
    assert run([*words[:3], "--attention", "Relu", "--out", str(tmp_path)]) == 2
    assert run(["train", "image-classifier", "--seeds", "2"]) == 2
    assert run(["train", "image-classifier", "--compare", "--from", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "attention is 'Relu'" in errors[-3] and "--seeds is for --compare" in errors[-2]
    assert "--from is for one model" in errors[-1]
