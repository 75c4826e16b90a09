"""Transformers models switched to neighbourhoods: against the library's own sliding window and against dense masks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ViTConfig,
    ViTModel,
)

import headwise as hw
from headwise.attend import Ablate, Entropy
from headwise.attention import neighborhood_mask
from headwise.errors import UnsupportedModel
from headwise.hf import probe
from headwise.hf.steps import CACHE_NAMES
from headwise.models import NEIGHBORHOOD
from headwise.models.small_vit import SmallViT, SmallViTConfig

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WINDOW = 5


def neighbors(model: Any, kernel_size: Any, **options: Any) -> Any:
    return hw.convert(model, to="neighborhood", kernel_size=kernel_size, **options)


def text_models() -> tuple[Any, Any]:
    """The same weights: Llama, and Mistral with a sliding window of its own."""
    sizes = {**SMALL, "num_key_value_heads": 2, "vocab_size": 61, "initializer_range": 0.3, "pad_token_id": 0}
    torch.manual_seed(0)
    llama: Any = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    mistral: Any = MistralForCausalLM(
        MistralConfig(**sizes, sliding_window=WINDOW, rope_parameters=llama.config.rope_parameters)
    ).eval()
    mistral.set_attn_implementation("eager")
    mistral.load_state_dict(llama.state_dict())
    return llama, mistral


IDS = torch.randint(1, 61, (2, 17), generator=torch.Generator().manual_seed(1))


def test_a_causal_model_has_the_librarys_sliding_window():
    llama, mistral = text_models()
    plain = llama(IDS).logits
    neighbors(llama, WINDOW)
    with torch.no_grad():
        torch.testing.assert_close(llama(IDS).logits, mistral(IDS).logits, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(llama(IDS).logits, plain, atol=1e-2)
        short = IDS[:, : WINDOW - 2]  # a window that is longer than the text
        torch.testing.assert_close(llama(short).logits, mistral(short).logits, atol=2e-5, rtol=1e-4)
    llama.set_attn_implementation("sdpa")
    torch.testing.assert_close(llama(IDS).logits, plain)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_and_left_padding(cache):
    llama, mistral = text_models()
    neighbors(llama, WINDOW)
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    ids = IDS.masked_fill(mask == 0, 0)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours = llama.generate(ids, attention_mask=mask, cache_implementation=cache, **options)
    theirs = mistral.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=5e-5, rtol=1e-4)


def test_decoding_with_a_dilated_window_equals_one_forward():
    llama, _ = text_models()
    neighbors(llama, 3, dilation=2)
    with torch.no_grad():
        whole = llama(IDS).logits
        for cut in (4, 9):  # a prompt that is shorter than the window's reach, and one that is longer
            step = llama(IDS[:, :cut], use_cache=True)
            name = next(one for one in CACHE_NAMES if one in step)  # transformers renamed it in 5.24
            rows, cache = [step.logits], step[name]
            for parts in (IDS[:, cut : cut + 3], *IDS[:, cut + 3 :].split(1, 1)):
                rows.append(llama(parts, use_cache=True, **{name: cache}).logits)
            torch.testing.assert_close(torch.cat(rows, 1), whole, atol=2e-5, rtol=1e-4)


def vision_model(kind: str) -> tuple[Any, int]:
    torch.manual_seed(0)
    sizes = {**SMALL, "image_size": 24, "patch_size": 4, "num_channels": 1, "initializer_range": 0.3}
    if kind == "vit":
        return ViTModel(ViTConfig(**sizes), add_pooling_layer=False).eval(), 1
    sizes.pop("intermediate_size")
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=3)).eval(), 4


def full_mask(prefix: int, kernel: int, dilation: int = 1) -> Tensor:
    seen = torch.ones(prefix + 36, prefix + 36, dtype=torch.bool)
    seen[prefix:, prefix:] = neighborhood_mask((6, 6), kernel, 1, dilation)
    return seen


def with_mask(model: Any, pixels: Tensor, seen: Tensor, monkeypatch) -> Tensor:
    """The model with this mask in every call of fused attention."""
    original = torch.nn.functional.scaled_dot_product_attention

    def masked(q, k, v, attn_mask=None, **options):
        return original(q, k, v, attn_mask=seen, **{key: x for key, x in options.items() if key != "is_causal"})

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
        return model(pixels).last_hidden_state


PIXELS = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["vit", "registers"])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (2, 3)])
def test_patches_see_their_neighbours_and_every_prefix_token(kind, kernel, dilation, monkeypatch):
    model, prefix = vision_model(kind)
    expected = with_mask(model, PIXELS, full_mask(prefix, kernel, dilation), monkeypatch)
    neighbors(model, kernel, dilation=dilation)
    with torch.no_grad():
        torch.testing.assert_close(model(PIXELS).last_hidden_state, expected, atol=2e-5, rtol=1e-4)


def test_a_window_of_the_whole_grid_changes_nothing():
    model, _ = vision_model("vit")
    with torch.no_grad():
        plain = model(PIXELS).last_hidden_state
        neighbors(model, 6)
        torch.testing.assert_close(model(PIXELS).last_hidden_state, plain, atol=2e-5, rtol=1e-4)


def test_edits_of_weights_know_the_window():
    model, prefix = vision_model("vit")
    neighbors(model, 3)
    seen = full_mask(prefix, 3)
    with torch.no_grad(), hw.steer(model, Ablate(heads="0.*", mode="uniform")):
        ours = model(PIXELS).last_hidden_state
    layer = model.layers[0].attention
    value = layer.v_proj(model.layers[0].layernorm_before(model.embeddings(PIXELS)))
    captured = {}
    hook = layer.o_proj.register_forward_pre_hook(lambda module, args: captured.update(z=args[0]))
    with torch.no_grad(), hw.steer(model, Ablate(heads="0.*", mode="uniform")):
        assert torch.equal(model(PIXELS).last_hidden_state, ours)
    hook.remove()
    even = seen.float() / seen.sum(-1, keepdim=True)
    torch.testing.assert_close(captured["z"], even @ value.detach(), atol=1e-5, rtol=1e-4)
    assert model.config._attn_implementation == NEIGHBORHOOD


def test_probes_read_the_window():
    llama, mistral = text_models()
    neighbors(llama, WINDOW)
    ours, theirs = Entropy(), Entropy()
    with torch.no_grad(), probe(llama, ours):
        llama(IDS)
    with torch.no_grad(), probe(mistral, theirs):
        mistral(IDS)
    for place, values in theirs.scores().items():
        torch.testing.assert_close(ours.scores()[place], values, atol=1e-4, rtol=1e-4)


def test_settings_are_saved_with_the_model(tmp_path):
    model, _ = vision_model("vit")
    neighbors(model, (3, 5))
    model.save_pretrained(tmp_path)
    again: Any = ViTModel.from_pretrained(tmp_path, attn_implementation=NEIGHBORHOOD, add_pooling_layer=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(PIXELS).last_hidden_state, model(PIXELS).last_hidden_state)


def test_layers_that_are_not_named_keep_their_attention():
    llama, mistral = text_models()
    plain, ids = llama(IDS).logits, IDS
    neighbors(llama, WINDOW, layers=[1])
    one = llama(ids).logits
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    padded = llama(ids, attention_mask=mask).logits
    assert not torch.allclose(one, plain, atol=1e-3)
    assert not torch.allclose(one, mistral(ids).logits, atol=1e-3)
    # By hand: the layers of a plain model, the second of which has the window.
    masks = [_causal_mask(mask_, window) for mask_ in (None, mask) for window in (None, WINDOW)]
    for found, pair, given in ((one, masks[:2], None), (padded, masks[2:], mask)):
        wanted = _with_layer_masks(mistral, pair)
        real = torch.ones_like(ids).bool() if given is None else given.bool()
        torch.testing.assert_close(found[real], wanted[real], atol=5e-5, rtol=1e-4)
    with torch.no_grad(), hw.steer(llama, Ablate(heads="0.*", mode="uniform")), probe(llama, Entropy()):
        assert torch.isfinite(llama(ids).logits).all()
    with pytest.raises(ValueError, match="another mechanism's already"):
        neighbors(llama, 3)
    llama.set_attn_implementation("sdpa")
    torch.testing.assert_close(llama(ids).logits, plain)


def _causal_mask(padding: Tensor | None, window: int | None) -> Tensor:
    """`[b 1 t t]` additive."""
    t = IDS.shape[1]
    behind = torch.arange(t)[:, None] - torch.arange(t)
    seen = (behind >= 0) & (behind < (window or t))
    seen = seen[None, None].expand(len(IDS), 1, t, t)
    if padding is not None:
        seen = seen & padding[:, None, None].bool()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def _with_layer_masks(like: Any, masks: list[Tensor]) -> Tensor:
    """The layers of a plain model, each with a mask of its own; eager attention."""
    inner = like.model
    with torch.no_grad():
        x = inner.embed_tokens(IDS)
        places = torch.arange(IDS.shape[1])[None]
        rotary = inner.rotary_emb(x, places)
        for layer, mask in zip(inner.layers, masks, strict=True):
            x = layer(x, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        return like.lm_head(inner.norm(x))


def test_own_networks(tmp_path):
    torch.manual_seed(0)
    model, x = SmallViT(SmallViTConfig()).eval(), torch.randn(2, 1, 8, 8)
    rows, columns = model.config.grid_size
    plain = model(x).logits
    whole = neighbors(SmallViT(SmallViTConfig()).eval(), (rows, columns))
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(whole(x).logits, plain, atol=1e-5, rtol=1e-4)
    neighbors(model, 3, layers=[1])
    assert [type(block.attn).__name__ for block in model.blocks][:2] == ["SoftmaxAttention", "NeighborhoodAttention"]
    found = model(x).logits
    assert not torch.allclose(found, plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(SmallViT.from_pretrained(tmp_path).eval()(x).logits, found)


def test_what_cannot_be_is_refused():
    llama, _ = text_models()
    with pytest.raises(ValueError, match="stride is 2"):
        neighbors(llama, 4, stride=2)
    with pytest.raises(ValueError, match="causal model has one axis"):
        neighbors(llama, (3, 3))
    with pytest.raises(ValueError, match="layers are \\[5\\]"):
        neighbors(llama, 3, layers=[5])
    llama.set_attn_implementation(NEIGHBORHOOD)
    with pytest.raises(ValueError, match="headwise_neighborhood is not set"):
        llama(IDS)
    model = neighbors(vision_model("vit")[0], 3, grid_size=(5, 5))
    with pytest.raises(ValueError, match="37 tokens are not a grid of 5 x 5 patches"):
        model(PIXELS)
    model = neighbors(vision_model("vit")[0], 3, grid_size=(6, 6), num_prefix_tokens=2)
    with pytest.raises(ValueError, match="behind 2 tokens"):
        model(PIXELS)
    model = neighbors(vision_model("vit")[0], 7)
    with pytest.raises(ValueError, match="axis 0: kernel_size 7 times dilation 1 is 7, more than its length 6"):
        model(PIXELS)
    with pytest.raises(UnsupportedModel):
        neighbors(torch.nn.Linear(2, 2), 3)
    small = SmallViT(SmallViTConfig())
    before = dict(small.named_modules())
    with pytest.raises(ValueError, match="kernel_size 9 times dilation 1 is 9"):
        neighbors(small, 9)
    assert dict(small.named_modules()) == before, "nothing has changed"
