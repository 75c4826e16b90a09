"""The file format of published head sets."""

from pathlib import Path

import pytest

from headwise.attend.addresses import Head, Layout
from headwise.errors import InputError
from headwise.steering.calibration_heads import read_calibration_heads

TEXT = """
first_set = [[1, 3],
 [],
 [0]]

second =[[2]]
LIMIT = 4
computed = [[i] for i in range(3)]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "index.py"
    path.write_text(text)
    return path


def test_a_row_is_a_layer_from_the_third_on(tmp_path: Path):
    found = read_calibration_heads(written(tmp_path, TEXT))
    assert found == {"first_set": [Head(2, 1), Head(2, 3), Head(4, 0)], "second": [Head(2, 2)]}
    assert read_calibration_heads(tmp_path / "index.py", first_layer=0)["second"] == [Head(0, 2)]


def test_heads_are_those_of_the_model(tmp_path: Path):
    path = written(tmp_path, TEXT)
    found = read_calibration_heads(path, Layout.of([4] * 5, [2] * 5))
    assert found["first_set"][1].key == 1
    with pytest.raises(InputError, match=r"index.py: first_set: head 4.0: layer 4 is out of range.*of another model"):
        read_calibration_heads(path, Layout.of([4] * 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [[1, -2]]", r"-2 in the row of layer 2 is no head"),
        ("x = [[1], ['a']]", r"'a' in the row of layer 3 is no head"),
        ("x = [1, 2]", r"holds no head set; expected name = \[\[heads of layer 2\]"),
        ("x = [[1", r"is not Python text"),
        ("import os\nos.remove('x')", r"holds no head set"),
    ],
)
def test_refusals(text, message, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        read_calibration_heads(written(tmp_path, text))


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        read_calibration_heads(tmp_path / "nothing.py")
