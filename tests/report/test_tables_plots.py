"""Tables and figures of a scan."""

import io
import re
import struct

import pytest

from headwise.attend.addresses import Head, Layout
from headwise.attend.head_map import HeadMap
from headwise.report.plots import bars, figure, lines, plot_head_map
from headwise.report.tables import print_scan

LAYOUT = Layout.of([4, 0, 4])
SCORES = HeadMap(
    {"sink": {Head(0, 1): 0.25, Head(2, 3): 0.5}, "$x_1$ [b]": {Head(2, 0): 1e-5}, "nothing": {}},
    LAYOUT,
    model="model $a",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_output_that_is_no_terminal_gets_lines_that_programs_read():
    out = io.StringIO()
    print_scan(SCORES, file=out)
    assert out.getvalue() == "sink\t1\t2.3\t0.5\nsink\t2\t0.1\t0.25\n$x_1$ [b]\t1\t2.0\t1e-05\n"


def test_a_terminal_gets_a_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    print_scan(SCORES, k=1, file=out)
    shown = re.sub(r"\x1b\[\d*m", "", out.getvalue())
    assert "2.3 0.5" in shown and "$x_1$ [b]" in shown
    assert "0.1" not in shown and "nothing" not in shown


def size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_head_maps_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; extra 'plots' brings it")
    plot_head_map(SCORES, tmp_path / "heads.png")
    wide, _ = size(tmp_path / "heads.png")
    plot_head_map(SCORES, tmp_path / "one.png", probes=["sink"])
    assert size(tmp_path / "one.png")[0] < wide
    with pytest.raises(ValueError, match="no head of the main tower has a score"):
        plot_head_map(SCORES, tmp_path / "none.png", probes=["nothing"])
    assert {path.name for path in tmp_path.iterdir()} == {"heads.png", "one.png"}


def test_figures_of_papers_repeat_exactly_and_appear_only_when_complete(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; extra 'plots' brings it")
    for name in ("a.png", "b.png"):
        with figure(tmp_path / name, 2) as (left, right):
            lines(left, [1, 2], {"sink": [0.1, 0.2], "random": [0.0, 0.1]}, spread={"sink": [0.1, 0.1]}, x="step")
            bars(
                right,
                ["top", "random"],
                {"zero": [0.1, 0.9]},
                error={"zero": [0.1, 0.1]},
                y="accuracy",
                title="Ablated",
            )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert size(tmp_path / "a.png")[0] > 1000
    with pytest.raises(ValueError, match="'sink' has 1 values for 2 places"), figure(tmp_path / "c.png") as (axes,):
        lines(axes, [1, 2], {"sink": [0.1]})
    assert not (tmp_path / "c.png").exists()
    with pytest.raises(ValueError, match="'zero' has 1 values for 2 groups"), figure(tmp_path / "c.png") as (axes,):
        bars(axes, ["a", "b"], {"zero": [0.1]})
