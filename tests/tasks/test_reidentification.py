"""Metrics of re-identification against a loop, and the people that are drawn."""

import pytest
import torch

from headwise.tasks.reidentification import (
    PARTS,
    identity_batches,
    identity_images,
    read_market,
    reid_metrics,
)


def by_loop(query, gallery, qid, gid, qcam, gcam):
    """Market-1501's protocol, query by query."""
    precisions, first = [], []
    for q in range(len(query)):
        order = sorted(range(len(gallery)), key=lambda g: float((query[q] - gallery[g]).norm()))
        kept = [g for g in order if not (gid[g] == qid[q] and gcam[g] == qcam[q]) and gid[g] != -1]
        hits = [i for i, g in enumerate(kept) if gid[g] == qid[q]]
        if hits:
            precisions.append(sum((n + 1) / (i + 1) for n, i in enumerate(hits)) / len(hits))
            first.append(hits[0])
    return precisions, first


def test_metrics_equal_the_loop():
    generator = torch.Generator().manual_seed(3)
    query, gallery = torch.randn(20, 5, generator=generator), torch.randn(60, 5, generator=generator)
    qid, gid = (torch.randint(-1, 8, (n,), generator=generator) for n in (20, 60))
    qid = qid.clamp_min(0)
    qcam, gcam = (torch.randint(0, 3, (n,), generator=generator) for n in (20, 60))
    precisions, first = by_loop(query, gallery, qid, gid, qcam, gcam)
    found = reid_metrics(
        query,
        gallery,
        query_identities=qid,
        gallery_identities=gid,
        query_cameras=qcam,
        gallery_cameras=gcam,
        ranks=(1, 3),
        metric="euclidean",
    )
    assert found["mAP"] == pytest.approx(sum(precisions) / len(precisions))
    assert found["rank-1"] == pytest.approx(sum(i < 1 for i in first) / len(first))
    assert found["rank-3"] == pytest.approx(sum(i < 3 for i in first) / len(first))
    assert found["queries"] == len(precisions)


def small(cameras, gallery_cameras, gallery_identities=(0, 0, 1), **options):
    """Query at 0; the gallery at distances 0, 1 and 2."""
    gallery = torch.tensor([[0.0], [1.0], [2.0]])
    return reid_metrics(
        torch.zeros(1, 1),
        gallery,
        query_identities=torch.tensor([0]),
        gallery_identities=torch.tensor(gallery_identities),
        query_cameras=torch.tensor(cameras),
        gallery_cameras=torch.tensor(gallery_cameras),
        metric="euclidean",
        **options,
    )


def test_the_same_camera_does_not_count():
    assert small([0], [0, 1, 0])["mAP"] == 1.0  # the one at distance 0 is left out, not a miss
    assert small([0], [1, 1, 0], (1, 0, 1))["mAP"] == 0.5
    assert small([0], [1, 1, 0], (-1, 0, 1))["mAP"] == 1.0  # junk


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="no query has an image"):
        small([0], [0, 0, 0])
    with pytest.raises((ValueError, TypeError), match=r"gallery_identities|gallery has 3 features, 2 identities"):
        small([0], [0, 1, 1], (0, 1))


def test_identities_are_the_same_people_for_every_seed_and_camera():
    one, other = identity_images(range(3), seed=0), identity_images(range(3), seed=9)
    assert one.images.shape == (24, 3, 24, 12) and one.parts.shape == (24, 24, 12)
    assert float(one.images.min()) >= 0 and float(one.images.max()) <= 1

    def torso(data, identity):
        chosen = [
            image[:, part == PARTS.index("torso")].median(1).values
            for image, part, who in zip(data.images, data.parts, data.identities, strict=True)
            if who == identity
        ]
        return torch.stack(chosen).mean(0)

    assert not torch.equal(one.images, other.images)
    for identity in range(3):
        assert torch.allclose(torso(one, identity), torso(other, identity), atol=0.15)
    assert torch.equal(identity_images(range(3), seed=9).images, other.images)
    assert identity_images([5, 7]).identities.unique().tolist() == [0, 1]


def test_parts_are_where_the_person_is():
    data = identity_images(range(20))
    for name in ("head", "torso", "legs"):
        assert (data.parts == PARTS.index(name)).flatten(1).any(1).all()
    bags = (data.parts == PARTS.index("bag")).flatten(1).any(1)
    assert 0.4 < float(bags.float().mean()) < 0.9
    only = data.of_cameras([0, 2])
    assert only.cameras.unique().tolist() == [0, 2] and len(only.images) == len(data.images) // 2


def test_batches_hold_some_images_of_some_people():
    data = identity_images(range(6), per_camera=1)
    images, identities = identity_batches(data, identities=3, images=4)(0, torch.Generator().manual_seed(0))
    assert images.shape == (12, 3, 24, 12)
    assert [len(set(rows.tolist())) for rows in identities.view(3, 4)] == [1, 1, 1] and len(identities.unique()) == 3
    assert len(images.flatten(1).unique(dim=0)) == 12  # no image twice where there are enough
    many, _ = identity_batches(data, identities=2, images=9)(0, torch.Generator().manual_seed(0))
    assert len(many) == 18
    with pytest.raises(ValueError, match="identities is 7, the data has 6"):
        identity_batches(data, identities=7)


def test_refused_people():
    with pytest.raises(ValueError, match="0 identities"):
        identity_images([])
    with pytest.raises(ValueError, match="cameras 1"):
        identity_images(range(2), cameras=1)


def test_market_names(tmp_path):
    for name in ("0002_c1s1_000451_03.jpg", "-1_c3s2_000001_00.jpg", "0001_c8_f0046182.jpg", "Thumbs.db"):
        (tmp_path / name).touch()
    found = {(one.identity, one.camera) for one in read_market(tmp_path)}
    assert found == {(2, 0), (-1, 2), (1, 7)}
    with pytest.raises(ValueError, match="no image named as"):
        read_market(tmp_path / "nothing")
