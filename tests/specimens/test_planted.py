"""The planted heads, measured with plain eager attention: they are and do what is said of them."""

from types import ModuleType

import pytest
import torch

from headwise.attend.addresses import Head
from headwise.specimens import planted, planted_llama


@pytest.fixture(scope="module", params=[planted, planted_llama], ids=["gpt2", "llama"])
def specimen(request):
    return request.param


@pytest.fixture(scope="module")
def model(specimen):
    model = specimen.build()
    model.set_attn_implementation("eager")
    return model


def attentions(model, ids: torch.Tensor) -> dict[Head, torch.Tensor]:
    with torch.no_grad():
        layers = model(input_ids=ids, output_attentions=True).attentions
    return {Head(at, h): weights[:, h] for at, weights in enumerate(layers) for h in range(weights.shape[1])}


def scores(weights: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """The probes by their definitions, row 0 left out, in loops over rows."""
    found: dict[str, list[float]] = {name: [] for name in ("previous", "duplicate", "induction", "sink", "dormant")}
    for b in range(len(ids)):
        row = ids[b].tolist()
        for t in range(1, len(row)):
            a = weights[b, t].tolist()
            found["previous"].append(a[t - 1])
            found["sink"].append(a[0])
            found["dormant"].append(float(a[0] > 0.5))
            if row[t] in row[:t]:
                found["duplicate"].append(sum(a[j] for j in range(t) if row[j] == row[t]))
                found["induction"].append(sum(a[j] for j in range(1, t + 1) if row[j - 1] == row[t]))
    return {name: sum(values) / len(values) for name, values in found.items()}


def silence(model, head: Head) -> list:
    """Zero a head's columns of the output projection while the hook is there."""
    if hasattr(model, "transformer"):
        module, size = model.transformer.h[head.layer].attn.c_proj, model.config.n_embd // model.config.n_head
    else:
        module, size = model.model.layers[head.layer].self_attn.o_proj, model.config.head_dim

    def cut(module, args):
        kept = args[0].clone()
        kept[..., head.head * size : (head.head + 1) * size] = 0
        return (kept, *args[1:])

    return [module.register_forward_pre_hook(cut)]


def test_every_head_attends_as_planted(specimen: ModuleType, model):
    ids = planted.repeated(4, 16)
    measured = attentions(model, ids)
    expected = specimen.patterns(ids)
    assert set(measured) == set(expected)
    for head, pattern in expected.items():
        torch.testing.assert_close(measured[head], pattern, rtol=0, atol=1e-5, msg=str(head))


def test_scores_are_the_stated_ones_and_no_other_head_reaches_them(specimen, model):
    ids = planted.repeated(8, 16)
    measured = {head: scores(weights, ids) for head, weights in attentions(model, ids).items()}
    slack = 1e-6 if specimen is planted else 1e-3
    for probe, heads in specimen.TRUTH.items():
        for head, row in measured.items():
            if head in heads:
                assert row[probe] == pytest.approx(heads[head], abs=slack), (probe, head)
            else:
                assert row[probe] <= 0.17, (probe, head)


def test_it_copies_and_needs_exactly_the_heads_it_is_said_to_need(specimen, model):
    ids = planted.repeated(16, 16)
    assert planted.copy_accuracy(model, ids) == 1.0
    for head in specimen.patterns(ids):
        handles = silence(model, head)
        try:
            accuracy = planted.copy_accuracy(model, ids)
        finally:
            for handle in handles:
                handle.remove()
        assert accuracy == (0.0 if head in specimen.NEEDED else 1.0), head


def test_long_texts_and_every_token(specimen, model):
    ids = planted.repeated(2, 62)
    assert planted.copy_accuracy(model, ids) == 1.0
    random = torch.randint(1, planted.VOCABULARY, (2, planted.POSITIONS), generator=torch.Generator().manual_seed(1))
    random[:, 0] = 0
    for head, pattern in specimen.patterns(random).items():
        torch.testing.assert_close(attentions(model, random)[head], pattern, rtol=0, atol=1e-3, msg=str(head))


def test_left_padding_changes_nothing_for_the_real_tokens(specimen, model):
    ids = planted.repeated(1, 16)
    padded = torch.cat([torch.ones(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * ids.shape[1]])
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        shifted = model(input_ids=padded, attention_mask=mask, position_ids=position).logits[:, 5:]
    torch.testing.assert_close(plain, shifted, rtol=1e-4, atol=1e-4)


def test_other_sizes_are_planted_as_well(specimen):
    model = specimen.build(vocabulary=32, positions=64)
    ids = planted.repeated(8, 16, vocabulary=32)
    assert planted.copy_accuracy(model, ids) == 1.0
