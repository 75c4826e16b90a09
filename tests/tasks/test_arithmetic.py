"""Arithmetic in text and in symbols: results computed a second time, spans read back, counterfactuals compared."""

import re

import pytest
import torch

from headwise.specimens.registry import WEIGHTS, word_tokenizer
from headwise.tasks.arithmetic_prompts import TEMPLATES, arithmetic, arithmetic_batch, arithmetic_metrics
from headwise.tasks.symbol_arithmetic import ArithmeticSymbols, answers_by_operator, arithmetic_episodes

SIGNS = {
    "plus": "+", "minus": "-", "times": "*", "over": "//", "sum": "+", "difference": "-", "product": "*",
    "quotient": "//", "/": "//", "+": "+", "-": "-", "*": "*",
}  # fmt: skip


def by_hand(text: str) -> int:
    """The result of a prompt, read from its words alone."""
    numbers = re.findall(r"\d+", text)
    words = [SIGNS[word] for word in re.findall(r"[a-z]+|[-+*/]", text) if word in SIGNS]
    words = words * (len(numbers) - 1) if len(words) < len(numbers) - 1 else words
    told = numbers[0]
    for sign, number in zip(words, numbers[1:], strict=True):
        if sign == "//":
            assert int(number) and eval(told) % int(number) == 0, text
        told = f"({told} {sign} {number})"
    return eval(told)


@pytest.mark.parametrize("operands", [2, 3])
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("counterfactual", ["operator", "operands", "neutral"])
def test_answers_are_right_and_divisions_exact(digits, operands, counterfactual):
    prompts = arithmetic(48, digits=digits, operands=operands, counterfactual=counterfactual, seed=digits)
    assert len({one.text for one in prompts}) > 30 and {one.template for one in prompts} == set(TEMPLATES)
    for one in prompts:
        assert int(one.answer) == by_hand(one.text) >= 0
        assert all(len(number) == digits for number in one.operands) and len(one.operands) == operands
        if counterfactual == "neutral":
            assert one.twin_answer == "" and re.findall(r"\d+", one.twin) == re.findall(r"\d+", one.text)
            assert not any(word in SIGNS for word in re.findall(r"[a-z]+|[-+*/]", one.twin))
        else:
            assert int(one.twin_answer) == by_hand(one.twin) != int(one.answer)
        apart = [a != b for a, b in zip(one.text.split(), one.twin.split(), strict=True)]
        same_word = operands == 3 and counterfactual == "neutral" and one.template != "noun"
        assert sum(apart) == (2 if same_word else 1), (one.text, one.twin)
    if digits == 1:
        assert {op for one in prompts for op in one.operators} == set("+-*/")


def test_spans_without_a_tokenizer_are_characters():
    for one in arithmetic(40, operands=3, before="Well, "):
        at = {role: [one.text[a:b] for a, b in spans] for role, spans in one.spans.items()}
        assert at["operand"] == list(one.operands)
        assert len(at["operator"]) == len(one.operators) and one.text.endswith(at["equals"][-1])
        words = {"symbols": "=", "words": "equals", "noun": "is", "question": "A:"}
        assert at["equals"] == [words[one.template]]


@pytest.fixture(scope="module")
def tokenizer():
    """The text model's, without the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(WEIGHTS / "text", local_files_only=True)


@pytest.mark.parametrize("counterfactual", ["operator", "operands", "neutral"])
def test_spans_and_lengths_hold_after_tokenisation(tokenizer, counterfactual):
    # This tokenizer cuts "7 , 2" into more pieces than "7 + 2".
    templates = TEMPLATES[1:] if counterfactual == "neutral" else TEMPLATES
    prompts = arithmetic(
        12, digits=2, templates=templates, counterfactual=counterfactual, tokenizer=tokenizer, before="Now: "
    )
    for one in prompts:
        assert one.input_ids is not None and one.twin_ids is not None and one.answer_ids is not None
        assert len(one.input_ids) == len(one.twin_ids)
        for role, wanted in (("operand", one.operands), ("equals", None)):
            for number, (start, end) in enumerate(one.spans[role]):
                told = tokenizer.decode(one.input_ids[start:end]).replace(" ", "")
                expected = wanted[number] if wanted else {
                    "symbols": "=", "words": "equals", "noun": "is", "question": "A:",
                }[one.template]  # fmt: skip
                assert expected in told and len(told) <= len(expected) + 1, (one.text, told)
        assert one.spans["equals"][-1][1] == len(one.input_ids)  # the row that answers is the last
        both = torch.cat([one.input_ids, one.answer_ids]).tolist()
        assert both == tokenizer(one.text + one.answer)["input_ids"][: len(both)]
        if counterfactual == "neutral":
            assert one.twin_answer_ids is None
        else:
            assert one.twin_answer_ids is not None and int(one.twin_answer_ids[0]) != int(one.answer_ids[0])
        changed = (one.input_ids != one.twin_ids).nonzero().flatten().tolist()
        spans = one.spans["operand" if counterfactual == "operands" else "operator"]
        assert changed and all(any(a <= place < b for a, b in spans) for place in changed)


def test_a_digit_splitting_tokenizer_shows_what_is_predicted():
    """Words of one character: only the first digit of a longer result follows the prompt."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(code): code - 32 for code in range(32, 127)}
    split = Tokenizer(models.WordLevel(letters, unk_token="?"))
    split.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    prompts = arithmetic(
        30, "+*", digits=2, counterfactual="operands", tokenizer=PreTrainedTokenizerFast(tokenizer_object=split)
    )
    assert not any(one.single for one in prompts)
    assert all(len(one.answer_ids) == len(one.answer) - 1 for one in prompts if one.answer_ids is not None)


def test_the_letters_control_calculates_nothing():
    for operands in (2, 3):
        for one in arithmetic(60, letters=True, operands=operands):
            first, last = one.operands[0], one.operands[-1]
            assert len(set(one.operands)) == operands and not re.search(r"\d", one.text)
            assert one.answer.strip() == (first if "first" in one.text else last)
            assert one.twin_answer.strip() == (first if "first" in one.twin else last) != one.answer.strip()
            assert [one.text[a:b] for a, b in one.spans["operand"]] == list(one.operands)
            assert [one.text[a:b] for a, b in one.spans["operator"]] == ["first" if "first" in one.text else "last"]


def test_a_batch_puts_the_roles_where_they_are(tokenizer):
    prompts = arithmetic(12, digits=2, tokenizer=tokenizer)
    batch = arithmetic_batch(prompts, pad=0)
    assert set(batch.groups) == {"operand-1", "operand-2", "operator-1", "equals"}
    for row, one in enumerate(prompts):
        for number, text in enumerate(one.operands, 1):
            assert text in tokenizer.decode(batch.input_ids[row][batch.groups[f"operand-{number}"][row]])
        assert one.answer_ids is not None
        assert batch.input_ids[row][batch.asked[row]].tolist() == one.answer_ids.tolist()
    assert arithmetic_batch(prompts, twin=True).input_ids.shape[0] == 12
    with pytest.raises(ValueError, match="no token ids or no answer"):
        arithmetic_batch(arithmetic(2))
    with pytest.raises(ValueError, match="different numbers of operands"):
        arithmetic_batch([*prompts, *arithmetic(2, operands=3, templates="symbols", tokenizer=tokenizer)])


def test_metrics_on_logits_written_by_hand(tokenizer):
    prompts = arithmetic(3, "+-", templates="symbols", tokenizer=tokenizer, seed=4)
    logits = torch.zeros(3, 4096)
    for row, one in enumerate(prompts):
        assert one.answer_ids is not None and one.twin_answer_ids is not None
        logits[row, one.twin_answer_ids[0]] = 1.0
        logits[row, one.answer_ids[0]] = 3.0 if row else 0.5
    found = arithmetic_metrics(logits, prompts)
    assert found["accuracy"].tolist() == [0, 1, 1] and found["difference"].tolist() == [-0.5, 2, 2]
    torch.testing.assert_close(found["probability"], found["log_probability"].exp())
    answers = {int(one.answer_ids[0]) for one in prompts}  # pyright: ignore[reportOptionalSubscript]
    mean = logits[1, sorted(answers)].mean()
    torch.testing.assert_close(found["centred"][1], 3.0 - mean)
    neutral = arithmetic(1, "+", templates="noun", counterfactual="neutral", tokenizer=tokenizer)
    assert bool(arithmetic_metrics(logits[:1], neutral)["difference"].isnan())


def test_the_same_seed_gives_the_same_prompts():
    assert arithmetic(20, seed=3) == arithmetic(20, seed=3) != arithmetic(20, seed=4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ops": "+%"}, r"ops is '\+%'; expected different ones of '\+-\*/'"),
        ({"ops": "++"}, r"ops is '\+\+'"),
        ({"ops": "+", "letters": True}, r"ops is '\+'; expected different ones of '<>'"),
        ({"digits": 3}, r"digits 3, operands 2; expected n >= 0, 1 or 2, 2 or 3"),
        ({"operands": 4}, r"operands 4"),
        ({"templates": "prose"}, r"templates has \['prose'\]; expected some of symbols"),
        ({"counterfactual": "none"}, r"counterfactual is 'none'; expected operator, operands or neutral"),
        ({"ops": "+"}, r"needs another operator beside '\+' in ops '\+'"),
        ({"ops": "+*", "operands": 3}, r"beside '\+' in ops '\+\*' that may stand beside the same ones"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        arithmetic(4, **given)


def test_a_tokenizer_that_never_gives_equal_lengths_is_told(monkeypatch):
    from headwise.tasks import arithmetic_prompts

    assert arithmetic_prompts.TRIES >= 1000  # the same refusal after fewer draws
    monkeypatch.setattr(arithmetic_prompts, "TRIES", 100)
    tokenizer = word_tokenizer(["<bos>", ".", *map(str, range(100)), "+", "="])
    made = arithmetic(4, "+", counterfactual="operands", templates="symbols", tokenizer=tokenizer)
    assert all(len(one.input_ids) == 5 for one in made if one.input_ids is not None)
    with pytest.raises(ValueError, match=r"no pair of equal length and different answers in 100 draws of template"):
        # 100 and more are no words of it, and all unknown answers are one token.
        arithmetic(1, "*", digits=2, counterfactual="operands", templates="symbols", tokenizer=tokenizer)


SYMBOLS = ArithmeticSymbols()
VALUE = {name: index for index, name in enumerate("0123456789")}


def told(ids: torch.Tensor) -> list[list[str]]:
    """The problems of a sequence, as lists of words."""
    names = SYMBOLS.text(ids[1:]).split()
    return [names[start : start + 5] for start in range(0, len(names), 6)]


def solved(words: list[str]) -> str:
    sign = next(word for word in words if word in ("+", "-", "<", ">", "sum", "diff", "first", "last"))
    a, b = [word for word in words[:3] if word != sign]
    if sign in ("<", "first"):
        return a
    if sign in (">", "last"):
        return b
    return str((VALUE[a] + VALUE[b] if sign in ("+", "sum") else VALUE[a] - VALUE[b]) % 10)


@pytest.mark.parametrize("template", ["infix", "prefix", "any"])
@pytest.mark.parametrize("counterfactual", ["operator", "operands"])
@pytest.mark.parametrize("ops", ["+-", "<>", "-"])
def test_episodes_in_symbols(ops, counterfactual, template):
    generator = torch.Generator().manual_seed(1)
    made = arithmetic_episodes(
        64, SYMBOLS, ops=ops, template=template, problems=3, counterfactual=counterfactual, generator=generator
    )
    assert made.twin is not None and made.twin.shape == made.input_ids.shape == (64, 18)
    for row in range(64):
        problems, others = told(made.input_ids[row]), told(made.twin[row])
        assert problems[:2] == others[:2]
        for words in [*problems, *others]:
            assert words[4] == solved(words) and words[3] in ("=", "is")
            assert (words[3] == "is") == (words[0] in ("sum", "diff", "first", "last"))
        assert problems[2][4] != others[2][4]
        changed = [a != b for a, b in zip(problems[2][:4], others[2][:4], strict=True)]
        spans = {name: int(span[row, 0]) - 13 for name, span in made.spans.items()}
        assert sum(changed) == 1
        assert changed[spans["operator"]] if counterfactual == "operator" else not changed[spans["operator"]]
        assert problems[2][spans["equals"]] in ("=", "is")
        sign = problems[2][spans["operator"]]
        assert sign in "+-<>" or sign in ("sum", "diff", "first", "last")
        assert [problems[2][spans["first"]], problems[2][spans["second"]]] == [w for w in problems[2][:3] if w != sign]
        assert made.answers[row].nonzero().flatten().tolist() == [5, 11, 17]


def test_answers_by_operator_are_those_of_its_problems():
    made = arithmetic_episodes(
        16, SYMBOLS, template="any", problems=4, counterfactual="operands", generator=torch.Generator().manual_seed(2)
    )
    found = answers_by_operator(made, SYMBOLS)
    assert set(found) == {"+", "-"} and torch.equal(found["+"] ^ found["-"], made.answers)
    for row in range(16):
        for number, words in enumerate(told(made.input_ids[row])):
            plus = "+" in words or "sum" in words
            assert bool(found["+"][row, 6 * number + 5]) == plus


def test_skewed_operands_are_small_as_often_as_asked():
    generator = torch.Generator().manual_seed(0)
    made = arithmetic_episodes(4000, SYMBOLS, counterfactual="operands", skew=1.0, generator=generator)
    a, b = (made.input_ids[:, int(made.spans[name][0, 0])] - 1 for name in ("first", "second"))
    assert bool(((a < 4) | (b < 4)).all())
    pairs = arithmetic_episodes(4000, SYMBOLS, counterfactual="operands", generator=generator)
    a, b = (pairs.input_ids[:, int(pairs.spans[name][0, 0])] - 1 for name in ("first", "second"))
    assert len({(int(x), int(y)) for x, y in zip(a, b, strict=True)}) == 100


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ops": "+<"}, r"ops is '\+<'; expected operators of one kind"),
        ({"ops": ""}, r"ops is ''"),
        ({"template": "postfix"}, r"template is 'postfix'; expected infix, prefix or any"),
        ({"counterfactual": "neutral"}, r"counterfactual is 'neutral'; expected operator or operands"),
        ({"problems": 0}, r"problems is 0; expected at least 1"),
    ],
)
def test_refusals_in_symbols(given, message):
    with pytest.raises(ValueError, match=message):
        arithmetic_episodes(2, SYMBOLS, **given)
    with pytest.raises(ValueError, match=r"'%' is no symbol"):
        SYMBOLS.ids("1 %")
