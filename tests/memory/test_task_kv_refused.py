"""What caches with a budget for each head refuse, by name and before anything is kept; what they warn of."""

from typing import Any

import pytest
import torch
from tests.memory.served import LOGITS, REFUSED, SMALL, llama, read, text
from tests.zoo import FAMILIES
from torch import Tensor
from transformers import DynamicCache

from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.memory.task_kv import HeadBudgetCache, TaskKVCache


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_that_it_cannot_serve_are_refused_by_name(name):
    model = FAMILIES[name].build()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=f"HeadBudgetCache: .*{REFUSED[name]}") as told:
        TaskKVCache(model)
    assert type(model).__name__ in str(told.value)
    assert model.config._attn_implementation == before


def test_other_implementations_and_mechanisms_are_refused():
    model = llama()
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedModel, match="uses 'flex_attention', which takes no mask for single heads"):
        TaskKVCache(model)


def test_a_mechanism_in_the_place_of_attention_is_refused():
    model = llama()

    def uniform(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        return value.mean(2, keepdim=True).expand_as(query).transpose(1, 2), None

    dispatch.offer("headwise-uniform-of-a-test", uniform)
    model.set_attn_implementation("headwise-uniform-of-a-test")
    with pytest.raises(UnsupportedModel, match="a mechanism stands in for attention in layer 0 of LlamaForCausalLM"):
        TaskKVCache(model)


def test_a_vision_language_model_is_served_in_its_text_tower():
    family = FAMILIES["llava"]
    model = family.build()
    inputs = family.inputs(model, 2, 24, "left")
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [3, 4, 5, 6], **LOGITS}
    found = [
        torch.stack(model.generate(**inputs, cache=cache, **options).logits)
        for cache in (DynamicCache(config=model.config), TaskKVCache(model, 1.0, **SMALL))
    ]
    assert torch.equal(*found)
    assert model.config.vision_config._attn_implementation == "sdpa"
    small = TaskKVCache(model, 0.5, **SMALL)
    model.generate(**inputs, cache=small, **options)
    assert small.share < 0.7


def test_bad_input_while_it_runs():
    model = llama()
    ids, real = text(2, 40)

    def cache() -> TaskKVCache:
        return TaskKVCache(model, 0.5, **SMALL)

    right = torch.arange(40).expand(2, 40) < torch.tensor([[40], [30]])
    with pytest.raises(ValueError, match=r"a text ends in padding, .* pad on the left"):
        model(input_ids=ids, attention_mask=right.long(), cache=cache())
    with pytest.raises(ValueError, match="use_cache=False was given together with a cache"):
        model(input_ids=ids, cache=cache(), use_cache=False)
    used = cache()
    read(model, used, ids, real, [30])
    with pytest.raises(ValueError, match="holds a batch of 2 and was given one of 1; call reset"):
        read(model, used, ids[:1], real[:1], [1], start=30)
    model.train()
    with pytest.raises(ValueError, match=r"training mode; call model\.eval"):
        read(model, cache(), ids, real, [30])
    model.eval()
    with pytest.raises(ValueError, match="can be cropped"):
        model.generate(ids[:1], cache=cache(), assistant_model=llama(seed=1), max_new_tokens=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget is 0.0; expected a share of the prompt's cache above 0, up to 1"),
        ({"budget": 40.0}, "budget is 40.0; expected a share"),
        ({"beta": 1.5}, "beta is 1.5; expected a share of a layer's heads, 0 to 1"),
        ({"min_heads": 5}, "min_heads is 5; the model has 2 key heads in a layer"),
        ({"window": 8, "recent": 4}, "window is 8 and recent 4; .* expected 1 <= window <= recent"),
        ({"pool": 4}, "kernel is 4; expected an odd number"),
        ({"top": 0}, "top is 0; expected 1 or more keys, or None for all"),
        ({"sink": -1}, "sink is -1; expected a number of tokens"),
        ({"full_heads": "2.0"}, "layer 2 is out of range"),
        ({"full_heads": "*.0", "budget": 0.4}, "2 of 4 key heads are to keep everything, which is 50% of the cache"),
    ],
)
def test_bad_arguments(options, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        TaskKVCache(model, **options)
    assert model.config._attn_implementation == "sdpa"


def test_a_policy_must_be_one():
    with pytest.raises(TypeError, match="policy"):
        HeadBudgetCache(llama(), 0.4)  # pyright: ignore[reportArgumentType]


def test_heads_of_a_vision_tower_are_no_full_heads():
    with pytest.raises(ValueError, match="is not in the text decoder"):
        TaskKVCache(FAMILIES["llava"].build(), 0.5, "vision:0.0")


def test_short_texts_are_kept_whole_and_middling_ones_warn():
    model = llama(4, 1)
    ids, real = text(1, 60)
    cache = TaskKVCache(model, 0.4, sink=4, recent=8, window=8)
    read(model, cache, ids, real, [12, 1])
    assert cache.share == 1 and cache.heterogeneous == [None, None]
    cache.reset()
    with pytest.warns(UserWarning, match="60% of a prompt's cache is kept although budget is 40%: the text is too sh"):
        read(model, cache, ids, real, [20])
    assert cache.share == pytest.approx(0.6)
    read(model, TaskKVCache(model, 0.4, sink=4, recent=8, window=8), ids, real, [30])  # 12 of 30 is the budget
