"""The BiLSTM with attention: facts of its definition. Saving, loading and training are the contract's."""

import pytest
import torch
from torch import nn

from headwise.models.attention_classifier import AttentionClassifier, AttentionClassifierConfig


def model_of(**options) -> AttentionClassifier:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "embedding_size": 6, "hidden_size": 5, "attention_size": 4, "num_labels": 3}
    return AttentionClassifier(AttentionClassifierConfig(**{**sizes, **options})).eval()


@pytest.mark.parametrize("pair", [False, True])
def test_padding_changes_nothing(pair):
    model = model_of(pair=pair)
    ids = torch.randint(1, 30, (3, 8))
    given = {"query_ids": torch.randint(1, 30, (3, 4))} if pair else {}
    plain = model(ids, **given)
    padded = nn.functional.pad(ids, (0, 5))
    if pair:
        given = {"query_ids": nn.functional.pad(given["query_ids"], (0, 2))}
    torch.testing.assert_close(model(padded, **given).logits, plain.logits)
    mask = (padded != 0).long()
    garbage = torch.where(mask == 0, 7, padded)  # with a mask, what stands on padding does not matter
    found = model(garbage, mask, **given)
    torch.testing.assert_close(found.logits, plain.logits)
    assert not found.attentions[0][..., 8:].any()
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones(3, 1, 1))


def test_logits_are_those_of_the_equation():
    model = model_of(pair=True)
    ids, query = torch.randint(1, 30, (1, 6)), torch.randint(1, 30, (1, 3))
    assert model.query_encoder is not None and model.context_proj is not None and model.query_proj is not None
    states = model.encoder(model.embedding(ids))[0][0]
    q = model.query_encoder(model.embedding(query))[1][0][:, 0].flatten()
    attention = model.attention
    assert attention.query_proj is not None
    hidden = (attention.key_proj(states) + attention.query_proj(q)).tanh()
    weights = (hidden @ attention.vector.weight[0]).softmax(0)
    context = (weights[:, None] * states).sum(0)
    expected = model.classifier((model.context_proj(context) + model.query_proj(q)).tanh())
    out = model(ids, query_ids=query)
    torch.testing.assert_close(out.logits[0], expected)
    torch.testing.assert_close(out.attentions[0][0, 0, 0], weights)


def test_losses():
    ids, three, one = torch.randint(1, 30, (4, 5)), model_of(), model_of(num_labels=1, positive_weight=2.5)
    labels = torch.tensor([0, 2, 1, 1])
    out = three(ids, labels=labels)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))
    labels = torch.tensor([0, 1, 1, 0])
    out = one(ids, labels=labels)
    p = out.logits[:, 0].sigmoid()
    expected = -(2.5 * labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(out.loss, expected)
    assert isinstance(one(ids, return_dict=False), tuple)


def test_encoding_once_is_the_same():
    model, ids = model_of(), torch.randint(1, 30, (4, 5))
    torch.testing.assert_close(model(encoded=model.encode(ids)).logits, model(ids).logits)


def test_refusals():
    model, ids = model_of(), torch.randint(1, 30, (2, 5))
    with pytest.raises(ValueError, match="query_ids is given but pair is False"):
        model(ids, query_ids=ids)
    with pytest.raises(ValueError, match="query_ids is missing but pair is True"):
        model_of(pair=True)(ids)
    with pytest.raises(ValueError, match="give input_ids, or encoded"):
        model()
    with pytest.raises(ValueError, match="pad on the right"):
        model(torch.tensor([[0, 3, 4]]))
