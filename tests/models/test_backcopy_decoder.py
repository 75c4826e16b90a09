"""The decoder of the sink study: what each change of its attention does."""

import pytest
import torch

from headwise.models.backcopy_decoder import BackcopyDecoder, Trace
from headwise.tasks.bigram_backcopy import BigramBackcopy


def made(**options) -> tuple[BackcopyDecoder, torch.Tensor]:
    torch.manual_seed(0)
    return BackcopyDecoder(33, 24, width=16, **options), BigramBackcopy(32, 3, 24).sample(4)


def test_trace_holds_rows_that_sum_to_one_and_every_residual_state():
    model, ids = made(layers=3)
    trace = Trace()
    model(ids, trace=trace)
    assert len(trace.weights) == len(trace.values) == 3 and len(trace.residuals) == 4
    torch.testing.assert_close(trace.weights[0].sum(-1), torch.ones(4, 1, 24))


def test_held_weight_is_that_of_an_even_row():
    model, ids = made(hold="weight")
    trace = Trace()
    model(ids, trace=trace)
    even = 1 / torch.arange(1, 25)
    torch.testing.assert_close(trace.weights[0][..., 0], even.expand(4, 1, 24))
    torch.testing.assert_close(trace.weights[0][:, :, 1:].sum(-1), torch.ones(4, 1, 23))


def test_held_value_has_the_mean_norm_of_the_others():
    model, ids = made(hold="value")
    trace = Trace()
    model(ids, trace=trace)
    norms = trace.values[0].norm(dim=-1)
    torch.testing.assert_close(norms[..., 0], norms[..., 1:].mean(-1))


def test_relu_weights_are_those_of_the_mechanism():
    from headwise.attention.relu import relu_attention

    model, ids = made(attention="relu")
    trace = Trace()
    model(ids, trace=trace)
    norm, qkv = (model.get_submodule(f"blocks.0.{name}") for name in ("attention_norm", "attention.qkv"))
    q, k, v = qkv(norm(trace.residuals[0])).view(4, 24, 3, 1, 16).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(trace.weights[0] @ v, relu_attention(q, k, v))


def test_running_without_heads_leaves_only_the_mlps():
    model, ids = made()
    trace = Trace()
    model(ids, trace=trace, instead="zero")
    norm, mlp = (model.get_submodule(f"blocks.0.{name}") for name in ("mlp_norm", "mlp"))
    torch.testing.assert_close(trace.residuals[1], trace.residuals[0] + mlp(norm(trace.residuals[0])))


def test_all_weight_on_a_random_token_is_on_an_earlier_one_and_never_on_bos():
    model, ids = made()
    trace = Trace()
    model(ids, trace=trace, instead="random")
    column = trace.weights[0][0, 0].argmax(-1)
    assert (column[2:] >= 1).all() and (column[2:] < torch.arange(2, 24)).all()


def test_refusals():
    with pytest.raises(ValueError, match="attention is 'linear'"):
        BackcopyDecoder(3, 4, attention="linear")
    with pytest.raises(ValueError, match="25 tokens, but it has 24 positions"):
        made()[0](torch.zeros(1, 25, dtype=torch.long))
