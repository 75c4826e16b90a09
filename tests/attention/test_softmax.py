"""The comparison layer against torch's own multi-head attention."""

import pytest
import torch
from torch import nn

from headwise.attention.softmax import SoftmaxAttention


@pytest.mark.parametrize("is_causal", [True, False])
def test_equals_torch(is_causal):
    torch.manual_seed(0)
    ours, theirs = SoftmaxAttention(32, 4, is_causal=is_causal).eval(), nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, mask = torch.randn(2, 7, 32), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:] = False
    later = torch.ones(7, 7, dtype=torch.bool).triu(1) if is_causal else None
    expected = theirs(x, x, x, key_padding_mask=~mask, attn_mask=later, need_weights=False)[0]
    torch.testing.assert_close(ours(x, mask), expected)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="embed_dim 30"):
        SoftmaxAttention(30, 4)
