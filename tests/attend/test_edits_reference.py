"""Every edit and probe equals its definition on weights written out in float64, whatever path the library takes."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.attend.defined_edits import (
    Defined,
    biased,
    defined,
    head_value,
    members,
    place,
    probe_scores,
    scaled,
    visible,
    with_sink_column,
)
from torch import Tensor

from headwise.attend import _behind as behind
from headwise.attend import groups, merge
from headwise.attend.addresses import Head
from headwise.attend.call import Call
from headwise.attend.edit import Edit
from headwise.attend.edits import (
    Ablate,
    BiasGroup,
    EditRows,
    ForceRows,
    PerturbScores,
    ProjectHead,
    ReplaceHeads,
    ScaleGroup,
    ScaleHeads,
)
from headwise.attend.machine import BoundEdit, attend
from headwise.attend.probes import make_probe
from headwise.attend.step import Step

# Drawn inside the tests: a strategy may not use `random`, which the run-time type checks do.
Draw = Callable[[st.SearchStrategy], Any]


def examples(count: int) -> settings:
    """No shrinking: a case is many tensors and drawn within the test, so that it would take minutes and tell little."""
    return settings(max_examples=count, phases=[Phase.explicit, Phase.generate])


KINDS = ("flag", "dense", "window", "bias", "eager", "bidirectional")


def calls(draw: Draw, kinds=KINDS, dtype=torch.float32, softcaps=(None, 30.0), sinks=(False, True)) -> Call:
    """A call with padding, a cache, groups of keys that may hold almost all of a row, and every kind of mask."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    b, n, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(kinds))
    t = draw(st.integers(1, 11))
    past = 0 if kind in ("flag", "bidirectional") else draw(st.sampled_from([0, 0, 4]))
    s, h, d = past + t, n * group, 16
    e = draw(st.sampled_from([16, 8, 24]))
    q, k, v = torch.randn(b, h, t, d), torch.randn(b, n, s, d), torch.randn(b, n, s, e)
    # Some keys stand out by a constant on their scores: 14 leaves 1e-6 to all the others together.
    q[..., -1] = 1
    loud = torch.rand(s) < draw(st.sampled_from([0.0, 0.2, 0.6]))
    k[..., -1] = 4 * draw(st.sampled_from([-14.0, -3.0, 0.0, 3.0, 14.0, 20.0])) * loud
    real = torch.ones(b, s, dtype=torch.bool)
    padding = "none" if kind in ("flag", "bidirectional") else draw(st.sampled_from(["none", "left", "right"]))
    for i in range(1, b):
        count = draw(st.integers(0, s - 1)) if padding != "none" else 0
        real[i, :count] &= padding != "left"
        real[i, s - count :] &= padding != "right"
    row, column = torch.arange(past, s)[:, None], torch.arange(s)
    seen = (column <= row) & real[:, None, None]
    if kind == "window":
        seen &= row - column < 3
    mask: Tensor | None = seen
    if kind == "bias":  # a dense relative bias for each head
        mask = (2 * torch.randn(1, h, t, s)).masked_fill(~seen, -math.inf)
    elif kind == "eager":
        mask = torch.zeros(b, 1, t, s).masked_fill(~seen, torch.finfo(dtype).min)
        if not bool(seen.any(-1).all()):  # its rows without keys are rows of equal biases: another definition
            mask = torch.zeros(b, 1, t, s).masked_fill(~seen, -math.inf)
        mask = mask.to(dtype)
    elif kind in ("flag", "bidirectional"):
        mask = None
    ids = torch.randint(0, 4, (b, s))
    return Call(
        q=q.to(dtype),
        k=k.to(dtype),
        v=v.to(dtype),
        mask=mask,
        causal=kind == "flag",
        scale=0.25,
        softcap=draw(st.sampled_from(softcaps)),
        sinks=3 * torch.randn(h) if draw(st.sampled_from(sinks)) else None,
        kind="bidirectional" if kind == "bidirectional" else "causal",
        step=Step(ids=ids, real=real, prompt=torch.ones_like(real), past=past, length=t),
    )


def key_groups(draw: Draw, call: Call):
    """A key group, and its columns by the oracle."""
    shortest = int(call.step.real.sum(-1).min())
    kind = draw(st.sampled_from(["first", "recent", "spans", "positions", "positions"]))
    total = call.step.total
    if kind == "first":
        return groups.first_token(), members(call, kind, None)
    if kind == "recent":
        n = draw(st.integers(1, 3))
        return groups.recent(n), members(call, kind, n)
    if kind == "spans":
        start = draw(st.integers(0, shortest - 1))
        ranges = [(start, draw(st.integers(start + 1, shortest)))]
        return groups.spans(ranges), members(call, kind, ranges)
    chosen = draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=total, unique=True))
    return groups.positions(chosen), members(call, kind, chosen)


def some_heads(draw: Draw, call: Call) -> list[int]:
    return sorted(draw(st.sets(st.integers(0, call.q.shape[1] - 1), min_size=1)))


def named(heads: list[int]) -> list[Head]:
    return [Head(0, head) for head in heads]


def some_rows(draw: Draw, call: Call):
    """`when`, and the rows by the oracle: mostly all of them."""
    if draw(st.integers(0, 3)):
        return "all", None
    rows = torch.rand(call.q.shape[0], call.q.shape[2]) > 0.5
    return (lambda step: rows), rows


def group_edits(draw: Draw, call: Call, last: bool = True) -> tuple[Edit, Defined]:
    """last: only then may rows be left that do not sum to 1."""
    group, columns = key_groups(draw, call)
    heads, (when, rows) = some_heads(draw, call), some_rows(draw, call)
    columns = with_sink_column(call, columns)
    h = call.q.shape[1]
    if draw(st.booleans()):
        bias = draw(st.sampled_from([-math.inf, -30.0, -1.0, 0.5, 5.0, 100.0, math.inf, "table", "heads"]))
        bias = {"table": torch.randn(1, h), "heads": {Head(0, i): float(i) for i in heads}}.get(bias, bias)
        edit = BiasGroup(group, bias, heads=named(heads), when=when)
        return edit, Defined("weights", heads, lambda w, i, _: biased(w, columns, head_value(bias, i, 0.0)), rows)
    remainder = draw(st.sampled_from(["rest", "renormalise", *["none"] * last]))
    factors = [0.0, 0.01, 0.4, 0.9, 1.7, 50.0, "table"] + ([1e6, math.inf] if remainder != "none" else [])
    factor = draw(st.sampled_from(factors))
    factor = 3 * torch.rand(1, h) if factor == "table" else factor
    edit = ScaleGroup(group, factor, heads=named(heads), when=when, remainder=remainder)
    return edit, Defined(
        "weights", heads, lambda w, i, _: scaled(w, columns, head_value(factor, i, 1.0), remainder), rows
    )


def keys_of(call: Call, change):
    """A change of weights `[b t s]` that leaves the sink column out."""

    def changed(weights, head, _):
        s = call.k.shape[2]
        return torch.cat([change(weights[..., :s], head), 0 * weights[..., s:]], -1)

    return changed


def row_edits(draw: Draw, call: Call, last: bool = True) -> tuple[Edit, Defined]:
    heads, (when, rows) = some_heads(draw, call), some_rows(draw, call)
    shown, (row, column) = visible(call), place(call)
    t, s = call.q.shape[2], call.k.shape[2]
    kinds = ["first", "previous", "self", "uniform", "perturb", "function", *["tensor"] * last]
    kind = draw(st.sampled_from(kinds))
    if kind == "perturb":
        delta = 3 * torch.randn(len(heads), t, s)
        delta[:, :, -1] += draw(st.sampled_from([0.0, 200.0]))  # also where it is hidden

        def perturbed(w, head, _):
            shift = torch.nn.functional.pad(delta[heads.index(head)].double(), (0, w.shape[-1] - s))
            new = w * shift.exp()
            return torch.where(new.sum(-1, keepdim=True) > 0, new / new.sum(-1, keepdim=True), w)

        return PerturbScores(delta, heads=named(heads), when=when), Defined("weights", heads, perturbed, rows)
    if kind == "function":
        # Half of every row goes evenly to what it sees; the sink column, which functions do not see, keeps its part.
        def spread(w, shown):
            return (w + w.sum(-1, keepdim=True) * shown / shown.sum(-1, keepdim=True).clamp(min=1)) / 2

        def change(w, head, _):
            return torch.cat([spread(w[..., :s], shown[:, head]), w[..., s:]], -1)

        edit = EditRows(lambda w, rows: spread(w, rows.visible), heads=named(heads), when=when)
        return edit, Defined("weights", heads, change, rows)
    pattern = torch.rand(t, s) if kind == "tensor" else kind

    def forced(_, head):
        new = shown[:, head].double()
        if kind == "uniform":
            return new / new.sum(-1, keepdim=True).clamp(min=1)
        if kind == "tensor":
            return new * pattern
        if kind == "first":
            return new * (new.cumsum(-1) == 1)
        back = int(kind == "previous")  # the first row of all has itself before it
        return new * (column == (row[:, None] - back).clamp(min=int(column[0])))

    return ForceRows(pattern, heads=named(heads), when=when), Defined("weights", heads, keys_of(call, forced), rows)


def input_edits(draw: Draw, call: Call, last: bool = True) -> tuple[Edit, Defined]:
    heads = some_heads(draw, call)
    which, keep = draw(st.sampled_from(["q", "k", "v"])), draw(st.booleans())
    size = (call.v if which == "v" else call.q).shape[-1]
    bases = {Head(0, i): torch.linalg.qr(torch.randn(size, 3))[0] for i in heads}

    def project(q, k, v, head, _):
        basis = bases[Head(0, head)].double()
        inputs = {"q": q, "k": k, "v": v}
        part = inputs[which] @ basis @ basis.T
        inputs[which] = part if keep else inputs[which] - part
        return inputs.values()

    return ProjectHead(which, bases, keep=keep, heads=named(heads)), Defined("input", heads, project)


def output_edits(draw: Draw, call: Call, last: bool = True) -> tuple[Edit, Defined]:
    heads, (when, rows) = some_heads(draw, call), some_rows(draw, call)
    b, h, t, _ = call.q.shape
    kind = draw(st.sampled_from(["factor", "table", "per item", "replace", "function"]))
    if kind in ("replace", "function"):
        value = torch.randn((*draw(st.sampled_from([(), (t,), (b, t)])), call.v.shape[-1]))
        values = {Head(0, i): (lambda out: 2 * out + 1) if kind == "function" else value + i for i in heads}

        def replaced(out, i, _):
            return 2 * out + 1 if kind == "function" else (value + i).double().expand_as(out)

        return ReplaceHeads(values, heads=named(heads), when=when), Defined("output", heads, replaced, rows)
    scale = {"factor": 0.3, "table": torch.randn(1, h), "per item": torch.randn(b, 1, h)}[kind]

    def multiplied(out, i, _):
        return out * (scale[..., 0, i].double().reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale)

    return ScaleHeads(scale=scale, heads=named(heads), when=when), Defined("output", heads, multiplied, rows)


def bound(pairs) -> list[BoundEdit]:
    return [BoundEdit(edit, {("", 0): meaning.heads}) for edit, meaning in pairs]


def row_error(out: Tensor, want: Tensor, weights: Tensor, v: Tensor) -> Tensor:
    """Largest error of each row over what its terms weigh."""
    size = weights.abs() @ v.double().abs().repeat_interleave(weights.shape[1] // v.shape[1], 1)
    return (out.double() - want).abs().amax(-1) / torch.maximum(size, want.abs()).amax(-1).clamp(min=1e-300)


def check(call: Call, pairs, tolerance: float = 1e-5) -> None:
    out = attend(call, bound(pairs)).transpose(1, 2)
    want, weights = defined(call, [meaning for _, meaning in pairs])
    assert bool(out.isfinite().all())
    assert row_error(out, want, weights, call.v).max() <= tolerance
    touched = {head for _, meaning in pairs for head in meaning.heads}
    others = [head for head in range(call.q.shape[1]) if head not in touched]
    assert torch.equal(out[:, others], attend(call).transpose(1, 2)[:, others])


@examples(160)
@given(st.data(), st.booleans(), st.sampled_from([1, 1, 3, 32]))
def test_group_edits(data, direct, rows):
    """rows: so few that lie behind all groups get calls of their own."""
    call = calls(data.draw)
    count = data.draw(st.integers(1, 3))
    pairs = [group_edits(data.draw, call, last=i == count - 1) for i in range(count)]
    with (
        patch.multiple(merge, SMALL=64 if direct else -1, DIRECT_BYTES=2**26 if direct else -1),
        patch.object(behind, "ROWS", rows),
    ):
        check(call, pairs)


@examples(60)
@given(st.data())
def test_row_edits(data):
    call = calls(data.draw)
    check(call, [row_edits(data.draw, call, last=i == 1) for i in range(2)])


@examples(40)
@given(st.data())
def test_input_and_output_edits(data):
    call = calls(data.draw)
    check(call, [input_edits(data.draw, call), output_edits(data.draw, call), output_edits(data.draw, call)])


@examples(80)
@given(st.data())
def test_all_edits_together_act_in_order(data):
    call = calls(data.draw)
    kinds = st.sampled_from([group_edits, row_edits, input_edits, output_edits])
    check(call, [data.draw(kinds)(data.draw, call, last=i == 3) for i in range(4)], tolerance=3e-5)


@examples(40)
@given(st.data(), st.sampled_from(["zero", "uniform", "first"]))
def test_ablations(data, mode):
    call = calls(data.draw)
    heads, shown = some_heads(data.draw, call), visible(call)

    def ablated(_, head, __):
        w = shown[:, head].double()
        if mode == "zero":
            w = 0 * w
        elif mode == "first":
            w = w * (w.cumsum(-1) == 1)
        if mode == "uniform" and call.sinks is not None:  # a query of zeros: every logit 0, the sink's stays
            return torch.nn.functional.pad(w / (w.sum(-1, keepdim=True) + call.sinks[head].double().exp()), (0, 1))
        w = w / w.sum(-1, keepdim=True).clamp(min=1)
        return torch.nn.functional.pad(w, (0, int(call.sinks is not None)))

    edit = Ablate(named(heads), mode=mode)
    check(call, [(part, Defined("weights", heads, ablated)) for part in edit.primitives()])


@examples(80)
@given(st.data(), st.sampled_from([1, 32]))
def test_bfloat16_is_no_worse_than_twice_the_plain_path(data, rows):
    call = calls(data.draw, dtype=torch.bfloat16)
    pairs = [group_edits(data.draw, call, last=i == 1) for i in range(2)]
    plain = row_error(attend(call).transpose(1, 2), *defined(call, []), call.v).max()
    with patch.object(behind, "ROWS", rows):
        found = attend(call, bound(pairs)).transpose(1, 2)
    edited = row_error(found, *defined(call, [p[1] for p in pairs]), call.v).max()
    assert edited <= 2 * max(float(plain), 2**-8)  # an output is rounded to 8 bits in any case


@examples(80)
@given(st.data())
def test_gradient_through_edits(data):
    call = calls(data.draw)
    call = replace(call, **{x: getattr(call, x).double() for x in "qkv"}, step=call.step)
    if call.mask is not None and call.mask.dtype != torch.bool:
        call.mask = call.mask.double()
    kinds = st.sampled_from([group_edits, group_edits, output_edits, row_edits])
    pairs = [data.draw(kinds)(data.draw, call, last=i == 1) for i in range(2)]
    leaves = [getattr(call, x).requires_grad_() for x in "qkv"]
    out = attend(call, bound(pairs)).transpose(1, 2)
    direction = torch.randn_like(out)
    if not out.requires_grad:  # every head was replaced
        return
    got = torch.autograd.grad((out * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
    assert all(x.isfinite().all() for x in got)
    want_out, _ = defined(call, [meaning for _, meaning in pairs])
    want = torch.autograd.grad((want_out * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
    if all(x.isfinite().all() for x in want):  # the definition divides by masses of 0 and knows no way round
        for have, wanted in zip(got, want, strict=True):
            torch.testing.assert_close(have, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gone", [1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("factor", [0.0, 0.01, 0.4, 0.7, 1.0 + 1e-3, math.inf])
@pytest.mark.parametrize("remainder", ["rest", "renormalise"])
def test_masses_up_to_one(gone, factor, remainder):
    q, k, v = torch.randn(1, 2, 300, 16), torch.randn(1, 1, 300, 16), torch.randn(1, 1, 300, 16)
    q[..., -1], k[..., -1] = 1, 0
    k[:, :, 0, -1] = -4 * math.log(gone / 300) if gone else 400
    call = Call(q, k, v, causal=True, scale=0.25)
    edit = ScaleGroup(groups.first_token(), factor, remainder=remainder, heads=named([0, 1]))
    columns = members(call, "first", None)[:, None]
    check(call, [(edit, Defined("weights", [0, 1], lambda w, *_: scaled(w, columns, factor, remainder)))], 5e-6)


def test_own_groups_of_one_name_are_told_apart():
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    call = Call(q, k, v, causal=True, step=Step.of(1, 4))  # one forward: what groups select is remembered in it
    outs = []
    for chosen in (0, 1):
        group = groups.KeyGroup("mine", lambda step, chosen=chosen: step.real & (torch.arange(step.total) == chosen))
        outs.append(attend(call, [BoundEdit(BiasGroup(group, 5.0), {("", 0): [0]})]))
    assert not torch.equal(*outs)


def test_a_factor_of_infinity_where_the_mass_underflows():
    q, k, v = torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    k[:, :, 0] = -100
    edit = ScaleGroup(groups.first_token(), math.inf, heads=named([0]))
    out = attend(Call(q, k, v, causal=True, scale=1.0), [BoundEdit(edit, {("", 0): [0]})])
    torch.testing.assert_close(out[0, :, 0], v[0, 0, :1].expand(3, 8))


@examples(60)
@given(st.data(), st.booleans())
def test_probes_equal_written_out_weights(data, edited):
    call = calls(data.draw, kinds=("flag", "dense", "window", "bias"))
    pairs = [group_edits(data.draw, call)] if edited else []
    pairs = [p for p in pairs if getattr(p[0], "remainder", "") != "none"]
    _, weights = defined(call, [meaning for _, meaning in pairs])
    names = ["sink", "dormant", "previous", "duplicate", "induction", "entropy", "entropy-nats", "distance"]
    names += ["distance-share", "sinks", "value-weighted-sink"]
    probes = [make_probe(name) for name in names]
    attend(call, bound(pairs), probes)
    want = probe_scores(call, weights, call.step.ids)
    for probe in probes:
        nothing = [math.nan] * call.q.shape[1]
        got = probe.scores()["", 0]
        expected = torch.tensor(want.get(probe.name, nothing), dtype=torch.float64)
        torch.testing.assert_close(
            got, expected, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, name=probe.name: f"{name}: {m}"
        )
