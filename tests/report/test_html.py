"""What the report holds, how large it is, and what it refuses; how it behaves is tested in a browser."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.report.sample import LAYOUT, head_map, report_data, tokens

import headwise
from headwise.attend.addresses import Head
from headwise.attend.head_map import HeadMap
from headwise.errors import InputError
from headwise.report.html import compare, sparse_rows, write_report
from headwise.report.suggestions import suggest

ASSETS = Path(headwise.__file__).parent / "report" / "assets"


def embedded(page: str) -> dict[str, Any]:
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[0])


def written(tmp_path: Path, data: dict[str, Any]) -> dict[str, Any]:
    write_report(data, tmp_path / "report.html")
    return embedded((tmp_path / "report.html").read_text("utf-8"))


def small(**changes: Any) -> dict[str, Any]:
    data = {
        "model": "m",
        "towers": LAYOUT.to_json(),
        "probes": {"sink": {"sentence": "s", "scores": {"0.0": 0.5, "0.1": None}, "try": "headwise scan"}},
        "texts": [{"name": "t", "tokens": ["a", "b", "c", "d"]}],
        "examples": [{"probe": "sink", "head": "0.0", "text": 0, "rows": [[1, [[0, 0.75], [1, 0.25]]]]}],
    }
    return data | changes


def test_the_page_is_one_small_file_that_loads_nothing(tmp_path):
    write_report(report_data(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert len(page.encode()) < 400_000
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert policy in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(|\bfetch\(|XMLHttpRequest""", page)
    assert "{{" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_long_text_and_many_heads_stay_below_a_megabyte(tmp_path):
    length = 1500
    weights = torch.rand(length, length).tril().softmax(-1)
    rows = sparse_rows(torch.where(weights > 0, 0.05, 0.0), queries=range(length))
    data = small(texts=[{"name": "t", "tokens": ["token"] * length}])
    data["examples"] = [
        {"probe": "sink" if head.layer < 3 else "last", "head": str(head), "text": 0, "rows": rows}
        for head in [*LAYOUT.heads(), *LAYOUT.heads()]
    ]
    document = written(tmp_path, data)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    kept = [example["head"] for example in document["examples"]]
    assert 6 < len(kept) < 32
    assert kept[:4] == ["0.0", "3.0", "0.1", "3.1"]  # the probes in turn, each head once
    assert f"kept for {len(kept)} of 32 heads" in document["notes"][-1]
    assert document["floor"] == 0.02
    assert all(len(row) == 11 for row in document["examples"][0]["rows"][5:])


def test_weak_weights_go_before_heads_do(tmp_path):
    length = 900
    rows = [[query, [[key, 0.3 / (1 + key) + 0.006] for key in range(min(query, 14) + 1)]] for query in range(length)]
    data = small(texts=[{"name": "t", "tokens": ["token"] * length}])
    data["examples"] = [{"probe": "sink", "head": str(h), "text": 0, "rows": rows} for h in LAYOUT.heads()[:12]]
    document = written(tmp_path, data)
    assert len(document["examples"]) == 12
    assert document["floor"] == 0.01
    assert [len(row) for row in document["examples"][0]["rows"][:10]] == [3, 5, 7, 9, 11, 13, 15, 17, 17, 17]


@given(st.text(st.characters(codec=None) | st.sampled_from("<>&/\u2028\u2029'\"\\{}"), max_size=40))
def test_any_text_survives_inside_the_script_element(tmp_path, text):
    data = small(model=text or "m", texts=[{"name": text, "tokens": [text, "</script>", "<!--", "d"]}])
    document = written(tmp_path, data)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert document["texts"][0]["tokens"][:2] == [re.sub("[\ud800-\udfff]", "\ufffd", text), "</script>"]
    block = re.findall(r'id="data">(.*?)</script>', page, re.S)[0]
    assert not set("<>&\u2028\u2029") & set(block)
    assert page.count("<script") == 2


def test_the_assets_cannot_end_their_own_elements():
    assert "</script" not in (ASSETS / "report.js").read_text("utf-8").lower()
    assert "<!--" not in (ASSETS / "report.js").read_text("utf-8")
    assert "</style" not in (ASSETS / "report.css").read_text("utf-8").lower()
    assert "innerHTML" not in (ASSETS / "report.js").read_text("utf-8")


def test_what_the_page_holds(tmp_path):
    document = written(tmp_path, small(comparison=None, notes=["n"], versions={"torch": "2"}, source="here"))
    assert document["examples"] == [{"probe": "sink", "head": "0.0", "text": 0, "rows": [[1, 0, 750, 1, 250]]}]
    assert document["texts"] == [{"name": "t", "tokens": ["a", "b"], "special": [], "cut": 4}]
    assert document["probes"]["sink"]["scores"] == {"0.0": 0.5, "0.1": None}
    assert document["probes"]["sink"]["try"] == [{"do": "", "command": "headwise scan", "tower": ""}]
    assert document["versions"] == {"headwise": headwise.__version__, "torch": "2"}
    assert (document["notes"], document["source"]) == (["n"], "here")


def test_scores_that_are_not_numbers_become_missing(tmp_path):
    scores = {"0.0": float("nan"), "0.1": 1 / 3}
    assert written(tmp_path, small(probes={"sink": {"scores": scores}}))["probes"]["sink"]["scores"] == {
        "0.0": None,
        "0.1": 0.33333,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probes": {}}, "report: probes is empty"),
        ({"towers": None}, "report: towers is NoneType; expected list"),
        ({"probes": {"sink": {"scores": [1]}}}, "report: probe 'sink': scores is list; expected Mapping"),
        ({"probes": {"sink": {"scores": {"9.0": 1.0}}}}, "head 9.0: layer 9 is out of range"),
        ({"texts": [{"tokens": "abc"}]}, "report: texts[0]: tokens is str"),
        ({"texts": []}, "report: examples[0]: text is 0; there are 0 texts"),
        ({"texts": [{"tokens": ["a"]}]}, "report: examples[0]: row 1 names token 1; its text has 1 tokens"),
    ],
)
def test_data_of_another_form_is_refused_and_nothing_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(small(**change), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_report(small(), path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(small(), tmp_path / "file" / "report.html")


def test_sparse_rows_keep_the_strongest_keys():
    weights = torch.tensor([[0.5, 0.3, 0.199, 0.001], [0.1, 0.2, 0.3, 0.4]])
    rows = sparse_rows(weights, keys=3)
    assert [(query, [key for key, _ in pairs]) for query, pairs in rows] == [(2, [0, 1, 2]), (3, [3, 2, 1])]
    assert rows[0][1][0][1] == 0.5
    assert sparse_rows(weights, keys=1, queries=[7, 9])[1] == [9, [[3, pytest.approx(0.4)]]]
    with pytest.raises(ValueError, match="2 rows but 1 queries"):
        sparse_rows(weights, queries=[7])


def test_a_comparison_holds_differences_and_agreement(tmp_path):
    this, other = head_map(tokens(), seed=0)[0], head_map(tokens(), seed=1, model="other")[0]
    made = compare(this, other)
    assert made["name"] == "other"
    head = Head(2, 5)
    difference = (this.of("sink")[head] or 0.0) - (other.of("sink")[head] or 0.0)
    assert made["probes"]["sink"]["scores"]["2.5"] == pytest.approx(difference)
    assert made["probes"]["sink"]["correlation"] == this.correlation(other, "sink")
    same = compare(this, this)["probes"]["induction"]
    assert (same["correlation"], same["overlap"], same["k"]) == (pytest.approx(1), 1, 10)
    flat = HeadMap({"sink": dict.fromkeys(LAYOUT.heads(), 1.0)}, LAYOUT)
    assert compare(flat, this)["probes"]["sink"]["correlation"] is None
    document = written(tmp_path, report_data() | {"comparison": compare(flat, this)})
    assert list(document["comparison"]["probes"]) == ["sink"]


def test_suggestions_are_commands_for_this_model_and_map():
    (first, control) = suggest("induction", model="my model", map_path="out/heads.json", k=3)
    assert first["command"] == (
        "headwise steer 'my model' --edit ablate --heads top:induction:3 "
        '--prompt "The captain said" --map out/heads.json'
    )
    assert "'top:induction:3,random:3,!top:induction:3'" in control["command"]
    assert suggest("sink", tower="vision")[0]["command"].split("--heads ")[1].startswith("vision:top:sink:4 ")
    assert suggest("something-new")[0]["command"].startswith("headwise steer --edit ablate --heads top:something-new:4")


def test_known_probes_need_no_unit(tmp_path):
    scores = {"0.0": 3.0}
    probes = {"distance": {"scores": scores}, "mine": {"scores": scores}, "sink": {"scores": scores, "unit": "parts"}}
    found = written(tmp_path, small(probes=probes))["probes"]
    assert (found["distance"]["unit"], found["distance"]["range"]) == ("tokens", [0, None])
    assert (found["mine"]["unit"], found["mine"]["range"]) == ("", None)
    assert (found["sink"]["unit"], found["sink"]["range"]) == ("parts", [0, 1])
