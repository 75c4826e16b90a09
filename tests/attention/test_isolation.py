"""Isolation and reposition: exact limits, a plain loop in float64, and the message of everything that is refused."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from headwise.attention.isolation import (
    isolation_mask,
    reference_attention,
    reposition,
    reposition_source,
    subject_labels,
    subject_parts,
)
from headwise.attention.softmax import split_heads

FIXTURE = Path(__file__).parents[1] / "fixtures" / "subject_attention.safetensors"


def boxes(size: tuple[int, int], *corners: tuple[int, int, int, int]) -> Tensor:
    """`[1 s n]` masks of boxes (top, bottom, left, right), the last row and column inside."""
    masks = torch.zeros(1, len(corners), *size, dtype=torch.bool)
    for i, (top, bottom, left, right) in enumerate(corners):
        masks[0, i, top : bottom + 1, left : right + 1] = True
    return masks.flatten(2)


def by_hand(q, k, v, k_ref, v_ref, subjects, references, *, isolate=True, boost=0.0) -> Tensor:
    """Row by row in float64: each query lists the keys it may read and takes one softmax over them."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b, h, p in itertools.product(*(range(length) for length in q.shape[:3])):
        logits, values = [], []
        for i, j in itertools.product(range(k_ref.shape[1]), range(k_ref.shape[3])):
            if subjects[b, i, p] and references[b, i, j]:
                logits.append(float(q[b, h, p].double() @ k_ref[b, i, h, j].double()) / q.shape[-1] ** 0.5 + boost)
                values.append(v_ref[b, i, h, j].double())
        mine = [i for i in range(subjects.shape[1]) if subjects[b, i, p]]
        for j in range(k.shape[2]):
            theirs = [i for i in range(subjects.shape[1]) if subjects[b, i, j]]
            if isolate and len(mine) == 1 and len(theirs) == 1 and mine != theirs:
                continue
            logits.append(float(q[b, h, p].double() @ k[b, h, j].double()) / q.shape[-1] ** 0.5)
            values.append(v[b, h, j].double())
        most = max(logits)
        weights = [math.exp(logit - most) for logit in logits]
        out[b, h, p] = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    return out


def example(
    size=(4, 5), m_size=None, heads=2, dim=3, value=4, batch=1, subjects=2, dtype=torch.float32, large=1.0
) -> Any:
    n = size[0] * size[1]
    m = n if m_size is None else m_size
    shapes = [(batch, heads, n, dim), (batch, heads, n, dim), (batch, heads, n, value)]
    shapes += [(batch, subjects, heads, m, dim), (batch, subjects, heads, m, value)]
    return [large * torch.randn(shape, dtype=dtype) for shape in shapes]


# Unpacked inputs have no length that a type checker knows.
attend: Any = reference_attention
loop: Any = by_hand
sdpa: Any = F.scaled_dot_product_attention

SIZE = (4, 5)
TARGET = boxes(SIZE, (0, 1, 0, 2), (2, 3, 3, 4))
REFERENCE = boxes(SIZE, (1, 3, 1, 2), (0, 0, 0, 4))


@pytest.mark.parametrize("implementation", ["gathered", "masked"])
@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(("boost", "large"), [(0.0, 1.0), (1.5, 6.0)])
def test_one_softmax_over_what_each_query_may_read(implementation, isolate, boost, large):
    x = example(large=large)
    options = {"isolate": isolate, "boost": boost}
    out = attend(*x, TARGET, REFERENCE, **options, implementation=implementation)
    wanted = loop(*x, TARGET, REFERENCE, **options)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(0, 10**6)
)
def test_any_shape_and_any_disjoint_masks(rows, columns, batch, subjects, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    n, m = rows * columns, 1 + seed % 5
    labels = torch.randint(subjects + 1, (batch, n), generator=generator)
    target = labels[:, None] == torch.arange(1, subjects + 1)[:, None]
    reference = torch.rand(batch, subjects, m, generator=generator) < 0.5
    torch.manual_seed(seed)
    x = example((rows, columns), m, heads, 3, 2, batch, subjects, torch.float64)
    wanted = loop(*x, target, reference)
    for implementation in ("gathered", "masked"):
        out = attend(*x, target, reference, implementation=implementation)
        torch.testing.assert_close(out, wanted, atol=1e-10, rtol=1e-10)


def test_other_subjects_have_no_gradient_at_all():
    """Rows of subject i depend on nothing in subject j: the Jacobian is exactly 0 for every pair, and not elsewhere."""
    subjects = boxes(SIZE, (0, 1, 0, 1), (0, 0, 3, 4), (3, 3, 0, 4))
    labels = subject_labels(subjects)[0]
    weights = [torch.randn(6, 6, dtype=torch.float64) for _ in range(3)]
    hidden = torch.randn(1, 20, 6, dtype=torch.float64)
    x = example(SIZE, subjects=3, dim=3, value=3, dtype=torch.float64)

    def layer(states: Tensor) -> Tensor:
        q, k, v = ((states @ w).unflatten(-1, (2, 3)).transpose(1, 2) for w in weights)
        return reference_attention(q, k, v, x[3], x[4], subjects, subjects).transpose(1, 2).flatten(2)

    whole: Any = torch.autograd.functional.jacobian(layer, hidden)
    jacobian = whole[0, :, :, 0].abs().sum((1, 3))  # [row, token]
    for i, j in itertools.product(range(4), repeat=2):
        between = jacobian[labels == i][:, labels == j]
        if i and j and i != j:
            assert not between.any()
        else:
            assert bool((between > 0).all())


def test_gradients_reach_references_and_agree():
    x = [part.requires_grad_() for part in example(dtype=torch.float64)]
    found = {}
    for implementation in ("gathered", "masked"):
        out = attend(*x, TARGET, REFERENCE, implementation=implementation, boost=0.3)
        found[implementation] = torch.autograd.grad(out.square().sum(), x)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    k_gradient = found["gathered"][3]
    reached = k_gradient.abs().sum((2, -1)) > 0  # [b s m]
    assert torch.equal(reached, REFERENCE)


def test_isolation_mask_by_the_definition():
    mask = isolation_mask(TARGET)[0]
    labels = subject_labels(TARGET)[0].tolist()
    for p, q in itertools.product(range(20), repeat=2):
        assert bool(mask[p, q]) == (not (labels[p] and labels[q] and labels[p] != labels[q]))
    assert bool(isolation_mask(torch.zeros(2, 3, 7, dtype=torch.bool)).all())


def test_tokens_in_two_subjects():
    """Refused by default; for isolation they belong to neither, or to the later one."""
    masks = boxes(SIZE, (0, 1, 0, 2), (1, 2, 2, 3), (1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"1 tokens lie in two subjects; give disjoint masks.*'later'"):
        isolation_mask(masks)
    shared = 7  # row 1, column 2: in all three
    assert subject_labels(masks, overlap="neither")[0, shared] == 0
    assert subject_labels(masks, overlap="later")[0, shared] == 3
    assert bool(isolation_mask(masks, overlap="neither")[0, shared].all())
    x = example(subjects=3)
    references = boxes(SIZE, (0, 0, 0, 1), (1, 1, 0, 1), (2, 2, 0, 1))
    for implementation in ("gathered", "masked"):
        both = attend(*x, masks, references, overlap="neither", implementation=implementation)
        torch.testing.assert_close(both.double(), loop(*x, masks, references), atol=1e-5, rtol=1e-5)
        later = attend(*x, masks, references, overlap="later", implementation=implementation)
        settled = subject_labels(masks, overlap="later")[:, None] == torch.arange(1, 4)[:, None]
        torch.testing.assert_close(later.double(), loop(*x, settled, references), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="overlap is 'first'"):
        subject_labels.__wrapped__(masks, overlap="first")


def test_two_prohibitions_of_one_pair_make_no_nan():
    """Several subjects that hide one another's tokens, and a reference that is masked, leave every row a number."""
    masks = torch.eye(20, dtype=torch.bool)[None, :5]
    x = example(subjects=5, large=30.0)
    for implementation in ("gathered", "masked"):
        out = attend(*x, masks, masks & False, boost=-20.0, implementation=implementation)
        assert bool(torch.isfinite(out).all())
    half = [part.bfloat16() for part in x]
    assert bool(torch.isfinite(attend(*half, masks, masks)).all())


@pytest.mark.parametrize("which", ["subjects", "references"])
def test_without_queries_or_keys_it_is_the_isolated_target_alone(which):
    x = example()
    none = torch.zeros_like(TARGET)
    given_masks = (none, REFERENCE) if which == "subjects" else (TARGET, none)
    out = attend(*x, *given_masks)
    alone = sdpa(*x[:3], isolation_mask(given_masks[0])[:, None])
    torch.testing.assert_close(out, alone)


def test_neutral_masks_are_plain_attention():
    x = example(subjects=1)
    everywhere = torch.ones(1, 1, 20, dtype=torch.bool)
    out = attend(*x, everywhere, everywhere & False)
    torch.testing.assert_close(out, sdpa(*x[:3]))
    same = attend(*x[:3], x[1][:, None], x[2][:, None], everywhere, everywhere)
    torch.testing.assert_close(same, sdpa(*x[:3]))  # every key twice changes nothing


def test_a_boost_is_a_factor_on_the_mass_of_references():
    """Keys of the reference repeated twice are a boost of log 2."""
    x = example(subjects=1)
    target, reference = TARGET[:, :1], REFERENCE[:, :1]
    boosted = attend(*x, target, reference, boost=math.log(2))
    twice = [torch.cat([part, part], 3) for part in x[3:]]
    doubled = attend(*x[:3], *twice, target, torch.cat([reference, reference], -1))
    torch.testing.assert_close(boosted, doubled)


def crop_and_paste(features: Tensor, reference: Tensor, target: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The definition, for one item: cut the masked box, resize it, paste it on zeros; the mask moves alike."""
    grid = (features * reference[:, None]).unflatten(0, size).permute(2, 0, 1)
    own, place = (mask.unflatten(0, size).nonzero() for mask in (reference, target))
    (top, left), (bottom, right) = own.amin(0).tolist(), own.amax(0).tolist()
    (up, west), (down, east) = place.amin(0).tolist(), place.amax(0).tolist()
    form = (down - up + 1, east - west + 1)
    canvas, mask = torch.zeros_like(grid), torch.zeros(size)
    cut = grid[:, top : bottom + 1, left : right + 1]
    canvas[:, up : down + 1, west : east + 1] = F.interpolate(cut[None], form, mode="nearest")[0]
    cut = reference.unflatten(0, size).float()[top : bottom + 1, left : right + 1]
    mask[up : down + 1, west : east + 1] = F.interpolate(cut[None, None], form, mode="nearest")[0, 0]
    return canvas.permute(1, 2, 0).flatten(0, 1), mask.flatten() > 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_reposition_is_cutting_resizing_and_pasting(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, 3, rows * columns, generator=generator) < 0.3
    masks[:, :, int(torch.randint(rows * columns, (1,), generator=generator))] = True
    features = torch.randn(3, rows * columns, 4, generator=generator)
    moved, its = reposition(features, masks[0], masks[1], (rows, columns))
    for item in range(3):
        wanted, mask = crop_and_paste(features[item], masks[0, item], masks[1, item], (rows, columns))
        assert torch.equal(its[item], mask) and torch.equal(moved[item], wanted)


def test_identical_boxes_are_masking_only():
    mask = boxes(SIZE, (1, 2, 1, 3))[:, 0] & (torch.rand(1, 20) < 0.7)
    mask[:, [6, 13]] = True  # its corners: the box stays
    features = torch.randn(1, 20, 3)
    moved, its = reposition(features, mask, mask, SIZE)
    assert torch.equal(its, mask) and torch.equal(moved, features * mask[..., None])


def test_there_and_back_on_sizes_that_divide():
    small, large = boxes((8, 8), (1, 2, 5, 7))[:, 0], boxes((8, 8), (2, 7, 0, 5))[:, 0]
    features = torch.randn(1, 64, 3)
    there, its = reposition(features, small, large, (8, 8))
    back, own = reposition(there, its, small, (8, 8))
    assert torch.equal(own, small) and torch.equal(back, features * small[..., None])


def test_areas_scale_as_boxes_and_boxes_hold_their_last_row():
    small, large = boxes((8, 8), (1, 2, 5, 7))[:, 0], boxes((8, 8), (2, 7, 0, 5))[:, 0]
    checked = small & (torch.arange(64) % 2 == 1)[None]
    checked[:, [13, 23]] = True  # two of its corners
    source = reposition_source(checked, large, (8, 8))
    assert int((source >= 0).sum()) == int(checked.sum()) * 36 // 6
    assert source[0, 7 * 8 + 5] == 2 * 8 + 7  # the last corner comes from the last corner
    assert source[0, 2 * 8] == (8 + 5 if checked[0, 13] else -1)


def test_without_a_place_the_subject_stays():
    mask = boxes(SIZE, (0, 1, 0, 2))[:, 0]
    features = torch.randn(1, 20, 3)
    for mode in ("nearest", "bilinear"):
        moved, its = reposition(features, mask, mask & False, SIZE, mode)
        assert torch.equal(moved, features) and torch.equal(its, mask)
        moved, its = reposition(features, mask & False, mask, SIZE, mode)
        assert not its.any() and not moved.any()


def test_one_row_and_one_token_are_boxes_too():
    """The released code stops at references one token wide."""
    line, dot = boxes(SIZE, (3, 3, 1, 4))[:, 0], boxes(SIZE, (0, 0, 0, 0))[:, 0]
    assert reposition_source(line, dot, SIZE).amax() == 3 * 5 + 1
    assert bool((reposition_source(dot, line, SIZE)[line] == 0).all())


def test_bilinear_blends_inside_the_box():
    features = torch.arange(16.0).view(1, 16, 1)
    mask, place = boxes((4, 4), (0, 1, 0, 1))[:, 0], boxes((4, 4), (0, 3, 0, 3))[:, 0]
    moved, its = reposition(features, mask, place, (4, 4), "bilinear")
    wanted = F.interpolate(features.view(1, 1, 4, 4)[..., :2, :2], (4, 4), mode="bilinear", align_corners=False)
    assert bool(its.all())
    torch.testing.assert_close(moved.flatten(), wanted.flatten())


def test_without_positions_equal_boxes_change_nothing():
    """Attention does not depend on the order of its keys: only a change of size, which repeats keys, is seen."""
    x = example((6, 6), subjects=1)
    target, here = boxes((6, 6), (3, 5, 3, 5)), boxes((6, 6), (0, 2, 1, 3))
    plain = attend(*x, target, here)
    flat = [part[:, 0].transpose(1, 2).flatten(2) for part in x[3:]]
    moved = [reposition(part, here[:, 0], target[:, 0], (6, 6)) for part in flat]
    laid = [part.unflatten(-1, (2, -1)).transpose(1, 2)[:, None] for part, _ in moved]
    torch.testing.assert_close(attend(*x[:3], *laid, target, moved[0][1][:, None]), plain)
    other = boxes((6, 6), (2, 5, 2, 5))
    parts = subject_parts(other, here, (6, 6))
    assert sorted(set(parts[0].keys[0].tolist())) == here[0, 0].nonzero().flatten().tolist()
    assert parts[0].keys.shape[1] == 16 and here.sum() == 9


def test_parts_leave_out_subjects_without_a_query_or_a_key():
    target = torch.cat([TARGET, TARGET[:, :1] & False], 1)
    reference = torch.cat([REFERENCE[:, :1], REFERENCE[:, :1] & False, REFERENCE[:, :1]], 1)
    assert [part.subject for part in subject_parts(target, reference)] == [0]
    part = subject_parts(TARGET, REFERENCE, offset=7)[1]
    assert part.rows.min() == 7 + 2 * 5 + 3 and part.keys.tolist() == [[7, 8, 9, 10, 11]]


def test_what_is_refused():
    x = example()
    unchecked = subject_labels.__wrapped__  # past the type checks that only the tests have
    with pytest.raises(TypeError, match=r"subject_masks is torch\.float32; expected booleans"):
        unchecked(TARGET.float())
    with pytest.raises(ValueError, match="expected 3 dimensions"):
        unchecked(TARGET[0])
    with pytest.raises(ValueError, match="holds no subject"):
        isolation_mask(torch.zeros(1, 0, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected \[b, 12\] for both"):
        reposition_source(TARGET[:, 0], TARGET[:, 1], (3, 4))
    with pytest.raises(TypeError, match=r"target_mask is torch\.int64"):
        reposition_source.__wrapped__(TARGET[:, 0], TARGET[:, 1].long(), SIZE)
    with pytest.raises(ValueError, match="batch and tokens must match"):
        reposition.__wrapped__(torch.zeros(1, 19, 2), TARGET[:, 0], TARGET[:, 1], SIZE)
    with pytest.raises(ValueError, match="mode is 'cubic'"):
        reposition.__wrapped__(torch.zeros(1, 20, 2), TARGET[:, 0], TARGET[:, 1], SIZE, "cubic")
    unchecked = reference_attention.__wrapped__
    with pytest.raises(ValueError, match=r"reference_masks has shape \(1, 2, 19\)"):
        unchecked(*x, TARGET, REFERENCE[..., :19])
    with pytest.raises(ValueError, match=r"subject_masks has shape \(1, 2, 20\); .* expected \(1, 3, 20\)"):
        unchecked(*x[:3], *(torch.cat([part, part[:, :1]], 1) for part in x[3:]), TARGET, REFERENCE)
    with pytest.raises(ValueError, match="boost is nan"):
        unchecked(*x, TARGET, REFERENCE, boost=math.nan)
    with pytest.raises(ValueError, match="implementation is 'fast'"):
        unchecked(*x, TARGET, REFERENCE, implementation="fast")


def test_inputs_are_left_alone():
    """Scores are never edited in place; what a function gives back is what counts."""
    x = example()
    before = [part.clone() for part in (*x, TARGET, REFERENCE)]
    for implementation in ("gathered", "masked"):
        attend(*x, TARGET, REFERENCE, boost=1.0, implementation=implementation)
    flat = x[3][:, 0, 0]
    reposition(flat, REFERENCE[:, 0], TARGET[:, 0], SIZE)
    assert all(torch.equal(a, b) for a, b in zip(before, (*x, TARGET, REFERENCE), strict=True))


@pytest.mark.parametrize("case", ["isolated", "read", "repositioned", "boosted"])
def test_against_the_official_code(case):
    """Self-attention of two references and a target, with and without guidance (tests/oracles/subject_attention.py)."""
    kept = load_file(FIXTURE)
    states, size = kept["states"].unflatten(0, (2, 3)), (6, 8)
    target, reference = (kept[name][None].expand(2, -1, -1) for name in ("target", "reference"))

    def heads(name: str, x: Tensor) -> Tensor:
        return split_heads(x @ kept[f"weight/to_{name}.weight"].T, 2)

    q, k, v = (heads(name, states[:, -1]) for name in "qkv")
    if case == "isolated":
        out = F.scaled_dot_product_attention(q, k, v, isolation_mask(target)[:, None])
    else:
        laid = [(states[:, i], reference[:, i]) for i in range(2)]
        if case != "read":
            laid = [reposition(x, mask, target[:, i], size) for i, (x, mask) in enumerate(laid)]
        k_ref, v_ref = (torch.stack([heads(name, x) for x, _ in laid], 1) for name in "kv")
        masks = torch.stack([mask for _, mask in laid], 1)
        boosted = case == "boosted"
        options: dict[str, Any] = {"isolate": not boosted, "boost": 0.7 if boosted else 0.0}
        out = reference_attention(q, k, v, k_ref, v_ref, target, masks, **options)
    mixed = out.transpose(1, 2).flatten(2) @ kept["weight/to_out.0.weight"].T + kept["weight/to_out.0.bias"]
    wanted = kept[f"out/{case}"].unflatten(0, (2, 3))
    torch.testing.assert_close(mixed, wanted[:, -1], atol=1e-4, rtol=1e-4)
    said = []
    for i in range(3):
        q, k, v = (heads(name, states[:, i]) for name in "qkv")
        plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        said.append(plain @ kept["weight/to_out.0.weight"].T + kept["weight/to_out.0.bias"])
    torch.testing.assert_close(torch.stack(said[:2], 1), wanted[:, :2], atol=1e-4, rtol=1e-4)
    assert (said[2] - wanted[:, -1]).abs().max() > 0.1
