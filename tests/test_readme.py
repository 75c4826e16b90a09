"""The README tells the truth: its table is generated, its snippets run, its commands exist."""

import re

import pytest
from tests.readme import README, rewritten

from headwise.papers.recorded import catalogue

TEXT = README.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_table_of_papers_is_up_to_date():
    assert rewritten(TEXT) == TEXT, "run `make readme`"


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.strip().splitlines()[-1].strip()[:40])
def test_snippets_run(snippet: str, capsys: pytest.CaptureFixture[str]):
    exec(compile(snippet, str(README), "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip(), "a snippet shows something"


def test_the_commands_are_those_that_exist():
    from typer.main import get_command

    from headwise.cli import app

    told = set(re.findall(r"^\| `headwise (\w+)", TEXT, re.MULTILINE))
    there = set(get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
    assert told == there


def test_a_working_paper_is_in_the_table():
    for paper in catalogue():
        assert (f"`{paper['slug']}`" in TEXT) == (paper["status"] == "works")
