"""The scoring job: killed and taken up again, malformed records, memory, formats; and keeping its best."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.folders import save_model, small_tokenizer

import headwise
from headwise._score import Stage, Window, _pieces, windows
from headwise._score_job import Job, read_rows
from headwise.attend.addresses import Head
from headwise.cli import run
from headwise.errors import InputError
from headwise.heads.influence import attention_influence
from headwise.hf.load import load
from headwise.tasks.documents import Corpus, Document, Place, repeated_share

WORDS = ["Clara", "Marsh", "met", "Boris", "Keller", "and", "laughed", "at", "the", "river", "with", "a", "book"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(save_model("llama", tmp_path_factory.mktemp("model") / "llama", small_tokenizer()))


def write_corpus(path: Path, count: int, seed: int = 0, most: int = 30) -> Path:
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(2, most)))
            file.write(json.dumps({"id": f"d{number}", "domain": "ab"[number % 2], "text": text}) + "\n")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", 60)


def score(corpus, model, out, **options):
    given = {"heads": "1.0,0.1", "window": 16, **options}
    return headwise.score_corpus(corpus, model, out=out, **given)


def rows_of(path) -> list[dict]:
    return list(read_rows(path))


def bytes_of(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_document_once_in_order_with_the_score_of_the_definition(corpus, model, tmp_path):
    found = score(corpus, model, tmp_path / "out.jsonl")
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [f"d{number}" for number in range(60)]
    assert [row["number"] for row in rows] == list(range(60)) and [row["line"] for row in rows] == list(range(1, 61))
    assert found["documents"] == found["scored"] == 60 and found["flags"] == {}
    loaded = load(model)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    short = [pair for pair in zip(rows, texts, strict=True) if pair[0]["windows"] == 1]
    for row, text in short[:5]:
        ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
        one = attention_influence(loaded.model, [ids], ["1.0", "0.1"], implementation="reference")
        assert row["score"] == pytest.approx(float(one.scores), rel=1e-3, abs=2e-6)
        assert row["base_loss"] == pytest.approx(float(one.base), rel=1e-5)
        assert row["base_loss"] == float(f"{row['base_loss']:.6g}"), "six significant digits"
        assert row["tokens"] == len(ids) - 1
    header = json.loads((tmp_path / "out.jsonl.job.json").read_text())["header"]
    assert header["threads"] == torch.get_num_threads() and header["heads"] == ["0.1", "1.0"]
    assert header["mode"] == "uniform" and header["stride"] == header["context"] - 1


class Stopped(Exception):
    pass


@pytest.mark.parametrize("out", ["out.jsonl", "parts"])
def test_stopped_anywhere_in_its_files_it_ends_with_the_same_bytes(corpus, model, tmp_path, monkeypatch, out):
    """Every write of the job fails once, before and after it happens: each a moment at which a kill could come."""
    options = {"part_documents": 32, "window": 8}
    (tmp_path / "whole").mkdir()
    score(corpus, model, tmp_path / "whole" / out, **options)
    expected = bytes_of(tmp_path / "whole")
    assert len(expected) == (2 if out == "out.jsonl" else 3)
    moments = 0
    for late in (False, True):
        for at in range(1, 200):
            folder = tmp_path / f"{late}-{at}"
            folder.mkdir()
            calls, replace = [0], os.replace

            def stop(*args, calls=calls, at=at, late=late, replace=replace):
                calls[0] += 1
                if calls[0] == at and not late:
                    raise Stopped
                replace(*args)
                if calls[0] == at:
                    raise Stopped

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", stop)
                try:
                    score(corpus, model, folder / out, **options)
                    break
                except Stopped:
                    moments += 1
            if at % 4 == 0:  # and a half-written window behind what the job's file says
                for partial in folder.rglob("*.partial"):
                    with partial.open("ab") as file:
                        file.write(b'{"number": 99, "sco')
            score(corpus, model, folder / out, **options)
            assert bytes_of(folder) == expected, (late, at)
    assert moments >= 16


# Each run is a process of its own, forked from one that has imported everything; all but the last are killed.
KILLED = """
import os, pathlib, random, signal, sys, time
import torch
import headwise.cli
import headwise.commands.score
torch.set_num_threads(1)
headwise.load(sys.argv[3])  # imported once, for all that are forked
folder, corpus, model, kills = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3], 10
arguments = ["--model", model, "--heads", "1.0", "--window", "8", "--batch-tokens", "512", "--json"]

def start(name):
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os._exit(headwise.cli.run(["score", corpus, "--out", str(folder / name / "s.jsonl"), *arguments]))

assert os.waitpid(start("whole"), 0)[1] == 0
size, partial = (folder / "whole" / "s.jsonl").stat().st_size, folder / "killed" / "s.jsonl.partial"
rng, killed = random.Random(1), 0
for number in range(kills):
    wanted = size * (number + rng.random()) / kills * 0.95
    child = start("killed")
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if partial.exists() and partial.stat().st_size >= wanted:
            time.sleep(rng.random() * 0.02)
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            break
        time.sleep(0.001)
assert os.waitpid(start("killed"), 0)[1] == 0
print(killed)
"""


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(model, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 800)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(corpus), model]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    assert int(done.stdout) == 10
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    assert [row["number"] for row in rows_of(tmp_path / "killed" / "s.jsonl")] == list(range(800))


@pytest.mark.slow
def test_interrupted_it_says_130_and_can_go_on(model, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 1500)
    arguments = ["score", str(corpus), "--out", str(tmp_path / "s.jsonl"), "--model", model, "--heads", "1.0"]
    command = [sys.executable, "-m", "headwise", *arguments, "--window", "16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / "s.jsonl.partial").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.decode().splitlines()[-1] == "headwise: interrupted"
    assert not (tmp_path / "s.jsonl").exists(), "a file has its name only when it is complete"
    assert run([*arguments, "--window", "16"]) == 0
    assert len(rows_of(tmp_path / "s.jsonl")) == 1500


def test_a_malformed_record_is_counted_with_its_line_and_the_job_goes_on(model, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    good = b'{"text": "Clara Marsh met Boris Keller"}\n'
    bad = [b"{not json\n", b"[1, 2]\n", b'{"other": "x"}\n', b'{"text": 5}\n', b"\xff\xfe\n", b'{"text": "\\ud800"}\n']
    path.write_bytes(good + b"".join(bad) + b"\n" + good + b'{"text": "x"')  # a blank line, and one cut off
    assert run(["score", str(path), "--out", str(tmp_path / "o.jsonl"), "--model", model, "--heads", "1.0"]) == 0
    out = capsys.readouterr().out
    rows = rows_of(tmp_path / "o.jsonl")
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 9, 10]
    assert [row["flag"] for row in rows] == [None, *["malformed"] * 6, None, "malformed"]
    assert rows[0]["score"] == rows[7]["score"] is not None
    assert "malformed: 7" in out and "bad.jsonl, line 2: not JSON" in out and "line 10: not JSON" in out
    assert rows[4]["error"] == "no text under 'text' or 'content' or 'document'"


def test_short_documents_have_a_flag(model, tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": ""}\n{"text": "Clara Marsh met Boris"}\n"Boris Keller laughed"\n')
    rows = score(path, model, tmp_path / "o.jsonl") and rows_of(tmp_path / "o.jsonl")
    assert [row["flag"] for row in rows] == ["short", None, None] and rows[0]["score"] is None


def test_other_options_do_not_go_on(corpus, model, tmp_path):
    score(corpus, model, tmp_path / "o.jsonl")
    again = score(corpus, model, tmp_path / "o.jsonl")  # done: nothing to do, the same summary
    assert again["documents"] == 60
    with pytest.raises(InputError, match=r"other options \(heads\)"):
        score(corpus, model, tmp_path / "o.jsonl", heads="1.1")
    with pytest.raises(InputError, match=r"other options \(window\)"):
        score(corpus, model, tmp_path / "o.jsonl", window=8)
    write_corpus(corpus, 60, seed=5)
    with pytest.raises(InputError, match=r"other options \(corpus\)"):
        score(corpus, model, tmp_path / "o.jsonl")
    (tmp_path / "mine.jsonl").write_text("my own\n")
    with pytest.raises(InputError, match="no job of headwise wrote it"):
        score(corpus, model, tmp_path / "mine.jsonl")


def test_one_job_at_a_time(corpus, model, tmp_path):
    with Job(tmp_path / "o.jsonl", {"a": 1}, "jsonl", 8), pytest.raises(InputError, match="another job"):
        score(corpus, model, tmp_path / "o.jsonl")


def test_a_job_goes_on_with_the_threads_it_began_with(corpus, model, tmp_path, monkeypatch):
    monkeypatch.setattr("headwise._score._count", lambda state, row: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        score(corpus, model, tmp_path / "o.jsonl")
    monkeypatch.undo()
    path = tmp_path / "o.jsonl.job.json"
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 2'))
    seen = []
    call = Stage.__call__
    monkeypatch.setattr(Stage, "__call__", lambda self, one: seen.append(torch.get_num_threads()) or call(self, one))
    assert score(corpus, model, tmp_path / "o.jsonl")["header"]["threads"] == 2
    assert set(seen) == {2} and torch.get_num_threads() == 1


def test_windows_are_fixed_pieces_of_the_corpus(corpus, monkeypatch):
    source = Corpus(str(corpus))
    whole = list(windows(source, Place(), 0, 16))
    assert [len(one.documents) for one in whole] == [16, 16, 16, 12]
    for number, one in enumerate(whole[:-1], 1):
        rest = list(windows(source, one.after, 16 * number, 16))
        assert [d.text for w in rest for d in w.documents] == [d.text for w in whole[number:] for d in w.documents]
        assert rest[0].number == 16 * number
    monkeypatch.setattr("headwise._score.CHARACTERS", 300)
    early = list(windows(source, Place(), 0, 16))
    assert len(early) > 4 and sum(len(one.documents) for one in early) == 60


@pytest.mark.parametrize(("length", "room", "stride"), [(5, 8, 8), (20, 8, 8), (20, 8, 3), (9, 8, 1), (16, 8, 8)])
def test_windows_of_a_long_document_count_every_token_once(length, room, stride):
    found = _pieces(length, room, stride)
    counted = [token for low, high, seen in found for token in range(low + seen, high)]
    assert counted == list(range(length)) and all(high - low <= room for low, high, _ in found)


def test_long_documents_are_weighted_by_tokens(model):
    loaded = load(model)
    text = " ".join(random.Random(3).choice(WORDS) for _ in range(90))
    heads = [Head(1, 0)]
    stage = Stage(loaded.model, loaded.tokenizer, heads, "uniform", 0, 33, 32, 4096)
    (row,) = stage(Window(0, [Document(text, "f", 1, Place())]))
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = [[loaded.tokenizer.bos_token_id, *ids[low : low + 32]] for low in range(0, len(ids), 32)]
    one = attention_influence(loaded.model, parts, heads)
    assert row["windows"] == len(parts) and row["tokens"] == int(one.tokens.sum()) == len(ids)
    assert row["base_loss"] == pytest.approx(float((one.base * one.tokens).sum() / one.tokens.sum()), rel=1e-5)
    overlapping = Stage(loaded.model, loaded.tokenizer, heads, "uniform", 0, 33, 16, 4096)
    (other,) = overlapping(Window(0, [Document(text, "f", 1, Place())]))
    assert other["tokens"] == len(ids) and other["windows"] > row["windows"]


@pytest.mark.parametrize("prefix", [1, 5, 40, 500])
def test_tokens_of_the_prefix_do_not_count_in_whichever_window_they_lie(model, prefix):
    """By hand: losses token by token of each window, those of the first `prefix` tokens of the document left out."""
    loaded = load(model)
    text = " ".join(random.Random(3).choice(WORDS) for _ in range(60))
    ids, bos = loaded.tokenizer(text, add_special_tokens=False)["input_ids"], loaded.tokenizer.bos_token_id
    stage = Stage(loaded.model, loaded.tokenizer, [Head(1, 0)], "uniform", prefix, 33, 32, 4096)
    (row,) = stage(Window(0, [Document(text, "f", 1, Place())]))
    losses = []
    for low in range(0, len(ids), 32):
        part = torch.tensor([[bos, *ids[low : low + 32]]])
        with torch.no_grad():
            logits = loaded.model(input_ids=part).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none").tolist()
    assert len(losses) == len(ids) and row["tokens"] == max(0, len(ids) - prefix)
    if prefix >= len(ids):
        assert row["flag"] == "short" and row["score"] is None
    else:
        assert row["base_loss"] == pytest.approx(sum(losses[prefix:]) / len(losses[prefix:]), rel=1e-5)


def test_a_document_without_loss_has_a_flag_and_no_score(model):
    """A model that is certain of the same token again: dividing by its loss would make any noise a score."""
    loaded = load(model)
    llama: Any = loaded.model
    weight = llama.get_input_embeddings().weight
    with torch.no_grad():
        llama.set_output_embeddings(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        llama.lm_head.weight.copy_(1e3 * torch.nn.functional.normalize(weight, dim=-1))
    texts = [" ".join(["a"] * 9), "Clara Marsh met Boris"]
    assert len(set(loaded.tokenizer(texts[0], add_special_tokens=False)["input_ids"][1:])) == 1
    stage = Stage(loaded.model, loaded.tokenizer, [Head(1, 0)], "uniform", 2, 96, 95, 4096)
    certain, other = stage(Window(0, [Document(text, "f", 1 + i, Place()) for i, text in enumerate(texts)]))
    assert certain["flag"] == "no-loss" and certain["score"] is None and certain["base_loss"] < 1e-6
    assert other["flag"] is None and other["score"] is not None


def test_repetition_stands_beside_the_score(model):
    loaded = load(model)
    stage = Stage(loaded.model, loaded.tokenizer, [Head(1, 0)], "uniform", 0, 96, 95, 4096)
    texts = ["Clara Marsh met Boris Keller and laughed", " ".join(["Clara Marsh met Boris"] * 4), "Clara"]
    plain, repeated, short = stage(Window(0, [Document(text, "f", 1, Place()) for text in texts]))
    ids = loaded.tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    assert repeated["repetition"] == pytest.approx(repeated_share(ids), rel=1e-5)
    assert repeated["repetition"] > 0.5 > plain["repetition"]
    assert short["repetition"] is None or short["tokens"] > 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jsonl", "--out", "o.jsonl"], "there is no file or folder nowhere.jsonl"),
        (["{corpus}", "--out", "o.csv"], "o.csv has an unknown ending"),
        (["{corpus}", "--out", "o.jsonl", "--mode", "mean"], "mode: 'mean' is unknown"),
        (["{corpus}", "--out", "o.jsonl", "--engine", "spark"], "engine: 'spark' is unknown"),
        (["{corpus}", "--out", "o.jsonl", "--stride", "0"], "stride: 0; expected 1 to 95"),
        (["{corpus}", "--out", "o.jsonl", "--context", "500"], "context: 500 tokens"),
        (["{corpus}", "--out", "o.jsonl", "--heads", "9.9"], "9"),
        (["{corpus}", "--out", "o.jsonl", "--heads", ""], "heads"),
        (["{corpus}", "--out", "o.jsonl", "--prefix", "-1"], "prefix: -1"),
        (["{corpus}", "--out", "o.jsonl", "--window", "0"], "window: 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(corpus, model, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    given = [part.format(corpus=corpus) for part in arguments]
    heads = [] if "--heads" in given else ["--heads", "1.0"]
    assert run(["score", *given, "--model", model, *heads, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len([line for line in err.splitlines() if line]) == 1


def test_the_document_of_the_command(corpus, model, tmp_path, capsys):
    arguments = ["score", str(corpus), "--out", str(tmp_path / "o.jsonl"), "--model", model, "--heads", "1.0", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1 and found["documents"] == 60 and found["header"]["heads"] == ["1.0"]
    assert set(found["correlations"]) == {"length", "repetition", "base_loss"}


def test_correlations_are_pearsons(corpus, model, tmp_path):
    found = score(corpus, model, tmp_path / "o.jsonl")["correlations"]
    rows = rows_of(tmp_path / "o.jsonl")
    values = torch.tensor([[row["score"], row["base_loss"]] for row in rows], dtype=torch.float64).T
    assert found["base_loss"] == pytest.approx(float(torch.corrcoef(values)[0, 1]), rel=1e-4)
    lengths = torch.tensor([row["tokens"] for row in rows], dtype=torch.float64).log()
    assert found["length"] == pytest.approx(float(torch.corrcoef(torch.stack([values[0], lengths]))[0, 1]), rel=1e-4)


def test_without_heads_the_shipped_retrieval_heads_are_masked(tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("The captain said nothing.\n\nAnna gave Bert a book.\n")
    found = headwise.score_corpus(path, out=tmp_path / "o.jsonl")
    assert found["header"]["heads"] == ["2.4", "2.5"] and found["documents"] == 2


def test_select_keeps_the_best_of_each_domain(corpus, model, tmp_path, capsys):
    score(corpus, model, tmp_path / "o.jsonl")
    arguments = ["select", str(tmp_path / "o.jsonl"), "--out", str(tmp_path / "kept.jsonl"), "--fraction", "0.2"]
    assert run([*arguments, "--corpus", str(corpus), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert found["kept"] == len(kept) == 12 and [one["kept"] for one in found["domains"]] == [6, 6]
    rows = rows_of(tmp_path / "o.jsonl")
    for name in "ab":
        scores = sorted((row["score"] for row in rows if row["domain"] == name), reverse=True)
        assert sorted((one["attention_influence"] for one in kept if one["domain"] == name), reverse=True) == scores[:6]
    assert [int(one["id"][1:]) for one in kept] == sorted(int(one["id"][1:]) for one in kept), "order of the corpus"
    assert all(set(one) == {"id", "domain", "text", "attention_influence"} for one in kept)
    assert run(arguments) == 0 and json.loads((tmp_path / "kept.jsonl").read_text().splitlines()[0])["number"] >= 0
    other = write_corpus(tmp_path / "other.jsonl", 10, seed=9)
    assert run([*arguments, "--corpus", str(other)]) == 2
    assert "other.jsonl is not what" in capsys.readouterr().err


PEAK = """
import sys, resource
import headwise, torch
torch.set_num_threads(1)
headwise.score_corpus(sys.argv[1], sys.argv[2], out=sys.argv[3], heads="1.0")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_is_constant_from_a_thousand_to_a_hundred_thousand_documents(model, tmp_path):
    peaks = []
    for count in (1000, 100_000):
        corpus = write_corpus(tmp_path / f"{count}.jsonl", count, most=8)
        command = [sys.executable, "-c", PEAK, str(corpus), model, str(tmp_path / f"{count}-out.jsonl")]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1500)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        assert sum(1 for _ in read_rows(tmp_path / f"{count}-out.jsonl")) == count
    assert peaks[1] < 1.05 * peaks[0] + 8, f"MiB at 1k and 100k documents: {peaks}"


@pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed (extra: data)")
def test_parquet_in_and_out(corpus, model, tmp_path):
    import pyarrow
    import pyarrow.parquet as parquet

    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "corpus.parquet", row_group_size=7)
    score(corpus, model, tmp_path / "o.jsonl")
    score(tmp_path / "corpus.parquet", model, tmp_path / "o.parquet")
    score(tmp_path / "corpus.parquet", model, tmp_path / "parts", format="parquet", part_documents=32)
    plain = [{**row, "file": ""} for row in rows_of(tmp_path / "o.jsonl")]
    for out in ("o.parquet", "parts"):
        assert [{**row, "file": ""} for row in rows_of(tmp_path / out)] == plain
    assert [path.name for path in sorted((tmp_path / "parts").glob("part*"))] == [
        "part-00000.parquet", "part-00001.parquet",
    ]  # fmt: skip
    start = list(windows(Corpus(str(tmp_path / "corpus.parquet")), Place(), 0, 16))[1]
    rest = list(windows(Corpus(str(tmp_path / "corpus.parquet")), start.after, 32, 16))
    assert [one.id for one in rest[0].documents] == [f"d{number}" for number in range(32, 48)]


@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed (extra: data)")
def test_a_data_set_is_scored_and_taken_up_like_a_file(corpus, model, tmp_path, monkeypatch):
    """Streamed by datasets from a folder; stopped behind the second window."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(corpus.read_bytes())
    score(corpus, model, tmp_path / "plain.jsonl")
    said, call, left = [], Stage.__call__, iter([True, True])

    def twice(self, window):
        if not next(left, False):
            raise Stopped
        return call(self, window)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "__call__", twice)
        with pytest.raises(Stopped):
            score(f"hub:{tmp_path / 'set'}", model, tmp_path / "o.jsonl")
    assert json.loads((tmp_path / "o.jsonl.job.json").read_text())["state"]["documents"] == 32
    score(f"hub:{tmp_path / 'set'}", model, tmp_path / "o.jsonl", progress=lambda *given: said.append(given))
    plain = [{**row, "file": ""} for row in rows_of(tmp_path / "plain.jsonl")]
    assert [{**row, "file": ""} for row in rows_of(tmp_path / "o.jsonl")] == plain
    assert any("60 documents" in what for _, _, what in said)


@pytest.mark.skipif(find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_without_pyarrow_parquet_is_refused_in_a_line(corpus, model, tmp_path):
    with pytest.raises(InputError, match=r'pip install "headwise\[data\]"'):
        score(corpus, model, tmp_path / "o.parquet")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (extra: ray)")
@pytest.mark.filterwarnings("ignore")
def test_ray_writes_the_same_bytes(corpus, model, tmp_path):
    """Also a job that was begun by the plain loop and goes on with Ray."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "ray").mkdir()
    score(corpus, model, tmp_path / "plain" / "o.jsonl")
    import ray

    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        score(corpus, model, tmp_path / "ray" / "o.jsonl", engine="ray", workers=2)
        assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "plain")
        with pytest.raises(InputError, match="workers: 4; this cluster of 2 cores takes 1 to 3"):
            score(corpus, model, tmp_path / "more.jsonl", engine="ray", workers=4)
    finally:
        ray.shutdown()


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_engine_is_refused_in_a_line(corpus, model, tmp_path):
    with pytest.raises(InputError, match=r'pip install "headwise\[ray\]"'):
        score(corpus, model, tmp_path / "o.jsonl", engine="ray")
