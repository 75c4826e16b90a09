"""Overlap against brute force, circuits through a file, and a planted circuit that carries everything."""

import itertools
import random

import pytest
import torch

from headwise.attend.addresses import Head, Layout
from headwise.attend.head_map import HeadMap
from headwise.errors import InputError
from headwise.heads.circuits import Circuit, faithfulness, overlap
from headwise.heads.effects import logit_difference
from headwise.specimens import planted

GRID = Layout.of([4, 4, 4])


def test_chance_is_that_of_all_sets():
    """Every pair of sets of three heads out of twelve, counted."""
    a, b = ["0.0", "0.1", "1.0"], ["0.1", "1.0", "2.3"]
    found = overlap(a, b, layout=GRID)
    mine = {Head.parse(x) for x in a}
    counts = [len(mine & set(drawn)) for drawn in itertools.combinations(GRID.heads(), 3)]
    assert [str(head) for head in found.shared] == ["0.1", "1.0"] and found.share == pytest.approx(2 / 3)
    assert found.expected == pytest.approx(sum(counts) / len(counts))
    assert found.p == pytest.approx(sum(count >= 2 for count in counts) / len(counts))


def test_chance_within_layers_is_that_of_layer_matched_sets():
    a, b = ["0.0", "0.1", "1.0"], ["0.1", "0.2", "1.0"]
    found = overlap(a, b, layout=GRID, null="layer")
    mine = {Head.parse(x) for x in a}
    sets = [
        {*(Head(0, h) for h in first), Head(1, second)}
        for first in itertools.combinations(range(4), 2)
        for second in range(4)
    ]
    counts = [len(mine & drawn) for drawn in sets]
    assert found.expected == pytest.approx(sum(counts) / len(counts)) == 1.25
    assert found.p == pytest.approx(sum(count >= 2 for count in counts) / len(counts))
    generator = random.Random(0)
    drawn = []
    for _ in range(4000):  # and the layer-matched sampler of head maps draws from the same law
        pool = generator.sample(range(4), 2), generator.randrange(4)
        drawn.append(len(mine & {*(Head(0, h) for h in pool[0]), Head(1, pool[1])}))
    assert sum(drawn) / len(drawn) == pytest.approx(found.expected, abs=0.05)


def test_maps_give_their_strongest_heads_by_size():
    maps = [
        HeadMap(
            {"effect": {head: score * (-1) ** head.head for head, score in zip(GRID.heads(), scores, strict=True)}},
            GRID,
        )
        for scores in (range(12), [*range(6), 20, 21, *range(4)])
    ]
    found = overlap(*maps, k=3)
    assert found.size == (3, 3) and all(isinstance(head, Head) for head in found.shared)
    assert overlap(*maps, top=0.02).size == (1, 1)
    assert overlap(maps[0], maps[0], k=3).share == 1
    among = [head for head in GRID.heads() if head.layer < 2]
    assert overlap(*maps, k=2, among=among).expected == pytest.approx(4 / 8)


def test_bad_overlaps():
    with pytest.raises(ValueError, match="layout is missing"):
        overlap(["0.0"], ["0.1"])
    with pytest.raises(ValueError, match="given twice"):
        overlap(["0.0", "0.0"], ["0.1"], layout=GRID)
    with pytest.raises(ValueError, match="holds no head"):
        overlap([], ["0.1"], layout=GRID)
    with pytest.raises(ValueError, match="none of the 4"):
        overlap(["0.0"], ["1.0"], layout=GRID, among=[f"0.{h}" for h in range(4)])
    with pytest.raises(ValueError, match="k is 13"):
        overlap(["0.0"], ["0.1"], layout=GRID, k=13)


def test_circuits_through_a_file(tmp_path):
    circuit = Circuit({"movers": ["2.1", Head(2, 0)], "readers": ["1.3", "mlp:1"]}, "tiny", "names", {"prompts": 64})
    circuit.save(tmp_path / "circuit.json")
    again = Circuit.load(tmp_path / "circuit.json")
    assert again == circuit and again.heads == [Head(2, 1), Head(2, 0), Head(1, 3)]
    with pytest.raises(ValueError, match="names a node twice"):
        Circuit({"movers": ["2.1", "2.1"]})
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="holds no circuit"):
        Circuit.load(tmp_path / "other.json")


@pytest.mark.parametrize("mode", ["resample", "mean"])
def test_the_planted_circuit_carries_everything(mode):
    model = planted.build()
    generator = torch.Generator().manual_seed(0)
    words = torch.stack([torch.randperm(28, generator=generator)[:8] + 2 for _ in range(16)])
    start = torch.zeros(16, 1, dtype=torch.long)
    clean = torch.cat([start, words, words[:, 4:5]], 1)
    moved = words.clone()
    moved[:, [4, 6]] = moved[:, [6, 4]]
    corrupt = torch.cat([start, moved, words[:, 4:5]], 1)
    metric = logit_difference(words[:, 5], words[:, 7])
    both = Circuit({"copy": [planted.INDUCTION], "before": [planted.PREVIOUS]})
    found = faithfulness(model, both, clean, corrupt, metric, mode=mode)
    assert found.share == pytest.approx(1, abs=0.05) and found.recovered == pytest.approx(1, abs=0.05)
    half = faithfulness(model, [planted.INDUCTION], clean, corrupt, metric, mode=mode)
    assert half.recovered < 0.6
