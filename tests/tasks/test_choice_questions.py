"""Multiple choice with its answer open: what the tokens say, minimal pairs, mutations, text form, refusals."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headwise.tasks.choice_questions import ChoiceQuestion, choice_prompts, written_choices
from headwise.tasks.symbols import Symbols

SYMBOLS = Symbols()


def said(prompts, i=0):
    return SYMBOLS.text(prompts.input_ids[i]).split()


@pytest.mark.parametrize("order", ["text-first", "label-first"])
@pytest.mark.parametrize("labels", ["standard", "random", "permuted", "digits"])
def test_prompt_says_which_label_is_right(labels, order):
    prompts, twins = choice_prompts(40, labels=labels, order=order, generator=torch.Generator().manual_seed(0))
    for i in range(40):
        words = said(prompts, i)
        assert words[:2] == ["<bos>", "OPT"] and words[-3:-1] == ["ANS", "Q"]
        listed = words[2:10]
        texts, tags = (listed[::2], listed[1::2]) if order == "text-first" else (listed[1::2], listed[::2])
        right = texts.index(words[-1])
        assert right == int(prompts.right[i])
        assert SYMBOLS.names[int(prompts.answers[i])] == tags[right]
        assert [words[int(at)] for at in prompts.label_at[i]] == tags
        assert [words[int(a)] for a, _ in prompts.text_at[i]] == texts
        assert len(set(tags)) == 4 and set(tags) <= set("ABCDEFGH") | set("0123456789")
        if labels == "standard":
            assert tags == list("ABCD")
        if labels == "permuted":
            assert sorted(tags) == list("ABCD")
        # The twin differs in what it asks for, and in nothing else.
        differs = (prompts.input_ids[i] != twins.input_ids[i]).nonzero().flatten().tolist()
        assert differs == [len(words) - 1] and int(twins.right[i]) != right
    if labels == "permuted":
        assert len({tuple(row) for row in prompts.labels.tolist()}) > 5


def test_metrics_are_among_the_labels_on_offer():
    prompts, _ = choice_prompts(3, right=torch.tensor([0, 1, 2]))
    logits = torch.zeros(3, len(SYMBOLS))
    logits[:, prompts.labels[0, 1]] = 2.0
    logits[:, 5] = 9.0  # no label: counts for `all` alone
    found = prompts.accuracy(logits)
    assert found["labels"] == pytest.approx(1 / 3) and found["all"] == 0
    norm = torch.tensor([2.0, 0, 0, 0]).logsumexp(0)
    assert found["loss"] == pytest.approx(float(norm - 2 / 3), abs=1e-5)
    assert prompts.chosen(logits).tolist() == [1, 1, 1]
    assert prompts.part(slice(1, 3)).right.tolist() == [1, 2]


def test_groups_follow_the_index_that_is_asked_about():
    prompts, _ = choice_prompts(2, right=torch.tensor([0, 3]))
    gold, other = prompts.groups(), prompts.groups(torch.tensor([2, 2]))
    assert [int(row.nonzero()[0]) for row in gold["right-label"]] == [3, 9]
    assert [int(row.nonzero()[0]) for row in other["right-label"]] == [7, 7]
    assert torch.equal(gold["labels"], other["labels"])
    assert torch.equal(gold["right-label"] | gold["wrong-labels"], gold["labels"])
    assert gold["question"][:, -1].all() and gold["first"][:, 0].all() and int(gold["last"].sum()) == 4


def test_without_text_nothing_tells_the_options_apart():
    prompts, _ = choice_prompts(4, without_text=True)
    assert said(prompts)[2:10] == [".", "A", ".", "B", ".", "C", ".", "D"]


def word_tokenizer(words=()):
    pieces = ["<pad>", "<unk>", *"ABCDEFGH", *"0123456789", "Which", "is", "red", "sky", "blood", "grass", "sea",
              "Answer", "?", ":", "(", ")", "[", "]", ".", "Yes", "No", *words]  # fmt: skip
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


ASKED = ChoiceQuestion("Which is red?", ("sky", "blood", "grass", "sea"), 1)
OTHER = ChoiceQuestion("red?", ("sea", "sky", "grass grass", "blood"), 3)


@pytest.mark.parametrize("brackets", ["()", "[]", ")", "."])
def test_text_form_marks_labels_and_texts(brackets):
    tokenizer = word_tokenizer()
    prompts = written_choices([ASKED, OTHER], tokenizer, brackets=brackets, examples=[OTHER])
    names = tokenizer.convert_ids_to_tokens
    for i, asked in enumerate([ASKED, OTHER]):
        ids = prompts.input_ids[i]
        assert names(ids[prompts.label_at[i]].tolist()) == list("ABCD")
        for (a, z), text in zip(prompts.text_at[i].tolist(), asked.options, strict=True):
            assert names(ids[a:z].tolist()) == text.split()
        assert names([int(prompts.answers[i])]) == ["ABCD"[asked.right]]
        a, z = prompts.question[i].tolist()
        assert "?" in names(ids[a:z].tolist())[-1]
    ending = [":", brackets[0]] if len(brackets) == 2 else ["Answer", ":"]
    assert names(prompts.input_ids[0, -2:].tolist()) == ending
    assert prompts.real.sum(1).tolist() != [prompts.real.shape[1]] * 2 and bool(prompts.real[:, -1].all())
    assert set(prompts.inputs()) == {"input_ids", "attention_mask", "position_ids"}


def test_labels_of_the_text_form_may_change_from_question_to_question():
    tokenizer = word_tokenizer()
    prompts = written_choices([ASKED, ASKED], tokenizer, labels=lambda i: ["DACB", "7310"][i], without_text=True)
    assert [tokenizer.convert_ids_to_tokens(row) for row in prompts.labels.tolist()] == [list("DACB"), list("7310")]
    assert int(prompts.text_at.sum()) == 0 and not bool(prompts.groups()["right-text"].any())


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="two options have the text 'sky'"):
        ChoiceQuestion("Which?", ("sky", "sea", "sky"), 0)
    with pytest.raises(ValueError, match="right is 2; the options have indices 0 to 1"):
        ChoiceQuestion("Which?", ("sky", "sea"), 2)
    with pytest.raises(ValueError, match="at least 2"):
        ChoiceQuestion("Which?", ("sky",), 0)
    with pytest.raises(ValueError, match=r"label 'A\.B' is 3 tokens"):
        written_choices([ASKED], word_tokenizer(), labels=["A.B", "C", "D", "E"])
    with pytest.raises(ValueError, match="for 4 options"):
        written_choices([ASKED], word_tokenizer(), labels="AAB")
    with pytest.raises(ValueError, match="different numbers of options"):
        written_choices([ASKED, ChoiceQuestion("red?", ("sky", "sea"), 0)], word_tokenizer())
    with pytest.raises(ValueError, match="brackets is"):
        written_choices([ASKED], word_tokenizer(), brackets="")
    with pytest.raises(ValueError, match="questions is empty"):
        written_choices([], word_tokenizer())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"options": 1}, "of 1 options"),
        ({"labels": "letters"}, "labels is 'letters'"),
        ({"labels": ["A", "B", "C"]}, "for 4 options"),
        ({"order": "both"}, "order is 'both'"),
        ({"right": torch.tensor([4, 0])}, r"right is \[4, 0\]"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        choice_prompts(2, **options)
