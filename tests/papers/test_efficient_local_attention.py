"""The run of efficient-local-attention: its comparison modules, its rows on made-up accuracies, its networks."""

import math

import pytest
import torch
from torch import nn

from headwise.papers import _ela_rows as rows
from headwise.papers._ela_setup import (
    CA,
    CA_GROUP,
    CA_WIDE,
    CLUTTERED,
    COMPARED,
    ELA_B,
    MARKED,
    MODULES,
    NONE,
    SE,
    CanvasNet,
    CoordinateAttention,
    Trained,
    canvases,
    evidence_share,
    one_cycle,
    train,
)
from headwise.papers.record import find_paper
from headwise.papers.running import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(find_paper("efficient-local-attention"), 0, "cpu", tmp_path, say=lambda text: None)


def made(accuracy: float, name: str) -> Trained:
    model = CanvasNet(MODULES[name]).eval()
    added = sum(p.numel() for block in model.blocks for p in block.module.parameters())  # type: ignore[union-attr]
    right = torch.arange(1000) < round(1000 * accuracy)
    return Trained(model, right, added)


def found(**changed: float):
    marked = {NONE: 0.5, ELA_B: 0.95, CA: 0.9, CA_WIDE: 0.92, CA_GROUP: 0.93, SE: 0.4} | {
        {"none": NONE, "ela": ELA_B, "ca": CA, "se": SE, "wide": CA_WIDE}[name]: value
        for name, value in changed.items()
    }
    values = {(MARKED, name): marked.get(name, 0.9) for name in COMPARED[MARKED]}
    values |= {(CLUTTERED, name): 0.96 if name == ELA_B else 0.95 for name in COMPARED[CLUTTERED]}
    return {key: made(value, key[1]) for key, value in values.items()}


def test_parameters_of_the_modules():
    sizes = {name: found()[MARKED, name].added for name in (NONE, ELA_B, CA, SE)}
    assert sizes == {NONE: 0, ELA_B: 720, CA: 2152, SE: 666}


def test_rows_hold_and_fail_by_their_criteria():
    good = found()
    for row in (
        rows.attention_helps,
        rows.others_struggle,
        rows.substantial,
        rows.coordinate_limits,
        rows.superior,
        rows.beside_coordinate,
    ):
        assert row(good).holds, row
    assert not rows.attention_helps(found(ca=0.6)).holds and not rows.attention_helps(found(ela=0.6)).holds
    assert not rows.others_struggle(found(se=0.56)).holds
    assert not rows.substantial(found(se=0.85)).holds
    assert not rows.coordinate_limits(found(wide=0.905)).holds
    assert not rows.superior(found(ca=0.95)).holds
    assert not rows.beside_coordinate(found(ela=0.84)).holds
    assert rows.attention_helps(good).margin == pytest.approx(0.25)


def test_identities_and_sizes(run):
    assert rows.identities(run).holds and rows.four_versions().holds


def test_whole_networks_take_it(run):
    row = rows.integrates(run)
    assert row.holds, row.measured


def test_evidence_is_where_the_digit_is():
    """A network whose last map is the image itself, in rows of the canvas."""

    class Sees(CanvasNet):
        def features(self, images):
            return nn.functional.max_pool2d(images, 4).expand(-1, 32, -1, -1).clone()

    model = Sees(MODULES[NONE])
    nn.init.ones_(model.head.weight)
    data = canvases(MARKED, 0, test=True)
    share = evidence_share(Trained(model, torch.ones(1), 0), data)
    maps = model.features(data.images)[:, 0]
    top = maps.flatten(1).argmax(1) // maps.shape[2] // 2
    assert torch.equal(share > 0.5, top == data.corners[:, 0] // 8) and 0 < share.mean() < 1


def test_coordinate_attention_sees_its_batch_only_in_training():
    torch.manual_seed(0)
    module, x = CoordinateAttention(16), torch.randn(3, 16, 5, 7)
    assert not torch.allclose(module(x[:1]), module(x)[:1], atol=1e-3)
    module.eval()
    torch.testing.assert_close(module(x[:1]), module(x)[:1])
    strips = module.norm(module.squeeze(torch.cat([x.mean(3), x.mean(2)], 2)))
    strips = strips * (strips + 3).clamp(0, 6) / 6
    want = x * module.rows(strips[..., :5]).sigmoid()[..., None] * module.columns(strips[..., 5:]).sigmoid()[:, :, None]
    torch.testing.assert_close(module(x), want)


def test_the_schedule_rises_and_falls():
    values = [one_cycle(step, 100) for step in range(101)]
    assert values[0] == pytest.approx(0.04) and values[30] == pytest.approx(1) and values[100] == pytest.approx(0)
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in values)


def test_training_repeats():
    one, two = (train(CLUTTERED, ELA_B, 5, steps=3) for _ in range(2))
    assert torch.equal(one.model.head.weight, two.model.head.weight)


def test_the_picture_is_drawn(run):
    rows.draw(run, found())
    assert run.figures[-1].stat().st_size > 10_000


@pytest.mark.slow
def test_the_whole_run_gives_every_row(run):
    from headwise.papers import efficient_local_attention

    measured = efficient_local_attention.reproduce(run)
    assert set(measured) == {row.id for row in run.paper.claims}
