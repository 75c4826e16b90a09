"""Maps, head outputs and ablation agree with an outside implementation (fixture: `make oracles`)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate
from headwise.hf.maps import attention_maps, head_outputs
from headwise.hf.session import steer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "transformer_lens.safetensors"
CLASSES = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=CLASSES)
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model of the fixture, and what TransformerLens measured on it."""
    name = request.param
    config_class, model_class = CLASSES[name]
    with safe_open(FIXTURE, "pt") as stored:
        config = config_class(**json.loads(stored.metadata()["configs"])[name])
        given = {key.removeprefix(f"{name}."): stored.get_tensor(key) for key in stored.keys() if key.startswith(name)}  # noqa: SIM118
    model = model_class(config).eval()
    model.load_state_dict({key.removeprefix("weights."): v for key, v in given.items() if key.startswith("weights.")})
    return model, given


def test_the_models_are_the_same(case):
    model, given = case
    with torch.no_grad():
        assert_near(model(given["ids"]).logits, given["logits"])


def test_maps(case):
    model, given = case
    for layer in range(2):
        maps = attention_maps(model, given["ids"], f"{layer}.*")
        assert_near(maps, given[f"pattern.{layer}"])


def test_head_outputs(case):
    model, given = case
    outputs = head_outputs(model, given["ids"]).resample()
    for layer in range(2):
        z = torch.stack([outputs[Head(layer, head)] for head in range(4)], 2)
        assert_near(z, given[f"z.{layer}"])


@pytest.mark.parametrize("head", [Head(0, 1), Head(1, 2)], ids=str)
def test_ablation(case, head: Head):
    model, given = case
    with torch.no_grad(), steer(model, Ablate(heads=[head], mode="zero")):
        logits = model(given["ids"]).logits
    expected = given[f"without.{head.layer}.{head.head}"]
    assert not torch.allclose(expected, given["logits"], atol=1e-3)
    assert_near(logits, expected)
