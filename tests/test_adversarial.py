"""Adversarial training: facts of the perturbation, on the paper's own model and on transformers' classifiers."""

import copy
import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AttentionInterface, Trainer, TrainingArguments
from transformers.models.bert.modeling_bert import eager_attention_forward

from headwise.adversarial import _toward_words, score_spread
from headwise.errors import UnsupportedModel
from headwise.models.attention_classifier import AttentionClassifier, AttentionClassifierConfig
from headwise.training import AttentionAT, WordAT

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_labels": 3, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
QUIET: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
SLIM: dict[str, Any] = {
    "vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "num_labels": 3, "dropout": 0.0,
    "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
}  # fmt: skip
CLASSIFIERS = {
    "bert": lambda **kw: hf.BertForSequenceClassification(hf.BertConfig(**{**SMALL, **QUIET, **kw})),
    "roberta": lambda **kw: hf.RobertaForSequenceClassification(hf.RobertaConfig(**{**SMALL, **QUIET, **kw})),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**SLIM)),
    "llama": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL, num_key_value_heads=2)),
}  # fmt: skip


def classifier(name: str = "bert", dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(0)
    model = CLASSIFIERS[name](**options).to(dtype).train()
    with torch.no_grad():  # attention that is not uniform
        for path, parameter in model.named_parameters():
            if any(part in path for part in ("query", "key", "q_lin", "k_lin", "q_proj", "k_proj", "classifier")):
                parameter.mul_(8)
    return model


def batch_of(size: int = 3, length: int = 9):
    torch.manual_seed(1)
    ids = torch.randint(5, 64, (size, length))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": torch.randint(3, (size,))}


def sentences(pair: bool = False, labels: int = 3):
    torch.manual_seed(0)
    config = AttentionClassifierConfig(
        vocab_size=40, embedding_size=6, hidden_size=5, attention_size=4, num_labels=labels, pair=pair
    )
    model = AttentionClassifier(config).double()
    ids = torch.randint(1, 40, (4, 8))
    ids[1, 5:] = 0
    batch = {"input_ids": ids, "labels": torch.randint(max(2, labels), (4,))}
    if pair:
        batch["query_ids"] = torch.randint(1, 40, (4, 3))
    return model, batch


def lengths(perturbation):
    return torch.stack([one.flatten(1).square().sum(1) for one in perturbation.values()]).sum(0).sqrt()


def step_of(name):
    """A small step; Llama's norms work in float32, whatever the model's dtype, so that a smaller one drowns."""
    return (1e-2, 3e-2) if name == "llama" else (1e-5, 2e-3)


def losses(model, batch):
    """Losses of single sentences."""
    return nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="none")


def flat(found):
    return torch.cat([one.flatten(1) for one in found.values()], 1)


# --- the perturbation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("mode", ["at", "iat", "random"])
def test_length_padding_and_sum(mode, pair):
    model, batch = sentences(pair)
    _, r = AttentionAT(model, eps=2.5, mode=mode).perturbation(lambda: model(**batch))
    assert set(r) == {(0, 0)}
    torch.testing.assert_close(lengths(r), torch.full((4,), 2.5, dtype=torch.float64))
    assert not r[0, 0][1, 0, 5:].any()
    if mode == "at":  # a constant on a row changes nothing, so the gradient has none
        torch.testing.assert_close(r[0, 0].sum(-1), torch.zeros(4, 1, dtype=torch.float64))


@pytest.mark.parametrize("name", list(CLASSIFIERS))
@pytest.mark.parametrize("mode", ["at", "iat", "random"])
def test_length_padding_and_sum_on_transformers(name, mode):
    model, batch = classifier(name), batch_of()
    _, r = AttentionAT(model, eps=0.7, mode=mode).perturbation(lambda: model(**batch))
    assert set(r) == {("", 0), ("", 1)} and r["", 1].shape == (3, 4, 9, 9)
    torch.testing.assert_close(lengths(r), torch.full((3,), 0.7, dtype=torch.float64))
    for one in r.values():
        assert not one[1, :, :, 6:].any()  # padding is not seen
        assert not one[1, :, 6:].any()  # and what it sees does not count
        if name == "llama":
            assert not one.triu(1).any()
        if mode == "at":
            torch.testing.assert_close(one.sum(-1), torch.zeros(3, 4, 9, dtype=torch.float64))


@pytest.mark.parametrize("name", ["own", "pair", *CLASSIFIERS])
@pytest.mark.parametrize("mode", ["at", "iat"])
def test_the_loss_rises_by_eps_times_the_gradient(name, mode):
    """First order, sentence by sentence; and so the sign: the released iAT is minus AT and would lower the loss."""
    model, batch = sentences(name == "pair") if name in ("own", "pair") else (classifier(name), batch_of())
    eps, tolerance = step_of(name)
    at = AttentionAT(model, eps=eps, mode=mode)
    _, r = at.perturbation(lambda: losses(model, batch).sum())
    with at.perturbed(r), torch.no_grad():
        raised = losses(model, batch)
    rise = raised - losses(model, batch).detach()
    plain = AttentionAT(model, eps=1.0)
    with plain._attached() as places:
        value = losses(model, batch).sum()
        gradient = torch.autograd.grad(value, list(places.leaves.values()))
    g, step = torch.cat([one.flatten(1) for one in gradient], 1), flat(r)
    torch.testing.assert_close(rise, (g * step).sum(1), rtol=tolerance, atol=1e-12)
    assert (rise > 0).all()
    if mode == "at":
        torch.testing.assert_close(rise, eps * g.norm(dim=1), rtol=tolerance, atol=1e-12)
    with at.perturbed({key: -one for key, one in r.items()}), torch.no_grad():
        lowered = losses(model, batch)
    assert (lowered < raised - rise).all()


def test_direction_does_not_depend_on_the_scale_of_the_loss_or_vanish():
    model, batch = sentences()
    at = AttentionAT(model, eps=1.0)
    _, r = at.perturbation(lambda: losses(model, batch).sum())
    for scale in (1e-200, 1e8):
        _, other = at.perturbation(lambda scale=scale: scale * losses(model, batch).sum())
        torch.testing.assert_close(other, r)


@pytest.mark.parametrize("mode", ["at", "iat"])
def test_no_gradient_gives_no_perturbation(mode):
    model, batch = sentences()
    nn.init.zeros_(model.classifier.weight)
    at = AttentionAT(model, eps=5.0, mode=mode)
    clean, r = at.perturbation(lambda: model(**batch))
    assert (r[0, 0] == 0).all()
    torch.testing.assert_close(at(lambda: model(**batch)).detach(), 2 * clean)


def test_a_sentence_of_padding_stays_finite():
    model, batch = sentences()
    batch["input_ids"][2] = 0
    for mode in ("at", "iat", "random"):
        at = AttentionAT(model, mode=mode)
        _, r = at.perturbation(lambda: model(**batch))
        assert torch.isfinite(r[0, 0]).all() and not r[0, 0][2].any()
        at(lambda: model(**batch)).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_an_empty_batch_has_an_empty_perturbation():
    model, batch = sentences()
    batch = {name: value[:0] for name, value in batch.items()}
    _, r = AttentionAT(model).perturbation(lambda: losses(model, batch).sum())
    assert r[0, 0].shape == (0, 1, 8)


# --- iAT ------------------------------------------------------------------------------------------------------------


def differences(a, normalise):
    """d_tk = a_t - a_k, normalised over the whole matrix or row by row."""
    d = a[:, :, None] - a[:, None, :]
    return d / (d.norm(dim=(1, 2), keepdim=True) if normalise == "matrix" else d.norm(dim=2, keepdim=True))


def by_autograd(model, batch, normalise, eps):
    """iAT from its definition: a gradient for every alpha_tk, and the sum that it gives."""
    kept = []
    point = model.attention.score_point
    handle = point.register_forward_hook(lambda module, args, scores: kept.append(scores.detach()))
    losses(model, batch)
    handle.remove()
    a = kept[0][:, 0]
    d = differences(a, normalise)
    alpha = torch.zeros_like(d, requires_grad=True)
    handle = point.register_forward_hook(lambda module, args, scores: scores + (alpha * d).sum(2)[:, None])
    (g,) = torch.autograd.grad(losses(model, batch).sum(), alpha)
    handle.remove()
    best = eps * g / g.flatten(1).norm(dim=1)[:, None, None]
    return (best * d).sum(2)


def test_iat_is_its_definition_with_the_matrix_normalised_once():
    model, batch = sentences()
    batch["input_ids"][1, 5:] = 7  # the definition here knows no padding
    _, r = AttentionAT(model, eps=2.0, mode="iat").perturbation(lambda: losses(model, batch).sum())
    expected = by_autograd(model, batch, "matrix", 2.0)
    expected = 2.0 * expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(r[0, 0][:, 0], expected)
    _, at = AttentionAT(model, eps=2.0).perturbation(lambda: losses(model, batch).sum())
    assert (nn.functional.cosine_similarity(r[0, 0], at[0, 0], dim=-1) < 0.9999).all()


def test_iat_with_rows_normalised_is_at():
    model, batch = sentences()
    batch["input_ids"][1, 5:] = 7
    _, at = AttentionAT(model, eps=2.0).perturbation(lambda: losses(model, batch).sum())
    torch.testing.assert_close(by_autograd(model, batch, "row", 2.0), at[0, 0][:, 0])


def test_spread_counts_differences():
    a = torch.tensor([[1.0, 4.0, -2.0, -torch.inf], [0.0, 0.0, 0.0, 0.0], [-torch.inf] * 4, [1e30, 0.0, 0.0, 0.0]])
    found = score_spread(a)
    expected = torch.tensor([0.0 + 9 + 9, 9 + 0 + 36, 9 + 36 + 0, 0]) / 108
    torch.testing.assert_close(found[0], expected)
    assert (found[1:3] == 0).all()
    torch.testing.assert_close(found[3], torch.tensor([3, 1, 1, 1]) / 6)


def test_iat_on_transformers_uses_the_scores_of_its_rows():
    model, batch = classifier("bert"), batch_of()
    at, iat = AttentionAT(model, heads="1.2"), AttentionAT(model, heads="1.2", mode="iat")
    g, r = (one.perturbation(lambda: losses(model, batch).sum())[1]["", 1] for one in (at, iat))
    model.set_attn_implementation("eager")
    weights = model(**batch, output_attentions=True).attentions[1][:, 2:3]
    expected = g * score_spread(weights.log())
    expected = expected / expected.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(r, expected)


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_with_leaf():
    """Eager attention with a leaf added to the scores of one layer: what the perturbation's gradient must equal."""
    box: dict = {}

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        if module is box["module"]:
            attention_mask = box["leaf"] + (0 if attention_mask is None else attention_mask)
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)

    AttentionInterface.register("eager-with-leaf", attention)
    hf.AttentionMaskInterface.register("eager-with-leaf", hf.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return box


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows", ["each", "shared"])
def test_the_gradient_is_that_of_eager_attention(eager_with_leaf, dtype, tolerance, rows):
    model, batch = classifier("bert", dtype), batch_of()
    at = AttentionAT(model, heads="1.0,1.3", rows=rows)
    with at._attached() as places:
        value = losses(model, batch).sum()
        (found,) = torch.autograd.grad(value, list(places.leaves.values()))
    model.set_attn_implementation("eager-with-leaf")
    eager_with_leaf["module"] = model.bert.encoder.layer[1].attention.self
    leaf = torch.zeros(3, 4, 9 if rows == "each" else 1, 9, dtype=dtype, requires_grad=True)
    eager_with_leaf["leaf"] = leaf
    (expected,) = torch.autograd.grad(losses(model, batch).sum(), leaf)
    expected = expected[:, [0, 3]]
    assert found.shape == expected.shape and expected.abs().max() > 1e-5
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


def test_long_rows_in_blocks_have_the_same_gradient(eager_with_leaf):
    model, batch = classifier("bert", max_position_embeddings=200), batch_of(2, 150)
    at = AttentionAT(model, heads="0.*", mode="iat")
    _, r = at.perturbation(lambda: losses(model, batch).sum())
    model.set_attn_implementation("eager-with-leaf")
    eager_with_leaf["module"] = model.bert.encoder.layer[0].attention.self
    leaf = torch.zeros(2, 4, 150, 150, dtype=torch.float64, requires_grad=True)
    eager_with_leaf["leaf"] = leaf
    (g,) = torch.autograd.grad(losses(model, batch).sum(), leaf)
    model.set_attn_implementation("eager")
    weights = model(**batch, output_attentions=True).attentions[0]
    expected = g * score_spread(weights.log())
    expected = expected / expected.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(r["", 0], expected)


@pytest.mark.parametrize("name", ["own", "pair", *CLASSIFIERS])
@pytest.mark.parametrize("mode", ["at", "iat"])
def test_eps_zero_is_one_plus_lambda_times_the_loss(name, mode):
    model, batch = sentences(name == "pair") if name in ("own", "pair") else (classifier(name), batch_of())
    plain = model(**batch).loss
    expected = torch.autograd.grad(plain, list(model.parameters()), allow_unused=True)
    total = AttentionAT(model, eps=0.0, lam=0.5, mode=mode)(lambda: model(**batch))
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(total, 1.5 * plain)
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, 1.5 * other, atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("name", ["own", "bert"])
def test_the_total_is_the_clean_loss_and_that_of_a_constant_perturbation(name):
    model, batch = sentences() if name == "own" else (classifier(name), batch_of())
    at = AttentionAT(model, eps=1.5, lam=0.3)
    total = at(lambda: model(**batch))
    total.backward()
    found = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    clean, r = at.perturbation(lambda: model(**batch))
    assert not any(one.requires_grad for one in r.values())
    with at.perturbed(r):
        adversarial = model(**batch).loss
    again = model(**batch).loss + 0.3 * adversarial
    torch.testing.assert_close(total, again)
    assert adversarial > clean
    again.backward()
    for path, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, found[path], atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("kind", [AttentionAT, WordAT])
def test_gradients_accumulate_and_nothing_is_left_behind(kind):
    model, batch = classifier("bert"), batch_of()
    at = kind(model, eps=1.0)
    at(lambda: model(**batch)).backward()
    once = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
    at(lambda: model(**batch)).backward()
    for path, gradient in once.items():
        torch.testing.assert_close(model.get_parameter(path).grad, 2 * gradient, atol=1e-10, rtol=1e-6)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules()) and all(m.training for m in model.modules())


def test_after_an_exception_the_model_is_as_before():
    model, batch = classifier("bert"), batch_of()
    with pytest.raises(RuntimeError, match="on purpose"):
        AttentionAT(model)(lambda: (model(**batch), (_ for _ in ()).throw(RuntimeError("on purpose")))[0])
    assert model.config._attn_implementation == "sdpa" and all(m.training for m in model.modules())


def test_the_encoder_need_not_run_twice():
    model, batch = sentences()
    calls = []
    model.encoder.register_forward_hook(lambda *args: calls.append(1))
    encoded = model.encode(batch["input_ids"])
    shared = AttentionAT(model)(lambda: model(encoded=encoded, labels=batch["labels"]))
    assert len(calls) == 1
    shared.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    apart = AttentionAT(model)(lambda: model(**batch))
    torch.testing.assert_close(apart, shared)
    apart.backward()
    for one, other in zip(found, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_is_drawn_once_for_both_passes():
    model = classifier("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.5, classifier_dropout=0.4)
    batch, seen = batch_of(), []
    model.dropout.register_forward_hook(lambda module, args, out: seen.append(out == 0))
    torch.manual_seed(3)
    total = AttentionAT(model, eps=0.0)(lambda: model(**batch))
    after = torch.rand(1)
    assert seen[0].any() and torch.equal(*seen)
    torch.manual_seed(3)
    for layer in model.bert.encoder.layer:
        layer.attention.self.training = False  # dropout on weights is off where they are perturbed
    torch.testing.assert_close(total, 2 * model(**batch).loss)
    assert torch.equal(torch.rand(1), after)  # and the next step draws others
    noise = AttentionAT(model, mode="random")
    first, second = (flat(noise.perturbation(lambda: model(**batch))[1]) for _ in range(2))
    assert not torch.equal(first, second)


def test_dropout_stays_on_in_layers_that_are_not_perturbed():
    model, batch = classifier("bert", attention_probs_dropout_prob=0.5), batch_of()
    at = AttentionAT(model, eps=0.0, heads="1.*")
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        values.append(float(at(lambda: model(**batch)).detach()))
    assert values[0] != values[1]


def test_without_gradients_it_is_the_plain_loss_and_evaluation_mode_trains():
    model, batch = classifier("bert").eval(), batch_of()
    at = AttentionAT(model, eps=1.0)
    with torch.no_grad():
        assert torch.equal(at(lambda: model(**batch)), model(**batch).loss)
    total = at(lambda: model(**batch))
    assert total > 2 * model(**batch).loss and not model.training
    total.backward()


@pytest.mark.parametrize("kind", [AttentionAT, WordAT])
@pytest.mark.parametrize("name", ["own", "bert"])
def test_autocast(kind, name):
    model, batch = sentences() if name == "own" else (classifier(name), batch_of())
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        at = kind(model, eps=1.0)
        _, r = at.perturbation(lambda: model(**batch))
        total = at(lambda: model(**batch))
    torch.testing.assert_close(lengths(r), torch.ones_like(lengths(r)))
    torch.testing.assert_close(total.float(), at(lambda: model(**batch)), rtol=0.05, atol=0.05)
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


class AdversarialTrainer(Trainer):
    """As in the docstring of `AttentionAT`."""

    def __init__(self, *args, eps: float, **kwargs):
        super().__init__(*args, **kwargs)
        trained: Any = self.model
        self.adversarial = AttentionAT(trained, eps=eps)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        kept = []

        def run():
            kept.append(super(AdversarialTrainer, self).compute_loss(model, inputs, True, **kwargs))
            return kept[-1][0]

        loss = self.adversarial(run)
        return (loss, kept[0][1]) if return_outputs else loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_under_the_trainer(tmp_path, accumulate):
    """With eps 0 the total is twice the loss: the steps of the plain Trainer at twice the learning rate."""
    data = [{name: value[i] for name, value in batch_of(8).items()} for i in range(8)]

    def trained(cls, rate, **options):
        model = classifier("bert")
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate,
            max_steps=2, learning_rate=rate, optim="sgd", max_grad_norm=0, weight_decay=0.0, report_to=[],
            save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
            lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = cls(model, arguments, train_dataset=data, eval_dataset=data, **options)
        trainer.train()
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    plain = trained(Trainer, 0.02)
    still = trained(AdversarialTrainer, 0.01, eps=0.0)
    moved = trained(AdversarialTrainer, 0.01, eps=1.0)
    torch.testing.assert_close(still, plain, atol=1e-12, rtol=1e-9)
    assert (moved - plain).abs().max() > 1e-6


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["at", "iat", "random"])
@pytest.mark.parametrize("name", ["own", "bert"])
def test_word_perturbations(name, mode):
    model, batch = sentences() if name == "own" else (classifier(name), batch_of())
    at = WordAT(model, eps=1e-4, mode=mode)
    _, r = at.perturbation(lambda: losses(model, batch).sum())
    torch.testing.assert_close(lengths(r), torch.full((len(batch["labels"]),), 1e-4, dtype=torch.float64))
    assert not r[0, 0][1, -2:].any()
    with at.perturbed(r), torch.no_grad():
        raised = losses(model, batch)
    rise = raised - losses(model, batch).detach()
    assert (rise > 0).all() if mode != "random" else rise.any()


def test_word_iat_is_its_definition():
    table, words, g = (torch.randn(*shape, dtype=torch.float64) for shape in ((11, 5), (2, 3, 5), (2, 3, 5)))
    words[0, 0] = table[4]  # a word has no direction to itself
    expected = torch.zeros_like(words)
    for b in range(2):
        for t in range(3):
            for k in range(11):
                d = table[k] - words[b, t]
                if d.norm() > 0:
                    d = d / d.norm()
                    expected[b, t] += (g[b, t] @ d) * d
    torch.testing.assert_close(_toward_words(g, words, table), expected)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AttentionAT, WordAT])
@pytest.mark.parametrize("argument", ["eps", "lam"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_lengths_and_weights_must_be_numbers(kind, argument, value):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {argument} is {value}; give a finite number"):
        kind(sentences()[0], **{argument: value})


def test_refusals_say_what_to_do():
    model, batch = sentences()
    with pytest.raises(ValueError, match="mode is 'both'"):
        AttentionAT(model, mode="both")
    with pytest.raises(ValueError, match=r"heads is '0\.\*', but this model's attention is reached by its 1 score"):
        AttentionAT(model, heads="0.*")
    bert = classifier("bert")
    with pytest.raises(ValueError, match="rows is 'some'"):
        AttentionAT(bert, rows="some")
    with pytest.raises(ValueError, match="use rows='each'"):
        AttentionAT(bert, rows="shared", mode="iat")
    with pytest.raises(ValueError, match="5"):
        AttentionAT(bert, heads="5.0")
    with pytest.raises(UnsupportedModel):
        AttentionAT(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Sequential has no input embedding"):
        WordAT(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="no attention of the chosen heads ran"):
        AttentionAT(model)(lambda: torch.zeros((), requires_grad=True))
    with pytest.raises(ValueError, match="the loss is SequenceClassifierOutput"):
        AttentionAT(model)(lambda: model(batch["input_ids"]))
    with pytest.raises(ValueError, match=r"the loss is a tensor \(4,\)"):
        AttentionAT(model)(lambda: losses(model, batch))
    with pytest.raises(ValueError, match="the loss has no gradient"):
        AttentionAT(model)(lambda: model(**batch).loss.detach())
    bert.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing runs layers again"):
        AttentionAT(bert)


def test_a_copy_trains_to_a_lower_adversarial_loss():
    model, batch = sentences()
    before = copy.deepcopy(model)
    at = AttentionAT(model, eps=2.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimiser.zero_grad()
        at(lambda: model(**batch)).backward()
        optimiser.step()
    assert at(lambda: model(**batch)) < 0.5 * AttentionAT(before, eps=2.0)(lambda: before(**batch))
