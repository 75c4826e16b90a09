"""The run of agent-attention: what it trains, swaps and times, and each row can hold and fail."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.attention import AgentAttention, SoftmaxAttention
from headwise.papers import _agent_rows as rows
from headwise.papers import _agent_setup as setup
from headwise.papers._agent_setup import (
    AGENT,
    AGENT_BARE,
    LINEAR_DWC,
    SOFTMAX,
    SOFTMAX_DWC,
    Fine,
    Speed,
    Swapped,
    Trained,
)
from headwise.papers.record import find_paper
from headwise.papers.running import Run

RUN = Run(find_paper("agent-attention"), 0, "cpu", Path("unused"), say=lambda text: None)


def trained(**changes: float) -> Trained:
    found = {SOFTMAX: 96.0, SOFTMAX_DWC: 97.0, LINEAR_DWC: 97.0, AGENT: 97.5, AGENT_BARE: 96.0}
    return Trained({kind: [changes.get(kind, value)] for kind, value in found.items()}, [])


def speed(at: float = 20.0, below: float = 4.0, growth: float = 5.0) -> Speed:
    return Speed({}, {784: below, 3136: at}, {"agent": growth, "softmax": 16.0})


def build(kind: str) -> Any:
    torch.manual_seed(0)
    return setup.build(kind).eval()


def test_the_convolution_is_all_that_the_control_adds():
    plain, control = build(SOFTMAX), build(SOFTMAX_DWC)
    assert isinstance(plain.blocks[0].attn, SoftmaxAttention)
    for one, other in zip(plain.blocks, control.blocks, strict=True):
        other.attn.load_state_dict({**one.attn.state_dict(), **{
            f"dwc.{name}": torch.zeros_like(p) for name, p in other.attn.dwc.named_parameters()}})  # fmt: skip
    x = torch.randn(2, 16, 32)
    torch.testing.assert_close(control.blocks[0].attn(x), plain.blocks[0].attn(x))
    agent = build(AGENT).blocks[0].attn
    assert isinstance(agent, AgentAttention) and agent.dwc is not None and agent.num_agents == 4
    assert agent.dwc.weight.shape == control.blocks[0].attn.dwc.weight.shape
    assert build(AGENT_BARE).blocks[0].attn.dwc is None


def test_linear_attention_is_a_weighted_mean():
    layer = build(LINEAR_DWC).blocks[0].attn
    x = torch.randn(1, 16, 32)
    with torch.no_grad():
        layer.dwc.weight.zero_()
        layer.dwc.bias.zero_()
        layer.qkv.weight[64:] = 0
        layer.qkv.bias[64:] = 1
    torch.testing.assert_close(layer(x), layer.proj(torch.ones(1, 16, 32)))


def test_a_swap_brings_no_parameter_and_keeps_the_model():
    model = build(SOFTMAX)
    before = copy.deepcopy(model.state_dict())
    changed = setup.with_agents(model, 4)
    assert changed.state_dict().keys() == before.keys()
    assert changed.blocks[0].attn.query_scale == pytest.approx(4**-0.15)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    same = setup.with_pooled_keys(model, 16)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(same(x).logits, model(x).logits)
    assert not torch.allclose(setup.with_pooled_keys(model, 4)(x).logits, model(x).logits)


def test_rows_hold_and_fail():
    assert rows.balance(trained(), speed()).holds
    assert not rows.balance(trained(**{AGENT: 95.9}), speed()).holds and not rows.balance(trained(), speed(4.9)).holds
    assert rows.classification(trained()).holds
    for change in ({SOFTMAX: 97.6}, {LINEAR_DWC: 98.6}):
        assert not rows.classification(trained(**change)).holds
    assert rows.beyond_convolution(trained()).holds
    assert not rows.beyond_convolution(trained(**{SOFTMAX_DWC: 97.6})).holds
    assert rows.integrates(trained(), RUN).holds and not rows.integrates(trained(**{SOFTMAX: 97.6}), RUN).holds
    fine = Fine({SOFTMAX: 96.0, SOFTMAX_DWC: 97.0, AGENT: 97.0})
    assert rows.high_resolution(fine, speed()).holds
    assert not rows.high_resolution(fine, speed(below=11.0)).holds
    assert not rows.high_resolution(Fine({**fine.points, SOFTMAX: 97.1}), speed()).holds


def test_efficient_looks_at_the_map(monkeypatch):
    monkeypatch.setattr(rows, "implied_maps", lambda model, run: (1e-5, 0.4))
    assert rows.efficient(trained(), speed(), RUN).holds
    for other in (speed(at=4.9), speed(growth=6.1)):
        assert not rows.efficient(trained(), other, RUN).holds
    monkeypatch.setattr(rows, "implied_maps", lambda model, run: (0.0, 0.4))
    assert not rows.efficient(trained(), speed(), RUN).holds


@torch.no_grad()
def test_the_maps_of_a_model():
    smallest, near = rows.implied_maps(build(AGENT), RUN)
    assert 0 < smallest < 1 / 16 and 0 < near < 1


def test_training_free_holds_and_fails():
    good: dict[str, Any] = {"before": 96.0, "agents": {4: 94.5}, "plain": {4: 95.0}, "pooled": {4: 30.0}}
    assert rows.training_free(Swapped(**good)).holds
    assert not rows.training_free(Swapped(**{**good, "agents": {4: 93.9}})).holds
    assert not rows.training_free(Swapped(**{**good, "pooled": {4: 64.6}})).holds


def test_identities():
    assert rows.definition(RUN).holds and rows.linear(RUN).holds
    assert rows.sizes().holds
