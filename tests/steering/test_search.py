"""Searching heads: what helps is found, what does not help does not beat chance."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.models_under_test import HEADS, LAYERS, text, tiny_llama
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.attend.edits import ScaleHeads
from headwise.errors import InputError
from headwise.hf.addresses import layout
from headwise.hf.session import steer
from headwise.steering.search import HeadSearch, changes, search_heads
from headwise.steering.zero_tuning import ZeroTuning, tune_initial_token

PROMPTS = 60


class Made:
    """Stands for a model whose prompts gain `worth[head]` when an edit names a head, times a bell around `best`.

    The score is asked for while the edit is open; `edit` notes the heads that it was made with.
    """

    def __init__(
        self, worth: dict[Head, float], best: float = 2.0, noise: float = 0.1, shared: bool = False, heads: int = HEADS
    ):
        self.worth, self.best, self.noise, self.shared = worth, best, noise, shared
        config = tiny_llama().config
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 8 * heads, heads, heads
        self.model: Any = tiny_llama(config=config)
        self.open: tuple[list[Head], float] | None = None
        self.asked: list[str] = []

    def edit(self, heads: list[Head], strength: float = 2.0) -> ScaleHeads:
        made, outer = ScaleHeads(scale=strength, heads=heads), self
        plain = made.primitives

        def primitives():  # called when the edit is opened
            outer.open = (heads, strength)
            return plain()

        made.primitives = primitives
        return made

    def score(self, split: str, seed: int) -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        own = torch.randn(PROMPTS, generator=generator)

        def run() -> Tensor:
            self.asked.append(split)
            (heads, strength), self.open = self.open or ([], self.best), None
            gain = sum(self.worth.get(head, 0.0) for head in heads) * math.exp(-((strength - self.best) ** 2))
            noise = 0.0 if self.shared else self.noise * torch.randn(PROMPTS, generator=generator)
            return own + gain + noise

        return run

    def search(self, **options: Any):
        return search_heads(self.model, self.edit, self.score("calibration", 1), self.score("unseen", 2), **options)


PLANTED = Head(1, 2)


def test_a_planted_head_is_found_and_beats_chance():
    made = Made({PLANTED: 0.5}, noise=0.05, shared=True)
    found = made.search()
    assert found.heads == [PLANTED] and found.strength is None
    assert found.gain == pytest.approx(0.5, abs=1e-5) and found.calibration_gain == pytest.approx(0.5, abs=1e-5)
    assert found.map.of("gain")[Head(0, 0)] == pytest.approx(0, abs=1e-6)
    assert len(found.random) == 3 and (found.random.abs() < 1e-5).all()  # all other sets of one head of layer 1
    assert float(found.all_heads.mean()) == pytest.approx(0.5, abs=1e-5)


def test_the_planted_heads_among_noise():
    worth = {PLANTED: 0.6, Head(0, 1): 0.4, Head(1, 3): -0.5, Head(0, 3): -0.3}
    found = Made(worth, noise=0.3, heads=12).search(margin=3.0, draws=40)
    assert found.heads == [Head(0, 1), PLANTED]
    assert found.beats_chance and "it beats chance" in str(found)
    assert found.gain > float(found.random.max()) and found.gain > float(found.all_heads.mean()) + 0.5
    loose = Made(worth, noise=0.3, heads=12).search(draws=3)
    assert {PLANTED, Head(0, 1)} < set(loose.heads) and not {Head(1, 3), Head(0, 3)} & set(loose.heads)


@pytest.mark.parametrize("seed", range(6))
def test_noise_does_not_beat_chance(seed):
    made = Made({}, noise=1.0)
    found = search_heads(
        made.model,
        made.edit,
        made.score("calibration", 10 + seed),
        made.score("unseen", 50 + seed),
        strengths=(1.5, 3.0),
    )
    # a search always finds something
    assert found.heads and any((gain or 0) > 0 for gain in found.map.of("gain").values())
    assert not found.beats_chance
    assert "it does not beat chance" in str(found)


def test_heads_that_only_harm_are_not_kept():
    found = Made(dict.fromkeys(layout(tiny_llama()).heads(), -1.0), shared=True).search()
    assert found.heads == [] and found.strength is None and found.gain == 0 and not found.beats_chance
    assert "no head helps by itself" in str(found)
    assert float(found.all_heads.mean()) == pytest.approx(-8)


def test_the_strength_is_chosen_on_the_calibration_prompts_for_every_set():
    made = Made({PLANTED: 0.5, Head(1, 0): 0.2}, best=3.0, shared=True)
    found = made.search(strengths=(1.0, 2.0, 3.0, 4.0), probes=(2.5,))
    assert found.strength == 3.0 and max(found.curve, key=lambda s: found.curve[s]) == 3.0
    assert list(found.map.scores) == ["gain at 2.5"]
    # Random sets hold one of the two or none, at their own best strength.
    assert set(found.random.mul(10).round().int().tolist()) <= {0, 2, 5}
    # The choice was made before the unseen prompts were asked again.
    first = next(i for i, split in enumerate(made.asked[2:], 2) if split == "unseen")
    assert made.asked[2:first].count("calibration") >= LAYERS * HEADS + 4


def test_the_kind_that_gains_more_is_kept():
    """Two strengths of single heads: those that gain at the first, and those that gain at the second."""
    model = tiny_llama()
    opened: list[tuple[list[Head], float]] = []

    def edit(heads: list[Head], strength: float) -> ScaleHeads:
        opened.append((heads, strength))
        return ScaleHeads(scale=strength, heads=heads)

    likes = {Head(0, 0): 1.0, Head(0, 2): 1.0, Head(1, 1): -1.5}  # more, more, less

    def score() -> Tensor:
        heads, strength = opened.pop() if opened else ([], 1.0)
        return torch.full((5,), sum(likes.get(head, 0.0) * math.log(strength) for head in heads))

    found = search_heads(model, edit, score, score, strengths=(0.5, 1.0, 2.0), probes=(1.5, 1 / 1.5))
    assert found.heads == [Head(0, 0), Head(0, 2)] and found.strength == 2.0
    assert list(found.map.scores) == ["gain at 1.5", "gain at 0.666667"]
    assert found.gain == pytest.approx(2 * math.log(2))


def test_heads_that_fill_their_layers_leave_no_null():
    found = Made(dict.fromkeys(layout(tiny_llama()).heads(), 0.1), shared=True).search()
    assert len(found.heads) == LAYERS * HEADS and len(found.random) == 0 and found.p_value == 1
    assert "no other set of such heads exists: it does not beat chance" in str(found).replace(", all heads +0.8000", "")


def test_candidates_bound_the_search():
    found = Made({PLANTED: 0.5, Head(0, 0): 0.5}, shared=True).search(candidates="1.*", draws=3)
    assert found.heads == [PLANTED]
    assert set(found.map.ranked()) == {Head(1, head) for head in range(HEADS)}


def test_half_of_the_prompts_are_held_out():
    """Prompt i gains i under the planted head: the halves share no prompt and make up all of them."""
    made = Made({})

    def score() -> Tensor:
        (heads, _), made.open = made.open or ([], 0.0), None
        return torch.arange(9.0) * (PLANTED in heads)

    found = search_heads(made.model, made.edit, score, draws=3, seed=4)
    unseen = set(found.held_out.tolist())
    assert found.heads == [PLANTED] and len(unseen) == 4
    others = set(range(9)) - unseen
    assert found.calibration_gain == pytest.approx(sum(others) / 5)
    again = search_heads(made.model, made.edit, score, draws=3, seed=5)
    assert set(again.held_out.tolist()) != unseen
    with pytest.raises(ValueError, match=r"at least two where half of them are held out"):
        search_heads(made.model, made.edit, lambda: torch.zeros(1))


def test_an_edit_that_gains_nothing_says_so():
    found = Made({PLANTED: 0.5}, shared=True).search(draws=3)
    assert "gains nothing" not in str(found)
    found.held_out = -found.held_out
    assert "the edit gains nothing here" in str(found)


def test_a_search_is_saved_and_read(tmp_path: Path):
    found = Made({PLANTED: 0.5}, best=3.0).search(strengths=(1.0, 3.0), probes=(2.5,), draws=4)
    found.save(tmp_path / "found.json")
    read = HeadSearch.load(tmp_path / "found.json")
    assert read.heads == found.heads and read.strength == found.strength and read.curve == found.curve
    assert read.map.scores == found.map.scores and read.baseline == found.baseline
    assert torch.equal(read.held_out, found.held_out) and torch.equal(read.random, found.random)
    assert torch.equal(read.all_heads, found.all_heads) and str(read) == str(found)
    assert read.baseline[0] == pytest.approx(float(Made({}).score("calibration", 1)().mean()), abs=0.1)
    (tmp_path / "other.json").write_text('{"schema": 1, "held_out": [0.1]}')
    with pytest.raises(InputError, match=r"other.json: is damaged"):
        HeadSearch.load(tmp_path / "other.json")
    with pytest.raises(InputError, match="is no head search of schema 1"):
        HeadSearch.from_json({"schema": 1})


def test_a_search_that_was_killed_goes_on(tmp_path: Path):
    model, file = tiny_llama(), tmp_path / "search.jsonl"
    score, held_out = losses(model, text(6, 10)), losses(model, text(6, 10, seed=5))
    runs, limit = [0], [5]

    def counted() -> Tensor:
        runs[0] += 1
        if runs[0] > limit[0]:
            raise KeyboardInterrupt
        return score()

    def search(measure: Callable[[], Tensor], gamma: float = 3.0, **options: Any) -> HeadSearch:
        return search_heads(
            model, lambda heads: ZeroTuning(gamma=gamma, heads=heads), measure, held_out, draws=3, **options
        )

    with pytest.raises(KeyboardInterrupt):
        search(counted, resume=file)
    done = len(file.read_text().splitlines()) - 1
    assert done == 4  # the plain model is not a measurement
    with file.open("a") as broken:
        broken.write('{"of": ["score", ["1.')
    limit[0], runs[0] = 10**6, 0
    steps: list[tuple[int, int]] = []
    found, whole = search(counted, resume=file, progress=lambda *at: steps.append(at)), search(score)
    assert found.heads == whole.heads and found.map.scores == whole.map.scores
    assert torch.equal(found.held_out, whole.held_out) and torch.equal(found.random, whole.random)
    fresh = runs[0] - 1
    assert fresh + done == len({line for line in file.read_text().splitlines()[1:] if '"score"' in line})
    assert [at for at, _ in steps] == list(range(1, len(steps) + 1)) and steps[-1][0] <= steps[-1][1]
    runs[0] = 0
    search(counted, resume=file)
    assert runs[0] == 1  # the plain model, to see that the file is of this search
    with pytest.raises(InputError, match="belongs to another search: its edit is another"):
        search(score, gamma=2.0, resume=file)
    with pytest.raises(InputError, match="belongs to another search"):
        search(losses(model, text(6, 10, seed=9)), resume=file)


def test_changes_are_against_the_plain_model():
    model, ids = tiny_llama(), text(3, 9)

    def score() -> Tensor:
        return model(input_ids=ids).logits.square().mean((1, 2))

    found = changes(model, {gamma: ZeroTuning(gamma=gamma) for gamma in (1.0, 3.0)}, score)
    assert torch.equal(found[1.0], torch.zeros(3))
    with torch.no_grad(), steer(model, ZeroTuning(gamma=3.0)):
        edited = score()
    torch.testing.assert_close(found[3.0], edited - score().detach())


def losses(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        logits = model(input_ids=ids).logits
        return -torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)

    return run


def test_tuning_the_first_token_of_a_model():
    """On the prompts it was tuned on, the choice gains what its curve says; 1 is one of the grid."""
    model = tiny_llama()
    score, held_out = losses(model, text(6, 10)), losses(model, text(6, 10, seed=5))
    found = tune_initial_token(model, score, held_out, gammas=(0.3, 1.0, 3.0), draws=3)
    assert found.heads and found.strength in found.curve
    assert found.curve[1.0] == 0 and found.calibration_gain == max(found.curve.values()) >= 0
    edit = ZeroTuning(gamma=found.strength or 1.0, heads=found.heads)
    assert float(changes(model, {0: edit}, score)[0].mean()) == pytest.approx(found.calibration_gain, abs=1e-6)
    torch.testing.assert_close(changes(model, {0: edit}, held_out)[0], found.held_out)
    again = tune_initial_token(model, score, held_out, gammas=(0.3, 1.0, 3.0), draws=3)
    assert again.heads == found.heads and torch.equal(again.random, found.random)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gammas": ()}, r"gammas are \[\]; give at least one"),
        ({"gammas": (1.0, -2.0)}, r"gammas are \[1.0, -2.0\]; give at least one, all 0 or more"),
        ({"gammas": (1.0, math.nan)}, r"all 0 or more"),
        ({"probe": 1.0}, r"probe is 1.0; it must be above 1"),
        ({"heads": "7.0"}, r"layer 7 is out of range"),
    ],
)
def test_refusals(options, message):
    model = tiny_llama()
    score = losses(model, text())
    with pytest.raises(ValueError, match=message):
        tune_initial_token(model, score, score, **options)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(2, 2), r"a score returned \(2, 2\); it must return one number a prompt"),
        (torch.zeros(0), r"a score returned \(0,\)"),
        (torch.tensor([0.0, math.nan]), r"1 of 2 scores are not finite"),
    ],
)
def test_scores_are_one_number_a_prompt(scores, message):
    with pytest.raises(ValueError, match=message):
        search_heads(tiny_llama(), lambda heads: ScaleHeads(scale=0.0, heads=heads), lambda: scores, lambda: scores)
