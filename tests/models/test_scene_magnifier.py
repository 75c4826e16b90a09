"""A decoder with a scene: equal to attention written out, to itself without one, in batches, with a cache."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import headwise
from headwise.attend.groups import first_token
from headwise.errors import UnsupportedModel
from headwise.heads.masses import group_mass
from headwise.heads.regions import preferred_regions, visual_preference
from headwise.hf.inputs import cache_of
from headwise.models.scene_magnifier import SceneMagnifier, SceneMagnifierConfig

SCENE, C, R = 1, 6, 4


def llama(layers: int = 4, **options: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return LlamaConfig(**sizes, num_hidden_layers=layers, num_key_value_heads=2, **options)


def sharpen(model: Any) -> Any:
    """Weights large enough for attention to prefer something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(12)
            elif parameter.ndim == 2:
                parameter.mul_(30)
    return model


def magnifier(seed: int = 0, text: Any = None, **options: Any) -> Any:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"scene_dim": 8, "scene_token_id": SCENE, "start_layer": 1, **options}
    return sharpen(SceneMagnifier(SceneMagnifierConfig(llama() if text is None else text, **settings)).eval())


def scene(b: int = 1, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "coarse": torch.randn(b, C, 8, generator=generator),
        "fine": torch.randn(b, C * R, 8, generator=generator),
    }


def prompt(before: int = 2, after: int = 5, seed: int = 5) -> Tensor:
    words = torch.randint(2, 40, (before + after,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([words[:before], torch.full((C,), SCENE), words[before:]])[None]


def select_by_definition(weights: Tensor, threshold: float = 96) -> Tensor:
    low, high = weights.min(-1, keepdim=True).values, weights.max(-1, keepdim=True).values
    return (weights - low) / (high - low) * 255 > threshold


@torch.no_grad()
def written_out(model: Any, ids: Tensor, given: dict[str, Tensor], start: int) -> Tensor:
    """The official attention, one prompt: two softmaxes over all keys in every magnifying layer, text rows from `start`
    on; the selection of the layer before, from its plain weights."""
    inner, config = model.decoder.model, model.config
    x = inner.embed_tokens(ids)
    places = (ids[0] == SCENE).nonzero()[:, 0]
    x[:, places] = model.project(given["coarse"])
    fine = model.project(given["fine"])
    t = ids.shape[1]
    cos, sin = inner.rotary_emb(x, torch.arange(t)[None])
    hidden = torch.full((t, t), -torch.inf).triu(1)
    last = None
    split = lambda y: y.view(1, y.shape[1], -1, 8).transpose(1, 2)  # noqa: E731
    for number, layer in enumerate(inner.layers):
        attention: Any = layer.self_attn
        y = layer.input_layernorm(x)
        q, k, v = (split(project(y)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        q_scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5 + hidden
        weights = q_scores.softmax(-1)
        out = weights @ v.repeat_interleave(2, 1)
        if number > config.start_layer:
            extra = model.magnifiers[str(number)]
            k_fine, v_fine = split(extra.k_fine(fine)), split(extra.v_fine(fine))
            at = places.repeat_interleave(R)
            k_fine = apply_rotary_pos_emb(k_fine, k_fine, cos[:, at], sin[:, at])[1]
            scores = q @ k_fine.repeat_interleave(2, 1).mT * 8**-0.5
            assert last is not None
            scores = scores.masked_fill(~last.repeat_interleave(R, -1)[:, None], -torch.inf)
            both = torch.cat([q_scores, scores], -1).softmax(-1)
            magnified = both @ torch.cat([v, v_fine], 2).repeat_interleave(2, 1)
            out[:, :, start:] = magnified[:, :, start:]
        if number >= config.start_layer:
            last = select_by_definition(weights.sum(1)[..., places])
        x = x + attention.o_proj(out.transpose(1, 2).reshape(1, t, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.decoder.lm_head(inner.norm(x))


def recorded(model: SceneMagnifier) -> dict[int, Tensor]:
    """What each layer selects in the forwards that follow."""
    seen: dict[int, Tensor] = {}
    own = model._choose

    def choose(layer: int, preference: Tensor) -> Tensor:
        seen[layer] = own(layer, preference)
        return seen[layer]

    model.choose = choose
    return seen


@pytest.mark.parametrize("start", [0, 1, 2])
def test_it_is_the_official_attention(start: int):
    model, ids, given = magnifier(start_layer=start), prompt(), scene()
    with torch.no_grad():
        out = model(ids, **given).logits
    torch.testing.assert_close(out, written_out(model, ids, given, start=8), atol=2e-5, rtol=1e-4)
    assert (out - magnifier_off(model, ids, given)).abs().max() > 0.05


@torch.no_grad()
def magnifier_off(model: SceneMagnifier, ids: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The decoder alone on the same embeddings."""
    x = model.get_input_embeddings()(ids)
    x[ids == SCENE] = model.project(given["coarse"]).flatten(0, 1)
    return model.decoder(inputs_embeds=x).logits


def test_selecting_nothing_is_the_plain_decoder_bit_for_bit():
    model, ids, given = magnifier(), prompt(), scene()
    model.choose = lambda layer, preference: torch.zeros_like(preference, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(model(ids, **given).logits, magnifier_off(model, ids, given))


def test_a_layer_selects_for_the_next_and_the_start_layer_only_selects():
    model, ids, given = magnifier(start_layer=1), prompt(), scene()
    seen, before = recorded(model), []
    for layer in model.decoder.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: before.append(args[0][0]))
    with torch.no_grad():
        model(ids, **given)
        heads, before[:] = list(before), []
        magnifier_off(model, ids, given)
    assert sorted(seen) == [1, 2]  # the last layer selects for nobody
    same = [torch.equal(one, other) for one, other in zip(heads, before, strict=True)]
    assert same == [True, True, False, False]
    assert torch.equal(heads[2][:8], before[2][:8])  # rows of the scene and before it stay
    assert not torch.equal(heads[2][8:], before[2][8:])


def test_only_chosen_layers_magnify():
    model = magnifier(layers=[3])
    seen = recorded(model)
    with torch.no_grad():
        model(prompt(), **scene())
    assert sorted(seen) == [2] and list(model.magnifiers) == ["3"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_lengths_in_a_batch(side: str):
    model = magnifier()
    prompts, given = [prompt(1, 3), prompt(4, 7, seed=6)], scene(2)
    ids = torch.zeros(2, 17, dtype=torch.long)
    mask = torch.zeros(2, 17, dtype=torch.long)
    for row, one in enumerate(prompts):
        place = slice(17 - one.shape[1], 17) if side == "left" else slice(0, one.shape[1])
        ids[row, place], mask[row, place] = one[0], 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        together = model(ids, mask, positions, **given).logits
        for row, one in enumerate(prompts):
            alone = model(one, **{name: x[row : row + 1] for name, x in given.items()}).logits[0]
            torch.testing.assert_close(together[row, mask[row].bool()], alone, atol=2e-5, rtol=1e-4)


def test_padding_inside_the_text_changes_nothing():
    model, ids, given = magnifier(), prompt(after=6), scene()
    hole = torch.cat([ids[:, :10], torch.full((1, 3), 9), ids[:, 10:]], 1)
    mask = torch.ones_like(hole)
    mask[:, 10:13] = 0
    seen = recorded(model)
    with torch.no_grad():
        out = model(hole, mask, (mask.cumsum(-1) - 1), **given).logits[mask.bool()]
        torch.testing.assert_close(out, model(ids, **given).logits[0], atol=2e-5, rtol=1e-4)
    assert seen


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_a_cache_is_generating_without(beams: int):
    model, given = magnifier(), scene(2)
    ids = torch.cat([torch.zeros(2, 2, dtype=torch.long), torch.cat([prompt(1, 4), prompt(1, 4, seed=8)])], 1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    ids[1, 0] = 7
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    with_cache = model.generate(input_ids=ids, attention_mask=mask, **given, **options, eos_token_id=None)
    without = model.generate(input_ids=ids, attention_mask=mask, **given, **options, eos_token_id=None, use_cache=False)
    assert torch.equal(with_cache, without) and with_cache.shape[1] == ids.shape[1] + 6
    off = copy.deepcopy(model)
    off.choose = lambda layer, preference: torch.zeros_like(preference, dtype=torch.bool)
    plain = off.generate(input_ids=ids, attention_mask=mask, **given, **options, eos_token_id=None)
    assert not torch.equal(with_cache, plain)


@torch.no_grad()
@pytest.mark.parametrize("cut", [8, 10])
def test_a_prompt_in_chunks_is_the_prompt(cut: int):
    """The first chunk ends with the scene, or two words behind it."""
    model, ids, given = magnifier(), prompt(after=6), scene()
    cache = cache_of(model(ids[:, :cut], **given, use_cache=True))
    rest = model(ids[:, cut:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids, **given).logits[:, cut:], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_fine_keys_are_made_once_for_a_scene(monkeypatch: pytest.MonkeyPatch):
    model, given, calls = magnifier(), scene(), []
    for part in model.magnifiers.values():
        part.register_forward_hook(lambda *_: calls.append(1))
    model.generate(input_ids=prompt(), **given, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert len(calls) == 2  # layers 2 and 3
    whole = model.encode_scene(**given)
    calls.clear()
    one, other = prompt(), prompt(4, 5, seed=9)
    for ids in (one, other):  # two questions, the scene at other places in the prompt
        torch.testing.assert_close(model(ids, scene=whole).logits, model(ids, **given).logits)
    assert len(calls) == 4
    twice = whole.take(torch.tensor([0, 0]))
    batch = model(torch.cat([one, prompt(seed=11)]), scene=twice).logits
    torch.testing.assert_close(batch[:1], model(one, **given).logits, atol=1e-5, rtol=1e-4)


def test_a_generated_token_reads_the_fine_keys_that_it_selects(monkeypatch: pytest.MonkeyPatch):
    from headwise.attention import magnifier as module

    model, lengths, inner = magnifier(), [], module.attention_with_lse

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: Any):
        lengths.append((q.shape[2], k.shape[2]))
        return inner(q, k, v, **options)

    monkeypatch.setattr(module, "attention_with_lse", counted)
    seen = recorded(model)
    with torch.no_grad():
        out = model(prompt(), **scene(), use_cache=True)
        lengths.clear()
        cache = cache_of(out)
        model(torch.tensor([[9]]), past_key_values=cache)
    assert lengths == [(1, R * int(seen[layer].sum())) for layer in (1, 2)]
    assert all(length < C * R for _, length in lengths)


def test_the_warm_up_blends_in_training_only():
    model, ids, given = magnifier(warm_up=2.0), prompt(), scene()
    full = model(ids, **given).logits
    model.train()
    model.step_ratio = 0.0
    torch.testing.assert_close(model(ids, **given).logits, magnifier_off(model, ids, given), atol=1e-5, rtol=1e-4)
    model.step_ratio = 0.25
    half = model(ids, **given).logits
    assert not torch.allclose(half, full, atol=1e-3)
    model.step_ratio = 0.5
    torch.testing.assert_close(model(ids, **given).logits, full)


def test_gradients_reach_the_fine_projections_and_not_through_the_choice():
    model, ids, given = magnifier(), prompt(), scene()
    model(ids, **given, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "place" not in name:
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    assert all(bool(part.k_fine.weight.grad.any()) for part in model.magnifiers.values())


def test_centers_move_the_tokens():
    model, ids, given = magnifier(), prompt(), scene()
    centers, fine_centers = torch.rand(1, C, 3), torch.rand(1, C * R, 3)
    plain = model(ids, **given).logits
    placed = model(ids, **given, centers=centers).logits
    both = model(ids, **given, centers=centers, fine_centers=fine_centers).logits
    assert not torch.allclose(plain, placed) and not torch.allclose(placed, both)
    moved = model(ids, **given, centers=3 * centers + 5, fine_centers=3 * fine_centers + 5).logits
    torch.testing.assert_close(moved, both, atol=1e-3, rtol=1e-3)  # places count within the scene's box


def test_a_parent_index_in_another_order_is_the_same_scene():
    model, ids, given = magnifier(), prompt(), scene()
    order = torch.randperm(C * R)
    parent = torch.arange(C).repeat_interleave(R)
    shuffled = {**given, "fine": given["fine"][:, order], "parent": parent[order]}
    torch.testing.assert_close(model(ids, **shuffled).logits, model(ids, **given).logits, atol=1e-5, rtol=1e-4)


def test_a_question_mask_leaves_rows_out():
    model, ids, given = magnifier(), prompt(), scene()
    question = torch.zeros_like(ids, dtype=torch.bool)
    question[:, 10:] = True
    with torch.no_grad():
        out, off = model(ids, **given, question_mask=question).logits, magnifier_off(model, ids, given)
        assert torch.equal(out[:, :10], off[:, :10]) and not torch.equal(out[:, 10:], off[:, 10:])
        torch.testing.assert_close(out, written_out(model, ids, given, start=10), atol=2e-5, rtol=1e-4)


def test_state_survives_the_disk_and_a_copy(tmp_path: Path):
    model, ids, given = magnifier(layers=[3], max_regions=2), prompt(), scene()
    model.save_pretrained(tmp_path)
    again = SceneMagnifier.from_pretrained(tmp_path).eval()
    assert again.config.layers == [3] and again.config.max_regions == 2
    with torch.no_grad():
        expected = model(ids, **given).logits
        assert torch.equal(again(ids, **given).logits, expected)
        assert torch.equal(copy.deepcopy(model)(ids, **given).logits, expected)
    assert "magnifiers.3.k_fine.weight" in model.state_dict()


def test_it_goes_into_a_model_that_is_there():
    torch.manual_seed(0)
    own = sharpen(AutoModelForCausalLM.from_config(llama()).eval())
    ids = torch.randint(2, 40, (2, 9))
    before, names = own(ids).logits, set(own.state_dict())
    model: Any = SceneMagnifier.from_decoder(own, scene_dim=8, scene_token_id=SCENE, start_layer=1).eval()
    assert model.decoder is own and set(own.state_dict()) == names
    assert torch.equal(own(ids).logits, before) and torch.equal(model(ids).logits, before)
    assert torch.equal(model.magnifiers["2"].k_fine.weight, own.model.layers[2].self_attn.k_proj.weight)
    out = model(prompt(), **scene()).logits
    assert (out - magnifier_off(model, prompt(), scene())).abs().max() > 1e-3


def test_grouped_keys_with_norms_and_eager_decoders():
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    qwen = Qwen3Config(**sizes, num_hidden_layers=3, num_key_value_heads=2, head_dim=8)
    model, ids, given = magnifier(text=qwen), prompt(), scene()
    with torch.no_grad():
        assert (model(ids, **given).logits - magnifier_off(model, ids, given)).abs().max() > 1e-3
        # Fine keys that are the coarse ones, layer input and all, cannot be told from coarse keys of twice the weight;
        # what is checked here is that they pass the same norm: their length is that of normalised keys.
        held = model(ids, **given, use_cache=True)
        coarse = model.decoder.model.layers[2].self_attn.k_norm(torch.randn(1, 2, 5, 8))
        torch.testing.assert_close(
            cache_of(held)._headwise_scene.keys[2].norm(dim=-1).mean(), coarse.norm(dim=-1).mean(), atol=0.1, rtol=0.05
        )
        eager = copy.deepcopy(magnifier(text=llama(attn_implementation="eager")))
        torch.testing.assert_close(eager(ids, **given).logits, magnifier()(ids, **given).logits, atol=1e-5, rtol=1e-4)


def test_what_is_refused():
    model, ids, given = magnifier(), prompt(), scene()
    with pytest.raises(ValueError, match="the scene has no coarse tokens"):
        model.encode_scene(given["coarse"][:, :0], given["fine"][:, :0])
    with pytest.raises(ValueError, match="23 fine tokens for 6 coarse ones"):
        model(ids, coarse=given["coarse"], fine=given["fine"][:, :23])
    with pytest.raises(ValueError, match="expected a coarse token, 0 to 5"):
        model(ids, **given, parent=torch.full((C * R,), 6))
    with pytest.raises(ValueError, match="belong together"):
        model(ids, coarse=given["coarse"])
    with pytest.raises(ValueError, match="fine_centers without centers"):
        model(ids, **given, fine_centers=torch.rand(1, C * R, 3))
    with pytest.raises(ValueError, match=r"8 features in both"):
        model(ids, coarse=given["coarse"], fine=given["fine"][..., :4])
    with pytest.raises(ValueError, match=r"have \[5\] scene tokens in 1 rows; expected 6 in each of 1"):
        model(ids[:, torch.arange(ids.shape[1]) != 3], **given)
    with pytest.raises(ValueError, match="give coarse and fine"):
        model(ids)
    hidden = torch.ones_like(ids)
    hidden[:, 3] = 0
    with pytest.raises(ValueError, match="hides scene tokens"):
        model(ids, hidden, **given)
    with pytest.raises(ValueError, match=r"question_mask has shape \(1, 4\)"):
        model(ids, **given, question_mask=torch.ones(1, 4, dtype=torch.bool))
    for start in (3, 4, -1):
        with pytest.raises(ValueError, match=rf"start_layer is {start} of 4 layers; expected 0 to 2"):
            SceneMagnifierConfig(llama(), start_layer=start)
    with pytest.raises(ValueError, match=r"layers are \[1, 3\]; expected some of 2 to 3"):
        SceneMagnifierConfig(llama(), start_layer=1, layers=[3, 1])
    with pytest.raises(ValueError, match=r"threshold is 96\.0"):
        SceneMagnifierConfig(llama(), start_layer=1, threshold=96.0)
    with pytest.raises(ValueError, match=r"warm_up is 0\.0"):
        SceneMagnifierConfig(llama(), start_layer=1, warm_up=0.0)
    with pytest.raises(ValueError, match="projector is 'conv'"):
        SceneMagnifierConfig(llama(), start_layer=1, projector="conv")
    with pytest.raises(ValueError, match="checkpointing"):
        model.activation_checkpointing_enable()


def test_decoders_that_do_not_fit_are_refused():
    ids, given = prompt(), scene()
    dropping = magnifier(text=llama(attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1"):
        dropping(ids, **given)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    windowed = magnifier(text=MistralConfig(**sizes, num_hidden_layers=3, num_key_value_heads=2, sliding_window=4))
    with pytest.raises(UnsupportedModel, match="attends with sliding_window"):
        windowed(ids, **given)
    mixed = headwise.convert(AutoModelForCausalLM.from_config(llama()), to="mixture-of-head")
    with pytest.raises(UnsupportedModel, match="headwise-mixture-of-head stands in for the decoder's attention"):
        SceneMagnifier.from_decoder(mixed, scene_token_id=SCENE, start_layer=1)
    switched = magnifier()
    switched.decoder.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="set to 'sdpa', under which nothing is magnified"):
        switched(ids, **given)


def test_probes_work_without_a_scene_and_are_refused_with_one():
    model, ids = magnifier(), torch.randint(2, 40, (1, 7))
    mass = group_mass(model.decoder, ids, {"first": first_token()})["first"]
    other = AutoModelForCausalLM.from_config(llama()).eval()
    other.load_state_dict(model.decoder.state_dict())
    torch.testing.assert_close(mass, group_mass(other, ids, {"first": first_token()})["first"])
    with headwise.steer(model, headwise.attend.edits.BiasGroup(group=first_token(), bias=1.0, heads="2.0")):
        open_edit_is_refused(model)


def open_edit_is_refused(model: SceneMagnifier) -> None:
    with pytest.raises(UnsupportedModel, match="looks at fine tokens that are not among its keys"):
        model(prompt(), **scene())


def test_the_view_of_masses_is_what_the_selector_sees():
    model, given = magnifier(start_layer=0, layers=[1]), scene()
    ids = prompt()
    preferences = {}
    model.choose = lambda layer, preference: preferences.setdefault(layer, preference) > 1e9
    with torch.no_grad():
        model(ids, **given)
    plain = AutoModelForCausalLM.from_config(llama()).eval()
    plain.load_state_dict(model.decoder.state_dict())
    x = model.get_input_embeddings()(ids).detach()
    x[ids == SCENE] = model.project(given["coarse"]).flatten(0, 1).detach()
    coarse = ids == SCENE
    found = visual_preference(plain, {"inputs_embeds": x}, coarse, rows=-1)
    assert found.shape == (1, 4, C)
    torch.testing.assert_close(found[:, 0], preferences[0][:, -1], atol=1e-5, rtol=1e-4)
    group = preferred_regions(found[:, 0], coarse)
    chosen = select_by_definition(found[:, 0])[0]
    assert group.options == (("members", tuple((coarse[0].nonzero()[:, 0][chosen]).tolist())),)
    with pytest.raises(ValueError, match="as many coarse tokens in every row"):
        ragged = torch.cat([coarse, coarse])
        ragged[0, 3] = False
        visual_preference(plain, torch.cat([ids, ids]), ragged)
    with pytest.raises(ValueError, match=r"preference of 5 regions, coarse has 6"):
        preferred_regions(found[:, 0, :5], coarse)


def test_it_is_a_module_of_linear_parts():
    parts = [type(part) for part in magnifier(projector="linear").project.modules()]
    assert parts == [nn.Linear]
