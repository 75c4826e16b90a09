"""Sparsifiner inside trained vision transformers: the same weights, predictors beside them, two stages."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.models_under_test import tiny_llama

import headwise as hw
from headwise.attend.edits import ScaleHeads
from headwise.attend.probes import Sink
from headwise.attention.sparsifiner import SparsifinerAttention
from headwise.errors import UnsupportedModel
from headwise.models.convert_sparsifiner import connectivity_loss, set_connectivity
from headwise.models.small_vit import SmallViT, SmallViTConfig

SMALL: Any = {"token_reduction": 2, "coef_topk": 4}


def vit(seed: int = 0) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.3)).eval()


def images(b: int = 3) -> torch.Tensor:
    return torch.randn(b, 3, 16, 16)


def logits(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=x).logits


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_keeping_every_key_changes_nothing(base):
    model, x = vit(), images()
    model.set_attn_implementation(base)
    plain = logits(model, x)
    hw.convert(model, to="sparsifiner", keep=1.0, **SMALL)
    torch.testing.assert_close(logits(model, x), plain, atol=1e-5, rtol=1e-5)


def test_it_is_the_module_of_the_same_weights():
    model, x = vit(), images()
    hw.convert(model, to="sparsifiner", keep=0.25, **SMALL)
    attention, kept = model.vit.layers[0].attention if hasattr(model.vit, "layers") else first_attention(model), {}
    for weight in (attention.connectivity.proj_n, attention.connectivity.proj_back_n):
        torch.nn.init.normal_(weight, std=0.3)
    hook = attention.register_forward_hook(lambda m, args, out: kept.update(x=args[0], out=out[0]))
    logits(model, x)
    hook.remove()
    twin = SparsifinerAttention(32, 4, 17, keep=0.25, **SMALL)
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        twin.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        twin.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
    twin.proj.load_state_dict(attention.o_proj.state_dict())
    twin.mask_predictor.load_state_dict(attention.connectivity.state_dict())
    torch.testing.assert_close(twin(kept["x"]), kept["out"], atol=1e-5, rtol=1e-4)


def first_attention(model: Any) -> Any:
    return next(part for part in model.modules() if hasattr(part, "connectivity"))


def test_two_stages_and_the_state(tmp_path):
    model, x = vit(), images()
    plain = logits(model, x)
    hw.convert(model, to="sparsifiner", **SMALL)
    set_connectivity(model, "predict")
    assert torch.equal(logits(model, x), plain), "attention stays dense"
    wanted = [p for p in model.parameters() if p.requires_grad]
    assert {n.split("connectivity.")[1] for n, p in model.named_parameters() if p.requires_grad} == {
        "proj_c_q.weight", "proj_c_q.bias", "proj_c_k.weight", "proj_c_k.bias", "proj_n", "proj_back_n"
    }  # fmt: skip
    optimiser = torch.optim.AdamW(wanted, lr=1e-2)
    losses = []
    for _ in range(6):
        model(pixel_values=x)
        loss = connectivity_loss(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    copy.deepcopy(model)
    set_connectivity(model, "sparse")
    assert not any("connectivity" in n for n, p in model.named_parameters() if p.requires_grad)
    found = logits(model, x)
    assert not torch.allclose(found, plain, atol=1e-4)
    with pytest.raises(ValueError, match="no layer has a loss"):
        connectivity_loss(model)
    save_file({n: v.contiguous() for n, v in model.state_dict().items()}, tmp_path / "s.safetensors")
    fresh = hw.convert(vit(1), to="sparsifiner", **SMALL)
    fresh.load_state_dict(load_file(tmp_path / "s.safetensors"))
    assert torch.equal(logits(fresh, x), found)
    set_connectivity(model, "dense")
    torch.testing.assert_close(logits(model, x), plain)


def test_heads_are_edited_and_rows_of_weights_refused():
    model, x = hw.convert(vit(), to="sparsifiner", **SMALL), images()
    plain = logits(model, x)
    with hw.steer(model, ScaleHeads(0.0, heads=["0.1"])):
        assert not torch.allclose(logits(model, x), plain, atol=1e-4)
    assert torch.equal(logits(model, x), plain)
    with hw.probe(model, Sink()), pytest.raises(UnsupportedModel, match="Sink"):
        logits(model, x)


def test_only_the_named_layers_change():
    model, x = vit(), images()
    hw.convert(model, to="sparsifiner", layers=[1], **SMALL)
    assert sum(hasattr(part, "connectivity") for part in model.modules()) == 1
    assert torch.isfinite(logits(model, x)).all()


def test_own_networks(tmp_path):
    model, x = SmallViT(SmallViTConfig()).eval(), torch.randn(2, 1, 8, 8)
    plain = model(x).logits
    hw.convert(model, to="sparsifiner", layers=[0], keep=0.5, **SMALL)
    assert isinstance(model.blocks[0].attn, SparsifinerAttention) and model.blocks[0].attn.mask_predictor.prefix == 0
    set_connectivity(model, "dense")
    torch.testing.assert_close(model(x).logits, plain)
    set_connectivity(model, "sparse")
    model.save_pretrained(tmp_path)
    again = SmallViT.from_pretrained(tmp_path).eval()
    assert torch.equal(again(x).logits, model(x).logits)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UnsupportedModel, match="attends causal"):
        hw.convert(tiny_llama(), to="sparsifiner", num_tokens=16, **SMALL)
    with pytest.raises(ValueError, match="give num_tokens"):
        hw.convert(tiny_llama(), to="sparsifiner")
    model = hw.convert(vit(), to="sparsifiner", **SMALL)
    with pytest.raises(ValueError, match="already"):
        hw.convert(model, to="sparsifiner")
    with pytest.raises(ValueError, match="'predicting'"):
        set_connectivity.__wrapped__(model, "predicting")
    with pytest.raises(ValueError, match="convert it first"):
        connectivity_loss(vit())
