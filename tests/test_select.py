"""Keeping the best: the documents of `select_documents`, in constant memory, and what is refused."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise import _select
from headwise.api import keep_best
from headwise.cli import run
from headwise.errors import InputError
from headwise.tasks.documents import select_documents


def write_scores(path: Path, scores: list, domains: list) -> Path:
    rows = [
        {
            "number": number,
            "file": "corpus.jsonl",
            "line": number + 1,
            "id": f"d{number}",
            "domain": domain,
            "score": one,
        }
        for number, (one, domain) in enumerate(zip(scores, domains, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_corpus(path: Path, domains: list) -> Path:
    records = [{"id": f"d{i}", "domain": domain, "text": f"text {i}", "more": i} for i, domain in enumerate(domains)]
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def kept_numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


SCORES = st.sampled_from([None, -1.0, -0.5, 0.0, 0.25, 0.25000001, 3.0])  # many ties


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(SCORES, st.sampled_from(["a", "b", "c", None])), max_size=60),
    st.floats(0.01, 1.0),
    st.sampled_from([1, 3, 2**16]),
)
def test_it_keeps_the_documents_that_select_documents_says(tmp_path_factory, rows, fraction, held):
    """Whatever the ties, domains and the size of the pieces; equal scores: those that came first."""
    folder = tmp_path_factory.mktemp("select")
    scores, domains = [score for score, _ in rows], [domain for _, domain in rows]
    path = write_scores(folder / "s.jsonl", scores, domains)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_select, "HELD", held)
        found = keep_best(path, out=folder / "kept.jsonl", fraction=fraction)
    wanted = select_documents(scores, domains, fraction=fraction).nonzero().flatten().tolist()
    assert kept_numbers(folder / "kept.jsonl") == wanted
    assert found["documents"] == len(rows) and found["kept"] == len(wanted)
    assert found["scored"] == sum(score is not None for score in scores)
    for one in found["domains"]:
        mine = [score for score, domain in rows if domain == one["domain"] and score is not None]
        assert one["scored"] == len(mine)
        assert one["least"] == (sorted(mine, reverse=True)[one["kept"] - 1] if one["kept"] else None)
    assert [path.name for path in folder.iterdir() if path.name not in ("s.jsonl", "kept.jsonl")] == []


MEASURED = """
import sys, tracemalloc
from headwise import _select
_select.HELD = 256
tracemalloc.start()
kept = _select.keep_best(sys.argv[1], out=sys.argv[2])["kept"]
print(kept, tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_documents(tmp_path):
    """What Python and numpy hold at most, in a process where nothing else runs; mapped files are no part of it."""
    rng, peaks = random.Random(0), []
    for count in (1_000, 12_000):
        path = write_scores(
            tmp_path / f"{count}.jsonl", [rng.random() for _ in range(count)], [rng.choice("abc") for _ in range(count)]
        )
        command = [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "kept.jsonl")]
        kept, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        peaks.append(int(peak))
        assert int(kept) == pytest.approx(count / 5, abs=2)
    assert peaks[1] < peaks[0] + 60_000, f"bytes at 1,000 and 12,000 documents: {peaks}"


def test_the_records_of_the_corpus_are_written_whole(tmp_path, capsys):
    domains = ["ab"[number % 2] for number in range(20)]
    scores = [float(number % 7) for number in range(20)]
    path, corpus = write_scores(tmp_path / "s.jsonl", scores, domains), write_corpus(tmp_path / "corpus.jsonl", domains)
    arguments = ["select", str(path), "--out", str(tmp_path / "kept.jsonl"), "--fraction", "0.3", "--corpus"]
    assert run([*arguments, str(corpus), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [(one["domain"], one["kept"], one["least"]) for one in found["domains"]] == [("a", 3, 4.0), ("b", 3, 5.0)]
    for one in kept:
        assert one == {
            "id": f"d{one['more']}", "domain": domains[one["more"]], "text": f"text {one['more']}", "more": one["more"],
            "attention_influence": scores[one["more"]],
        }  # fmt: skip
    assert [one["more"] for one in kept] == select_documents(scores, domains, fraction=0.3).nonzero().flatten().tolist()
    assert run(arguments[:-1]) == 0
    assert "6 of 20 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scores": "no.jsonl"}, "holds no scores"),
        ({"fraction": 0.0}, "fraction: 0"),
        ({"fraction": 1.5}, "fraction: 1.5"),
        ({"out": "k.csv"}, "must end in .jsonl"),
        ({"scores": "corpus.jsonl"}, "a row has no score"),
        ({"scores": "words.jsonl"}, "'high' is no score"),
        ({"corpus": "longer.jsonl"}, "longer.jsonl, line 1 is not in the scores"),
        ({"corpus": "short/corpus.jsonl"}, "more scores than documents"),
        ({"out": "s.jsonl"}, "is the file of the scores"),
        ({"out": "corpus.jsonl", "corpus": "corpus.jsonl"}, "is the file of the corpus"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").mkdir()
    write_scores(tmp_path / "s.jsonl", [0.5, 0.1, None, 0.3], ["a"] * 4)
    write_scores(tmp_path / "words.jsonl", ["high", 0.1], ["a"] * 2)
    write_corpus(tmp_path / "corpus.jsonl", ["a"] * 4)
    write_corpus(tmp_path / "short" / "corpus.jsonl", ["a"] * 3)
    write_corpus(tmp_path / "longer.jsonl", ["a"] * 5)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    options = {"scores": "s.jsonl", "out": "k.jsonl", "fraction": 0.5, **change}
    with pytest.raises(InputError, match=said):
        keep_best(options.pop("scores"), **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_documents_without_a_domain_or_a_score(tmp_path):
    path = write_scores(tmp_path / "s.jsonl", [None, float("nan"), 0.5], [None, None, None])
    found = keep_best(path, out=tmp_path / "k.jsonl", fraction=1.0)
    assert kept_numbers(tmp_path / "k.jsonl") == [2] and found["scored"] == 1 and found["documents"] == 3
    path = write_scores(tmp_path / "none.jsonl", [None, None], ["a", "b"])
    found = keep_best(path, out=tmp_path / "k.jsonl")
    assert found["kept"] == 0 and found["domains"] == [] and (tmp_path / "k.jsonl").read_text() == ""
