"""Attention influence against the model's own loss, hand-written uniform attention and two whole passes."""

import copy
import itertools
import math
import random

import pytest
import torch
from tests.zoo import FAMILIES, families
from torch import nn

from headwise.attend.addresses import Head, Layout
from headwise.attend.head_map import HeadMap
from headwise.errors import UnsupportedModel
from headwise.heads.influence import (
    _checked,
    attention_influence,
    batch_cost,
    by_length,
    influence_heads,
    relative_increase,
)
from headwise.heads.retrieval_needles import RetrievalNeedles
from headwise.hf.replay import backbone, keep_output, replay
from headwise.specimens import planted_llama
from headwise.specimens.registry import load_specimen

DECODERS = [name for name in families(kind="decoder") if FAMILIES[name].decoder]


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"].build()


def some(lengths=(12, 5, 9, 2, 7), seed=0, low=8, high=64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (n,), generator=generator) for n in lengths]


def own_loss(model, ids) -> float:
    with torch.no_grad():
        return float(model(input_ids=ids[None], labels=ids[None]).loss)


def test_no_heads_no_influence(llama):
    found = attention_influence(llama, some(), [])
    assert found.scores.tolist() == [0.0] * 5 and torch.equal(found.base, found.masked)


def test_base_loss_is_the_models_own(llama):
    found = attention_influence(llama, some(), ["1.0"])
    assert found.tokens.tolist() == [11, 4, 8, 1, 6]
    for ids, loss in zip(some(), found.base.tolist(), strict=True):
        assert loss == pytest.approx(own_loss(llama, ids), abs=1e-5)


@pytest.mark.parametrize("mode", ["uniform", "zero", "first"])
def test_scores_do_not_depend_on_the_batch_or_the_side_of_padding(llama, mode):
    documents = some()
    together = attention_influence(llama, documents, ["1.1", "0.2"], mode=mode)
    alone = [attention_influence(llama, [ids], ["1.1", "0.2"], mode=mode).scores for ids in documents]
    torch.testing.assert_close(together.scores, torch.cat(alone), atol=1e-5, rtol=1e-5)
    longest = max(map(len, documents))
    for left in (True, False):
        ids, mask = torch.zeros(5, longest, dtype=torch.long), torch.zeros(5, longest, dtype=torch.long)
        for row, document in enumerate(documents):
            place = slice(longest - len(document), None) if left else slice(0, len(document))
            ids[row, place], mask[row, place] = document, 1
        padded = attention_influence(llama, ids, ["1.1", "0.2"], mode=mode, attention_mask=mask)
        torch.testing.assert_close(padded.scores, together.scores, atol=1e-5, rtol=1e-5)
        loader = [
            {"input_ids": ids[:2], "attention_mask": mask[:2]},
            {"input_ids": ids[2:], "attention_mask": mask[2:]},
        ]
        assert torch.allclose(attention_influence(llama, iter(loader), ["1.1", "0.2"], mode=mode).scores, padded.scores)


@pytest.mark.parametrize("name", DECODERS)
def test_every_family_gives_what_two_whole_passes_give(name):
    """Logit caps, scales, sinks and layers without attention: each is the model's own."""
    model = FAMILIES[name].build()
    layers = [layer for layer, count in enumerate(FAMILIES[name].towers[""][0]) if count]
    heads = [f"{layers[-1]}.0"]
    documents = some((11, 6, 8))
    fast = attention_influence(model, documents, heads)
    slow = attention_influence(model, documents, heads, implementation="reference")
    torch.testing.assert_close(fast.base, slow.base, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.masked, slow.masked, atol=1e-5, rtol=1e-5)
    assert float((slow.masked - slow.base).abs().max()) > 1e-6, "the masked head does something"


def test_uniform_is_the_running_mean_of_values(llama):
    """Written by hand: the head's slice of what the output projection receives is the mean of the values so far."""
    layer, head, group = 1, 1, FAMILIES["llama"].towers[""]
    ids = some((10,))[0]
    attention = llama.model.layers[layer].self_attn
    values = []
    size = attention.head_dim
    shared = group[0][layer] // group[1][layer]

    def even(module, args):
        z = args[0].clone()
        v = values[-1].unflatten(-1, (-1, size))[:, :, head // shared]
        steps = torch.arange(1, v.shape[1] + 1)[None, :, None]
        z[..., head * size : (head + 1) * size] = v.cumsum(1) / steps
        return (z,)

    hooks = [
        attention.v_proj.register_forward_hook(lambda module, args, out: values.append(out)),
        attention.o_proj.register_forward_pre_hook(even),
    ]
    by_hand = own_loss(llama, ids)
    for hook in hooks:
        hook.remove()
    found = attention_influence(llama, [ids, *some((14, 3), 1)], [Head(layer, head)])  # beside others, padded
    assert float(found.masked[0]) == pytest.approx(by_hand, abs=1e-5)
    assert abs(by_hand - own_loss(llama, ids)) > 1e-4


def least_cost(lengths: list[int], budget: int, fixed: int) -> int:
    """By trying every way to cut: padded tokens and `fixed` a batch."""
    found = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        edges = [0, *(place for place, cut in enumerate(cuts, 1) if cut), len(lengths)]
        sizes = [(end - start, lengths[start]) for start, end in itertools.pairwise(edges)]
        if all(count == 1 or count * longest <= budget for count, longest in sizes):
            found.append(sum(count * longest + fixed for count, longest in sizes))
    return min(found)


@pytest.mark.parametrize("fixed", [0, 7, 60])
def test_batches_hold_every_document_once_and_cost_the_least(fixed):
    rng = random.Random(fixed)
    for budget in (30, 64, 1000):
        rows = [(number, torch.ones(rng.randrange(1, 40), dtype=torch.long)) for number in range(9)]
        found = list(by_length(rows, budget, fixed))
        assert sorted(number for batch in found for number, _ in batch) == list(range(9))
        sizes = [(len(batch), max(len(ids) for _, ids in batch)) for batch in found]
        assert all(count == 1 or count * longest <= budget for count, longest in sizes)
        lengths = sorted((len(ids) for _, ids in rows), reverse=True)
        assert sum(count * longest + fixed for count, longest in sizes) == least_cost(lengths, budget, fixed)
    assert list(by_length([], 64, fixed)) == []
    empty = [(number, torch.zeros(0, dtype=torch.long)) for number in range(3)]
    assert sum(map(len, by_length(empty, 64, fixed))) == 3


def test_padding_is_a_few_per_cent_of_a_window_of_documents():
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(512, generator=generator) * 0.8 + 4.0).exp().clamp(8, 512).long().tolist()
    rows = [(number, torch.ones(length, dtype=torch.long)) for number, length in enumerate(lengths)]

    def padded(batches: list) -> float:
        return sum(len(batch) * len(batch[0][1]) for batch in batches) / sum(lengths)

    found = list(by_length(rows, 8192, fixed=50))  # as batch_cost has it for some ten million weights
    assert padded(found) < 1.06 and len(found) < 60
    few = list(by_length(rows, 8192, fixed=10**6))  # where a batch costs much, padding costs little
    assert len(few) < len(found) and padded(few) > padded(found)


def test_the_cost_of_a_batch_follows_from_sizes(llama):
    assert batch_cost(llama) == batch_cost(copy.deepcopy(llama)) > 0
    assert batch_cost(FAMILIES["llama"].build()) == batch_cost(llama)


def test_zero_is_a_copy_without_the_heads_columns_of_the_projection(llama):
    other, size = copy.deepcopy(llama), llama.model.layers[1].self_attn.head_dim
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight[:, 2 * size : 3 * size] = 0
    found = attention_influence(llama, some(), ["1.2"], mode="zero")
    uniform = attention_influence(llama, some(), ["1.2"], mode="uniform")
    for ids, loss in zip(some(), found.masked.tolist(), strict=True):
        assert loss == pytest.approx(own_loss(other, ids), abs=1e-5)
    assert float((found.masked - uniform.masked).abs().max()) > 1e-5, "another mode, another model"


def test_the_heads_are_those_that_copy_not_those_that_look_at_the_same_token():
    """Read at the row of the answer's own token, as third-party code does, the duplicate-token head would score."""
    found = RetrievalNeedles().measure(planted_llama.build())
    assert influence_heads(found) == [planted_llama.INDUCTION]
    assert found.of("retrieval")[planted_llama.DUPLICATE] == pytest.approx(0, abs=0.02)


def test_ids_of_every_kind_are_the_same_ids(llama):
    """Lists, tensors of any whole type: nothing is looked up by what holds the number."""
    ids = [9, 10, 11, 9, 10, 30]
    wanted = attention_influence(llama, [ids], ["1.0"]).scores
    for dtype in (torch.int16, torch.int32, torch.int64):
        assert torch.equal(attention_influence(llama, [torch.tensor(ids, dtype=dtype)], ["1.0"]).scores, wanted)
        assert torch.equal(attention_influence(llama, torch.tensor([ids], dtype=dtype), ["1.0"]).scores, wanted)


def test_the_second_pass_starts_at_the_first_masked_layer(llama):
    calls = {0: 0, 1: 0}
    hooks = [
        llama.model.layers[i].mlp.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        for i in calls
    ]
    attention_influence(llama, some(), ["1.0"])  # tried out
    calls.update({0: 0, 1: 0})
    fast = attention_influence(llama, some(), ["1.0"])
    assert calls == {0: 1, 1: 2}
    slow = attention_influence(llama, some(), ["1.0"], implementation="two-pass")
    assert calls == {0: 3, 1: 4}
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(fast.masked, slow.masked, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fast.base, slow.base, atol=1e-6, rtol=1e-6)


def test_a_family_that_does_not_put_up_with_it_runs_whole(llama):
    """A last layer that also reads what the first one left aside: skipping the first would change the loss."""

    model = copy.deepcopy(llama)
    first, last = model.model.layers[0], model.model.layers[1]
    seen = []
    first.mlp.register_forward_hook(lambda module, args, out: seen.append(out))

    def add(module, args, out):
        return out + seen.pop() if seen else out

    last.mlp.register_forward_hook(add)
    fast = attention_influence(model, some(), ["1.0"])
    slow = attention_influence(model, some(), ["1.0"], implementation="reference")
    torch.testing.assert_close(fast.masked, slow.masked, atol=1e-5, rtol=1e-5)


def test_logits_are_formed_a_few_rows_at_a_time(llama, monkeypatch):
    rows = []
    attention_influence(llama, some((12,)), ["1.0"])  # tried out, with all logits
    hook = llama.lm_head.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[-2]))
    monkeypatch.setattr("headwise.heads.influence.LOGITS", 4 * 64)
    whole = attention_influence(llama, some((12,)), ["1.0"]).base
    hook.remove()
    assert max(rows) <= 4
    monkeypatch.undo()
    assert float(whole) == pytest.approx(own_loss(llama, some((12,))[0]), abs=1e-5)


def test_prefix_is_read_and_does_not_count(llama):
    ids = some((12,))[0]
    found = attention_influence(llama, [ids], ["1.0"], prefix=5)
    with torch.no_grad():
        logits = llama(input_ids=ids[None]).logits[0]
    wanted = nn.functional.cross_entropy(logits[4:-1], ids[5:])
    assert float(found.base) == pytest.approx(float(wanted), abs=1e-5) and found.tokens.tolist() == [7]


def test_documents_without_a_token_to_predict_have_no_score(llama):
    found = attention_influence(llama, [[9], [], [9, 10, 11]], ["0.0"])
    assert found.tokens.tolist() == [0, 0, 2]
    assert [math.isnan(score) for score in found.scores.tolist()] == [True, True, False]
    assert math.isnan(float(attention_influence(llama, [[9, 10]], ["0.0"], prefix=2).scores))
    padding = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
    assert math.isnan(float(attention_influence(llama, [padding], ["0.0"]).scores))


def test_a_loss_of_zero_is_guarded():
    base = torch.tensor([0.0, 1e-9, 2.0, math.nan], dtype=torch.float64)
    found = relative_increase(base, torch.tensor([1.0, 1.0, 3.0, math.nan], dtype=torch.float64))
    assert found[2] == 0.5 and [math.isnan(x) for x in found.tolist()] == [True, True, False, True]


def test_the_copying_head_of_the_hand_built_model_tells_repeats_from_noise():
    model, generator = planted_llama.build(), torch.Generator().manual_seed(0)
    noise = [torch.randperm(50, generator=generator)[:20] + 4 for _ in range(6)]
    repeats = [torch.cat([ids[:10], ids[:10]]) for ids in noise]
    scores = attention_influence(model, [*repeats, *noise], [planted_llama.INDUCTION]).scores
    assert float(scores[:6].min()) > float(scores[6:].max()) + 0.1


def test_a_whole_model_may_be_masked(llama):
    found = attention_influence(llama, some(), "all", mode="zero")
    assert bool(found.scores.isfinite().all())


def test_heads_by_default():
    layout = Layout.of([4] * 10)
    scores = {head: 0.0 for head in layout.heads()} | {
        Head(3, 1): 0.9,
        Head(7, 2): 0.3,
        Head(2, 0): 0.6,
        Head(5, 3): 0.55,
    }
    found = HeadMap({"sink": {}, "retrieval": scores}, layout)
    assert influence_heads(found) == [Head(2, 0), Head(3, 1), Head(5, 3)]  # 5 % are two, and all of 0.5 or more
    assert influence_heads(found, share=0.1, strong=1.0) == [Head(2, 0), Head(3, 1), Head(5, 3), Head(7, 2)]
    with pytest.raises(ValueError, match="share is 0"):
        influence_heads(found, share=0.0)
    with pytest.raises(ValueError, match="no head of the map"):
        influence_heads(HeadMap({"retrieval": {}}, layout))
    shipped = load_specimen("tasks").head_map
    assert shipped is not None and influence_heads(HeadMap.load(shipped)) == [Head(2, 0), Head(2, 1)]


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ([[9, 64]], {}, "token ids 9 to 64; the model knows 0 to 63"),
        ([[9, -1]], {}, "the model knows 0"),
        ([[9] * 600], {}, "cut it in windows"),
        ([[9, 10]], {"prefix": -1}, "prefix is -1"),
        ([[9.5, 10.0]], {}, "expected a list of token ids"),
        ([[9, 10]], {"heads": ["7.0"]}, "7"),
        ([[9, 10]], {"attention_mask": torch.ones(1, 2, dtype=torch.long)}, "put it into each batch"),
    ],
)
def test_bad_input_is_refused(llama, given, options, said):
    heads = options.pop("heads", ["0.0"])
    with pytest.raises(ValueError, match=said):
        attention_influence(llama, given, heads, **options)


def test_unknown_words_are_refused(llama):
    with pytest.raises(ValueError, match="mode is 'mean'; choose from uniform, zero, first"):
        _checked(llama, ["0.0"], "mean", 0, "auto")
    with pytest.raises(ValueError, match="implementation is 'fast'; choose auto, two-pass or reference"):
        _checked(llama, ["0.0"], "zero", 0, "fast")


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_only_causal_language_models(name):
    model = FAMILIES[name].build()
    with pytest.raises(UnsupportedModel):
        attention_influence(model, [[9, 10]], ["0.0"])


def test_a_modules_own_forward_comes_back(llama):
    layer = llama.model.layers[0]
    with keep_output(layer) as kept, pytest.raises(RuntimeError, match="inside"):
        llama(input_ids=torch.tensor([[9, 10]]))
        raise RuntimeError("inside")
    assert kept.value is not None and "forward" not in layer.__dict__

    def own(*args, **kwargs):  # as offloading leaves it
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = own
    with replay([layer, llama.model.layers[1]], kept.value):
        llama(input_ids=torch.tensor([[9, 10]]))
    assert layer.__dict__["forward"] is own
    del layer.forward
    assert backbone(llama) is llama.model and backbone(FAMILIES["bert"].build()) is None
