"""`convert`: what any converter promises, and mixture of heads inside pretrained and own models."""

import copy
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.models_under_test import left_padded, text, tiny_llama

import headwise as hw
from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate, ScaleHeads
from headwise.attend.probes import Sink
from headwise.attention.mixture_of_head import HeadRouter, MixtureOfHeads, moh_loss, norm_router
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.session import steer
from headwise.models import conversion
from headwise.models.convert_mixture_of_head import NAME, head_usage
from headwise.models.small_vit import SmallViT, SmallViTConfig
from headwise.ops import masks


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def gate_by_hand(model, split, **inputs):
    """Logits of the unconverted model with hooks that gate the heads: queries are read before rotation."""
    hooks, shared, k = [], split[1], split[2]
    for layer in model.model.layers:
        attention, kept = layer.self_attn, {}

        def read(_, args, out, kept=kept, head_dim=attention.head_dim):
            kept["q"] = out.unflatten(-1, (-1, head_dim)).transpose(1, 2)

        def gate(_, args, kept=kept):
            heads = args[0].unflatten(-1, (kept["q"].shape[1], -1))
            return (heads * norm_router(kept["q"], shared, k).gates[..., None]).flatten(2)

        hooks += [attention.q_proj.register_forward_hook(read), attention.o_proj.register_forward_pre_hook(gate)]
    out = logits(model, **inputs)
    for hook in hooks:
        hook.remove()
    return out


PADDED = left_padded([text(1, 6)[0], text(1, 11, seed=1)[0]])


@pytest.mark.parametrize("implementation", ["dense", "sparse"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_the_gate_stands_where_it_should(implementation, base):
    model = tiny_llama()
    model.set_attn_implementation(base)
    plain = logits(model, **PADDED)
    wanted = gate_by_hand(model, (4, 1, 2), **PADDED)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    made = hw.convert(model, to="mixture-of-head", active=0.75, shared=0.25, implementation=implementation)
    assert made is model and model.config._attn_implementation == NAME
    real = PADDED["attention_mask"].bool()
    torch.testing.assert_close(logits(model, **PADDED)[real], wanted[real], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(wanted[real], plain[real], atol=1e-3)
    assert model.state_dict().keys() == state.keys(), "the query-norm router adds no parameters"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_cached_decoding_is_one_forward():
    model = hw.convert(tiny_llama(), to="mixture-of-head", shared=0.25)
    ids = text(2, 11)
    whole = logits(model, input_ids=ids)
    with torch.no_grad():
        first = model(input_ids=ids[:, :6], **with_cache(model, None))
        steps = [first.logits]
        for t in range(6, 11):
            out = model(input_ids=ids[:, t : t + 1], **with_cache(model, cache_of(first)))
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-4)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 15)


def test_all_heads_active_is_the_model_itself():
    model = tiny_llama()
    plain = logits(model, **PADDED)
    hw.convert(model, to="mixture-of-head", active=1.0, shared=0.5)
    assert torch.equal(logits(model, **PADDED), plain)


def test_only_the_named_layers_change():
    model, ids = tiny_llama(), text()
    states = lambda: model(input_ids=ids, output_hidden_states=True).hidden_states  # noqa: E731
    with torch.no_grad():
        before = states()
        hw.convert(model, to="mixture-of-head", layers=[1], shared=0.25)
        after = states()
    assert torch.equal(before[1], after[1]) and not torch.allclose(before[2], after[2], atol=1e-3)
    assert list(dict.fromkeys(h.layer for h in head_usage(model, {"input_ids": ids}).ranked())) == [1]


def test_a_model_that_shares_the_config_stays_as_it_is():
    from transformers import LlamaForCausalLM

    model = tiny_llama()
    other = LlamaForCausalLM(model.config).eval()
    ids = text()
    plain = logits(other, input_ids=ids)
    hw.convert(model, to="mixture-of-head")
    assert torch.equal(logits(other, input_ids=ids), plain)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, input_ids=ids), logits(model, input_ids=ids))


def test_the_name_alone_loads_a_model_with_default_routers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    model.save_pretrained(tmp_path)
    named = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="headwise-mixture-of-head").eval()
    converted = hw.convert(model, to="mixture-of-head")
    torch.testing.assert_close(logits(named, **PADDED), logits(converted, **PADDED))
    assert head_usage(named, PADDED).of() == head_usage(converted, PADDED).of()
    named.set_attn_implementation("sdpa")
    assert not torch.allclose(logits(named, **PADDED), logits(converted, **PADDED), atol=1e-3)


# --- under probes and edits ---


def test_edits_and_probes_work_on_a_converted_model():
    model = hw.convert(tiny_llama(), to="mixture-of-head", shared=0.25)
    plain = logits(model, **PADDED)
    with hw.probe(model, Sink()):
        assert torch.equal(logits(model, **PADDED), plain)
    with steer(model, ScaleHeads(1.0)), steer(model, Ablate(heads=[], mode="zero")):
        assert torch.equal(logits(model, **PADDED), plain)
    with steer(model, Ablate(heads=["0.1"], mode="uniform")):
        changed = logits(model, **PADDED)
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert torch.equal(logits(model, **PADDED), plain) and model.config._attn_implementation == NAME


def test_an_edit_of_weights_stays_beneath_the_gate():
    """Head 0.3 is routed: where a token did not choose it, forcing its rows changes nothing."""
    model, ids = hw.convert(tiny_llama(), to="mixture-of-head", shared=0.25), text()
    kept = {}
    hook = model.model.layers[0].self_attn.head_router.register_forward_hook(lambda m, a, out: kept.update(g=out.gates))
    outputs = {}

    def read(_, args):
        outputs["z"] = args[0].unflatten(-1, (4, -1))

    reading = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(read)
    with steer(model, Ablate(heads=["0.3"], mode="uniform")):
        logits(model, input_ids=ids)
    closed = kept["g"][..., 3] == 0
    assert closed.any() and not closed.all()
    assert not outputs["z"][:, :, 3][closed].any() and outputs["z"][:, :, 3][~closed].any()
    hook.remove()
    reading.remove()


def test_a_model_under_edits_is_not_converted():
    model = tiny_llama()
    with steer(model, Ablate(heads=["0.1"], mode="zero")), pytest.raises(RuntimeError, match="remove them first"):
        hw.convert(model, to="mixture-of-head")
    assert not any(isinstance(part, HeadRouter) for part in model.modules())
    hw.convert(model, to="mixture-of-head")


# --- tuning ---


def test_a_learned_router_is_tuned_saved_and_loaded(tmp_path):
    model = hw.convert(tiny_llama(), to="mixture-of-head", router="learned", shared=0.5, active=0.75)
    names = {name for name in model.state_dict() if "head_router" in name}
    assert names == {
        f"model.layers.{n}.self_attn.head_router.{part}.weight"
        for n in (0, 1)
        for part in ("routed", "shared", "balance")
    }
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        out = model(**PADDED, labels=PADDED["input_ids"])
        loss = out.loss + 0.01 * moh_loss(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in names)
    model.eval()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "state.safetensors")
    fresh = hw.convert(tiny_llama(seed=1), to="mixture-of-head", router="learned", shared=0.5, active=0.75)
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(logits(fresh, **PADDED), logits(model, **PADDED))
    usage = head_usage(model, PADDED)
    assert usage.of()[Head(0, 0)] == 1.0 and sum(usage.of()[Head(0, n)] or 0 for n in (2, 3)) == pytest.approx(1.0)


@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_padding_takes_no_part_and_checkpointing_counts_once(router):
    torch.manual_seed(0)
    model = hw.convert(tiny_llama(), to="mixture-of-head", router=router, shared=0.25).train()
    short = text(1, 6)
    model(input_ids=short)
    alone = moh_loss(model)
    ids, mask = torch.nn.functional.pad(short, (5, 0)), torch.tensor([[0] * 5 + [1] * 6])
    model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    torch.testing.assert_close(moh_loss(model), alone, atol=1e-5, rtol=1e-4)
    model(input_ids=short)
    model.activation_checkpointing_enable()
    out = model(input_ids=short, labels=short)
    torch.testing.assert_close(moh_loss(model), alone)
    (out.loss + moh_loss(model)).backward()
    torch.testing.assert_close(moh_loss(model), alone)


def test_usage_counts_real_tokens():
    model = hw.convert(tiny_llama(), to="mixture-of-head", shared=0.25)
    short = text(1, 6)
    ids, mask = torch.nn.functional.pad(short, (5, 0)), torch.tensor([[0] * 5 + [1] * 6])
    padded = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    alone, together = head_usage(model, {"input_ids": short}).of(), head_usage(model, padded).of()
    for head, share in alone.items():
        assert together[head] == pytest.approx(share), head
    by_layer = [sum(v or 0 for h, v in alone.items() if h.layer == layer) for layer in (0, 1)]
    assert by_layer == pytest.approx([3, 3]) and alone[Head(0, 0)] == 1.0


# --- other families ---


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.3)).eval()


@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_a_vision_transformer(router):
    model, x = vit(), torch.randn(2, 3, 16, 16)
    plain = logits(model, pixel_values=x)
    hw.convert(model, to="mixture-of-head", router=router)
    assert not torch.allclose(logits(model, pixel_values=x), plain, atol=1e-4)
    table = head_usage(model, {"pixel_values": x}).tensor()
    torch.testing.assert_close(table.sum(1), torch.full((2,), 3.0, dtype=torch.float64))
    model.train()(pixel_values=x)
    assert moh_loss(model) > 0


def test_queries_scaled_beforehand_choose_the_same_heads():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=32,
    )  # fmt: skip
    model, ids = hw.convert(OPTForCausalLM(config).eval(), to="mixture-of-head", shared=0.25), text()
    attention, kept = model.model.decoder.layers[0].self_attn, {}
    attention.q_proj.register_forward_hook(lambda m, a, out: kept.update(q=out))
    attention.head_router.register_forward_hook(lambda m, a, out: kept.update(chosen=out.chosen))
    logits(model, input_ids=ids)
    unscaled = kept["q"].unflatten(-1, (4, -1)).transpose(1, 2)
    assert torch.equal(norm_router(unscaled, 1, 2).chosen, kept["chosen"])


def test_query_norms_are_warned_of():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with pytest.warns(UserWarning, match=r"normalise their queries \(q_norm\)"):
        hw.convert(copy.deepcopy(model), to="mixture-of-head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hw.convert(model, to="mixture-of-head", router="learned")


def test_softcapped_eager_models_keep_their_softmax():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, attn_logit_softcapping=2.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    plain = logits(model, **PADDED)
    hw.convert(model, to="mixture-of-head", active=1.0, implementation="sparse")
    assert torch.equal(logits(model, **PADDED), plain)


def test_the_sparse_path_is_taken_where_it_pays(monkeypatch):
    from headwise.attention import routed

    seen = []
    sparse = routed._sparse
    monkeypatch.setattr(routed, "_sparse", lambda *args: seen.append(1) or sparse(*args))
    model = hw.convert(tiny_llama(), to="mixture-of-head", active=0.5, shared=0.25)
    logits(model, input_ids=text())
    assert not seen
    monkeypatch.setattr(routed, "LEAST_ROWS", 2)
    monkeypatch.setattr(routed, "MOST_ACTIVE_CAUSAL", ((4, 0.6),))
    found = logits(model, input_ids=text())
    assert len(seen) == 2
    monkeypatch.setattr(routed, "MOST_ACTIVE_CAUSAL", ())
    torch.testing.assert_close(logits(model, input_ids=text()), found, atol=1e-5, rtol=1e-4)


# --- headwise's own networks ---


@pytest.mark.parametrize("router", ["query_norm", "learned"])
def test_own_networks_change_their_layers_and_keep_their_weights(router, tmp_path):
    model, x = SmallViT(SmallViTConfig()).eval(), torch.randn(3, 1, 8, 8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hw.convert(model, to="mixture-of-head", layers=[1], router=router, shared=0.5)
    assert [type(block.attn).__name__ for block in model.blocks] == ["SoftmaxAttention", "MixtureOfHeads"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert (set(model.state_dict()) == set(state)) == (router == "query_norm")
    usage = head_usage(model, x).of()
    assert usage[Head(0, 0)] is None and sum(usage[Head(1, n)] or 0 for n in range(8)) == pytest.approx(6)
    model.save_pretrained(tmp_path)
    again = SmallViT.from_pretrained(tmp_path).eval()
    assert isinstance(again.blocks[1].attn, MixtureOfHeads)
    assert torch.equal(logits(again, pixel_values=x), logits(model, pixel_values=x))


def test_own_networks_of_other_attention_are_refused():
    model = SmallViT(SmallViTConfig(attention=["SoftmaxAttention", "MixtureOfHeads"]))
    with pytest.raises(ValueError, match="already"):
        hw.convert(model, to="mixture-of-head")
    with pytest.raises(UnsupportedModel, match="without dropout"):
        hw.convert(SmallViT(SmallViTConfig(attention_options={"dropout": 0.1})), to="mixture-of-head")


# --- refusals ---


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"to": "mixture-of-heads"}, "did you mean 'mixture-of-head'"),
        ({"to": "mixture-of-head", "layers": [2]}, "from 0 to 1"),
        ({"to": "mixture-of-head", "layers": []}, "at least one"),
        ({"to": "mixture-of-head", "share": 0.5}, "'share' is no option .* active, shared, router"),
        ({"to": "mixture-of-head", "active": 0.0}, "active 0.0"),
        ({"to": "mixture-of-head", "active": 1.0, "shared": 0.75}, "at least 2 must be routed"),
    ],
)
def test_wrong_requests_change_nothing(given, said):
    model = tiny_llama()
    with pytest.raises(ValueError, match=said):
        hw.convert(model, **given)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.model.layers[0].self_attn, "head_router")


def test_a_model_is_converted_once():
    model = hw.convert(tiny_llama(), to="mixture-of-head")
    with pytest.raises(ValueError, match="already"):
        hw.convert(model, to="mixture_of_head")
    with pytest.raises(ValueError, match="no head routers"):
        head_usage(tiny_llama(), {"input_ids": text()})


def test_shares_that_are_rounded_are_reported():
    with pytest.warns(UserWarning, match=r"active=0.7 of 4 heads is no whole number; 3 are used \(75.0%\)"):
        hw.convert(tiny_llama(), to="mixture-of-head", active=0.7, shared=0.25)


def test_models_off_the_interface_are_refused():
    with pytest.raises(UnsupportedModel):
        hw.convert(torch.nn.Linear(2, 2), to="mixture-of-head")


def test_a_name_has_one_converter(tmp_path, monkeypatch):
    assert "mixture-of-head" in conversion.converters()
    conversion.converters.cache_clear()
    (tmp_path / "convert_mixture_of_head.py").touch()
    (tmp_path / "convert_other.py").touch()
    monkeypatch.setattr(conversion, "__file__", str(tmp_path / "conversion.py"))
    real = conversion.importlib.import_module
    here = "headwise.models.convert_mixture_of_head"
    monkeypatch.setattr(conversion.importlib, "import_module", lambda name: real(here))
    with pytest.raises(ValueError, match="'mixture-of-head' is offered by"):
        conversion.converters()
    monkeypatch.undo()
    conversion.converters.cache_clear()


def test_the_base_is_forgotten_with_its_config():
    model = hw.convert(tiny_llama(), to="mixture-of-head")
    key = id(model.config)
    assert dispatch._bases[key] == "sdpa"
    masks._memo.clear()
    del model
    import gc

    gc.collect()
    assert key not in dispatch._bases
