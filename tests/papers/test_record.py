"""The catalogue: all papers, read without running them, with statuses that follow from what is there."""

import subprocess
import sys
from pathlib import Path

import pytest

from headwise.cli import run
from headwise.errors import InputError
from headwise.papers import record, recorded
from headwise.papers.record import AREAS, find_paper, papers_known, read_record, record_files

PAPERS = papers_known()


def test_there_are_51_papers_with_titles_of_their_own():
    assert len(PAPERS) == 51
    assert len({paper.title for paper in PAPERS}) == 51
    assert len({paper.arxiv for paper in PAPERS if paper.arxiv}) == sum(paper.arxiv is not None for paper in PAPERS)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.slug)
def test_a_record_is_complete(paper: record.Paper):
    assert paper.area in AREAS
    assert 2015 <= paper.year <= 2030
    assert paper.authors
    assert paper.title.strip() == paper.title
    ids = [row.id for row in paper.claims]
    assert len(set(ids)) == len(ids)
    for row in paper.claims:
        assert row.kind in ("claim", "check", "untestable")
        assert row.criterion
        if row.kind == "claim":
            assert row.control, f"{row.id}: a claim needs a control beside it"
        if row.kind == "untestable":
            assert row.known is None, f"{row.id}: why it is untestable stands in its criterion"


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.slug)
def test_a_status_is_what_is_there(paper: record.Paper):
    status = recorded.status_of(paper)
    run = recorded.recorded_run(paper.slug)
    if not record_files()[paper.slug].has_run:
        assert status != "works"
        assert paper.missing
    if status == "works":
        assert run is not None
        assert not recorded.stale_files(record_files()[paper.slug], run), "run `headwise reproduce --seeds 3` again"
        assert len(run["seeds"]) >= 3
    if record_files()[paper.slug].has_run:
        recorded.own_files(record_files()[paper.slug])  # its modules and specimens are there
    for row in paper.claims:
        if row.known:
            assert recorded.known_reason(paper, row.id, run), f"{row.id}: known, but no recorded run shows it"


def test_the_catalogue_answers_without_torch():
    code = "import sys, headwise; n = len(headwise.catalogue()); print(n, {'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "51 set()"


def test_documents_have_the_promised_keys():
    for document in recorded.catalogue():
        assert set(document) >= {"slug", "title", "year", "area", "module", "claims", "status"}
        assert document["status"] in ("works", "partial", "planned")
        assert (document["status"] == "works") == (not document["missing"])


def test_underscores_and_hyphens_are_alike():
    assert find_paper("zero_tuning") is find_paper("Zero-Tuning")
    assert [d["slug"] for d in recorded.catalogue("zero_tuning")] == ["zero-tuning"]


def test_an_unknown_slug_names_the_nearest():
    with pytest.raises(InputError, match=r"'retreival-heads' is not in the catalogue; did you mean retrieval-heads\?"):
        find_paper("retreival-heads")


def test_a_record_must_be_literal(tmp_path: Path):
    path = tmp_path / "some_paper.py"
    path.write_text("year = 2024\nPAPER = Paper(slug='some-paper', title='T', authors='A', year=year, area='heads')\n")
    with pytest.raises(ValueError, match=r"line 2: a record is read unrun; write a plain literal"):
        read_record(path)
    path.write_text("PAPER = Paper(slug='other', title='T', authors='A', year=2024, area='heads')\n")
    with pytest.raises(ValueError, match="slug is the file's name"):
        read_record(path)
    path.write_text("VALUE = 1\n")
    assert read_record(path) is None


def test_what_was_changed_after_a_look_is_shown(capsys):
    assert run(["papers", "gaussian-adaptive-attention"]) == 0
    assert "changed  outliers are drawn independently" in capsys.readouterr().out
    (shown,) = recorded.catalogue("gaussian-adaptive-attention")
    assert shown["changed"] == find_paper("gaussian-adaptive-attention").changed
