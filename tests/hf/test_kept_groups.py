"""What is kept with a sequence while tokens are generated: steps that grow, and columns that are made once for many."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.contracts.models_under_test import left_padded, text, tiny_llama
from torch import Tensor

from headwise.attend import groups, merge
from headwise.attend.edit import Edit
from headwise.attend.edits import BiasGroup, ScaleGroup
from headwise.attend.groups import KeyGroup, first_token, spans, tokens
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.session import attach, steer
from headwise.hf.steps import GrowingStep
from headwise.steering.attention_calibration import AttentionCalibration

PROMPT, LENGTH, IMAGE = 6, 22, 7
EDITS: dict[str, Callable[[], list[Edit]]] = {
    "a bias": lambda: [BiasGroup(spans([(1, 4)]), 0.9)],
    "biases of two groups": lambda: [BiasGroup(first_token(), -1.3), BiasGroup(tokens([3, 5]), 0.7, heads="*.0-1")],
    "a factor": lambda: [ScaleGroup(tokens([3, 5, 8]), 0.3)],
    "a factor and a bias": lambda: [ScaleGroup(first_token(), 0.2), BiasGroup(spans([(2, 4)]), 0.5)],
    "calibration": lambda: [AttentionCalibration(statistics="running", beta=0.2, threshold=0.12, heads="*.*")],
}


def decoded(model: Any, ids: Tensor, out: Any = None, **prompt: Tensor) -> Tensor:
    """Logits of a prompt, then of token after token on its cache."""
    found, start = [], 0
    with torch.no_grad():
        if out is None:
            given_ = {"input_ids": ids[:, :PROMPT], **{name: x[:, :PROMPT] for name, x in prompt.items()}}
            out, start = model(**given_, use_cache=True), PROMPT
            found.append(out.logits)
        for at in range(start, ids.shape[1]):
            given_ = {"input_ids": ids[:, at : at + 1]}
            if prompt:
                given_["attention_mask"] = prompt["attention_mask"][:, : at + 1]
                given_["position_ids"] = prompt["position_ids"][:, at : at + 1]
            out = model(**given_, **with_cache(model, cache_of(out)))
            found.append(out.logits)
    return torch.cat(found, 1)


def prompts_only(edits: list[Edit]) -> list[Edit]:
    """For one forward over a whole text: groups of tokens by the prompt that it begins with."""

    def narrowed(edit: Edit) -> Edit:
        group = getattr(edit, "group", None)
        if group is None or group.name != "tokens":
            return edit
        new = copy.copy(edit)
        new.group = KeyGroup("prompt's", lambda step: group.rule(step) & (torch.arange(step.total) < PROMPT))  # pyright: ignore[reportAttributeAccessIssue]
        return new

    return [narrowed(edit) for edit in edits]


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("padded", [False, True])
def test_many_more_tokens_than_there_are_spare_columns(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(groups, "SPARE", 3)
    model, ids = tiny_llama(), text(2, LENGTH)
    batch = left_padded([ids[0], ids[1, :-2]]) if padded else {"input_ids": ids}
    ids, others = batch["input_ids"], {key: x for key, x in batch.items() if key != "input_ids"}
    with steer(model, *EDITS[name]()):
        found = decoded(model, ids, **others)
    with torch.no_grad(), steer(model, *prompts_only(EDITS[name]())):
        whole = model(**batch).logits
    real = others.get("attention_mask", torch.ones_like(ids)).bool()
    torch.testing.assert_close(found[real], whole[real], atol=3e-5, rtol=1e-4)
    with torch.no_grad():
        assert (model(**batch).logits - whole)[real].abs().max() > 1e-3


@pytest.mark.parametrize(("maker", "name"), [("_of_constants", "a bias"), ("_of_atoms", "a factor")])
def test_a_decoded_token_makes_nothing_anew(maker: str, name: str, monkeypatch: pytest.MonkeyPatch):
    """Counted over two layers and 16 tokens: once for those that were read, once for all that are generated."""
    made, asked = [], []
    before = getattr(merge, maker)
    monkeypatch.setattr(merge, maker, lambda *args: made.append(1) or before(*args))
    (edit,) = EDITS[name]()
    group: Any = edit.group  # pyright: ignore[reportAttributeAccessIssue]
    rule = group.rule
    object.__setattr__(group, "rule", lambda step: asked.append(1) or rule(step))
    model = tiny_llama()
    with steer(model, edit):
        decoded(model, text(2, LENGTH))
    assert len(made) == (2 if maker == "_of_constants" else 1) and len(asked) == 1


@pytest.mark.parametrize("name", EDITS)
def test_two_sequences_in_turn_are_each_its_own(name: str):
    """As long as each other, with other tokens and caches; then a copy of a cache goes on otherwise."""
    model, other = tiny_llama(), text(2, LENGTH, seed=5)
    ids = text(2, LENGTH)
    with steer(model, *EDITS[name]()):
        alone = [decoded(model, one) for one in (ids, other)]
    attach(model, *EDITS[name]())
    found: list[list[Tensor]] = [[], []]
    outs: list[Any] = [None, None]
    with torch.no_grad():
        for at in range(PROMPT - 1, LENGTH):
            for i, one in enumerate((ids, other)):
                new = one[:, :PROMPT] if outs[i] is None else one[:, at : at + 1]
                options = {"use_cache": True} if outs[i] is None else with_cache(model, cache_of(outs[i]))
                outs[i] = model(input_ids=new, **options)
                found[i].append(outs[i].logits)
        twin = copy.deepcopy(cache_of(outs[0]))
        first = model(input_ids=ids[:, :1], **with_cache(model, cache_of(outs[0]))).logits
        second = model(input_ids=ids[:, :1], **with_cache(model, twin)).logits
    for ours, wanted in zip(found, alone, strict=True):
        torch.testing.assert_close(torch.cat(ours, 1), wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(first, second)


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.sets(st.integers(0, 3))), min_size=1, max_size=12))
def test_a_growing_step_says_what_is_so(pieces: list[tuple[int, bool, set[int]]]):
    """Pieces of a text, some with the mask of all that is there so far; what is asked of a step changes nothing."""
    generator = torch.Generator().manual_seed(len(pieces))
    step = GrowingStep.start(2, 0, torch.device("cpu"))
    ids, prompt, real = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0), torch.zeros(2, 0)
    for length, told, asked in pieces:
        new = torch.randint(5, 9, (2, length), generator=generator)
        past = ids.shape[1]
        ids = torch.cat([ids, new], 1)
        prompt = torch.cat([prompt, torch.full((2, length), float(past == 0 or length > 1))], 1)
        real = torch.cat([real, torch.ones(2, length)], 1)
        if told:
            real = (torch.rand(real.shape, generator=generator) < 0.8).float()
        step = step.followed(new, real.bool() if told else None, IMAGE)
        assert (step.past, step.length, step.batch) == (past, length, 2)
        for which in asked:
            name = ("ids", "real", "prompt", "images")[which]
            wanted = (ids, real.bool(), prompt.bool(), (ids == IMAGE) & prompt.bool())[which]
            assert torch.equal(getattr(step, name), wanted), name
        if 1 in asked:
            assert step.rows_real == bool(real[:, past:].all())
            assert not step.all_real or bool(real.all())


def test_scores_that_are_very_low_are_not_taken_for_hidden():
    """A decoded token all of whose scores lie below what additive masks hide with."""
    from headwise.attend.call import Call
    from headwise.attend.machine import BoundEdit
    from headwise.attend.machine import attend as attend_call

    generator = torch.Generator().manual_seed(0)
    q, v = torch.ones(1, 2, 1, 4), torch.randn(1, 2, 9, 4, generator=generator)
    k = -1e4 + torch.randn(1, 2, 9, 4, generator=generator) / 10
    edit = ScaleGroup(spans([(1, 4)]), 0.5)
    call = Call(q, k, v, scale=1.0, causal=False)
    weights = (q.double() @ k.double().mT).softmax(-1)
    mass = weights[..., 1:4].sum(-1, keepdim=True)
    inside = torch.isin(torch.arange(9), torch.tensor([1, 2, 3]))
    wanted = weights * torch.where(inside, 0.5, (1 - mass / 2) / (1 - mass)) @ v.double()
    found = attend_call(call, [BoundEdit(edit, {(call.tower, call.layer): [0, 1]})])
    assert float((q @ k.mT).max()) < -2e4
    torch.testing.assert_close(found.transpose(1, 2).double(), wanted, atol=2e-2, rtol=1e-2)
