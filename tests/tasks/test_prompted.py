"""Prompts with answers: where they stand, and how they are scored."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.tasks.mixture import Mixture
from headwise.tasks.prompted import Answers, PromptBatch, few_shot, read_label


def batch(labels: Tensor | None = None) -> PromptBatch:
    prompts = [torch.tensor([1, 5, 6, 7, 8]), torch.tensor([1, 9, 10])]
    made = PromptBatch.of_texts(
        "toy", prompts, [torch.tensor([3, 4]), torch.tensor([2])], {"word": [(1, 3), (2, 3)]}, pad=0
    )
    return PromptBatch(made.task, made.input_ids, made.real, made.asked, made.groups, labels)


def saying(ids: Tensor, size: int = 12) -> Tensor:
    """Logits that say, at every row, the next of these tokens."""
    return 5.0 * torch.nn.functional.one_hot(torch.cat([ids[:, 1:], ids[:, :1]], 1), size).float()


def test_prompts_are_padded_on_the_left():
    made = batch()
    assert made.input_ids.tolist() == [[1, 5, 6, 7, 8, 3, 4], [0, 0, 0, 1, 9, 10, 2]]
    assert made.asked.int().tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 1]]
    assert made.groups["word"].int().tolist() == [[0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]]
    given = made.inputs()
    assert given["attention_mask"].tolist()[1] == [0, 0, 0, 1, 1, 1, 1]
    assert given["position_ids"].tolist()[1] == [0, 0, 0, 0, 1, 2, 3]
    assert given["logits_to_keep"] == made.rows == 3


def test_answers_are_scored_where_they_are_predicted():
    made = batch()
    logits = saying(made.input_ids)
    assert made.right(logits).tolist() == [True, True]
    logits[0, 5] = logits[0, 4]  # the second token of the first answer is now wrong
    assert made.right(logits).tolist() == [False, True]
    sure = math.log(1 + 11 * math.exp(-5))
    assert made.losses(logits).tolist() == pytest.approx([sure + 2.5, sure], abs=1e-5)
    assert torch.equal(made.losses(logits[:, -made.rows :]), made.losses(logits))
    assert torch.equal(made.right(logits[:, -made.rows :]), made.right(logits))
    with pytest.raises(ValueError, match="logits of 2 rows but the answers are predicted by the last 3"):
        made.losses(logits[:, -2:])


def test_an_answer_that_is_no_label_cannot_be_read():
    made = batch(torch.tensor([2, 3]))
    logits = saying(made.input_ids)
    assert made.parsable(logits).tolist() == [True, True]
    logits[1, 5] = saying(torch.tensor([[7, 7]]))[0, 0]
    logits[1, 5, 3] = 1.0
    assert made.parsable(logits).tolist() == [True, False]
    assert made.choices(logits).tolist() == [3, 3]  # letter scoring still finds the likelier label
    assert batch().parsable(logits).tolist() == [True, True]
    with pytest.raises(ValueError, match="toy has no labels"):
        batch().choices(logits)


def test_entropy_is_that_of_the_first_token_of_the_answer():
    made = batch()
    logits = saying(made.input_ids)
    logits[0, 4] = 0
    found = made.entropy(logits)
    assert float(found[0]) == pytest.approx(math.log(12))
    p = torch.softmax(logits[1, 5], -1)
    assert float(found[1]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)


@given(st.integers(0, 200))
def test_the_other_token_is_a_real_one_outside_of_all_groups(seed):
    made = batch()
    drawn = made.other_token(torch.Generator().manual_seed(seed))
    assert drawn.sum(1).tolist() == [1, 1]
    assert drawn[0].int().argmax() in (3, 4) and drawn[1].int().argmax() == 4
    assert not (drawn & (made.asked | ~made.real)).any()


def test_generated_tasks_bring_their_spans():
    episodes = Mixture().episodes("multiple_choice", 5, 40, torch.Generator().manual_seed(0))
    made = PromptBatch.of_episodes(episodes)
    assert made.rows == 2 and "attention_mask" not in made.inputs()
    for name, mask in made.groups.items():
        start, end = episodes.spans[name][3].tolist()
        assert mask[3].nonzero()[:, 0].tolist() == list(range(start, end))
    part = made.part(slice(1, 3))
    assert len(part) == 2 and torch.equal(part.groups["label"], made.groups["label"][1:3])


def test_labels_are_read_as_whole_words():
    assert read_label(" Positive, clearly.", ["negative", "positive"]) == 1
    assert read_label("nonpositive", ["positive"]) is None
    assert read_label("It is very good.", ["good", "very good"]) == 1
    assert read_label("(B) because A", ["A", "B"]) == 1
    assert read_label("", ["a"]) is None
    assert read_label("c++ it is", ["c", "c++"]) == 1


def test_both_accuracies_are_told():
    answers = Answers([1, None, 0, None], [1, 1, 1, 0])
    assert (answers.accuracy, answers.parsable, answers.accuracy_among_parsable) == (0.25, 0.5, 0.5)
    assert math.isnan(Answers([None], [0]).accuracy_among_parsable)
    # What the authors' notebook counts: 318 of 347 readable answers right, of 500.
    notebook = Answers([1] * 318 + [0] * 29 + [None] * 153, [1] * 500)
    assert notebook.accuracy == pytest.approx(0.636) and notebook.accuracy_among_parsable == pytest.approx(318 / 347)


def test_few_shot_prompts():
    found = few_shot("Text: {input}\nLabel: {answer}", [("good {x}", "yes"), ("bad", "no")], "so so")
    assert found == "Text: good {x}\nLabel: yes\n\nText: bad\nLabel: no\n\nText: so so\nLabel:"
    with pytest.raises(ValueError, match=r"it must hold \{input\} and end in \{answer\}"):
        few_shot("{answer}: {input}", [], "x")


def test_refusals():
    with pytest.raises(ValueError, match="1 answers to 2 questions"):
        Answers([1], [1, 1])
    with pytest.raises(ValueError, match="1 prompts and 0 answers"):
        PromptBatch.of_texts("toy", [torch.tensor([1])], [])
    ids = torch.ones(1, 3).long()
    with pytest.raises(ValueError, match="toy: every prompt needs an answer, with a token before it"):
        PromptBatch("toy", ids, ids.bool(), torch.tensor([[True, False, False]]))
