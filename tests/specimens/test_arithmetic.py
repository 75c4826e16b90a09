"""The recipe of the `arithmetic` specimen, and the shipped model against its card."""

import json

import pytest
import torch

from headwise.specimens import arithmetic
from headwise.specimens.registry import load_specimen, specimen_checkpoints, train_specimen
from headwise.tasks.symbol_arithmetic import ArithmeticSymbols


def test_the_loss_is_a_sum_of_means_of_the_answers_of_each_operator_and_of_repeats():
    torch.manual_seed(0)
    model, symbols = arithmetic.build(), ArithmeticSymbols()
    phase = arithmetic.Phase(1, 4, 3, 2)
    batch = arithmetic.draw(phase, symbols, torch.Generator().manual_seed(1))
    assert [one.task for one in batch] == ["arithmetic", "letters", "repeats"]
    total, parts = arithmetic.loss(model, batch)
    assert set(parts) == {"add", "subtract", "first", "last", "repeats"}
    torch.testing.assert_close(total, torch.stack(list(parts.values())).sum())
    digits = batch[0].input_ids
    with torch.no_grad():
        logs = model(input_ids=digits).logits.log_softmax(-1)
    found: dict[str, list[float]] = {"add": [], "subtract": []}
    for row, ids in enumerate(digits):
        names = symbols.text(ids).split()
        for start in range(1, len(names), 6):
            name = "add" if {"+", "sum"} & set(names[start : start + 3]) else "subtract"
            found[name].append(-float(logs[row, start + 3, ids[start + 4]]))
    for name, losses in found.items():
        assert float(parts[name]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_short_training_writes_its_card_and_an_early_checkpoint(tmp_path):
    folder = train_specimen("arithmetic", tmp_path / "made", steps=6)
    card = json.loads((folder / "card.json").read_text())
    assert set(card["accuracies"]) == {*arithmetic.TASKS, "repeats"} and card["steps"] == 6
    assert card["checkpoints"] == [0] and (folder / "step-0.safetensors").exists()


def test_the_shipped_model_does_what_its_card_says():
    made = load_specimen("arithmetic")
    found = arithmetic.evaluate(made.model, seed=20_000)
    for task, right in found.items():
        assert right == pytest.approx(made.card["accuracies"][task], abs=0.05) and right >= 0.95, task
    (step,) = specimen_checkpoints("arithmetic")
    assert made.card["checkpoints"] == [step] and made.head_map is not None
    early = arithmetic.evaluate(load_specimen(f"arithmetic@{step}").model)
    assert 0.2 < arithmetic.results_right(early) < arithmetic.EARLY and early["repeats"] > 0.7
    later = [int(at) for at, right in made.card["results_right_along_training"].items() if right < arithmetic.EARLY]
    assert max(later) == step
    weights = sum(path.stat().st_size for path in made.folder.glob("*.safetensors")) if made.folder else 0
    assert 0 < weights <= 1_000_000
