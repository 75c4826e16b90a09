import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.attend.addresses import Head, Layout
from headwise.attend.edits import Ablate
from headwise.attend.head_map import HeadMap
from headwise.heads.knockout import answers_right, control_sets, live_heads
from headwise.hf.session import steer
from headwise.specimens import planted, planted_llama
from headwise.tasks.needles import needle


def test_live_heads_are_those_whose_output_reaches_the_model():
    """Of the planted heads only two write anything; the others' columns of the projection are zero."""
    ids = planted.repeated(4, 16)
    for module in (planted, planted_llama):
        assert live_heads(module.build(), ids) == [module.PREVIOUS, module.INDUCTION]


@pytest.mark.parametrize("module", [planted, planted_llama])
def test_answers_without_a_needed_head_are_wrong_and_without_another_right(module):
    model = module.build()
    prompts = needle("symbols", words=range(4, 60), marks=(2, 3), lengths=(40, 50), depths=(0, 1), repeats=2)
    assert answers_right(model, prompts) == [[True] * 6] * 8
    for head in (Head(layer, number) for layer in range(2) for number in range(2)):
        with steer(model, Ablate(heads=[head])):
            right = answers_right(model, prompts)
        share = sum(map(sum, right)) / 48
        assert share < 0.1 if head in module.NEEDED else share == 1
    targets = [[61, 62, 63]] * 8  # tokens that are in no prompt
    assert answers_right(model, prompts, targets) == [[False] * 3] * 8


@given(st.lists(st.integers(0, 23), min_size=1, max_size=6, unique=True), st.sets(st.integers(0, 23)), st.booleans())
def test_control_sets_match_layers_and_stay_in_the_pool(chosen, pool, by_layer):
    layout = Layout.of([8, 8, 8])
    everything = layout.heads()
    heads, free = [everything[i] for i in chosen], {everything[i] for i in pool}
    by = "layer" if by_layer else "any"
    sets = control_sets(HeadMap({"p": {}}, layout), heads, free, by=by, draws=20)
    room = free - set(heads)
    for one in sets:
        assert set(one) <= room and len(set(one)) == len(one)
        if by_layer:
            for layer in range(3):
                wanted = sum(head.layer == layer for head in heads)
                there = sum(head.layer == layer for head in room)
                assert sum(head.layer == layer for head in one) == min(wanted, there)
        else:
            assert len(one) == min(len(heads), len(room))
    layers = {head.layer for head in heads}
    assert bool(sets) == any(head.layer in layers or not by_layer for head in room)
    assert len({tuple(sorted(one)) for one in sets}) == len(sets) <= 20
