import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from headwise.heads.gradient_correlation import (
    attention_gradient_correlation,
    gradient_importance,
    head_gradient_correlation,
)
from headwise.models.attention_classifier import AttentionClassifier, AttentionClassifierConfig


class Bag(nn.Module):
    """logits = sum over words of u . e_t times a weight that depends on the place: importance is known."""

    def __init__(self, classes: int):
        super().__init__()
        self.embedding = nn.Embedding(20, 6, padding_idx=0)
        self.out = nn.Linear(6, classes, bias=False)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None):
        place = torch.arange(1.0, input_ids.shape[1] + 1)
        return self.out((self.embedding(input_ids) * place[:, None]).sum(1))


def test_importance_of_a_linear_model_is_known():
    model, ids = Bag(3), torch.tensor([[3, 5, 7, 0], [2, 2, 4, 9]])
    target = torch.tensor([0, 2])
    found = gradient_importance(model, {"input_ids": ids}, target=target)
    place = torch.arange(1.0, 5)
    expected = model.out.weight[target].norm(dim=-1)[:, None] * place * (ids != 0)
    torch.testing.assert_close(found, expected)
    best = gradient_importance(model, {"input_ids": ids})
    chosen = model(ids).argmax(-1)
    torch.testing.assert_close(best, model.out.weight[chosen].norm(dim=-1)[:, None] * place * (ids != 0))


def test_the_model_is_left_alone_and_a_mask_counts():
    model, ids = Bag(1), torch.tensor([[3, 5, 7, 1]])
    mask = torch.tensor([[1, 1, 0, 0]])
    found = gradient_importance(model, {"input_ids": ids, "attention_mask": mask})
    assert (found[0, 2:] == 0).all() and (found[0, :2] > 0).all()
    assert all(p.grad is None for p in model.parameters()) and not model.embedding._forward_hooks


def test_a_difference_of_the_logit_agrees():
    torch.manual_seed(0)
    config = AttentionClassifierConfig(vocab_size=20, embedding_size=5, hidden_size=4, attention_size=4, num_labels=2)
    model = AttentionClassifier(config).double().eval()
    ids = torch.randint(1, 20, (1, 6))
    found = gradient_importance(model, {"input_ids": ids}, target=torch.tensor([1]))
    slope, step = torch.zeros(5, dtype=torch.float64), 1e-6
    for i in range(5):
        for sign in (1, -1):

            def moved(module, args, words, sign=sign, i=i):
                words = words.clone()
                words[0, 2, i] += sign * step
                return words

            handle = model.embedding.register_forward_hook(moved)
            with torch.no_grad():
                slope[i] += sign * model(ids).logits[0, 1] / (2 * step)
            handle.remove()
    assert float(slope.norm()) == pytest.approx(float(found[0, 2]), rel=1e-5)


def test_correlations_against_hand_made_rows():
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.4, 0.0], [0.25] * 4])
    importance = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 3, 2, 99], [1, 2, 3, 4]])
    mask = torch.tensor([[True] * 4, [True] * 4, [True, True, True, False], [True] * 4])
    found = attention_gradient_correlation(weights, importance, mask)
    torch.testing.assert_close(found.pearson[:2], torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(found.kendall[:3], torch.tensor([1.0, -1.0, 1.0]))
    assert 0.8 < found.pearson[2] < 1  # the padded 99 is not seen
    assert math.isnan(found.pearson[3]) and math.isnan(found.kendall[3])
    assert found.mean_kendall == pytest.approx(1 / 3)
    assert found.mean_pearson == pytest.approx(float(found.pearson[:3].mean()))


@pytest.mark.parametrize("rows", ["first", "last", "mean"])
def test_heads_of_a_classifier(rows):
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_labels": 3,
    }  # fmt: skip
    config = hf.BertConfig(**sizes)
    model = hf.BertForSequenceClassification(config).eval()
    ids = torch.randint(5, 64, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    scores = head_gradient_correlation(model, batch, rows=rows)
    importance = gradient_importance(model, batch)
    model.set_attn_implementation("eager")
    weights = model(**batch, output_attentions=True).attentions[1][:, 2]
    length = mask.sum(1)
    row = {
        "first": weights[:, 0],
        "last": weights[torch.arange(3), length - 1],
        "mean": (weights * mask[..., None]).sum(1) / length[:, None],
    }[rows]
    expected = attention_gradient_correlation(row.detach(), importance, mask.bool())
    found = {str(head): score for head, score in scores.of("gradient-pearson").items()}["1.2"]
    assert found == pytest.approx(expected.mean_pearson, abs=1e-4)
    assert len(scores.of("gradient-kendall")) == 8


def test_refusals():
    with pytest.raises(ValueError, match=r"weights \(1, 3\), importance \(1, 4\)"):
        attention_gradient_correlation(torch.zeros(1, 3), torch.zeros(1, 4))
    model = hf.BertForTokenClassification(
        hf.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match=r"logits are \(1, 3, 2\)"):
        gradient_importance(model, {"input_ids": torch.tensor([[5, 6, 7]])})
    with pytest.raises(ValueError, match="rows is 'cls'"):
        head_gradient_correlation(model, {"input_ids": torch.tensor([[5, 6, 7]])}, rows="cls")
