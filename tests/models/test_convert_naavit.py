"""A trained LLaVA turned into NAAViT at once, and into SAISA to be trained."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import headwise
from headwise.errors import UnsupportedModel
from headwise.hf.session import steer
from headwise.models.saisa import SaisaConfig, SaisaForConditionalGeneration
from headwise.steering.naavit import Naavit

SIZE, IMAGE = 16, 1


def llava(**changes: Any) -> Any:
    torch.manual_seed(0)
    given = SaisaConfig.example("embedding", **changes).to_dict()
    given["text_config"]["initializer_range"] = 0.2
    unknown = ("alignment", "implementation", "model_type", "architectures", "transformers_version")
    return LlavaForConditionalGeneration(LlavaConfig(**{k: v for k, v in given.items() if k not in unknown})).eval()


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 64, (2, 26))
    ids[0, 3 : 3 + SIZE] = ids[1, 6 : 6 + SIZE] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}


def logits(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


def test_naavit_is_the_edit_of_that_name():
    model, given = llava(), inputs()
    text = given["input_ids"] != IMAGE
    before = logits(model, given)
    with steer(model, Naavit()):
        edited = logits(model, given)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    converted = headwise.convert(model, to="naavit")
    assert converted is model and isinstance(model, SaisaForConditionalGeneration)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits(model, given)[text], edited[text], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(edited[text], before[text], atol=1e-3)


@pytest.mark.parametrize("to", ["naavit", "saisa"])
def test_a_converted_model_survives_the_disk_and_switches(to: str, tmp_path: Path):
    model, given = headwise.convert(llava(), to=to), inputs()
    model.save_pretrained(tmp_path)
    again: Any = SaisaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.alignment == to
    assert torch.equal(logits(again, given), logits(model, given))
    model.set_attn_implementation("eager")
    assert model.model.language_model.layers[0].self_attn.config._attn_implementation == "eager"
    text = given["input_ids"] != IMAGE
    torch.testing.assert_close(logits(model, given)[text], logits(again, given)[text], atol=1e-5, rtol=1e-4)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**given, **options), again.generate(**given, **options))


def test_a_loaded_llava_is_saved_under_names_that_are_found_again(tmp_path: Path):
    """transformers saves what it loaded under the names that it found; those of older LLaVAs are not ours."""
    llava().save_pretrained(tmp_path / "llava")
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    model, given = headwise.convert(loaded, to="naavit"), inputs()
    model.save_pretrained(tmp_path / "naavit")
    again: Any = SaisaForConditionalGeneration.from_pretrained(tmp_path / "naavit").eval()
    assert torch.equal(logits(again, given), logits(model, given))


def test_saisa_starts_from_the_shared_projector():
    model, given = llava().bfloat16(), inputs()
    shared = {name: value.clone() for name, value in model.model.multi_modal_projector.state_dict().items()}
    headwise.convert(model, to="saisa")
    projectors = model.model.multi_modal_projector
    assert len(projectors) == 3
    for projector in projectors:
        assert all(torch.equal(value, shared[name]) for name, value in projector.state_dict().items())
    assert len({value.data_ptr() for value in projectors.parameters()}) == 12, "each layer has weights of its own"
    features = torch.randn(SIZE, 32)
    inputs_of_layers = model.model.layer_inputs(features)
    assert all(torch.equal(one, inputs_of_layers[0]) for one in inputs_of_layers)
    assert logits(model, {**given, "pixel_values": given["pixel_values"].bfloat16()}).dtype == torch.bfloat16


def test_another_model_with_the_same_config_stays_what_it_was():
    model, given = llava(), inputs()
    other = LlavaForConditionalGeneration(model.config).eval()
    other.load_state_dict(model.state_dict())
    before = logits(other, given)
    headwise.convert(model, to="naavit")
    assert torch.equal(logits(other, given), before) and type(other) is LlavaForConditionalGeneration


def test_an_embedding_network_of_ours_converts_too():
    torch.manual_seed(0)
    ours: Any = SaisaForConditionalGeneration(SaisaConfig.example("embedding")).eval()
    theirs, given = llava(), inputs()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(logits(ours, given), logits(theirs, given))
    text = given["input_ids"] != IMAGE
    converted = [logits(headwise.convert(copy.deepcopy(one), to="naavit"), given) for one in (ours, theirs)]
    torch.testing.assert_close(converted[0][text], converted[1][text])


def test_refusals():
    model = llava()
    with pytest.raises(ValueError, match=r"naavit is for all 3 layers; .*Naavit\(heads='3\.\*'\)"):
        headwise.convert(model, to="naavit", layers=[1])
    assert type(model) is LlavaForConditionalGeneration
    headwise.convert(model, to="naavit", layers=[0, 1, 2])
    with pytest.raises(ValueError, match="is aligned by 'naavit' already; convert a model once"):
        headwise.convert(model, to="saisa")
    with pytest.raises(UnsupportedModel, match=r"LlamaModel is no LlavaForConditionalGeneration; .*Naavit"):
        headwise.convert(llava().model.language_model, to="naavit")
    model = llava()
    with steer(model, Naavit()), pytest.raises(RuntimeError, match="probes or edits are attached"):
        headwise.convert(model, to="naavit")
    text = {**model.config.text_config.to_dict(), "model_type": "mistral", "sliding_window": 8}
    windowed = llava(text_config=text)
    with pytest.raises(UnsupportedModel, match="attends in windows of 8 tokens"):
        headwise.convert(windowed, to="saisa")
    assert type(windowed) is LlavaForConditionalGeneration
