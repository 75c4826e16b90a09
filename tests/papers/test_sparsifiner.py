"""The run of sparsifiner: its choices of keys are what they are said to be, and each row can hold and fail."""

import copy
from typing import Any

import pytest
import torch

from headwise.attention.sparsifiner import predictor_loss
from headwise.models.sparsifiner import SparsifinerViT
from headwise.papers import _sparsifiner_rows as rows
from headwise.papers import _sparsifiner_setup as setup
from headwise.papers._sparsifiner_setup import BOTH_NAME, LEARNED, ORACLE, RANDOM, TOKENS, UNTRAINED, WINDOW, Trained
from headwise.tasks.digits import digit_images

MASS = {LEARNED: 0.6, UNTRAINED: 0.25, RANDOM: 0.26, WINDOW: 0.3, ORACLE: 0.7}


def dense() -> SparsifinerViT:
    torch.manual_seed(0)
    return SparsifinerViT(setup.small()).set_mode("dense").eval()


def trained(mass: Any = None, products: Any = None, **tuned: Any) -> Trained:
    model = dense()
    made = Trained(model, setup.with_options(model, "sparse"), digit_images(), 0.9)
    made.mass = MASS | (mass or {})
    made.untuned = {LEARNED: 0.88, RANDOM: 0.6, UNTRAINED: 0.6, WINDOW: 0.6, ORACLE: 0.88}
    made.tuned = {LEARNED: 0.9, RANDOM: 0.85, TOKENS: 0.88, BOTH_NAME: 0.87} | tuned
    made.products = {LEARNED: 0.8, TOKENS: 0.81, BOTH_NAME: 0.6} | (products or {})
    made.networks = {TOKENS: setup.with_options(model, "dense", token_keep=0.8)}
    return made


def test_choices_hold_their_budget():
    model, x = dense(), digit_images().test_images[:4]
    q, k = setup.layer_queries(model, x)[1]
    rows_of = (q[:, :, 1:] @ k.mT * 8**-0.5).softmax(-1)
    kept = {kind: setup.Chooser(kind, 17)(q, k) for kind in (RANDOM, WINDOW, ORACLE)}
    for indices in kept.values():
        assert indices.shape == (4, 4, 64, 17) and all(len(set(row)) == 17 for row in indices[0, 0].tolist())
    assert bool((kept[RANDOM] == 0).any(-1).all()) and bool((kept[WINDOW] == 0).any(-1).all())
    middle = kept[WINDOW][0, 0, 27].sort().values - 1  # the pixel in row 3, column 3
    assert bool(((middle[1:] // 8 - 3).abs() <= 2).all()) and bool(((middle[1:] % 8 - 3).abs() <= 2).all())
    mass = {kind: float(rows_of.gather(-1, indices).sum(-1).mean()) for kind, indices in kept.items()}
    assert mass[ORACLE] == max(mass.values()) > 17 / 65
    assert float(rows_of.topk(17).values.sum(-1).mean()) == pytest.approx(mass[ORACLE])


def test_pruning_of_equal_cost():
    model = dense()
    whole = model.products()
    share = setup.cheapest_pruning(model, 0.8 * whole)
    assert setup.with_options(model, "dense", token_keep=share).products() >= 0.8 * whole
    assert setup.with_options(model, "dense", token_keep=share - 0.01).products() < 0.8 * whole


def test_stages_learn():
    data = digit_images(200)
    model = setup.train_dense(0, data, steps=60)
    found = setup.train_predictor(model, 0, data, steps=40)
    errors = []
    for one in (copy.deepcopy(model), copy.deepcopy(found)):
        one.set_mode("predict").forward_features(data.test_images[:20])
        errors.append(predictor_loss(one).item())
    assert errors[1] < 0.8 * errors[0]
    before = found.head.weight.clone()
    setup.tune(found, model, 0, data, steps=3)
    assert not torch.equal(found.head.weight, before) and all(layer.mode == "sparse" for layer in found.attentions())


def test_rows_hold_and_fail():
    good = trained()
    assert rows.structured(good).holds and not rows.structured(trained(mass={WINDOW: 0.61})).holds
    assert rows.predictor(good).holds and not rows.predictor(trained(mass={LEARNED: 0.49})).holds
    assert not rows.predictor(trained(mass={UNTRAINED: 0.6})).holds
    assert rows.sparse_masks(good).holds and not rows.sparse_masks(trained(mass={ORACLE: 0.59})).holds
    assert rows.pareto(good).holds and not rows.pareto(trained(**{TOKENS: 0.9})).holds
    assert not rows.pareto(trained(products={TOKENS: 0.79})).holds
    assert rows.combined(good).holds and not rows.combined(trained(**{BOTH_NAME: 0.85})).holds
    assert rows.tuned(good).holds and not rows.tuned(trained(**{LEARNED: 0.88})).holds
    assert not rows.tuned(trained(**{RANDOM: 0.89})).holds
    assert rows.at_once(good).holds
    good.untuned[LEARNED] = 0.85
    assert not rows.at_once(good).holds
    assert rows.limit(good).holds and rows.products().holds


def test_efficient_counts_the_predictor_and_the_drop():
    empty = trained()
    for layer in empty.predictor.attentions():
        torch.nn.init.zeros_(layer.mask_predictor.proj_back_n)
    assert rows.efficient(empty).holds
    empty.tuned[LEARNED] = 0.89
    assert not rows.efficient(empty).holds
    full = trained()
    for layer in full.predictor.attentions():
        torch.nn.init.ones_(layer.mask_predictor.proj_back_n)
    assert not rows.efficient(full).holds
