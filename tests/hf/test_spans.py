"""Pieces of a prompt are found in its tokens, by characters, by tokens, or by the official overlap rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from headwise.errors import InputError
from headwise.hf.spans import Span, find_spans, token_span

TEXT = "Ada wrote a note. Ben read the note, and Ada's notebook stayed closed. 数学 note."
PIECE = " read the note, and Ada"


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level pieces with a start token, as most decoders have them."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([TEXT] * 4, BpeTrainer(vocab_size=330, special_tokens=["<s>"], initial_alphabet=alphabet))
    model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>")


def read(tokenizer, text, span, **options):
    return tokenizer.decode(tokenizer(text, **options)["input_ids"][span.start : span.end])


def test_every_occurrence_is_listed_in_order(tokenizer):
    spans = find_spans(tokenizer, TEXT, "note")
    assert len(spans) == 4 and spans == sorted(spans)
    assert [read(tokenizer, TEXT, span).strip(" .,")[:4] for span in spans] == ["note"] * 4


@given(st.integers(0, len(TEXT) - 1), st.integers(1, 12), st.booleans())
def test_the_tokens_hold_the_characters_and_no_token_more(tokenizer, start, size, special):
    part = TEXT[start : start + size]
    for span in find_spans(tokenizer, TEXT, part, add_special_tokens=special):
        assert part in read(tokenizer, TEXT, span, add_special_tokens=special)
        if len(span) > 1 and part.isascii():  # a character may be several tokens of the same offsets
            for shorter in (Span(span.start + 1, span.end), Span(span.start, span.end - 1)):
                assert part not in read(tokenizer, TEXT, shorter, add_special_tokens=special)


def test_a_character_of_several_tokens_is_taken_whole(tokenizer):
    (span,) = find_spans(tokenizer, "a 鬱 b", "鬱")
    assert len(span) >= 2
    assert read(tokenizer, "a 鬱 b", span).strip() == "鬱"


def test_special_tokens_hold_no_characters():
    assert token_span([(0, 0), (0, 3), (3, 7), (0, 0)], 0, 4) == Span(1, 3)
    assert token_span([(0, 0), (0, 3)], 5, 6) is None


def test_by_tokens_the_ids_must_match(tokenizer):
    spans = find_spans(tokenizer, TEXT, "note", by="tokens")
    assert set(spans) <= set(find_spans(tokenizer, TEXT, "note"))
    assert all(read(tokenizer, TEXT, span).strip() == "note" for span in spans)


def test_the_official_rule_takes_the_first_window_with_nine_tenths(tokenizer):
    (span,) = find_spans(tokenizer, TEXT, PIECE, by="overlap")
    assert "read the" in read(tokenizer, TEXT, span)
    assert len(span) == len(tokenizer(PIECE, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("by", ["characters", "tokens", "overlap"])
def test_absence_raises(tokenizer, by):
    with pytest.raises(ValueError, match="'Zebra' does not occur"):
        find_spans(tokenizer, TEXT, "Zebra", by=by)


def test_wrong_questions_say_what_is_wrong(tokenizer):
    with pytest.raises(ValueError, match="part is empty"):
        find_spans(tokenizer, TEXT, "")
    with pytest.raises(ValueError, match="by is 'words'"):
        find_spans(tokenizer, TEXT, "note", by="words")

    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="Slow gives no offsets"):
        find_spans(Slow(), TEXT, "note")


def test_spans_move_with_padding():
    assert Span(2, 5).shifted(3) == Span(5, 8) and len(Span(2, 5)) == 3
