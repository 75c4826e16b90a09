"""The synthetic episodes: what they ask is determined, their spans and twins are right."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.tasks.addition import addition_episodes
from headwise.tasks.coloured_objects import coloured_object_episodes
from headwise.tasks.episodes import Episodes, answer_accuracy
from headwise.tasks.indirect_objects import indirect_object_episodes
from headwise.tasks.mixture import Mixture
from headwise.tasks.multiple_choice import multiple_choice_episodes
from headwise.tasks.repeats import repeated_segments
from headwise.tasks.symbol_needles import needle_episodes
from headwise.tasks.symbols import Symbols

SYMBOLS = Symbols()
MIXTURE = Mixture()


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def held(episodes: Episodes, name: str, ids: torch.Tensor | None = None) -> list[str]:
    ids = episodes.input_ids if ids is None else ids
    return [SYMBOLS.text(row[a:b]) for row, (a, b) in zip(ids, episodes.spans[name].tolist(), strict=True)]


def answered(episodes: Episodes, ids: torch.Tensor | None = None) -> list[str]:
    ids = episodes.input_ids if ids is None else ids
    return [SYMBOLS.text(row[mask]) for row, mask in zip(ids, episodes.answers, strict=True)]


def test_symbols_are_128_different_names_and_round_trip():
    assert len(SYMBOLS) == 128 == len(set(SYMBOLS.names)) and not any(" " in name for name in SYMBOLS.names)
    assert SYMBOLS.text(SYMBOLS.ids("Q Ann red 7 <bos>")) == "Q Ann red 7 <bos>"
    assert len(SYMBOLS.words) == 96 and len(SYMBOLS.plain_words) == 93
    with pytest.raises(ValueError, match="'nope' is no symbol"):
        SYMBOLS.ids("Ann nope")


@given(st.integers(9, 120), st.integers(0, 50))
def test_repeats_are_periodic(length, seed):
    made = repeated_segments(4, SYMBOLS.plain_words, length=length, generator=draw(seed))
    for row, mask, (start, end) in zip(made.input_ids, made.answers, made.spans["segment"].tolist(), strict=True):
        period = end - start
        assert start == 1 and 3 <= period <= max(3, (length - 1) // 3)
        assert len(set(row[start:end].tolist())) == period
        assert torch.equal(row[1 + period :], row[1:-period])
        assert mask.nonzero()[0] == period + 2 and bool(mask[period + 2 :].all())


@pytest.mark.parametrize("text", [MIXTURE.text, None])
@given(st.integers(18, 90), st.integers(0, 50), st.sampled_from([None, 0.0, 0.5, 1.0]))
def test_needles_stand_once_and_are_asked_for(text, length, seed, depth):
    ask, answer = SYMBOLS.ids("Q ANS").tolist()
    made = needle_episodes(
        3, SYMBOLS.plain_words, text, ask=ask, answer=answer, length=length, depth=depth, generator=draw(seed)
    )
    assert made.length == length and made.answers.sum(1).tolist() == [6, 6, 6]
    for row, told, key, wanted in zip(
        made.input_ids, held(made, "needle"), held(made, "key"), answered(made), strict=True
    ):
        assert told == wanted and row[0] == 0
        assert SYMBOLS.text(row[-9:-6]) == f"ANS Q {key}"
        for word in [key, *wanted.split()]:
            assert int((row == SYMBOLS.index[word]).sum()) == 2  # once told, once asked or answered
    starts = made.spans["needle"][:, 0]
    if depth == 0.0:
        assert starts.tolist() == [3, 3, 3]
    if depth == 1.0:
        assert starts.tolist() == [length - 15] * 3


@given(st.integers(10, 60), st.integers(0, 50))
def test_indirect_objects_ask_for_the_person_named_once(length, seed):
    made = indirect_object_episodes(5, SYMBOLS, text=MIXTURE.text, length=length, generator=draw(seed))
    assert made.length == length and made.twin is not None
    assert held(made, "io") == answered(made) and held(made, "subject") == held(made, "subject-again")
    assert answered(made, made.twin) == held(made, "subject")
    for row in made.input_ids.tolist():
        names = [
            token for token in row[:-1] if token in SYMBOLS.people[torch.isin(SYMBOLS.people, torch.tensor(row[-9:]))]
        ]
        assert names.count(row[-1]) == 1


@given(st.integers(2, 8), st.booleans(), st.integers(0, 50))
def test_coloured_objects_ask_for_a_thing_of_the_scene(objects, closing, seed):
    made = coloured_object_episodes(5, SYMBOLS, objects=objects, closing=closing, generator=draw(seed))
    assert made.length == 2 * objects + 4 + closing and made.twin is not None
    assert held(made, "colour") == answered(made) and held(made, "twin-colour") == answered(made, made.twin)
    assert held(made, "object") == [SYMBOLS.names[token] for token in made.input_ids[:, -2 - closing]]
    assert all(a != b for a, b in zip(answered(made), answered(made, made.twin), strict=True))


@given(st.integers(1, 5), st.sampled_from([None, 10]), st.integers(0, 50))
def test_sums_are_right_and_the_twin_has_another(sums, modulus, seed):
    made = addition_episodes(5, SYMBOLS, sums=sums, modulus=modulus, generator=draw(seed))
    assert made.twin is not None
    for ids in (made.input_ids, made.twin):
        for row, wanted in zip(ids, answered(made, ids), strict=True):
            told = SYMBOLS.text(row[1:]).split(" . ")
            parts = [line.split() for line in told]
            assert (
                [str((int(p[0]) + int(p[2])) % (modulus or 100)) for p in parts]
                == [p[4] for p in parts]
                == wanted.split()
            )
    last = [a[-1] != b[-1] for a, b in zip(answered(made), answered(made, made.twin), strict=True)]
    assert all(last) and held(made, "operator") == ["+"] * 5 and held(made, "equals") == ["="] * 5


@pytest.mark.parametrize("order", ["text-first", "label-first"])
@pytest.mark.parametrize("labels", ["random", "fixed"])
def test_multiple_choice_asks_for_the_label_beside_the_option(order, labels):
    made = multiple_choice_episodes(50, SYMBOLS, order=order, labels=labels, generator=draw())
    assert made.twin is not None
    assert held(made, "label") == answered(made) and held(made, "twin-label") == answered(made, made.twin)
    assert held(made, "option") == held(made, "question")
    between = (made.spans["label"] - made.spans["option"])[:, 0].unique().tolist()
    assert between == [1 if order == "text-first" else -1]
    assert (len(set(answered(made))) > 4) == (labels == "random")


@pytest.mark.parametrize("order", ["text-first", "label-first"])
@pytest.mark.parametrize(("question", "asks"), [("last", 1), ("last", 3), ("end", 1), ("end", 2)])
def test_multiple_choice_may_ask_behind_its_list_and_several_times(order, question, asks):
    made = multiple_choice_episodes(
        30, SYMBOLS, order=order, labels="words", question=question, asks=asks, generator=draw()
    )
    assert made.twin is not None and made.length == 1 + 9 + 4 * asks
    assert held(made, "option") == held(made, "question")
    asked = made.input_ids[made.answers].view(30, asks)
    assert [SYMBOLS.names[i] for i in asked[:, -1].tolist()] == held(made, "label")
    assert [SYMBOLS.names[i] for i in made.twin[:, -1].tolist()] == held(made, "twin-label")
    for ids, answers in zip(made.input_ids, made.answers, strict=True):
        words = SYMBOLS.text(ids).split()
        listed = words[2:10]
        texts, tags = (listed[::2], listed[1::2]) if order == "text-first" else (listed[1::2], listed[::2])
        assert len(set(listed)) == 8
        places = answers.nonzero().flatten().tolist()
        told = [words[at - (2 if question == "last" else 1)] for at in places]
        assert [words[at] for at in places] == [tags[texts.index(text)] for text in told]
        assert len(set(told)) == asks


@pytest.mark.parametrize("task", Mixture.names)
@pytest.mark.parametrize("length", [32, 64, 257])
def test_the_mixture_has_every_task_at_every_length(task, length):
    made = MIXTURE.episodes(task, 4, length, draw())
    assert made.input_ids.shape == (4, length) and bool(made.answers.any(1).all()) and made.task == task
    assert bool((made.input_ids[:, 0] == 0).all()) and int(made.input_ids[:, 1:].min()) > 0
    assert torch.equal(made.rows()[:, :-1], made.answers[:, 1:])


def test_mixed_losses_are_means_over_each_tasks_answers():
    batch = MIXTURE.batch({"needles": 2, "addition": 1}, 48, draw())
    logits = torch.randn(3, 48, 128, generator=draw(1))
    losses = batch.losses(logits)
    assert set(losses) == {"needles", "addition", "text"}
    each = torch.nn.functional.cross_entropy(logits[:2, 41:47].flatten(0, 1), batch.input_ids[:2, 42:].flatten())
    torch.testing.assert_close(losses["needles"], each)


def test_accuracy_counts_tokens_and_whole_answers():
    made = MIXTURE.episodes("needles", 2, 40, draw())
    logits = torch.nn.functional.one_hot(made.input_ids.roll(-1, 1), 128).float()
    assert answer_accuracy(logits, made) == {"tokens": 1.0, "sequences": 1.0}
    logits[0, -2] = 0
    assert answer_accuracy(logits, made) == {"tokens": pytest.approx(11 / 12), "sequences": 0.5}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: repeated_segments(1, SYMBOLS.words, length=6), "length is 6; .* at least 7"),
        (lambda: repeated_segments(1, [1, 1, 2], length=30), "give different ids"),
        (lambda: repeated_segments(1, [1, 2], length=30), r"segment is \(3, None\) over 2 words"),
        (lambda: MIXTURE.episodes("needles", 1, 12), "length is 12; .* at least 18"),
        (lambda: MIXTURE.episodes("needle", 1, 32), "task is 'needle'; expected one of bigrams"),
        (lambda: indirect_object_episodes(1, SYMBOLS, length=30), "no text to fill it"),
        (lambda: indirect_object_episodes(1, SYMBOLS, length=5, text=MIXTURE.text), "length is 5; .* at least 10"),
        (lambda: coloured_object_episodes(1, SYMBOLS, objects=9), "objects is 9; expected 2 to 8"),
        (lambda: multiple_choice_episodes(1, SYMBOLS, order="last"), "order is 'last'"),
        (lambda: multiple_choice_episodes(1, SYMBOLS, question="middle"), "question is 'middle'"),
        (lambda: multiple_choice_episodes(1, SYMBOLS, asks=2), "asks is 2; expected 1"),
        (lambda: multiple_choice_episodes(1, SYMBOLS, question="end", asks=4), "asks is 4; expected 1, or up to 3"),
        (lambda: addition_episodes(1, SYMBOLS, sums=0), "sums is 0"),
        (lambda: addition_episodes(1, SYMBOLS, modulus=7), "modulus is 7"),
        (
            lambda: needle_episodes(1, range(1, 8), ask=8, answer=9, length=30),
            "use all 7 words",
        ),
        (lambda: needle_episodes(1, range(1, 9), ask=9, answer=10, length=30, depth=1.5), "depth is 1.5"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
