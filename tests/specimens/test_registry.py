import json

import pytest
import torch

from headwise.errors import InputError
from headwise.specimens import backcopy, planted
from headwise.specimens.registry import (
    load_specimen,
    read_specimen,
    specimen_names,
    specimen_summaries,
    train_specimen,
    word_tokenizer,
)
from headwise.tasks.symbols import Symbols


def test_specimens_are_found_by_scanning_and_named_once():
    assert {"planted", "planted-llama", "tasks", "backcopy", "backcopy-deep"} <= set(specimen_names())
    assert all(summary for summary in specimen_summaries().values())


@pytest.mark.parametrize("name", ["planted", "planted-llama"])
def test_hand_built_ones_load_with_a_readable_tokenizer(name):
    specimen = load_specimen(name)
    ids = specimen.tokenizer("Ann Ben apple Ann Ben", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 0 and specimen.tokenizer.decode(ids[0]) == "<bos> Ann Ben apple Ann Ben"
    assert specimen.tokenizer.convert_ids_to_tokens([1]) == ["<unk>"]
    assert specimen.model.config.vocab_size == len(specimen.tokenizer) == planted.VOCABULARY
    with torch.no_grad():
        guess = int(specimen.model(input_ids=ids).logits[0, -1].argmax())
    assert specimen.tokenizer.decode([guess]) == "apple"
    assert specimen.card["heads"]["previous"] == "0.0" and specimen.head_map is None and not specimen.model.training


def test_symbols_have_a_tokenizer_that_round_trips():
    names = Symbols.names
    tokenizer = word_tokenizer(names)
    line = "<bos> Ann AND Ben . Ben GAVE key TO"
    ids = Symbols().ids(line).tolist()
    assert tokenizer(line.removeprefix("<bos> "))["input_ids"] == ids and tokenizer.decode(ids) == line
    assert tokenizer.pad_token_id == names.index("<pad>") and tokenizer.is_fast
    offsets = tokenizer("Ann AND", return_offsets_mapping=True)["offset_mapping"]
    assert offsets[1:] == [(0, 3), (4, 7)]


def test_a_short_training_writes_a_whole_specimen_that_loads_back(tmp_path):
    seen = []
    folder = train_specimen("backcopy", tmp_path / "made", seed=1, steps=60, log=seen.append)
    assert seen and seen[-1]["step"] == 59
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "model.safetensors", "step-0.safetensors", "step-50.safetensors",
    ]  # fmt: skip
    card = json.loads((folder / "card.json").read_text())
    assert card["name"] == "backcopy" and card["steps"] == 60 and card["checkpoints"] == [0, 50]
    made = read_specimen(folder, "backcopy")
    assert made.step is None and made.card == card
    # what the card says is what loads
    assert backcopy.measure(made.model, backcopy.task()) == card["figures"]
    ids = made.tokenizer("c1 c2 c3", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 4) or "*" in "".join(backcopy.names()[1:4])
    start = read_specimen(folder, "backcopy", "0")
    assert start.step == 0
    torch.manual_seed(1)
    fresh = backcopy.build().to(torch.bfloat16).float()
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, start.model.get_parameter(name)), name
    with pytest.raises(InputError, match=r"no checkpoint '7'; expected one of 0, 50"):
        read_specimen(folder, "backcopy", "7")
    again = train_specimen("backcopy", tmp_path / "again", seed=1, steps=60)
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_a_folder_with_other_files_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and holds no specimen"):
        train_specimen("planted", tmp_path)
    assert (tmp_path / "thesis.txt").exists() and list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plantd", r"specimen 'plantd' is not known; did you mean 'planted'\?"),
        ("xyz", r"specimen 'xyz' is not known; expected one of arithmetic, backcopy, "),
        ("planted@3", r"written by hand and has no checkpoints; leave out '@3'"),
    ],
)
def test_refusals(name, message):
    with pytest.raises(InputError, match=message):
        load_specimen(name)
