"""The contract of `attention`, applied to every module that it exports, and to itself."""

import inspect
from collections.abc import Callable

import pytest
import torch
from tests.compiling import assert_compiles
from tests.contracts.discovery import exported, make
from tests.contracts.mechanisms import CONTRACT, layout_of
from torch import Tensor, nn

Options = dict[str, bool]


def cases(cls: type[nn.Module]) -> list[tuple[type[nn.Module], Options]]:
    """A mechanism that can be causal or not is tested as both."""
    both = "is_causal" in inspect.signature(cls).parameters
    return [(cls, {"is_causal": causal}) for causal in (True, False)] if both else [(cls, {})]


MECHANISMS = [cls for cls in exported("attention", nn.Module) if layout_of(cls) in ("b t c", "b n c")]
CASES = [case for cls in MECHANISMS for case in cases(cls)]
IDS = [" ".join([cls.__name__, *(f"{name}={value}" for name, value in given.items())]) for cls, given in CASES]


def example(cls: type[nn.Module], given: Options) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module = make(cls, **given).eval()
    return module, torch.randn(3, getattr(module, "num_tokens", 13), 32)


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_contract(case: tuple[type[nn.Module], Options], check: Callable[[nn.Module, Tensor], None]):
    check(*example(*case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_compiled_equals_eager(case: tuple[type[nn.Module], Options]):
    module, x = example(*case)
    assert_compiles(module, x)


class Causal(nn.Module):
    """Plain causal attention: passes. Its flaws below each break one rule."""

    is_causal = True
    flaw = ""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        b, t, c = x.shape
        if self.flaw == "changes its input" and b:
            x[0] = x[0] * 2
        if self.flaw == "mixes items" and b:
            x = x + x.mean(0, keepdim=True)
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        if self.flaw == "sees the future":
            mask = torch.ones(t, t, dtype=torch.bool)
        if attention_mask is not None and self.flaw != "ignores the mask":
            mask = (mask & attention_mask[:, None, None, :]) | torch.eye(t, dtype=torch.bool)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).reshape(b, t, c))


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_a_sound_mechanism_passes(check: Callable[[nn.Module, Tensor], None]):
    check(*example(Causal, {}))


@pytest.mark.parametrize("flaw", ["changes its input", "mixes items", "sees the future", "ignores the mask"])
def test_a_flaw_is_seen(flaw: str):
    def fails(check: Callable[[nn.Module, Tensor], None]) -> bool:
        module, x = example(type("Flawed", (Causal,), {"flaw": flaw}), {})
        try:
            check(module, x)
        except AssertionError:
            return True
        return False

    assert any(fails(check) for check in CONTRACT)
