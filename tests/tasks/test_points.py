"""Points into tokens: sampling by distance, neighbours and groups, against loops from the definition."""

import pytest
import torch

from headwise.tasks.points import farthest_points, group_points, nearest_points, scene_tokens


def test_each_point_is_the_farthest_from_those_before():
    points = torch.rand(2, 40, 3, dtype=torch.float64)
    chosen = farthest_points(points, 9, start=4)
    for item in range(2):
        taken = [4]
        while len(taken) < 9:
            distance = torch.stack([(points[item] - points[item, i]).norm(dim=-1) for i in taken]).amin(0)
            taken.append(int(distance.argmax()))
        assert chosen[item].tolist() == taken
    assert sorted(farthest_points(points[:1], 40)[0].tolist()) == list(range(40))


def test_corners_come_before_the_crowd():
    corners = torch.tensor([[x, y, 0.0] for x in (0.0, 1.0) for y in (0.0, 1.0)])
    cloud = torch.cat([0.5 + 0.05 * torch.rand(200, 3), corners])[None]
    assert {200, 201, 202, 203} <= set(farthest_points(cloud, 5)[0].tolist())


def test_neighbours_are_the_nearest_in_order():
    points, centers = torch.rand(2, 30, 3), torch.rand(2, 300, 3)
    found = nearest_points(points, centers, 6)
    distance = torch.cdist(centers.double(), points.double())
    torch.testing.assert_close(distance.gather(2, found), distance.sort(-1).values[..., :6])


def test_a_group_is_the_mean_of_its_points():
    points, features = torch.rand(2, 50, 3), torch.randn(2, 50, 7)
    groups = group_points(points, features, 4, 10)
    assert groups.indices.shape == (2, 4, 10)
    torch.testing.assert_close(groups.features[1, 2], features[1, groups.indices[1, 2]].mean(0))
    assert torch.equal(groups.centers[0, 0], points[0, 0])  # a centre is a point, and its own nearest
    assert torch.equal(points[0, groups.indices[0, :, 0]], groups.centers[0])
    own = group_points(points, features, 1, 50, centers=torch.zeros(2, 1, 3))
    torch.testing.assert_close(own.features[:, 0], features.mean(1))


def test_fine_tokens_lie_about_their_coarse_token():
    torch.manual_seed(1)
    middles = torch.tensor([[0.0, 0, 0], [10, 0, 0], [0, 10, 0]])
    label = torch.arange(3).repeat_interleave(40)
    points = (middles[label] + torch.rand(120, 3))[None]
    features = torch.nn.functional.one_hot(label, 3).float()[None]
    tokens = scene_tokens(points, features, coarse=3, coarse_size=20, fine=4, around=40)
    assert tokens.coarse.shape == (1, 3, 3) and tokens.fine.shape == (1, 12, 3)
    assert tokens.parent[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert torch.equal(tokens.fine[0].argmax(-1), tokens.coarse[0].argmax(-1)[tokens.parent[0]])
    apart = (tokens.fine_centers[0] - tokens.centers[0, tokens.parent[0]]).norm(dim=-1)
    assert bool((apart < 2).all()) and len({tuple(c) for c in tokens.fine_centers[0].tolist()}) == 12
    dense = scene_tokens(points, features, coarse=3, coarse_size=20, fine=4, around=40, dense=(points, 2 * features))
    assert torch.equal(dense.fine, 2 * tokens.fine) and torch.equal(dense.coarse, tokens.coarse)


def test_what_is_refused():
    points, features = torch.rand(1, 20, 3), torch.rand(1, 20, 2)
    with pytest.raises(ValueError, match=r"count is 21; expected 1 to 20"):
        farthest_points(points, 21)
    with pytest.raises(ValueError, match=r"start is 20; expected 0 to 19"):
        farthest_points(points, 2, start=20)
    with pytest.raises(ValueError, match=r"count is 0; expected 1 to 20"):
        nearest_points(points, points, 0)
    with pytest.raises(ValueError, match=r"20 points in 1 scenes but features of 19"):
        group_points(points, features[:, :19], 2, 3)
    with pytest.raises(ValueError, match=r"groups is 2 but there are 20 centers"):
        group_points(points, features, 2, 3, centers=points)
    with pytest.raises(ValueError, match=r"around is 10 and fine 4"):
        scene_tokens(points, features, coarse=2, coarse_size=4, fine=4, around=10)
