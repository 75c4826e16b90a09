"""Semantic distances of a model's heads: those by which Task-KV splits, and by hand from the maps."""

import pytest
import torch
from tests.zoo import FAMILIES

from headwise.attend.addresses import Head
from headwise.errors import UnsupportedModel
from headwise.heads.semantics import semantic_distances
from headwise.hf.addresses import layout
from headwise.hf.maps import attention_maps
from headwise.memory.budget_policies import TaskKVPolicy
from headwise.memory.task_kv import HeadBudgetCache


@pytest.mark.parametrize("padding", [None, "left"])
def test_they_are_those_by_which_task_kv_splits(padding):
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model, 3, 40, padding)
    found = semantic_distances(model, inputs, window=6, top=9, pool=3)
    policy = TaskKVPolicy(0.6, 2, 8, 6, 9, 3)
    cache = HeadBudgetCache(model, policy, chunked=True)
    with torch.no_grad():
        model(**inputs, cache=cache)
    for prompt in cache.prompts():
        wanted = policy.distances(prompt, policy.scores(prompt))
        for row, run in enumerate(found.runs["semantic-distance"]):
            mine = [run[Head(prompt.layer, head)] for head in range(4)]
            assert mine == pytest.approx([float(wanted[row, head // 2]) for head in range(4)], rel=1e-5)
    means = found.of("semantic-distance")
    runs = found.runs["semantic-distance"]
    assert len(runs) == 3 and means[Head(1, 3)] == pytest.approx(sum(run[Head(1, 3)] for run in runs) / 3)


def test_they_follow_from_the_maps_and_the_values():
    """One head for each key head; all rows, all keys, nothing smoothed."""
    model = FAMILIES["gpt_neox"].build()
    inputs = FAMILIES["gpt_neox"].inputs(model, 1, 12)
    values = {}
    handle = model.gpt_neox.layers[0].attention.query_key_value.register_forward_hook(
        lambda module, args, out: values.update(v=out.view(1, 12, 4, 24)[..., 16:])
    )
    maps = attention_maps(model, inputs, "0.*")
    handle.remove()
    vectors = torch.einsum("hs,she->he", maps[0].mean(1), values["v"][0].detach())
    wanted = (vectors - vectors.mean(0)).norm(dim=-1)
    found = semantic_distances(model, [inputs["input_ids"]], window=12, top=None, pool=1).of("semantic-distance")
    assert [found[Head(0, head)] for head in range(4)] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert set(found) == set(layout(model).heads())


def test_bad_input():
    with pytest.raises(UnsupportedModel, match="no causal text decoder"):
        semantic_distances(FAMILIES["bert"].build(), torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="no inputs were given"):
        semantic_distances(FAMILIES["llama"].build(), [])
