"""Heads of headwise's own networks are read and changed like those of a pretrained model."""

import pytest
import torch
from torch import nn

import headwise as hw
from headwise.attend import Ablate, Contribution, HeadOutputs, HeadPoint, Sink
from headwise.attention import SoftmaxAttention
from headwise.errors import UnsupportedModel
from headwise.hf import probe


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return SoftmaxAttention(32, 4, num_kv_heads=2, is_causal=True).eval()


X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))


def test_a_neutral_edit_changes_no_bit(layer):
    plain = layer(X)
    with hw.steer(layer, hw.attend.ScaleHeads(heads="0.1", scale=1.0)):
        assert torch.equal(layer(X), plain)
    assert layer.head_point.visit is None


def test_an_ablated_head_is_a_column_of_zeros_in_the_projection(layer):
    with hw.steer(layer, Ablate(heads="0.2", mode="zero")):
        out = layer(X)
    with torch.no_grad():
        layer.proj.weight[:, 16:24] = 0
    torch.testing.assert_close(out, layer(X))


def test_weights_are_read_and_changed(layer):
    sink = Sink()
    with probe(layer, sink):
        plain = layer(X)
    q, k, _ = layer.qkv(X).split([32, 16, 16], -1)
    q, k = q.view(2, 9, 4, 8).transpose(1, 2), k.view(2, 9, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(sink.scores()["", 0].float(), scores.softmax(-1)[:, :, 1:, 0].mean((0, 2)))
    with hw.steer(layer, Ablate(mode="uniform")):
        assert not torch.allclose(layer(X), plain)
    assert torch.equal(layer(X), plain)


def test_what_heads_write_sums_to_the_layer(layer):
    outputs, contribution = HeadOutputs(), Contribution()
    with probe(layer, outputs, contribution):
        mixed = layer(X)
    torch.testing.assert_close(layer.proj(outputs.values["", 0].flatten(2)), mixed)
    assert set(contribution.scores()) == {("", 0)}


class NoSoftmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_point = HeadPoint(2)

    def forward(self, x):
        return self.head_point(x.unflatten(-1, (2, -1))).flatten(2)


def test_a_mechanism_without_rows_refuses_what_needs_them():
    layer, x = NoSoftmax(), torch.randn(1, 3, 4)
    with hw.steer(layer, Ablate(heads="0.1", mode="zero")):
        assert torch.equal(layer(x)[..., 2:], torch.zeros(1, 3, 2)) and torch.equal(layer(x)[..., :2], x[..., :2])
    with hw.steer(layer, Ablate(heads="0.1", mode="uniform")), pytest.raises(UnsupportedModel, match="layer 0"):
        layer(x)
    with probe(layer, Sink()), pytest.raises(UnsupportedModel, match="Sink"):
        layer(x)


def test_unknown_heads_are_refused(layer):
    with pytest.raises(ValueError, match=r"1\.0"), hw.steer(layer, Ablate(heads="1.0", mode="zero")):
        pass
