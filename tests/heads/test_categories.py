"""Categories of heads: a hand-built model whose copying head is the correct letter head, and every bound by itself."""

import pytest
import torch

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate
from headwise.heads.categories import (
    CATEGORIES,
    CategoryThresholds,
    ChoiceHeads,
    _category,
    categorize_heads,
)
from headwise.heads.masses import group_mass
from headwise.hf.session import steer
from headwise.specimens import planted
from headwise.tasks.choice_questions import choice_prompts


@pytest.fixture(scope="module")
def model():
    return planted.build(vocabulary=128, positions=128)


def questions(n: int = 32, **options):
    generator = torch.Generator().manual_seed(3)
    return choice_prompts(n, right=torch.arange(n) % 4, generator=generator, **options)[0]


@pytest.mark.parametrize("labels", ["standard", "random", "permuted", "digits"])
def test_the_planted_copying_head_is_the_correct_letter_head(model, labels):
    prompts = questions(labels=labels)
    found = categorize_heads(model, prompts)
    assert found.accuracy == 1 and found.erred == 0
    assert found.of("correct letter") == [planted.INDUCTION]
    assert found.categories[planted.SINK] == "none"
    assert float(found.right[1, 0]) > 0.999 and float(found.wrong[1, 0]) < 1e-6
    # 0.0 rests on the token before: the mark of the question, one of the last two tokens.
    assert float(found.on_last[0, 0]) > 0.999
    # All four right answers come equally often, so the head's mass by index is even although it is never even.
    torch.testing.assert_close(found.by_index[:, 1, 0], torch.full((4,), 0.25), atol=1e-3, rtol=0)
    assert found.missed.isnan().all()
    assert "ratio 3" in str(found) and "correct letter: 1.0" in str(found)


def test_a_head_that_looks_at_the_gold_label_where_the_model_says_another_is_not_a_correct_letter_head(model):
    """The output is turned to the next label behind the head's back: it still looks at the gold one."""
    prompts = questions(64)
    weight = model.lm_head.weight
    ids = prompts.labels[0]
    before = weight.data[ids].clone()
    weight.data[ids] = before[[1, 2, 3, 0]]  # says the label before: right one never
    weight.data[ids[:2]] = before[:2] * 1.5  # but two of four are said right again
    try:
        found = categorize_heads(model, prompts)
    finally:
        weight.data[ids] = before
    assert 0 < found.accuracy < 1 and found.erred >= 8
    assert float(found.ratio()[1, 0]) > 100 and float(found.gold[1, 0]) > 100
    assert float(found.missed[1, 0]) < 3
    assert planted.INDUCTION not in found.of("correct letter")


def fabricated(**changes) -> ChoiceHeads:
    one = torch.full((1, 1), 0.0)
    values = {
        "right": one,
        "wrong": one + 1,
        "missed": one * torch.nan,
        "gold": one * torch.nan,
        "by_index": torch.zeros(4, 1, 1),
        "on_text": one,
        "on_right_text": one,
        "on_last": one,
        "pushes": one,
        **{name: torch.as_tensor(value).reshape(-1, 1, 1) if name == "by_index" else one + value
           for name, value in changes.items()},
    }  # fmt: skip
    return ChoiceHeads({}, CategoryThresholds(), **values, accuracy=1.0, erred=0)


EVEN, ONE = [0.1, 0.1, 0.1, 0.1], [0.02, 0.02, 0.02, 0.3]


@pytest.mark.parametrize(
    ("changes", "category"),
    [
        ({"by_index": EVEN, "right": 0.3, "wrong": 0.1}, "correct letter"),
        ({"by_index": EVEN, "right": 0.29, "wrong": 0.1}, "none"),
        ({"by_index": EVEN, "right": 0.3, "wrong": 0.1, "missed": 2.9}, "none"),
        ({"by_index": [0.02] * 4, "right": 0.3, "wrong": 0.1}, "none"),
        ({"by_index": ONE, "right": 0.1, "wrong": 0.1}, "single letter"),
        ({"by_index": ONE, "right": 0.3, "wrong": 0.02, "missed": 15.0}, "single letter"),
        ({"by_index": EVEN, "right": 0.1, "wrong": 0.1}, "uniform"),
        ({"by_index": [0.1, 0.1, 0.1, 0.25], "right": 0.1, "wrong": 0.1}, "none"),
        ({"on_text": 0.4, "on_right_text": 0.2}, "content gatherer"),
        ({"on_text": 0.4, "on_right_text": 0.1}, "none"),
        ({"on_last": 0.6, "pushes": 0.6}, "amplification"),
        ({"on_last": 0.6, "pushes": 0.4}, "none"),
        ({"on_last": 0.4, "pushes": 0.9}, "none"),
    ],
)
def test_every_bound_decides(changes, category):
    assert category in CATEGORIES
    assert _category(fabricated(**changes), Head(0, 0)) == category


def test_pushes_is_the_correlation_with_what_stood_there_before(model):
    found = categorize_heads(model, questions())
    # Nothing stands at the labels before layer 0; heads of layer 0 write to no logit.
    assert found.pushes[0].abs().max() < 1e-3
    assert found.pushes.abs().max() <= 1


def test_a_model_that_never_answers_is_refused(model):
    prompts = questions(8)
    with (
        steer(model, Ablate([planted.INDUCTION])),
        pytest.raises(ValueError, match="answers none of 8 prompts right"),
    ):
        # Without the head all labels are alike; the first one is said. Ask only where it is another.
        categorize_heads(model, _never_first(prompts))


def _never_first(prompts):
    return type(prompts)(**{
        **{name: getattr(prompts, name) for name in prompts.__dataclass_fields__},
        "right": torch.arange(len(prompts)) % 3 + 1,
    })  # fmt: skip


def test_prompts_with_one_right_option_are_refused(model):
    """A head that always looks at the third label could not be told from one that finds the right one."""
    third = choice_prompts(8, right=torch.full((8,), 2))[0]
    with pytest.raises(ValueError, match="in all 8 prompts option 2 is right; ask for others"):
        categorize_heads(model, third)


def test_bad_thresholds_and_categories_are_refused(model):
    with pytest.raises(ValueError, match="ratio is 0"):
        CategoryThresholds(ratio=0.0)
    with pytest.raises(ValueError, match="'letters'"):
        fabricated().of("letters")


def test_groups_cover_the_prompt_as_it_reads(model):
    prompts = questions(4)
    masses = group_mass(model, prompts.input_ids, prompts.groups())
    split = masses["right-label"] + masses["wrong-labels"]
    torch.testing.assert_close(split, masses["labels"])
    by_index = torch.stack([masses[f"label-{i}"] for i in range(4)]).sum(0)
    torch.testing.assert_close(by_index, masses["labels"])
