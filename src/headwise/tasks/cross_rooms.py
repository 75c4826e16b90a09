"""Cross-room understanding: generated scenes of several rooms as points, with questions, captions and plans.

In the spirit of XR-Scene, whose scenes are several rooms of HM3D and whose tasks are question answering (XR-QA),
captioning (XR-SceneCaption) and planning (XR-EmbodiedPlanning): what is asked spans rooms. Rooms stand side by side;
objects are small clouds of points with a feature for what they are and one for their colour; floors are points of
neither. `read_xr_qa` reads the benchmark's own questions from a local file.

Paper: headwise/papers/lscenellm.py (Zhi et al., CVPR 2025).
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "CrossRooms",
    "RoomObject",
    "RoomTask",
    "SceneQuestion",
    "caption_score",
    "cross_room_scenes",
    "plan_score",
    "read_xr_qa",
]

OBJECTS = ("chair", "table", "lamp", "sofa", "bed", "shelf", "plant", "sink")
TINTS = ("red", "green", "blue", "white")
ROOM = 4.0  # metres, the side of a room; a wall of half a metre between rooms


@dataclass(frozen=True)
class RoomObject:
    """room: counted from 0. center: in metres."""

    name: str
    colour: str
    room: int
    center: tuple[float, float, float]


@dataclass(frozen=True)
class RoomTask:
    """format: "qa", "caption" or "planning". kind: of a question ("count", "where", "compare"), else the format.
    rooms: those that the answer depends on."""

    format: str
    kind: str
    question: str
    answer: str
    rooms: tuple[int, ...]


@dataclass(frozen=True)
class CrossRooms:
    """One scene. points in metres; features: one per object name, colour, and the floor, with noise."""

    points: Float[Tensor, "p 3"]
    features: Float[Tensor, "p f"]
    rooms: int
    objects: tuple[RoomObject, ...]
    tasks: tuple[RoomTask, ...]


@dataclass(frozen=True)
class SceneQuestion:
    """A question of XR-QA. scene: the scan's name. room: of the asked object; region: as in the file."""

    scene: str
    question: str
    answers: tuple[str, ...]
    kind: str | None = None
    room: str | None = None
    region: str | None = None


def cross_room_scenes(
    n: int, *, rooms: int = 3, objects: int = 4, points: int = 64, noise: float = 0.1, seed: int = 0
) -> list[CrossRooms]:
    """n scenes of `rooms` rooms with `objects` objects each; scene i depends on (seed, i) alone.

    points: of each object, and four times as many of each floor. noise: deviation of every feature.
    Raises ValueError for fewer than two rooms, and numbers out of range.
    """
    most = len(OBJECTS) * len(TINTS) // max(rooms, 1)
    if rooms < 2 or not 1 <= objects <= most or points < 1 or n < 1 or noise < 0:
        raise ValueError(
            f"cross_room_scenes: n {n}, rooms {rooms}, objects {objects}, points {points}, noise {noise}; expected at "
            f"least 2 rooms, 1 to {most} objects in each, 1 scene, 1 point, and no negative noise"
        )
    return [
        _scene(rooms, objects, points, noise, torch.Generator().manual_seed(seed * 1_000_003 + i)) for i in range(n)
    ]


def _scene(rooms: int, count: int, points: int, noise: float, draw: torch.Generator) -> CrossRooms:
    pairs = torch.randperm(len(OBJECTS) * len(TINTS), generator=draw)[: rooms * count].tolist()
    held, clouds, features = [], [], []
    width = len(OBJECTS) + len(TINTS) + 1
    for number, pair in enumerate(pairs):  # every object of a scene has a name and colour of its own
        room, name, tint = number // count, pair // len(TINTS), pair % len(TINTS)
        place = 0.5 + (ROOM - 1) * torch.rand(3, generator=draw)
        place = torch.stack([place[0] + room * (ROOM + 0.5), place[1], 0.2 + place[2] / ROOM])
        x, y, z = (round(float(v), 3) for v in place)
        held.append(RoomObject(OBJECTS[name], TINTS[tint], room, (x, y, z)))
        clouds.append(torch.tensor([x, y, z]) + 0.15 * torch.randn(points, 3, generator=draw))
        feature = torch.zeros(points, width)
        feature[:, name], feature[:, len(OBJECTS) + tint] = 1, 1
        features.append(feature)
    for room in range(rooms):
        floor = torch.rand(4 * points, 3, generator=draw) * torch.tensor([ROOM, ROOM, 0.02])
        clouds.append(floor + torch.tensor([room * (ROOM + 0.5), 0, 0]))
        features.append(torch.nn.functional.one_hot(torch.full((4 * points,), width - 1), width).float())
    joined = torch.cat(features)
    joined = joined + noise * torch.randn(joined.shape, generator=draw)
    tasks = (*_questions(held, rooms, draw), _caption(held, rooms), _plan(held, draw))
    return CrossRooms(torch.cat(clouds), joined, rooms, tuple(held), tasks)


def _questions(held: Sequence[RoomObject], rooms: int, draw: torch.Generator) -> Iterator[RoomTask]:
    pick = lambda n: int(torch.randint(n, (1,), generator=draw))  # noqa: E731
    everywhere = tuple(range(rooms))
    name = held[pick(len(held))].name
    found = sum(one.name == name for one in held)
    yield RoomTask("qa", "count", f"how many {name}s are there in all rooms ?", str(found), everywhere)
    one = held[pick(len(held))]
    yield RoomTask("qa", "where", f"which room has the {one.colour} {one.name} ?", f"room {one.room + 1}", (one.room,))
    other = held[pick(len(held))]
    while other is one:
        other = held[pick(len(held))]
    same = "yes" if one.room == other.room else "no"
    question = f"is the {one.colour} {one.name} in the same room as the {other.colour} {other.name} ?"
    yield RoomTask("qa", "compare", question, same, tuple(sorted({one.room, other.room})))


def _caption(held: Sequence[RoomObject], rooms: int) -> RoomTask:
    said = []
    for room in range(rooms):
        things = sorted(f"a {one.colour} {one.name}" for one in held if one.room == room)
        said.append(f"room {room + 1} has {' and '.join(things)} .")
    answer = f"there are {rooms} rooms . " + " ".join(said)
    return RoomTask("caption", "caption", "describe the scene .", answer, tuple(range(rooms)))


def _plan(held: Sequence[RoomObject], draw: torch.Generator) -> RoomTask:
    first = held[int(torch.randint(len(held), (1,), generator=draw))]
    away = [one for one in held if one.room != first.room]
    second = away[int(torch.randint(len(away), (1,), generator=draw))]
    steps = [
        f"go to room {first.room + 1}",
        f"pick up the {first.colour} {first.name}",
        f"go to room {second.room + 1}",
        f"put it next to the {second.colour} {second.name}",
    ]
    question = f"bring the {first.colour} {first.name} to the {second.colour} {second.name} ."
    rooms = tuple(sorted({first.room, second.room}))
    return RoomTask("planning", "planning", question, " ; ".join(steps), rooms)


def caption_score(caption: str, scene: CrossRooms) -> dict[str, float]:
    """precision, recall and f1 of what a caption places: (room, colour, object) triples, each counted once."""
    said: set[tuple[int, str, str]] = set()
    for room, text in re.findall(r"room (\d+) has (.*?)(?=room \d+ has|$)", caption.lower(), re.DOTALL):
        for colour, name in re.findall(rf"\b({'|'.join(TINTS)}) ({'|'.join(OBJECTS)})\b", text):
            said.add((int(room) - 1, colour, name))
    there = {(one.room, one.colour, one.name) for one in scene.objects}
    right = len(said & there)
    precision, recall = right / len(said) if said else 0.0, right / len(there)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def plan_score(plan: str, wanted: str) -> float:
    """Share of the wanted steps that a plan has in order (longest common subsequence), over the longer of the two."""
    steps, target = ([step.strip().lower() for step in text.split(";") if step.strip()] for text in (plan, wanted))
    if not target:
        raise ValueError("plan_score: wanted has no steps; separate them by ';'")
    best = [[0] * (len(target) + 1) for _ in range(len(steps) + 1)]
    for i, one in enumerate(steps):
        for j, other in enumerate(target):
            best[i + 1][j + 1] = best[i][j] + 1 if one == other else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1] / max(len(steps), len(target))


def read_xr_qa(path: str | Path) -> list[SceneQuestion]:
    """XR-QA from a local file: JSONL with a question a line, or the official JSON, scans with episodes of `qa_pairs`.

    A line has `question`, `answer` or `answers`, and `scene` or `scan_name` (or `scan_id`). Raises ValueError, naming
    the place, for lines without them, and for a file without questions.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = None
    found: list[SceneQuestion] = []
    if isinstance(whole, dict) and "question" not in whole:
        for scan, episodes in whole.items():
            for number, episode in enumerate(episodes):
                for pair in episode["qa_pairs"]:
                    where = f"{path}, scan {scan}, episode {number}"
                    room = str(episode["scan_id"]).split("_")[-1] if "scan_id" in episode else None
                    found.append(_read(pair, where, scan, room))
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                found.append(_read_line(line, f"{path}, line {number}"))
    if not found:
        raise ValueError(f"read_xr_qa: {path} has no questions")
    return found


def _read_line(line: str, where: str) -> SceneQuestion:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"read_xr_qa: {where} is no JSON ({error.msg}); give one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"read_xr_qa: {where} is a {type(row).__name__}; give one object a line")
    scene = next((str(row[name]) for name in ("scene", "scan_name", "scan_id") if name in row), None)
    if scene is None:
        raise ValueError(f"read_xr_qa: {where} names no scene; give 'scene', 'scan_name' or 'scan_id'")
    return _read(row, where, scene, None)


def _read(row: dict[str, Any], where: str, scene: str, room: str | None) -> SceneQuestion:
    answers = row.get("answers", row.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    question = row.get("question")
    if not isinstance(question, str) or not answers or not all(isinstance(one, str) for one in answers):
        raise ValueError(f"read_xr_qa: {where} has no question with an answer in words; it has {sorted(row)}")
    kind, region = row.get("type"), row.get("region_id")
    return SceneQuestion(scene, question, tuple(answers), kind, room, None if region is None else str(region))
