"""Token merging against a loop, and its inverse."""

import pytest
import torch

from headwise.ops.token_merging import match_tokens


def by_hand(x: torch.Tensor, grid, merged, stride, chosen) -> torch.Tensor:
    """Merged tokens of one item: cell by cell, source by source. chosen: place of the destination in each cell."""
    rows, columns = grid
    destinations = [
        (i * stride[0] + chosen // stride[1]) * columns + j * stride[1] + chosen % stride[1]
        for i in range(rows // stride[0])
        for j in range(columns // stride[1])
    ]
    sources = [i for i in range(rows * columns) if i not in destinations]
    unit = x / x.norm(dim=-1, keepdim=True)
    best = {i: max((float(unit[i] @ unit[j]), j) for j in destinations) for i in sources}
    order = sorted(sources, key=lambda i: -best[i][0])
    groups = {j: [x[j]] for j in destinations}
    for i in order[:merged]:
        groups[best[i][1]].append(x[i])
    return torch.stack([x[i] for i in order[merged:]] + [torch.stack(groups[j]).mean(0) for j in destinations])


@pytest.mark.parametrize(("grid", "stride"), [((4, 4), (2, 2)), ((5, 7), (2, 3)), ((4, 4), (4, 4))])
@pytest.mark.parametrize("merged", [0, 3, 9])
def test_a_loop_agrees(grid, stride, merged):
    x = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64)
    merging = match_tokens(x, grid, merged, stride=stride)
    for i in range(2):
        torch.testing.assert_close(merging.merge(x)[i], by_hand(x[i], grid, merged, stride, 0))


def test_unmerge_puts_tokens_where_they_were():
    x = torch.randn(3, 35, 4)
    merging = match_tokens(x, (5, 7), 10, generator=torch.Generator().manual_seed(3))
    merged = merging.merge(x)
    assert merged.shape[1] == merging.tokens == 25
    back = merging.unmerge(merged)
    kept = merging.sources[:, merging.merged :]
    torch.testing.assert_close(
        back.gather(1, kept[..., None].expand(-1, -1, 4)), x.gather(1, kept[..., None].expand(-1, -1, 4))
    )
    for i in range(3):
        for source, near in zip(merging.sources[i, :10].tolist(), merging.nearest[i, :10].tolist(), strict=True):
            assert torch.equal(back[i, source], back[i, merging.destinations[i, near]])
    nothing = match_tokens(x, (5, 7), 0)
    assert torch.equal(nothing.unmerge(nothing.merge(x)), x)


def test_equal_tokens_merge_without_loss():
    x = torch.randn(2, 4, 5).repeat_interleave(4, 1)[:, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]]
    merging = match_tokens(x, (4, 4), 12)
    torch.testing.assert_close(merging.unmerge(merging.merge(x)), x)


def test_more_merged_tokens_give_fewer_agents():
    x = torch.randn(1, 64, 4)
    merging = match_tokens(x, (8, 8), 25, stride=(4, 4))
    assert merging.merge(x).shape[1] == 39 and merging.merge(x, 60).shape[1] == 4
    assert match_tokens(x, (8, 8), 99).merged == 48
    with pytest.raises(ValueError, match="merged is 61; there are 60 sources"):
        merging.merge(x, 61)


def test_destinations_are_drawn_again_alike():
    x = torch.randn(1, 64, 4)
    drawn = [match_tokens(x, (8, 8), 9, generator=torch.Generator().manual_seed(s)).destinations for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    cell = drawn[2][0] // 8 // 2 * 4 + drawn[2][0] % 8 // 2
    assert sorted(cell.tolist()) == list(range(16)), "one for each cell"


@pytest.mark.parametrize(
    ("grid", "merged", "stride", "said"),
    [((4, 5), 1, (2, 2), "16 tokens"), ((4, 4), 1, (5, 2), "stride"), ((4, 4), -1, (2, 2), "merged -1")],
)
def test_what_is_refused(grid, merged, stride, said):
    with pytest.raises(ValueError, match=said):
        match_tokens(torch.randn(1, 16, 4), grid, merged, stride=stride)
    with pytest.raises(ValueError, match="3 tokens; this matching leaves 15"):
        match_tokens(torch.randn(1, 16, 4), (4, 4), 1).unmerge(torch.randn(1, 3, 4))
