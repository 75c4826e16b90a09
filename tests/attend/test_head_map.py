"""Head maps: ranking, controls, files."""

import csv
import json
import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headwise
from headwise.attend.addresses import Head, Layout, Tower
from headwise.attend.head_map import HeadMap
from headwise.errors import InputError

LAYOUT = Layout.of([8] * 4, [2] * 4)
TOWERS = Layout((Tower("", (4, 0, 2), (2, 0, 1)), Tower("vision", (3,), (3,))))
HEADS = TOWERS.heads("*")
numbers = st.none() | st.floats(-1e6, 1e6)


@st.composite
def tables(draw):
    table = st.fixed_dictionaries(dict.fromkeys(HEADS, numbers))
    scores = draw(st.dictionaries(st.sampled_from(["sink", "induction", "é<&>"]), table, min_size=1))
    runs = draw(st.none() | st.lists(st.dictionaries(st.sampled_from(HEADS), st.floats(0, 1)), min_size=1, max_size=3))
    return {"scores": scores, "runs": runs and {next(iter(scores)): runs}}


def head_map(**probes) -> HeadMap:
    return HeadMap(probes or {"sink": {head: 1.0 * head.layer + head.head / 10 for head in LAYOUT.heads()}}, LAYOUT)


@given(tables())
def test_a_map_survives_its_file(tmp_path, table):
    written = HeadMap(**table, layout=TOWERS, model="m", source="s")
    written.save(tmp_path / "heads.json")
    read = HeadMap.load(tmp_path / "heads.json")
    assert (read.scores, read.runs, read.layout) == (written.scores, written.runs, written.layout)
    assert (read.model, read.source) == ("m", "s")
    document = json.loads((tmp_path / "heads.json").read_text("utf-8"))
    assert (document["schema"], document["headwise"]) == (1, headwise.__version__)
    assert (document["layers"], document["heads"]) == (3, 4)
    assert document == written.to_json()


@given(tables())
def test_ranking_is_by_score_then_address(table):
    written = HeadMap(**table, layout=TOWERS)
    for probe in written.probes:
        scores, ranked = written.of(probe), written.ranked(probe, tower="*")
        assert set(ranked) == {head for head, score in scores.items() if score is not None}
        order = [(-score, head) for head in ranked if (score := scores[head]) is not None]
        assert order == sorted(order)
        assert written.top(probe, 3, tower="*") == ranked[:3]
        if not len({scores[head] for head in ranked}) < len(ranked):
            assert written.bottom(probe, 3, tower="*") == ranked[::-1][:3]
        assert all(head.tower == "" for head in written.top(probe, 100))


def test_selecting():
    scores = head_map()
    assert [str(head) for head in scores.top(k=3)] == ["3.7", "3.6", "3.5"]
    assert [str(head) for head in scores.bottom(k=2)] == ["0.0", "0.1"]
    assert [str(head) for head in scores.select(threshold=3.5)] == ["3.7", "3.6", "3.5"]
    assert scores.select(selection="top:sink:2,!3.7") == [Head(3, 6)]
    assert scores.top(k=1)[0].key == 1
    with pytest.raises(ValueError, match="give either threshold= or selection="):
        scores.select()
    with pytest.raises(ValueError, match="top: k is 0"):
        scores.top(k=0)


def test_probes_are_found_by_name_or_explained():
    two = head_map(**{"output-norm": {Head(0, 0): 1.0}, "sink": {}})
    assert two.of("output_norm") is two.of("output-norm")
    with pytest.raises(ValueError, match="which probe"):
        two.of()
    with pytest.raises(ValueError, match=re.escape("no probe 'snik'; it has output-norm, sink; did you mean 'sink'?")):
        two.top("snik")


def test_scores_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="layer 9 is out of range"):
        head_map(sink={Head(9, 0): 1.0})
    with pytest.raises(ValueError, match=r"'sink' of head 0\.0 is inf; expected a finite number"):
        head_map(sink={Head(0, 0): math.inf})
    assert head_map(sink={Head(0, 0): math.nan}).of()[Head(0, 0)] is None


def test_a_tensor_of_one_tower():
    scores = HeadMap({"sink": {Head(0, 3): 0.25, Head(2, 1): 0.5, Head(0, 2, "vision"): 1.0}}, TOWERS)
    main = scores.tensor("sink")
    assert main.shape == (3, 4)
    assert main[0, 3] == 0.25 and main[2, 1] == 0.5
    assert torch.isnan(main).sum() == 10
    assert scores.tensor(tower="vision").tolist()[0][2] == 1.0


@given(st.sets(st.sampled_from(LAYOUT.heads()), min_size=1, max_size=6), st.integers(1, 60), st.integers(0, 5))
def test_controls_match_layers_and_never_touch_the_heads(heads, draws, seed):
    per_layer = Counter(head.layer for head in heads)
    exclude = [head for head in LAYOUT.heads() if head.head == 7 and head not in heads]
    scores = head_map()
    room = {n: 8 - per_layer[n] - sum(head.layer == n for head in exclude) for n in per_layer}
    if any(room[layer] < count for layer, count in per_layer.items()):
        with pytest.raises(ValueError, match="other heads to draw from"):
            scores.matched_random(heads, draws, exclude=exclude, seed=seed)
        return
    sets = scores.matched_random(heads, draws, exclude=exclude, seed=seed)
    assert sets == scores.matched_random(sorted(heads), draws, exclude=exclude, seed=seed)
    possible = math.prod(math.comb(room[layer], count) for layer, count in per_layer.items())
    assert len(sets) == min(draws, possible)
    assert len({frozenset(control) for control in sets}) == len(sets)
    for control in sets:
        assert Counter(head.layer for head in control) == per_layer
        assert len(set(control)) == len(control)
        assert not set(control) & {*heads, *exclude}


def test_all_subsets_when_there_are_few():
    sets = head_map().matched_random(["3.0", "3.1"])
    assert len(sets) == math.comb(6, 2)
    assert len(head_map().matched_random(["3.0", "2.0", "1.0"])) == 200


def test_seeds_decide_the_draws():
    heads = ["3.0", "2.0", "1.0"]
    assert head_map().matched_random(heads, seed=1) == head_map().matched_random(heads, seed=1)
    assert head_map().matched_random(heads, seed=1) != head_map().matched_random(heads, seed=2)


def test_overlapping_controls_are_never_the_heads_themselves():
    scores = HeadMap({"sink": {}}, Layout.of([4]))
    heads = ["0.0", "0.1", "0.2"]
    with pytest.raises(ValueError, match="layer 0 has 1 other heads to draw from but 3 are needed"):
        scores.matched_random(heads)
    sets = scores.matched_random(heads, overlap=True)
    assert len(sets) == 3 and all(Head(0, 3) in found for found in sets)
    assert len(scores.matched_random(heads, draws=2, overlap=True)) == 2
    with pytest.raises(ValueError, match="the heads fill their layers"):
        scores.matched_random(["0.*"], overlap=True)


def test_controls_from_idle_heads_or_any_layer():
    scores = head_map()
    assert scores.matched_random(["3.0"], idle=["3.4", "0.1", "3.0"]) == [[Head(3, 4)]]
    anywhere = scores.matched_random(["3.0"], by="any", exclude=["0.*"])
    assert len(anywhere) == 31 - 8
    assert {control[0].layer for control in anywhere} == {1, 2, 3}
    with pytest.raises(ValueError, match="0 heads and 200 draws"):
        scores.matched_random([])
    with pytest.raises(ValueError, match=re.escape("layer 3 has 3 other heads to draw from but 5 are needed")):
        scores.matched_random(["3.0-4"])


def test_runs_average_and_count():
    runs = [{Head(0, 0): 0.0, Head(0, 1): 0.5}, {Head(0, 0): 0.2, Head(0, 1): 0.3}, {Head(0, 1): 0.1}]
    scores = HeadMap({}, Layout.of([3]), runs={"retrieval": runs})
    assert scores.of()[Head(0, 1)] == pytest.approx(0.3)
    assert scores.of()[Head(0, 2)] is None
    assert scores.activation_frequency() == {Head(0, 0): 0.5, Head(0, 1): 1.0}
    assert scores.activation_frequency("retrieval", above=0.1)[Head(0, 1)] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no single runs of 'sink'"):
        head_map().activation_frequency("sink")


def test_comparison():
    scores = head_map()
    squared = head_map(sink={head: (score or 0.0) ** 3 for head, score in scores.of().items()})
    reversed_ = head_map(sink={head: -(score or 0.0) for head, score in scores.of().items()})
    assert scores.correlation(squared) == pytest.approx(1)
    assert scores.correlation(reversed_) == pytest.approx(-1)
    assert math.isnan(scores.correlation(head_map(sink=dict.fromkeys(LAYOUT.heads(), 1.0))))
    assert scores.overlap(squared, k=5) == 1
    assert scores.overlap(reversed_, k=5) == 0
    with pytest.raises(ValueError, match="share 1 heads"):
        scores.correlation(head_map(sink={Head(0, 0): 1.0}))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=20))
def test_rank_correlation_with_ties_agrees_with_scipy(pairs):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed; extra 'tasks' brings it")
    layout = Layout.of([len(pairs)])
    left, right = (
        HeadMap({"p": {Head(0, i): float(pair[side]) for i, pair in enumerate(pairs)}}, layout) for side in (0, 1)
    )
    measured = left.correlation(right)
    if len({a for a, _ in pairs}) == 1 or len({b for _, b in pairs}) == 1:
        assert math.isnan(measured)
    else:
        assert measured == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)


def test_the_authors_format_is_read_and_written(tmp_path):
    published = {"0-0": [0.0, 0.0], "0-1": [0.25, 0.0], "1-0": [1.0, 0.75], "1-1": [0.1, 0.1]}
    (tmp_path / "model.json").write_text(json.dumps(published))
    scores = HeadMap.from_retrieval_json(tmp_path / "model.json")
    assert scores.layout == Layout.of([2, 2])
    assert [str(head) for head in scores.select(threshold=0.1)] == ["1.0", "0.1", "1.1"]
    assert scores.of("retrieval")[Head(1, 0)] == 0.875
    assert scores.activation_frequency()[Head(0, 1)] == 0.5
    scores.to_retrieval_json(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == published
    assert HeadMap.read(tmp_path / "model.json").scores == scores.scores
    scores.save(tmp_path / "heads.json")
    assert HeadMap.read(tmp_path / "heads.json").runs == scores.runs
    wider = HeadMap.from_retrieval_json(published, Layout.of([4, 4]))
    assert wider.of()[Head(1, 3)] is None
    HeadMap({"retrieval": {Head(0, 0): 0.5}}, Layout.of([2])).to_retrieval_json(tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text()) == {"0-0": [0.5], "0-1": []}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"0.1": [1.0]}, "'0.1' cannot be read"),
        ({"0-1": 1.0}, "'0-1' cannot be read"),
        ({"0-1": ["a"]}, 'expected {"layer-head": [score of each run, ...]}'),
        ({}, "holds no head"),
    ],
)
def test_files_that_are_not_the_authors_are_refused(tmp_path, document, message):
    (tmp_path / "scores.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=re.escape(message)):
        HeadMap.from_retrieval_json(tmp_path / "scores.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "is no head map"),
        ('{"probes": {}, "towers": [], "schema": 2}', "has schema 2; this headwise reads schema 1"),
        ('{"probes": {}, "towers": [{}], "schema": 1}', "is damaged"),
        ('{"probes": [], "towers": [], "schema": 1}', "is damaged"),
    ],
)
def test_files_that_are_no_map_are_refused(tmp_path, content, message):
    path = tmp_path / "heads.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=re.escape(f"{path}: ") + message):
        HeadMap.load(path)


def test_csv_has_one_line_per_head(tmp_path):
    scores = HeadMap({"sink": {Head(0, 1): 0.5}, "a,b": {Head(0, 2, "vision"): 1.0}}, TOWERS)
    scores.to_csv(tmp_path / "heads.csv")
    rows = list(csv.DictReader((tmp_path / "heads.csv").read_text("utf-8").splitlines()))
    assert len(rows) == 9
    assert rows[1] == {"address": "0.1", "tower": "", "layer": "0", "head": "1", "sink": "0.5", "a,b": ""}
    assert rows[-1]["address"] == "vision:0.2" and rows[-1]["a,b"] == "1.0"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "heads.csv"
    head_map().to_csv(path)
    before = path.read_bytes()

    def half_then_interrupt(file, **_):
        file.write("address,")
        file.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(csv, "writer", half_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        head_map(other={}).to_csv(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written_are_explained(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "heads.json", tmp_path):
        with pytest.raises(InputError, match="cannot be written"):
            head_map().save(path)


def test_notebooks_show_the_strongest_heads_escaped():
    shown = head_map(**{"<b>": {Head(3, 1): 0.5}})._repr_html_()
    assert "3.1" in shown and "&lt;b&gt;" in shown and "<b>" not in shown
