"""ScreenSpot and ScreenSpot-Pro from a local folder: screenshots, instructions and boxes of what is to be clicked.

Formats, as published: ScreenSpot has `screenspot_{mobile,desktop,web}.json` (v2 alike), lists of `img_filename`,
`instruction`, `bbox` = x, y, width, height in pixels, `data_type` text or icon, `data_source`. ScreenSpot-Pro has
`annotations/*.json` with `bbox` = x1, y1, x2, y2, `img_size`, `ui_type`, `application`, `group`, and `images/`. Lines
of JSON (`*.jsonl`) are read alike.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.errors import InputError

__all__ = ["ScreenItem", "read_screenspot", "read_screenspot_pro"]

PLATFORMS = {
    "ios": "mobile", "android": "mobile", "windows": "desktop", "macos": "desktop", "gitlab": "web", "shop": "web",
    "forum": "web", "tool": "web",
}  # fmt: skip


@dataclass(frozen=True)
class ScreenItem:
    """An instruction on a screenshot. box: x1, y1, x2, y2 as shares of the sides. size: width and height in pixels.

    kind: text or icon. group: as the benchmark averages it, "mobile/text" or "Dev/icon"; source: the system or program.
    """

    image: Path
    size: tuple[int, int]
    instruction: str
    box: tuple[float, float, float, float]
    kind: str
    group: str
    source: str


def read_screenspot(folder: str | Path) -> list[ScreenItem]:
    """The items of ScreenSpot (v1 or v2), six groups: mobile, desktop and web, text and icon each.

    Raises InputError for a folder without annotations, items that lack a field, boxes that are none, missing pictures.
    """
    root = Path(folder)
    found = []
    for path in _annotations(root, "screenspot*.json*"):
        for where, record in _records(path):
            image = _picture(root, _field(record, "img_filename", where), where)
            size = _size_of(image)
            x, y, width, height = _numbers(record, where)
            source = str(record.get("data_source", ""))
            named = [platform for platform in ("mobile", "desktop", "web") if platform in path.stem]
            platform = named[0] if named else PLATFORMS.get(source.lower())
            if platform is None:
                raise InputError(
                    f"screenspot: {where}: neither the file's name nor data_source {source!r} says whether it is "
                    "mobile, desktop or web"
                )
            found.append(
                _item(record, where, image, size, (x, y, x + width, y + height), "data_type", platform, source)
            )
    return found


def read_screenspot_pro(folder: str | Path) -> list[ScreenItem]:
    """The items of ScreenSpot-Pro; groups are its program classes, text and icon each.

    Raises InputError as `read_screenspot` does.
    """
    root = Path(folder)
    found = []
    for path in _annotations(root, "*.json*"):
        for where, record in _records(path):
            image = _picture(root, _field(record, "img_filename", where), where)
            width, height = record["img_size"] if record.get("img_size") else _size_of(image)
            group = str(_field(record, "group", where))
            source = str(record.get("application", ""))
            box = _numbers(record, where)
            found.append(_item(record, where, image, (int(width), int(height)), box, "ui_type", group, source))
    return found


def _annotations(root: Path, pattern: str) -> list[Path]:
    folders = [root / "annotations", root] if (root / "annotations").is_dir() else [root]
    for folder in folders:
        paths = sorted(path for path in folder.glob(pattern) if path.suffix in (".json", ".jsonl"))
        if paths:
            return paths
    raise InputError(f"screenspot: {root} holds no {pattern.removesuffix('*')} file; give the folder of the benchmark")


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a record stands, for messages, and the record."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except ValueError as error:
        raise InputError(f"screenspot: {path} is no JSON ({error})") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"screenspot: {path} is no list of records")
    for number, record in enumerate(records):
        yield f"{path.name}, record {number}", record


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    if record.get(name) in (None, ""):
        raise InputError(f"screenspot: {where} has no {name}; it has {', '.join(record) or 'nothing'}")
    return record[name]


def _numbers(record: dict[str, Any], where: str) -> tuple[float, float, float, float]:
    box = _field(record, "bbox", where)
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
        raise InputError(f"screenspot: {where}: bbox is {box!r}; expected four numbers")
    return float(box[0]), float(box[1]), float(box[2]), float(box[3])


def _picture(root: Path, name: str, where: str) -> Path:
    for folder in (root / "images", root / "screenspot_imgs", root / "screenspotv2_image", root):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"screenspot: {where}: its picture {name} is not under {root}, nor under {root / 'images'}")


def _size_of(image: Path) -> tuple[int, int]:
    """Width and height, from the file's head alone."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise InputError('screenspot: pillow is not installed; pip install "headwise[vision]"') from None
    try:
        with Image.open(image) as opened:
            return opened.size
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"screenspot: {image} cannot be read as a picture ({error})") from None


def _item(
    record: dict[str, Any],
    where: str,
    image: Path,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    kind_field: str,
    group: str,
    source: str,
) -> ScreenItem:
    """A record with its box in pixels as an item with its box in shares of the sides."""
    width, height = size
    x1, y1, x2, y2 = box
    if not (x1 <= x2 and y1 <= y2):
        raise InputError(f"screenspot: {where}: the box {list(box)} is none; expected x1 <= x2 and y1 <= y2")
    if x2 < 0 or y2 < 0 or x1 > width or y1 > height:
        raise InputError(
            f"screenspot: {where}: the box {list(box)} is outside the picture of {width} x {height} pixels"
        )
    kind = str(_field(record, kind_field, where))
    shares = (x1 / width, y1 / height, x2 / width, y2 / height)
    instruction = record.get("instruction") or record.get("question")
    if not instruction:
        raise InputError(f"screenspot: {where} has no instruction; it has {', '.join(record)}")
    return ScreenItem(image, size, str(instruction), shares, kind, f"{group}/{kind}", source)
