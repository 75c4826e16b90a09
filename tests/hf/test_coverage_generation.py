"""Generation under edits equals one written-out forward in which every row knows what was known when it was made."""

import threading
from typing import Any

import pytest
import torch
from tests.hf.reference import biased, materialised, scaled
from tests.zoo import FAMILIES, IMAGE, VIDEO, VISION_END, VISION_START, families
from torch import Tensor
from transformers import StaticCache

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate, BiasGroup, ScaleGroup
from headwise.attend.groups import positions, recent
from headwise.attend.probes import PROBES
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import attention_modules, layout
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.session import probe, steer

DECODERS = [name for name, family in FAMILIES.items() if family.decoder]
TEXT = families(kind="decoder")
STEPS = 4
HEADS = [0, 3]


def prompt(name: str, model: Any, padding: Any = "left") -> dict[str, Tensor]:
    return FAMILIES[name].inputs(model, 2, 20 if FAMILIES[name].kind == "multimodal" else 11, padding)


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens `[b n]` and the logits `[b n v]` that chose them."""
    if "pixel_values" in inputs:  # a generated image token would want a picture
        options["suppress_tokens"] = [IMAGE, VISION_START, VISION_END, VIDEO]
    options = {"max_new_tokens": STEPS, "do_sample": False, **options}
    made = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
    return made.sequences, torch.stack(made.logits, 1)


def whole(name: str, model: Any, inputs: dict[str, Tensor], sequences: Tensor) -> tuple[dict[str, Tensor], int]:
    """The inputs of one forward over everything but the last token, and the length of the prompt in it."""
    ids = sequences[:, :-1]
    if FAMILIES[name].kind in ("seq2seq", "speech"):
        return {**inputs, "decoder_input_ids": ids}, inputs["decoder_input_ids"].shape[1]
    length = inputs["input_ids"].shape[1]
    extra = ids.shape[1] - length
    given = {**inputs, "input_ids": ids}
    for key, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in inputs:
            given[key] = torch.nn.functional.pad(inputs[key], (0, extra), value=value)
    if "attention_mask" in given and FAMILIES[name].kind == "decoder" and name != "opt":
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return given, length


def edits_and_rule(model: Any, chunks: list[int], real: Tensor | None):
    """Keys 4 and 5 keep 0.3 of their mass, then the last three tokens known at each row get a bias.

    chunks: ends of the forwards in which the prompt was read; rows behind the last were generated one by one.
    """
    main = layout(model).main
    named = [Head(layer, h, main.name) for layer, n in enumerate(main.heads) if n for h in HEADS]
    edits = [ScaleGroup(positions([4, 5]), 0.3, heads=named), BiasGroup(recent(3), 1.0, heads=named)]
    chosen = {module for module, (tower, _) in attention_modules(model).items() if tower == main.name}

    def rule(module: Any, weights: Tensor) -> Tensor:
        if module not in chosen:
            return weights
        b, _, t, s = weights.shape
        column = torch.arange(s)
        known = torch.tensor([next((end for end in chunks if r < end), r + 1) for r in range(t)])[:, None]
        seen = (
            torch.ones(b, s, dtype=torch.bool)
            if real is None
            else torch.nn.functional.pad(real.bool(), (0, s), value=True)[:, :s]
        )
        fixed = ((column == 4) | (column == 5)).expand(b, t, s) & seen[:, None]
        last = ((column >= known - 3) & (column < known)).expand(b, t, s) & seen[:, None]
        new = weights.clone()
        part = scaled(weights[:, HEADS], fixed[:, None], 0.3, "rest")
        new[:, HEADS] = biased(part, last[:, None], 1.0)
        return new

    return edits, rule


def close(found: Tensor, expected: Tensor) -> None:
    error = float((found - expected).norm() / expected.norm())
    assert error < 2e-5, error


@pytest.mark.parametrize("name", families(generates=True))
def test_generation_with_nothing_attached_is_the_same(name):
    model = FAMILIES[name].build()
    inputs = prompt(name, model)
    if name == "whisper":
        plain = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        with steer(model), probe(model, PROBES["entropy"]()):
            assert torch.equal(model.generate(**inputs, max_new_tokens=STEPS, do_sample=False), plain)
        return
    tokens, logits = generate(model, inputs)
    with steer(model), probe(model, PROBES["entropy"](), PROBES["sink"]()):
        again = generate(model, inputs)
    assert torch.equal(tokens, again[0]) and torch.equal(logits, again[1])


@pytest.mark.parametrize("name", [*DECODERS, "t5", "bart"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_decoding_with_a_cache_equals_one_written_out_forward(name, padding):
    model = FAMILIES[name].build()
    inputs = prompt(name, model, padding)
    length = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
    real = None if "decoder_input_ids" in inputs else inputs.get("attention_mask")
    edits, rule = edits_and_rule(model, [length], real)
    with steer(model, *edits):
        sequences, logits = generate(model, inputs)
    plain = generate(model, inputs)[1]
    given, length = whole(name, model, inputs, sequences)
    with torch.no_grad(), materialised(model, rule):
        expected = model(**given).logits[:, length - 1 :]
    close(logits, expected)
    assert not torch.allclose(logits, plain, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in TEXT if name != "qwen3_next"])
def test_a_static_cache_changes_nothing(name):
    model = FAMILIES[name].build()
    inputs = prompt(name, model)
    edits, _ = edits_and_rule(model, [11], inputs["attention_mask"])
    with steer(model, *edits):
        dynamic = generate(model, inputs)
        static = generate(model, inputs, cache_implementation="static")
    assert torch.equal(dynamic[0], static[0])
    close(static[1], dynamic[1])


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("static", [False, True])
def test_a_prompt_in_chunks_equals_one_written_out_forward(name, static):
    """Groups of the prompt hold from the chunk that brings them; a row once computed does not change."""
    if static and name == "qwen3_next":
        return  # transformers has no static cache for it
    model = FAMILIES[name].build()
    inputs = prompt(name, model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    places = {} if name == "opt" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    edits, rule = edits_and_rule(model, [7, 11], mask)
    empty = StaticCache(model.config, max_cache_len=16) if static else None
    with torch.no_grad(), steer(model, *edits):
        first = model(ids[:, :7], attention_mask=mask[:, :7], **_part(places, 0, 7), **with_cache(model, empty))
        given = with_cache(model, cache_of(first))
        second = model(ids[:, 7:], attention_mask=mask, **_part(places, 7, 11), **given)
    with torch.no_grad(), materialised(model, rule):
        expected = model(**inputs, **places).logits
    real = mask.bool()
    close(torch.cat([first.logits, second.logits], 1)[real], expected[real])


def _part(places: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {key: value[:, start:stop] for key, value in places.items()}


# Found anew in every call, so their sum over calls is another quantity than over one forward.
BY_CALL = {"sinks", "value-weighted-sink"}


@pytest.mark.parametrize("name", [*TEXT, "t5", "bart"])
def test_probes_read_the_same_rows_while_generating(name):
    model = FAMILIES[name].build()
    inputs = prompt(name, model)
    once, stepwise = ([cls() for key, cls in PROBES.items() if key not in BY_CALL] for _ in range(2))
    with probe(model, *stepwise):
        sequences, _ = generate(model, inputs)
    given, _ = whole(name, model, inputs, sequences)
    with torch.no_grad(), probe(model, *once):
        model(**given)
    main = layout(model).main.name
    for a, b in zip(stepwise, once, strict=True):
        for place, expected in b.scores().items():
            if place[0] == main:
                torch.testing.assert_close(
                    a.scores()[place], expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=a.name
                )


def test_beams_keep_groups_of_the_prompt():
    model = FAMILIES["llama"].build()
    inputs = prompt("llama", model)
    edits, rule = edits_and_rule(model, [11], inputs["attention_mask"])
    edit = edits[0]
    with steer(model, edit):
        made = model.generate(
            **inputs, max_new_tokens=STEPS, num_beams=3, do_sample=False, output_scores=True,
            return_dict_in_generate=True, length_penalty=1.0,
        )  # fmt: skip
    given, length = whole("llama", model, inputs, made.sequences)

    def fixed_only(module: Any, weights: Tensor) -> Tensor:
        column = torch.arange(weights.shape[-1])
        member = ((column == 4) | (column == 5)).expand_as(weights[:, HEADS])
        new = weights.clone()
        new[:, HEADS] = scaled(weights[:, HEADS], member, 0.3, "rest")
        return new

    del rule
    with torch.no_grad(), materialised(model, fixed_only):
        logits = model(**given).logits[:, length - 1 :]
    chosen = logits.log_softmax(-1).gather(2, made.sequences[:, length:, None])[..., 0].sum(1)
    torch.testing.assert_close(made.sequences_scores * STEPS, chosen, rtol=1e-4, atol=1e-4)


def test_beams_that_move_refuse_groups_of_generated_tokens():
    model = FAMILIES["llama"].build()
    inputs = prompt("llama", model, None)
    with (
        steer(model, BiasGroup(recent(2), 2.0)),
        pytest.raises(UnsupportedModel, match="use a group of the prompt, or num_beams=1"),
    ):
        model.generate(**inputs, max_new_tokens=12, num_beams=4, do_sample=False)


def test_assisted_decoding_is_refused():
    model = FAMILIES["llama"].build()
    inputs = {key: value[:1] for key, value in prompt("llama", model, None).items()}
    ids = torch.cat([inputs["input_ids"]] * 2, 1)
    with steer(model, Ablate(["0.0"])), pytest.raises(RuntimeError, match="assisted decoding"):
        model.generate(input_ids=ids, max_new_tokens=12, prompt_lookup_num_tokens=3, do_sample=False)


@pytest.mark.parametrize("when", ["prompt", "generated"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "qwen3_next", "t5"])
def test_edits_of_some_rows_only(name, when):
    model = FAMILIES[name].build()
    inputs = prompt(name, model)
    main = layout(model).main
    chosen = {module for module, (tower, _) in attention_modules(model).items() if tower == main.name}
    length = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]

    def rule(module: Any, weights: Tensor) -> Tensor:
        if module not in chosen:
            return weights
        rows = torch.arange(weights.shape[2]) < length
        touched = (rows if when == "prompt" else ~rows)[:, None]
        new = weights.clone()
        new[:, 1:2] = torch.where(touched, 0.0, weights[:, 1:2])
        return new

    heads = [Head(layer, 1, main.name) for layer, n in enumerate(main.heads) if n]
    with steer(model, Ablate(heads, when=when)):
        sequences, logits = generate(model, inputs)
    given, length = whole(name, model, inputs, sequences)
    with torch.no_grad(), materialised(model, rule):
        expected = model(**given).logits[:, length - 1 :]
    close(logits, expected)


def test_a_thread_that_generates_is_edited_and_no_other_model():
    """The usual way to stream: generate runs in a thread that was started inside the block."""
    model, other = FAMILIES["llama"].build(), FAMILIES["llama"].build(1)
    inputs = prompt("llama", model)
    plain, untouched = generate(model, inputs)[1], generate(other, inputs)[1]
    seen: dict[str, Tensor] = {}

    def work(name: str, which: Any) -> None:
        seen[name] = generate(which, inputs)[1]

    with steer(model, Ablate(["0.*"])):
        inside = generate(model, inputs)[1]
        threads = [threading.Thread(target=work, args=pair) for pair in (("own", model), ("other", other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(seen["own"], inside) and not torch.equal(inside, plain)
    assert torch.equal(seen["other"], untouched)
    assert torch.equal(generate(model, inputs)[1], plain)
