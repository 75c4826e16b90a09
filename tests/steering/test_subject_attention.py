"""SubjectAttention on tiny random networks of diffusers: a UNet with text, a DiT and a Flux transformer."""

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
    diffusers,
    dit,
    flux,
    masks,
    processors,
    run,
    unet,
)
from torch import Tensor, nn

from headwise.attention.isolation import isolation_mask, reposition
from headwise.steering import SubjectAttention


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> Any:
    return NETWORKS[request.param]()


def test_with_one_subject_or_no_pixels_it_is_the_plain_processor(network):
    plain = run(network, 2)
    for subjects in (TWO[:1], TWO & False):
        with SubjectAttention(network, subjects):
            assert torch.equal(run(network, 2), plain)
    with SubjectAttention(network, TWO[:1] & False, TWO[:1], **EXACT):
        assert torch.equal(run(network, 2), plain), "no query in the target: nothing to read"


def test_a_layer_that_does_what_ours_does_equals_the_plain_processor(network):
    """A subject that is everything, reading a copy of its own picture: every key twice, which changes nothing."""
    everything = torch.ones(1, SIDE, SIDE, dtype=torch.bool)
    x = torch.randn(1, 4, SIDE, SIDE).expand(2, -1, -1, -1)
    call: dict[str, Any] = {"states": x}
    if isinstance(network, diffusers.DiTTransformer2DModel):
        for block in network.transformer_blocks:  # one class for both
            block.norm1.emb.class_embedder.embedding_table.weight.data[:] = 0.1
    words = []
    if not isinstance(network, diffusers.DiTTransformer2DModel):
        network.register_forward_pre_hook(_same_words, with_kwargs=True)
    plain = run(network, 2, **call)
    with SubjectAttention(network, everything, everything, mutual_cross_attention=0.9, **EXACT):
        steered = run(network, 2, **call)
    if isinstance(network, diffusers.FluxTransformer2DModel):
        # text is read once, the picture twice
        assert not torch.allclose(steered, plain, atol=1e-5) and torch.isfinite(steered).all()
        words = [steered[0], plain[0]]
        torch.testing.assert_close(*words, atol=1e-5, rtol=1e-4)  # the reference is left alone
    else:
        torch.testing.assert_close(steered, plain, atol=1e-5, rtol=1e-4)


def _same_words(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    text = kwargs["encoder_hidden_states"]
    changed = {"encoder_hidden_states": text[:1].expand_as(text)}
    if "pooled_projections" in kwargs:
        changed["pooled_projections"] = kwargs["pooled_projections"][:1].expand_as(kwargs["pooled_projections"])
    return args, kwargs | changed


def test_references_do_not_see_the_target_and_it_is_undone(network):
    before = processors(network)
    plain = run(network, 3)
    with SubjectAttention(network, TWO, ELSEWHERE, **EXACT):
        steered = run(network, 3)
        assert any(processors(network)[name] is not before[name] for name in before)
    torch.testing.assert_close(steered[:2], plain[:2], atol=1e-5, rtol=1e-4)
    assert float((steered[2] - plain[2]).abs().max()) > 1e-3
    assert processors(network) == before and not network._forward_pre_hooks
    assert torch.equal(run(network, 3), plain)


def test_it_is_undone_after_an_error_and_only_once(network):
    before = processors(network)
    handle = SubjectAttention(network, TWO, TWO)
    with pytest.raises(KeyError, match="body"), handle:
        with pytest.raises(RuntimeError, match="already open"):
            handle.attach()
        raise KeyError("body")
    handle.remove()
    assert processors(network) == before and not network._forward_pre_hooks
    with handle:
        run(network, 3)
    assert processors(network) == before


def test_guidance_is_two_halves_of_the_same(network):
    x = torch.randn(3, 4, SIDE, SIDE)
    with SubjectAttention(network, TWO, ELSEWHERE, **EXACT):
        both = run(network, 6, states=torch.cat([x, x + 1]))
    halves = []
    for half in range(2):
        words = _half(half)
        handle = network.register_forward_pre_hook(words, with_kwargs=True)
        with SubjectAttention(network, TWO, ELSEWHERE, **EXACT):
            halves.append(run(network, 6, states=torch.cat([x, x + 1])))
        handle.remove()
    torch.testing.assert_close(halves[0], both[:3], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(halves[1], both[3:], atol=1e-5, rtol=1e-4)


def _half(half: int) -> Any:
    """Calls the network with one half of the batch."""

    def cut(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        def one(x: Any) -> Any:
            return x.chunk(2)[half] if isinstance(x, Tensor) and x.ndim and x.shape[0] == 6 else x

        return tuple(one(x) for x in args), {name: one(x) for name, x in kwargs.items()}

    return cut


def test_several_targets_at_once_are_each_its_own(network):
    x = torch.randn(6, 4, SIDE, SIDE)
    subjects, references = torch.stack([TWO, ELSEWHERE]), torch.stack([ELSEWHERE, TWO])
    references[1, 0, 0, 0] = False  # of different sizes, so that there is padding
    with SubjectAttention(network, subjects, references, **EXACT):
        together = run(network, 6, states=x)
    for group in range(2):
        hook = network.register_forward_pre_hook(_half(group), with_kwargs=True)
        with SubjectAttention(network, subjects[group], references[group], **EXACT):
            alone = run(network, 6, states=x)
        hook.remove()
        torch.testing.assert_close(together.chunk(2)[group], alone, atol=1e-5, rtol=1e-4)


def attention_of(network: Any) -> tuple[str, Any]:
    """The first self-attention module."""
    for name, module in network.named_modules():
        if hasattr(module, "set_processor") and not name.endswith("attn2"):
            return name, module
    raise AssertionError


def by_hand(attn: Any, states: Tensor, masks: Any, size: tuple[int, int], *, move: bool, boost=0.0) -> Tensor:
    """The paper's layer in float64 with whole score matrices: canvas before the projections, one mask, one softmax."""
    w = lambda part, x: F.linear(x, part.weight.double(), None if part.bias is None else part.bias.double())  # noqa: E731
    (subjects, references), x = masks, states.double()
    s = len(subjects)
    split = lambda y: y.unflatten(-1, (attn.heads, -1)).transpose(0, 1)  # noqa: E731 [n c] -> [h n d]
    canvas, shown = [], []
    for i in range(s):
        mask = references[i].flatten()[None]
        moved = reposition(x[i][None], mask, subjects[i].flatten()[None], size) if move else (x[i][None], mask)
        canvas.append(moved[0][0])
        shown.append(moved[1][0])
    q = split(w(attn.to_q, x[s]))
    k, v = (torch.cat([split(w(part, y)) for y in (*canvas, x[s])], 1) for part in (attn.to_k, attn.to_v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores[..., : -x.shape[1]] += boost
    seen = torch.cat([(subjects[i].flatten()[:, None] & shown[i]) for i in range(s)], 1)
    seen = torch.cat([seen, isolation_mask(subjects.flatten(1)[None])[0]], 1)
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return w(attn.to_out[0], out.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("move", [True, False])
def test_a_layer_equals_the_papers_in_float64(kind, move):
    network = NETWORKS[kind]()
    size = (SIDE, SIDE) if kind == "unet" else (SIDE // 2, SIDE // 2)
    subjects = masks((0, 3, 0, 3), (4, 7, 4, 7), side=SIDE)
    references = masks((2, 7, 0, 1), (0, 5, 2, 7), side=SIDE)
    _, attention = attention_of(network)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], out))

    with SubjectAttention(network, subjects, references, reposition=move, boost=0.7, **EXACT):
        hook = attention.register_forward_hook(keep, with_kwargs=True)
        run(network, 3)
        hook.remove()
    states, out = seen[0]
    small: Any = [
        F.interpolate(m[None].float(), size, mode="bilinear", align_corners=False)[0] > 0.5
        for m in (subjects, references)
    ]
    wanted = by_hand(attention, states, small, size, move=move, boost=0.7)
    torch.testing.assert_close(out[2].double(), wanted, atol=1e-5, rtol=1e-5)


def test_rotary_keys_take_the_place_where_they_come_to_lie():
    """Flux in float64 by hand: keys are moved before the rotary phase, which is that of their place in the target."""
    from diffusers.models.embeddings import apply_rotary_emb

    network = flux()
    attn: Any = network.single_transformer_blocks[0].attn
    subjects, references = masks((0, 2, 0, 2), (5, 7, 5, 7)), masks((4, 5, 1, 2), (0, 4, 3, 7))
    kept: list[Any] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        kept.append((kwargs["hidden_states"], kwargs["image_rotary_emb"], out))

    for move in (True, False):
        kept.clear()
        with SubjectAttention(network, subjects, references, reposition=move, **EXACT):
            hook = attn.register_forward_hook(keep, with_kwargs=True)
            run(network, 3)
            hook.remove()
        states, rotary, out = kept[0]

        def turn(x: Tensor, rotary: Any = rotary) -> Tensor:
            return apply_rotary_emb(x[None].transpose(1, 2), rotary, sequence_dim=1)[0].transpose(0, 1)

        heads = lambda x: x.unflatten(-1, (2, -1)).transpose(0, 1)  # noqa: E731
        keys, values, seen = [], [], []
        for i in range(2):
            x, mask = states[i], references[i].flatten()[None]
            if move:
                picture, mask = reposition(x[None, TEXT:], mask, subjects[i].flatten()[None], (SIDE, SIDE))
                x = torch.cat([x[:TEXT], picture[0]])
            keys.append(turn(attn.norm_k(heads(attn.to_k(x)))))
            values.append(heads(attn.to_v(x)))
            inside, shown = (F.pad(y, (TEXT, 0)) for y in (subjects[i].flatten(), mask[0]))
            seen.append(inside[:, None] & shown)
        keys.append(turn(attn.norm_k(heads(attn.to_k(states[2])))))
        values.append(heads(attn.to_v(states[2])))
        seen.append(F.pad(isolation_mask(subjects.flatten(1)[None])[0], (TEXT, 0, TEXT, 0), value=True))
        q = turn(attn.norm_q(heads(attn.to_q(states[2]))))
        scores = (q @ torch.cat(keys, 1).mT * q.shape[-1] ** -0.5).double()
        wanted = scores.masked_fill(~torch.cat(seen, 1), -torch.inf).softmax(-1) @ torch.cat(values, 1).double()
        torch.testing.assert_close(out[2].double(), wanted.transpose(0, 1).flatten(1), atol=1e-5, rtol=1e-5)


def test_reposition_is_seen_only_where_keys_have_positions(network):
    """With boxes of equal size a UNet or DiT gives the same picture with and without, a rotary network does not."""
    with SubjectAttention(network, TWO, ELSEWHERE, reposition=True, **EXACT):
        moved = run(network, 3)
    with SubjectAttention(network, TWO, ELSEWHERE, reposition=False, **EXACT):
        left = run(network, 3)
    if isinstance(network, diffusers.FluxTransformer2DModel):
        assert float((moved - left).abs().max()) > 1e-3
    else:
        torch.testing.assert_close(moved, left, atol=1e-5, rtol=1e-4)
    with SubjectAttention(network, TWO, TWO, reposition=True, **EXACT):
        same = run(network, 3)
    with SubjectAttention(network, TWO, TWO, reposition=False, **EXACT):
        torch.testing.assert_close(run(network, 3), same, atol=1e-5, rtol=1e-4)  # identical boxes


def test_isolation_alone_leaves_no_gradient_between_subjects():
    """Through a whole DiT whose other layers act token by token: subject 1 depends on nothing in subject 2 but through
    the background; with no background there is none at all."""
    network = dit()
    halves = masks((0, 7, 0, 3), (0, 7, 4, 7))
    x = torch.randn(1, 4, SIDE, SIDE, requires_grad=True)
    with SubjectAttention(network, halves):
        out = network(x, timestep=torch.tensor([3]), class_labels=torch.tensor([1])).sample
    (gradient,) = torch.autograd.grad(out[..., :4].square().sum(), x)
    assert not gradient[..., 4:].any() and bool(gradient[..., :4].any())
    plain = network(x, timestep=torch.tensor([3]), class_labels=torch.tensor([1])).sample
    (gradient,) = torch.autograd.grad(plain[..., :4].square().sum(), x)
    assert bool(gradient[..., 4:].any())


def test_references_that_no_query_reads_are_the_isolated_target_alone(network):
    inside = torch.randn(3, 4, SIDE, SIDE)
    with SubjectAttention(network, TWO, ELSEWHERE, layers=[], mutual_cross_attention=0.0, mask_dropout=0.0):
        with_them = run(network, 3, states=inside)
    hook = network.register_forward_pre_hook(_last, with_kwargs=True)
    with SubjectAttention(network, TWO):
        alone = run(network, 3, states=inside)
    hook.remove()
    torch.testing.assert_close(with_them[2:], alone, atol=1e-5, rtol=1e-4)


def _last(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def one(x: Any) -> Any:
        return x[-1:] if (isinstance(x, Tensor) and x.ndim and x.shape[0] == 3 and x.ndim != 2) or _long(x) else x

    def _long(x: Any) -> bool:
        return isinstance(x, Tensor) and x.shape[:1] == (3,) and x.shape != (3, 3)

    return tuple(one(x) for x in args), {name: one(x) if name != "txt_ids" else x for name, x in kwargs.items()}


def test_mutual_cross_attention_by_hand():
    """0.9 of what subject i's queries read in their reference's prompt, averaged where subjects overlap."""
    network = unet()
    attn: Any = next(m for n, m in network.named_modules() if n.endswith("attn2"))
    overlapping = masks((0, 4, 0, 4), (3, 7, 3, 7))
    kept: list[Any] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        kept.append((args[0], kwargs["encoder_hidden_states"], out))

    hook = attn.register_forward_hook(keep, with_kwargs=True)
    with SubjectAttention(network, overlapping, TWO, overlap="neither", **EXACT):
        run(network, 3)
    hook.remove()
    x, text, out = kept[0]

    def read(states: Tensor, words: Tensor) -> Tensor:
        q, k, v = (
            p(y).unflatten(-1, (attn.heads, -1)).transpose(0, 1)
            for p, y in zip((attn.to_q, attn.to_k, attn.to_v), (states, words, words), strict=True)
        )
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return attn.to_out[0](mixed.transpose(0, 1).flatten(1))

    own, theirs = read(x[2], text[2]), [read(x[2], text[i]) for i in range(2)]
    wanted = own.clone()
    inside = overlapping.flatten(1)
    for p in range(SIDE**2):
        mine = [theirs[i][p] for i in range(2) if inside[i, p]]
        if mine:
            wanted[p] = 0.1 * own[p] + 0.9 * torch.stack(mine).mean(0)
    torch.testing.assert_close(out[2], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:2], torch.stack([read(x[i], text[i]) for i in range(2)]), atol=1e-5, rtol=1e-5)


def test_a_masked_prompt_stays_masked():
    network = unet()
    hide = torch.ones(3, TEXT)
    hide[:, 1] = 0
    x, words = torch.randn(3, 4, SIDE, SIDE), torch.randn(3, TEXT, 24)
    other = words.clone()
    other[:, 1] += 5
    with SubjectAttention(network, TWO, TWO, **EXACT), torch.no_grad():
        one, two = (network(x, 5, encoder_hidden_states=w, encoder_attention_mask=hide).sample for w in (words, other))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_a_pipeline_with_guidance():
    """The batch of the paper: prompts of the references, then of the target, each with and without."""
    from types import SimpleNamespace

    network = unet()
    pipe = SimpleNamespace(unet=network)
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(4)
    words = torch.randn(6, TEXT, 24)

    @torch.no_grad()
    def generate() -> Tensor:
        x = torch.randn(3, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            seen, prompted = network(torch.cat([x, x]), t, encoder_hidden_states=words).sample.chunk(2)
            x = scheduler.step(seen + 3 * (prompted - seen), t, x).prev_sample
        return x

    plain = generate()
    with SubjectAttention(pipe, TWO, ELSEWHERE) as handle:
        steered = generate()
        assert handle.step == 3
        assert torch.equal(generate(), steered)
    torch.testing.assert_close(steered[:2], plain[:2], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(steered[2], plain[2], atol=1e-2) and torch.isfinite(steered).all()
    assert torch.equal(generate(), plain)
