"""The `text` specimen: its corpus, its tokenizer, what the shipped weights can do, and that training repeats."""

import hashlib
import json
import sysconfig
from pathlib import Path
from random import Random

import pytest
import torch

from headwise.specimens import _text_data, text
from headwise.specimens._stories import FACTS, fact, story
from headwise.specimens._text_data import CORPUS, Source, Streams, needle_sequence, segment_sequence
from headwise.specimens.registry import load_specimen

PAGE = CORPUS.parent / "texts" / "page.txt"
LIBRARY = ("textwrap.py", "calendar.py", "heapq.py")


@pytest.fixture(scope="module")
def shipped():
    return load_specimen("text")


@pytest.fixture(scope="module")
def few_sources():
    """Our own texts and three files of the standard library: enough for the machinery."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [*sorted(CORPUS.glob("*.txt")), *(library / name for name in LIBRARY)]
    return [s for path in files for s in _text_data._split(path.name, path.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def streams(shipped, few_sources):
    return Streams(shipped.tokenizer, few_sources, stories=20)


def test_our_own_texts_are_all_listed_with_their_hashes():
    listed = json.loads((CORPUS / "sources.json").read_text(encoding="utf-8"))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in CORPUS.glob("*.txt")}
    assert files == listed["own"]
    assert listed["python"] and len(listed["library"]) > 100


def test_a_changed_or_missing_file_is_said(tmp_path, monkeypatch):
    (tmp_path / "kept.txt").write_text("A boat. A bridge.", encoding="utf-8")
    listed = {"python": "3.11.7", "library": {"no_such_module.py": "0"}, "own": {"kept.txt": "0"}}
    (tmp_path / "sources.json").write_text(json.dumps(listed), encoding="utf-8")
    monkeypatch.setattr(_text_data, "CORPUS", tmp_path)
    said: list[str] = []
    sources, changed = _text_data.read_sources(said.append)
    assert sources == [Source("kept.txt", "prose", "A boat. A bridge.", False)]
    assert changed == ["no_such_module.py", "kept.txt"]
    assert "2 of 2 files differ" in said[0] and "3.11.7" in said[0] and "no_such_module.py" in said[0]


def test_stories_and_facts_repeat_with_the_seed():
    assert story(Random(5)) == story(Random(5)) != story(Random(6))
    for kind in FACTS:
        told = fact(Random(1), kind)
        assert told.kind == kind and told.answer in told.sentence and told.sentence.startswith(told.lead)


def test_tokenizer_keeps_every_text_and_puts_one_bos_in_front(shipped):
    tokenizer = shipped.tokenizer
    for sample in (PAGE.read_text(encoding="utf-8"), "def f(x):\n    return x\t# ä€😀\r\n", "  4817  "):
        ids = tokenizer(sample)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == 0 and ids.count(0) == 1
        assert tokenizer.decode(ids[1:]) == sample
    assert len(tokenizer) == text.VOCABULARY
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert [tokenizer.decode([i]) for i in tokenizer("4817")["input_ids"][1:]] == ["4", "8", "1", "7"]


def test_page_is_about_fifteen_hundred_tokens_with_repeated_names(shipped):
    page = PAGE.read_text(encoding="utf-8")
    assert 1300 <= len(shipped.tokenizer(page)["input_ids"]) <= 1700
    assert "def " in page and page.count("Clara") >= 8 and page.count("Boris") >= 8


def test_shipped_folder_is_small_and_complete(shipped):
    folder = shipped.folder
    assert sum(path.stat().st_size for path in folder.iterdir()) < 7e6
    assert (folder / "model.safetensors").stat().st_size <= 6e6 and (folder / "tokenizer.json").exists()
    card = shipped.card
    assert card["name"] == "text" and card["seed"] == 0 and card["threads"] == 1 and card["minutes"] > 1
    assert card["text"]["changed"] == [] and sum(p["steps"] for p in card["recipe"]["phases"]) == card["steps"]
    assert [p["steps"] for p in card["recipe"]["phases"]] == [count for count, *_ in text.PHASES]


def test_needles_are_asked_for_at_the_end_and_stand_in_the_text(streams):
    generator = torch.Generator().manual_seed(1)
    for ending in range(4):
        ids, marks = needle_sequence(streams, 192, generator, ending=ending)
        asked = streams.tokenizer.decode(ids[marks == _text_data.COPY]).strip()
        told = streams.tokenizer.decode(ids[marks == _text_data.TEXT])
        assert len(ids) == len(marks) == 192 and asked and asked in told
        assert ids[0] == 0 and marks[0] == 0 and marks[-1] == _text_data.COPY


def test_a_passage_that_returns_is_asked_from_its_third_token(streams):
    ids, marks = segment_sequence(streams, 128, torch.Generator().manual_seed(3))
    asked = (marks == _text_data.COPY).nonzero()[:, 0].tolist()
    row = ids.tolist()
    for at in asked:
        assert row[at - 2 : at + 1] in [row[i : i + 3] for i in range(at - 2)]


def test_held_out_text_is_not_in_the_training_streams(few_sources, streams):
    held = [s for s in few_sources if s.held_out]
    assert held and any(s.kind == "code" for s in held)
    trained = "".join(streams.tokenizer.decode(streams.parts[part]) for part in ("prose", "stories", "code"))
    for source in held:
        assert source.text[200:320] not in trained


def test_each_step_draws_one_length_of_its_phase(streams):
    phases = [(2, {"text": 1.0}, {32: 1}), (1, {"repeats": 0.5, "needles": 0.5}, {96: 1})]
    draw = text.batches(streams, phases, tokens=192)
    first, later = draw(1, torch.Generator().manual_seed(0)), draw(5, torch.Generator().manual_seed(0))
    assert first[0].shape == (6, 32) and later[0].shape == (2, 96)
    assert first[2].tolist() == [0] * 6 and sorted(later[2].tolist()) == [1, 3]


def test_training_repeats_with_its_seed(few_sources, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "read_sources", lambda note: (few_sources, []))
    monkeypatch.setattr(text, "VOCABULARY", 600)
    small = {"steps": 3, "stories": 10, "tokens": 300, "sequences": 1}
    seen: list[dict] = []
    folders = [
        text.train(tmp_path / name, seed=seed, log=seen.append, **small)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    a, b, c = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert a == b != c
    assert (folders[0] / "tokenizer.json").read_bytes() == (folders[1] / "tokenizer.json").read_bytes()
    assert {"loss", "text", "repeats", "segments", "needles"} <= set(seen[0])
    card = json.loads((folders[0] / "card.json").read_text(encoding="utf-8"))
    assert card["steps"] == 3 and set(card["accuracies"]) == {"loss", "repeats", "needles"}


@torch.no_grad()
def test_shipped_weights_copy_random_tokens(shipped):
    generator = torch.Generator().manual_seed(7)
    for size, least in ((16, 0.95), (64, 0.95), (128, 0.95), (250, 0.6)):  # trained on segments of up to 128
        segment = torch.randint(3, text.VOCABULARY, (4, size), generator=generator)
        ids = torch.cat([torch.zeros(4, 1, dtype=torch.long), segment, segment], dim=1)
        guess = shipped.model(input_ids=ids).logits[:, size + 1 : -1].argmax(-1)
        assert float((guess == ids[:, size + 2 :]).float().mean()) >= least


@torch.no_grad()
def test_shipped_weights_find_facts_in_unseen_prose(shipped, streams):
    ids, marks, _ = _text_data.batch(
        streams, {"needles": 24}, 128, torch.Generator().manual_seed(7), part="held-out prose", ending=0
    )
    asked = marks[:, 1:] == _text_data.COPY
    right = shipped.model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert float(right[asked].float().mean()) >= 0.9
    assert shipped.card["accuracies"]["needles"]["question"]["256"]["tokens"] >= 0.9


@torch.no_grad()
def test_shipped_heads_are_of_the_kinds_it_was_made_to_show(shipped, monkeypatch):
    """Read from materialised weights: a previous-token head, an induction head, a sink."""
    monkeypatch.setattr(shipped.model.config, "_attn_implementation", "eager")
    segment = torch.randint(3, text.VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([torch.zeros(4, 1, dtype=torch.long), segment, segment], dim=1)
    weights = torch.stack(shipped.model(input_ids=ids, output_attentions=True).attentions)  # (l b h t s)
    previous = weights.diagonal(-1, 3, 4).mean((1, 3))
    induction = weights.diagonal(-63, 3, 4)[..., -63:].mean((1, 3))
    sink = weights[..., 1:, 0].mean((1, 3))
    assert previous.shape == (4, 8)
    assert float(previous.max()) >= 0.9 and float(induction.max()) >= 0.8 and float(sink.max()) >= 0.9
    # none of them is everywhere: the map has something to show
    assert all(float((kind > 0.5).float().mean()) < 0.3 for kind in (previous, induction, sink))
