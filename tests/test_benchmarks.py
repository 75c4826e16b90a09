"""What `headwise bench` is made of: the parts of `attention` do the same work, operations are counted, ratios are
digested. No time is asserted."""

import math
from typing import Any

import benchmarks
import pytest
import torch
from benchmarks import Benchmark, Row, UnknownInput, Variant
from benchmarks._parts import OURS, PRODUCT, SOFTMAX, Part, break_even, digest, inputs_of, label_of, products, timed
from benchmarks.attention import parts
from torch.utils.flop_counter import FlopCounterMode

PARTS = [(module, part) for module, own in parts() for part in own]
IDS = [part.name for _, part in PARTS]
MECHANISMS = {
    "agent", "mixture_of_head", "neighborhood", "positional", "gaussian_adaptive", "davit", "sparsifiner", "ninformer",
    "efficient_local", "dual_cross", "class_semantics",
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(benchmarks, "setting", benchmarks.setting)
    benchmarks.setting.device, benchmarks.setting.dtype = "cpu", "float32"


def test_every_mechanism_has_a_part():
    assert {module for module, _ in PARTS} == MECHANISMS
    assert len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("part", [part for _, part in PARTS], ids=IDS)
def test_peers_do_the_same_work_at_the_smallest_size(part: Part):
    size = part.sizes[0]
    ways = part.ways(size)
    assert next(iter(ways)) == OURS
    wanted, gradients = timed(ways[OURS], False)(), timed(ways[OURS], True)()
    assert torch.isfinite(wanted).all() and any(one is not None and one.abs().max() > 0 for one in gradients)
    for peer in part.peers:
        if peer not in ways:
            assert peer == "NATTEN", "only an installed package may be absent"
            continue
        torch.testing.assert_close(timed(ways[peer], False)(), wanted, atol=1e-4, rtol=1e-3)
        for ours, theirs in zip(gradients, timed(ways[peer], True)(), strict=True):
            if ours is not None:
                torch.testing.assert_close(theirs, ours, atol=2e-4 * max(1.0, float(ours.abs().max())), rtol=1e-3)
    out = timed(part.softmax(size), False)()
    assert out.numel() == wanted.numel() or "10 %" in part.name, "softmax attention has the same shape"
    numbers = [part.tokens(one) for one in part.sizes]
    assert numbers == sorted(numbers) and len(numbers) > 2 and part.operations(size) > 0


# Released forms that keep their maps are made of matrix products alone, so that they can be counted.
@pytest.mark.parametrize("name", ["agent", "DaViT, window and channel", "ninformer", "dual cross, pairs of images"])
def test_operations_are_those_that_are_counted(name):
    part = next(part for _, part in PARTS if part.name == name)
    for size in part.sizes[:2]:
        call = timed(part.ways(size)[part.peers[0]], False)
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == part.operations(size)


@pytest.mark.parametrize("operations", [1e6, 57e6, 3.3e9])
def test_the_product_has_as_many_operations(operations):
    multiply = products(operations)
    with FlopCounterMode(display=False) as counter:
        multiply()
    assert counter.get_total_flops() == pytest.approx(operations, rel=0.02)


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([(100, 4.0), (400, 0.25), (1600, 0.1)], "from about 200 tokens on (between 100 and 400)"),
        ([(100, 2.0), (400, 0.9), (1600, 1.1), (6400, 0.5)], "between 1600 and 6400"),
        ([(100, 0.9), (400, 0.5)], "at every size, from 100 tokens on"),
        ([(100, 0.9), (400, 1.5)], "at some sizes, not at 400 tokens"),
        ([(100, 1.9), (400, 1.5)], "at no size, up to 400 tokens"),
        ([(100, 1.0), (400, None)], "at no size, up to 100 tokens"),
        ([(100, None)], None),
    ],
)
def test_where_softmax_attention_is_overtaken(ratios, said):
    found = break_even(ratios)
    assert found is None if said is None else found is not None and said in found


def part_of(sizes: tuple[int, ...] = (10, 40)) -> Part:
    def way():
        x = torch.ones(4, requires_grad=True)
        return lambda: 2 * x, [x]

    return Part(
        "made", sizes, "{} tokens".format, lambda _: {OURS: way, "old": way, "older": way}, ("old", "older", "absent"),
        lambda _: way, lambda size: 1e5 * size, int, most=20,
    )  # fmt: skip


def row(label: str, variant: str, ratio: float | None, mib: float | None = 1.0) -> Row:
    return Row("made", label, variant, ratio, 0.0, None, None if ratio else "slow", mib)


def test_the_digest_divides():
    part = part_of()
    rows = []
    for size, softmax, own in ((10, 2.0, 6.0), (40, 8.0, 4.0)):
        label = label_of(part, size, "forward")
        rows += [row(label, PRODUCT, 1.0), row(label, OURS, own, 3.0), row(label, SOFTMAX, softmax, 5.0)]
        rows += [row(label, "old", 8.0), row(label, "older", 5.0, 7.0)]
    label = label_of(part, 40, "training step")
    rows += [row(label, PRODUCT, 1.0), row(label, OURS, 2.0), row(label, SOFTMAX, None), row(label, "old", 4.0)]
    first, second, step = digest([part], rows)
    assert (first["of_softmax"], first["of_product"], first["of_peer"], first["peer"]) == (3.0, 6.0, 1.2, "older")
    assert (first["mib"], first["softmax_mib"], first["peer_mib"]) == (3.0, 5.0, 7.0)
    assert second["of_softmax"] == 0.5 and "between 10 and 40" in second["break_even"] == first["break_even"]
    assert (step["pass"], step["of_softmax"], step["of_peer"], step["break_even"]) == ("training step", None, 0.5, None)


def test_a_run_of_parts(monkeypatch):
    part, checked = part_of(), []
    made = Benchmark("made", inputs_of([part]), lambda: checked.append(1), 2, lambda rows: digest([part], rows), True)
    monkeypatch.setattr(benchmarks, "load", lambda name: made)
    found = benchmarks.run(["made"], device="cpu")
    assert checked == [1] and {one["input"] for one in found["rows"]} == set(made.inputs)
    skipped = [one for one in found["rows"] if one["skipped"]]
    assert {(one["variant"], one["input"].split(", ")[1]) for one in skipped} == {(SOFTMAX, "40 tokens")}
    assert [one["size"] for one in found["digests"]["made"]] == ["10 tokens", "40 tokens"] * 2
    assert all(one["of_product"] > 0 and one["of_peer"] > 0 for one in found["digests"]["made"])
    only = benchmarks.run(["made"], inputs=["40 tokens, forward"], rounds=1, memory=False, device="cpu")
    assert {one["input"] for one in only["rows"]} == {"made, 40 tokens, forward"}
    with pytest.raises(UnknownInput, match=r"no input has 50 tokens in its name; nearest are made, 10 tokens, forward"):
        benchmarks.run(["made"], inputs=["50 tokens"], device="cpu")


def test_an_unknown_input_is_answered_in_a_line(monkeypatch):
    labels = [f"{kind} of {n}" for kind in ("prompt", "tokens", "picture") for n in range(100, 140)]
    monkeypatch.setattr(benchmarks, "load", lambda name: Benchmark(name, {label: list for label in labels}))
    with pytest.raises(UnknownInput) as caught:
        benchmarks.run(["some_name"], inputs=["promt of 139"], device="cpu")
    said = str(caught.value)
    assert "nearest are prompt of 139; " in said and len(said) < 250
    assert "(of 120; `headwise bench some-name --list` names those of some-name)" in said


def test_a_failing_check_stops_a_benchmark(monkeypatch):
    def check() -> None:
        raise AssertionError("they differ")

    timed_ones: list[int] = []
    variant = Variant("one", lambda: lambda: timed_ones.append(1))
    monkeypatch.setattr(benchmarks, "load", lambda name: Benchmark("made", {"a": lambda: [variant]}, check))
    with pytest.raises(AssertionError, match="they differ"):
        benchmarks.run(["made"], device="cpu")
    assert not timed_ones


def test_what_a_call_holds():
    def hold() -> None:
        torch.ones(16 * 2**20).add_(1)  # 64 MiB

    found = benchmarks._held(hold)
    if found is None:
        pytest.skip("this system does not say what a process holds")
    assert 60 < found < 72
    assert benchmarks._held(lambda: None) < 8  # type: ignore[operator]


def test_short_calls_are_timed_in_numbers():
    calls: list[int] = []
    assert math.isfinite(benchmarks._time(lambda: calls.append(1), 7)) and len(calls) == 7


def test_everything_named_nothing_leaves_the_gathering_out():
    assert "attention" in benchmarks.names() and "attention" not in benchmarks.every()
    for name in benchmarks.every():
        assert benchmarks.load(name).name == name, "rows and processes go by the module's name"


def test_the_command_prints_the_digest(monkeypatch, capsys):
    from headwise.cli import run

    label = label_of(part_of(), 10, "forward")
    rows = [row(label, PRODUCT, 1.0), row(label, OURS, 6.0), row(label, SOFTMAX, 2.0), row(label, "old", 12.0)]
    lines: list[Any] = digest([part_of()], rows)
    document = {"machine": {}, "versions": {}, "rows": [vars(one) for one in rows], "digests": {"made": lines}}
    monkeypatch.setattr(benchmarks, "run", lambda *_, **__: document)
    assert run(["bench", "attention"]) == 0
    printed = capsys.readouterr().out
    assert "made, forward; ahead of softmax attention at no size, up to 10 tokens" in printed
    assert printed.splitlines()[-1].split()[:5] == ["10", "tokens", "3", "6", "0.5"]
    assert PRODUCT not in printed, "rows are in --json"
