"""Reading ScreenSpot and ScreenSpot-Pro from a folder that has their form."""

import json
from pathlib import Path

import pytest

from headwise.errors import InputError
from headwise.tasks.gui import click_accuracy
from headwise.tasks.screenspot import read_screenspot, read_screenspot_pro

Image = pytest.importorskip("PIL.Image")


def picture(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)


def record(**other) -> dict:
    return {
        "img_filename": "a.png",
        "bbox": [20, 10, 40, 30],
        "instruction": "open the menu",
        "data_type": "icon",
        "data_source": "ios",
    } | other


@pytest.fixture
def spot(tmp_path: Path) -> Path:
    picture(tmp_path / "screenspot_imgs" / "a.png", 200, 100)
    return tmp_path


def test_screenspot_boxes_are_a_corner_and_a_size(spot: Path):
    (spot / "screenspot_mobile.json").write_text(json.dumps([record(), record(data_type="text")]))
    (spot / "screenspot_web_v2.json").write_text(json.dumps([record(data_source="shop")]))
    items = read_screenspot(spot)
    assert [item.group for item in items] == ["mobile/icon", "mobile/text", "web/icon"]
    assert items[0].box == pytest.approx((0.1, 0.1, 0.3, 0.4)) and items[0].size == (200, 100)
    assert items[0].instruction == "open the menu" and items[0].image.name == "a.png"
    # The far corner counts: read as two corners, this point would be outside.
    assert click_accuracy([(0.3, 0.4)], [items[0].box]).sample_mean == 1


def test_lines_of_json_are_read_and_sources_tell_the_platform(spot: Path):
    lines = [record(data_source="windows"), record(data_source="gitlab", instruction=None, question="log in")]
    (spot / "screenspot.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    items = read_screenspot(spot)
    assert [item.group for item in items] == ["desktop/icon", "web/icon"] and items[1].instruction == "log in"


def test_screenspot_pro_boxes_are_two_corners(tmp_path: Path):
    picture(tmp_path / "images" / "cad" / "b.png", 10, 10)  # its size is taken from the annotation
    row = {
        "img_filename": "cad/b.png", "bbox": [300, 200, 600, 400], "instruction": "rotate", "ui_type": "text",
        "application": "autocad", "group": "CAD", "img_size": [3000, 2000], "platform": "windows",
    }  # fmt: skip
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "autocad_windows.json").write_text(json.dumps([row]))
    (item,) = read_screenspot_pro(tmp_path)
    assert item.box == pytest.approx((0.1, 0.1, 0.2, 0.2)) and item.size == (3000, 2000)
    assert (item.group, item.source, item.kind) == ("CAD/text", "autocad", "text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [20, 10, -5, 30]}, r"the box \[20.0, 10.0, 15.0, 40.0\] is none; expected x1 <= x2"),
        ({"bbox": [900, 10, 5, 5]}, "outside the picture of 200 x 100 pixels"),
        ({"bbox": [1, 2, 3]}, "expected four numbers"),
        ({"bbox": None}, "record 0 has no bbox"),
        ({"img_filename": "c.png"}, "its picture c.png is not under"),
        ({"instruction": ""}, "has no instruction"),
        ({"data_type": None}, "has no data_type"),
    ],
)
def test_records_that_cannot_be_used_are_named(spot: Path, change, message):
    (spot / "screenspot_web.json").write_text(json.dumps([record(**change)]))
    with pytest.raises(InputError, match=message):
        read_screenspot(spot)


def test_files_that_cannot_be_used_are_named(spot: Path):
    with pytest.raises(InputError, match="give the folder of the benchmark"):
        read_screenspot(spot)
    (spot / "screenspot_web.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        read_screenspot(spot)
    (spot / "screenspot_web.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="is no list of records"):
        read_screenspot(spot)
    (spot / "screenspot_web.json").unlink()
    (spot / "screenspot.json").write_text(json.dumps([record(data_source="fridge")]))
    with pytest.raises(InputError, match="data_source 'fridge'"):
        read_screenspot(spot)
