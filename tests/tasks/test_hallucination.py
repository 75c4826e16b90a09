"""CHAIR and polling, against counts made by hand and against scikit-learn."""

import math
import random

import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from headwise.tasks.hallucination import chair, polling


def test_chair_of_captions_counted_by_hand():
    captions = ["A dog and a cat on a couch.", "Two dogs", "nothing to see", "a hot dog beside a Dog"]
    objects = [{"dog", "couch"}, {"dog"}, {"cat"}, {"hot dog"}]
    found = chair(captions, objects, {"dog": ["dogs", "puppy"]})
    # named: dog cat couch | dog | - | hot dog, dog; wrong: cat, and dog in the last
    assert found.chair_s == 2 / 4 and found.chair_i == 2 / 6
    assert found.recall == 4 / 5 and found.length == (8 + 2 + 3 + 6) / 4


def test_an_object_counts_once_a_caption_and_synonyms_are_one_object():
    found = chair(["cat cat kitty dog"], [{"dog"}], {"cat": ["kitty"]})
    assert (found.chair_i, found.recall) == (1 / 2, 1.0)


def test_a_shorter_caption_hallucinates_less_and_recalls_less():
    objects = [{"dog", "cat"}]
    long, short = chair(["dog cat bird"], objects, {"bird": []}), chair(["dog"], objects, {"bird": []})
    assert short.chair_i < long.chair_i and short.recall < long.recall and short.length < long.length


def test_nothing_named_is_no_figure():
    found = chair(["hm"], [{"dog"}])
    assert math.isnan(found.chair_i) and found.chair_s == 0 and found.recall == 0


@pytest.mark.parametrize(("captions", "objects"), [([], []), (["a"], [])])
def test_chair_wants_pairs(captions, objects):
    with pytest.raises(ValueError, match="chair: "):
        chair(captions, objects)


def test_a_word_cannot_mean_two_objects():
    with pytest.raises(ValueError, match="'bat' means"):
        chair(["bat"], [{"animal"}], {"animal": ["bat"], "club": ["bat"]})


def test_polling_agrees_with_scikit_learn():
    rng = random.Random(0)
    truth = [rng.random() < 0.5 for _ in range(200)]
    said = [right if rng.random() < 0.8 else rng.random() < 0.7 for right in truth]
    found = polling(["Yes, there is." if yes else "no" for yes in said], truth)
    assert found.accuracy == pytest.approx(accuracy_score(truth, said))
    assert found.precision == pytest.approx(precision_score(truth, said))
    assert found.recall == pytest.approx(recall_score(truth, said))
    assert found.f1 == pytest.approx(f1_score(truth, said))
    assert found.yes == sum(said) / 200 and found.unread == 0
    assert found == polling(said, truth)


def test_answers_that_are_neither_are_wrong_and_counted():
    found = polling(["maybe", "no yes", None, True], [True, False, False, True])
    assert found.unread == 0.5 and found.accuracy == 0.5 and found.yes == 0.25


def test_saying_no_always_finds_nothing():
    found = polling([False] * 4, [True, False, True, False])
    assert (found.accuracy, found.precision, found.recall, found.f1, found.yes) == (0.5, 0, 0, 0, 0)


@pytest.mark.parametrize(("answers", "truth"), [([], []), ([True], [True, False])])
def test_polling_wants_pairs(answers, truth):
    with pytest.raises(ValueError, match="polling: "):
        polling(answers, truth)
