"""The run of ninformer: its controls are what they are said to be, and each row can hold and fail."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.papers import _ninformer_setup as rows
from headwise.papers._ninformer_setup import (
    DEEP_MIXER,
    MIXER,
    NIN,
    NO_MIXING,
    SUM,
    VIT,
    Counted,
    Trained,
)
from headwise.papers.record import find_paper
from headwise.papers.running import Run

RUN = Run(find_paper("ninformer"), 0, "cpu", Path("unused"), say=lambda text: None)


def trained(**changes: float) -> Trained:
    found = {NIN: 95.0, NO_MIXING: 70.0, SUM: 95.0, MIXER: 94.0, DEEP_MIXER: 96.0, VIT: 90.0}
    return Trained({kind: [changes.get(kind, value)] for kind, value in found.items()}, dict.fromkeys(found, 1.0))


def build(kind: str) -> Any:
    torch.manual_seed(0)
    return rows.build(kind).eval()


def test_sizes_of_the_controls():
    sizes = {kind: round(sum(p.numel() for p in build(kind).parameters()) / 1000) for kind in rows.KINDS}
    assert sizes == {NIN: 74, NO_MIXING: 65, SUM: 74, MIXER: 39, DEEP_MIXER: 77, VIT: 58}


def reach(kind: str) -> bool:
    """Whether another token reaches a token's output in the first block."""
    block = build(kind).blocks[0]
    x = torch.randn(1, 16, 48, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x)[:, 3].sum(), x)
    return bool(gradient[:, 5].any())


def test_only_the_gate_without_mixing_keeps_tokens_apart():
    assert {kind: reach(kind) for kind in rows.KINDS} == {
        NIN: True,
        NO_MIXING: False,
        SUM: True,
        MIXER: True,
        DEEP_MIXER: True,
        VIT: True,
    }


def test_the_sum_and_the_mixer_by_hand():
    x = torch.randn(2, 16, 48)
    product, added, alone = (build(kind).blocks[0] for kind in (NIN, SUM, MIXER))
    added.load_state_dict(product.state_dict())
    z = product.norm(x)
    torch.testing.assert_close(added.gate(z), product.gate.proj(z) + product.gate.mix(z))
    alone.load_state_dict(
        {name: value for name, value in product.gate.state_dict().items() if not name.startswith("proj")}
    )
    torch.testing.assert_close(alone(x), product.gate.mix(x))


def test_rows_hold_and_fail(monkeypatch):
    assert rows.better(trained()).holds
    assert not rows.better(trained(**{MIXER: 95.0})).holds and not rows.better(trained(**{VIT: 95.1})).holds
    assert "MLP-Mixer, 6 blocks 96.00 %" in (rows.better(trained()).control or "")
    assert rows.better_than_vit(trained()).holds and not rows.better_than_vit(trained(**{VIT: 94.1})).holds
    assert rows.needs_mixing(trained()).holds and not rows.needs_mixing(trained(**{NO_MIXING: 85.1})).holds
    monkeypatch.setattr(rows, "influence", lambda model, device: 0.1)
    assert rows.dynamic(trained(), RUN).holds and not rows.dynamic(trained(**{MIXER: 95.1}), RUN).holds
    monkeypatch.setattr(rows, "influence", lambda model, device: 0.0)
    assert not rows.dynamic(trained(), RUN).holds


def test_influence_is_of_other_tokens():
    assert rows.influence(build(NIN), "cpu") > 0
    with pytest.raises(AttributeError):
        rows.influence(build(MIXER), "cpu")
    assert rows.influence(build(NO_MIXING), "cpu") == 0


def test_what_is_counted():
    counted = Counted.of()
    assert rows.operations(counted).holds
    assert not rows.compute(counted).holds and "1.53 times" in rows.compute(counted).measured
    cheaper = {kind: dict(row) for kind, row in counted.blocks.items()}
    cheaper[NIN][64] = cheaper[VIT][64] - 1
    assert rows.compute(Counted(cheaper, counted.classifier)).holds
    assert not rows.operations(Counted(cheaper, counted.classifier)).holds
