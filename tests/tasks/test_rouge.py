import pytest

from headwise.tasks.rouge import porter_stem, rouge1_recall

# ruff: noqa: SIM905 (words read better in lines than in a list)

# The examples of Porter's paper, each followed through all five steps.
STEMS = """caresses caress ponies poni ties ti caress caress cats cat feed feed agreed agre plastered plaster bled bled
motoring motor sing sing conflated conflat troubled troubl sized size hopping hop tanned tan falling fall hissing hiss
fizzed fizz failing fail filing file happy happi sky sky relational relat conditional condit rational ration valenci
valenc hesitanci hesit digitizer digit conformabli conform radicalli radic differentli differ vileli vile analogousli
analog vietnamization vietnam predication predic operator oper feudalism feudal decisiveness decis hopefulness hope
callousness callous formaliti formal sensitiviti sensit sensibiliti sensibl triplicate triplic formative form formalize
formal electriciti electr electrical electr hopeful hope goodness good revival reviv allowance allow inference infer
airliner airlin gyroscopic gyroscop adjustable adjust defensible defens irritant irrit replacement replac adjustment
adjust dependent depend adoption adopt homologou homolog communism commun activate activ angulariti angular homologous
homolog effective effect bowdlerize bowdler probate probat rate rate cease ceas controll control roll roll snowed snow
syzygy syzygi generalizations gener oscillators oscil""".split()


@pytest.mark.parametrize(("word", "stem"), list(zip(STEMS[::2], STEMS[1::2], strict=True)))
def test_stems_are_those_of_porters_paper(word, stem):
    assert porter_stem(word) == stem


def test_recall_counts_words_of_the_reference():
    needle = "eat a sandwich and sit in Dolores Park on a sunny day"
    assert rouge1_recall(f"You should {needle.upper()}!", needle) == 1.0
    assert rouge1_recall("eating sandwiches", needle) == pytest.approx(2 / 12)
    assert rouge1_recall("a a a a", needle) == pytest.approx(2 / 12)  # as often as it stands in the reference
    assert rouge1_recall("", needle) == 0.0


def test_a_reference_without_words_is_refused():
    with pytest.raises(ValueError, match=r"'\?!' has no word of a-z and 0-9"):
        rouge1_recall("anything", "?!")
