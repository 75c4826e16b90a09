"""Addresses, layouts and the selection grammar."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.attend.addresses import Head, Layout, Tower, select_heads
from headwise.errors import InputError

LAYOUT = Layout(
    (
        Tower("", (4, 0, 4, 4), (2, 0, 2, 4)),  # layer 1 is a hybrid model's layer without attention
        Tower("vision", (3, 3), (3, 3)),
    )
)
SCORES = {
    "induction": {Head(layer, head): layer / 10 + head / 100 for layer in (0, 2, 3) for head in range(4)}
    | {Head(0, 0): None, Head(0, 1, "vision"): 0.9},
    "sink": {head: 0.5 for head in LAYOUT.heads("*")},
}


def names(selection, layout=LAYOUT, **options) -> list[str]:
    options.setdefault("scores", SCORES)
    return [str(head) for head in select_heads(selection, layout, **options)]


towers = st.sampled_from(["", "vision", "encoder", "my_tower-2"])
addresses = st.builds(Head, st.integers(0, 200), st.integers(0, 200), towers)


@given(addresses)
def test_an_address_survives_writing_and_reading(head):
    assert Head.parse(str(head)) == head


def test_addresses_are_values():
    assert str(Head(12, 3)) == "12.3"
    assert str(Head(3, 1, "vision")) == "vision:3.1"
    assert Head(1, 2, key=0) == Head(1, 2, key=1) == Head(1, 2)
    assert len({Head(1, 2, key=0), Head(1, 2)}) == 1
    assert sorted([Head(10, 0), Head(2, 1), Head(0, 0, "vision"), Head(2, 0)]) == [
        Head(2, 0),
        Head(2, 1),
        Head(10, 0),
        Head(0, 0, "vision"),
    ]


@pytest.mark.parametrize("text", ["", "3", "3.", ".1", "3-1", "3.1.2", "-1.0", "a.b", "vision:", "vision 3.1", "٣.1"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"head: {text!r} is no address; expected [tower:]layer.head")):
        Head.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0), "Head: layer is -1; expected an integer >= 0"),
        ((0, True), "Head: head is True"),
        ((0, 0, "3x"), "Head: tower is '3x'"),
    ],
)
def test_a_head_checks_its_parts(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Head(*arguments)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=6), st.booleans())
def test_a_layout_survives_json(layers, second):
    tower = Tower("", tuple(k * g for k, g in layers), tuple(k for k, _ in layers))
    layout = Layout((tower, Tower("vision", (2,), (1,)))) if second else Layout((tower,))
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    heads = layout.heads("*")
    assert len(heads) == len(set(heads)) == sum(sum(t.heads) for t in layout.towers)
    for head in heads:
        assert layout.check(Head(head.layer, head.head, head.tower)) == head
        assert layout.check(head).key == head.key


def test_heads_know_their_key_head():
    assert [head.key for head in LAYOUT.heads()] == [0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 2, 3]
    assert [head.key for head in Layout.of([6], [2]).heads()] == [0, 0, 0, 1, 1, 1]


def test_the_main_tower_may_have_a_name():
    layout = Layout((Tower("decoder", (2,), (2,)), Tower("encoder", (2,), (2,))))
    assert layout.check(Head(0, 1)) == Head(0, 1, "decoder")
    assert names("0.*", layout) == ["decoder:0.0", "decoder:0.1"]
    assert names("all,encoder:0.1", layout)[-1] == "encoder:0.1"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Head(4, 0), "head 4.0: layer 4 is out of range; the model has 4 layers (0 to 3)"),
        (Head(0, 4), "head 0.4: head 4 is out of range; layer 0 has 4 heads (0 to 3)"),
        (Head(1, 0), "head 1.0: layer 1 has no attention heads"),
        (Head(2, 0, "vision"), "head vision:2.0: layer 2 is out of range; vision has 2 layers (0 to 1)"),
        (
            Head(0, 0, "visoin"),
            "tower: 'visoin' is none of this model's; it has the unnamed main tower, vision; did you",
        ),
    ],
)
def test_heads_out_of_range_are_refused(head, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LAYOUT.check(head)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (lambda: Tower("", (4,), (3,)), "layer 0 has 4 query heads and 3 key heads"),
        (lambda: Tower("", (4,), (0,)), "layer 0 has 4 query heads and 0 key heads"),
        (lambda: Tower("", (4,), (4, 4)), "heads has 1 layers but kv_heads has 2"),
        (lambda: Tower("a b", (4,), (4,)), "name is 'a b'"),
        (lambda: Layout(()), "expected at least one tower"),
        (lambda: Layout((Tower("", (1,), (1,)),) * 2), "each with its own name"),
        (lambda: Layout.from_json([{"name": ""}]), "not a list of {name, layers, heads_per_layer, kv_heads}"),
    ],
)
def test_layouts_that_cannot_be_are_refused(tower, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tower()


EVERY = [f"{layer}.{head}" for layer in (0, 2, 3) for head in range(4)]
VISION = [f"vision:{layer}.{head}" for layer in range(2) for head in range(3)]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, EVERY),
        ("all", EVERY),
        ("*.*", EVERY),
        ("*:all", EVERY + VISION),
        ("*:*.*", EVERY + VISION),
        ("vision:all", VISION),
        ("3.1", ["3.1"]),
        (" 3.1 , 0.2 ", ["3.1", "0.2"]),
        ("3.1,3.1", ["3.1"]),
        ("0.1-2", ["0.1", "0.2"]),
        ("0-2.3", ["0.3", "2.3"]),
        ("*.0", ["0.0", "2.0", "3.0"]),
        ("2.*", ["2.0", "2.1", "2.2", "2.3"]),
        ("vision:1.1-2", ["vision:1.1", "vision:1.2"]),
        ("vision:*.0", ["vision:0.0", "vision:1.0"]),
        ("*:0.0", ["0.0", "vision:0.0"]),
        ("top:induction:2", ["3.3", "3.2"]),
        ("bottom:induction:2", ["0.1", "0.2"]),
        ("top:sink:2", ["0.0", "0.1"]),
        ("vision:top:induction:1", ["vision:0.1"]),
        ("*:top:induction:2", ["vision:0.1", "3.3"]),
        ("induction>=0.32", ["3.2", "3.3"]),
        ("induction >= 3.2e-1", ["3.2", "3.3"]),
        ("induction<0.03", ["0.1", "0.2"]),
        ("vision:induction>=0", ["vision:0.1"]),
        ("3.*,!3.1", ["3.0", "3.2", "3.3"]),
        ("3.*,!3.1-2,3.1", ["3.0", "3.3", "3.1"]),
        ("all,!0-2.*", ["3.0", "3.1", "3.2", "3.3"]),
        ("!0-2.*", ["3.0", "3.1", "3.2", "3.3"]),
        ("!0-2.*,!top:induction:3", ["3.0"]),
        ("3.*, ! top:induction:1", ["3.0", "3.1", "3.2"]),
        ([Head(0, 1), "3.0,2.0"], ["0.1", "3.0", "2.0"]),
        ([], []),
        ([Head(0, 1), "!0.1"], []),
    ],
)
def test_the_grammar(selection, expected):
    assert names(selection) == expected


grids = st.builds(
    lambda layer, head: f"{layer}.{head}",
    st.sampled_from(["*", "0", "2-3", "0-3", "3"]),
    st.sampled_from(["*", "0", "1-2", "0-3"]),
)


@given(st.lists(grids, min_size=1, max_size=4), st.lists(grids, max_size=3))
def test_removing_is_set_difference(plus, minus):
    chosen = {head for item in plus for head in select_heads(item, LAYOUT)}
    removed = {head for item in minus for head in select_heads(item, LAYOUT)}
    items = [*plus, *(f"!{item}" for item in minus)]
    assert set(select_heads(items, LAYOUT)) == chosen - removed


@given(st.integers(1, 4), st.integers(0, 50))
def test_random_heads_match_the_layers_of_what_stands_before(count, seed):
    first = select_heads(
        "top:sink:4", Layout.of([8] * 6), scores={"sink": dict.fromkeys(Layout.of([8] * 6).heads(), 1.0)}
    )
    assert len(first) == 4
    layout = Layout.of([8] * 6)
    named = [Head(1, 0), Head(1, 1), Head(4, 7), Head(5, 2)][:count]
    drawn = select_heads([*named, f"random:{count}:{seed}"], layout)[count:]
    assert Counter(head.layer for head in drawn) == Counter(head.layer for head in named)
    assert not set(drawn) & set(named)
    assert drawn == select_heads([*named, f"random:{count}"], layout, seed=seed)[count:]


def test_random_heads_spread_in_proportion_when_the_numbers_differ():
    layout = Layout.of([16] * 3)
    drawn = select_heads("0.0-3,2.0-1,random:9", layout)[6:]
    assert Counter(head.layer for head in drawn) == {0: 6, 2: 3}
    drawn = select_heads("0.0-3,2.0-1,random:1", layout)[6:]
    assert [head.layer for head in drawn] == [0]


def test_random_alone_draws_from_all_layers_and_avoids_removed_heads():
    layout = Layout.of([8] * 6)
    assert len({str(select_heads("random:3", layout, seed=seed)) for seed in range(20)}) > 15
    assert names("random:3:7", layout) == names("random:3", layout, seed=7) == names("random:3:7", layout, seed=1)
    for seed in range(20):
        assert all(head.layer > 3 for head in select_heads("!0-3.*,random:5", layout, seed=seed))
    assert set(names("vision:random:6")) == set(VISION)


def test_a_control_for_the_top_heads_is_one_selection():
    layout = Layout.of([8] * 4)
    scores = {"induction": {head: head.layer + head.head / 10 for head in layout.heads()}}
    control = select_heads("top:induction:3,random:3,!top:induction:3", layout, scores=scores)
    assert len(control) == 3
    assert {head.layer for head in control} == {3}
    assert not set(control) & {Head(3, 7), Head(3, 6), Head(3, 5)}


def test_files_list_heads_or_hold_scores(tmp_path):
    from headwise.attend.head_map import HeadMap

    listed = tmp_path / "listed.json"
    listed.write_text('["3.1", "vision:0.2", "0.0"]')
    assert names(f"@{listed}") == ["3.1", "vision:0.2", "0.0"]
    assert names(f"vision:@{listed}") == ["vision:0.2"]
    listed.write_text('{"heads": ["3.1"]}')
    assert names(f"@{listed},0.0") == ["3.1", "0.0"]

    saved = tmp_path / "heads.json"
    scores = {"copying": {Head(0, 1): 0.2, Head(3, 3): 0.7, Head(2, 2): 0.0}, "flat": {Head(0, 0): 1.0}}
    HeadMap(scores, LAYOUT).save(saved)
    assert names(f"@{saved}#copying") == ["3.3", "0.1"]
    assert names(f"!@{saved}#copying,3.3,!@{saved}#copying,3.0") == ["3.0"]
    assert names(f"top:@{saved}#copying:1") == ["3.3"]
    assert names(f"@{saved}#copying>=0.2", scores=None) == ["0.1", "3.3"]
    with pytest.raises(ValueError, match="which probe"):
        names(f"@{saved}")
    with pytest.raises(ValueError, match="did you mean 'copying'"):
        names(f"@{saved}#copyin")

    published = tmp_path / "authors.json"
    published.write_text(json.dumps({"0-0": [0.0, 0.0], "3-1": [1.0, 0.5]}))
    assert names(f"@{published}") == ["3.1"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("", "heads: '' cannot be read; expected one of 3.1, 0-2.*"),
        ("3.1,", "heads: '' cannot be read"),
        ("3", "heads: '3' cannot be read"),
        ("tpo:induction:3", "heads: 'tpo:induction:3' cannot be read"),
        ("tpo:induction:3", "did you mean 'top'?"),
        ("induction>0.5", "heads: 'induction>0.5' cannot be read"),
        ("induction<=0.5", "heads: 'induction<=0.5' cannot be read"),
        ("4.0", "heads: '4.0': layer 4 is out of range; the model has 4 layers (0 to 3)"),
        ("2-4.0", "heads: '2-4.0': layer 4 is out of range"),
        ("0.4", "heads: '0.4': head 4 is out of range; layer 0 has 4 heads (0 to 3)"),
        ("*.7", "heads: '*.7': head 7 is out of range; the widest of these layers has 4 heads (0 to 3)"),
        ("1.*", "heads: '1.*': layer 1 has no attention heads"),
        ("3-2.0", "heads: '3-2.0': layers 3-2 run backwards; write 2-3"),
        ("audio:0.0", "tower: 'audio' is none of this model's"),
        ("vision:2.0", "heads: 'vision:2.0': layer 2 is out of range; vision has 2 layers (0 to 1)"),
        ("top:inducton:3", "probe: 'inducton' is unknown; there are induction, sink; did you mean 'induction'?"),
        ("top:induction:0", "heads: 'top:induction:0': the number of heads is '0'; expected an integer >= 1"),
        ("top:induction:x", "the number of heads is 'x'"),
        ("top:induction:12", "asks for 12 heads but 11 have a score"),
        ("top:induction", "heads: 'top:induction' cannot be read"),
        ("induction>=high", "heads: 'induction>=high': 'high' is no number"),
        ("induction>=2", "heads: 'induction>=2' names no head (highest induction: 0.33, head 3.3)"),
        ("induction<0", "names no head (lowest induction: 0.01, head 0.1)"),
        ("3.1,!3.*", "heads: '3.1,!3.*' names no head"),
        ("random:13", "asks for 13 heads but 12 are left"),
        ("random:2:x", "seed is 'x'; expected an integer >= 0"),
        ("3.0-2,random:2", "needs 2 other heads in layer 3"),
        ([Head(9, 9)], "head 9.9: layer 9 is out of range"),
    ],
)
def test_what_cannot_be_read_is_explained(selection, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        names(selection)


def test_scores_that_are_missing_are_explained(tmp_path):
    with pytest.raises(ValueError, match=re.escape("needs scores; give a head map (--map heads.json)")):
        names("top:induction:3", scores=None)
    with pytest.raises(InputError, match=r"nowhere\.json: cannot be read \(No such file"):
        names(f"@{tmp_path}/nowhere.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"bad\.json: is not JSON"):
        names(f"@{tmp_path}/bad.json")
    (tmp_path / "bad.json").write_text("[1, 2]")
    with pytest.raises(InputError, match=r"bad\.json: not a list of heads"):
        names(f"@{tmp_path}/bad.json")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"bad\.json: is no head map"):
        names(f"@{tmp_path}/bad.json")


def test_scores_may_come_from_a_function():
    assert names("top:sink:1,top:induction:1", scores=lambda probe: SCORES[probe]) == ["0.0", "3.3"]
