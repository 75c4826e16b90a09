"""Window attention: ordinary attention inside windows that do not overlap, without shifts and position bias.

Paper: headwise/papers/davit.py (Ding et al., ECCV 2022), after Swin.
"""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from headwise.attend.call import Call
from headwise.attend.point import HeadPoint
from headwise.attention.softmax import check_heads, split_heads

__all__ = ["WindowAttention", "window_partition", "window_reverse"]


def window_partition(x: Float[Tensor, "b y x c"], window_size: int | Sequence[int]) -> Float[Tensor, "n t c"]:
    """Cut maps into windows, image by image in rows of windows: `[b y x c]` to `[b * windows, tokens, c]`.

    Raises ValueError where the windows do not divide the map.
    """
    rows, columns = _window(window_size)
    b, height, width, c = x.shape
    if height % rows or width % columns:
        raise ValueError(f"window_partition: windows of {rows} x {columns} do not divide a map of {height} x {width}")
    x = x.view(b, height // rows, rows, width // columns, columns, c)
    return x.transpose(2, 3).reshape(-1, rows * columns, c)


def window_reverse(
    windows: Float[Tensor, "n t c"], window_size: int | Sequence[int], size: Sequence[int]
) -> Float[Tensor, "b y x c"]:
    """Put windows together again; size: rows and columns of the map. Undoes `window_partition`."""
    rows, columns = _window(window_size)
    height, width = size
    if height % rows or width % columns:
        raise ValueError(f"window_reverse: windows of {rows} x {columns} do not divide a map of {height} x {width}")
    x = windows.view(-1, height // rows, width // columns, rows, columns, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def _window(window_size: int | Sequence[int]) -> tuple[int, int]:
    rows, columns = (window_size, window_size) if isinstance(window_size, int) else window_size
    if rows < 1 or columns < 1:
        raise ValueError(f"window_size is {window_size}; expected numbers from 1 on")
    return rows, columns


class WindowAttention(nn.Module):
    """Multi-head attention inside windows of a map `[b y x c]`, or of `[b n c]` with a grid_size.

    A map that windows do not divide is padded with zeros at the right and at the bottom, before the projection: padded
    positions have the projection's bias as key and value, and take part in the softmax, as in the released networks.
    """

    patterns = ("noncausal self",)
    layout = "b n c"

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int],
        num_heads: int,
        *,
        grid_size: Sequence[int] | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        check_heads("WindowAttention", dim, num_heads)
        self.window_size, self.num_heads, self.head_dim = _window(window_size), num_heads, dim // num_heads
        self.grid_size = None if grid_size is None else tuple(grid_size)
        if self.grid_size is not None:
            self.num_tokens = math.prod(self.grid_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.head_point = HeadPoint(num_heads)
        self.proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}"

    def forward(self, x: Float[Tensor, "b *S c"]) -> Float[Tensor, "b *S c"]:
        """Raises ValueError for tokens without their grid, or of another one."""
        shape = x.shape
        if x.ndim == 3:
            if self.grid_size is None or shape[1] != self.num_tokens:
                raise ValueError(
                    f"WindowAttention: {shape[1]} tokens, and grid_size is {self.grid_size}; give the grid of the "
                    "tokens, or a map [b y x c]"
                )
            x = x.view(shape[0], *self.grid_size, shape[2])
        height, width = x.shape[1:3]
        rows, columns = self.window_size
        below, right = -height % rows, -width % columns
        if below or right:
            x = pad(x, (0, 0, 0, right, 0, below))
        windows = window_partition(x, self.window_size)
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(windows).chunk(3, -1))
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2)
        call = lambda: Call(q, k, v, None, False, self.head_dim**-0.5, kind="bidirectional")  # noqa: E731
        mixed = self.proj(self.head_point(out, call, self.proj).flatten(2))
        out = window_reverse(mixed, self.window_size, (height + below, width + right))
        return out[:, :height, :width].reshape(shape)
