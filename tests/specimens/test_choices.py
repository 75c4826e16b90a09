"""The recipe of the `choices` specimen, and the shipped model against its card."""

import json

import torch

from headwise.specimens import choices
from headwise.specimens.registry import WEIGHTS, load_specimen, train_specimen
from headwise.specimens.tasks import dead_masks
from headwise.tasks.mixture import Mixture


def test_batches_hold_the_formats_of_their_phase_and_another_task():
    draw = choices.batches(Mixture(), choices.PHASES)
    for step, formats in ((0, choices.EASY), (choices.PHASES[0].steps, tuple(choices.FORMATS))):
        drawn = draw(step, torch.Generator().manual_seed(step))
        assert [name for name, _ in drawn[:-1]] == list(formats) and drawn[-1][0] in choices.OTHERS
        assert len({episodes.length for _, episodes in drawn[:-1]}) == 1
    lengths = {draw(step, torch.Generator().manual_seed(0))[0][1].length for step in range(16)}
    assert len(lengths) == 4  # two, three and four options, and text in front


def test_digits_are_labels_of_no_training_question():
    digits = Mixture().symbols.digits
    draw = choices.batches(Mixture(), choices.PHASES)
    for step in range(0, 700, 50):
        for name, episodes in draw(step, torch.Generator().manual_seed(step)):
            if name in choices.FORMATS:
                assert not bool(torch.isin(episodes.input_ids, digits).any())


def test_a_short_training_keeps_dead_heads_dead_and_writes_its_card(tmp_path):
    folder = train_specimen("choices", tmp_path / "made", steps=4)
    card = json.loads((folder / "card.json").read_text())
    assert card["base"] == "tasks" and card["steps"] == 4 and set(choices.FORMATS) <= set(card["accuracies"])
    from headwise.specimens.registry import read_specimen

    model = read_specimen(folder, "choices").model
    for name, mask in dead_masks().items():
        assert not bool(model.get_parameter(name)[:, mask[0] == 0].any())


def test_the_shipped_model_is_what_its_card_says():
    shipped = load_specimen("choices")
    again = choices.evaluate(shipped.model, Mixture())
    said = shipped.card["accuracies"]
    for name in ("random", "standard", "words"):
        assert abs(again[name]["tokens"] - said[name]["tokens"]) < 0.005
    assert said["random"]["tokens"] >= 0.9 and said["prompts, random labels"]["labels"] >= 0.9
    assert sum(path.stat().st_size for path in (WEIGHTS / "choices").iterdir()) < 1_000_000
    for name, mask in dead_masks().items():
        assert not bool(shipped.model.get_parameter(name)[:, mask[0] == 0].any())
