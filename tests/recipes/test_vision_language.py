"""The recipe of two stages: what is trained in each, what is masked, LLaVA's files, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from headwise.cli import run
from headwise.errors import InputError
from headwise.models.conversion import convert
from headwise.models.saisa import SaisaForConditionalGeneration
from headwise.recipes.vision_language import load_conversations, train_vision_language
from headwise.specimens.registry import Specimen, load_specimen

STEPS = {"projectors": 12, "all": 12}
RATES = {"projectors": 2e-3, "all": 1e-4}


@pytest.fixture
def specimen() -> Specimen:
    return load_specimen("vision-language")


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    """The parts of a model whose weights are not what they were."""
    parts = {name: ".".join(name.split(".")[:2]) for name in before}
    return {parts[name] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_each_stage_trains_its_parts_and_the_loss_falls(specimen: Specimen, tmp_path: Path):
    model = convert(specimen.model, to="saisa")
    data = load_conversations("shapes", model, specimen.processor, count=400)
    before = weights(model)
    first = train_vision_language(model, data, steps={"projectors": 12}, learning_rates=RATES, batch=16)
    assert changed(model, before) == {"model.multi_modal_projector"}
    assert first.losses["projectors"] < 0.9 * first.losses["start"]
    assert first.parameters["projectors"] == sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    before = weights(model)
    second = train_vision_language(model, data, steps={"all": 12}, learning_rates=RATES, batch=16, out=tmp_path)
    assert changed(model, before) == {"model.multi_modal_projector", "model.language_model", "lm_head.weight"}
    assert second.losses["all"] < second.losses["start"] == pytest.approx(first.losses["projectors"])
    again: Any = SaisaForConditionalGeneration.from_pretrained(tmp_path)
    assert changed(again, weights(model)) == set() and again.config.alignment == "saisa"


def test_a_seed_repeats_and_stages_have_their_own_data(specimen: Specimen):
    found = []
    for _ in range(2):
        model = convert(load_specimen("vision-language").model, to="naavit")
        captions, others = (load_conversations("shapes", model, specimen.processor, count=60, seed=s) for s in (0, 1))
        data = {"projectors": captions, "all": others}
        found.append(train_vision_language(model, data, steps={"projectors": 2, "all": 2}, batch=8, seed=3))
    assert found[0].losses == found[1].losses and list(found[0].losses) == ["start", "projectors", "all"]
    one, other = found
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def entry(words: str, answer: str, image: Any = "one.png") -> dict[str, Any]:
    turns = [{"from": "human", "value": words}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({} if image is None else {"image": image})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("one.png", (250, 10, 10)), ("two.png", (10, 250, 10))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / name)
    rows = [entry("<image> describe :", "disc , ring"), entry("is there", "yes", None),
            entry("<image> is there <image> a", "no", ["one.png", "two.png"])]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


def test_llava_files_are_read_turn_by_turn(folder: Path, specimen: Specimen):
    model, words = specimen.model, specimen.tokenizer
    data = load_conversations(folder / "data.json", model, specimen.processor)
    image, end = model.config.image_token_id, words.eos_token_id
    single, text, double = (data[index] for index in range(3))
    asked, said = (words(part, add_special_tokens=False)["input_ids"] for part in ("describe :", "disc , ring"))
    assert single["input_ids"].tolist() == [words.bos_token_id, *[image] * 16, *asked, *said, end]
    assert single["labels"].tolist() == [-100] * (17 + len(asked)) + [*said, end]
    assert "pixel_values" not in text and double["pixel_values"].shape == (2, 3, 32, 32)
    assert int((double["input_ids"] == image).sum()) == 32
    batch = data.collate([single, text, double])
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert torch.equal(batch["pixel_values"][1:], double["pixel_values"])
    assert batch["attention_mask"].sum(1).tolist() == [len(one["input_ids"]) for one in (single, text, double)]
    for row, one in enumerate((single, text, double)):
        assert torch.equal(batch["labels"][row, : len(one["labels"])], one["labels"])
        assert bool((batch["labels"][row, len(one["labels"]) :] == -100).all())
    train, test = data.split()
    assert (len(train), len(test)) == (2, 1)
    with torch.no_grad():
        assert torch.isfinite(convert(model, to="saisa")(**batch).loss)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "one.png"}, 'entry 0 of .* has no "conversations" of turns'),
        (entry("describe :", "disc"), "has 1 pictures and 0 times <image>"),
        ({"conversations": [{"from": "human", "value": "is there"}]}, "has no turn of gpt"),
        ({"conversations": [{"from": "cat", "value": "is there"}]}, 'has no "conversations" of turns'),
    ],
)
def test_other_files_are_refused(row: dict[str, Any], message: str, tmp_path: Path, specimen: Specimen):
    (tmp_path / "data.json").write_text(json.dumps([row]))
    with pytest.raises(InputError, match=message):
        load_conversations(tmp_path / "data.json", specimen.model, specimen.processor)


def test_refusals(folder: Path, specimen: Specimen):
    model, processor = specimen.model, specimen.processor
    with pytest.raises(InputError, match=r"none\.json cannot be read as JSON"):
        load_conversations(folder / "none.json", model, processor)
    (folder / "two.png").unlink()
    with pytest.raises(InputError, match=r"two\.png cannot be read as a picture"):
        load_conversations(folder / "data.json", model, processor)[2]
    few = load_conversations("shapes", model, processor, count=1)
    with pytest.raises(InputError, match="1 conversations; give two or more"):
        few.split()
    with pytest.raises(ValueError, match="stage is 'vision'; choose projectors or all"):
        train_vision_language(model, few, steps={"vision": 1})
    with pytest.raises(ValueError, match="steps is empty; name stages, projectors and all"):
        train_vision_language(model, few, steps={})


def test_the_command_aligns_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "3", "--json"]
    assert run(["train", "vision-language-model", "--alignment", "naavit", "--out", "first", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["alignment"] == "naavit" and list(document["metrics"]["losses"]) == ["start", "projectors", "all"]
    assert (tmp_path / "first" / "model.safetensors").is_file()
    assert run(["train", "vision-language-model", "--alignment", "naavit", "--from", "first", *options]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"]["losses"]["start"] == pytest.approx(document["metrics"]["losses"]["all"], rel=1e-4)
    assert run(["train", "vision-language-model", "--alignment", "cross"]) == 2
    assert "--alignment: 'cross' is unknown; choose saisa, naavit, embedding" in capsys.readouterr().err
    assert run(["train", "vision-language-model", "--from", "text"]) == 2
    assert "give a LLaVA with its processor" in capsys.readouterr().err
    assert run(["train", "image-classifier", "--alignment", "saisa"]) == 2
    assert "--alignment is not an option of image-classifier" in capsys.readouterr().err
