"""Mean patterns on a model whose heads are known: one reads the token before it, one what the text says."""

import pytest
import torch

import headwise as hw
from headwise.heads.positional_pattern import freeze_to_positions, positional_patterns, positional_scores
from headwise.hf import attention_maps
from headwise.specimens import planted_llama

PREVIOUS, INDUCTION = planted_llama.PREVIOUS, planted_llama.INDUCTION


@pytest.fixture(scope="module")
def model():
    return planted_llama.build().eval()


@pytest.fixture(scope="module")
def texts():
    rng = torch.Generator().manual_seed(0)
    halves = [torch.randint(4, 60, (6, 10), generator=rng) for _ in range(3)]
    return [torch.cat([half, half], 1) for half in halves]


def test_a_pattern_is_the_mean_map(model, texts):
    patterns = positional_patterns(model, texts)
    heads = list(patterns)
    maps = torch.cat([attention_maps(model, one) for one in texts])
    torch.testing.assert_close(torch.stack(list(patterns.values())), maps.mean(0))
    assert patterns[heads[0]].shape == (20, 20)


def test_the_previous_token_head_is_positional_and_the_copying_head_is_not(model, texts):
    random = [torch.stack([row[torch.randperm(20)] for row in one]) for one in texts]
    scores = positional_scores(model, random)
    by_head = dict(zip(scores.layout.heads(), scores.tensor().flatten().tolist(), strict=True))
    assert by_head[PREVIOUS] > 0.99 > 0.8 > by_head[INDUCTION]


def test_freezing_changes_what_reads_the_text(model, texts):
    permuted = torch.stack([row[torch.randperm(20, generator=torch.Generator().manual_seed(1))] for row in texts[0]])
    patterns = positional_patterns(model, [torch.randint(4, 60, (20, 20))])
    plain = model(permuted).logits
    with hw.steer(model, *freeze_to_positions(patterns, [PREVIOUS])):
        same = model(permuted).logits
    with hw.steer(model, *freeze_to_positions(patterns, [str(INDUCTION)])):
        other = model(permuted).logits
    assert (same - plain).norm() < 0.02 * plain.norm() < 0.1 * (other - plain).norm()


def test_refusals(model, texts):
    with pytest.raises(ValueError, match="inputs of 20 and of 10 tokens"):
        positional_patterns(model, [texts[0], texts[1][:, :10]])
    with pytest.raises(ValueError, match="no input"):
        positional_patterns(model, [])
    with pytest.raises(ValueError, match=r"no pattern of head 9\.9"):
        freeze_to_positions(positional_patterns(model, texts), ["9.9"])
