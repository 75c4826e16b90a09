"""The run of lscenellm: its arms select what they are said to, and each row can hold and fail."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.papers import _lscene_rows as rows
from headwise.papers import _lscene_setup as setup
from headwise.papers._lscene_setup import ALL, ARMS, COARSE, MAGNIFIER, PLUGGED, RANDOM, UNPLUGGED, Trained
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.tasks.coarse_to_fine import coarse_to_fine_scene

DETAILS = {COARSE: 0.12, MAGNIFIER: 0.9, RANDOM: 0.4, ALL: 0.94}


def made(**changes: Any) -> Trained:
    """Results under which every row holds; `detail_16={...}` and the like change some of them."""
    accuracy = {
        arm: {"detail 16": DETAILS[arm], "detail 4": DETAILS[arm], "kind 16": 0.95, "kind 4": 0.95} for arm in ARMS
    }
    result = Trained(
        setup.build(0).eval(),
        accuracy,
        found={COARSE: 0.0, MAGNIFIER: 0.95, RANDOM: 0.3, ALL: 1.0},
        other={COARSE: 0.0, MAGNIFIER: 0.2, RANDOM: 0.3, ALL: 1.0},
        read={COARSE: 0.0, MAGNIFIER: 0.2, RANDOM: 0.2, ALL: 1.0},
        parts={
            "no fine, detail": 0.12,
            "no fine, kind": 0.9,
            "no coarse, detail": 0.1,
            "no coarse, kind": 0.3,
            "all fine, only asked": 0.93,
            "all fine, others": 0.1,
        },
        plugged={PLUGGED: 0.8, UNPLUGGED: 0.12},
        seen={"coarse": 0.5, "fine": 0.8},
    )
    for name, values in changes.items():
        if name in ("detail_16", "detail_4", "kind_16"):
            for arm, value in values.items():
                accuracy[arm][name.replace("_", " ")] = value
        else:
            getattr(result, name).update(values)
    return result


FAILURES: list[tuple[str, dict[str, Any]]] = [
    ("redundant", {"detail_16": {COARSE: 0.26}}),
    ("redundant", {"kind_16": {COARSE: 0.79}}),
    ("redundant", {"parts": {"all fine, only asked": 0.88}}),
    ("adaptive", {"found": {MAGNIFIER: 0.79}}),
    ("adaptive", {"read": {MAGNIFIER: 0.36}}),
    ("adaptive", {"found": {RANDOM: 0.81}}),
    ("selector", {"other": {MAGNIFIER: 0.66}}),
    ("magnifies", {"detail_16": {MAGNIFIER: 0.41}}),
    ("fuses", {"parts": {"no fine, detail": 0.71}}),
    ("fuses", {"parts": {"no coarse, kind": 0.76}}),
    ("fuses", {"kind_16": {MAGNIFIER: 0.89}}),
    ("surpasses", {"detail_16": {COARSE: 0.61}}),
    ("surpasses", {"detail_16": {RANDOM: 0.76}}),
    ("surpasses", {"detail_16": {ALL: 0.96}}),
    ("surpasses", {"read": {MAGNIFIER: 0.36}}),
    ("surpasses", {"detail_4": {COARSE: 0.61}}),
    ("surpasses", {"detail_4": {RANDOM: 0.9}}),
    ("plug_in", {"plugged": {UNPLUGGED: 0.61}}),
    ("rooms", {"seen": {"coarse": 0.8}}),
]


@pytest.mark.parametrize(("row", "changes"), FAILURES, ids=lambda value: value if isinstance(value, str) else "")
def test_rows_hold_and_fail(row: str, changes: dict[str, Any]):
    assert getattr(rows, row)(made()).holds
    assert not getattr(rows, row)(made(**changes)).holds


def test_every_row_can_be_measured():
    paper = find_paper("lscenellm")
    measured = [claim.id for claim in paper.claims if claim.kind != "untestable"]
    assert all(callable(getattr(rows, name.replace("-", "_"))) for name in measured)
    assert len(measured) == 9


def test_the_limit_holds_and_would_show_a_difference(monkeypatch: pytest.MonkeyPatch):
    assert rows.limit(made()).holds
    monkeypatch.setattr(rows, "nothing", setup.everything)
    assert not rows.limit(made()).holds


def test_arms_select_what_they_are_said_to():
    preference = torch.rand(6, 5, 16)
    taken = setup.select_regions(preference)
    random = setup.at_random(1, preference)
    assert torch.equal(random.sum(-1), taken.sum(-1)) and not torch.equal(random, taken)
    assert not setup.nothing(1, preference).any() and setup.everything(1, preference).all()
    regions = torch.arange(6)
    own, rest = setup.only(regions), setup.only(regions, others=True)
    assert own is not None and own(1, preference)[2, 3].nonzero().flatten().tolist() == [2]
    assert rest is not None and rest(1, preference)[2, 3].sum() == 15


def test_selection_is_measured_at_the_row_of_the_answer():
    model: Any = setup.build(0).eval()
    scenes = coarse_to_fine_scene(5, seed=0)
    model.choose = setup.only(scenes.asked)
    chosen = setup.selections(model, scenes)
    assert chosen.shape == (5, 3, 16)  # layers 0 to 2 select for 1 to 3
    assert torch.equal(chosen[:, 0].int().argmax(-1), scenes.asked) and chosen.sum() == 15
    result = Trained(model)
    model.choose = None
    setup.measure_arm(result, MAGNIFIER, model, setup.tests(0, 12))
    assert 0 < result.read[MAGNIFIER] < 1 and set(result.accuracy[MAGNIFIER]) == {
        "detail 16", "detail 4", "kind 16", "kind 4"
    }  # fmt: skip
    assert model.choose is None


def test_a_few_steps_train_every_arm(tmp_path: Path):
    run = Run(find_paper("lscenellm"), 0, "cpu", tmp_path, say=lambda text: None)
    result = setup.train_all(run, steps=4, plug_steps=2, count=12)
    assert set(result.accuracy) == set(ARMS) and result.read[ALL] == 1 and result.read[COARSE] == 0
    assert set(result.plugged) == {PLUGGED, UNPLUGGED} and len(result.parts) == 6
    assert result.seen["fine"] > result.seen["coarse"]
    rows.draw(run, result)
    assert run.figures[0].stat().st_size > 1000
    model: Any = setup.train(setup.build(1), COARSE, 1, steps=3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    again: Any = setup.plug_in(model, 1, MAGNIFIER, steps=2)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())  # a copy was tuned
    untrained: Any = setup.build(1)
    fresh = untrained.magnifiers["2"].k_fine.weight
    assert torch.equal(model.magnifiers["2"].k_fine.weight, fresh)  # coarse only: fine keys never learn
    assert not torch.equal(again.magnifiers["2"].k_fine.weight, fresh)
