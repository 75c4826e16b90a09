"""Reading corpora: every record with its line, taken up again anywhere, what is malformed; and what repeats itself."""

import gzip
import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.errors import InputError
from headwise.tasks import documents
from headwise.tasks.documents import Corpus, Document, Place, quota, repeated_share, select_documents

RECORDS = [
    {"id": "a", "domain": "x", "text": "Clara met Boris"},
    {"id": 7, "content": "under another name"},
    {"id": True, "domain": 3, "document": "an id that is no name"},
    {"text": "ünïcode ☂ \u2028 and a line's end within"},
]


def write(path: Path, records: list) -> Path:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(source, start: Place | None = None, **fields) -> list[Document]:
    return list(Corpus(str(source), **fields).read(start or Place()))


@pytest.mark.parametrize("name", ["c.jsonl", "c.ndjson", "c.jsonl.gz"])
def test_the_records_of_a_file(tmp_path, name):
    found = read(write(tmp_path / name, RECORDS))
    texts = ["Clara met Boris", "under another name", "an id that is no name", RECORDS[3]["text"]]
    assert [one.text for one in found] == texts
    assert [one.line for one in found] == [1, 2, 3, 4] and {one.file for one in found} == {name}
    assert [one.id for one in found] == ["a", 7, None, None]
    assert [one.domain for one in found] == ["x", None, "3", None]
    assert [one.record for one in found] == RECORDS and all(one.error is None for one in found)


def test_named_fields_are_the_only_ones_read(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"body": "yes", "text": "no", "source": "web", "key": 5}, {"text": "no"}])
    first, second = read(path, text="body", domain="source", id="key")
    assert (first.text, first.domain, first.id) == ("yes", "web", 5)
    assert second.text == "" and second.error == "no text under 'body'"


def test_lines_of_text_and_strings_of_json(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"one\r\n\n  \ntwo words\nlast without an end")
    found = read(tmp_path / "c.txt")
    assert [(one.line, one.text) for one in found] == [(1, "one"), (4, "two words"), (5, "last without an end")]
    assert all(one.record == {} for one in found)
    (tmp_path / "c.jsonl").write_text('"a string"\n')
    (only,) = read(tmp_path / "c.jsonl")
    assert only.text == "a string" and only.record == {"text": "a string"}


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n{"text": "second"}\n')
    assert [one.text for one in read(tmp_path / "c.jsonl")] == ["first", "second"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{not json", "not JSON"),
        (b'{"text": "cut off', "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[1, 2]", "a JSON list, expected an object or a string"),
        (b"null", "a JSON NoneType, expected an object or a string"),
        (b'{"other": 1}', "no text under 'text' or 'content' or 'document'"),
        (b'{"text": null}', "no text under 'text' or 'content' or 'document'"),
        (b"caf\xe9", "not UTF-8 (byte 3)"),
        (b'{"text": "\\ud800"}', "half a surrogate pair in the text"),
    ],
)
def test_a_malformed_record_is_handed_on_and_the_rest_is_read(tmp_path, line, said):
    good = b'{"text": "good"}\n'
    (tmp_path / "c.jsonl").write_bytes(good + line + b"\n" + good)
    found = read(tmp_path / "c.jsonl")
    assert [one.line for one in found] == [1, 2, 3]
    assert [one.error for one in found] == [None, said, None]
    assert [one.text for one in found] == ["good", "", "good"]


def test_a_record_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    """Also over many pieces, at the very bound, and as the last line."""
    monkeypatch.setattr(documents, "LONGEST", 64)
    lines = ["short", "x" * 63, "x" * 64, "y" * 1000, "short again", "z" * 200]
    (tmp_path / "c.txt").write_text("\n".join(lines))
    found = read(tmp_path / "c.txt")
    too_long = "longer than 0 MiB"
    assert [one.error for one in found] == [None, None, too_long, too_long, None, too_long]
    assert [one.text for one in found] == ["short", "x" * 63, "", "", "short again", ""]
    assert [one.line for one in found] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_reading_goes_on_behind_any_record_of_a_folder(tmp_path, ending):
    for number, count in enumerate((3, 1, 4)):
        write(tmp_path / f"{number}{ending}", [{"text": f"{number} {i}"} for i in range(count)])
    whole = read(tmp_path)
    assert len(whole) == 8
    for number, one in enumerate(whole):
        assert read(tmp_path, one.after) == whole[number + 1 :]


def test_a_broken_archive_is_refused_with_its_line(tmp_path):
    write(tmp_path / "c.jsonl.gz", [{"text": str(number) * 50} for number in range(2000)])
    data = (tmp_path / "c.jsonl.gz").read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"c.jsonl.gz cannot be read behind line [0-9]+ \(Compressed file ended"):
        read(tmp_path / "c.jsonl.gz")
    (tmp_path / "c.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot be read behind line 0"):
        read(tmp_path / "c.jsonl.gz")


def test_a_folder_is_read_in_the_order_of_names_and_without_what_is_hidden(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "c.jsonl", [{"text": "third"}])
    write(tmp_path / "a.jsonl", [{"text": "first"}])
    write(tmp_path / "b" / "x.jsonl", [{"text": "second"}])
    write(tmp_path / ".hidden" / "y.jsonl", [{"text": "never"}])
    write(tmp_path / ".z.jsonl", [{"text": "never"}])
    (tmp_path / "picture.png").write_bytes(b"")
    assert [one.text for one in read(tmp_path)] == ["first", "second", "third"]


def test_how_much_lies_behind(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "x" * 50}] * 4)
    write(tmp_path / "b.jsonl", [{"text": "x" * 50}] * 4)
    corpus = Corpus(str(tmp_path))
    shares = [corpus.behind(one.after) for one in corpus.read()]
    assert shares == pytest.approx([number / 8 for number in range(1, 9)])
    assert corpus.size() == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert Corpus("hub:some/name").size() is None and Corpus("hub:some/name").behind(Place()) is None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.jsonl", "there is no file or folder nowhere.jsonl"),
        ("c.csv", "c.csv has an unknown ending"),
        ("empty", "empty holds no documents"),
        ("c.parquet.gz", "unknown ending"),
    ],
)
def test_a_source_that_is_none_is_refused(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("c.csv", "c.parquet.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=said):
        Corpus(source)


@pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed (extra: data)")
def test_parquet_goes_on_behind_any_row(tmp_path):
    import pyarrow
    import pyarrow.parquet as parquet

    records = [{"id": f"d{i}", "domain": "ab"[i % 2], "text": f"text {i}" if i % 5 else None} for i in range(700)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet", row_group_size=90)
    whole = read(tmp_path / "c.parquet")
    assert [one.line for one in whole] == list(range(1, 701)) and [one.id for one in whole[:2]] == ["d0", "d1"]
    assert whole[0].error == "no text under 'text' or 'content' or 'document'" and whole[1].text == "text 1"
    for number in (0, 88, 255, 256, 511, 698, 699):
        assert read(tmp_path / "c.parquet", whole[number].after) == whole[number + 1 :]
    shares = [Corpus(str(tmp_path)).behind(whole[number].after) for number in (349, 699)]
    assert shares == pytest.approx([0.5, 1.0], abs=0.01)
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read(tmp_path / "bad.parquet")


@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed (extra: data)")
def test_a_data_set_is_streamed_and_goes_on_behind_any_record(tmp_path, monkeypatch):
    """As datasets itself loads a folder: the same call that a name of the hub goes to."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    records = [{"id": f"d{i}", "domain": "ab"[i % 2], "text": f"text {i}"} for i in range(40)]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train-1.jsonl", records[:25])
    write(tmp_path / "set" / "train-2.jsonl", records[25:])
    write(tmp_path / "set" / "test.jsonl", [{"text": "held out", "id": "h", "domain": "c"}])
    source = f"hub:{tmp_path / 'set'}"
    whole = read(source)
    assert [(one.id, one.domain, one.text) for one in whole] == [tuple(one.values()) for one in records]
    assert [one.line for one in whole] == list(range(1, 41)) and whole[3].record == records[3]
    for number in (0, 23, 24, 25, 39):
        assert read(source, whole[number].after) == whole[number + 1 :]
    assert [one.text for one in read(f"{source}:test")] == ["held out"]
    assert [one.text for one in read(f"{source}:default:test")] == ["held out"]
    for other, said in ((":nowhere", "nowhere"), (":no-config:train", "no-config")):
        with pytest.raises(InputError, match=f"cannot be read from the hub .*{said}"):
            read(source + other)
    with pytest.raises(InputError, match="cannot be read from the hub"):
        read(f"hub:{tmp_path / 'none'}")


@pytest.mark.skipif(find_spec("datasets") is not None, reason="datasets is installed")
def test_without_datasets_a_data_set_is_refused_in_a_line():
    with pytest.raises(InputError, match=r'datasets is not installed; pip install "headwise\[data\]"'):
        read("hub:some/name")


@pytest.mark.skipif(find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_without_pyarrow_parquet_is_refused_in_a_line(tmp_path):
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r'c.parquet: pyarrow is not installed; pip install "headwise\[data\]"'):
        read(tmp_path / "c.parquet")


def test_repeated_share_counts_runs_that_came_before():
    assert repeated_share([1, 2, 3, 4, 5]) == 0.0
    assert repeated_share([1, 2, 3, 1, 2, 3]) == 1 / 4  # runs 123 231 312 123
    assert repeated_share([7] * 10) == 7 / 8
    assert repeated_share([1, 2]) is None and repeated_share([]) is None
    assert repeated_share([1, 1, 2], n=1) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="n is 0"):
        repeated_share([1, 2], n=0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, math.nan, -1.0, 0.0, 2.0]), st.sampled_from(["a", "b", None]))),
    st.floats(0.01, 1.0),
)
def test_of_each_domain_the_best_and_of_equals_the_first(rows, fraction):
    scores, domains = [score for score, _ in rows], [domain for _, domain in rows]
    kept = select_documents(scores, domains, fraction=fraction)
    for domain in set(domains):
        mine = [
            i for i, one in enumerate(domains) if one == domain and scores[i] is not None and scores[i] == scores[i]
        ]
        taken = [i for i in mine if kept[i]]
        assert len(taken) == quota(len(mine), fraction)
        left = [i for i in mine if not kept[i]]
        assert all((scores[i], -i) > (scores[j], -j) for i in taken for j in left)
    assert not any(bool(kept[i]) for i, one in enumerate(scores) if one is None or one != one)


def test_quotas_and_what_is_refused():
    assert [quota(count, 0.2) for count in (0, 1, 2, 3, 5, 10)] == [0, 0, 0, 1, 1, 2]
    assert quota(3, 0.5) == 2 and quota(3, 1.0) == 3
    assert select_documents(torch.tensor([0.1, 0.3, 0.2]), fraction=0.5).tolist() == [False, True, True]
    with pytest.raises(ValueError, match="fraction is 0"):
        select_documents([0.5], fraction=0.0)
    with pytest.raises(ValueError, match="2 scores but 1 domains"):
        select_documents([0.5, 0.1], ["a"])
