"""Rows behind all keys that edits name: the split is taken where it holds, and gives what the masked path gives."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from headwise.attend import _behind as behind
from headwise.attend import merge
from headwise.attend.call import Call
from headwise.attend.edits import ScaleGroup
from headwise.attend.groups import positions, recent
from headwise.attend.machine import BoundEdit, attend
from headwise.attend.step import Step
from headwise.ops.masks import triangle

T = 104
IMAGES = {"one": [(4, 30)], "two": [(4, 30), (40, 52)], "none before": [(0, 20)]}


def members(spans: list[tuple[int, int]], shifts: list[int], total: int) -> Tensor:
    inside = torch.zeros(len(shifts), total, dtype=torch.bool)
    for item, shift in enumerate(shifts):
        for start, stop in spans:
            inside[item, start + shift : stop + shift] = True
    return inside


def made(kind: str, dtype: torch.dtype = torch.float64, past: int = 0) -> Call:
    """A call of 6 heads over 2 key heads. kind: of the padding, or none; past: keys of a cache before its rows."""
    torch.manual_seed(0)
    b, total = (1 if kind == "flag" else 3), past + T
    q, k, v = torch.randn(b, 6, T, 16), torch.randn(b, 2, total, 16), torch.randn(b, 2, total, 16)
    real = torch.ones(b, total, dtype=torch.bool)
    for item, count in enumerate([0, 5, 13][:b]):
        real[item, :count] &= kind != "left"
        real[item, total - count :] &= kind != "right"
    mask = torch.ones(T, total, dtype=torch.bool).tril(past) & real[:, None, None]
    step = Step(ids=torch.zeros_like(real).long(), real=real, prompt=torch.ones_like(real), past=past, length=T)
    plain = kind == "flag" and not past
    inputs: Any = {"mask": None if plain else mask, "causal": plain, "scale": 0.25, "step": step}
    return Call(q.to(dtype), k.to(dtype), v.to(dtype), **inputs)


def edited(call: Call, group: Any, rows: Any = "all", **options: Any) -> Tensor:
    edit = ScaleGroup(group, 0.3, when=rows, **options)
    return attend(call, [BoundEdit(edit, {("", 0): list(range(6))})])


@pytest.mark.parametrize("kind", ["flag", "left", "right", "even"])
@pytest.mark.parametrize("past", [0, 24])
@pytest.mark.parametrize("where", IMAGES)
def test_it_is_the_masked_path(kind, past, where):
    """Padding on both sides, a prompt in chunks, grouped keys, several pictures, each sequence's at its own place."""
    call = made(kind, past=past)
    shifts = [0, 5, 13] if kind == "left" else [0] * len(call.q)
    group = positions(members(IMAGES[where], shifts, past + T))
    taken = []
    with patch.object(merge, "rows_behind", lambda *a: taken.append(behind.rows_behind(*a)) or taken[-1]):
        found = edited(call, group)
    assert taken[0] is not None and T - taken[0].first >= behind.ROWS
    with patch.object(behind, "ROWS", 10**6):
        expected = edited(call, group)
    real = call.real_rows
    torch.testing.assert_close(found[real], expected[real], atol=1e-12, rtol=1e-12)
    plain = attend(call)
    assert (found - plain)[real].abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["flag", "left"])
def test_untouched_rows_and_half_precision(kind):
    call = made(kind, torch.float32)
    shifts = [0, 5, 13][: len(call.q)]
    inside = members(IMAGES["two"], shifts, T)
    touched = (inside.cumsum(-1) > 0) & ~inside & call.step.real
    plain, exact = attend(call), edited(call, positions(inside), lambda step: touched)
    assert torch.equal(exact[~touched], plain[~touched])
    half = replace(call, q=call.q.bfloat16(), k=call.k.bfloat16(), v=call.v.bfloat16(), memo={})
    error = (edited(half, positions(inside), lambda step: touched).float() - exact)[touched].norm()
    own = (attend(half).float() - plain)[touched].norm()
    assert error <= 1.5 * own


def test_gradients_are_those_of_the_masked_path():
    call = made("left")
    group = positions(members(IMAGES["one"], [0, 5, 13], T))
    inputs = [x.clone().requires_grad_() for x in (call.q, call.k, call.v)]
    one = replace(call, q=inputs[0], k=inputs[1], v=inputs[2], memo={})
    real = call.real_rows[..., None, None]
    found = torch.autograd.grad((edited(one, group) * real).square().sum(), inputs)
    with patch.object(behind, "ROWS", 10**6):
        expected = torch.autograd.grad((edited(one, group) * real).square().sum(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


def test_no_key_is_read_twice():
    """Of 74 rows behind the picture: 26 keys of it, 4 before it, and a causal square."""
    call, sizes = made("flag"), []
    before = behind.attention_with_lse

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        sizes.append((q.shape[2], k.shape[2], options.get("causal", False), options["mask"] is None))
        return before(q, k, v, **options)

    touched = torch.arange(T)[None] >= 30
    with patch.object(behind, "attention_with_lse", counted):
        edited(call, positions(members(IMAGES["one"], [0], T)), lambda step: touched)
    assert sizes == [(74, 26, False, True), (74, 4, False, True), (74, 74, True, True)]


def test_where_it_does_not_hold():
    def split(call: Call, group: Any) -> bool:
        taken = []
        with patch.object(merge, "rows_behind", lambda *a: taken.append(behind.rows_behind(*a)) or taken[-1]):
            edited(call, group)
        return taken[0] is not None

    early = positions(list(range(4, 30)))
    call = made("even")
    assert split(call, early)
    assert not split(call, recent(2)), "the last keys are named"
    assert not split(call, positions([T - behind.ROWS])), "too few rows"
    window = call.mask & ~torch.ones(T, T, dtype=torch.bool).tril(-50)  # pyright: ignore[reportOptionalOperand]
    assert not split(replace(call, mask=window, memo={}), early), "rows do not see all that comes before"
    bias = torch.zeros(1, 6, T, T, dtype=torch.float64).masked_fill(~call.mask, -torch.inf)  # pyright: ignore[reportOptionalOperand]
    assert not split(replace(call, mask=bias, memo={}), early), "heads have biases"
    assert not split(replace(call, mask=None, causal=False, memo={}), early), "rows see what follows"


def test_triangle():
    keys = torch.tensor([[False, True, True, True, True], [True, True, True, True, True]])[:, None, None]
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2) & keys
    found = triangle(mask, 2)
    assert found is not None and torch.equal(found, keys)
    assert triangle(mask, 1) is None and triangle(mask, 0) is None
    mask[0, 0, 0, 1] = False  # hidden from one row alone
    assert triangle(mask, 2) is None
    assert triangle(mask.float(), 2) is None


def test_a_group_of_the_prompt_is_asked_once():
    asked = []
    from headwise.attend.groups import KeyGroup, first_token, image_tokens, spans, tokens

    assert all(group.settled for group in (first_token(), spans([(0, 2)]), image_tokens(), tokens([1])))
    assert not any(group.settled for group in (recent(2), positions([1]), tokens([1], prompt_only=False)))
    group = KeyGroup("spans", lambda step: asked.append(1) or step.prompt & (step.ids == 0), settled=True)
    carried: dict = {}

    def step(past: int, length: int, real: Tensor | None = None) -> Step:
        made = Step.of(1, length, past=past)
        made.ids.zero_()
        made.prompt[:, 4:] = False
        made.carried = carried
        made.real = made.real if real is None else real
        return made

    empty = step(0, 4, torch.zeros(1, 4, dtype=torch.bool))
    assert not group.members(empty).any() and not carried, "padding alone settles nothing"
    assert group.members(step(0, 4)).tolist() == [[True] * 4]
    assert group.members(step(4, 1)).tolist() == [[True] * 4 + [False]]
    assert group.members(step(5, 1)).tolist() == [[True] * 4 + [False] * 2]
    assert len(asked) == 2
    assert group.members(step(4, 2)).tolist() == [[True] * 4 + [False] * 2]
    assert len(asked) == 3, "more of the prompt, or a shorter sequence, is asked anew"
