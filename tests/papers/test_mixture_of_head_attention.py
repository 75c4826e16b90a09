"""The run of mixture-of-head-attention: its networks are what they are said to be, and each row can hold and fail."""

from typing import Any

import torch

from headwise.attention.mixture_of_head import MixtureOfHeads
from headwise.models.small_vit import SmallViT
from headwise.papers import _moh_rows as rows
from headwise.papers import _moh_setup as setup
from headwise.papers._moh_setup import GATED, MHA, MOH_50, MOH_75, Converted, Networks
from headwise.tasks.digits import digit_images

EVEN = (0.5, 0.7)


def networks(usage: Any = EVEN, **accuracies: Any) -> Networks:
    given = {MHA: 0.95, GATED: 0.96, MOH_75: 0.96, MOH_50: 0.955} | accuracies
    models = {kind: [setup.network(kind, 0).eval()] for kind in given}
    return Networks(
        models, {kind: [one] for kind, one in given.items()}, {kind: usage for kind in setup.TOP_K}, digit_images()
    )


def times(ratio: float) -> rows.Times:
    return {(n, k, c): (ratio, 1.0) for n in (1024, 2048) for k in (4, 8) for c in (False, True)}


def test_networks_differ_in_their_attention_alone():
    made: dict[str, Any] = {kind: setup.network(kind, 3) for kind in (MHA, GATED, MOH_75, MOH_50)}
    splits = {kind: model.blocks[0].attn.router.split for kind, model in made.items() if kind != MHA}
    assert splits == {GATED: (8, 2, 6), MOH_75: (8, 2, 4), MOH_50: (8, 2, 2)}
    extra = {name for name, _ in made[MOH_75].named_parameters()} - {name for name, _ in made[MHA].named_parameters()}
    assert all(".router." in name for name in extra)


def test_a_short_training_learns_and_balances():
    data = digit_images(200)
    model = setup.network(MOH_75, 0)
    before = setup.accuracy(model.eval(), data)
    setup.train(model, data, steps=100, rate=4e-3, seed=0)
    assert setup.accuracy(model, data) > before + 0.1
    assert len(setup.routed_usage(model, data)) == 12


def test_random_routers_choose_two_of_four():
    dense = setup.network(MHA, 0)
    model: Any = setup.with_random_routers(setup.convert(dense, to="mixture-of-head", active=0.75, shared=0.5))
    router = model.blocks[0].attn.router
    gates = router(torch.randn(2, 8, 50, 4)).gates
    assert gates.shape == (2, 50, 8) and torch.equal(gates.sum(-1), torch.full((2, 50), 6.0))
    assert gates[..., 4:].mean(dim=(0, 1)).min() > 0.2
    assert isinstance(model, SmallViT) and isinstance(model.blocks[0].attn, MixtureOfHeads)


def test_summation_holds_for_a_layer_and_fails_for_another_sum():
    found = rows.summation(networks())
    assert found.holds and found.values["exchanged"] > 1e-3


def test_efficient_holds_and_fails():
    good = networks()
    assert not rows.efficient(good, times(0.6)).holds, "routers are parameters"
    assert rows.efficient(good, times(0.6)).values["parameters"] > 0
    good.models[MOH_75] = good.models[MHA]  # type: ignore[index]
    assert rows.efficient(good, times(0.6)).holds
    assert not rows.efficient(good, times(1.1)).holds
    for change in (networks(usage=[0.01, 0.5]), networks(**{MOH_75: 0.94})):
        change.models[MOH_75] = change.models[MHA]  # type: ignore[index]
        assert not rows.efficient(change, times(0.6)).holds


def test_differences_must_be_gains():
    assert rows.weighted(networks()).holds and not rows.weighted(networks(**{GATED: 0.95})).holds
    assert rows.outperforms(networks()).holds and not rows.outperforms(networks(**{MOH_50: 0.949})).holds
    assert rows.non_inferior(networks(**{MOH_75: 0.935})).holds
    assert not rows.non_inferior(networks(**{MOH_75: 0.929})).holds
    assert not rows.non_inferior(networks(usage=[0.2, 0.97])).holds


def test_continue_tuned_holds_and_fails():
    def converted(at_once: float, tuned: float) -> Converted:
        return Converted([at_once], [tuned], [0.5], [0.9], [0.95])

    assert rows.continue_tuned(networks(), converted(0.8, 0.94)).holds
    assert not rows.continue_tuned(networks(), converted(0.8, 0.90)).holds
    assert not rows.continue_tuned(networks(), converted(0.95, 0.94)).holds


def test_speed_and_limit_and_counts():
    assert rows.speed(times(0.9)).holds and not rows.speed(times(1.0)).holds
    assert rows.limit(networks()).holds and rows.activated().holds
    assert 0 < rows.router_share() < 0.02
