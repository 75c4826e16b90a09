"""The Gaussian adaptive transformer: hidden states of encoders in, classes and importance out."""

import pytest
import torch

from headwise.models import GaussianAdaptiveConfig, GaussianAdaptiveTransformer


def model(**options) -> GaussianAdaptiveTransformer:
    torch.manual_seed(0)
    sizes = {"feature_size": 8, "num_feature_layers": 3, "num_heads": 2, "hidden_size": 12, "num_labels": 4}
    return GaussianAdaptiveTransformer(GaussianAdaptiveConfig(**(sizes | options))).eval()


X = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(1))


def test_a_tuple_of_hidden_states_is_read_as_it_comes():
    net = model()
    torch.testing.assert_close(net(tuple(X.unbind(1))).logits, net(X).logits)


@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("dim", ["time", "feature"])
def test_padding_has_no_influence(heads, dim):
    net = model(num_attention_heads=heads, num_kv_heads=heads and 2, dim=dim)
    mask = torch.arange(10)[None].expand(2, 10) < 7
    padded = torch.cat([X, 100 * torch.randn(2, 3, 3, 8)], 2)
    torch.testing.assert_close(net(padded, mask).logits, net(X).logits, atol=1e-5, rtol=1e-4)
    importance = net.importance(padded, mask)
    if dim == "time":
        assert not importance[:, :, 7:].any()


def test_grouped_queries_are_really_grouped():
    net = model(num_attention_heads=4, num_kv_heads=2)
    assert net.blocks[0].attention.qkv.out_features == 8 + 2 * 4


def test_a_neutral_network_is_the_mean_of_its_layers():
    net = model(num_blocks=1)
    torch.nn.init.constant_(net.blocks[0].gaussian.log_width, 12.0)
    with torch.no_grad():
        net.layer_logits.copy_(torch.tensor([0.0, 50.0, 0.0]))
    expected = net.head(2 * X[:, 1].mean(1))  # even weights, times their number, added to the input
    torch.testing.assert_close(net(X).logits, expected, atol=1e-4, rtol=1e-4)


def test_importance_ranks_what_is_typical():
    x = torch.randn(4, 3, 20, 8)
    x[:, :, 5] += 9  # an outlier at one time
    importance = model(num_gaussians=1).importance(x)
    assert importance.shape == x.shape and importance.min() == 0 and importance.max() == 1
    by_time = importance.mean((0, 1, 3))
    assert by_time.argmin() == 5


def test_a_loss_and_refusals():
    assert model()(X, labels=torch.tensor([0, 3])).loss.ndim == 0
    assert model()(X, return_dict=False)[0].shape == (2, 4)
    with pytest.raises(ValueError, match=r"expected \[batch, 3 layers, time, 8\]"):
        model()(X[:, :2])
    with pytest.raises(ValueError, match="dim is 'layer'"):
        model(dim="layer")
