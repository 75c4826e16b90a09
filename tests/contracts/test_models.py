"""The contract of `models`: every network that the area exports, by transformers' conventions."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.discovery import SMALL, exported
from transformers import PreTrainedConfig, PreTrainedModel

MODELS = [cls for cls in exported("models", PreTrainedModel) if cls.forward is not PreTrainedModel.forward]


def small_config(cls: Any) -> PreTrainedConfig:
    """The model's config at small sizes: its own ``example()``, or the parameters that SMALL knows."""
    config_class = cls.config_class
    if callable(getattr(config_class, "example", None)):
        return config_class.example()
    known = set(inspect.signature(config_class).parameters) | set(getattr(config_class, "__annotations__", ()))
    return config_class(**{name: value for name, value in SMALL.items() if name in known})


def small_inputs(model: Any) -> dict[str, torch.Tensor]:
    """What the forward takes, by the name of its main input."""
    name, generator = model.main_input_name, torch.Generator().manual_seed(0)
    if name == "input_ids":
        return {"input_ids": torch.randint(2, model.config.vocab_size, (2, 9), generator=generator)}
    if name == "features":  # channels over time
        return {name: torch.randn(2, model.config.feature_dim, model.config.temporal_scale, generator=generator)}
    size = getattr(model.config, "image_size", 16)
    return {name: torch.randn(2, getattr(model.config, "num_channels", 3), size, size, generator=generator)}


@pytest.fixture(params=MODELS, ids=lambda cls: cls.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param(small_config(request.param)).eval()


def first_tensor(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):  # a backbone's first output is a tuple of maps
        output = output[0]
    return output


def test_a_config_survives_the_disk(model: Any, tmp_path: Path):
    model.config.save_pretrained(tmp_path)
    again = type(model.config).from_pretrained(tmp_path)
    assert again.to_diff_dict() == model.config.to_diff_dict()


def test_a_model_survives_the_disk(model: Any, tmp_path: Path):
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")), "weights are safetensors"
    again = type(model).from_pretrained(tmp_path).eval()
    inputs = small_inputs(model)
    with torch.no_grad():
        assert torch.equal(first_tensor(again(**inputs)), first_tensor(model(**inputs)))


def test_a_few_steps_lower_a_loss(model: Any):
    inputs = small_inputs(model)
    with torch.no_grad():
        target = first_tensor(model(**inputs)) + 0.1
    trained = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = (first_tensor(trained(**inputs)) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_items_of_a_batch_do_not_meet(model: Any):
    inputs = small_inputs(model)
    with torch.no_grad():
        together = first_tensor(model(**inputs))
        alone = first_tensor(model(**{name: value[:1] for name, value in inputs.items()}))
    torch.testing.assert_close(alone, together[:1], atol=1e-4, rtol=1e-3)
