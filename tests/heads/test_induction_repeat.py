"""Induction on random tokens said twice: found where it was planted, absent elsewhere."""

import pytest
from tests.zoo import FAMILIES

from headwise.errors import UnsupportedModel
from headwise.heads.induction_repeat import InductionRepeat, frequent_tokens
from headwise.heads.prompt_probe import PromptProbe, prompt_probes
from headwise.specimens.registry import load_specimen


@pytest.mark.parametrize("name", ["planted", "planted-llama"])
def test_the_planted_induction_head_is_found(name):
    specimen = load_specimen(name)
    found = InductionRepeat().measure(specimen.model, specimen.tokenizer)
    planted = specimen.card["heads"]["induction"]
    assert str(found.top(k=1)[0]) == planted
    table = found.tensor()
    assert table.max() > 0.99
    assert (table > 0.2).sum() == 1
    assert found.source.startswith("8 sequences of")


def test_the_seed_decides_the_prompts():
    model = FAMILIES["llama"].build()
    one, same, other = (InductionRepeat().measure(model, seed=seed).of() for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_encoders_are_refused_by_name():
    with pytest.raises(UnsupportedModel, match="BertForMaskedLM is no decoder"):
        InductionRepeat().measure(FAMILIES["bert"].build())


def test_frequent_tokens_are_ordinary():
    tokenizer = load_specimen("planted").tokenizer
    ids = frequent_tokens(tokenizer, 64)
    assert len(ids) == len(set(ids)) >= 32
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert frequent_tokens(None, 10) == list(range(10))


def test_prompt_probes_are_found_by_name():
    found = prompt_probes()
    assert found["induction-repeat"] is InductionRepeat
    assert all(issubclass(cls, PromptProbe) and cls.sentence for cls in found.values())
