"""Sparsifiner's network: stages of training, pruning of tokens, weights of others, costs."""

import copy
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headwise.attention.sparsifiner import predictor_loss
from headwise.models.sparsifiner import SparsifinerConfig, SparsifinerViT, distillation_loss
from headwise.ops.counting import _FORMULAS


def network(**options) -> SparsifinerViT:
    torch.manual_seed(0)
    config = SparsifinerConfig.example()
    for name, value in options.items():
        setattr(config, name, value)
    return SparsifinerViT(config).eval()


def images(b=3):
    return torch.randn(b, 3, 16, 16)


def test_the_first_stage_leaves_features_and_backbone_alone():
    model, x = network(), images()
    model.set_mode("dense")
    dense = model(x).logits
    model.set_mode("predict")
    assert torch.equal(model(x).logits, dense)
    before = copy.deepcopy(model.state_dict())
    wanted = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in wanted} == {id(p) for p in model.predictor_parameters()}
    optimiser = torch.optim.AdamW(wanted, lr=1e-2)
    losses = []
    for _ in range(5):
        model.forward_features(x)
        loss = predictor_loss(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("mask_predictor" in name), name


def test_the_second_stage_leaves_predictors_alone():
    model, x = network(), images()
    teacher = copy.deepcopy(model).set_mode("dense")
    model.set_mode("sparse")
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = torch.tensor([0, 1, 2])
    for _ in range(2):
        optimiser.zero_grad()
        distillation_loss(model, teacher, x, labels).backward()
        optimiser.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("mask_predictor" in name), name


def test_distillation_is_its_three_terms():
    model, x, labels = network(), images(), torch.tensor([0, 1, 2])
    teacher = copy.deepcopy(model).set_mode("dense")
    same = copy.deepcopy(model).set_mode("dense")
    task = torch.nn.functional.cross_entropy(teacher(x).logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(distillation_loss(same, teacher, x, labels), task)
    with torch.no_grad():
        student, wanted = model.forward_features(x)[0], teacher.forward_features(x)[0]
        p, q = (model.head(part[:, 0]).softmax(-1) for part in (wanted, student))
        apart = (p * (p.log() - q.log())).sum() / 3
        error = (student[:, 1:] - wanted[:, 1:]).square().mean()
        task = torch.nn.functional.cross_entropy(model(x).logits, labels, label_smoothing=0.1)
    found = distillation_loss(model, teacher, x, labels)
    torch.testing.assert_close(found, task + 0.5 * apart + 0.5 * error, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_pruned_tokens_are_gone_and_the_strongest_stay(mode):
    model, x = network(token_keep=0.5, pruning_layers=[0]), images(2)
    model.set_mode(mode)
    tokens, positions = model.forward_features(x)
    assert tokens.shape[1] == positions.shape[1] == 9 and torch.equal(positions[:, 0], torch.zeros(2).long())
    whole = network()
    whole.set_mode(mode)
    block: Any = whole.blocks[0]
    first = whole.patch_embed.proj(x).flatten(2).mT
    first = torch.cat([whole.cls_token.expand(2, -1, -1), first], 1) + whole.pos_embed
    _, scores = block.attn.attend(block.norm1(first), scores=True)
    assert torch.equal(positions[:, 1:], scores.topk(8).indices.sort(-1).values + 1)


def test_pruning_to_everything_changes_nothing():
    model, x = network(token_keep=1.0, pruning_layers=[0, 1]), images()
    assert torch.equal(model(x).logits, network()(x).logits)
    assert [SparsifinerConfig(token_keep=0.7).patches_after(layer) for layer in (2, 3, 6, 11)] == [196, 138, 97, 68]


def test_a_dense_checkpoint_loads_and_another_is_refused():
    model, other = network(), network(hidden_size=32)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    state = {name: value for name, value in other.state_dict().items() if "mask_predictor" not in name}
    assert {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.1.mlp.fc2.bias",
    } < set(state)
    kept = model.blocks[0].attn.mask_predictor.proj_n.clone()  # pyright: ignore
    model.load_dense(state)
    assert torch.equal(model.head.weight, other.head.weight)
    assert torch.equal(model.blocks[0].attn.mask_predictor.proj_n, kept)  # pyright: ignore
    with pytest.raises(ValueError, match=r"missing \['norm\.weight'\]"):
        model.load_dense({name: value for name, value in state.items() if name != "norm.weight"})
    with pytest.raises(ValueError, match="unexpected"):
        model.load_dense(state | {"dist_token": torch.zeros(1)})


def test_names_of_predictors_are_the_official_ones():
    names = {name.split("mask_predictor.")[1] for name in network().state_dict() if "mask_predictor" in name}
    assert names == {"proj_c_q.weight", "proj_c_q.bias", "proj_c_k.weight", "proj_c_k.bias", "proj_n", "proj_back_n"}


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_counted_multiply_adds_are_the_formula(share):
    model = network(token_keep=share, pruning_layers=[0])
    model.set_mode("dense")
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter, torch.no_grad():
        model(images(1))
    scores = 2 * 17 * 32 * (share < 1)  # the class token's row, computed once more to rank the patches
    assert counter.get_total_flops() == 2 * model.products() + scores
    model.set_mode("sparse")
    assert model.products(density=1.0) > model.products(density=0.0)


def test_sizes_of_the_paper():
    with torch.device("meta"):
        model = SparsifinerViT(SparsifinerConfig.named("deit-s"))
    own = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.predictor_parameters())
    assert own == 22_050_664, "DeiT-S"
    assert sum(p.numel() for p in model.predictor_parameters()) == 12 * (2 * (64 * 32 + 32) + 2 * 197 * 32)
    assert model.attentions()[0].mask_predictor.budget == 50
    with pytest.raises(ValueError, match="deit-x"):
        SparsifinerConfig.named("deit-x")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\), expected \(3, 16, 16\)"):
        network()(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="token_keep 0"):
        SparsifinerConfig(token_keep=0.0)
