"""The run of Focus: rows on made-up answers, and the set-up trained for a few steps."""

from dataclasses import replace

import pytest
import torch

from headwise.papers import _focus_rows as rows
from headwise.papers import _focus_setup as setup
from headwise.papers import focus_gui_grounding as paper
from headwise.papers._focus_setup import Answers, Outcomes
from headwise.papers.record import find_paper
from headwise.papers.running import Run, _checked_rows
from headwise.papers.verdicts import verdict_of
from headwise.steering import Grounding
from headwise.tasks.interfaces import gui_screens

RECORD = find_paper("focus-gui-grounding")
TINY = setup.Budget(steps=4, further=2, batch=8, pool=24, test=24, calibration=24, size=16)


def made_up(n: int = 400, *, seed: int = 0) -> Outcomes:
    """Answers as the paper would have them: easy screens right at once, complex ones in stages, a tag that knows."""
    generator = torch.Generator().manual_seed(seed)

    def odds(p: float, count: int = n) -> torch.Tensor:
        return torch.rand(count, generator=generator) < p

    kind = torch.arange(n) % 4
    kind = torch.where(kind < 2, 0, kind - 1)
    hard = kind > 0
    at_once = torch.where(hard, odds(0.3), odds(0.97))
    staged = odds(0.93) & ~(odds(0.05) & ~hard)
    p = torch.where(hard, 0.4, 0.1) + 0.1 * torch.rand(n, generator=generator)
    fast, slow = Answers(at_once, torch.full((n,), 4.0)), Answers(staged, torch.full((n,), 15.0))
    nothing = torch.zeros(n, dtype=torch.bool)
    found = Outcomes(
        kind=kind,
        words=kind,
        fast=fast,
        longer=fast,
        slow=slow,
        quick=fast,
        thorough=slow,
        adaptive=fast,
        went_slow=nothing,
        p_slow=p,
        theta=1.0,
        summary=odds(0.99),
        analysis=odds(0.9),
        region=odds(0.97),
        shuffled=odds(0.1),
        follows=odds(0.95, n // 2),
        label_rate={"easy": 0.03, "hard": 0.7, "nested": 0.7},
        pictures=1,
        same_pure=True,
        same_scratch=1.0,
    )
    return setup.with_theta(found, 0.3)


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    """Intervals from few resamples: verdicts here are far from their edges."""
    monkeypatch.setattr(rows, "DRAWS", 200)


@pytest.fixture(scope="module")
def found() -> Outcomes:
    return made_up()


def test_every_row_holds_where_the_paper_is_right(found):
    measured = _checked_rows(RECORD, paper.measured(found, 0))
    verdicts = {name: verdict_of(row) for name, row in measured.items()}
    assert verdicts == dict.fromkeys(verdicts, "reproduced")
    assert all(row.control for name, row in measured.items() if name not in ("pure", "cache", "curve"))


def spoilt(found: Outcomes) -> dict[str, Outcomes]:
    """For each row, answers that contradict it."""
    always, never = torch.ones_like(found.went_slow), torch.zeros_like(found.went_slow)
    coin = torch.rand(len(always), generator=torch.Generator().manual_seed(1)) < 0.5
    return {
        "struggle": replace(found, fast=replace(found.fast, right=always)),
        "switching": replace(found, went_slow=coin, adaptive=setup.composed(found, coin)),
        "efficiency": replace(found, adaptive=setup.composed(found, always)),
        "stages": replace(found, follows=found.follows & (torch.arange(len(found.follows)) % 2 == 0)),
        "understanding": replace(found, shuffled=found.thorough.right),
        "data": replace(found, longer=replace(found.fast, right=always)),
        "complex": replace(found, adaptive=found.fast),
        "dual": replace(found, adaptive=setup.composed(found, never)),
        "pure": replace(found, adaptive=found.quick),
        "cache": replace(found, same_scratch=0.98),
        "curve": replace(found, quick=replace(found.quick, tokens=found.quick.tokens.clone().fill_(torch.nan))),
    }


@pytest.mark.parametrize("name", sorted(row.id for row in RECORD.claims if row.kind != "untestable"))
def test_a_row_fails_where_its_answers_contradict_it(found, name):
    row = paper.measured(spoilt(found)[name], 0)[name]
    assert verdict_of(row) != "reproduced"
    assert not row.holds or name == "complex"  # no gain at all is no contradiction, but shows nothing


def test_each_part_of_efficiency_can_fail(found):
    margins = rows.efficiency(found, 0).values
    assert margins["tokens"] == pytest.approx((4 * 0.5 + 15 * 0.5) / 15)
    weak = replace(found, adaptive=replace(found.adaptive, right=found.fast.right))
    assert not rows.efficiency(weak, 0).holds
    worse = replace(found, slow=replace(found.slow, right=torch.ones_like(found.went_slow)))
    assert not rows.efficiency(worse, 0).holds


def test_the_second_reading_of_a_picture_is_seen(found):
    assert not rows.checks(replace(found, pictures=2))["cache"].holds


def test_a_random_switch_is_what_coins_give_on_average(found):
    rate = float(found.went_slow.double().mean())
    coins = torch.rand(3000, len(found.kind), generator=torch.Generator().manual_seed(0)) < rate
    drawn = torch.where(coins, found.thorough.right, found.quick.right).double().mean()
    assert float(rows.random_switch(found).mean()) == pytest.approx(float(drawn), abs=2e-3)


def test_a_switch_by_words_takes_the_longest_first_and_as_many(found):
    words = rows.word_switch(found)  # here words are kinds, as the made-up tag has it
    assert float(words.mean()) == pytest.approx(float(found.adaptive.right.double().mean()))
    few = setup.with_theta(found, 0.47)
    left = int(few.went_slow.sum())
    assert 0 < left < int(found.went_slow.sum())
    chance = left / int((few.words == 2).sum())
    expected = torch.where(
        few.words == 2,
        chance * few.thorough.right.double() + (1 - chance) * few.quick.right.double(),
        few.quick.right.double(),
    )
    torch.testing.assert_close(rows.word_switch(few), expected)


def test_intervals_keep_the_mix_of_screens(found):
    value, (low, high) = rows.apart(lambda index: float((found.kind[index] == 0).double().mean()), found.kind, 0)
    assert (value, low, high) == (0.5, 0.5, 0.5)


def test_a_training_batch_counts_the_answer_alone():
    screens = gui_screens(6, seed=0)
    slow = torch.tensor([True, False] * 3)
    batch = setup.training_batch(screens, slow)
    for row in range(6):
        said = " ".join(setup.WORDS[i] for i in batch.ids[row, batch.counted[row]].tolist())
        stages = f"{screens.summaries()[row]} ; {screens.analyses()[row]} ; " if slow[row] else ""
        assert said == f"<{'slow' if slow[row] else 'fast'}> {stages}{screens.points()[row]} <eos>"
        before = batch.ids[row][: int(batch.counted[row].int().argmax())]
        assert before.tolist() == setup.prompts(screens)[row]
    assert int((batch.ids == setup.IMAGE).sum()) == 6 * setup.IMAGE_TOKENS


def test_words_are_one_token_each_and_stages_fit_their_limits():
    text, screens = setup.tokenizer(), gui_screens(20, seed=0)
    for stage, texts in zip(setup.STAGES, (screens.summaries(), screens.analyses()), strict=True):
        assert all(len(text(one, add_special_tokens=False)["input_ids"]) <= stage.limit for one in texts)
        assert all(setup.ids_of(one) == text(one, add_special_tokens=False)["input_ids"] for one in texts)


def test_the_region_is_that_of_the_analysis():
    def answer(point, analysis) -> Grounding:
        return Grounding(point, "slow", {"analysis": analysis}, 1, 0.5, "", ())

    assert setup.in_region(answer((0.625, 0.875), "red bottomright dark lower pink star"))
    assert not setup.in_region(answer((0.625, 0.625), "red bottomright dark lower pink star"))
    assert not setup.in_region(answer((0.125, 0.875), "red bottomright dark lower pink star"))
    assert not setup.in_region(answer(None, "red bottomright dark lower")) and not setup.in_region(
        answer((0.0, 0.0), "red")
    )


def test_training_positions_are_those_of_decoding():
    """Right-padded batches and left-padded prompts must look alike to the model."""
    torch.manual_seed(0)
    model, screens = setup.build().eval(), gui_screens(6, seed=0)
    batch = setup.training_batch(screens, torch.zeros(6))
    with torch.no_grad():
        logits = model(input_ids=batch.ids, pixel_values=batch.pixels).logits
    way = setup.decoder(model)
    prompt = way.read(**setup.screen_inputs(screens))
    last = batch.counted.int().argmax(1) - 1
    torch.testing.assert_close(prompt.logits, logits[torch.arange(6), last], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(RECORD, 0, "cpu", tmp_path_factory.mktemp("run"), say=lambda text: None)


@pytest.fixture(scope="module")
def tiny(run) -> Outcomes:
    return setup.outcomes(run, TINY)


def test_a_few_steps_give_every_row(tiny, run, monkeypatch):
    monkeypatch.setattr(paper, "outcomes", lambda run: tiny)
    measured = _checked_rows(RECORD, paper.reproduce(run))
    assert measured["pure"].holds and measured["curve"].holds
    assert run.figures[0].is_file()
    assert len(tiny.kind) == TINY.test == len(tiny.adaptive.right) and tiny.pictures == 1


def test_the_answers_are_those_of_their_ways(tiny):
    chosen = (tiny.p_slow > tiny.theta) | (tiny.theta <= 0)
    assert torch.equal(chosen, tiny.went_slow)
    again = setup.composed(tiny, chosen)
    assert torch.equal(again.right, tiny.adaptive.right) and torch.equal(again.tokens, tiny.adaptive.tokens)
    assert (tiny.quick.tokens <= 5).all() and (tiny.thorough.tokens > tiny.quick.tokens).all()


def test_a_few_steps_lower_the_loss(run):
    torch.manual_seed(0)
    model, screens = setup.build(), gui_screens(16, seed=0)
    pool = setup.from_pool(screens, torch.arange(16) % 2 == 0, 16)
    batch = setup.training_batch(screens, torch.arange(16) % 2 == 0)
    with torch.no_grad():
        before = float(setup.loss(model, batch))
    setup.train(model, pool, 8, 0, run, "test")
    with torch.no_grad():
        assert float(setup.loss(model, batch)) < before - 0.3


def spoken(batch: setup.Batch) -> list[tuple[list[str], list[str]]]:
    """The words of each row, and those that count."""
    words = [[setup.WORDS[i] for i in row] for row in batch.ids.tolist()]
    return [
        (row, [word for word, counts in zip(row, counted, strict=True) if counts])
        for row, counted in zip(words, batch.counted.tolist(), strict=True)
    ]


def test_the_base_lists_what_is_there():
    screens = gui_screens(12, seed=3)
    for panels, texts in ((False, screens.listings()), (True, screens.summaries())):
        for (row, said), text in zip(spoken(setup.listing_batch(screens, panels=panels)), texts, strict=True):
            assert said == text.split() and ("panel" in row[17:20]) == panels
    assert screens.listings()[0].split()[int(screens.target[0])] == screens.instructions()[0].split()[0]


@pytest.mark.parametrize("naming", [False, True])
def test_lessons_ask_for_icons_that_are_there_once(naming):
    screens = gui_screens(24, mix=(1, 0, 0), empty=setup.SPARSE, seed=4)
    batch = setup.lesson_batch(screens, torch.Generator().manual_seed(0), naming=naming)
    asked = 0
    for number, (row, said) in enumerate(spoken(batch)):
        shapes = screens.listings()[number].split()
        turns = " ".join(word for word in row[17:] if word != "<pad>").split("<eos>")[:-1]
        assert said == " ".join(turn.split(":")[1] + " <eos>" for turn in turns).split() and 1 <= len(turns) <= 5
        for turn in turns:
            question, answer = (part.split() for part in turn.split(":"))
            tag, x, y = answer
            cell = int(x) // 250 + 4 * (int(y) // 250)
            assert tag == "<fast>" and shapes[cell] == question[0] and shapes.count(question[0]) == 1
            assert naming or len(question) == 1
            named = {1: 0, 4: 1, 7: 2}[len(question)]
            assert " ".join(question) == screens.instruction(number, cell, named)
            asked += named
    assert bool(asked) == naming


def test_labels_come_from_screens_that_the_base_has_not_seen(run, monkeypatch):
    seeds: list[int | None] = []
    draw = setup.gui_screens

    def watched(n: int, **options):
        seeds.append(options.get("seed"))
        return draw(n, **options)

    monkeypatch.setattr(setup, "gui_screens", watched)
    models = setup.trained(run, TINY)
    assert seeds == [None] * TINY.steps + [1_000_001, 1_000_002]
    assert set(models.label_rate) <= {"easy", "hard", "nested"}
    assert all(0 <= rate <= 1 for rate in models.label_rate.values())
