"""DualCrossAttention: branches, weights, selection, loss, refusals. Saving and loading are the contract's."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DeiTConfig, DeiTModel, ViTConfig, ViTForImageClassification, ViTModel
from transformers.models.dinov2_with_registers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import headwise as hw
from headwise.attend import Ablate
from headwise.attention.dual_cross import attention_rollout, top_response_tokens
from headwise.errors import UnsupportedModel
from headwise.models import DualCrossAttention, DualCrossAttentionConfig
from headwise.models.dual_cross_attention import GlobalLocalBlock, UncertaintyWeights

FIXTURE = Path(__file__).parents[1] / "fixtures" / "timm_vit.safetensors"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0])


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**SIZES, **options))


def model(backbone: Any = None, **options: Any) -> Any:
    options = {"local_ratio": 0.3, "readout": "mean", **options}
    return DualCrossAttention(vit() if backbone is None else backbone, 5, **options).eval()


def test_one_block_read_by_its_class_token_ignores_the_selection():
    """The paper's form: no query reads another one, so only the mean of the tokens tells which were selected."""
    scores = {}
    for readout in ("class", "mean"):
        for selection in ("rollout", "random"):
            torch.manual_seed(0)
            made = model(readout=readout, selection=selection)
            torch.manual_seed(7)
            scores[readout, selection] = made(X).branch_logits["local"]
    assert torch.equal(scores["class", "rollout"], scores["class", "random"])
    assert not torch.allclose(scores["mean", "rollout"], scores["mean", "random"], atol=1e-3)
    made = model(readout="class")
    tokens, _ = made._trunk.run(X, None, False, {})
    index = torch.tensor([[0, 3, 9]] * 4)
    whole = made.local_norm(made.local_blocks[0](tokens, index)[:, 0])
    torch.testing.assert_close(made(X).features[:, 32:], whole)
    assert made(X).selected.tolist() == [[0]] * 4 and model(readout="class", glca_layers=2)(X).selected.shape == (4, 6)


def test_the_mean_of_the_local_tokens():
    made = model()
    index = made(X).selected
    tokens, _ = made._trunk.run(X, None, False, {})
    expected = made.local_norm(made.local_blocks[0](tokens, index).mean(1))
    torch.testing.assert_close(made(X).features[:, 32:], expected)


def test_the_self_branch_is_the_backbone():
    backbone = vit().eval()
    tokens = backbone(X).last_hidden_state[:, 0]
    wrapped = model(backbone)
    out = wrapped(X)
    torch.testing.assert_close(out.branch_logits["self"], wrapped.classifier(tokens))
    torch.testing.assert_close(out.features[:, :32], tokens)
    assert out.features.shape == (4, 64) and set(out.branch_logits) == {"self", "local"} and out.loss is None


def test_pairs_by_hand():
    """The pair branch against a second forward whose attention is written out for every image."""
    wrapped = model(glca_layers=0)
    partner = torch.tensor([2, 0, 3, 1])
    x = wrapped.backbone.embeddings(X)
    for layer in wrapped.backbone.layers:
        n, attn = layer.layernorm_before(x), layer.attention
        q, k, v = (proj(n).view(4, 17, 4, 8).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        keys, values = torch.cat([k, k[partner]], 2), torch.cat([v, v[partner]], 2)
        heads = (q @ keys.mT * 8**-0.5).softmax(-1) @ values
        x = x + attn.o_proj(heads.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layernorm_after(x))
    expected = wrapped.classifier(wrapped.backbone.layernorm(x)[:, 0])
    out = wrapped(X, partner=partner)
    torch.testing.assert_close(out.branch_logits["pair"], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out.branch_logits["self"], expected, atol=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_paired_with_itself_and_without_a_trace(implementation):
    backbone = vit()
    backbone.set_attn_implementation(implementation)
    wrapped = model(backbone)
    plain = wrapped(X)
    itself = wrapped(X, partner=torch.arange(4))
    assert float((itself.branch_logits["pair"] - itself.branch_logits["self"]).detach().abs().max()) <= 1e-5
    wrapped(X, partner=torch.tensor([1, 0, 3, 2]))
    assert torch.equal(wrapped(X).logits, plain.logits)
    assert backbone.config._attn_implementation == implementation
    wrapped.config.pwca = False
    assert torch.equal(wrapped(X).branch_logits["self"], plain.branch_logits["self"])


def test_the_selection_is_that_of_the_whole_rollout():
    backbone = vit()
    backbone.set_attn_implementation("eager")
    maps = backbone.eval()(X, output_attentions=True).attentions
    wrapped = model(backbone)
    rollout = attention_rollout(maps)
    torch.testing.assert_close(wrapped.responses(X), rollout[:, 0, 1:])
    chosen = wrapped(X).selected
    assert torch.equal(chosen[:, 1:], top_response_tokens(rollout, 0.3)) and not chosen[:, 0].any()
    assert chosen.shape == (4, 1 + math.ceil(0.3 * 16))
    last = model(backbone, selection="last")(X).selected
    assert torch.equal(last[:, 1:], top_response_tokens(maps[-1].mean(1)[:, 0], 0.3))
    assert not torch.equal(last, chosen)
    random = model(backbone, selection="random")
    assert not torch.equal(random(X).selected, random(X).selected)


def test_local_block_with_the_layers_weights_gives_the_layers_rows():
    """GLCA at ratio 1 with SA's weights is the SA block, and at a smaller ratio its rows."""
    layer = vit().eval().layers[1]
    block = GlobalLocalBlock(32, 4, 48, eps=1e-12)
    attn = layer.attention
    with torch.no_grad():
        block.norm1.load_state_dict(layer.layernorm_before.state_dict())
        block.norm2.load_state_dict(layer.layernorm_after.state_dict())
        for name in ("weight", "bias"):
            parts = [getattr(proj, name) for proj in (attn.q_proj, attn.k_proj, attn.v_proj)]
            getattr(block.attn.qkv, name).copy_(torch.cat(parts))
        block.attn.proj.load_state_dict(attn.o_proj.state_dict())
        block.mlp[0].load_state_dict(layer.mlp.fc1.state_dict())
        block.mlp[2].load_state_dict(layer.mlp.fc2.state_dict())
    x = torch.randn(2, 17, 32)
    whole = layer(x)
    torch.testing.assert_close(block(x, torch.arange(17).expand(2, 17)), whole, atol=1e-5, rtol=1e-5)
    index = torch.tensor([[0, 3, 16], [0, 1, 2]])
    rows = whole.gather(1, index[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(block(x, index), rows, atol=1e-5, rtol=1e-5)


def test_probabilities_are_added_not_scores():
    out = model()(X)
    expected = (out.branch_logits["self"].softmax(-1) + out.branch_logits["local"].softmax(-1)) / 2
    torch.testing.assert_close(out.logits.softmax(-1), expected)
    added = (out.branch_logits["self"] + out.branch_logits["local"]).softmax(-1)
    assert not torch.allclose(out.logits.softmax(-1), added)
    alone = model(glca_layers=0)(X)
    assert torch.equal(alone.logits, alone.branch_logits["self"])


def test_the_loss_is_weighted_by_learned_uncertainties():
    wrapped = model().train()
    with torch.no_grad():
        wrapped.loss_weights.log_variance.copy_(torch.tensor([0.5, -1.0, 2.0]))
    partner = torch.tensor([1, 2, 3, 0])
    out = wrapped(X, labels=Y, partner=partner)
    losses = [nn.functional.cross_entropy(out.branch_logits[name], Y) for name in ("self", "local", "pair")]
    w = wrapped.loss_weights.log_variance
    torch.testing.assert_close(out.loss, 0.5 * sum(torch.exp(-w[i]) * losses[i] + w[i] for i in range(3)))
    out.loss.backward()
    torch.testing.assert_close(w.grad, 0.5 * (1 - torch.exp(-w) * torch.stack(losses)).detach())
    assert model(glca_layers=0, pwca=False).loss_weights is None


def test_uncertainty_weights_stop_at_their_bound():
    weights = UncertaintyWeights(("self",), bound=2.0)
    with torch.no_grad():
        weights.log_variance.fill_(-9.0)
    loss = weights({"self": torch.tensor(0.0)})
    assert loss.item() == -1.0 and not torch.autograd.grad(loss, weights.log_variance)[0].any()
    with pytest.raises(ValueError, match="'pair' has no weight"):
        weights({"pair": torch.tensor(0.0)})


def test_identities_add_the_triplet_loss_of_each_branch():
    from headwise.ops.triplets import batch_hard_triplet

    wrapped = model(objective="reidentification", pwca=False)
    out = wrapped(X, labels=Y)
    each = [
        nn.functional.cross_entropy(out.branch_logits[name], Y) + batch_hard_triplet(part, Y)
        for name, part in zip(("self", "local"), out.features.chunk(2, 1), strict=True)
    ]
    torch.testing.assert_close(out.loss, 0.5 * (each[0] + each[1]))


def test_every_parameter_learns_and_pairs_are_drawn_in_training():
    wrapped = model().train()
    out = wrapped(X, labels=Y)
    assert set(out.branch_logits) == {"self", "local", "pair"}
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapped.parameters())
    torch.manual_seed(5)
    first = wrapped(X).branch_logits["pair"]
    torch.manual_seed(5)
    assert torch.equal(wrapped(X, partner=torch.randperm(4)).branch_logits["pair"], first)


def test_local_weights_are_its_own():
    wrapped = model()
    own = {id(p) for p in wrapped.local_blocks.parameters()} | {id(p) for p in wrapped.local_classifier.parameters()}
    assert not own & {id(p) for p in wrapped.backbone.parameters()} | own & {
        id(p) for p in wrapped.classifier.parameters()
    }


def test_two_local_layers_read_what_the_first_wrote():
    wrapped = model(glca_layers=2, readout="class")
    index = wrapped(X).selected
    tokens, _ = wrapped._trunk.run(X, None, False, {})
    first = wrapped.local_blocks[0](tokens, index)
    for item, row in enumerate(index):
        tokens[item, row] = first[item]
    expected = wrapped.local_norm(wrapped.local_blocks[1](tokens, index)[:, 0])
    torch.testing.assert_close(wrapped(X).features[:, 32:], expected)


def test_parameters_of_deit_tiny():
    config = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    with torch.device("meta"):
        counts = []
        for layers in (0, 1):
            inner: Any = ViTModel(config)
            made = DualCrossAttention(inner, 200, glca_layers=layers, pwca=False)
            counts.append(sum(p.numel() for name, p in made.named_parameters() if "loss_weights" not in name))
    assert counts[1] - counts[0] == 444_864 + 384 + 38_600 == 483_848


def test_a_trained_classifier_is_kept():
    torch.manual_seed(0)
    classes: dict[str, Any] = {"num_labels": 5}
    trained = ViTForImageClassification(ViTConfig(**SIZES, **classes)).eval()
    logits = trained(X).logits
    torch.testing.assert_close(DualCrossAttention(trained).eval()(X).branch_logits["self"], logits)
    other = DualCrossAttention(trained, 7)
    assert other.classifier.out_features == 7


def test_distillation_and_register_tokens_are_not_selected():
    deit: Any = DeiTModel(DeiTConfig(**SIZES))
    chosen = model(deit, local_ratio=1.0)(X).selected
    assert chosen.tolist() == [[0, *range(2, 18)]] * 4
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    dino: Any = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=3))
    wrapped = model(dino, local_ratio=1.0)
    assert wrapped(X).selected.tolist() == [[0, *range(4, 20)]] * 4
    itself = wrapped(X, partner=torch.arange(4)).branch_logits
    torch.testing.assert_close(itself["pair"], itself["self"], atol=1e-4, rtol=1e-4)


def test_a_saved_network_comes_back_with_its_backbone(tmp_path):
    wrapped = model(selection="last", objective="reidentification")
    wrapped.save_pretrained(tmp_path)
    again: Any = DualCrossAttention.from_pretrained(tmp_path).eval()
    assert isinstance(again.config.backbone_config, ViTConfig) and again.config.selection == "last"
    assert torch.equal(again(X).features, wrapped(X).features)


def test_images_of_another_size():
    wrapped, larger = model(), torch.randn(2, 3, 24, 16)
    out = wrapped(larger, interpolate_pos_encoding=True)
    assert out.selected.shape == (2, 1 + math.ceil(0.3 * 24)) and out.logits.isfinite().all()


def test_heads_of_the_local_block_and_of_the_backbone_are_edited():
    wrapped = model()
    plain = wrapped(X)
    with hw.steer(wrapped, Ablate(heads="0.1", mode="zero")):
        cut = wrapped(X)
    assert torch.equal(cut.branch_logits["self"], plain.branch_logits["self"])
    assert not torch.allclose(cut.branch_logits["local"], plain.branch_logits["local"])
    with hw.steer(wrapped.backbone, Ablate(heads="1.2", mode="zero")):
        cut = wrapped(X)
        assert not torch.allclose(cut.branch_logits["self"], plain.branch_logits["self"])
        with pytest.raises(RuntimeError, match="probes or edits are open"):
            wrapped(X, partner=torch.arange(4))
    assert torch.equal(wrapped(X).logits, plain.logits)


# A network with the parts of timm's VisionTransformer, by the same names


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = 4, 8**-0.5
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.q_norm, self.k_norm, self.proj_drop = nn.LayerNorm(8, 1e-6), nn.LayerNorm(8, 1e-6), nn.Identity()
        self.attn_drop = nn.Dropout(0.0)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(32, 1e-6), nn.LayerNorm(32, 1e-6), Attention()
        self.ls1, self.ls2, self.mlp = Scale(), Scale(), Mlp()
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).mT


class TimmLike(nn.Module):
    """The modules, and no forward: DualCrossAttention runs them."""

    def __init__(self, prefix: int = 1) -> None:
        super().__init__()
        self.num_prefix_tokens, self.embed_dim, self.num_classes = prefix, 32, 5
        self.patch_embed = Patches()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.patch_drop, self.norm_pre, self.norm = nn.Identity(), nn.Identity(), nn.LayerNorm(32, 1e-6)
        self.cls_token = nn.Parameter(torch.randn(1, prefix, 32))
        self.pos_embed = nn.Parameter(torch.randn(1, prefix + 16, 32))
        self.head = nn.Linear(32, 5)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed


def test_timms_network_gives_timms_scores():
    fixture = load_file(FIXTURE)
    network = TimmLike().eval()
    network.load_state_dict(
        {name.removeprefix("state."): x for name, x in fixture.items() if name.startswith("state.")}
    )
    images, scores = fixture["images"], fixture["scores"]
    wrapped: Any = DualCrossAttention(network, local_ratio=0.3).eval()
    out = wrapped(images, labels=Y[:3], partner=torch.arange(3))
    torch.testing.assert_close(out.branch_logits["self"], scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.branch_logits["pair"], scores, atol=1e-5, rtol=1e-4)
    mixed = wrapped(images, partner=torch.tensor([1, 2, 0])).branch_logits["pair"]
    assert not torch.allclose(mixed, scores, atol=1e-3)
    out.loss.backward()
    with pytest.raises(UnsupportedModel, match="save the state_dict"):
        wrapped.save_pretrained("nowhere")


def test_all_prefix_tokens_of_timm_are_left_out():
    assert (
        DualCrossAttention(TimmLike(2), local_ratio=1.0, readout="mean")(X).selected.tolist()
        == [[0, *range(2, 18)]] * 4
    )


# Refusals


def test_backbones_that_do_not_fit_are_refused():
    with pytest.raises(UnsupportedModel, match="no class token"):
        DualCrossAttention(TimmLike(0))
    with pytest.raises(UnsupportedModel, match="the backbone is Linear"):
        DualCrossAttention(nn.Linear(2, 2), 3)
    odd = TimmLike()
    del odd.blocks[1].ls2
    with pytest.raises(UnsupportedModel, match="no ls2"):
        DualCrossAttention(odd)
    from transformers import SwinConfig, SwinModel

    swin: Any = SwinModel(SwinConfig(image_size=32, embed_dim=16, depths=[1], num_heads=[2], window_size=4))
    with pytest.raises(UnsupportedModel, match="SwinModel has no class token"):
        DualCrossAttention(swin, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"local_ratio": 0.0}, "local_ratio is 0.0"),
        ({"local_ratio": 1.5}, "local_ratio is 1.5"),
        ({"selection": "first"}, "'first'"),
        ({"objective": "triplet"}, "'triplet'"),
        ({"readout": "max"}, "'max'"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        model(**options)


def test_partners_that_do_not_fit_are_refused():
    for partner in ([0, 1, 2, 4], [0, 0, 1, 2]):
        with pytest.raises(ValueError, match="partner"):
            model()(X, partner=torch.tensor(partner))
    with pytest.raises(ValueError, match="pwca is False"):
        model(pwca=False)(X, partner=torch.arange(4))


def test_a_batch_of_one_is_said_to_learn_nothing_from_pairs():
    with pytest.warns(UserWarning, match="a batch of one image is paired with itself"):
        model().train()(X[:1])


def test_checkpointed_gradients_are_refused():
    wrapped = model().train()
    wrapped.backbone.activation_checkpointing_enable()
    with pytest.raises(UnsupportedModel, match="activation_checkpointing_disable"):
        wrapped(X)


def test_a_config_and_options_at_once_are_refused():
    with pytest.raises(TypeError, match="a config is given"):
        DualCrossAttention(DualCrossAttentionConfig.example(), 5)
    with pytest.raises(UnsupportedModel, match="no backbone_config"):
        DualCrossAttention(DualCrossAttentionConfig())


def test_a_failing_forward_leaves_the_backbone_as_it_was():
    wrapped = model()
    before = copy.deepcopy(wrapped.backbone.config._attn_implementation)
    with pytest.raises(ValueError, match="doesn't match"):
        wrapped(torch.randn(2, 3, 20, 16), partner=torch.arange(2))
    assert wrapped.backbone.config._attn_implementation == before
    assert not wrapped.backbone.layernorm._forward_pre_hooks
    wrapped(X, partner=torch.arange(4))
