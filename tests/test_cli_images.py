"""`headwise steer --image`: a picture with a prompt, for models that take both."""

import json
from pathlib import Path

import pytest

from headwise.cli import run
from headwise.specimens.registry import load_specimen
from headwise.specimens.vision_language import written_captions
from headwise.tasks.captions import shapes_captions

image = pytest.importorskip("PIL.Image")
VHR = "vision-aware-head-reinforcement"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of four shapes as a file."""
    scenes = shapes_captions(1, sigma=0.6, seed=4)
    path = tmp_path_factory.mktemp("pictures") / "shapes.png"
    image.fromarray((scenes.image[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(path)
    return path


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_picture_stands_before_the_prompt(picture: Path, capsys):
    code, out, err = call(
        capsys, "steer", "vision-language", "--edit", f"{VHR}:alpha=3,layers=1,-2:", "--image", picture,
        "--prompt", "describe :", "--max-new-tokens", 8, "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["tokens"]["prompt"].count("<image>") == 16
    scenes = shapes_captions(1, sigma=0.6, seed=4)
    assert found["plain"].strip() == written_captions(load_specimen("vision-language").model, scenes)[0]
    assert found["loss"]["plain"]["reference"] != found["loss"]["steered"]["reference"]
    assert found["edits"] == [{"edit": VHR, "options": {"alpha": "3", "layers": "1,-2:"}}]


def test_the_image_token_in_the_prompt_says_where(picture: Path, capsys):
    code, out, err = call(
        capsys, "steer", "vision-language", "--edit", "scale-heads:scale=1.5", "--image", picture,
        "--prompt", "<image> is there a ring ?", "--max-new-tokens", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["tokens"]["prompt"].count("<image>") == 16 and found["plain"].strip() in ("yes", "no")


def test_without_a_picture_nothing_is_reinforced(capsys):
    code, out, err = call(
        capsys, "steer", "vision-language", "--edit", VHR, "--prompt", "describe :", "--max-new-tokens", 4, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["changed_at"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text", "--edit", "zero-tuning", "--prompt", "The"), "no processor that takes a picture with text"),
        (("vision-language", "--edit", f"{VHR}:alpha=0", "--prompt", "describe :"), "alpha is 0.0; it must be above 0"),
        (("vision-language", "--edit", f"{VHR}:layers=9", "--prompt", "describe :"), "layers: 9 is out of range"),
    ],
)
def test_what_does_not_fit_is_one_line(picture: Path, capsys, arguments, message):
    code, out, err = call(capsys, "steer", *arguments, "--image", picture)
    assert code == 2 and out == "" and message in err and "Traceback" not in err


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path, capsys):
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    arguments = ("steer", "vision-language", "--edit", VHR, "--prompt", "describe :", "--image", path)
    code, _, err = call(capsys, *arguments)
    assert code == 2 and "cannot be read as a picture" in err


def test_a_model_without_pictures_is_refused_by_name(capsys):
    code, _, err = call(capsys, "steer", "text", "--edit", VHR, "--prompt", "The captain")
    assert code == 2 and "names no image token" in err
