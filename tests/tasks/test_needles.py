import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.tasks.needles import CLASSIC_FACT, needle, unigram_recall


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE trained on a few lines: offsets, leading spaces, several tokens a word, as real ones have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(CLASSIC_FACT), "the key is in the old mill and the pass key is 123"] * 5, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


@pytest.mark.parametrize("style", ["sentence", "json", "passkey"])
def test_token_spans_hold_the_answer_and_lengths_are_kept(style, tokenizer):
    prompts = needle(style, tokenizer=tokenizer, lengths=[600, 900], depths=[0.0, 0.5, 1.0])
    assert [prompt.depth for prompt in prompts] == [0.0, 0.5, 1.0] * 2
    for prompt, length in zip(prompts, [600] * 3 + [900] * 3, strict=True):
        assert prompt.input_ids is not None and prompt.answer_ids is not None
        assert length * (0.6 if style == "json" else 0.97) < len(prompt.input_ids) <= length
        for start, end in prompt.spans:
            told = tokenizer.decode(prompt.input_ids[start:end])
            assert prompt.answer in told and len(told) <= len(prompt.answer) + 2
        assert torch.equal(prompt.answer_ids, prompt.input_ids[slice(*prompt.span)])
    starts = [prompt.span[0] for prompt in prompts[:3]]
    assert starts == sorted(starts) and starts[2] > starts[0] + 200
    assert len(prompts[0].spans) == (2 if style == "passkey" else 1)


def test_without_a_tokenizer_spans_are_characters():
    haystack = "One short sentence. " * 50
    for prompt in needle("sentence", facts=[CLASSIC_FACT], haystack=haystack, lengths=[700], depths=[0, 0.4, 1]):
        (start, end) = prompt.span
        assert prompt.text[start:end] == prompt.answer == CLASSIC_FACT[2]
        assert prompt.input_ids is None and len(prompt.text) <= 700
        front = prompt.text[: prompt.text.index(CLASSIC_FACT[0])]
        assert front == "" or front.endswith((". ", " "))
        assert prompt.text.endswith(f"Question: {CLASSIC_FACT[1]}\nAnswer:")


@given(st.integers(24, 80), st.floats(0, 1), st.integers(0, 20))
def test_symbols_end_where_the_answer_begins(length, depth, seed):
    (prompt,) = needle("symbols", lengths=[length], depths=[depth], seed=seed)
    assert prompt.input_ids is not None and prompt.answer_ids is not None and len(prompt.input_ids) == length
    start, end = prompt.span
    assert torch.equal(prompt.input_ids[start:end], prompt.answer_ids)
    assert prompt.input_ids[-1] == prompt.input_ids[start - 1]  # the key
    assert len(prompt.text.split()) == length


def test_any_integer_vocabulary_will_do():
    prompts = needle("symbols", words=range(1000, 1050), marks=(5, 6), bos=2, lengths=[64], size=4)
    for prompt in prompts:
        assert prompt.input_ids is not None and prompt.input_ids[0] == 2
        assert set(prompt.input_ids.tolist()) <= {2, 5, 6, *range(1000, 1050)}
        assert prompt.input_ids[-3:-1].tolist() == [6, 5]


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others():
    one, two, other = (needle("sentence", lengths=[600], seed=seed) for seed in (1, 1, 2))
    assert [p.text for p in one] == [p.text for p in two] != [p.text for p in other]


def test_recall_counts_each_token_as_often_as_it_is_told():
    assert unigram_recall(["eat", "a", "lot"], ["eat", "a", "a", "lot"]) == 0.75
    assert unigram_recall([3, 4, 5, 9], [5, 4, 3]) == 1.0 and unigram_recall([], [1]) == 0.0
    with pytest.raises(ValueError, match="the answer is empty"):
        unigram_recall([1], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "jsno"}, r"expected one of .*; did you mean 'json'\?"),
        ({"depths": [1.2]}, r"depth is 1.2; expected numbers from 0"),
        ({"haystack": "  "}, r"haystack is empty"),
        ({"lengths": [20]}, r"length is 20; needle and question alone take \d+"),
        ({"facts": [("The key is red.", "?", "blue")]}, r"'blue' is not part of the sentence"),
        ({"style": "symbols", "words": range(9, 40)}, r"words without marks"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        needle(**arguments)
