"""The files of a scoring job: written so that a kill at any moment costs at most the window at work.

Rows go to one file, PART.partial, and are flushed to the disk window by window; then the job's own file says how many
bytes of it count. A job taken up again cuts the rest off and goes on behind the last window, so nothing is lost or
doubled and the bytes are those of a job that was never stopped. A part gets its name when it is complete.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headwise._files import atomic_path, read_json, write_text
from headwise.errors import InputError
from headwise.tasks.documents import Corpus, Place

__all__ = ["Job", "State", "fingerprint", "read_rows"]

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
# Name -> Arrow type of every column; JSONL rows hold the same names in this order.
COLUMNS = {
    "number": "int64", "file": "string", "line": "int64", "id": "string", "domain": "string", "score": "float64",
    "base_loss": "float64", "masked_loss": "float64", "tokens": "int64", "windows": "int64", "repetition": "float64",
    "flag": "string", "error": "string",
}  # fmt: skip


@dataclass
class State:
    """How far a job is: what its files hold, and the running figures of its summary."""

    documents: int = 0
    windows: int = 0
    part: int = 0
    part_documents: int = 0
    part_bytes: int = 0
    closing: bool = False
    done: bool = False
    place: Place = field(default_factory=Place)
    flags: dict[str, int] = field(default_factory=dict)
    malformed: list[str] = field(default_factory=list)  # where the first of them stand
    tokens: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "State":
        return cls(**{**document, "place": Place(**document["place"])})


class Job:
    """The output of one job. out: a file (.jsonl, .parquet), or a folder of parts of `part_documents` rows each.

    header: what decides the rows; a job that is there already must have the same. Use as a context manager: one process
    at a time writes.
    """

    def __init__(self, out: str | os.PathLike[str], header: Mapping[str, Any], kind: str, part_documents: int) -> None:
        self.out, self.header, self.kind, self.part_documents = Path(out), dict(header), kind, part_documents
        self.single = self.out.suffix in KINDS
        self.path = self.out.with_name(f"{self.out.name}.job.json") if self.single else self.out / "job.json"
        self.state = State()
        self._file: Any = None

    @staticmethod
    def kind_of(out: str | os.PathLike[str], wanted: str | None) -> str:
        """jsonl or parquet, by the file's ending or as `wanted`. Raises InputError for another ending."""
        ending = Path(out).suffix
        if ending in KINDS:
            if wanted not in (None, KINDS[ending]):
                raise InputError(f"format: {wanted} does not suit {Path(out).name}; leave it out")
            return KINDS[ending]
        if ending:
            raise InputError(f"out: {Path(out).name} has an unknown ending; give .jsonl, .parquet, or a folder")
        if wanted not in (None, "jsonl", "parquet"):
            raise InputError(f"format: {wanted!r} is unknown; choose jsonl or parquet")
        return wanted or "jsonl"

    @staticmethod
    def recorded(out: str | os.PathLike[str]) -> dict[str, Any] | None:
        """The header of the job that is there, None where none is."""
        path = Path(out)
        place = path.with_name(f"{path.name}.job.json") if path.suffix in KINDS else path / "job.json"
        return read_json(place)["header"] if place.is_file() else None

    def part_path(self, number: int) -> Path:
        return self.out if self.single else self.out / f"part-{number:05d}.{self.kind}"

    @property
    def partial(self) -> Path:
        name = f"{self.part_path(self.state.part).name}.partial"
        return self.out.with_name(name) if self.single else self.out / name

    def __enter__(self) -> "Job":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self.path.with_name(f".{self.path.name}.lock").open("a")
        except OSError as error:
            raise InputError(f"out: {self.out} cannot be written ({error.strerror or error})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(f"out: another job is writing {self.out}; wait for it, or choose another place") from None
        try:
            self._take_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.state.done:
            Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()

    def _take_up(self) -> None:
        if not self.path.is_file():
            if self.single and self.out.exists():
                raise InputError(f"out: {self.out} is there and no job of headwise wrote it; choose another place")
            self._save()
        else:
            found = read_json(self.path)
            if found["header"] != self.header:
                changed = [key for key in self.header if found["header"].get(key) != self.header[key]]
                raise InputError(
                    f"out: {self.out} holds a job with other options ({', '.join(changed) or 'of another version'}); "
                    "give the same to go on with it, or choose another --out"
                )
            self.state = State.of(found["state"])
        if self.state.closing:
            self._close_part()
        if not self.state.done:
            self._open()

    def _open(self) -> None:
        self._file = self.partial.open("ab")
        if self._file.tell() < self.state.part_bytes:
            raise InputError(f"out: {self.partial} is shorter than its job says; it was changed, start anew elsewhere")
        self._file.truncate(self.state.part_bytes)

    def append(self, rows: list[str], place: Place) -> None:
        """Write the rows of one window; when this returns they are there for good."""
        self._file.write("".join(f"{row}\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        state = self.state
        state.part_bytes = self._file.tell()
        state.documents += len(rows)
        state.part_documents += len(rows)
        state.windows += 1
        state.place = place
        state.closing = not self.single and state.part_documents >= self.part_documents
        self._save()
        if state.closing:
            self._close_part()
            self._open()

    def finish(self) -> None:
        """Name the last part; the job is done."""
        if self.state.part_documents or self.single or not self.state.part:
            self.state.closing = True
            self._save()
            self._close_part()
        else:
            self._file.close()
            self._file = None
            self.partial.unlink()
        self.state.done = True
        self._save()

    def _close_part(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        target = self.part_path(self.state.part)
        if self.partial.is_file():  # else the kill came after the part had its name
            with self.partial.open("r+b") as file:
                file.truncate(self.state.part_bytes)
            if self.kind == "jsonl":
                os.replace(self.partial, target)
            else:
                with atomic_path(target) as temporary:
                    _to_parquet(self.partial, temporary)
                self.partial.unlink()
        state = self.state
        state.closing, state.part_bytes, state.part_documents = False, 0, 0
        state.part += 1
        state.done = self.single
        self._save()

    def _save(self) -> None:
        document = {"header": self.header, "state": asdict(self.state)}
        write_text(self.path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def fingerprint(corpus: Corpus) -> dict[str, Any]:
    """What a corpus is, wherever it lies: names and sizes of its files and what they begin and end with."""
    if corpus.is_hub:
        return {"source": corpus.source}
    digest, files = hashlib.sha256(), corpus.files()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**16))
            file.seek(max(0, size - 2**16))
            digest.update(file.read())
    return {"files": len(files), "bytes": corpus.size(), "sha256": digest.hexdigest()}


def _to_parquet(source: Path, target: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in COLUMNS.items()])
    with pyarrow.parquet.ParquetWriter(target, schema) as writer, source.open(encoding="utf-8") as lines:
        block: list[dict[str, Any]] = []
        for line in lines:
            row = json.loads(line)
            block.append({**row, "id": None if row["id"] is None else str(row["id"])})
            if len(block) == 8192:
                writer.write_table(pyarrow.Table.from_pylist(block, schema))
                block = []
        writer.write_table(pyarrow.Table.from_pylist(block, schema))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"scores: {path} cannot be read ({error}); give what `headwise score` wrote") from None


def read_rows(source: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows that a job wrote, one by one. Raises InputError for another file and for a job that is not done."""
    path = Path(source)
    place = path / "job.json" if path.is_dir() else path.with_name(f"{path.name}.job.json")
    if place.is_file() and not read_json(place)["state"]["done"]:
        raise InputError(f"scores: the job of {path} is not done; run the same headwise score again to finish it")
    files = [path] if path.is_file() else sorted(one for one in path.glob("part-*") if one.suffix in KINDS)
    if not files:
        raise InputError(f"scores: {path} holds no scores; give what `headwise score` wrote")
    for file in files:
        with _readable(file):
            yield from _rows_of(file)


def _rows_of(file: Path) -> Iterator[dict[str, Any]]:
    if KINDS.get(file.suffix) == "parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise InputError('scores: pyarrow is not installed; pip install "headwise[data]"') from None
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=4096):
            yield from batch.to_pylist()
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if not isinstance(row, dict) or "score" not in row:
                raise ValueError("a row has no score")
            yield row
