"""ACT while tokens are generated: what it keeps with a cache, and what becomes of it when caches change."""

import copy
from typing import Any

import pytest
import torch
from tests.contracts.models_under_test import left_padded, text, tiny_llama
from tests.steering.calibrated import LOOSE, NAMED, act, by_definition, definition, logits
from torch import Tensor

from headwise.attend.edits import EditRows, ScaleHeads
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.session import steer


@pytest.fixture
def model():
    return tiny_llama()


# Decoding: what a row was judged by when it was first computed


def pieces(model: Any, ids: Tensor, sizes: list[int], edit: Any) -> Tensor:
    """Logits of a text that comes in piece by piece, with a cache."""
    out, found, start = None, [], 0
    with torch.no_grad(), steer(model, edit):
        for size in sizes:
            options = {"use_cache": True} if out is None else with_cache(model, cache_of(out))
            out = model(input_ids=ids[:, start : start + size], **options)
            found.append(out.logits)
            start += size
    return torch.cat(found, 1)


@pytest.mark.parametrize("sizes", [[12], [8, 1, 1, 1, 1], [5, 4, 3], [1] * 12, [3, 1, 6, 1, 1]])
@pytest.mark.parametrize("statistics", ["prompt", "running"])
def test_decoding_is_recomputing_from_scratch(sizes, statistics, model):
    """One forward over the whole text, every row judged by what it knew when it came in."""
    ids, last = text(2, 12), []
    for size in sizes:
        last += [len(last) + size] * size
    last = last if statistics == "prompt" else list(range(1, 13))
    found = pieces(model, ids, sizes, act(statistics))
    torch.testing.assert_close(found, logits(model, by_definition(last), input_ids=ids), atol=2e-5, rtol=1e-4)


def test_running_statistics_do_not_look_ahead(model):
    ids = text(2, 12)
    changed = ids.clone()
    changed[:, 9:] = 33
    short = logits(model, act("running"), input_ids=ids)
    assert torch.equal(logits(model, act("running"), input_ids=changed)[:, :9], short[:, :9])
    prompt = logits(model, act("prompt"), input_ids=ids)
    assert not torch.allclose(logits(model, act("prompt"), input_ids=changed)[:, :9], prompt[:, :9], atol=1e-3)


def told(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        **{name: value for name, value in batch.items() if name != "position_ids"},
        max_new_tokens=6, do_sample=False, output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("statistics", ["prompt", "running"])
def test_generation_in_a_padded_batch(cache, statistics, model):
    lines = [text(1, 11)[0], text(1, 6, seed=4)[0]]
    with steer(model, act(statistics)):
        batch = told(model, left_padded(lines), cache_implementation=None if cache == "dynamic" else cache)
    for row, line in enumerate(lines):
        n = len(line)
        ids = batch.sequences[row, -n - 6 :][None]
        last = [max(n, q + 1) for q in range(n + 6)] if statistics == "prompt" else list(range(1, n + 7))
        whole = logits(model, by_definition(last), input_ids=ids)
        scores = torch.stack(batch.scores, 1)[row]
        torch.testing.assert_close(scores, whole[0, n - 1 : -1], atol=3e-5, rtol=1e-4)


def test_a_prompt_that_generate_cuts_in_chunks(model):
    ids = text(1, 11)
    with steer(model, act("running")):
        whole, cut = (told(model, {"input_ids": ids}, prefill_chunk_size=size) for size in (None, 4))
    assert torch.equal(whole.sequences, cut.sequences)
    torch.testing.assert_close(torch.stack(whole.scores), torch.stack(cut.scores), atol=2e-5, rtol=1e-4)


def test_a_sliding_cache():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    mistral: Any = MistralForCausalLM(
        MistralConfig(vocab_size=40, num_key_value_heads=2, sliding_window=5, initializer_range=0.3, **sizes)
    ).eval()
    ids = text(2, 13)
    found = pieces(mistral, ids, [7, 1, 1, 1, 1, 1, 1], act("running"))
    torch.testing.assert_close(found, logits(mistral, act("running"), input_ids=ids), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, logits(mistral, input_ids=ids), atol=0.05)


@pytest.mark.parametrize("statistics", ["prompt", "running"])
def test_beams_take_their_columns_with_them(statistics, model):
    """Every beam that is returned scores what its own text scores from scratch."""
    ids = torch.cat([text(1, 7), text(1, 7, seed=2)])
    with steer(model, act(statistics)):
        found = model.generate(
            input_ids=ids, max_new_tokens=7, num_beams=3, num_return_sequences=3, do_sample=False,
            return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        )  # fmt: skip
    moved = found.beam_indices[:, :7]
    assert any(len(set(row.tolist())) > 1 for row in moved), "no beam changed its row; the test would show nothing"
    last = [max(7, q + 1) for q in range(14)] if statistics == "prompt" else list(range(1, 15))
    for sequence, score in zip(found.sequences, found.sequences_scores, strict=True):
        whole = logits(model, by_definition(last), input_ids=sequence[None]).log_softmax(-1)[0, 6:-1]
        own = whole.gather(1, sequence[7:, None]).sum()
        assert float(own) == pytest.approx(float(score), abs=1e-4)


@pytest.mark.parametrize("statistics", ["prompt", "running"])
def test_a_copied_cache_has_the_columns_of_its_prompt(statistics, model):
    """One prompt, two continuations from copies of its cache."""
    ids = text(1, 12)
    last = [max(8, q + 1) for q in range(12)] if statistics == "prompt" else list(range(1, 13))
    found = []
    with torch.no_grad(), steer(model, act(statistics)):
        start = cache_of(model(input_ids=ids[:, :8], use_cache=True))
        for seed in (0, 1):
            tail, cache, steps = text(1, 5, seed=seed)[:, 1:], copy.deepcopy(start), []
            for t in range(4):
                steps.append(model(input_ids=tail[:, t : t + 1], **with_cache(model, cache)).logits)
            found.append((torch.cat([ids[:, :8], tail], 1), torch.cat(steps, 1)))
    for joined, scores in found:
        whole = logits(model, by_definition(last), input_ids=joined)
        torch.testing.assert_close(scores, whole[:, 8:], atol=2e-5, rtol=1e-4)


def test_the_prompt_counts_also_where_only_generated_rows_are_changed(model):
    ids = text(1, 10)
    found = pieces(model, ids, [7, 1, 1, 1], act(when="generated"))
    plain = logits(model, input_ids=ids)
    assert torch.equal(found[:, :7], logits(model, input_ids=ids[:, :7]))
    last = [max(7, q + 1) for q in range(10)]

    def generated(weights: Tensor, rows: Any) -> Tensor:
        new = definition(weights, last, beta=0.2, threshold=LOOSE).to(weights)
        return torch.where((torch.arange(10) >= 7)[:, None], new, weights)

    expected = logits(model, EditRows(generated, heads=NAMED), input_ids=ids)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found[:, 7:], plain[:, 7:], atol=1e-2)


def test_an_edit_that_comes_and_goes_leaves_the_columns(model):
    """Halfway another edit divides the heads of a layer; what their columns had received stays with them."""
    ids = text(1, 10)
    edit = act("running", heads=["0.0", "0.1", "1.2"])
    doubled = ScaleHeads(scale=1.0 + 1e-12, heads=["0.1"])
    other = EditRows(lambda weights, rows: weights, heads=["0.1"])
    out, found = None, []
    with torch.no_grad(), steer(model, edit):
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, 10)):
            extra = [other] if start == 6 else [doubled] if start == 7 else []
            with steer(model, *extra):
                options = {"use_cache": True} if out is None else with_cache(model, cache_of(out))
                out = model(input_ids=ids[:, start:stop], **options)
                found.append(out.logits)
    expected = logits(model, act("running", heads=["0.0", "0.1", "1.2"]), input_ids=ids)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-4)


def test_checkpointed_layers_are_counted_once(model):
    """Backward runs every layer again."""
    ids = text(1, 9)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
            model.train()
        with steer(model, act("running")):
            model(input_ids=ids).logits.square().mean().backward()
        grads.append(model.model.embed_tokens.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)


def test_a_cache_that_went_back_is_refused(model):
    ids = text(1, 8)
    with torch.no_grad(), steer(model, act()):
        out = model(input_ids=ids, use_cache=True)
        cache = cache_of(out)
        model(input_ids=ids[:, :1], **with_cache(model, cache))
        cache.crop(-4)
        with pytest.raises(RuntimeError, match="the cache went back"):
            model(input_ids=ids[:, :1], **with_cache(model, cache))
