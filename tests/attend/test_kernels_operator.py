"""What torch's private operator does on its own: each fact is one guard of `attention_with_lse`.

When a newer torch changes one of these, the guard can go, or must change.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def inputs(dtype=torch.float32, n=2):
    return [torch.randn(2, heads, 40, 16, dtype=dtype) for heads in (4, n, n)]


def test_grouped_keys_work_and_equal_torch_bit_for_bit():
    q, k, v = inputs()
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(operator(q, k, v, 0.0, True)[0], want)


def test_key_mask_beside_the_causal_flag_equals_the_dense_mask_bit_for_bit():
    q, k, v = inputs()
    keys = torch.zeros(2, 1, 1, 40).masked_fill(torch.rand(2, 1, 1, 40) > 0.7, -torch.inf)
    keys[:, :, :, 0] = 0
    dense = keys.expand(2, 1, 40, 40).masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf)
    for have, want in zip(
        operator(q, k, v, 0.0, True, attn_mask=keys), operator(q, k, v, attn_mask=dense), strict=True
    ):
        assert torch.equal(have, want)


def test_boolean_masks_are_refused():
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="mask"):
        operator(q, k, v, attn_mask=torch.ones(40, 40, dtype=torch.bool))


def test_float32_mask_with_float64_queries_is_garbage():
    q, k, v = inputs(torch.float64)
    mask = torch.randn(1, 1, 40, 40)
    got = operator(q, k, v, attn_mask=mask)[0]
    assert not torch.allclose(got, operator(q, k, v, attn_mask=mask.double())[0], atol=0.1)


def test_fully_masked_rows_report_zero():
    q, k, v = inputs()
    mask = torch.zeros(1, 1, 40, 40)
    mask[:, :, 3] = -torch.inf
    out, lse = operator(q, k, v, attn_mask=mask)
    assert not out[:, :, 3].any() and not lse[:, :, 3].any()


def test_finfo_min_rows_are_the_mean_of_all_keys():
    q, k, v = inputs()
    hidden = ~torch.ones(40, 40, dtype=torch.bool).tril()
    hidden[3] = True
    mask = torch.zeros(40, 40).masked_fill(hidden, torch.finfo(torch.float32).min)
    out, _ = operator(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out[:, :, 3], v.mean(2).repeat_interleave(2, 1))


def test_other_value_sizes_are_refused():
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="same head size"):
        operator(q, k, v[..., :8].contiguous())


def test_padded_values_are_close_to_torch():
    q, k, v = inputs()
    v = v[..., :8].contiguous()
    out = operator(q, k, F.pad(v, (0, 8)))[0][..., :8]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), rtol=0, atol=2e-6)


def test_strided_values_are_misread():
    q, k, v = (torch.randn(1, 2, 5, 16)[..., ::2] for _ in range(3))
    got = operator(q, k, v)[0]
    assert not torch.allclose(got, operator(q.contiguous(), k.contiguous(), v.contiguous())[0])


@pytest.mark.slow
@pytest.mark.parametrize(("t", "s"), [(0, 5), (5, 0)])
def test_empty_axes_end_the_process(t, s):
    code = (
        "import torch; z = torch.zeros;"
        f"torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(z(1,1,{t},8), z(1,1,{s},8), z(1,1,{s},8))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode < 0


def test_an_empty_batch_is_fine():
    q, k, v = (x[:0] for x in inputs())
    assert operator(q, k, v)[0].shape == (0, 4, 40, 16)


def test_autocast_is_ignored():
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(q, k, v)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_float32_lse(dtype):
    out, lse = operator(*inputs(dtype))
    assert out.dtype == dtype and lse.dtype == torch.float32


def test_the_log_sum_exp_has_no_gradient():
    q, k, v = (x.requires_grad_() for x in inputs())
    out, lse = operator(q, k, v)
    assert out.requires_grad and not lse.requires_grad
