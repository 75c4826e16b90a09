"""Decoding fast or slow by a tag: against a loop without a cache, on LLaVA and Qwen2-VL, batched and alone."""

import copy

import pytest
import torch
from tests.zoo import EOS, FAMILIES, FIRST_WORD, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headwise.errors import UnsupportedModel
from headwise.hf.continued import read_prompt
from headwise.steering import FastSlowDecoder, GroundingStage

FAST, SLOW, END = 30, 31, 20
STAGES = (GroundingStage("summary", "w20", 5), GroundingStage("analysis", "w20", 3, opening="w21 w22"))


def words(numbers: tuple[int, ...] = (100, 250, 375, 500, 875, 1000)) -> PreTrainedTokenizerFast:
    """Tags, words, and from 40 on numbers: a random model then writes points at times."""
    table = {f"w{n}": n for n in range(VOCAB)} | {"<unk>": VOCAB}
    del table[f"w{FAST}"], table[f"w{SLOW}"], table[f"w{EOS}"]
    table |= {"<fast>": FAST, "<slow>": SLOW, "<end>": EOS}
    for place, number in enumerate(numbers):
        for n in range(40 + place, VOCAB, len(numbers)):
            table.pop(f"w{n}", None)
            table[str(number + n - 40 - place)] = n
    made = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")


@pytest.fixture(scope="module", params=["llava", "qwen2-vl"])
def family(request):
    name = request.param if request.param in FAMILIES else request.param.replace("-", "_")
    return FAMILIES[name]


@pytest.fixture(scope="module")
def model(family):
    return family.build()


def decoder(model, threshold: float = 0.5, **options) -> FastSlowDecoder:
    return FastSlowDecoder(model, words(), stages=STAGES, threshold=threshold, point_tokens=4, **options)


def prompts(family, model, batch: int = 4, padding: str | None = "left") -> dict[str, torch.Tensor]:
    return family.inputs(model, batch=batch, length=family.image_tokens + 14, padding=padding)


def one_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A row alone, its padding gone."""
    real = inputs["attention_mask"][row].bool() if "attention_mask" in inputs else slice(None)
    count, pixels = len(inputs["input_ids"]), inputs["pixel_values"]
    alone = {
        name: inputs[name][row : row + 1][:, real] for name in ("input_ids", "mm_token_type_ids") if name in inputs
    }
    alone["pixel_values"] = pixels.view(count, -1, *pixels.shape[1:])[row]
    if "image_grid_thw" in inputs:
        alone["image_grid_thw"] = inputs["image_grid_thw"][row : row + 1]
    return alone


@torch.no_grad()
def from_scratch(model, inputs: dict[str, torch.Tensor], mode: str) -> list[int]:
    """The rule written as a loop: every token from a forward over everything, without a cache."""
    said = [FAST if mode == "fast" else SLOW]
    stages = [] if mode == "fast" else [(5, []), (3, [21, 22])]

    def best() -> int:
        ids = torch.cat([inputs["input_ids"], torch.tensor([said])], 1)
        given = {**inputs, "input_ids": ids}
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            given["mm_token_type_ids"] = torch.cat([types, torch.zeros(1, len(said), dtype=types.dtype)], 1)
        for part in model.modules():
            if hasattr(part, "rope_deltas"):
                part.rope_deltas = None
        return int(model(**given, use_cache=False).logits[0, -1].argmax())

    for limit, opening in stages:
        said += opening
        for _ in range(limit):
            token = best()
            said.append(END if token == EOS else token)
            if said[-1] == END:
                break
        else:
            said.append(END)
    for _ in range(4):
        said.append(best())
        if said[-1] == EOS:
            break
    return said


def test_each_row_is_what_a_loop_without_a_cache_writes(family, model):
    inputs = prompts(family, model)
    fast, slow = decoder(model).both(**inputs)
    for row in range(4):
        alone = one_of(inputs, row)
        assert list(fast[row].tokens) == from_scratch(model, alone, "fast")
        assert list(slow[row].tokens) == from_scratch(model, alone, "slow")
        assert [fast[row].mode, slow[row].mode] == ["fast", "slow"]
        assert fast[row].tokens_used == len(fast[row].tokens) <= 5 and slow[row].tokens_used == len(slow[row].tokens)


def test_a_batch_is_its_rows_alone(family, model):
    inputs = prompts(family, model)
    theta = float(decoder(model).p_slow(decoder(model).read(**inputs)).sort().values[1:3].mean())
    together = decoder(model, theta).generate(**inputs)
    assert {one.mode for one in together} == {"fast", "slow"}
    for row, found in enumerate(together):
        (alone,) = decoder(model, theta).generate(**one_of(inputs, row))
        assert alone.tokens == found.tokens and alone.point == found.point
        assert alone.p_slow == pytest.approx(found.p_slow, abs=1e-5)


def test_the_ends_of_the_threshold_are_the_pure_decoders(family, model):
    inputs = prompts(family, model)
    fast, slow = decoder(model).both(**inputs)
    assert decoder(model, 1.0).generate(**inputs) == fast
    assert decoder(model, 0.0).generate(**inputs) == slow


def test_a_probability_that_underflows_is_slow_at_zero(family, model):
    other = copy.deepcopy(model)
    handle = other.get_output_embeddings().register_forward_hook(
        lambda module, given, out: out.index_fill(-1, torch.tensor([SLOW]), -1e4)
    )
    found = decoder(other, 0.0).generate(**prompts(family, model))
    handle.remove()
    assert all(one.mode == "slow" and one.p_slow == 0 for one in found)


def test_the_decision_is_the_probability_of_the_tag(family, model):
    inputs = prompts(family, model)
    with torch.no_grad():
        alone = [model(**one_of(inputs, row)).logits[0, -1] for row in range(4)]
    logits = torch.stack(alone)
    way, other = decoder(model), decoder(model, among="tags")
    torch.testing.assert_close(way.p_slow(way.read(**inputs)), logits.softmax(-1)[:, SLOW], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        other.p_slow(other.read(**inputs)), logits[:, [FAST, SLOW]].softmax(-1)[:, 1], atol=1e-5, rtol=1e-4
    )


def test_the_picture_is_read_once_for_the_decision_and_both_ways(family, model):
    tower = next(part for name, part in model.named_modules() if name.endswith(("vision_tower", "visual")))
    seen = []
    handle = tower.register_forward_hook(lambda *_: seen.append(1))
    decoder(model).both(**prompts(family, model))
    handle.remove()
    assert len(seen) == 1


def test_a_prompt_can_be_continued_again_and_is_not_disturbed_by_another(family, model):
    inputs = prompts(family, model)
    prompt = read_prompt(model, inputs)
    ids = torch.tensor([[21]] * 4)
    first = prompt.extend(ids).extend(ids)
    read_prompt(model, one_of(inputs, 1))  # leaves the positions of another prompt behind in the model
    again = prompt.select([2, 0]).extend(ids[:2]).extend(ids[:2])
    torch.testing.assert_close(again.logits, first.logits[[2, 0]], atol=1e-4, rtol=1e-4)
    assert prompt.cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_a_stage_that_meets_its_limit_is_cut_and_the_next_begins(family, model):
    found = decoder(model, 0.0).generate(**prompts(family, model))
    for one in found:
        summary = one.tokens[1 : one.tokens.index(END)]
        after = one.tokens[one.tokens.index(END) + 1 :]
        assert len(summary) <= 5 and ("summary" not in one.cut or len(summary) == 5)
        assert after[:2] == (21, 22) and END in after[2 : 2 + 3 + 1]
        assert len(one.tokens) <= 1 + 6 + 2 + 4 + 4
    assert any("summary" in one.cut for one in found)


def test_given_stages_are_written_and_the_rest_follows_from_them(family, model):
    inputs = prompts(family, model)
    way = decoder(model, 0.0)
    own = way.generate(**inputs)
    told = way.generate(**inputs, given={"summary": "w25 w26", "analysis": ["w23", "w24", "w27", "w28"]})
    assert [one.stage_texts["summary"] for one in told] == ["w25 w26"] * 4
    assert [one.stage_texts["analysis"] for one in told] == ["w23", "w24", "w27", "w28"]
    assert told[1].tokens[:8] == (SLOW, 25, 26, END, 21, 22, 24, END)
    repeated = way.generate(**inputs, given={"summary": [one.stage_texts["summary"] for one in own]})
    assert [one.tokens for one in repeated] == [one.tokens for one in own]
    with pytest.raises(ValueError, match="2 texts of 'summary' for 4 prompts"):
        way.generate(**inputs, given={"summary": ["w25", "w26"]})
    with pytest.raises(ValueError, match="'plan', which is none of the stages"):
        way.generate(**inputs, given={"plan": "w25"})


def test_pixels_are_those_of_the_picture_as_the_model_saw_it(family, model):
    inputs = prompts(family, model, batch=1)
    (size,) = decoder(model, coordinates="pixels")._sizes(inputs)
    if family.name == "llava":
        assert size == (16.0, 16.0)
    else:
        rows, columns = family.extras["grid"]
        patch = model.config.vision_config.patch_size
        assert size == (columns * patch, rows * patch)
    assert decoder(model)._sizes(inputs) == [None]


def test_bad_options_are_refused(family, model):
    text = words()
    with pytest.raises(ValueError, match=r"slow_tag 'w21 w22' is 2 tokens; it must be one token"):
        FastSlowDecoder(model, text, "<fast>", "w21 w22")
    with pytest.raises(ValueError, match=r"fast_tag '<quick>' is unknown to the tokenizer"):
        FastSlowDecoder(model, text, "<quick>", "<slow>")
    with pytest.raises(ValueError, match="both '<slow>'; they must differ"):
        FastSlowDecoder(model, text, "<slow>", "<slow>", stages=STAGES)
    with pytest.raises(ValueError, match=r"threshold is 1\.5; it is a probability"):
        decoder(model, 1.5)
    with pytest.raises(ValueError, match="each name once"):
        FastSlowDecoder(model, text, stages=(STAGES[0], STAGES[0]))
    with pytest.raises(ValueError, match="limit of stage 'summary' is 0"):
        FastSlowDecoder(model, text, stages=(GroundingStage("summary", "w20", 0),))
    with pytest.raises(ValueError, match="among is 'all'"):
        decoder(model, among="all")
    with pytest.raises(ValueError, match="coordinates is 'percent'"):
        decoder(model, coordinates="percent")
    with pytest.raises(ValueError, match="tokenizer is None"):
        FastSlowDecoder(model)


def test_prompts_without_a_picture_or_padded_on_the_right_are_refused(family, model):
    inputs = prompts(family, model)
    blind = torch.full((2, 6), FIRST_WORD)
    with pytest.raises(ValueError, match="give a picture"):
        decoder(model).generate(input_ids=blind)
    right = prompts(family, model, padding=None)
    right["attention_mask"] = torch.ones_like(right["input_ids"])
    right["attention_mask"][1, -2:] = 0
    with pytest.raises(ValueError, match=r"1 of 4 prompts end in padding; .* pad on the left"):
        decoder(model).generate(**right)
    assert decoder(model).generate(**inputs)


def test_a_model_without_pictures_is_refused():
    with pytest.raises(UnsupportedModel, match="names no image token"):
        FastSlowDecoder(FAMILIES["llama"].build(), words(), stages=STAGES)


def test_a_recurrent_cache_is_refused():
    hybrid = next((name for name, one in FAMILIES.items() if one.hybrid and one.decoder), None)
    assert hybrid is not None
    built = FAMILIES[hybrid].build()
    with pytest.raises(UnsupportedModel, match="changed in place"):
        read_prompt(built, FAMILIES[hybrid].inputs(built, batch=1))


def test_a_model_is_loaded_from_its_folder(tmp_path):
    family = FAMILIES["llava"]
    model = family.build()
    model.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    inputs = prompts(family, model)
    by_path = FastSlowDecoder(tmp_path, stages=STAGES, threshold=0.0, point_tokens=4)
    found = by_path.generate(**inputs)
    assert [one.tokens for one in found] == [one.tokens for one in decoder(model, 0.0).generate(**inputs)]
