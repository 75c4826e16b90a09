"""Runs, verdicts and recorded runs, on a paper made for the test."""

import json
import sys
import types
from pathlib import Path

import pytest

from headwise.errors import InputError
from headwise.papers import record, recorded, running
from headwise.papers.record import Claim
from headwise.papers.running import Run, reproduce
from headwise.papers.verdicts import Measured, exit_code, row_document, verdict_of, verdict_over_seeds

SOURCE = """
from headwise.papers.record import Claim, Paper
PAPER = Paper(
    slug="made-up", title="Made up", authors="Nobody", year=2024, area="heads", modules=("headwise.papers.statistics",),
    claims=(
        Claim(id="grows", kind="claim", claim="It grows.", criterion="by more than 1", control="none grows"),
        Claim(id="exact", kind="check", claim="It is exact.", criterion="to 1e-6"),
        Claim(id="huge", kind="untestable", claim="It works at 7B.", criterion="does not fit"),
    ),
)
def reproduce(run):
    pass
"""


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "made_up.py"
    path.write_text(SOURCE)

    def records():
        found = record.read_record(path)
        assert found is not None
        return {"made-up": found}

    for module in (record, recorded, running):
        monkeypatch.setattr(module, "record_files", records)
    monkeypatch.setattr(recorded, "results_folder", lambda: tmp_path / "results")
    monkeypatch.setattr(running, "results_folder", lambda: tmp_path / "results")
    module = types.ModuleType("headwise.papers.made_up")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def measure(run: Run):
        import torch

        run.log(f"drew {torch.rand(()).item():.3f}")
        growth = 1.5 + 0.1 * run.seed
        return {
            "grows": Measured(
                measured=f"{growth:.1f}", control="1.0", holds=True, margin=growth - 1, values={"g": growth}
            ),
            "exact": Measured(measured="2e-7", holds=True),
        }

    module.reproduce = measure  # pyright: ignore[reportAttributeAccessIssue]
    return types.SimpleNamespace(path=path, module=module, results=tmp_path / "results")


def test_one_seed(made_up, tmp_path: Path):
    lines: list[str] = []
    (document,) = reproduce("made_up", seed=2, out=tmp_path / "out", log=lines.append)
    assert document["paper"] == "made-up"
    assert document["seed"] == 2
    assert document["figures"] == []
    grows, exact, huge = document["claims"]
    assert (grows["verdict"], grows["measured"], grows["control"]) == ("reproduced", "1.7", "1.0")
    assert set(grows) == {
        *("id", "kind", "claim", "paper_figure", "measured", "control", "criterion", "verdict", "known")
    }
    assert exact["verdict"] == "reproduced"
    assert (huge["verdict"], huge["measured"], huge["known"]) == (None, None, None)
    assert exit_code([document]) == 0
    assert "seed 2 on cpu" in lines[0]
    assert not made_up.results.exists()


def test_seeds_are_repeatable(made_up, tmp_path: Path):
    said: list[list[str]] = [[], []]
    for lines in said:
        reproduce("made-up", out=tmp_path, log=lambda text, lines=lines: lines.append(text.split("s  ", 1)[1]))
    assert said[0] == said[1]


def test_several_seeds_are_recorded_and_go_stale(made_up):
    (document,) = reproduce("made-up", seeds=3, log=lambda text: None)
    run = json.loads((made_up.results / "made-up.json").read_text())
    assert run["seeds"] == [0, 1, 2]
    assert [row["id"] for row in run["claims"]] == ["grows", "exact", "huge"]
    values = run["claims"][0]["values"]["g"]
    assert values["mean"] == pytest.approx(1.6)
    assert values["sd"] == pytest.approx(0.1)
    assert run["claims"][0]["measured"] == "1.5; 1.6; 1.7"
    assert {"python", "torch", "headwise", "device"} <= set(run["versions"])
    assert set(run["files"]) == {"papers/made_up.py", "papers/statistics.py"}
    assert document["claims"][0]["verdict"] == "reproduced"
    assert sorted(path.name for path in made_up.results.iterdir()) == ["made-up.json"]

    (row,) = recorded.catalogue("made-up")
    assert row["recorded"] == {"seeds": [0, 1, 2], "stale": []}
    assert row["counts"] == {"reproduced": 2, "not reproduced": 0, "inconclusive": 0, "untestable": 1}
    assert row["status"] == "partial"
    assert row["missing"] == ["its test file"]

    # A note is no change of the run; a criterion and the code are.
    made_up.path.write_text(SOURCE.replace('criterion="to 1e-6"', 'criterion="to 1e-6", known="a note"'))
    assert recorded.catalogue("made-up")[0]["recorded"]["stale"] == []
    made_up.path.write_text(SOURCE.replace("to 1e-6", "to 1e-3"))
    assert recorded.catalogue("made-up")[0]["recorded"]["stale"] == ["papers/made_up.py"]
    made_up.path.write_text(SOURCE.replace("pass", "return None"))
    assert recorded.catalogue("made-up")[0]["recorded"]["stale"] == ["papers/made_up.py"]


def test_a_reason_counts_only_with_a_recorded_run(made_up, tmp_path: Path):
    made_up.path.write_text(SOURCE.replace('control="none grows"', 'control="none", known="too small"'))
    made_up.module.reproduce = lambda run: {
        "grows": Measured(measured="0", control="0", holds=False),
        "exact": Measured(measured="0", holds=True),
    }
    (document,) = reproduce("made-up", out=tmp_path, log=lambda text: None)
    assert document["claims"][0]["known"] is None
    assert exit_code([document]) == 1
    reproduce("made-up", seeds=3, log=lambda text: None)
    (document,) = reproduce("made-up", out=tmp_path, log=lambda text: None)
    assert document["claims"][0]["known"] == "too small"
    assert exit_code([document]) == 0


def test_a_failed_check_has_no_excuse():
    row = Claim(id="exact", kind="check", claim="c", criterion="c", known="a reason")
    failed = row_document(row, [Measured(measured="1", holds=False)], "a reason")
    assert exit_code([{"claims": [failed]}]) == 1


def test_rows_left_out_or_made_up_are_refused(made_up, tmp_path: Path):
    made_up.module.reproduce = lambda run: {
        "grows": Measured(measured="1", holds=True),
        "more": Measured(measured="1", holds=True),
    }
    with pytest.raises(ValueError, match=r"left out rows \['exact'\] and made up rows \['more'\]"):
        reproduce("made-up", out=tmp_path, log=lambda text: None)


def test_bad_input(made_up, tmp_path: Path):
    with pytest.raises(InputError, match="not in the catalogue"):
        reproduce("madeup2", out=tmp_path)
    with pytest.raises(InputError, match="seeds is 0; expected 1 or more"):
        reproduce("made-up", seeds=0, out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        reproduce("made-up", out=tmp_path / "file" / "inside")
    made_up.path.write_text(SOURCE.split("def reproduce")[0])
    with pytest.raises(InputError, match="made-up is partial and cannot be run yet"):
        reproduce("made-up", out=tmp_path)


def test_pictures(made_up, tmp_path: Path):
    def draw(run: Run):
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(1, 1))
        run.save_figure(figure, "dot")
        plt.close(figure)
        return {"grows": Measured(measured="2", control="1", holds=True), "exact": Measured(measured="0", holds=True)}

    made_up.module.reproduce = draw
    (document,) = reproduce("made-up", out=tmp_path / "out", log=lambda text: None)
    assert document["figures"] == [str(tmp_path / "out" / "made-up-dot.png")]
    assert Path(document["figures"][0]).read_bytes().startswith(b"\x89PNG")
    reproduce("made-up", seeds=2, log=lambda text: None)
    run = json.loads((made_up.results / "made-up.json").read_text())
    assert run["figures"] == ["figures/made-up-dot.png"]
    assert (made_up.results / run["figures"][0]).exists()


def row(margin: float, interval: tuple[float, float] | None = None) -> Measured:
    return Measured(measured=str(margin), holds=margin >= 0, margin=margin, interval=interval)


def test_verdicts_of_one_run():
    assert verdict_of(row(0.2)) == "reproduced"
    assert verdict_of(row(-0.2)) == "not reproduced"
    assert verdict_of(row(0.2, (-0.1, 0.5))) == "inconclusive"
    assert verdict_of(row(-0.2, (-0.3, -0.1))) == "not reproduced"


def test_verdicts_over_seeds():
    assert verdict_over_seeds("claim", [row(0.1), row(0.2)]) == "reproduced"
    assert verdict_over_seeds("claim", [row(-0.1), row(-0.2)]) == "not reproduced"
    assert verdict_over_seeds("claim", [row(0.1), row(-0.2), row(0.1)]) == "inconclusive"
    assert verdict_over_seeds("claim", [row(0.1), row(-0.001)] + [row(0.1)] * 8) == "reproduced"
    assert verdict_over_seeds("check", [row(0.1), row(-0.001)] + [row(0.1)] * 8) == "not reproduced"


def test_a_contradiction_is_refused():
    with pytest.raises(ValueError, match="disagree"):
        Measured(measured="x", holds=True, margin=-1.0)
    with pytest.raises(ValueError, match="upside down"):
        Measured(measured="x", holds=True, interval=(1.0, 0.0))


def test_progress_says_how_far(made_up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    run = Run(record.find_paper("made-up"), 0, "cpu", tmp_path, lines.append)
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(running.time, "monotonic", lambda: next(clock))
    assert list(run.progress([1, 2, 3, 4], "needles")) == [1, 2, 3, 4]
    assert any("needles: " in line and "of 4" in line for line in lines)
