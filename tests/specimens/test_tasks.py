"""The recipe of the `tasks` specimen, and the shipped model against its card."""

import json

import pytest
import torch

from headwise.specimens import tasks
from headwise.specimens.registry import WEIGHTS, load_specimen, train_specimen
from headwise.tasks.mixture import Mixture


def test_dead_heads_are_silent_and_stay_so():
    torch.manual_seed(0)
    model = tasks.build()
    for name, mask in tasks.dead_masks().items():
        weight = model.get_parameter(name)
        assert not bool(weight[:, mask[0] == 0].any()) and bool(weight[:, mask[0] == 1].any())
        assert int((mask == 0).sum()) == tasks.HEAD_DIM


def test_only_the_copying_heads_speak_in_masked_sequences():
    torch.manual_seed(0)
    model = tasks.build()
    ids = Mixture().episodes("repeats", 2, 32, torch.Generator().manual_seed(0)).input_ids
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with tasks.silenced(model, torch.tensor([True, False])):
            masked = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
        for layer, heads in tasks.COPYING.items():
            weight = model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")
            for head in set(range(tasks.HEADS)) - set(heads):
                weight[:, head * tasks.HEAD_DIM : (head + 1) * tasks.HEAD_DIM] = 0
        expected = model(input_ids=ids).logits
    assert torch.equal(masked[1], plain[1]) and torch.equal(again, plain)
    torch.testing.assert_close(masked[0], expected[0])
    assert not torch.allclose(masked[0], plain[0])


def test_phases_follow_each_other_and_batches_hold_what_they_say():
    phases = tasks.PHASES
    assert tasks.phase_of(0, phases) is phases[0]
    assert tasks.phase_of(phases[0].steps, phases) is phases[1]
    assert tasks.phase_of(10**6, phases) is phases[-1]
    draw = tasks.batches(Mixture(), phases)
    last = sum(phase.steps for phase in phases) - 1
    for step in (0, phases[0].steps, last):
        phase = tasks.phase_of(step, phases)
        batch, copying = draw(step, torch.Generator().manual_seed(step))
        assert {batch.names[i] for i in batch.task.tolist()} == set(phase.tasks)
        assert batch.input_ids.shape[1] in phase.lengths
        assert not bool((copying & ~torch.isin(batch.task, torch.tensor([1, 2]))).any())
    assert {batch.names[1], batch.names[2]} == set(tasks.COPY_TASKS)


def test_a_short_training_writes_its_card(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "EVALUATED_LENGTHS", (32,))
    folder = train_specimen("tasks", tmp_path / "made", steps=4)
    card = json.loads((folder / "card.json").read_text())
    assert set(card["accuracies"]) == set(Mixture.names) and card["masked"]["dead"] == ["0.7", "1.7", "2.7"]
    assert [phase["steps"] for phase in card["recipe"]["phases"]] == [1, 1, 2, 1]


@pytest.mark.skipif(not (WEIGHTS / "tasks" / "config.json").exists(), reason="the tasks specimen was not trained yet")
def test_the_shipped_model_does_what_its_card_says():
    made = load_specimen("tasks")
    card = made.card["accuracies"]
    found = tasks.evaluate(made.model, Mixture(), sequences=16)
    for name, lengths in found.items():
        for length, accuracy in lengths.items():
            assert accuracy["tokens"] == pytest.approx(card[name][length]["tokens"], abs=0.15), (name, length)
    for name, mask in tasks.dead_masks().items():
        assert not bool(made.model.get_parameter(name)[:, mask[0] == 0].any())
    for name in tasks.COPY_TASKS:
        for length in ("32", "64", "128", "256"):
            assert card[name][length]["tokens"] >= 0.9, (name, length)
    others = ["bigrams", "indirect_objects", "coloured_objects", "addition", "multiple_choice"]
    assert sum(card[name]["64"]["tokens"] >= 0.8 for name in others) >= 3
