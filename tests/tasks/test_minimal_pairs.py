"""Pairs differ in one word, their answers follow from their texts, and published files are read or refused by name."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headwise.errors import InputError
from headwise.tasks.minimal_pairs import (
    COLOURS,
    GIFTS,
    NAMES,
    OBJECTS,
    PLACES,
    coloured_object_pairs,
    encode_pairs,
    indirect_object_pairs,
    load_colored_objects,
    load_indirect_objects,
)

SCENE = "Q: On the desk, there is a red cup and a blue pen."


def split(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def words(pairs, without=()) -> PreTrainedTokenizerFast:
    """One token a word, except for words that are left out: they are cut into letters."""
    known = {
        w for pair in pairs for text in (pair.prompt, pair.twin, pair.answer, pair.twin_answer) for w in split(text)
    }
    letters = [chr(code) for code in [*range(65, 91), *range(97, 123)]]
    names = ["<unk>", *sorted((known - set(without)) | set(letters)), *(f"##{letter}" for letter in letters)]
    inner = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("objects", [2, 3, 5])
@pytest.mark.parametrize("shots", [0, 1, 2])
def test_coloured_objects_parse_back_to_their_scene(objects, shots):
    for pair in coloured_object_pairs(40, objects=objects, shots=shots, seed=objects + shots):
        assert pair.prompt.count("Q:") == shots + 1
        for text, answer in ((pair.prompt, pair.answer), (pair.twin, pair.twin_answer)):
            scene = text.rsplit("Q:", 1)[1]
            told = {thing: colour for article, colour, thing in re.findall(r"\b(an?) (\w+) (\w+)", scene)}
            assert len(told) == objects == len(set(told.values()))
            asked = re.search(r"What color is the (\w+)\?\nA:$", scene)
            assert asked is not None and answer == f" {told[asked[1]].capitalize()}"
            for article, colour in re.findall(r"\b(an?) (\w+) \w+", scene):
                assert (article == "an") == (colour[0] in "aeiou")
        one, other = split(pair.prompt), split(pair.twin)
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1
        assert pair.answer != pair.twin_answer and pair.answer not in pair.wrong and len(pair.wrong) == objects - 1


def test_the_asked_thing_is_any_of_the_scene():
    places = []
    for pair in coloured_object_pairs(300, seed=1):
        scene = pair.prompt.rsplit("Q:", 1)[1]
        told = [colour.capitalize() for colour in re.findall(r"\ban? (\w+) \w+", scene)]
        places.append(told.index(pair.answer.strip()))
    assert all(70 <= places.count(place) <= 130 for place in range(3))
    assert len(OBJECTS) == len(set(OBJECTS)) == 17 and len(COLOURS) == 8


def test_indirect_objects_name_the_receiver_once():
    pairs = indirect_object_pairs(60, seed=2)
    assert [pair.form for pair in pairs[:4]] == ["ABBA", "BABA", "ABBA", "BABA"]
    for pair in pairs:
        for text, answer in ((pair.prompt, pair.answer), (pair.twin, pair.twin_answer)):
            people = [word for word in split(text) if word in NAMES]
            assert people.count(answer.strip()) == 1 and len(people) == 3 and people[2] != answer.strip()
        assert sum(a != b for a, b in zip(split(pair.prompt), split(pair.twin), strict=True)) == 1
        people = [word for word in split(pair.prompt) if word in NAMES]
        assert (people[0] == pair.answer.strip()) == (pair.form == "ABBA")
    assert indirect_object_pairs(5, seed=3) == indirect_object_pairs(5, seed=3) != indirect_object_pairs(5, seed=4)
    assert {pair.form for pair in indirect_object_pairs(8, form="BABA")} == {"BABA"}
    assert not set(NAMES) & {word.capitalize() for word in PLACES + GIFTS}


def test_pairs_are_encoded_for_path_patching():
    pairs = [*indirect_object_pairs(6), *coloured_object_pairs(4, shots=0)]
    tokenizer = words(pairs)
    made = encode_pairs(tokenizer, pairs)
    assert made.clean["input_ids"].shape == made.corrupt["input_ids"].shape
    assert torch.equal(made.changed.sum(1), torch.ones(len(pairs)).long())
    assert bool(made.clean["attention_mask"][:, -1].all()) and not bool(made.clean["attention_mask"].all())
    told = tokenizer.convert_ids_to_tokens(made.right.tolist())
    assert told == [pair.answer.strip() for pair in pairs]
    assert tokenizer.convert_ids_to_tokens(made.wrong.tolist()) == [pair.twin_answer.strip() for pair in pairs]


def test_answers_of_several_tokens_are_refused_by_name():
    pairs = coloured_object_pairs(30, seed=5)
    with pytest.raises(ValueError, match=r"Purple are several tokens|Purple.* are several tokens"):
        encode_pairs(words(pairs, without=["Purple"]), pairs)
    thing = next(word for word in OBJECTS if any(f"the {word}?" in pair.prompt.rsplit("Q:")[-1] for pair in pairs))
    with pytest.raises(ValueError, match=f"differ in more than one token.*{thing}"):
        encode_pairs(words(pairs, without=[thing]), pairs)
    with pytest.raises(ValueError, match="no pairs"):
        encode_pairs(words(pairs), [])


def test_published_files_are_read(tmp_path):
    pairs = coloured_object_pairs(20, seed=6)
    path = tmp_path / "cobjs.json"
    path.write_text(json.dumps([[pair.prompt, pair.answer] for pair in pairs]))
    read = load_colored_objects(path)
    for pair, again in zip(pairs, read, strict=True):
        assert (again.prompt, again.answer) == (pair.prompt, pair.answer)
        assert set(again.wrong) == set(pair.wrong) and again.twin_answer in pair.wrong
        one, other = split(again.prompt), split(again.twin)
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1
        twin = tmp_path / "twin.json"
        twin.write_text(json.dumps([[again.twin, again.twin_answer]]))
        assert load_colored_objects(twin)[0].answer == again.twin_answer  # the twin's label is in its scene
    names = indirect_object_pairs(20, seed=7)
    path.write_text(json.dumps([[pair.prompt, pair.answer] for pair in names]))
    for pair, again in zip(names, load_indirect_objects(path), strict=True):
        assert (again.prompt, again.answer, again.twin, again.twin_answer, again.form) == (
            pair.prompt, pair.answer, pair.twin, pair.twin_answer, pair.form,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"a": 1}, "expected a JSON list"),
        ([["one"]], "expected a JSON list"),
        (
            [["Q: On the desk, there is a red cup and a blue pen. What color is the jar?\nA:", " Red"]],
            "none of the things",
        ),
        ([["Q: On the desk, there is a red cup and a blue pen. What color is the pen?\nA:", " Red"]], "is blue"),
    ],
)
def test_bad_files(tmp_path, document, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        load_colored_objects(path)
    path.write_text(json.dumps([["When Ann and Bob met, Cid gave a cup to", "Ann"]]))
    with pytest.raises(InputError, match="must tell the label 'Ann' once"):
        load_indirect_objects(path)


def test_bad_requests():
    with pytest.raises(ValueError, match="9 objects"):
        coloured_object_pairs(1, objects=9)
    with pytest.raises(ValueError, match="give 1 or more, of 2 or more"):
        indirect_object_pairs(1, names=["Ann", "Ann"])
