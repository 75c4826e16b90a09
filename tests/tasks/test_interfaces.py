"""Generated interfaces: what an instruction names is there once, and not without what it says."""

import pytest
import torch

from headwise.tasks.gui import click_accuracy, read_point
from headwise.tasks.interfaces import GUI_WORDS, ICONS, PANEL_COLOURS, GuiScreens, gui_screens, panel_of, row_of


@pytest.fixture(scope="module")
def screens() -> GuiScreens:
    return gui_screens(400, seed=0)


def matches(screens: GuiScreens, row: int, text: str) -> list[int]:
    """Read an instruction as a person would: all cells that it fits."""
    said = text.split()
    found = []
    for cell in range(16):
        shape = int(screens.shapes[row, cell])
        if shape < 0 or ICONS[shape] != said[0]:
            continue
        panel = panel_of(cell)
        if "panel" in said and list(PANEL_COLOURS)[int(screens.panels[row, panel])] != said[-2]:
            continue
        light = bool(screens.light[row, panel] == row_of(cell))
        if "row" in said and ("light" in said) != light:
            continue
        found.append(cell)
    return found


def test_an_instruction_fits_one_cell(screens):
    for row, text in enumerate(screens.instructions()):
        assert matches(screens, row, text) == [int(screens.target[row])]


def test_hard_ones_need_the_panel_and_nested_ones_the_row(screens):
    for row, text in enumerate(screens.instructions()):
        said = text.split()
        without_panel = len(matches(screens, row, said[0]))
        without_row = len(matches(screens, row, " ".join([said[0], "in", *said[-2:]]))) if len(said) > 1 else None
        kind = screens.kinds()[row]
        assert (without_panel > 1) == (kind != "easy")
        if kind == "nested":
            assert without_row == 2
        elif without_row is not None:
            assert without_row == 1


def test_easy_ones_may_name_what_is_not_needed(screens):
    assert set(screens.named[screens.kind == 0].tolist()) == {0, 1, 2}
    assert set(screens.named[screens.kind == 1].tolist()) == {1} and set(screens.named[screens.kind == 2].tolist()) == {
        2
    }


def test_points_lie_in_the_boxes(screens):
    found = click_accuracy([read_point(text) for text in screens.points()], screens.boxes, groups=screens.kinds())
    assert found.sample_mean == 1 and set(found.groups) == {"easy", "hard", "nested"}
    shifted = screens[torch.arange(len(screens)).roll(1)]
    assert click_accuracy([read_point(text) for text in shifted.points()], screens.boxes).sample_mean < 0.2


def test_twins_have_the_same_shape(screens):
    twins = screens.twins()
    assert torch.equal(twins == screens.target, screens.kind == 0)
    rows = torch.arange(len(screens))
    assert torch.equal(screens.shapes[rows, twins], screens.shapes[rows, screens.target])


def test_stages_say_what_is_there(screens):
    colours = list(PANEL_COLOURS)
    for row, (summary, analysis) in enumerate(zip(screens.summaries(), screens.analyses(), strict=True)):
        assert sorted(summary.split()) == sorted(colours)
        cell = int(screens.target[row])
        words = analysis.split()
        assert words[0] == summary.split()[panel_of(cell)]
        assert words[1] == ("top" if cell < 8 else "bottom") + ("left" if cell % 4 < 2 else "right")
        assert words[3] == ("upper", "lower")[cell // 4 % 2]
        beside = int(screens.shapes[row, cell + 1 if cell % 2 == 0 else cell - 1])
        assert words[5] == (ICONS[beside] if beside >= 0 else "nothing")
    used = {word for texts in (screens.instructions(), screens.summaries(), screens.analyses(), screens.points())
            for text in texts for word in text.split()}  # fmt: skip
    assert used <= set(GUI_WORDS) and len(set(GUI_WORDS)) == len(GUI_WORDS)


def test_pictures_show_what_is_said():
    clean = gui_screens(20, noise=0, seed=1)
    for row in range(20):
        for panel in range(4):
            bar = clean.image[row, :, panel // 2 * 24, panel % 2 * 24 + 12]
            name = list(PANEL_COLOURS)[int(clean.panels[row, panel])]
            bright = {"red": (1, 0, 0), "yellow": (1, 1, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}[name]
            assert tuple((bar > 0.5).int().tolist()) == bright
        cell = int(clean.target[row])
        light = bool(clean.light[row, panel_of(cell)] == row_of(cell))
        left, bottom = cell % 4 * 12, cell // 4 * 12 + 11
        assert float(clean.image[row, 0, bottom, left]) == pytest.approx(0.34 if light else 0.08)


def test_a_border_goes_all_around_and_a_title_does_not():
    title, border = (gui_screens(4, frame=frame, noise=0, seed=2) for frame in ("title", "border"))
    assert torch.equal(title.image[:, :, 0, :24], border.image[:, :, 0, :24])
    edge = border.image[:, :, 23, 12]  # the bottom of the first panel
    torch.testing.assert_close(edge, border.image[:, :, 0, 12])
    assert not torch.allclose(title.image[:, :, 23, 12], edge)


def test_a_seed_repeats_and_a_mix_is_kept():
    one, other = gui_screens(8, seed=3), gui_screens(8, seed=3)
    assert torch.equal(one.image, other.image) and not torch.equal(one.image, gui_screens(8, seed=4).image)
    assert set(gui_screens(50, mix=(0, 0, 1), seed=0).kinds()) == {"nested"}
    assert (gui_screens(50, empty=0, seed=0).shapes >= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"mix": (1, 0)}, "expected a share of each of easy, hard, nested"),
        ({"mix": (0, 0, 0)}, "mix is"),
        ({"frame": "round"}, "frame is 'round'; expected title or border"),
        ({"noise": -1}, "noise is -1"),
        ({"empty": 2}, "empty is 2"),
        ({"seed": None}, "give either seed or generator"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gui_screens(**{"n": 4, "seed": 0} | options)
