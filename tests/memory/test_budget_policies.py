"""Policies: their budgets by hand, the released SnapKV and StreamingLLM of kvpress, Task-KV's split and its options."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from headwise.hf.head_budgets import KeptTokens, LayerPrompt
from headwise.memory.budget_policies import HeadMapPolicy, SnapKVPolicy, StreamingPolicy, TaskKVPolicy
from headwise.memory.task_kv import HeadBudgetCache
from headwise.ops.observation import head_distance, semantic_vectors

FIXTURE = Path(__file__).parents[1] / "fixtures" / "kvpress.safetensors"


def prompt(
    heads: int = 4, length: int = 80, *, groups: int = 1, batch: int = 2, window: int = 8, layer: int = 0,
    layers: int = 1, pads: int = 0, seed: int = 0,
) -> LayerPrompt:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, heads * groups, window, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(batch, heads, length, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    real = None if not pads else torch.arange(length) >= torch.tensor([[0]] * (batch - 1) + [[pads]])
    lengths = [length] * batch if real is None else real.sum(1).tolist()
    return LayerPrompt(q, k, v, real, lengths, 0.35, None, layer, layers)


def kept(policy: Any, given: LayerPrompt) -> KeptTokens:
    found = policy(given)
    assert found is not None
    return found


def counts(found: KeptTokens, length: int) -> list[list[int]]:
    """Tokens that each head of each row keeps."""
    light = (found.positions >= 0).sum(-1)
    return torch.where(found.full, length, light).tolist()


# What kvpress does


def oracle() -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    with safe_open(FIXTURE, "pt") as peer:
        tensors = {name: peer.get_tensor(name) for name in peer.keys()}  # noqa: SIM118
        return tensors, json.loads(peer.metadata()["cases"]), json.loads(peer.metadata()["config"])


def policy_of(case: dict[str, Any]) -> SnapKVPolicy | StreamingPolicy:
    budget = 1 - case["dropped"]
    if "n_sink" in case:
        return StreamingPolicy(budget, sink=case["n_sink"])
    return SnapKVPolicy(budget, window=case["window_size"], kernel=case["kernel_size"])


@pytest.mark.parametrize("name", ["snap", "snap-wide", "streaming", "streaming-many"])
def test_what_kvpress_keeps(name):
    data, cases, _ = oracle()
    policy = policy_of(cases[name])
    for layer in range(2):
        q, k, v = (data[f"{layer}/{part}"] for part in "qkv")
        given = LayerPrompt(q[:, :, -policy.window :], k, v, None, [k.shape[2]] * 2, 8**-0.5, None, layer, 2)
        if isinstance(policy, SnapKVPolicy):
            theirs = data[f"{name}/{layer}/scores"][..., : -policy.window]
            torch.testing.assert_close(policy.scores(given), theirs, rtol=1e-5, atol=1e-7)
        found = kept(policy, given)
        assert not found.full.any()
        assert torch.equal(found.positions, data[f"{name}/{layer}/kept"])


@pytest.mark.parametrize("name", ["snap", "snap-wide", "streaming", "streaming-many"])
def test_the_model_says_what_it_says_under_kvpress(name):
    """The prompt read, compressed, and four more tokens: the cache inside a model against kvpress inside its own."""
    data, cases, config = oracle()
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**config)).eval()
    model.load_state_dict({key.removeprefix("state/"): x for key, x in data.items() if key.startswith("state/")})
    cache: Any = HeadBudgetCache(model, policy_of(cases[name]))
    wanted = data[f"{name}/logits"]
    ids, length = data["ids"], data["ids"].shape[1] - wanted.shape[1]
    with torch.no_grad():
        model(ids[:, :length], cache=cache)
        said = [model(ids[:, at : at + 1], cache=cache).logits for at in range(length, ids.shape[1])]
    torch.testing.assert_close(torch.cat(said, 1), wanted, rtol=1e-4, atol=1e-4)


# Budgets


@pytest.mark.parametrize(
    ("heads", "options", "layers", "expected"),
    [
        (32, {"beta": 0.25, "min_heads": 4}, 32, {0: 8, 31: 4}),  # Llama-2-7B-Chat
        (32, {"beta": 0.3, "min_heads": 1}, 32, {0: 10, 31: 1}),  # Mistral-7B-v0.2: 9.6 is rounded
        (32, {"beta": 0.25}, 32, {0: 8, 15: 6, 31: 4}),  # an eighth of the heads in the last layer
        (4, {}, 4, {0: 1, 3: 1}),
        (8, {"beta": 1.0, "min_heads": 0}, 5, {0: 8, 1: 6, 2: 4, 3: 2, 4: 0}),
        (8, {"beta": 0.0, "min_heads": 20}, 2, {0: 0, 1: 8}),  # clipped
        (8, {}, 1, {0: 2}),  # a single layer is the first
    ],
)
def test_quotas(heads, options, layers, expected):
    policy = TaskKVPolicy(**options)
    assert {layer: policy.quota(heads, layer, layers) for layer in expected} == expected


@given(
    heads=st.integers(1, 9), length=st.integers(20, 300), budget=st.floats(0.05, 1.0), beta=st.floats(0, 1),
    sink=st.integers(0, 6), recent=st.integers(8, 12), layer=st.integers(0, 2), pads=st.integers(0, 12),
)  # fmt: skip
def test_task_kv_spends_its_budget_and_no_more(heads, length, budget, beta, sink, recent, layer, pads):
    """Or keeps sinks and recent tokens alone, and says that this is more."""
    policy = TaskKVPolicy(budget, sink=sink, recent=recent, window=8, beta=beta)
    given = prompt(heads, length, layer=layer, layers=3, pads=pads)
    found = policy(given)
    if found is None:
        assert budget == 1 or length <= sink + recent
        return
    full = found.full.sum(1).tolist()
    assert full[0] == full[1] <= policy.quota(heads, layer, 3)
    over = False
    for row, real in enumerate(given.lengths):
        spent = full[0] * real + sum(
            int((head >= 0).sum()) for head, all_ in zip(found.positions[row], found.full[row], strict=True) if not all_
        )
        floor = min(real, sink + recent)
        allowed = budget * heads * real
        over |= heads * floor > allowed + 1e-6 and floor < real
        if heads * floor <= allowed:
            assert spent <= allowed + 1e-6
            if full[0] < heads and not pads:
                assert spent > allowed - heads or spent == heads * real
        else:
            assert full[0] == 0 and spent == heads * floor
    assert (found.over is not None) == over


def test_the_window_and_the_sinks_are_kept_and_the_rest_is_what_was_looked_at():
    policy = TaskKVPolicy(0.5, sink=3, recent=10, window=8, pool=1)
    given = prompt()
    found = kept(policy, given)
    scores = policy.scores(given)
    assert counts(found, 80)[0].count(80) == 1  # f = 1 of 4: the others have (160 - 80) / 3 = 26 each
    for row in range(2):
        for head in range(4):
            if found.full[row, head]:
                continue
            positions = found.positions[row, head].tolist()
            assert positions[:3] == [0, 1, 2] and positions[-10:] == list(range(70, 80)) and len(positions) == 26
            middle, dropped = positions[3:-10], set(range(3, 70)) - set(positions)
            assert scores[row, head, middle].min() >= scores[row, head, sorted(dropped)].max()


def test_full_heads_are_the_farthest_and_one_nearest():
    given = prompt(8, 200, batch=3)
    distance = head_distance(
        semantic_vectors(given.query, given.key, given.value, window=8, top=20, pool=3, scale=0.35)
    )
    for supplement in (0, 1, 2):
        policy = TaskKVPolicy(0.7, 2, 10, 8, 20, 3, beta=0.5, supplement=supplement)
        full = kept(policy, given).full
        for row in range(3):
            order = distance[row].argsort(descending=True).tolist()
            wanted = order[: 4 - supplement] + order[8 - supplement :]
            assert torch.nonzero(full[row])[:, 0].tolist() == sorted(wanted)
    alone = kept(TaskKVPolicy(0.7, 2, 10, 8, 20, 3, beta=0.125, supplement=3), given).full
    assert torch.equal(alone.int().argmax(1), distance.argmax(1)), "one head is the farthest, not the nearest"


def test_splits_are_made_for_each_text():
    policy = TaskKVPolicy(0.5, sink=2, recent=10, window=8)
    given = prompt(8, 200, batch=6)
    assert len({tuple(row.tolist()) for row in kept(policy, given).full}) > 1


def test_what_comes_between_sinks_and_recent_tokens():
    given = prompt(4, 80, pads=6)
    options: dict[str, Any] = {"sink": 3, "recent": 10, "window": 8}
    top, none, mean = (kept(TaskKVPolicy(0.5, **options, middle=m), given) for m in ("top", "none", "mean"))
    light = ~top.full
    assert int((none.positions[light] >= 0).sum(-1).max()) == 13 == int((none.positions[light] >= 0).sum(-1).min())
    assert int((top.positions[light][0] >= 0).sum()) > 13
    assert mean.extra is not None and mean.positions.shape[2] == 14
    for row, start in enumerate((0, 6)):
        place = start + 3  # behind the sinks
        for head in range(4):
            assert mean.positions[row, head].tolist() == [*range(start, start + 4), *range(70, 80)]
            for new, old in zip(mean.extra, (given.key, given.value), strict=True):
                wanted = old[row, head].clone()
                wanted[place] = old[row, head, place:70].mean(0)
                torch.testing.assert_close(new[row, head], wanted)


def test_the_mean_of_nothing_is_not_put_anywhere():
    given = prompt(2, 30, pads=18)  # one text of 30 tokens, one of 12
    found = kept(TaskKVPolicy(0.9, sink=2, recent=10, window=8, middle="mean"), given)
    assert found.extra is not None
    assert found.positions[1].tolist() == [[*range(18, 30), -1]] * 2
    assert torch.equal(found.extra[0][1], given.key[1]) and torch.equal(found.extra[1][1], given.value[1])


def test_heads_of_a_map_share_what_is_left_over_all_layers():
    policy = HeadMapPolicy(0.4, 2, 10, 8, full=((0, 2), (), (1,)), heads=(4, 4, 4))
    for layer, full in enumerate(([0, 2], [], [1])):
        found = kept(policy, prompt(4, 100, layer=layer, layers=3))
        light = int((0.4 * 12 - 3) * 100 / 9 + 1e-9)
        assert counts(found, 100)[0] == [100 if head in full else light for head in range(4)]


def test_everything_is_kept_where_the_budget_says_so_or_the_text_is_short():
    for policy in (
        TaskKVPolicy(1.0), SnapKVPolicy(1.0), StreamingPolicy(1.0), HeadMapPolicy(1.0, full=((0,),), heads=(4,)),
        TaskKVPolicy(0.1), SnapKVPolicy(0.1, window=80), HeadMapPolicy(0.5, full=((0,),), heads=(4,)),
    ):  # fmt: skip
        assert policy(prompt()) is None


@pytest.mark.parametrize(
    ("policy", "given", "share"),
    [
        (TaskKVPolicy(0.2, sink=4, recent=32, window=8), prompt(), "45%"),
        (SnapKVPolicy(0.05, window=8), prompt(), "10%"),
        (StreamingPolicy(0.05, sink=9), prompt(), "12%"),
        (HeadMapPolicy(0.3, 4, 16, 8, full=((0,),), heads=(4,)), prompt(), "44%"),
    ],
)
def test_a_budget_below_the_least_is_said(policy, given, share):
    found = kept(policy, given)
    assert found.over is not None and found.over.startswith(f"{type(policy).__name__}: {share} of a prompt's cache is")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadMapPolicy(0.4, full=((4,),), heads=(4,)), r"full heads \[4\] of layer 0; it has 4 key heads"),
        (lambda: HeadMapPolicy(0.9, full=((1, 1),), heads=(4,)), r"full heads \[1, 1\] of layer 0"),
        (lambda: HeadMapPolicy(0.4, full=((0,),), heads=(4, 4)), "full heads of 1 layers but heads of 2"),
        (lambda: HeadMapPolicy(0.4, full=((0, 1),), heads=(4,)), "which is 50% of the cache, and budget is 40%"),
        (lambda: SnapKVPolicy(window=0), "window is 0; expected 1 or more queries"),
        (lambda: StreamingPolicy(2.0), "budget is 2.0; expected a share"),
        (lambda: TaskKVPolicy(min_heads=-1), "min_heads is -1"),
        (lambda: TaskKVPolicy(window=0), "window is 0 and recent 256"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
