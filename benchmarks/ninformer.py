"""NiNformer's gate in the place of attention, beside its plain equations with transposed tokens, as released, and a
layer of softmax attention at equal shape. Width 128, hidden sizes of 256, batch 4.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from benchmarks import Benchmark, setting
from benchmarks._parts import OURS, Part, Way, Work, benchmark_of, draw, of_module
from headwise.attention import MixerGate, SoftmaxAttention

WIDTH, HEADS, BATCH = 128, 4, 4
TOKENS = (64, 256, 1024, 4096)
RELEASED = "as released: tokens transposed"


def released(gate: MixerGate, x: Tensor) -> Tensor:
    y = gate.token_norm(x).transpose(1, 2)
    y = linear(gelu(linear(y, gate.token_up.weight, gate.token_up.bias)), gate.token_down.weight, gate.token_down.bias)
    z = x + y.transpose(1, 2)
    z = z + gate.channel_down(gelu(gate.channel_up(gate.channel_norm(z))))
    return gate.proj(x) * z


def work(tokens: int, as_released: bool) -> Work:
    torch.manual_seed(0)
    gate, x = MixerGate(WIDTH, tokens), draw((BATCH, tokens, WIDTH))[0]
    return of_module(gate, x, function=released if as_released else None)


def ways(tokens: int) -> dict[str, Way]:
    return {OURS: partial(work, tokens, False), RELEASED: partial(work, tokens, True)}


def softmax(tokens: int) -> Way:
    def make() -> Work:
        torch.manual_seed(0)
        return of_module(SoftmaxAttention(WIDTH, HEADS), draw((BATCH, tokens, WIDTH))[0])

    return make


def operations(tokens: int) -> float:
    hidden = 2 * WIDTH
    return BATCH * tokens * WIDTH * (4 * hidden + 4 * hidden + 2 * WIDTH)


PARTS = [Part("ninformer", TOKENS, "{} tokens".format, ways, (RELEASED,), softmax, operations, int)]


@torch.no_grad()
def check() -> None:
    """The plain equations give the same."""
    bound = 1e-5 if setting.dtype == "float32" else 3e-2
    torch.testing.assert_close(work(64, True)[0](), work(64, False)[0](), atol=bound, rtol=1e-3)


def benchmark() -> Benchmark:
    return benchmark_of("ninformer", PARTS, check)
