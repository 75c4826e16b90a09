from functools import cache
from typing import Any, cast

import pytest
import torch
from tests.zoo import FAMILIES, families, words
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate, EditRows
from headwise.attend.head_map import HeadMap
from headwise.errors import UnsupportedModel
from headwise.heads.decoding import decode, forced_answers, greedy_answers
from headwise.heads.retrieval import StrongestKeys, copy_hits, copy_scores, retrieval_scores
from headwise.hf.addresses import layout
from headwise.hf.session import probe, steer
from headwise.specimens import planted, planted_llama
from headwise.tasks.needles import Needle, needle

DECODERS = families(kind="decoder") + families(kind="multimodal")


@cache
def needles(lengths: tuple[int, ...] = (40, 64), repeats: int = 3):
    """Needles in the words of the planted models."""
    return needle("symbols", words=range(4, 60), marks=(2, 3), lengths=lengths, depths=(0, 0.5, 1), repeats=repeats)


def tokens_of(prompt: Needle) -> tuple[list[int], list[int]]:
    """The prompt and its answer."""
    assert prompt.input_ids is not None and prompt.answer_ids is not None
    return prompt.input_ids.tolist(), prompt.answer_ids.tolist()


class Scripted(nn.Module):
    """An unembedding that says what it is told, step by step, whatever the model computes."""

    def __init__(self, tokens: list[int], size: int):
        super().__init__()
        self.tokens, self.size, self.calls = tokens, size, 0

    def forward(self, hidden: Tensor) -> Tensor:
        step = max(0, self.calls - 1)  # the first call is the prompt before its last token, of which nothing is said
        self.calls += 1
        said = torch.nn.functional.one_hot(torch.tensor(self.tokens[step]), self.size).float()
        return said.expand(*hidden.shape[:2], -1)


def looking_at(model: nn.Module, plan: dict[Head, list[int]], prompt: int) -> EditRows:
    """An edit under which heads put all weight on the planned key at each step of decoding."""

    def change(weights: Tensor, rows) -> Tensor:
        step = int(rows.positions[0]) - (prompt - 1)
        if step < 0:
            return weights
        new = torch.zeros_like(weights)
        for i, number in enumerate(rows.call.heads):
            new[:, i, :, plan[Head(rows.call.layer, number)][step]] = 1
        return new

    return EditRows(change, heads=list(plan))


def scripted_run(
    said: list[int], plan: dict[Head, list[int]], prompt: list[int], span, **options
) -> dict[Head, float | None]:
    model = FAMILIES["llama"].build()
    model.lm_head = Scripted(said, 64)
    with steer(model, looking_at(model, plan, len(prompt))):
        found = retrieval_scores(model, [prompt], spans=[span], max_new_tokens=len(said), **options)
    return found.of("retrieval")


@pytest.mark.parametrize("right", range(7))
def test_a_head_that_looks_at_the_copied_token_in_m_of_n_steps_scores_m_over_n(right):
    prompt, span, answer = [1, *range(20, 26), *range(30, 36)], (1, 7), list(range(20, 26))
    head = Head(1, 2)
    plan = {head: [1 + step if step < right else 0 for step in range(6)]}
    assert scripted_run(answer, plan, prompt, span)[head] == pytest.approx(right / 6)
    assert scripted_run(answer, plan, prompt, span, unique=False)[head] == pytest.approx(right / 6)


def test_what_is_no_hit():
    # The answer stands in the span (1 to 6); the same tokens stand behind it as well.
    answer = list(range(20, 26))
    prompt = [1, *answer, 40, *answer, 41]
    plans = {
        Head(0, 0): [1 + (step + 1) % 6 for step in range(6)],  # inside the span, but another token is said
        Head(0, 1): [8 + step for step in range(6)],  # the same token, outside the span
        Head(0, 2): [0] * 6,  # the sink
        Head(1, 0): [len(prompt) - 1 + step for step in range(6)],  # itself: the copied token's own row
        Head(1, 1): [1 + step for step in range(6)],
    }
    scores = scripted_run(answer, plans, prompt, (1, 7))
    assert [scores[head] for head in plans] == [0, 0, 0, 0, 1]


def test_a_token_said_twice_counts_once_unless_counting_as_the_official_code():
    prompt, head = [1, 20, 21, 22, 40], Head(0, 3)
    said = [20, 20, 20, 21]
    plan = {head: [1, 1, 1, 2]}
    assert scripted_run(said, plan, prompt, (1, 4))[head] == pytest.approx(2 / 3)
    assert scripted_run(said, plan, prompt, (1, 4), unique=False)[head] == pytest.approx(4 / 3)
    # An answer that holds a token twice: one hit of it is one of its two tokens' worth officially, all of it as a set.
    assert scripted_run([20, 20], {head: [1, 2]}, [1, 20, 20, 40], (1, 3))[head] == 1


def test_a_key_outside_the_answer_counts_in_no_telling_and_a_second_telling_counts():
    answer = [20, 21, 22]
    prompt, head = [1, *answer, 40, *answer, 41], Head(1, 3)
    plan = {head: [5, 2, 7]}
    assert scripted_run(answer, plan, prompt, (1, 4))[head] == pytest.approx(1 / 3)
    assert scripted_run(answer, plan, prompt, [(1, 4), (5, 8)])[head] == 1


@pytest.mark.parametrize(("module", "tolerance"), [(planted, 0.0), (planted_llama, 1e-3)])
def test_planted_heads_score_one_and_the_others_nothing(module, tolerance):
    model = module.build()
    found = retrieval_scores(model, needles(), max_new_tokens=6).of("retrieval")
    assert found[module.INDUCTION] >= 1 - tolerance
    assert all(score <= tolerance for head, score in found.items() if head != module.INDUCTION)


def test_the_map_holds_one_run_per_answered_prompt_in_the_order_of_the_prompts():
    prompts = needles()
    found = retrieval_scores(planted.build(), prompts, max_new_tokens=6)
    assert len(found.runs["retrieval"]) == len(prompts) and found.source.startswith("18 of 18 prompts answered")
    # A prompt whose key is not in its text cannot be answered and is no run.
    broken, *ids = [tokens_of(prompt)[0] for prompt in prompts]
    broken[-1] = 63
    spans = [prompt.span for prompt in prompts]
    mixed = retrieval_scores(planted.build(), [broken, *ids], spans=spans, max_new_tokens=6)
    assert mixed.runs["retrieval"] == found.runs["retrieval"][1:]
    assert mixed.activation_frequency()[planted.INDUCTION] == 1


def reference_keys(model: Any, ids: Tensor, rows: slice) -> Tensor:
    """`[h r]` strongest keys from eager weights of one forward over the whole text, without cache or padding."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=ids[None], output_attentions=True, use_cache=False).attentions
    rest = torch.cat([m[0, :, rows] for m in maps if m is not None])
    sink = 1 - rest.sum(-1)
    top = rest.topk(2, dim=-1)
    keys = top.indices[..., 0].masked_fill(sink > top.values[..., 0], -1)
    clear = (top.values[..., 0] - top.values[..., 1] > 1e-4) & ((top.values[..., 0] - sink).abs() > 1e-4)
    return keys.masked_fill(~clear, -2)


@pytest.mark.parametrize("name", DECODERS)
def test_strongest_keys_are_those_of_eager_weights(name):
    """Under left padding, grouped keys, sliding caches, softcap, learned sinks and layers without attention."""
    model = FAMILIES[name].build()
    prompts = [words(1, n, torch.Generator().manual_seed(n))[0] for n in (17, 9, 12)]
    reader = StrongestKeys()
    answers, padding = decode(model, prompts, 5, set(), reader)
    found = reader.positions(layout(model))
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        (alone,), _ = decode(model, [prompt], 5, set())
        assert answer == alone
        text = torch.cat([prompt, torch.tensor(answer[:-1])])
        expected = reference_keys(model, text, slice(len(prompt) - 1, None))
        seen = found[row] - padding[row]
        seen = seen.masked_fill(found[row] < 0, -1)
        assert float((expected == -2).float().mean()) < 0.2
        assert torch.equal(seen.masked_fill(expected == -2, -2), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_teacher_forced_scores_are_those_of_decoding(name):
    model = FAMILIES[name].build()
    prompts = [words(1, n, torch.Generator().manual_seed(n))[0] for n in (17, 9, 12)]
    spans = [(0, len(prompt)) for prompt in prompts]
    said = greedy_answers(model, prompts, max_new_tokens=6)
    options = {"spans": spans, "min_recall": None, "unique": False}
    decoded = retrieval_scores(model, prompts, max_new_tokens=6, **options).runs["retrieval"]
    forced = copy_scores(model, prompts, said, **options).runs["retrieval"]
    for one, other in zip(decoded, forced, strict=True):
        assert one == pytest.approx(other, abs=1e-12)


@pytest.mark.parametrize("name", DECODERS)
def test_answers_are_those_of_generate(name):
    """Padded on the left together, as `generate` takes them; nothing of headwise is in its way."""
    model: Any = FAMILIES[name].build()
    prompts = [words(1, n, torch.Generator().manual_seed(n))[0] for n in (17, 9, 12)]
    ids = torch.stack([torch.cat([torch.zeros(17 - len(one), dtype=torch.long), one]) for one in prompts])
    mask = torch.stack([torch.arange(17) >= 17 - len(one) for one in prompts]).long()
    expected = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 17:]
    assert greedy_answers(model, prompts, max_new_tokens=6) == expected.tolist()


def test_single_hits_add_up_to_the_scores():
    model, prompts = planted_llama.build(), needles()
    found = copy_hits(model, prompts)
    scores = copy_scores(model, prompts).runs["retrieval"]
    for prompt, (said, hits), run in zip(prompts, found, scores, strict=True):
        assert said == tokens_of(prompt)[1]
        assert {head: float(at.double().mean()) for head, at in hits.items()} == pytest.approx(run)
        assert bool(hits[planted_llama.INDUCTION].all())


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_forced_answers_are_the_choices_of_an_unpadded_forward(name):
    model = FAMILIES[name].build()
    drawn = [words(1, n, torch.Generator().manual_seed(n))[0] for n in (17, 9, 12)]
    prompts, targets = [text[:-4] for text in drawn], [text[-4:].tolist()[: 2 + row] for row, text in enumerate(drawn)]
    for prompt, target, said in zip(prompts, targets, forced_answers(model, prompts, targets), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, torch.tensor(target)])[None]).logits[0]
        assert said == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_batching_changes_nothing():
    prompts = needles(lengths=(30, 40, 50))
    model = planted_llama.build()
    together = retrieval_scores(model, prompts, max_new_tokens=6)
    alone = retrieval_scores(model, prompts, max_new_tokens=6, batch_tokens=1)
    assert together.runs == alone.runs
    assert copy_scores(model, prompts).runs == copy_scores(model, prompts, batch_tokens=1).runs == together.runs


def test_equal_weights_go_to_the_lower_key():
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    reader = StrongestKeys()
    decode(model, [torch.arange(20, 29), torch.arange(20, 25)], 3, set(), reader)
    keys = reader.positions(layout(model))
    assert torch.equal(keys[0], torch.zeros_like(keys[0]))
    assert torch.equal(keys[1], torch.full_like(keys[1], 4))  # the first real token behind four of padding


def test_the_prompt_runs_fused_and_only_one_row_a_step_is_read(monkeypatch):
    from headwise.attend.call import Call

    rows = []
    plain = Call.scores

    def counted(self, index, columns=None):
        rows.append(self.q[:, :, index].shape[2])
        return plain(self, index, columns)

    monkeypatch.setattr(Call, "scores", counted)
    monkeypatch.setattr(Call, "log_weights", lambda *_: pytest.fail("whole rows were formed"))
    prompts = needles(lengths=(64,), repeats=1)
    retrieval_scores(planted.build(), prompts, max_new_tokens=6)
    assert rows == [1] * (6 * 2)  # six steps, two layers; none in the prompt
    rows.clear()
    copy_scores(planted.build(), prompts)
    assert rows == [6] * 2


def test_uniform_ablation_is_a_query_of_zeros_and_zero_ablation_drops_columns_of_the_projection():
    """The two ways of masking heads; in the official code the first, here with grouped keys."""
    ids = words(2, 14, torch.Generator().manual_seed(1))
    for mode in ("uniform", "zero"):
        model, other = FAMILIES["llama"].build(), FAMILIES["llama"].build()
        attention = other.model.layers[1].self_attn
        with torch.no_grad():
            if mode == "uniform":
                attention.q_proj.weight[2 * 8 : 3 * 8] = 0
            else:
                attention.o_proj.weight[:, 2 * 8 : 3 * 8] = 0
            with steer(model, Ablate(heads="1.2", mode=mode)):
                found = model(input_ids=ids).logits
            torch.testing.assert_close(found, other(input_ids=ids).logits, atol=1e-6, rtol=1e-5)


def test_masking_while_decoding_leaves_the_prompt_alone():
    """`when="generated"` is the official masking: the prompt without its last token is read with all heads."""
    model, prompt = planted.build(), needles(lengths=(40,), repeats=1)[0]
    seen = []

    class Watch(StrongestKeys):
        def sparse(self, reading):
            if reading.edited:
                seen.append(reading.call.q.shape[2])

    with steer(model, Ablate(heads=[planted.INDUCTION], mode="uniform", when="generated")), probe(model, Watch()):
        (masked,) = greedy_answers(model, [prompt], max_new_tokens=6)
    assert seen == [1] * 6
    assert masked != greedy_answers(model, [prompt], max_new_tokens=6)[0] == tokens_of(prompt)[1]


def test_scores_can_be_taken_while_other_heads_are_ablated():
    model, prompts = planted.build(), needles(lengths=(40,))
    with steer(model, Ablate(heads=[planted.PREVIOUS])), pytest.raises(ValueError, match="none of 9 prompts"):
        retrieval_scores(model, prompts, max_new_tokens=6)
    with steer(model, Ablate(heads=[planted.SINK, planted.DUPLICATE])):
        assert retrieval_scores(model, prompts, max_new_tokens=6).of()[planted.INDUCTION] == 1


def test_a_stop_token_ends_an_answer():
    model: Any = planted.build()
    prompt = needles(lengths=(40,), repeats=1)[0]
    answer = tokens_of(prompt)[1]
    assert greedy_answers(model, [prompt], stop=answer[3]) == [answer[:4]]
    found = retrieval_scores(model, [prompt], stop=[answer[3]])
    assert found.of()[planted.INDUCTION] == pytest.approx(4 / 6)
    model.generation_config.eos_token_id = answer[1]
    assert greedy_answers(model, [prompt], max_new_tokens=6) == [answer[:2]]
    assert len(greedy_answers(model, [prompt], max_new_tokens=6, stop=[])[0]) == 6


def test_words_are_compared_where_there_is_a_tokenizer():
    from headwise.specimens.registry import word_tokenizer

    names = [f"w{i}" for i in range(60)]
    names[0], names[1], names[20:26] = "<bos>", "<unk>", ["cat", "cats", "sitting", "sit", "x", "y"]
    tokenizer = word_tokenizer(names)
    prompt, span = [0, 20, 22, 40], (1, 3)
    said = {Head(0, 0): [0, 0]}
    options = {"prompt": prompt, "span": span}
    # The same stems: a run, though without hits.
    assert scripted_run([21, 23], said, **options, tokenizer=tokenizer)[Head(0, 0)] == 0
    with pytest.raises(ValueError, match=r"none of 1 prompts was answered: their recall is 0\.00"):
        scripted_run([21, 23], said, **options)


def test_published_scores_are_read_with_their_runs(tmp_path):
    """The authors' format, by a file written for this test: their own score files are not shipped with headwise."""
    path = tmp_path / "Llama-toy.json"
    path.write_text('{"0-0": [0.0, 0.0], "0-1": [1.0, 0.5], "1-0": [], "1-1": [0.1, 0.2]}')
    found = HeadMap.from_retrieval_json(path)
    assert [str(head) for head in found.select(threshold=0.1)] == ["0.1", "1.1"]
    assert found.of()[Head(0, 1)] == 0.75 and found.of()[Head(1, 0)] is None
    assert found.activation_frequency() == {Head(0, 0): 0, Head(0, 1): 1, Head(1, 1): 1}
    mine = retrieval_scores(planted.build(), needles(), max_new_tokens=6)
    mine.to_retrieval_json(tmp_path / "mine.json")
    again = HeadMap.from_retrieval_json(tmp_path / "mine.json", layout(planted.build()))
    assert again.runs == mine.runs and again.of() == mine.of()


def test_the_strongest_heads_that_the_authors_name_are_read_in_their_order():
    """The ten figures of the official README for Llama-2-7B-80K, written here in the format of its score files."""
    told = {
        "16-19": 0.94, "11-15": 0.92, "8-26": 0.80, "6-9": 0.62, "7-12": 0.61, "17-22": 0.56, "11-2": 0.46,
        "6-16": 0.44, "19-15": 0.42, "21-30": 0.40,
    }  # fmt: skip
    zero = {f"{layer}-{head}": [0.0] for layer in range(32) for head in range(32)}
    found = HeadMap.from_retrieval_json({**zero, **{place: [score] for place, score in told.items()}})
    assert [f"{head.layer}-{head.head}" for head in found.top(k=10)] == list(told)
    assert len(found.select(threshold=0.1)) == 10 and len(found.layout.heads()) == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spans": [(-1, -1)]}, r"prompt 0: its span is \(-1, -1\); expected 0 <= start < end <= 4"),
        ({"spans": [(2, 2)]}, r"its span is \(2, 2\)"),
        ({"spans": [(2, 5)]}, r"its span is \(2, 5\)"),
        ({"spans": [()]}, r"prompt 0 has no span"),
        ({"spans": []}, r"1 prompts but 0 spans"),
        ({"spans": None}, r"spans is missing"),
        ({"min_recall": 1.0}, r"min_recall is 1.0; expected 0 to 1"),
        ({"prompts": []}, r"there are no prompts"),
        ({"prompts": [[1, 2, 3, 99]]}, r"prompt 0 has ids from 1 to 99; the model knows 0 to 63"),
        ({"prompts": [[]]}, r"prompt 0 has shape \(0,\)"),
        ({"prompts": [[1] * 300], "spans": [(1, 2)]}, r"the longest has 300 tokens but the model reads 256"),
    ],
)
def test_refusals(options, message):
    given = {"prompts": [[1, 2, 3, 4]], "spans": [(1, 3)], **options}
    for function in (retrieval_scores, copy_scores):
        with pytest.raises(ValueError, match=message):
            function(planted.build(), **given)


def test_more_refusals():
    model, score = planted.build(), cast(Any, retrieval_scores)
    with pytest.raises(ValueError, match=r"max_new_tokens is 0"):
        retrieval_scores(model, needles(), max_new_tokens=0)
    with pytest.raises(ValueError, match=r"18 prompts but 1 targets"):
        copy_scores(model, needles(), [[1]])
    with pytest.raises(ValueError, match=r"stop is \[-1\]"):
        greedy_answers(model, needles(), stop=-1)
    with pytest.raises(ValueError, match=r"prompt 0 has no tokens; make the needles with tokenizer="):
        retrieval_scores(model, needle("sentence"))
    with pytest.raises(ValueError, match=r"model is in training mode"):
        retrieval_scores(planted.build().train(), needles())
    with pytest.raises(TypeError, match="do_sample"):
        score(model, needles(), do_sample=True)
    for name in ("bert", "t5", "vit"):
        with pytest.raises(UnsupportedModel, match=r"does not continue a text by itself"):
            retrieval_scores(FAMILIES[name].build(), [[1, 2, 3]], spans=[(0, 1)])
