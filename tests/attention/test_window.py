"""Window attention: against plain attention, one window at a time, padding included."""

import pytest
import torch
from torch import nn

import headwise as hw
from headwise.attend import Ablate
from headwise.attention import SoftmaxAttention, WindowAttention, window_partition, window_reverse


def pair(window) -> tuple[WindowAttention, SoftmaxAttention]:
    """A window layer and the plain layer with its weights."""
    torch.manual_seed(0)
    ours, plain = WindowAttention(24, window, 3).eval(), SoftmaxAttention(24, 3).eval()
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize(("height", "width", "window"), [(6, 8, (3, 4)), (7, 5, 3), (2, 9, 4)])
def test_every_window_is_plain_attention_with_zeros_beyond_the_edge(height, width, window):
    ours, plain = pair(window)
    rows, columns = (window, window) if isinstance(window, int) else window
    x = torch.randn(2, height, width, 24)
    padded = nn.functional.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    expected = torch.zeros_like(padded)
    for top in range(0, padded.shape[1], rows):
        for left in range(0, padded.shape[2], columns):
            part = padded[:, top : top + rows, left : left + columns]
            expected[:, top : top + rows, left : left + columns] = plain(part.flatten(1, 2)).view(part.shape)
    torch.testing.assert_close(ours(x), expected[:, :height, :width])


def test_a_window_of_the_whole_map_is_plain_attention():
    ours, plain = pair((5, 6))
    x = torch.randn(2, 5, 6, 24)
    torch.testing.assert_close(ours(x).flatten(1, 2), plain(x.flatten(1, 2)))


def test_partition_and_back():
    x = torch.arange(2 * 4 * 6, dtype=torch.float32).view(2, 4, 6, 1)
    windows = window_partition(x, (2, 3))
    assert windows.shape == (8, 6, 1)
    assert windows[1, :, 0].tolist() == [3, 4, 5, 9, 10, 11], "the second window of the first rows"
    assert torch.equal(window_reverse(windows, (2, 3), (4, 6)), x)


def test_heads_are_edited_window_by_window():
    ours, _ = pair(3)
    x = torch.randn(1, 6, 6, 24)
    with torch.no_grad(), hw.steer(ours, Ablate(heads="0.*", mode="uniform")):
        even = ours(x)
    value = window_partition(ours.qkv(x)[..., 48:], 3).mean(1, keepdim=True).expand(-1, 9, -1)
    torch.testing.assert_close(even, ours.proj(window_reverse(value, 3, (6, 6))), atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="windows of 3 x 3 do not divide a map of 4 x 6"):
        window_partition(torch.zeros(1, 4, 6, 2), 3)
    with pytest.raises(ValueError, match="windows of 3 x 3 do not divide a map of 4 x 6"):
        window_reverse(torch.zeros(1, 9, 2), 3, (4, 6))
    with pytest.raises(ValueError, match="window_size is 0"):
        WindowAttention(24, 0, 3)
    with pytest.raises(ValueError, match="10 tokens, and grid_size is None"):
        WindowAttention(24, 3, 3)(torch.zeros(1, 10, 24))
    with pytest.raises(ValueError, match=r"10 tokens, and grid_size is \(3, 3\)"):
        WindowAttention(24, 3, 3, grid_size=(3, 3))(torch.zeros(1, 10, 24))
