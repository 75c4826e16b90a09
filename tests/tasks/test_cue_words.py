import json
from itertools import pairwise

import pytest
import torch

from headwise.errors import InputError
from headwise.tasks.cue_words import cue_inference, cue_questions, cue_sentences, read_text_classes, word_ids


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("classes", [2, 4])
def test_cue_words_tell_the_clean_label(classes):
    batch = cue_sentences(400, drawn(), num_classes=classes)
    for row in range(len(batch)):
        cues = batch.input_ids[row][batch.cues[row]]
        assert 1 <= len(cues) <= 3
        assert ((cues - 2) // 15 == batch.clean[row]).all()
        words = batch.input_ids[row][batch.mask[row]]
        assert 8 <= len(words) <= 20 and (batch.input_ids[row][len(words) :] == 0).all()
        fillers = batch.input_ids[row][batch.mask[row] & ~batch.cues[row]]
        assert (fillers >= 2 + 15 * classes).all()
    wrong = (batch.labels != batch.clean).float().mean()
    assert 0.02 < wrong < 0.09
    assert len(set(batch.clean.tolist())) == classes


def test_no_noise_and_the_same_seed():
    batch = cue_sentences(50, drawn(1), noise=0.0)
    assert torch.equal(batch.labels, batch.clean)
    assert torch.equal(cue_sentences(50, drawn(1), noise=0.0).input_ids, batch.input_ids)
    assert not torch.equal(cue_sentences(50, drawn(2), noise=0.0).input_ids, batch.input_ids)


def facts(ids: list[int], names: int = 8, values: int = 6) -> dict[int, int]:
    """What a passage says, read word by word."""
    return {
        word - 2: after - 2 - names
        for word, after in pairwise(ids)
        if 2 <= word < 2 + names and 2 + names <= after < 2 + names + values
    }


def test_questions_are_answered_by_their_passage():
    batch = cue_questions(200, drawn())
    assert batch.query_ids is not None
    for ids, query, label, cues in zip(batch.input_ids, batch.query_ids, batch.labels, batch.cues, strict=True):
        told = facts(ids.tolist())
        assert len(told) == 3 and told[int(query[0]) - 2] == label
        assert ids[cues].tolist() == [int(query[0]), int(label) + 10]
    assert batch.labels.bincount(minlength=6).min() > 10


def test_hypotheses_follow_are_contradicted_or_neither():
    batch = cue_inference(300, drawn())
    assert batch.query_ids is not None
    for ids, query, label, cues in zip(batch.input_ids, batch.query_ids, batch.labels, batch.cues, strict=True):
        told = facts(ids.tolist())
        name, value = int(query[0]) - 2, int(query[1]) - 10
        truth = 2 if name not in told else 0 if told[name] == value else 1
        assert label == truth and int(cues.sum()) == (0 if label == 2 else 2)
    assert batch.labels.bincount(minlength=3).min() > 60


def test_a_part_keeps_its_rows_together():
    batch = cue_questions(20, drawn())
    part = batch.part(torch.tensor([3, 1]))
    assert torch.equal(part.input_ids, batch.input_ids[[3, 1]]) and torch.equal(part.labels, batch.labels[[3, 1]])
    assert len(batch.part(slice(5))) == 5


def test_refusals():
    with pytest.raises(ValueError, match="leave no filler in a vocabulary of 20"):
        cue_sentences(1, drawn(), vocab_size=20)
    with pytest.raises(ValueError, match=r"cues \(0, 3\)"):
        cue_sentences(1, drawn(), cues=(0, 3))
    with pytest.raises(ValueError, match=r"noise is 1\.5"):
        cue_sentences(1, drawn(), noise=1.5)
    with pytest.raises(ValueError, match="cue_inference: 8 facts of 8 names"):
        cue_inference(1, drawn(), facts=8)


def test_files_of_ones_own(tmp_path):
    rows = [{"sentence": 'A fine "film', "label": "10"}, {"sentence": "dull", "label": "9"}]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    found = read_text_classes(path, text="sentence")
    assert found.names == ["9", "10"] and found.labels == [1, 0] and found.texts[1] == "dull" and not found.pairs
    table = tmp_path / "some.tsv"
    table.write_text('premise\thypothesis\tlabel\na "b\tc\tyes\nd\te\tno\n')
    found = read_text_classes(table, text="premise", pair="hypothesis")
    assert found.texts == ['a "b', "d"] and found.pairs == ["c", "e"] and found.names == ["no", "yes"]
    encode, size = word_ids(found.texts)
    assert size == 5 and encode(["D a nothing", "a"]).tolist() == [[4, 3, 1], [3, 0, 0]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", "its ending is '.csv'"),
        ("a.jsonl", "", "holds no texts"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", "[1]", "line 1: list, not an object"),
        ("a.jsonl", '{"text": "a"}', "line 1: no 'label'; its columns are text"),
        ("a.tsv", "text\tlabel\na\n", "line 2: no 'label'"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_text_classes(path)
    with pytest.raises(InputError, match="no such file"):
        read_text_classes(tmp_path / "other.jsonl")
