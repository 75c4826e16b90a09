"""Caches with a budget for each head: held to transformers' own cache, whole or under a mask for each head."""

import copy
import gc
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hf.reference import biased, materialised
from tests.memory.served import LOGITS, REFUSED, SMALL, llama, read, text
from tests.zoo import FAMILIES, PAD, families
from torch import Tensor
from transformers import DynamicCache

import headwise as hw
from headwise.attend.addresses import Head
from headwise.attend.edits import BiasGroup, ScaleHeads
from headwise.attend.groups import positions
from headwise.hf.head_budgets import SLACK, BudgetPolicy
from headwise.hf.maps import maps_during
from headwise.memory.budget_policies import HeadMapPolicy, SnapKVPolicy, StreamingPolicy, TaskKVPolicy
from headwise.memory.task_kv import HeadBudgetCache, TaskKVCache

SERVED = [name for name in families(kind="decoder") if name not in REFUSED]


def held(cache: HeadBudgetCache, total: int) -> list[Tensor]:
    """For each layer `[b n total]`, from what the cache says that its heads keep."""
    found = []
    for layer in range(len(cache.layers)):
        rows = cache.kept_positions(layer)
        mask = torch.zeros(len(rows), len(rows[0]), total, dtype=torch.bool)
        for b, row in enumerate(rows):
            for n, kept in enumerate(row):
                mask[b, n, kept] = True
        found.append(mask)
    return found


def under_mask(model: Any, ids: Tensor, real: Tensor, kept: list[Tensor], prompt: int, change: Any = None) -> Tensor:
    """One written-out forward without a cache: rows behind the prompt see what each head holds, and no more."""

    def rule(module: Any, weights: Tensor) -> Tensor:
        seen = kept[module.layer_idx].repeat_interleave(weights.shape[1] // kept[0].shape[1], 1)[:, :, None]
        late = (torch.arange(weights.shape[2]) >= prompt)[:, None]
        new = weights * (seen | ~late)
        new = new / new.sum(-1, keepdim=True).clamp(min=1e-300)
        new = torch.where(weights.sum(-1, keepdim=True) > 0, new, weights)
        return new if change is None else change(module, new, late)

    with materialised(model, rule):
        return read(model, None, ids, real, [ids.shape[1]])


POLICIES = {
    "task": lambda budget, heads: TaskKVPolicy(budget, **SMALL, top=5, pool=3),
    "task, means": lambda budget, heads: TaskKVPolicy(budget, **SMALL, top=5, pool=1, middle="none"),
    "snap": lambda budget, heads: SnapKVPolicy(budget, window=3, kernel=3),
    "streaming": lambda budget, heads: StreamingPolicy(budget, sink=2),
    "map": lambda budget, heads: HeadMapPolicy(budget, **SMALL, full=((0,), ()), heads=heads),
}


@settings(max_examples=40)
@given(data=st.data())
def test_any_budget_is_the_whole_cache_under_a_mask_for_each_head(data):
    kv, groups = data.draw(st.integers(1, 4), "key heads"), data.draw(st.integers(1, 3), "query heads each")
    batch, length = data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(20, 48), "prompt")
    padding = data.draw(st.lists(st.integers(0, 9), max_size=batch), "padding")
    name = data.draw(st.sampled_from(sorted(POLICIES)), "policy")
    budget = data.draw(st.floats(0.55, 0.9), "budget")
    later = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5), "later pieces")
    chunked = data.draw(st.booleans(), "chunked")
    model = llama(kv, groups, seed=kv)
    if kv == 1 and name == "map":
        name = "snap"
    ids, real = text(batch, length + sum(later), length, padding)
    cache = HeadBudgetCache(model, POLICIES[name](budget, (kv, kv)), chunked=chunked)
    before = read(model, cache, ids, real, [length // 2, length - length // 2] if chunked else [length])
    cache.finish_prefill()
    found = read(model, cache, ids, real, later, start=length)
    wanted = under_mask(model, ids, real, held(cache, ids.shape[1]), length)
    rows = real[..., None]
    torch.testing.assert_close(found, wanted[:, length:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(before * rows[:, :length], wanted[:, :length] * rows[:, :length], rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == ids.shape[1]


def test_single_precision_and_both_implementations():
    for implementation in ("sdpa", "eager"):
        model = llama(4, 2, dtype=torch.float32)
        model.set_attn_implementation(implementation)
        ids, real = text(2, 70, padding=[7])
        cache = TaskKVCache(model, 0.5, **SMALL)
        read(model, cache, ids, real, [60])
        found = read(model, cache, ids, real, [1, 1, 5, 1, 2], start=60)
        kept = held(cache, 70)
        assert not all(mask.all() for mask in kept)
        torch.testing.assert_close(found, under_mask(model, ids, real, kept, 60)[:, 60:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SERVED)
def test_a_full_budget_gives_the_bits_of_the_dynamic_cache(name, implementation):
    family = FAMILIES[name]
    model = family.build()
    model.set_attn_implementation(implementation)
    for padding in (None, "left"):
        inputs = family.inputs(model, 3, 24, padding)
        found = []
        for cache in (DynamicCache(config=model.config), TaskKVCache(model, 1.0, **SMALL)):
            first = model.generate(**inputs, cache=cache, max_new_tokens=5, do_sample=False, **LOGITS)
            turn = torch.cat([first.sequences, inputs["input_ids"][:, -7:]], 1)
            mask = {}
            if padding is not None:
                mask["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 12), value=1)
            second = model.generate(turn, cache=cache, max_new_tokens=4, do_sample=False, **mask, **LOGITS)
            found.append(torch.stack([*first.logits, *second.logits]))
        assert torch.equal(*found)


def test_a_small_budget_changes_the_logits():
    """Else the tests above would hold for a cache that drops nothing."""
    model = llama()
    ids, real = text(1, 60)
    whole, small = DynamicCache(config=model.config), TaskKVCache(model, 0.4, **SMALL)
    one, other = (read(model, cache, ids, real, [50, *[1] * 10])[:, 50:] for cache in (whole, small))
    assert (one - other).abs().max() > 0.1 and small.share < 0.6


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_with_a_full_budget_are_those_of_the_dynamic_cache(beams):
    model = llama(dtype=torch.float32)
    ids, real = text(2, 20, padding=[4])
    options = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": 8, "do_sample": False}
    given = {"input_ids": ids, "attention_mask": real.long(), **options, **LOGITS, "output_scores": True}
    one = model.generate(**given, cache=DynamicCache(config=model.config))
    two = model.generate(**given, cache=TaskKVCache(model, 1.0, **SMALL))
    assert torch.equal(one.sequences, two.sequences) and torch.equal(one.sequences_scores, two.sequences_scores)


@settings(max_examples=15)
@given(order=st.lists(st.integers(0, 2), min_size=1, max_size=5), chunked=st.booleans())
def test_rows_that_change_places_take_what_they_keep_along(order, chunked):
    """As beam search, `num_return_sequences` and dropping finished rows do."""
    model = llama(3, 2)
    ids, real = text(3, 60, padding=[0, 5, 2])
    cache = TaskKVCache(model, 0.5, **SMALL, chunked=chunked)
    read(model, cache, ids, real, [25, 15] if chunked else [40])
    if not chunked:
        read(model, cache, ids, real, [1, 1], start=40)
    start = cache.get_seq_length()
    index = torch.tensor(order)
    if order == sorted(order) and len(order) == 3 * order.count(0):
        cache.batch_repeat_interleave(order.count(0))
    elif len(order) % 2:
        cache.batch_select_indices(index)
    else:
        cache.reorder_cache(torch.LongTensor(order))
    ids, real = ids[index], real[index]
    found = read(model, cache, ids, real, [1, 3, *[1] * (56 - start)], start=start)
    wanted = under_mask(model, ids, real, held(cache, 60), 40)
    torch.testing.assert_close(found, wanted[:, start:], rtol=1e-9, atol=1e-9)


def test_beams_at_a_small_budget_choose_by_the_masked_scores():
    """The log-probability that beam search reports is that of a written-out forward under the same masks."""
    model = llama(2, 2)
    ids, _ = text(1, 40)
    cache = TaskKVCache(model, 0.5, **SMALL)
    made = model.generate(
        ids, cache=cache, num_beams=4, max_new_tokens=6, do_sample=False, length_penalty=0.0, **LOGITS,
        output_scores=True,
    )  # fmt: skip
    sequence = made.sequences
    kept = [mask[:1] for mask in held(cache, 45)]  # the prompt of every beam is the same
    logits = under_mask(model, sequence[:, :-1], torch.ones_like(sequence[:, :-1], dtype=torch.bool), kept, 40)
    logs = logits.float().log_softmax(-1)[:, 39:].gather(2, sequence[:, 40:, None]).sum()
    torch.testing.assert_close(made.sequences_scores[0].float(), logs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_padding_on_the_left_changes_nothing(budget):
    """Pads are no sinks, and a text keeps as much as it would alone; its neighbour is longer."""
    model = llama(4, 2)
    alone, _ = text(1, 50, seed=1)
    other, _ = text(1, 62, seed=2)
    ids = torch.cat([torch.nn.functional.pad(alone, (12, 0), value=PAD), other])
    real = ids != PAD
    one, both = (TaskKVCache(model, budget, **SMALL) for _ in range(2))
    wanted = read(model, one, alone, torch.ones_like(alone, dtype=torch.bool), [40, 1, 6, 1, 2])
    found = read(model, both, ids, real, [52, 1, 6, 1, 2])
    torch.testing.assert_close(found[:1, 12:], wanted, rtol=1e-9, atol=1e-9)
    for layer in range(2):
        chosen = [cache.heterogeneous[layer] for cache in (one, both)]
        full = [set(heads[0].tolist()) for heads in chosen if heads is not None]
        kept = [cache.kept_positions(layer)[0] for cache in (one, both)]
        assert full[0] == full[1]
        assert kept[0] == [[i - 12 for i in head if i >= 12] for head in kept[1]]
        light = next(n for n in range(4) if n not in full[0])
        assert kept[1][light][:2] == [12, 13], "the first real tokens are the sinks"


def test_a_prompt_in_chunks_is_compressed_as_a_whole():
    model = llama(4, 2, dtype=torch.float32)
    ids, real = text(2, 60, padding=[6])
    given = {"input_ids": ids, "attention_mask": real.long(), "max_new_tokens": 6, "do_sample": False, **LOGITS}
    whole, pieces = TaskKVCache(model, 0.5, **SMALL), TaskKVCache(model, 0.5, **SMALL, chunked=True)
    one = model.generate(**given, cache=whole)
    two = model.generate(**given, cache=pieces, prefill_chunk_size=17)
    assert torch.equal(one.sequences, two.sequences)
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(two.logits), rtol=1e-5, atol=1e-5)
    for layer in range(2):
        assert whole.kept_positions(layer) == pieces.kept_positions(layer)


def test_a_second_text_before_any_generated_token_is_asked_about():
    model = llama()
    ids, real = text(1, 60)
    cache = TaskKVCache(model, 0.5, **SMALL)
    read(model, cache, ids, real, [40])
    with pytest.warns(UserWarning, match="the first 40 tokens; give chunked=True .* or call cache.finish_prefill"):
        read(model, cache, ids, real, [5], start=40)
    quiet = TaskKVCache(model, 0.5, **SMALL)
    read(model, quiet, ids, real, [40])
    quiet.finish_prefill()
    read(model, quiet, ids, real, [5, 1, 5], start=40)


def test_a_text_that_dropped_nothing_counts_with_the_next():
    """The first turn of a conversation may be short; the second is then compressed with it."""
    model = llama()
    ids, real = text(1, 60)
    cache = TaskKVCache(model, 0.5, **SMALL)
    read(model, cache, ids, real, [6, 1, 33, 1])
    assert max(len(head) for head in cache.kept_positions(0)[0]) <= 41 and cache.share < 0.6
    found = read(model, cache, ids, real, [1] * 19, start=41)
    wanted = under_mask(model, ids, real, held(cache, 60), 40)
    torch.testing.assert_close(found, wanted[:, 41:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("budget", [0.2, 0.4, 0.6])
def test_the_budget_is_in_bytes_over_all_layers(budget):
    """Sinks, recent tokens and full heads included; and what is counted is what the tensors take."""
    model = llama(8, 1, layers=3)
    ids, real = text(2, 100)
    caches = {
        "task": TaskKVCache(model, budget, **SMALL),
        "map": TaskKVCache(model, budget, ["0.1", "2.3", Head(2, 5)], **SMALL),
        "snap": HeadBudgetCache(model, SnapKVPolicy(budget, window=8)),
        "streaming": HeadBudgetCache(model, StreamingPolicy(budget)),
    }
    whole = 2 * 8 * 8 * 8 * 100 * 2 * 3  # float64, heads, head size, tokens, rows, layers; keys and values
    for name, cache in caches.items():
        read(model, cache, ids, real, [100])
        counted = sum(len(head) for layer in range(3) for row in cache.kept_positions(layer) for head in row)
        assert cache.nbytes == counted * 2 * 8 * 8, name
        assert budget - 0.03 < cache.nbytes / whole <= budget and cache.share == cache.nbytes / whole, name
        splits = sum(
            x.numel() * 8
            for layer in cache.layers
            for x in (layer.split.order, layer.split.inverse, layer.split.positions)
        )
        assert cache.allocated == cache.nbytes + splits, "nothing is reserved before the first new token"
        longer = [torch.cat([x, x[:, :1]], 1) for x in (ids, real)]
        read(model, cache, longer[0], longer[1], [1], start=100)
        room = 2 * 8 * 8 * 2 * 8 * 3 * (SLACK + 16)
        assert cache.nbytes <= cache.allocated - splits <= cache.nbytes + room, name


def test_full_heads_of_a_head_map():
    model = llama(4, 2)
    ids, real = text(2, 60)
    scan = hw.attend.HeadMap({"retrieval": {Head(0, 1): 1.0, Head(1, 6): 0.9, Head(1, 7): 0.8}}, hw.hf.layout(model))
    for heads in (scan.top("retrieval", 3), "0.1, 1.6, 1.7"):
        cache = TaskKVCache(model, 0.5, heads, **SMALL)
        read(model, cache, ids, real, [60])
        assert [full.tolist() for full in cache.heterogeneous if full is not None] == [[[0]] * 2, [[3]] * 2]
        lengths = [[len(head) for head in cache.kept_positions(layer)[0]] for layer in range(2)]
        assert lengths == [[60, 20, 20, 20], [20, 20, 20, 60]]  # (0.5 * 8 - 2) * 60 / 6


def test_permuting_heads_permutes_nothing():
    """The same model with its key groups in another order, and the columns of the output projection with them."""
    model, order = llama(4, 2), [2, 0, 3, 1]
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        part = layer.self_attn
        for name, size in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            weight = getattr(part, name).weight
            weight.data = weight.data.view(4, size, -1)[order].reshape(weight.shape)
        part.o_proj.weight.data = part.o_proj.weight.data.view(-1, 4, 16)[:, order].reshape(part.o_proj.weight.shape)
    ids, real = text(2, 60, padding=[3])
    found = [read(m, TaskKVCache(m, 0.5, **SMALL), ids, real, [50, 1, 8, 1]) for m in (model, twin)]
    torch.testing.assert_close(found[0][real], found[1][real], rtol=1e-9, atol=1e-9)


# With edits and probes


def test_edits_of_head_outputs():
    model, twin = llama(2, 2), llama(2, 2)
    twin.model.layers[1].self_attn.o_proj.weight.data[:, 8:16] = 0
    ids, real = text(2, 60, padding=[3])
    with hw.steer(model, ScaleHeads(0.0, heads=["1.1"])):
        found = read(model, TaskKVCache(model, 0.5, **SMALL), ids, real, [50, 1, 8, 1])
    wanted = read(twin, TaskKVCache(twin, 0.5, **SMALL), ids, real, [50, 1, 8, 1])
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", [["0.1", "1.2"], ["*.*"]])
def test_edits_of_weights_act_on_what_each_head_keeps(heads):
    model = llama(2, 2)
    ids, real = text(2, 60, padding=[3])
    group = torch.arange(60) % 3 == 0

    def change(module: Any, weights: Tensor, late: Tensor) -> Tensor:
        named = torch.tensor([h in ([1], [2])[module.layer_idx] or heads == ["*.*"] for h in range(4)])
        return torch.where(named[:, None, None], biased(weights, group & late, 2.0), weights)

    cache = TaskKVCache(model, 0.5, **SMALL)
    read(model, cache, ids, real, [50])
    with hw.steer(model, BiasGroup(positions(torch.nonzero(group)[:, 0].tolist()), 2.0, heads=heads)):
        found = read(model, cache, ids, real, [1, 8, 1], start=50)
    wanted = under_mask(model, ids, real, held(cache, 60), 50, change)
    torch.testing.assert_close(found, wanted[:, 50:], rtol=1e-9, atol=1e-9)


def test_edits_of_all_heads_still_compress_the_prompt():
    model = llama(2, 2)
    ids, real = text(1, 60)
    cache = TaskKVCache(model, 0.5, **SMALL)
    with hw.steer(model, BiasGroup(positions([3]), 2.0)):
        read(model, cache, ids, real, [50])
    assert cache.share < 0.6


def test_probes_read_the_weights_and_change_no_bit():
    model = llama(2, 2)
    ids, real = text(2, 60, padding=[3])
    plain, seen = TaskKVCache(model, 0.5, **SMALL), TaskKVCache(model, 0.5, **SMALL)
    wanted = read(model, plain, ids, real, [50, 1, 8, 1])
    read(model, seen, ids, real, [50, 1, 8])
    made: list[Tensor] = []
    heads = hw.hf.layout(model).heads()
    maps = maps_during(model, lambda: made.append(read(model, seen, ids, real, [1], start=59)), heads)
    assert torch.equal(made[0], wanted[:, 59:])
    kept = held(seen, 60)
    for head in heads:
        row = maps[head][:, 0]
        torch.testing.assert_close(row.sum(-1), torch.ones(2, dtype=torch.float64))
        assert torch.equal(row > 0, kept[head.layer][:, head.head // 2] & real)


# The life of a cache


def test_the_model_gets_its_own_attention_back():
    model = llama()
    ids, real = text(1, 30)
    plain = read(model, None, ids, real, [30])
    cache = TaskKVCache(model, 0.5, **SMALL)
    second = TaskKVCache(model, 0.5, **SMALL)
    assert model.config._attn_implementation == "headwise"
    assert torch.equal(read(model, None, ids, real, [30]), plain), "without the cache nothing changes"
    cache.close()
    cache.close()
    del second
    gc.collect()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises((RuntimeError, ValueError), match=r"HeadBudgetCache|size"):
        read(model, cache, ids, real, [20, 1])


def test_a_cache_serves_one_model():
    model, other = llama(), llama(seed=1)
    ids, real = text(1, 30)
    with pytest.raises(RuntimeError, match="was given to another model"):
        read(other, TaskKVCache(model, 0.5, **SMALL), ids, real, [30])
    twin: Any = hf.LlamaForCausalLM(model.config).eval()
    twin = twin.to(torch.float64)  # the same config object
    with pytest.raises(ValueError, match="made for another model"):
        read(twin, TaskKVCache(model, 0.5, **SMALL), ids, real, [30])
    mine = TaskKVCache(other, 0.5, **SMALL)  # a cache that the other model has as well does not help
    with pytest.raises(ValueError, match="made for another model"):
        read(other, TaskKVCache(model, 0.5, **SMALL), ids, real, [30])
    mine.close()


def test_reset_and_copies():
    model = llama(4, 1)
    ids, real = text(2, 60, padding=[3])
    cache = TaskKVCache(model, 0.5, **SMALL)
    wanted = read(model, cache, ids, real, [50, 1, 1, 1])
    twin = copy.deepcopy(cache)
    one, two = (read(model, c, ids, real, [1, 4, 2], start=53) for c in (cache, twin))
    assert torch.equal(one, two) and twin.get_seq_length() == 60
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0 and cache.share == 1
    assert torch.equal(read(model, cache, ids, real, [50, 1, 1, 1]), wanted)
    cache.close()
    del cache
    assert model.config._attn_implementation == "headwise", "the copy still needs it"


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_fork_is_a_cache_of_its_own_policy(name):
    model = llama(4, 1)
    ids, real = text(2, 60, padding=[3])
    policy: BudgetPolicy = POLICIES[name](0.6, (4, 4))
    prompt = TaskKVCache(model, **{**SMALL, "recent": 8, "window": 8}, chunked=True)
    read(model, prompt, ids, real, [20, 30])
    fork, own = prompt.fork(policy), HeadBudgetCache(model, policy)
    assert prompt.share == 1 and prompt.get_seq_length() == 50
    seen = prompt.prompts()
    assert [(one.layer, one.lengths, one.query.shape[2]) for one in seen] == [(0, [47, 50], 8), (1, [47, 50], 8)]
    with pytest.raises(ValueError, match="no uncompressed prompt"):
        fork.prompts()
    wanted = read(model, own, ids, real, [50, 1, 1])[:, 50:]
    torch.testing.assert_close(read(model, fork, ids, real, [1, 1], start=50), wanted, rtol=1e-9, atol=1e-9)
    assert fork.kept_positions(1) == own.kept_positions(1)
    other = prompt.fork(StreamingPolicy(1.0))  # its tokens are shared until it adds some
    once, twice = (
        read(model, cache, ids, real, [1, 3], start=50) for cache in (other, prompt.fork(StreamingPolicy(1.0)))
    )
    assert torch.equal(once, twice)
    with pytest.raises(ValueError, match="looks at 20 queries but 8 are known"):
        prompt.fork(SnapKVPolicy(0.5, window=20))
    with pytest.raises(ValueError, match="compressed already"):
        own.fork(policy)


def test_tokens_after_the_prompt_can_be_taken_back():
    model = llama(4, 1)
    ids, real = text(1, 60)
    cache = TaskKVCache(model, 0.5, **SMALL)
    wanted = read(model, cache, ids, real, [50, 1, 2, 1, 3])
    cache.crop(-6)
    cache.crop(0)
    assert cache.get_seq_length() == 51
    assert torch.equal(read(model, cache, ids, real, [2, 1, 3], start=51), wanted[:, 51:57])
    with pytest.raises(ValueError, match=r"crop\(-8\) reaches into the 50 tokens of the compressed prompt; only the 7"):
        cache.crop(-8)
    with pytest.raises(ValueError, match="expected 0 or a negative number"):
        cache.crop(3)
    pieces = TaskKVCache(model, 0.5, **SMALL, chunked=True)
    read(model, pieces, ids, real, [30, 25])
    with pytest.raises(ValueError, match="in the middle of a prompt; call finish_prefill"):
        pieces.crop(-5)
    whole = TaskKVCache(model, 1.0)
    wanted = read(model, whole, ids, real, [50, 1, 4])
    whole.crop(-40)
    again = read(model, whole, ids, real, [1, 1], start=15)
    torch.testing.assert_close(again, wanted[:, 15:17], rtol=1e-9, atol=1e-9)


def test_inference_mode_and_after_it():
    model = llama()
    ids, real = text(1, 60)
    wanted = read(model, TaskKVCache(model, 0.5, **SMALL), ids, real, [50, 1, 1])
    cache = TaskKVCache(model, 0.5, **SMALL)
    with torch.inference_mode():
        first = read(model, cache, ids, real, [50, 1])
    found = torch.cat([first, read(model, cache, ids, real, [1], start=51)], 1)
    assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padding", [[], [5]])
def test_on_a_gpu_it_gives_what_it_gives_on_the_cpu(padding):
    model = llama(4, 2, dtype=torch.float32)
    ids, real = text(2, 60, padding=padding)
    wanted = read(model, TaskKVCache(model, 0.5, **SMALL), ids, real, [50, 1, 8, 1])
    model, ids, real = model.cuda(), ids.cuda(), real.cuda()
    found = read(model, TaskKVCache(model, 0.5, **SMALL), ids, real, [50, 1, 8, 1])
    torch.testing.assert_close(found[real].cpu(), wanted[real.cpu()], rtol=1e-4, atol=1e-4)
    one, two = (
        read(model, cache, ids, real, [50, 1, 8, 1])
        for cache in (DynamicCache(config=model.config), TaskKVCache(model, 1.0, **SMALL))
    )
    torch.testing.assert_close(one[real], two[real], rtol=1e-5, atol=1e-5)
