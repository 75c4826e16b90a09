"""What SubjectAttention is told (layers, steps, dropout, masks that are given or found by it), and what it refuses."""

import builtins
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.steering.subjects import (
    ELSEWHERE,
    EXACT,
    KINDS,
    NETWORKS,
    SIDE,
    TEXT,
    TWO,
    flux,
    masks,
    processors,
    run,
    unet,
)
from torch import Tensor, nn

from headwise.errors import UnsupportedModel
from headwise.steering import SubjectAttention
from headwise.steering._subject_maps import AttentionMaps, masks_of_maps, spread_map


def test_layers_go_by_name_and_in_the_order_in_which_they_run():
    network = unet()
    own = [f"{n}.processor" for n, _ in network.named_modules() if n.endswith("attn1")]
    assert own[-1].startswith("mid_block"), "diffusers lists the middle last"
    for start, first in ((0, "down"), (1, "mid"), (2, "up")):
        handle = SubjectAttention(network, TWO, TWO, start_layer=start).attach()
        assert len(handle.reading) == 4 - start and any(name.startswith(first) for name in handle.reading)
        handle.remove()
    with SubjectAttention(network, TWO, TWO) as handle:  # 36 / 70 of four layers: from the third on, the decoder
        assert handle.reading == {name for name in own if name.startswith("up_blocks")}
    with pytest.raises(ValueError, match=r"start_layer is 4; the network has layers 0 to 3"):
        SubjectAttention(network, TWO, TWO, start_layer=4).attach()
    with pytest.raises(ValueError, match="layers names 'attn9'"):
        SubjectAttention(network, TWO, TWO, layers=["attn9"]).attach()
    assert not any("Self" in type(one).__name__ for one in processors(network).values())


@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_by_timestep_and_not_by_calls(kind):
    network = NETWORKS[kind]()
    """Called twice a step, as with a ControlNet, the step is the same; a new run begins where time rises."""
    options = EXACT | {"mutual_cross_attention": 0.0, "isolate": False}
    plain = run(network, 3, 400.0)
    with SubjectAttention(network, TWO, ELSEWHERE, **options):
        read = run(network, 3, 400.0)
    with SubjectAttention(network, TWO, ELSEWHERE, start_step=1, **options) as handle:
        run(network, 3, 900.0)
        run(network, 3, 900.0)
        assert handle.step == 0
        torch.testing.assert_close(run(network, 3, 400.0), read)
        torch.testing.assert_close(run(network, 3, 400.0), read)
        assert handle.step == 1
        run(network, 3, 900.0)
        assert handle.step == 0
    with SubjectAttention(network, TWO, ELSEWHERE, steps=[0], **options):
        run(network, 3, 900.0)
        torch.testing.assert_close(run(network, 3, 400.0), plain, atol=1e-6, rtol=1e-5)


def test_dropout_is_drawn_anew_at_every_step_and_repeats():
    network = unet()
    options = {"start_layer": 0, "mask_dropout": 0.5, "isolate": False, "mutual_cross_attention": 0.0}

    def twice(seed: int, **more: Any) -> tuple[Tensor, Tensor]:
        with SubjectAttention(network, TWO, ELSEWHERE, seed=seed, **(options | more)) as handle:
            outs = run(network, 3, 900.0)[2], run(network, 3, 899.9999)[2]
            assert handle.step == 1
        return outs

    first, again, other = twice(0), twice(0), twice(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.allclose(first[0], first[1], atol=1e-3) and not torch.allclose(first[0], other[0], atol=1e-4)
    handle = SubjectAttention(network, TWO, TWO, seed=3, **options)
    handle.step = 4
    full = TWO.flatten(1)[None]
    kept = handle._dropped(full, (SIDE, SIDE))
    assert not (kept & ~full).any() and 0.2 < float(kept.sum() / full.sum()) < 0.8
    assert torch.equal(kept, handle._dropped(full, (SIDE, SIDE)))
    dots = torch.eye(64, dtype=torch.bool)[None, :40]
    assert bool((handle._dropped(dots, (SIDE, SIDE)) == dots).all()), "a mask is never emptied"


def test_masks_are_resized_to_each_layer():
    """Given at pixels, binarised above the threshold at each resolution; disjoint masks stay disjoint."""
    network = unet()
    large = masks((0, 15, 0, 15), (16, 31, 16, 31), side=32)
    plain, seen = {}, {}
    for name, subjects in (("latent", TWO), ("pixels", large), ("numbers", large.float())):
        with SubjectAttention(network, subjects, subjects, **EXACT) as handle:
            plain[name] = run(network, 3)
            seen[name] = {n: handle.target_masks(n) for n in (64, 16)}
    assert torch.equal(plain["latent"], plain["pixels"]) and torch.equal(plain["latent"], plain["numbers"])
    assert torch.equal(seen["pixels"][16], F.max_pool2d(TWO[None].float(), 2).flatten(2) > 0)
    odd = masks((0, 12, 0, 30), (13, 30, 0, 30), side=31)
    with SubjectAttention(network, odd, **EXACT) as handle:
        run(network, 1)
        for tokens in (64, 16):
            made = handle.target_masks(tokens)
            assert made is not None and int(made.sum(1).max()) == 1


def test_what_is_refused():
    network = unet()
    make = SubjectAttention.__init__.__wrapped__ if hasattr(SubjectAttention.__init__, "__wrapped__") else None
    with pytest.raises(ValueError, match="subject_masks holds values besides 0 and 1"):
        SubjectAttention(network, TWO * 0.5)
    with pytest.raises(ValueError, match=r"subject_masks has shape \(0, 8, 8\).*s at least 1"):
        SubjectAttention(network, TWO[:0])
    with pytest.raises(ValueError, match="16 tokens lie in two subjects"):
        SubjectAttention(network, masks((0, 3, 0, 3), (0, 3, 0, 7)))
    with pytest.raises(ValueError, match="reference_masks is empty for subject 1 of target 0"):
        SubjectAttention(network, TWO, TWO & torch.tensor([True, False])[:, None, None])
    for name, value in (
        ("mutual_cross_attention", 1.2),
        ("mask_dropout", 1.0),
        ("boost", math.inf),
        ("threshold", 1.0),
    ):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            SubjectAttention(network, TWO, TWO, **{name: value})
    with pytest.raises(ValueError, match="without subject_masks give tokens"):
        SubjectAttention(network, None)
    if make is not None:
        shell = SubjectAttention.__new__(SubjectAttention)
        with pytest.raises(ValueError, match=r"reference_masks \(1, 2, 4, 8\)"):
            make(shell, network, TWO, TWO[:, :4])
        with pytest.raises(TypeError, match="subject_masks is list; expected a tensor"):
            make(shell, network, [[1]])
    with SubjectAttention(network, TWO, TWO):
        with pytest.raises(ValueError, match=r"the batch is 4; expected 3, or 6 with guidance: 2 references"):
            run(network, 4)
        with pytest.raises(ValueError, match=r"masks of 8 x 8 do not fit a picture of 8 x 4"):
            network(torch.randn(3, 4, 8, 4), 5, encoder_hidden_states=torch.randn(3, TEXT, 24))
    with pytest.raises(UnsupportedModel, match="str has no unet and no transformer"):
        SubjectAttention("pipe", TWO)
    with pytest.raises(UnsupportedModel, match="Linear has no self-attention"):
        SubjectAttention(nn.Linear(2, 2), TWO).attach()


def test_processors_that_would_be_lost_are_refused_by_name():
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    network = unet()
    cross = next(m for n, m in network.named_modules() if n.endswith("attn2"))
    plain = cross.processor
    cross.set_processor(IPAdapterAttnProcessor2_0(16, 24))
    before = processors(network)
    with pytest.raises(UnsupportedModel, match=r"attn2\.processor is IPAdapterAttnProcessor2_0.*unload_ip_adapter"):
        SubjectAttention(network, TWO, TWO).attach()
    assert processors(network) == before and not network._forward_pre_hooks
    cross._modules.pop("processor", None)
    cross.processor = plain
    own = next(m for n, m in network.named_modules() if n.endswith("attn1"))
    own.add_k_proj = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModel, match=r"has added keys \(add_k_proj\)"):
        SubjectAttention(network, TWO).attach()
    own.add_k_proj = None
    with SubjectAttention(network, TWO), pytest.raises(UnsupportedModel, match=r"SelfProcessor, which would be lost"):
        SubjectAttention(network, TWO).attach()  # a second one on the same network would hide the first
    turned = flux()
    turned.fuse_qkv_projections()
    with pytest.raises(UnsupportedModel, match=r"fused projections|FusedFlux"):
        SubjectAttention(turned, TWO).attach()


def test_without_diffusers_the_way_to_it_is_named(monkeypatch):
    network, real = unet(), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedModel, match=r'pip install "headwise\[diffusion\]"'):
        SubjectAttention(network, TWO)


def test_maps_find_what_was_planted():
    """Self-attention in two blocks, each of which looks at one word in a single place: the powers fill the block."""
    n = 16
    block = torch.arange(n) >= 8
    own = (block[:, None] == block[None]).float() / 8
    cross = torch.full((1, n, 3), 1e-3)
    cross[0, 0, 1], cross[0, 15, 2] = 1.0, 1.0
    spread = spread_map(own[None], cross)
    torch.testing.assert_close(spread, sum(torch.matrix_power(own, i) @ cross for i in range(1, 5)) / 4)
    found = masks_of_maps(spread[0].mT[1:].unflatten(-1, (4, 4)), None).flatten(1)
    assert torch.equal(found[0], ~block) and torch.equal(found[1], block)
    nothing = masks_of_maps(torch.ones(2, 4, 4), torch.ones(4, 4))
    assert not nothing.any()


def test_masks_from_the_previous_steps_maps():
    network = unet()
    options: dict[str, Any] = {
        "tokens": [[0], [1]],
        "reference_tokens": [[0], [0, 1]],
        "mask_dropout": 0.0,
        "start_layer": 0,
    }
    plain = run(network, 3, 900.0), run(network, 3, 800.0)
    with SubjectAttention(network, None, **options) as handle:
        first = run(network, 3, 900.0)
        torch.testing.assert_close(first, plain[0], atol=1e-6, rtol=1e-5)  # nothing is known yet
        second = run(network, 3, 800.0)
        made = handle.target_masks(64)
        assert made is not None and made.shape == (1, 2, 64) and int(made.sum(1).max()) == 1
        assert bool(made.any(-1).all())
        assert handle.target_masks(16) is not None
        torch.testing.assert_close(second[:2], plain[1][:2], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(second[2], plain[1][2], atol=1e-4)
        torch.testing.assert_close(run(network, 3, 950.0), run(unet(), 3, 950.0), atol=1e-6, rtol=1e-5)  # a new run
    with SubjectAttention(network, TWO, TWO, **EXACT):
        known = run(network, 3, 800.0)
    assert not torch.allclose(known, second, atol=1e-4)
    assert AttentionMaps([[0]], None).target((4, 4)) is None


def test_given_masks_serve_the_first_steps_and_maps_the_later():
    """The authors' sam_step."""
    network = unet()
    words: dict[str, Any] = {"tokens": [[0], [1]], "reference_tokens": [[0], [0, 1]], **EXACT}
    times = 900.0, 800.0, 700.0

    def drawn(*given: Any, **options: Any) -> list[Tensor]:
        with SubjectAttention(network, *given, **words, **options):
            return [run(network, 3, time) for time in times]

    with SubjectAttention(network, TWO, ELSEWHERE, **EXACT):
        masked = [run(network, 3, time) for time in times]
    both, mapped = drawn(TWO, ELSEWHERE, mask_steps=2), drawn(None)
    torch.testing.assert_close(both[:2], masked[:2], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(both[2], masked[2], atol=1e-4)
    torch.testing.assert_close(drawn(TWO, ELSEWHERE, mask_steps=3), masked, atol=1e-6, rtol=1e-5)
    assert torch.isfinite(both[2]).all() and not torch.allclose(mapped[1], masked[1], atol=1e-4)
    with pytest.raises(ValueError, match="mask_steps is 0"):
        SubjectAttention(network, TWO, mask_steps=0)
    with pytest.raises(ValueError, match="with mask_steps give tokens"):
        SubjectAttention(network, TWO, mask_steps=1)
    with pytest.raises(ValueError, match="masks of 2 subjects for 1 targets, tokens of 1"):
        SubjectAttention(network, TWO, mask_steps=1, tokens=[[0]])
