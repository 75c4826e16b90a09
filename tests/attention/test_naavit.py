"""NAAViT attention: text rows alone, against loops over tokens and the whole rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.attention.naavit import naavit_attention, naavit_mask, text_rows, text_rows_mask


def masks(draw):
    """Any arrangement of images and padding in a batch; at least one text token somewhere."""
    b, s = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    kinds = draw(st.lists(st.sampled_from("tip"), min_size=b * s, max_size=b * s))  # text, image, padding
    kinds[draw(st.integers(0, b * s - 1))] = "t"
    grid = torch.tensor(["tip".index(kind) for kind in kinds]).view(b, s)
    return grid == 1, grid != 2


arrangements = st.composite(masks)()


def loops(q, k, v, visual, real):
    """Output `[b h s e]` of every text row, from the sentence that defines it; other rows stay 0."""
    b, h, s, d = q.shape
    out = torch.zeros(b, h, s, v.shape[-1], dtype=torch.float64)
    for row in range(b):
        for i in range(s):
            if visual[row, i] or not real[row, i]:
                continue
            seen = [j for j in range(i + 1) if real[row, j]]
            for head in range(h):
                group = head // (h // k.shape[1])
                scores = torch.stack([q[row, head, i] @ k[row, group, j] for j in seen]) * d**-0.5
                weights = scores.softmax(0)
                out[row, head, i] = sum(w * v[row, group, j] for w, j in zip(weights, seen, strict=True))
    return out


@given(arrangements, st.sampled_from([0.5, 20.0]))
def test_text_rows_are_those_of_the_definition(arrangement, size):
    visual, real = arrangement
    b, s = visual.shape
    generator = torch.Generator().manual_seed(s)
    q = size * torch.randn(b, 4, s, 4, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(b, 2, s, width, generator=generator, dtype=torch.float64) for width in (4, 6))
    rows = text_rows(visual, real)
    compressed = torch.stack([rows.gather(head) for head in q.transpose(0, 1)], 1)
    wanted = loops(q, k, v, visual, real)
    for implementation in ("auto", "reference"):
        out = naavit_attention(compressed, k, v, visual, real, implementation=implementation)
        spread = torch.stack([rows.spread(head, s) for head in out.transpose(0, 1)], 1)
        torch.testing.assert_close(spread, wanted, atol=1e-10, rtol=1e-8)


@given(arrangements)
def test_rows_and_masks_agree(arrangement):
    visual, real = arrangement
    rows, mask = text_rows(visual, real), naavit_mask(visual, real)
    s = visual.shape[1]
    for row in range(len(visual)):
        text = [j for j in range(s) if real[row, j] and not visual[row, j]]
        assert rows.index[row, rows.real[row]].tolist() == text
        assert rows.real[row].tolist() == sorted(rows.real[row].tolist())  # aligned to the right
        assert len(set(rows.index[row].tolist())) == rows.index.shape[1]
        for i in range(s):
            seen = [j for j in range(s) if mask[row, 0, i, j]]
            assert seen == ([j for j in range(i + 1) if real[row, j]] if i in text else [])
    compressed = text_rows_mask(rows, s, real)
    whole = mask.gather(2, rows.index[:, None, :, None].expand(-1, 1, -1, s))
    assert torch.equal(compressed, whole & rows.real[:, None, :, None])


def test_what_image_tokens_ask_does_not_matter():
    """A query of an image token has no place to go in: only text queries are taken, and none sees a later token."""
    visual = torch.tensor([[False, True, True, False, True, False]])
    k, v = torch.randn(2, 1, 2, 6, 4)
    q = torch.randn(1, 2, 3, 4)
    out = naavit_attention(q, k, v, visual)
    later = k.clone()
    later[:, :, 4:] = 100.0
    assert torch.equal(naavit_attention(q, later, v, visual)[:, :, :2], out[:, :, :2])
    assert not torch.allclose(naavit_attention(q, later, v, visual)[:, :, 2], out[:, :, 2])


def test_nothing_of_padding_and_no_gradient_to_it():
    visual = torch.tensor([[False, False, True, False], [False, True, True, False]])
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    rows = text_rows(visual, real)
    assert rows.index.shape == (2, 2)
    q, k, v = (torch.randn(2, 2, n, 4, requires_grad=True) for n in (2, 4, 4))
    out = naavit_attention(q, k, v, visual, real)
    gradients = torch.autograd.grad(out.square().sum(), (k, v))
    for gradient in gradients:
        assert not gradient[0, :, 0].any() and gradient[1, :, 0].any()


def test_gradients_are_those_of_the_reference():
    visual = torch.tensor([[False, True, True, False, False]])
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    check = lambda q, k, v: naavit_attention(q, k, v, visual, implementation="reference")  # noqa: E731
    assert torch.autograd.gradcheck(check, (q, k, v))
    found = [
        torch.autograd.grad(naavit_attention(q, k, v, visual, implementation=name).sin().sum(), (q, k, v))
        for name in ("auto", "reference")
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_no_image_is_causal_attention_and_empty_is_empty():
    q, k, v = torch.randn(3, 2, 2, 7, 4)
    none = torch.zeros(2, 7, dtype=torch.bool)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(naavit_attention(q, k, v, none), plain)
    images = torch.ones(2, 7, dtype=torch.bool)
    assert naavit_attention(q[:, :, :0], k, v, images).shape == (2, 2, 0, 4)
    assert naavit_attention(q[:0, :, :0], k[:0], v[:0], none[:0]).shape == (0, 2, 0, 4)


def test_refusals():
    q, k, v = torch.randn(3, 1, 2, 4, 4)
    visual = torch.tensor([[False, True, True, False]])
    with pytest.raises(ValueError, match=r"q_text has 4 rows but the masks leave 2 text tokens at most"):
        naavit_attention(q, k, v, visual)
    with pytest.raises(ValueError, match=r"visual_mask \(1, 3\) do not fit"):
        naavit_attention(q[:, :, :2], k, v, visual[:, :3])
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 3\) and visual_mask \(1, 4\)"):
        text_rows(visual, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="implementation is 'fast'; choose 'auto' or 'reference'"):
        naavit_attention(q[:, :, :2], k, v, visual, implementation="fast")
