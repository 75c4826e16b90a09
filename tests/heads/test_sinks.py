"""Sinks: activations of known size, a sink put into a model by hand, tokens that are no tokens, refusals."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.models_under_test import left_padded, text, tiny_llama
from tests.steering.pictures import batch, build, logits
from tests.zoo import IMAGE

from headwise.heads.sinks import (
    FoundSinks,
    find_sink_dims,
    find_sinks,
    massive_values,
    received_attention,
    sink_dims_of,
)
from headwise.hf.maps import attention_maps

WIDTH, LAYERS = 32, 2
NAMES = ("llava", "qwen2_vl")


@given(st.integers(0, 100), st.integers(1, 700), st.floats(0.01, 1000))
@settings(max_examples=60, deadline=None)
def test_phi_never_exceeds_the_root_of_the_hidden_size(seed, width, size):
    x = size * torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    assert (massive_values(x) <= math.sqrt(width) * (1 + 1e-5)).all()
    one = torch.zeros(width)
    one[-1] = size
    assert float(massive_values(one)) == pytest.approx(
        math.sqrt(width) / math.sqrt(1 + width * 1e-6 / size**2), rel=1e-4
    )


def test_phi_of_chosen_dimensions():
    x = torch.tensor([[[3.0, -4.0, 0.0, 0.0]]])
    rms = math.sqrt(25 / 4 + 1e-6)
    assert float(massive_values(x)) == pytest.approx(4 / rms)
    assert float(massive_values(x, [0, 2])) == pytest.approx(3 / rms)
    assert massive_values(x.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="dimension 4 is out of range; the hidden size is 4, so 0 to 3"):
        massive_values(x, [4])
    with pytest.raises(ValueError, match="dims is empty"):
        massive_values(x, [])


def planted(dim: int = 7, token: int = 5):
    """A Llama in which one word has a massive activation from the embedding on."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[token, dim] = 400.0
    return model


@pytest.mark.parametrize("layers", [[0], slice(1, None), None])
def test_a_planted_activation_is_found_wherever_its_word_stands(layers):
    model = planted()
    rows = [torch.tensor([1, 5, 3, 5, 4, 6, 2]), torch.tensor([1, 3, 5])]
    inputs = left_padded(rows)
    model.model.embed_tokens.weight.data[0] = 0
    model.model.embed_tokens.weight.data[0, 3] = 300.0  # padding would be a sink as well
    found = find_sinks(model, inputs, threshold=5.4, layers=slice(1, None) if layers is None else layers)
    chosen = [0] if layers == [0] else [1]
    expected = (inputs["input_ids"] == 5)[:, None].expand(-1, LAYERS, -1).clone()
    expected[:, [layer for layer in range(LAYERS) if layer not in chosen]] = False
    assert torch.equal(found.members, expected)
    assert found and found.values[:, chosen].isfinite().all() and found.heads is None
    assert torch.equal(find_sinks(model, inputs, threshold=5.4, layers=layers or [1], dims=[7]).members, expected)
    assert not find_sinks(model, inputs, threshold=5.4, layers=layers or [1], dims=[8])


def test_the_dimensions_of_the_token_that_receives_most():
    """The word that is looked at is massive in one dimension; so is another, at which nobody looks."""
    model, ids = planted(), torch.tensor([[1, 2, 5, 3, 8, 9, 10, 11]])
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 9] = 400.0
    received = received_attention(model, ids)
    token = int(received[0, 0].mean(0).argmax())
    x = model.model.embed_tokens(ids)[0, token]
    expected = tuple(sorted((x.abs() / x.square().mean().sqrt()).topk(2).indices.tolist()))
    assert find_sink_dims(model, ids, layers=[0]) == expected
    with pytest.raises(ValueError, match="top is 33; choose 1 to the hidden size 32"):
        find_sink_dims(model, ids, top=33, layers=[0])


def test_attention_received_is_the_mean_of_columns():
    model, rows = tiny_llama(), [text(1, 9)[0], text(1, 6, seed=1)[0]]
    inputs = left_padded(rows)
    found = received_attention(model, inputs)
    assert found[1, :, :, :3].isnan().all() and found.shape == (2, 2, 4, 9)
    for i, row in enumerate(rows):
        maps = attention_maps(model, row[None]).view(2, 4, len(row), len(row)).double()
        later = torch.arange(len(row), 0, -1)
        torch.testing.assert_close(found[i, :, :, -len(row) :].double(), maps.sum(-2) / later, atol=1e-5, rtol=1e-5)


def test_the_first_token():
    model, inputs = tiny_llama(), left_padded([text(1, 9)[0], text(1, 6, seed=1)[0]])
    found = find_sinks(model, inputs, by="first")
    assert found.members.nonzero().tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 3], [1, 1, 3]]
    assert isinstance(found, FoundSinks)
    assert find_sinks(model, inputs, by="first", layers=[1]).members[:, 0].sum() == 0


@pytest.mark.parametrize("name", NAMES)
def test_image_tokens_may_be_sinks(name):
    model, inputs = build(name), batch(name, "bwPww", "bPw")
    before = logits(model, **inputs)
    found = find_sinks(model, inputs, threshold=2.3, layers=slice(None))
    assert (found.members & (inputs["input_ids"] == IMAGE)[:, None]).any()
    assert not (found.members & (inputs["attention_mask"] == 0)[:, None]).any()
    assert torch.equal(logits(model, **inputs), before)


def test_what_is_refused_and_what_is_warned_of():
    model, ids = tiny_llama(), text()
    with pytest.warns(
        UserWarning, match=r"find_sinks: threshold is 20, but with a hidden size of 32 no token can pass"
    ):
        assert not find_sinks(model, ids, layers=[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_sinks(model, ids, threshold=5.6, layers=[0])
    with pytest.raises((ValueError, TypeError), match="'largest'"):
        find_sinks(model, ids, by="largest")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"threshold is -1.0; it must be above 0"):
        find_sinks(model, ids, threshold=-1.0)
    with pytest.raises(ValueError, match="the first token is a sink without one"):
        find_sinks(model, ids, by="first", threshold=0.5)
    with pytest.raises(ValueError, match="dims are those of massive activations"):
        find_sinks(model, ids, by="first", dims=[3])
    with pytest.raises(ValueError, match="dimension 40 is out of range"):
        find_sinks(model, ids, threshold=3.0, dims=[40], layers=[0])
    with pytest.raises(
        ValueError, match=r"layers is slice\(2, None, None\), which leaves none; the model has 2 layers"
    ):
        find_sinks(model, ids)
    assert sink_dims_of("meta-llama/Llama-2-7b-chat-hf") == (1415, 2533)
    assert sink_dims_of("Llama-2-13B") == (2100, 4743)
    with pytest.raises(ValueError, match="none are published for 'gpt2'"):
        sink_dims_of("gpt2")
