"""NAAViT as an edit: image tokens stop attending, in models that know nothing of it."""

from typing import Any

import pytest
import torch
from tests.zoo import FAMILIES, families
from torch import Tensor

from headwise.attend.edit import Edit
from headwise.attend.groups import first_token
from headwise.hf.images import image_positions
from headwise.hf.projections import output_projection
from headwise.hf.session import steer
from headwise.steering.naavit import Naavit

LENGTH = 20


def pair(name: str) -> tuple[Any, dict[str, Tensor], Tensor]:
    model: Any = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model, length=LENGTH)
    return model, inputs, image_positions(model, inputs)


def logits(model: Any, inputs: dict[str, Tensor], *edits: Edit) -> Tensor:
    with torch.no_grad(), steer(model, *edits):
        return model(**inputs).logits


@pytest.mark.parametrize("name", families(kind="multimodal"))
def test_rows_of_images_come_out_as_zeros_and_are_still_attended_to(name: str):
    model, inputs, images = pair(name)
    seen: list[Tensor] = []
    stack = model.model.language_model
    projections = [output_projection(layer.self_attn, model) for layer in stack.layers]
    hooks = [one.register_forward_hook(lambda _, args, out: seen.append(args[0])) for one in projections]
    inside = logits(model, inputs, Naavit())
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(projections)
    for heads in seen:
        assert not heads[images].any()
        assert heads[~images].abs().sum(-1).gt(0).all()
    before = logits(model, inputs)
    ahead, behind = ~images & (images.cumsum(1) == 0), ~images & (images.cumsum(1) > 0)
    torch.testing.assert_close(inside[ahead], before[ahead])
    assert not torch.allclose(inside[behind], before[behind], atol=1e-4)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert not torch.allclose(logits(model, other, Naavit())[behind], inside[behind], atol=1e-4)


def test_image_tokens_no_longer_meet():
    """What one image token holds reaches no other image token, and reached them before."""
    model, inputs, images = pair("llava")
    columns = images[0].nonzero().flatten()
    first, last = int(columns[0]), int(columns[-1])
    stack, kept = model.model.language_model, []
    final = stack.norm.register_forward_hook(lambda _, args, out: kept.append(args[0].detach()))

    def push(_: Any, args: tuple, kwargs: dict) -> tuple:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[:, first] += 5
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    for edits in ((), (Naavit(),)):
        logits(model, inputs, *edits)
        hook = stack.layers[0].register_forward_pre_hook(push, with_kwargs=True)
        logits(model, inputs, *edits)
        hook.remove()
    final.remove()
    plain, plain_pushed, edited, edited_pushed = kept
    assert not torch.allclose(plain[:, last], plain_pushed[:, last], atol=1e-4)
    assert torch.equal(edited[:, last], edited_pushed[:, last])
    assert not torch.allclose(edited[:, -1], edited_pushed[:, -1], atol=1e-4)


def test_generation_with_a_cache_is_generation_without():
    model, inputs, _ = pair("llava")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with steer(model, Naavit()):
        cached = model.generate(**inputs, **options)
        again = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached, again)


def test_named_heads_and_strength():
    model, inputs, images = pair("llava")
    seen: list[Tensor] = []
    layer = model.model.language_model.layers[1].self_attn
    hook = layer.o_proj.register_forward_hook(lambda _, args, out: seen.append(args[0].unflatten(-1, (4, -1))))
    logits(model, inputs)
    logits(model, inputs, Naavit(heads=["1.2"]))
    logits(model, inputs, Naavit(0.25, heads=["1.2"]))
    hook.remove()
    plain, without, quarter = seen
    others = [0, 1, 3]
    assert torch.equal(plain[:, :, others], without[:, :, others])
    assert not without[:, :, 2][images].any() and torch.equal(without[:, :, 2][~images], plain[:, :, 2][~images])
    torch.testing.assert_close(quarter[:, :, 2][images], 0.25 * plain[:, :, 2][images])


def test_neutral_and_text_only():
    model, inputs, _ = pair("llava")
    assert torch.equal(logits(model, inputs, Naavit(1.0)), logits(model, inputs))
    text = {"input_ids": inputs["input_ids"][:, :4]}
    assert torch.equal(logits(model, text, Naavit()), logits(model, text))


def test_refusals():
    with pytest.raises(ValueError, match="when is 'generated'; image tokens are in the prompt"):
        Naavit(when="generated")
    family = FAMILIES["llama"]
    model = family.build()
    inputs = family.inputs(model)
    with pytest.raises(ValueError, match="this model has no image token"):
        logits(model, inputs, Naavit())
    logits(model, inputs, Naavit(group=first_token()))
