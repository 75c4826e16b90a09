"""Models are loaded by folder, by hub id or by a registered name; what cannot be is one line."""

import json
import shutil
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.zoo import FAMILIES, OFF_INTERFACE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from headwise.errors import InputError, UnsupportedModel
from headwise.hf import load as loading
from headwise.hf.load import known_names, load, register


@pytest.fixture
def folder(tmp_path):
    """A Llama with its tokenizer, as save_pretrained writes them."""
    FAMILIES["llama"].build().save_pretrained(tmp_path / "llama")
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@dataclass
class Made:
    model: Any
    tokenizer: Any = "words"
    head_map: Any = None
    card: Any = None


@pytest.fixture
def specimens(monkeypatch):
    monkeypatch.setattr(loading, "_RESOLVERS", {})
    asked = []

    def make(name, *, dtype=None):
        asked.append((name, dtype))
        return Made(FAMILIES["gpt2"].build().train().to(dtype))

    register(lambda: ["text", "planted"], make)
    return SimpleNamespace(asked=asked, make=make)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit", "qwen2_vl"])
def test_folders_of_every_kind_are_loaded_as_their_class(name, tmp_path):
    model = FAMILIES[name].build()
    model.save_pretrained(tmp_path)
    inputs = FAMILIES[name].inputs(model, length=20)
    found = load(tmp_path)
    assert type(found.model) is type(model)
    assert not found.model.training
    assert found.tokenizer is None and found.name == str(tmp_path)
    loaded: Any = found.model
    plain: Any = model
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], plain(**inputs)[0])


def test_the_tokenizer_of_the_folder_comes_along(folder):
    found = load(str(folder))
    assert found.tokenizer("a b a")["input_ids"] == [1, 2, 1]


def test_precision_is_float32_on_the_cpu_unless_asked(folder):
    assert load(folder).model.dtype == torch.float32
    FAMILIES["llama"].build().bfloat16().save_pretrained(folder)
    assert load(folder).model.dtype == torch.float32
    assert load(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(folder, dtype=torch.float64).model.dtype == torch.float64


def test_a_folder_without_a_named_class_gets_one_that_fits(folder):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert type(load(folder).model).__name__ == "LlamaForCausalLM"


def test_registered_names_win_and_bring_what_they_have(specimens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    found = load("text")
    assert found.tokenizer == "words" and found.card == {} and not found.model.training
    load("text@300", dtype="bfloat16")
    assert specimens.asked == [("text", torch.float32), ("text@300", torch.bfloat16)]
    with pytest.raises(InputError, match=r"the folder text has no config\.json"):
        load("./text")
    register(lambda: ["text", "planted"], specimens.make)
    assert known_names() == ["planted", "text"]


def test_pickles_are_refused_by_name(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin, which can run code .* safetensors only"):
        load(folder)


def test_code_of_a_checkpoint_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MyModel"], "auto_map": {"AutoModelForCausalLM": "mine.MyModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(InputError, match="MyModel, which comes with code of its own"):
        load(folder)
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder)


def test_models_off_the_interface_are_refused_before_their_weights_are_read(tmp_path):
    OFF_INTERFACE["bloom"]().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="BloomForCausalLM, which does not go through"):
        load(tmp_path)


def test_folders_that_cannot_be_read_say_why(folder, tmp_path):
    cases = []
    shutil.copytree(folder, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    cases.append(("empty", "holds no weights"))
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"not a tensor")
    cases.append(("damaged", "damaged cannot be loaded: "))
    shutil.copytree(folder, tmp_path / "json")
    (tmp_path / "json" / "config.json").write_text("{")
    cases.append(("json", r"config\.json cannot be read"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    cases.append(("adapter", "an adapter without its model"))
    (tmp_path / "file").write_text("")
    cases.append(("file", "is a file; give the folder"))
    for name, message in cases:
        with pytest.raises(InputError, match=message) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value) and (error.value.__suppress_context__ or error.value.__context__ is None)


def test_missing_tensors_are_not_made_up(folder):
    model = FAMILIES["llama"].build()
    state = {key: value for key, value in model.state_dict().items() if "layers.1" not in key}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(InputError, match="lack 9 tensors of LlamaForCausalLM"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("txet", "did you mean 'text'"),
        ("./nowhere", "there is no folder ./nowhere"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("some-org/some-model", "nor could it be had from the hub"),
        ("zzz", "none of the specimens planted, text; nor could it be had from the hub"),
    ],
)
def test_unknown_names_are_one_line(specimens, name, message):
    with pytest.raises(InputError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_devices_and_precisions_are_checked(folder):
    with pytest.raises(InputError, match="device: 'gpu'"):
        load(folder, device="gpu")
    for dtype in ("int8", "half-ish"):
        with pytest.raises(InputError, match="dtype: "):
            load(folder, dtype=dtype)
