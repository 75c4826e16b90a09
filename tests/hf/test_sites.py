"""The residual stream of every family is proved or refused by name; recording and replacing act where they say."""

import threading

import pytest
import torch
import transformers as hf
from tests.zoo import FAMILIES
from torch import nn

from headwise.errors import UnsupportedModel
from headwise.hf.projections import attention_shape, head_writes, projection_bias
from headwise.hf.sites import Site, find_sites, record, replace

# Towers whose layers norm the stream itself (or run one layer for all), and those that need pictures to run at all.
REFUSED = {"bert": [""], "roberta": [""], "albert": [""], "distilbert": [""], "bart": ["decoder", "encoder"]}
NEEDS_INPUTS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
TOWERS = [(name, tower) for name in FAMILIES for tower in FAMILIES[name].towers if tower != "cross"]
PROVED = [(name, tower) for name, tower in TOWERS if tower not in REFUSED.get(name, [])]
MAIN = [name for name in FAMILIES if name not in REFUSED and FAMILIES[name].kind != "dual"]


def length_of(name):
    return 24 if FAMILIES[name].kind == "multimodal" else 11


def proved(name, tower, model, inputs):
    given = inputs if name in NEEDS_INPUTS and tower == "vision" else None
    return find_sites(model, tower=tower, inputs=given)


def heads_write_the_projection(found, seen):
    """z_h W_O^h summed over heads, and the bias, is what the projection gives: in every layer with attention."""
    for index, layer in enumerate(found.layers):
        if layer.projection is None or layer.attention is None:
            continue
        shape, z = attention_shape(layer.attention), seen[f"heads:{index}"]
        assert z.shape[-2:] == (shape.heads, shape.value_dim)
        with torch.no_grad():
            writes = torch.einsum("...he,hec->...c", z, head_writes(layer.projection, shape.heads))
            whole = writes + projection_bias(layer.projection)
        torch.testing.assert_close(whole, seen[f"projection:{index}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "tower"), PROVED)
def test_all_writes_make_the_final_residual_and_heads_the_projection(name, tower):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, length=length_of(name), padding="left" if family.padded else None)
    found = proved(name, tower, model, inputs)
    assert found.error < 1e-5
    if name == "qwen3_vl" and tower == "":  # with a picture something is added between its layers: the next test
        inputs = {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, 9)}
    with torch.no_grad(), record(model, found) as seen:
        model(**inputs)
    total = seen["residual:0"] + sum(seen[site].reshape(seen["residual:0"].shape) for site in found.writes())
    assert (total - seen["final"]).norm() / seen["final"].norm() < 1e-5
    heads_write_the_projection(found, seen)
    attends = [layer for layer, heads in enumerate(family.towers[tower][0]) if heads]
    assert [site.layer for site in found.writes() if site.kind == "attention"] == attends
    assert [site.layer for site in found.writes() if site.kind == "mlp"] == list(range(len(found.layers)))
    cross = tower == "decoder"
    assert [site.layer for site in found.writes() if site.kind == "cross"] == (attends if cross else [])


@pytest.mark.parametrize(("name", "tower"), [(name, tower) for name, towers in REFUSED.items() for tower in towers])
def test_streams_that_are_not_only_added_to_are_refused_by_name(name, tower):
    model = FAMILIES[name].build()
    with pytest.raises(UnsupportedModel, match=type(model).__name__):
        find_sites(model, tower=tower)


def test_a_write_between_layers_is_refused():
    """Qwen3-VL adds picture features after its first layer: with a picture the writes no longer add up."""
    family = FAMILIES["qwen3_vl"]
    model = family.build()
    with pytest.raises(UnsupportedModel, match="something else writes"):
        find_sites(model).prove(family.inputs(model, length=24))


@pytest.mark.parametrize("name", MAIN)
def test_what_is_recorded_is_what_the_model_passes_on(name):
    """The final residual goes through the norm and the unembedding to the logits; a stream adds what is written."""
    family = FAMILIES[name]
    model = family.build()
    found = find_sites(model)
    inputs = family.inputs(model, length=length_of(name))
    if name == "qwen3_vl":
        inputs = {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, 9)}
    with torch.no_grad(), record(model, found) as seen:
        output = model(**inputs)
        for index in range(1, len(found.layers)):
            step = seen[f"residual:{index - 1}"] + sum(seen[site] for site in found.writes(index - 1))
            torch.testing.assert_close(step, seen[f"residual:{index}"], rtol=1e-4, atol=1e-5)
        if family.kind == "decoder":
            assert found.final_norm is not None and found.unembedding is not None
            raw = found.unembedding(found.final_norm(seen["final"]))
            assert torch.equal(seen["logits"], output.logits)
            scale = {"cohere": model.config.to_dict().get("logit_scale"), "granite": None}.get(name, 1.0)
            if scale is not None and name != "gemma2":  # gemma 2 caps its logits, granite divides them
                torch.testing.assert_close(raw * scale, output.logits)


@pytest.mark.parametrize("name", [*MAIN, "clip"])
def test_replacing_by_the_same_value_changes_nothing(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, length=length_of(name))
    found = find_sites(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        with replace(model, dict.fromkeys(found.all(), lambda value: value)):
            assert torch.equal(model(**inputs)[0], before)
        with replace(model, dict.fromkeys(found.all(), lambda value: value * 1.0)):
            torch.testing.assert_close(model(**inputs)[0], before)
        assert torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize("name", MAIN)
def test_replaced_writes_reach_the_final_residual(name):
    """With every write set to a constant, the final residual is the embedding and the constants."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, length=length_of(name))
    if name == "qwen3_vl":
        inputs = {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 3, 9)}
    found = find_sites(model)
    values = {site: float(index + 1) for index, site in enumerate(found.writes())}
    with torch.no_grad(), replace(model, values), record(model, ["residual:0", "final"]) as seen:
        model(**inputs)
    torch.testing.assert_close(seen["final"], seen["residual:0"] + sum(values.values()), rtol=1e-5, atol=1e-4)


def test_replacing_heads_is_ablation_of_projection_columns():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)

    def without_head_two(z):
        return torch.cat([z[..., :2, :], torch.zeros_like(z[..., 2:3, :]), z[..., 3:, :]], -2)

    with torch.no_grad():
        with replace(model, {"heads:1": without_head_two}):
            edited = model(**inputs).logits
        model.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0
        torch.testing.assert_close(edited, model(**inputs).logits)


def test_replacements_nest_and_are_undone_after_an_exception():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
        with record(model, "mlp:1") as plain:
            model(**inputs)
        with (
            replace(model, {"mlp:1": lambda x: x + 1}),
            replace(model, {"mlp:1": lambda x: x * 2}),
            record(model, "mlp:1") as seen,
        ):
            model(**inputs)
        torch.testing.assert_close(seen["mlp:1"], (plain["mlp:1"] + 1) * 2)
        with pytest.raises(RuntimeError, match="stop"), replace(model, {"mlp:*": 0.0}):
            raise RuntimeError("stop")
        assert torch.equal(model(**inputs).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_logits_and_residuals_are_replaced_too():
    model = FAMILIES["gpt2"].build()
    inputs = FAMILIES["gpt2"].inputs(model)
    with torch.no_grad(), replace(model, {"logits": 3.0}):
        assert bool((model(**inputs).logits == 3).all())
    other = torch.randn(2, 12, 32)
    with torch.no_grad(), replace(model, {"residual:1": other}), record(model, "residual:1") as seen:
        model(**inputs)
    assert torch.equal(seen["residual:1"], other)


def test_gradients_reach_recorded_and_replaced_values():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)
    value = torch.zeros(32, requires_grad=True)
    with replace(model, {"mlp:0": lambda x: x + value}), record(model, "heads:1") as seen:
        model(**inputs).logits.sum().backward()
    assert seen["heads:1"].requires_grad
    assert value.grad is not None and float(value.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "whisper"])
def test_recording_while_generating(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model)
    with record(model, "residual:1", every=True) as seen:
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert len(seen.calls("residual:1")) == 4
    assert seen["residual:1"].shape == (2, 1, 32)
    assert made.shape[0] == 2


def test_sites_are_read_and_checked():
    model = FAMILIES["qwen3_next"].build()
    found = find_sites(model)
    assert [str(site) for site in found.select("mlp:*")] == ["mlp:0", "mlp:1"]
    assert [str(site) for site in found.select(["mixer", "heads"])] == ["mixer:0", "heads:1"]
    assert found.select("final") == [Site("final")]
    for wrong, message in {
        "mpl:0": "did you mean 'mlp'",
        "mlp:two": "needs a layer, as in mlp:3",
        "final:2": "stands without a layer",
        "mlp:2": r"site: mlp:2 is none of Qwen3NextForCausalLM's; it has mlp:0 to mlp:1",
        "heads:0": "it has heads:1 to heads:1",
        "cross": "it has residual",
    }.items():
        with pytest.raises(ValueError, match=message):
            found.select(wrong)


def test_messages_of_replacements_that_do_not_fit():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)
    with (
        pytest.raises(ValueError, match=r"mlp:0: the replacement has shape \(7,\); it must fit \(2, 12, 32\)"),
        replace(model, {"mlp:0": torch.zeros(7)}),
    ):
        model(**inputs)
    text: object = "zero"
    with pytest.raises(TypeError, match="mlp:0: the replacement is a str"), replace(model, {"mlp:0": lambda _: text}):  # type: ignore[dict-item]
        model(**inputs)
    with record(model, "mlp:0") as seen:
        pass
    with pytest.raises(KeyError, match="not been passed yet"):
        seen["mlp:0"]
    with pytest.raises(KeyError, match="not recorded"):
        seen["mlp:1"]


def test_sites_of_another_model_are_refused():
    one, other = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    with pytest.raises(ValueError, match="belong to another LlamaForCausalLM"), record(one, find_sites(other)):
        pass


def test_towers_without_inputs_of_their_own_say_so():
    with pytest.raises(ValueError, match="cannot make up inputs for tower 'vision' of Qwen2VL"):
        find_sites(FAMILIES["qwen2_vl"].build(), tower="vision")
    with pytest.raises(ValueError, match="tower: 'audio' is none of this model's"):
        find_sites(FAMILIES["llama"].build(), tower="audio")


def test_proving_leaves_the_model_as_it_was():
    """Training mode and the thread of another model's forward are left alone."""
    model = FAMILIES["gpt2"].build()
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    worker = threading.Thread(target=find_sites, args=(model,))
    worker.start()
    worker.join()
    assert [module.training for module in model.modules()] == modes


def test_half_precision_is_proved_to_its_own_rounding():
    model = FAMILIES["llama"].build().bfloat16()
    assert find_sites(model).error < 0.02


def test_a_second_look_does_not_run_the_model_again():
    model = FAMILIES["llama"].build()
    find_sites(model)
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    find_sites(model)
    handle.remove()
    assert not runs
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp)
    assert find_sites(model).layers[0].mlp is model.model.layers[0].mlp, "a changed model is looked at anew"


def test_a_mixer_beside_attention_has_a_write_of_its_own():
    """Falcon-H1 runs a state-space mixer and attention side by side, each with a factor."""
    config = hf.FalconH1Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4,
        attention_out_multiplier=0.5, ssm_out_multiplier=0.25, pad_token_id=0,
    )  # fmt: skip
    found = find_sites(hf.FalconH1ForCausalLM(config).eval())
    assert [str(site) for site in found.writes(1)] == ["attention:1", "mixer:1", "mlp:1"]
    assert found.error < 1e-5
