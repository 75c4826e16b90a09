"""Subspaces of a head: identity at full rank, the mean at rank 0, directions that were planted, and what is refused."""

import pytest
import torch
from tests.zoo import FAMILIES

from headwise.attend.addresses import Head
from headwise.attend.edits import ProjectHead
from headwise.attend.groups import positions
from headwise.errors import UnsupportedModel
from headwise.heads.subspaces import at_places, head_vectors, label_pattern, subspace
from headwise.hf.maps import attention_maps
from headwise.hf.session import steer

HEAD = Head(1, 2)
PLACES = torch.tensor([[1, 3, 5]])


@pytest.fixture
def llama():
    model = FAMILIES["llama"].build()
    ids = FAMILIES["llama"].inputs(model)["input_ids"]
    return model, ids, PLACES.expand(len(ids), -1)


def logits(model, ids, *edits):
    with torch.no_grad(), steer(model, *edits):
        return model(input_ids=ids).logits


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_all_directions_are_the_identity(llama, part):
    model, ids, places = llama
    size = head_vectors(model, ids, HEAD)[part].shape[-1]
    found = subspace(model, HEAD, part, ids, places, rank=size)
    torch.testing.assert_close(found.basis.mT @ found.basis, torch.eye(size), atol=1e-5, rtol=0)
    assert found.explained == pytest.approx(1)
    whole = logits(model, ids)
    assert (logits(model, ids, found.edit()) - whole).abs().max() < 1e-5
    vectors = head_vectors(model, ids, HEAD)[part].double()
    exact = found.basis.double() @ found.basis.double().mT
    assert (vectors @ exact - vectors).abs().max() < 1e-6 * max(1.0, float(vectors.abs().max())) * 10


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_no_direction_leaves_the_mean_at_the_group_and_nothing_else_changes(llama, part):
    model, ids, places = llama
    found = subspace(model, HEAD, part, ids, places, rank=0)
    group = torch.zeros_like(ids, dtype=torch.bool).scatter(1, places, True)
    plain = head_vectors(model, ids, HEAD)[part]
    vectors = torch.where(group[..., None], found.mean, plain)
    same = {name: head_vectors(model, ids, HEAD)[name] for name in "qkv"} | {part: vectors}
    t = ids.shape[1]
    scores = same["q"] @ same["k"].mT * same["q"].shape[-1] ** -0.5
    wanted = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf).softmax(-1)
    with steer(model, found.edit(positions(group))):
        maps = attention_maps(model, ids, [HEAD, Head(1, 0)])
    torch.testing.assert_close(maps[:, 0], wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps[:, 1], attention_maps(model, ids, [Head(1, 0)])[:, 0])


def test_random_basis_of_one_rank_is_orthonormal_and_another(llama):
    model, ids, places = llama
    found = subspace(model, HEAD, "k", ids, places, rank=2)
    drawn = found.random(torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.basis.mT @ drawn.basis, torch.eye(2), atol=1e-5, rtol=0)
    assert drawn.rank == 2 and torch.equal(drawn.mean, found.mean)
    assert not torch.allclose(drawn.basis @ drawn.basis.mT, found.basis @ found.basis.mT, atol=1e-2)
    assert found.truncated(1).basis.shape[1] == 1
    with pytest.raises(ValueError, match="rank is 3; expected 0 to 2"):
        found.truncated(3)


def test_classes_span_one_direction_less_than_there_are(llama):
    model, ids, places = llama
    by = torch.arange(places.shape[1]).expand_as(places)
    found = subspace(model, HEAD, "k", ids, places, rank=2, by=by)
    vectors = at_places(head_vectors(model, ids, HEAD)["k"], places).double()
    means = (vectors - vectors.mean(1, keepdim=True)).mean(0)
    left = means - (means @ found.basis.double()) @ found.basis.double().mT
    assert left.abs().max() < 1e-5
    assert float(found.strength[2:].abs().max()) < 1e-5 * float(found.strength[0])


def test_before_rotary_is_what_the_projections_say_and_is_refused_where_they_are_fused(llama):
    model, ids, _ = llama
    before, after = (head_vectors(model, ids, HEAD, rotary=kind) for kind in ("before", "after"))
    torch.testing.assert_close(before["v"], after["v"])
    torch.testing.assert_close(before["q"][:, 0], after["q"][:, 0])  # position 0 is not turned
    assert not torch.allclose(before["q"][:, 3], after["q"][:, 3], atol=1e-3)
    torch.testing.assert_close(before["k"].norm(dim=-1), after["k"].norm(dim=-1))
    space = subspace(model, HEAD, "k", ids, PLACES.expand(len(ids), -1), rank=1, rotary="before")
    with pytest.raises(ValueError, match="before rotary embedding"):
        space.edit()
    gpt2 = FAMILIES["gpt2"].build()
    with pytest.raises(UnsupportedModel, match="no q_proj"):
        head_vectors(gpt2, FAMILIES["gpt2"].inputs(gpt2)["input_ids"], "0.0", rotary="before")


def test_pattern_among_labels_is_the_maps_own_renormalised(llama):
    model, ids, places = llama
    found = head_vectors(model, ids, HEAD)
    pattern = label_pattern(found["q"][:, -1], at_places(found["k"], places))
    row = attention_maps(model, ids, [HEAD], rows=[-1])[:, 0, 0].gather(1, places)
    torch.testing.assert_close(pattern, row / row.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_bad_input_is_refused(llama):
    model, ids, places = llama
    with pytest.raises(ValueError, match="places has shape"):
        subspace(model, HEAD, "k", ids, places + 1000, rank=1)
    with pytest.raises(ValueError, match="rank is 99"):
        subspace(model, HEAD, "k", ids, places, rank=99)
    with pytest.raises(ValueError):
        subspace(model, "9.9", "k", ids, places, rank=1)
    mean = torch.zeros(3)
    size = head_vectors(model, ids, HEAD)["k"].shape[-1]
    with pytest.raises(ValueError, match="mean has 3 entries"):
        logits(model, ids, ProjectHead("k", torch.eye(size), heads=[HEAD], mean=mean))
