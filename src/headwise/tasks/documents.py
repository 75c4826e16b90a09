"""Corpora of documents, read one by one: JSONL, text, Parquet, data sets of the hub; and choosing the best per domain.

A record that cannot be read is handed on with what is wrong with it, so that whoever counts loses none. A source can be
taken up again at the place behind any record.

Paper: headwise/papers/attention_influence.py (Hua et al., 2025).
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.errors import InputError

__all__ = ["Corpus", "Document", "Place", "repeated_share", "select_documents"]

LINES = (".jsonl", ".ndjson", ".json", ".txt", ".text", ".md")
PARQUET = (".parquet", ".pq")
FIELDS = ("text", "content", "document")
LONGEST = 2**26  # bytes of one record


@dataclass(frozen=True)
class Place:
    """Where reading goes on: the file's number, records (lines, rows) and bytes of it that lie behind."""

    file: int = 0
    line: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Document:
    """One record. line: its line or row in its file, from 1. error: why it has no text, None where it has.

    record: the whole record as it was given (a JSON object), empty for plain text. after: the place behind it.
    """

    text: str
    file: str
    line: int
    after: Place
    error: str | None = None
    id: str | int | None = None
    domain: str | None = None
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Corpus:
    """Documents of a file, of the files of a folder in the order of their names, or of a data set ("hub:NAME").

    source: *.jsonl or *.ndjson (a JSON object or string a line), *.txt (a document a line), both also as *.gz;
        *.parquet (needs ``headwise[data]``); "hub:NAME[:CONFIG][:SPLIT]", streamed. Blank lines are passed over.
    text, domain, id: the fields of a record to read; text None is the first of "text", "content" and "document".
    Raises InputError for a source that is not there or has another ending.
    """

    source: str
    text: str | None = None
    domain: str = "domain"
    id: str = "id"

    def __post_init__(self) -> None:
        if not self.is_hub and not self.files():
            raise InputError(
                f"corpus: {self.source} holds no documents; expected files ending in .jsonl, .txt (or those with .gz) "
                "or .parquet"
            )

    @property
    def is_hub(self) -> bool:
        return self.source.startswith("hub:")

    def files(self) -> list[Path]:
        """The files to read, in order."""
        path = Path(self.source)
        if path.is_dir():
            found = sorted(one for one in path.rglob("*") if one.is_file() and _kind(one))
            return [one for one in found if not any(part.startswith(".") for part in one.relative_to(path).parts)]
        if not path.is_file():
            raise InputError(f"corpus: there is no file or folder {self.source}; a data set of the hub is hub:NAME")
        if not _kind(path):
            raise InputError(
                f"corpus: {path.name} has an unknown ending; expected .jsonl, .ndjson, .txt (also .gz) or .parquet"
            )
        return [path]

    def size(self) -> int | None:
        """Bytes in all, for estimates; None for what is streamed from the hub."""
        return None if self.is_hub else sum(path.stat().st_size for path in self.files())

    def behind(self, place: Place) -> float | None:
        """Share of the corpus that lies behind a place, by bytes; None where it cannot be told."""
        total = self.size()
        if not total:
            return None
        sizes = [path.stat().st_size for path in self.files()]
        return min(1.0, (sum(sizes[: place.file]) + place.offset) / total)

    def read(self, start: Place = Place()) -> Iterator[Document]:
        """Every record from a place on."""
        if self.is_hub:
            yield from self._hub(start)
            return
        for number, path in enumerate(self.files()):
            if number < start.file:
                continue
            place = start if number == start.file else Place(number)
            yield from (self._parquet if path.suffix in PARQUET else self._lines)(path, place)

    def _lines(self, path: Path, start: Place) -> Iterator[Document]:
        zipped, number, line, offset = path.suffix == ".gz", start.file, start.line, start.offset
        plain = path.with_suffix("").suffix if zipped else path.suffix
        with _opened(path) as file:
            if not zipped:
                file.seek(offset)
            else:
                for behind in range(line):
                    _read_line(file, path, behind)
            while True:
                data, length = _read_line(file, path, line)
                if not length:
                    return
                line += 1
                offset = file.tell() if not zipped else _compressed(file)
                after = Place(number, line, offset)
                if data is None:
                    yield Document("", path.name, line, after, f"longer than {LONGEST >> 20} MiB")
                elif data.strip():
                    given = data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data
                    yield self._document(given, path.name, line, after, plain in (".jsonl", ".ndjson", ".json"))

    def _document(self, data: bytes, name: str, line: int, after: Place, is_json: bool) -> Document:
        try:
            characters = data.decode("utf-8")
        except UnicodeDecodeError as error:
            return Document("", name, line, after, f"not UTF-8 (byte {error.start})")
        if not is_json:
            return Document(characters.rstrip("\r\n"), name, line, after)
        try:
            record = json.loads(characters)
        except (ValueError, RecursionError):
            return Document("", name, line, after, "not JSON")
        return self._from_record({"text": record} if isinstance(record, str) else record, name, line, after)

    def _from_record(self, record: Any, name: str, line: int, after: Place) -> Document:
        if not isinstance(record, dict):
            return Document("", name, line, after, f"a JSON {type(record).__name__}, expected an object or a string")
        fields = FIELDS if self.text is None else (self.text,)
        found = next((record[one] for one in fields if one in record), None)
        given = record.get(self.id)
        identity = given if isinstance(given, str | int) and not isinstance(given, bool) else None
        area = record.get(self.domain)
        where: dict[str, Any] = {"id": identity, "domain": None if area is None else str(area)}
        if not isinstance(found, str):
            wanted = f"no text under {' or '.join(map(repr, fields))}"
            return Document("", name, line, after, wanted, record=record, **where)
        try:
            found.encode("utf-8")
        except UnicodeEncodeError:
            return Document("", name, line, after, "half a surrogate pair in the text", record=record, **where)
        return Document(found, name, line, after, record=record, **where)

    def _parquet(self, path: Path, start: Place) -> Iterator[Document]:
        parquet = _extra("pyarrow.parquet", f"corpus: {path.name}")
        try:
            file = parquet.ParquetFile(path)
            rows, size = file.metadata.num_rows, path.stat().st_size
            line = 0
            for batch in file.iter_batches(batch_size=256):
                if line + batch.num_rows <= start.line:
                    line += batch.num_rows
                    continue
                for record in batch.to_pylist():
                    line += 1
                    if line > start.line:
                        after = Place(start.file, line, size * line // max(1, rows))
                        yield self._from_record(record, path.name, line, after)
        except (OSError, ValueError) as error:  # pyarrow's own errors are among them
            raise InputError(f"corpus: {path} cannot be read as Parquet ({error}); write it anew") from None

    def _hub(self, start: Place) -> Iterator[Document]:
        datasets = _extra("datasets", f"corpus: {self.source}")
        name, _, rest = self.source.removeprefix("hub:").partition(":")
        config, _, split = rest.rpartition(":")
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
            rows = rows.skip(start.line) if start.line else rows
            for line, record in enumerate(rows, start.line + 1):
                yield self._from_record(dict(record), name, line, Place(0, line, 0))
        except (OSError, ValueError, ConnectionError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"corpus: {self.source} cannot be read from the hub ({first})") from None


def _kind(path: Path) -> str:
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return name.suffix if name.suffix in (*LINES, *(() if path.suffix == ".gz" else PARQUET)) else ""


def _opened(path: Path) -> BufferedIOBase:
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise InputError(f"corpus: {path} cannot be read ({error.strerror or error}); check the path") from None


def _compressed(file: Any) -> int:
    """Bytes of a gzip file that have been read, of what lies on the disk."""
    return int(file.fileobj.tell())


def _read_line(file: BufferedIOBase, path: Path, behind: int) -> tuple[bytes | None, int]:
    try:
        return _next_line(file)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"corpus: {path} cannot be read behind line {behind} ({error}); write it anew") from None


def _next_line(file: BufferedIOBase) -> tuple[bytes | None, int]:
    """The next line and its length; None for one that is too long to hold, which is passed over."""
    data = file.readline(LONGEST)
    length = len(data)
    if length < LONGEST or data.endswith(b"\n"):
        return data, length
    while more := file.readline(LONGEST):
        length += len(more)
        if more.endswith(b"\n"):
            break
    return None, length


def _extra(module: str, where: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f'{where}: {module.split(".")[0]} is not installed; pip install "headwise[data]"') from None


def repeated_share(ids: Sequence[int], n: int = 3) -> float | None:
    """Share of the runs of n tokens that came before in the same document; None where it has no such run.

    What repeats scores high under attention influence whether it is worth reading or not: boilerplate, lists, copies.
    """
    if n < 1:
        raise ValueError(f"repeated_share: n is {n}; expected at least 1 token")
    runs = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return None if not runs else 1 - len(set(runs)) / len(runs)


def select_documents(
    scores: Float[Tensor, " n"] | Sequence[float | None],
    domains: Sequence[str | None] | None = None,
    *,
    fraction: float = 0.2,
) -> Bool[Tensor, " n"]:
    """Which documents to keep: of each domain the highest `fraction` of those that have a score.

    scores: NaN or None where a document has none; it is never kept. domains: None is one domain. A domain of m scored
    documents keeps round(fraction m), a half rounded up; of equal scores those that came first.
    Raises ValueError for a fraction outside 0 to 1 and lists of different lengths.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"select_documents: fraction is {fraction}; expected more than 0, at most 1, such as 0.2")
    values = [float("nan") if score is None else float(score) for score in _listed(scores)]
    places = [None] * len(values) if domains is None else list(domains)
    if len(places) != len(values):
        raise ValueError(f"select_documents: {len(values)} scores but {len(places)} domains; expected one each")
    members: dict[str | None, list[int]] = {}
    for number, (value, place) in enumerate(zip(values, places, strict=True)):
        if value == value:
            members.setdefault(place, []).append(number)
    kept = torch.zeros(len(values), dtype=torch.bool)
    for numbers in members.values():
        best = sorted(numbers, key=lambda number: -values[number])  # stable: of equals the first comes first
        kept[best[: quota(len(numbers), fraction)]] = True
    return kept


def quota(count: int, fraction: float) -> int:
    """How many of `count` documents a domain keeps."""
    return min(count, int(fraction * count + 0.5))


def _listed(scores: Tensor | Iterable[float | None]) -> Iterable[float | None]:
    return scores.tolist() if isinstance(scores, Tensor) else scores
