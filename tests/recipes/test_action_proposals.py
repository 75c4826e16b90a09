"""The recipe for action proposals: annotations and features of a folder, windows, training, precision, refusals."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from headwise.cli import run
from headwise.errors import InputError
from headwise.models.boundary_matching import BoundaryMatchingNetwork
from headwise.recipes.action_proposals import _metrics, _recall, train_action_proposals
from headwise.recipes.proposal_videos import VideoPart, VideoSet, load_videos
from headwise.tasks.temporal_detection import Detection, average_recall

NETWORK = {"hidden_1d": 8, "hidden_2d": 4, "hidden_3d": 4, "num_samples": 3, "map_layers": 1}


def features(folder, name, rows=20, width=8, seed=0):
    (folder / "features").mkdir(exist_ok=True)
    values = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    if name.endswith(".npy"):
        np.save(folder / "features" / name, values)
    else:
        save_file({"features": torch.from_numpy(values)}, folder / "features" / name)
    return values


def annotated(subset, segments, duration=20.0, label="Run"):
    return {
        "subset": subset,
        "duration": duration,
        "annotations": [{"segment": list(one), "label": label} for one in segments],
    }


@pytest.fixture
def activitynet(tmp_path):
    """ActivityNet-1.3: training, validation, and testing without annotations."""
    database = {
        "aaa": annotated("training", [(2, 8)]),
        "bbb": annotated("training", [(5, 15)], label="Jump"),
        "ccc": annotated("validation", [(1, 6), (10, 18)]),
        "ddd": annotated("validation", [(4, 12)], label="Jump"),
        "eee": annotated("testing", []),
    }
    (tmp_path / "activity_net.v1-3.json").write_text(
        json.dumps({"version": "VERSION 1.3", "taxonomy": [], "database": database})
    )
    for seed, name in enumerate(("v_aaa.npy", "bbb.safetensors", "v_ccc.safetensors", "ddd.npy")):
        features(tmp_path, name, seed=seed)
    return tmp_path


@pytest.fixture
def thumos(tmp_path):
    """THUMOS-14 in the same form: validation and test, with long videos."""
    database = {
        "video_validation_0000051": annotated("Validation", [(10, 20), (50, 55)], 100.0),
        "video_test_0000004": annotated("Test", [(0, 30), (62, 70)], 100.0),
    }
    (tmp_path / "thumos14.json").write_text(json.dumps({"version": "THUMOS14", "database": database}))
    for name in database:
        features(tmp_path, f"{name}.npy", rows=50)
    return tmp_path


def test_activitynet_is_read_whole(activitynet):
    data = load_videos(str(activitynet), steps=10)
    assert [window.video for window in data.train.windows] == ["aaa", "bbb"] and set(data.truth) == {"ccc", "ddd"}
    assert data.train.windows[0].segments.tolist() == [[0.1, 0.4]] and data.feature_dim == 8
    assert data.truth["ccc"].tolist() == [[1, 6], [10, 18]] and data.names["ddd"] == ("Jump",)
    item = data.train[0]
    assert item["features"].shape == (8, 10) and item["labels"]["overlap"].shape == (10, 10)
    assert item["labels"]["overlap"].argmax() == 1 * 10 + 3  # from step 1 to the end of step 3
    exact = load_videos(str(activitynet), steps=20)
    values = np.load(activitynet / "features" / "v_aaa.npy")
    assert np.array_equal(exact.train[0]["features"].numpy(), values.T)


def test_rows_are_rescaled_by_straight_lines(activitynet):
    rows = np.arange(20, dtype=np.float32)[:, None].repeat(8, 1)
    np.save(activitynet / "features" / "v_aaa.npy", rows)
    found = load_videos(str(activitynet), steps=10).train[0]["features"]
    # Each step is the mean of two rows: centres of steps between centres of rows.
    assert found[3].tolist() == [2 * step + 0.5 for step in range(10)]


def test_thumos_is_read_in_windows(thumos):
    data = load_videos(str(thumos), window=20)
    train, test = data.train.windows, data.test.windows
    # 50 rows of 2 seconds; windows of 40 seconds from 0, 20, 40 and 60.
    assert [(one.start, one.end, one.rows) for one in test] == [
        (0, 40, (0, 20)), (20, 60, (10, 30)), (40, 80, (20, 40)), (60, 100, (30, 50)),
    ]  # fmt: skip
    assert [one.start for one in train] == [0, 20, 40]  # the fourth holds nothing
    assert train[0].segments.tolist() == [[0.25, 0.5]] and train[1].segments.tolist() == [[0.75, 0.875]]
    assert test[0].segments.tolist() == [[0, 0.75]] and not len(test[1].segments)  # a third of it is not enough
    assert data.train[1]["features"].shape == (8, 20)
    values = np.load(thumos / "features" / "video_validation_0000051.npy")
    assert np.array_equal(data.train[1]["features"].numpy(), values[10:30].T)
    assert load_videos(str(thumos), window=60).test.windows[0].rows is None  # a shorter video is seen whole


def test_thumos_text_files_need_durations(tmp_path):
    (tmp_path / "BaseballPitch_val.txt").write_text("video_validation_0000051  10.0 20.0\n")
    (tmp_path / "BaseballPitch_test.txt").write_text("video_test_0000004  0.2 1.1\n")
    for name in ("video_validation_0000051", "video_test_0000004"):
        features(tmp_path, f"{name}.npy")
    with pytest.raises(InputError, match=r"durations\.json cannot be read .* expected seconds of each video"):
        load_videos(str(tmp_path))
    (tmp_path / "durations.json").write_text('{"video_validation_0000051": "40"}')
    with pytest.raises(InputError, match=r"durations\.json holds something else; expected seconds"):
        load_videos(str(tmp_path))
    (tmp_path / "durations.json").write_text('{"video_validation_0000051": 40, "video_test_0000004": 30}')
    data = load_videos(str(tmp_path))
    assert data.train.windows[0].segments.tolist() == [[0.25, 0.5]] and data.names == {
        "video_test_0000004": ("BaseballPitch",)
    }


def test_precision_by_class_and_recall(activitynet):
    (activitynet / "classes.json").write_text(json.dumps({"ccc": {"Run": 0.9, "Jump": 0.1}, "ddd": {"Run": 1.0}}))
    data = load_videos(str(activitynet), steps=10)
    right = [Detection("ccc", 1, 6, 0.9), Detection("ccc", 10, 18, 0.8), Detection("ddd", 4, 12, 0.7)]
    found = _metrics(right, data)
    assert found["mAP@0.5"] == 0.5  # Jump is never named in ddd
    assert found["AR@100"] == 1 and found["AR@1"] == pytest.approx(2 / 3)
    (activitynet / "classes.json").unlink()
    plain = load_videos(str(activitynet), steps=10)
    assert _metrics(right, plain)["AP"] == 1 and "mAP" not in _metrics(right, plain)


def test_recall_video_by_video_is_that_of_all():
    rng = np.random.default_rng(0)
    truth = {str(v): np.sort(rng.random((v, 2)), 1) for v in range(4)}
    found = []
    for _ in range(60):
        start, end = sorted(rng.random(2).tolist())
        found.append(Detection(str(int(rng.integers(4))), start, end, float(rng.random())))
    for number in (1, 3, 100):
        assert _recall(found, truth, number) == pytest.approx(average_recall(found, truth, proposals=number))


@cache
def generated() -> VideoSet:
    return load_videos("generated")


def few(videos: int = 60, tests: int = 20) -> VideoSet:
    """Fewer of the generated videos."""
    data = generated()
    names = [window.video for window in data.test.windows[:tests]]
    train, test = (
        VideoPart(part.windows[:count], part.features, part.steps)
        for part, count in ((data.train, videos), (data.test, tests))
    )
    return replace(data, train=train, test=test, truth={name: data.truth[name] for name in names})


def test_training_finds_more_and_is_written(tmp_path):
    data = few(200, 30)
    start, after = (train_action_proposals(data, steps=steps, out=tmp_path, seed=1) for steps in (1, 60))
    assert after.metrics["AR@10"] > start.metrics["AR@10"] + 0.05
    again = BoundaryMatchingNetwork.from_pretrained(tmp_path).eval()
    scores = data.test[0]["features"][None]
    torch.testing.assert_close(again(scores).starts, after.model(scores).starts)
    assert again.csa is not None and list(after.metrics)[:3] == ["AP", "AP@0.3", "AP@0.4"]


def test_kinds_of_attention_and_none():
    data = few(16, 4)
    made = {kind: train_action_proposals(data, attention=kind, steps=1) for kind in ("csa", "se", "csa+se", None)}
    assert made[None].model.csa is None and made[None].model.se is None
    assert made["csa"].parameters > made[None].parameters and made["csa+se"].parameters > made["se"].parameters


def test_windows_of_a_video_end_in_one_list(thumos):
    data = load_videos(str(thumos), window=20)
    found = train_action_proposals(data, steps=1, batch=2, network=NETWORK)
    assert set(found.metrics) >= {"AP", "AP@0.3", "AR@50", "AR@200"}
    assert found.model.config.temporal_scale == 20


def test_what_cannot_be_read_is_refused(activitynet, tmp_path):
    root = str(activitynet)
    with pytest.raises(InputError, match="is no folder; expected generated"):
        load_videos(root + "/none")
    with pytest.raises(InputError, match="generated videos are seen whole"):
        load_videos("generated", window=8)
    (activitynet / "features" / "ddd.npy").unlink()
    with pytest.warns(UserWarning, match="1 videos have no features"):
        data = load_videos(root, steps=10)
    assert set(data.truth) == {"ccc"}
    np.save(activitynet / "features" / "v_aaa.npy", np.full((4, 8), np.nan))
    with pytest.warns(UserWarning), pytest.raises(InputError, match=r"v_aaa\.npy holds \[4, 8\] numbers"):
        load_videos(root)
    np.save(activitynet / "features" / "v_aaa.npy", np.zeros((4, 8), dtype=object), allow_pickle=True)
    with pytest.warns(UserWarning), pytest.raises(InputError, match=r"v_aaa\.npy cannot be read as features"):
        load_videos(root)
    features(activitynet, "v_aaa.npy", width=7)
    features(activitynet, "ddd.npy")
    data = load_videos(root, steps=10)
    with pytest.raises(InputError, match=r"bbb\.safetensors has 8 features a row, others have 7"):
        data.train[1]
    (activitynet / "classes.json").write_text('{"ccc": ["Run"]}')
    with pytest.raises(InputError, match="expected scores of classes"):
        load_videos(root)
    (activitynet / "classes.json").unlink()
    (activitynet / "more.json").write_text("{}")
    with pytest.raises(InputError, match="has 2 files of annotations"):
        load_videos(root)
    (activitynet / "activity_net.v1-3.json").unlink()
    with pytest.raises(InputError, match="annotated videos of the subsets none"):
        load_videos(root)
    (activitynet / "more.json").write_text("[1")
    with pytest.raises(InputError, match=r"more\.json cannot be read as annotations"):
        load_videos(root)


def test_the_command(activitynet, monkeypatch, capsys):
    monkeypatch.chdir(activitynet)
    asked = ["train", "action-proposals", "--steps", "1", "--out", "o"]
    assert run([*asked, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["data"] == "generated" and set(said["metrics"]) == {"BMN + CSA", "BMN"}
    assert {"AP@0.5", "AR@10", "parameters"} <= set(said["metrics"]["BMN"])
    assert (activitynet / "o" / "baseline" / "model.safetensors").is_file()
    wrong = {
        "--data none": "none is no folder",
        "--attention sca": "attention: 'sca' is none of action-proposals; choose csa, se, csa+se",
        "--window 1": "--window",
        "--data generated --window 8": "seen whole",
        "--backbone x": "--backbone is not an option of action-proposals",
    }
    for arguments, message in wrong.items():
        assert run([*asked, *arguments.split()]) == 2
        shown = capsys.readouterr()
        assert message in shown.err and shown.err.count("headwise: ") == 1 and not shown.out
    assert run(["train", "action-proposal", "--window", "8"]) == 2
    assert "did you mean 'action-proposals'?" in capsys.readouterr().err
