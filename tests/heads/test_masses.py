"""Masses on groups against materialised attention: grouped keys, padding, edits, and what is refused."""

import pytest
import torch
from tests.zoo import FAMILIES

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate
from headwise.attend.groups import first_token
from headwise.heads.masses import group_mass
from headwise.hf.session import steer
from headwise.specimens import planted


def eager(family: str, padding=None):
    model = FAMILIES[family].build()
    given = FAMILIES[family].inputs(model, padding=padding)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(model(**given, output_attentions=True).attentions, 1)  # b l h t s
    return FAMILIES[family].build(), given, weights


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masses_equal_sums_of_materialised_weights(family, padding):
    model, given, weights = eager(family, padding)
    b, t = given["input_ids"].shape
    real = given.get("attention_mask", torch.ones(b, t)).bool()
    group = (torch.rand(b, t, generator=torch.Generator().manual_seed(1)) < 0.4) & real
    found = group_mass(model, given, {"group": group, "first": first_token()}, rows=[t - 1 - i % 2 for i in range(b)])
    for i in range(b):
        row = weights[i, :, :, t - 1 - i % 2]
        torch.testing.assert_close(found["group"][i], (row * group[i]).sum(-1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["first"][i], row[..., int(real[i].int().argmax())], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_many_rows_are_reduced_over_those_that_are_asked_for(reduce):
    model, given, weights = eager("llama")
    b, t = given["input_ids"].shape
    rows = torch.zeros(b, t, dtype=torch.bool)
    rows[0, 2:5] = True
    rows[1, [1, t - 1]] = True
    group = torch.arange(t).expand(b, t) < 3
    found = group_mass(model, given, {"g": group}, rows=rows, reduce=reduce)["g"]
    each = (weights * group[:, None, None, None]).sum(-1)
    for i in range(2):
        inside = each[i][:, :, rows[i]]
        wanted = inside.mean(-1) if reduce == "mean" else inside.amax(-1)
        torch.testing.assert_close(found[i], wanted, atol=1e-5, rtol=1e-4)
    assert found[2:].isnan().all() or b == 2


def test_rows_beyond_a_few_are_read_in_blocks_with_the_same_numbers():
    model = planted.build()
    ids = planted.repeated(3, 16)
    b, t = ids.shape
    group = torch.arange(t).expand(b, t) % 3 == 0
    every = group_mass(model, ids, {"g": group}, rows=torch.ones(b, t, dtype=torch.bool), reduce="max")["g"]
    single = torch.stack([group_mass(model, ids, {"g": group}, rows=i)["g"] for i in range(t)])
    # Scores of some forty nats leave float32 this much.
    torch.testing.assert_close(every, single.amax(0), atol=1e-4, rtol=1e-4)


def test_planted_heads_give_all_to_what_they_were_planted_for():
    model = planted.build()
    ids = planted.repeated(8, 16)
    t = ids.shape[1]
    follows = torch.zeros_like(ids, dtype=torch.bool)
    follows[:, 11] = True  # what followed the first telling of the token at row 26
    before = torch.zeros_like(follows)
    before[:, 25] = True
    found = group_mass(model, ids, {"follows": follows, "before": before, "first": first_token()}, rows=26 - t)
    at = {name: mass.mean(0) for name, mass in found.items()}
    assert float(at["follows"][1, 0]) > 0.999 and float(at["before"][0, 0]) > 0.999 and float(at["first"][1, 1]) > 0.999
    assert float(at["first"][0, 0]) < 1e-3


def test_open_edits_act_and_unread_heads_are_nan():
    model = planted.build()
    ids = planted.repeated(2, 8)
    with steer(model, Ablate([Head(1, 1)], mode="uniform")):
        found = group_mass(model, ids, {"first": first_token()}, heads=["1.1"])["first"]
    torch.testing.assert_close(found[:, 1, 1], torch.full((2,), 1 / ids.shape[1]))
    assert found[:, 0].isnan().all() and found[:, 1, 0].isnan().all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"groups": {}}, "groups is empty"),
        ({"groups": {"g": torch.ones(2, 5, dtype=torch.bool)}}, "'g' is torch.bool of shape (2, 5)"),
        ({"rows": 17}, "row 17 is out of range"),
        ({"rows": [0, -18]}, "row -18 is out of range"),
        ({"rows": torch.ones(2, 3, dtype=torch.bool)}, "rows is a mask of shape (2, 3)"),
        ({"rows": [1, 2, 3]}, "rows has shape (3,)"),
    ],
)
def test_bad_input_is_refused(change, says):
    given = {"groups": {"first": first_token()}, **change}
    with pytest.raises((ValueError, TypeError)) as caught:
        group_mass(planted.build(), planted.repeated(2, 8), **given)
    assert says in str(caught.value)
