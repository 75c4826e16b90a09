"""Rooms of points: answers are what the objects say, captions and plans are scored, the benchmark's file is read."""

import json
import re
from pathlib import Path

import pytest
import torch

from headwise.tasks.cross_rooms import OBJECTS, TINTS, caption_score, cross_room_scenes, plan_score, read_xr_qa

SCENES = cross_room_scenes(20, rooms=3, objects=4, points=20, seed=1)


def test_points_are_where_their_objects_are():
    for scene in SCENES[:3]:
        assert scene.points.shape == (12 * 20 + 3 * 80, 3) and scene.features.shape == (480, len(OBJECTS + TINTS) + 1)
        for number, one in enumerate(scene.objects):
            cloud = scene.points[20 * number : 20 * number + 20]
            assert bool(((cloud.mean(0) - torch.tensor(one.center)).abs() < 0.15).all())
            assert one.room * 4.5 <= one.center[0] <= one.room * 4.5 + 4
            feature = scene.features[20 * number : 20 * number + 20].mean(0)
            assert OBJECTS[int(feature[:8].argmax())] == one.name and TINTS[int(feature[8:12].argmax())] == one.colour
        assert len({(one.name, one.colour) for one in scene.objects}) == 12


def test_answers_follow_from_the_objects():
    formats = set()
    for scene in SCENES:
        named = {f"{one.colour} {one.name}": one for one in scene.objects}
        for task in scene.tasks:
            formats.add(task.format)
            things = [named[t] for t in re.findall(rf"(?:{'|'.join(TINTS)}) (?:{'|'.join(OBJECTS)})", task.question)]
            if task.kind == "count":
                (name,) = re.findall(r"how many (\w+)s are", task.question)
                assert task.answer == str(sum(one.name == name for one in scene.objects)) != "0"
                assert task.rooms == (0, 1, 2)
            elif task.kind == "where":
                assert task.answer == f"room {things[0].room + 1}" and task.rooms == (things[0].room,)
            elif task.kind == "compare":
                assert task.answer == ("yes" if things[0].room == things[1].room else "no")
            elif task.kind == "caption":
                assert caption_score(task.answer, scene) == {"precision": 1, "recall": 1, "f1": 1}
            else:
                first, second = things
                assert first.room != second.room and len(task.rooms) == 2  # plans lead from room to room
                assert task.answer.startswith(f"go to room {first.room + 1} ; pick up the {first.colour} {first.name}")
                assert task.answer.endswith(f"put it next to the {second.colour} {second.name}")
    assert formats == {"qa", "caption", "planning"}
    answers = {task.answer for scene in SCENES for task in scene.tasks if task.kind == "compare"}
    assert answers == {"yes", "no"}


def test_a_scene_depends_on_its_number_alone():
    few = cross_room_scenes(3, rooms=3, objects=4, points=20, seed=1)
    assert all(torch.equal(a.points, b.points) and a.tasks == b.tasks for a, b in zip(few, SCENES, strict=False))
    assert few[0].objects != few[1].objects != cross_room_scenes(1, rooms=3, objects=4, points=20, seed=2)[0].objects


def test_captions_and_plans_are_scored():
    scene = SCENES[0]
    one = scene.objects[0]
    right = f"room 1 has a {one.colour} {one.name} ."
    assert caption_score(right, scene) == {"precision": 1, "recall": 1 / 12, "f1": pytest.approx(2 / 13)}
    assert caption_score(right.replace("room 1", "room 2"), scene)["precision"] == 0
    assert caption_score("nothing to see", scene) == {"precision": 0, "recall": 0, "f1": 0}
    wanted = "go to room 1 ; pick up x ; go to room 2 ; put it down"
    assert plan_score(wanted, wanted) == 1
    assert plan_score("pick up x ; go to room 1", wanted) == 0.25  # in order
    assert plan_score("go to room 1 ; go to room 2 ; put it down", wanted) == 0.75
    assert plan_score(wanted + " ; rest", wanted) == 0.8 and plan_score("", wanted) == 0
    with pytest.raises(ValueError, match="wanted has no steps"):
        plan_score("a", " ; ")


def test_the_benchmark_is_read(tmp_path: Path):
    lines = tmp_path / "qa.jsonl"
    rows = [
        {"scan_name": "00800-a", "question": "where is it ?", "answers": ["here", "there"], "region_id": 3},
        {"scene": "b", "question": "how many ?", "answer": "two", "type": "count"},
    ]
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = read_xr_qa(lines)
    assert (first.scene, first.answers, first.region, first.kind) == ("00800-a", ("here", "there"), "3", None)
    assert (second.scene, second.question, second.answers, second.kind) == ("b", "how many ?", ("two",), "count")
    official = tmp_path / "qa.json"
    pairs = [{"question": "what ?", "answer": "a lamp", "type": "existence", "region_id": 5}]
    official.write_text(json.dumps({"00800": [{"scan_id": "00800_12", "target_id": 1, "qa_pairs": pairs}]}))
    (one,) = read_xr_qa(official)
    assert (one.scene, one.room, one.region, one.answers) == ("00800", "12", "5", ("a lamp",))
    lines.write_text(json.dumps(rows[0]) + "\n")
    assert len(read_xr_qa(lines)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"scene": "a", "question": "q", "answer": "b"}\n{"scene"', "line 2 is no JSON"),
        ('{"question": "q", "answer": "b"}', "line 1 names no scene"),
        ('{"scene": "a", "question": "q"}', "line 1 has no question with an answer"),
        ("[1]", "line 1 is a list"),
        ("", "has no questions"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "qa.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_xr_qa(path)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="rooms 1"):
        cross_room_scenes(1, rooms=1)
    with pytest.raises(ValueError, match="1 to 10 objects in each"):
        cross_room_scenes(1, rooms=3, objects=11)
