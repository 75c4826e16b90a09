"""What every edit must pass, primitive ones of `attend` and methods of `steering` alike; found by what they export."""

import contextlib
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tests.contracts.discovery import edit_arguments, exported
from tests.contracts.models_under_test import HEAD_DIM, left_padded, text, tiny_llama
from torch import Tensor

from headwise.attend.edit import ColumnEdit, Edit, GroupEdit, InputEdit, OutputEdit, RowEdit
from headwise.attend.read import Probe, Reading
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.session import attach, probe, steer

ABSTRACT = (ColumnEdit, Edit, GroupEdit, InputEdit, OutputEdit, RowEdit)
EDITS = [cls for area in ("attend", "steering") for cls in exported(area, Edit, abstract=ABSTRACT)]
NAMED = ["0.1", "1.2"]
STRONG, ATOL = 0.4, 2e-5


def strong(cls: type, heads: Any = None) -> Edit:
    """An edit that changes something: its own example, or every number of it 0.4."""
    if callable(getattr(cls, "example", None)):
        return cls.example()
    arguments = edit_arguments(cls, STRONG, NAMED if heads is None else heads, HEAD_DIM)
    if arguments is None:
        pytest.fail(f"{cls.__name__}: the contract cannot make one; give it a static method example()")
    return cls(**arguments)


def neutral(cls: type) -> Edit | None:
    """The edit at its neutral setting, where some number (or an empty mapping) is one."""
    for number in (1.0, 0.0):
        arguments = edit_arguments(cls, number, NAMED, HEAD_DIM)
        with contextlib.suppress(ValueError, TypeError):
            edit = cls(**(arguments or {}))
            if edit.neutral:
                return edit
    if callable(getattr(cls, "example", None)):  # where not every number may be 1 or 0, one of its example
        made = cls.example()
        for item in fields(made):
            for number in (1.0, 0.0):
                if isinstance(getattr(made, item.name), float):
                    with contextlib.suppress(ValueError):
                        edit = replace(made, **{item.name: number})
                        if edit.neutral:
                            return edit
    return None


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture(params=EDITS, ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> type:
    return request.param


def test_it_changes_the_model_and_leaves_no_trace(cls: type, model):
    ids = text()
    implementation = model.config._attn_implementation
    before = logits(model, input_ids=ids)
    with steer(model, strong(cls)):
        inside = logits(model, input_ids=ids)
    assert not torch.allclose(before, inside, atol=1e-3), "the strong setting of the contract changes nothing"
    assert torch.isfinite(inside).all()
    assert torch.equal(logits(model, input_ids=ids), before)
    assert model.config._attn_implementation == implementation


def test_it_is_undone_after_an_exception(cls: type, model):
    ids = text()
    before = logits(model, input_ids=ids)
    with pytest.raises(KeyError, match="mine"), steer(model, strong(cls)):
        logits(model, input_ids=ids)
        raise KeyError("mine")
    assert torch.equal(logits(model, input_ids=ids), before)


def test_its_neutral_setting_is_the_identity(cls: type, model):
    edit = neutral(cls)
    ids = text()
    before = logits(model, input_ids=ids)
    if edit is not None:
        with steer(model, edit):
            assert torch.equal(logits(model, input_ids=ids), before)
    with steer(model, strong(cls, heads=[])) if edit is None and cls.__name__ != "ReplaceHeads" else steer(model):
        assert torch.equal(logits(model, input_ids=ids), before)


class Outputs(Probe):
    """The heads' outputs `[b t h e]` of every layer."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, Tensor] = {}

    def output(self, heads: Tensor, mixed: Tensor, reading: Reading) -> None:
        self.seen[reading.call.layer] = heads.clone()


def test_only_the_named_heads_change(cls: type, model):
    ids = text()
    with probe(model, plain := Outputs()):
        logits(model, input_ids=ids)
    with steer(model, strong(cls)), probe(model, edited := Outputs()):
        logits(model, input_ids=ids)
    # Layer 0 sees the same input in both runs, so that all but head 0.1 must be the same bit for bit.
    others = [0, 2, 3]
    assert torch.equal(plain.seen[0][:, :, others], edited.seen[0][:, :, others])
    assert not torch.equal(plain.seen[0][:, :, 1], edited.seen[0][:, :, 1])


# These name columns of the batch by number, so that padding moves what they name.
BY_COLUMN = {"delta"}


def test_left_padding_changes_nothing(cls: type, model):
    if BY_COLUMN & set(getattr(cls, "__dataclass_fields__", ())):
        return
    rows = [text(1, 11)[0], text(1, 7, seed=1)[0]]
    with steer(model, strong(cls)):
        alone = [logits(model, input_ids=row[None])[0] for row in rows]
        batch = logits(model, **left_padded(rows))
    for row, expected in enumerate(alone):
        torch.testing.assert_close(batch[row, -len(expected) :], expected, atol=ATOL, rtol=1e-4)


def test_decoding_with_a_cache_equals_the_full_forward(cls: type, model):
    if cls.settles:
        return  # the full forward is a longer prompt; the edit's own test knows what was chosen
    ids = text(2, 12)
    with steer(model, strong(cls)), torch.no_grad():
        full = model(ids).logits
        given = model(ids[:, :8], use_cache=True)
        pieces = [given.logits]
        for t in range(8, 12):
            given = model(ids[:, t : t + 1], **with_cache(model, cache_of(given)))
            pieces.append(given.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=ATOL, rtol=1e-4)


def test_nesting_composes(cls: type, model):
    ids = text()
    other = EDITS[(EDITS.index(cls) + 1) % len(EDITS)]
    with steer(model, strong(cls), strong(other)):
        together = logits(model, input_ids=ids)
    with steer(model, strong(cls)):
        alone = logits(model, input_ids=ids)
        with steer(model, strong(other)):
            torch.testing.assert_close(logits(model, input_ids=ids), together, atol=ATOL, rtol=1e-4)
        assert torch.equal(logits(model, input_ids=ids), alone)


def test_another_model_is_untouched(cls: type, model):
    ids = text()
    second = tiny_llama(seed=1, config=model.config)  # it even shares the config
    before = logits(second, input_ids=ids)
    handle = attach(model, strong(cls))
    assert torch.equal(logits(second, input_ids=ids), before)
    handle.remove()
    assert torch.equal(logits(second, input_ids=ids), before)


def test_items_of_a_batch_do_not_meet(cls: type, model):
    ids = text(3)
    with steer(model, strong(cls)):
        batch = logits(model, input_ids=ids)
        for row in range(3):
            torch.testing.assert_close(logits(model, input_ids=ids[row : row + 1])[0], batch[row], atol=ATOL, rtol=1e-4)


def test_it_says_what_it_is(cls: type):
    assert cls.__doc__, "an edit says in a docstring what it does"
    assert issubclass(cls, Edit)
