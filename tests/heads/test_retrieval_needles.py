import pytest
from tests.zoo import FAMILIES

from headwise.errors import UnsupportedModel
from headwise.heads.prompt_probe import prompt_probes
from headwise.heads.retrieval_needles import RetrievalNeedles
from headwise.specimens import planted, planted_llama
from headwise.specimens.registry import word_tokenizer


def test_a_scan_finds_the_probe_by_its_name():
    assert prompt_probes()["retrieval"] is RetrievalNeedles


@pytest.mark.parametrize("module", [planted, planted_llama])
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_planted_head_is_found_with_and_without_a_tokenizer(module, with_tokenizer):
    tokenizer = word_tokenizer(module.names()) if with_tokenizer else None
    found = RetrievalNeedles().measure(module.build(), tokenizer)
    assert found.select(threshold=0.02) == found.select(threshold=0.98) == [module.INDUCTION]
    assert len(found.runs["retrieval"]) == 20 and "needles in tokens, seed 0" in found.source


def test_the_seed_draws_other_needles():
    model = planted.build()
    one, other = (RetrievalNeedles().measure(model, seed=seed) for seed in (1, 2))
    assert one.source != other.source


def test_a_model_that_answers_nothing_is_refused_with_the_number_of_needles():
    with pytest.raises(UnsupportedModel, match=r"retrieval: LlamaForCausalLM answered none of \d+ needles"):
        RetrievalNeedles().measure(FAMILIES["llama"].build())
