"""ROUGE-1 recall: how many of the reference's words a text holds, endings aside.

Words are runs of a-z and 0-9 in lower case; those longer than three letters are reduced to their stem by Porter's
algorithm ("An algorithm for suffix stripping", 1980).
"""

import re
from functools import cache
from itertools import pairwise

from headwise.tasks.needles import unigram_recall

__all__ = ["porter_stem", "rouge1_recall"]

_WORD = re.compile(r"[a-z0-9]+")
# Suffix -> what takes its place, tried longest first, of stems with a measure above 0 (steps 2 and 3).
_DOUBLE = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "abli": "able", "alli": "al",
    "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al",
    "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble",
}  # fmt: skip
_SINGLE = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
# Suffixes that go altogether, of stems with a measure above 1 (step 4).
_LAST = dict.fromkeys(
    ["al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
     "ous", "ive", "ize"], ""
)  # fmt: skip


def rouge1_recall(text: str, reference: str) -> float:
    """Share of the reference's words that the text holds, each counted as often as it stands in the reference.

    >>> rouge1_recall("She was eating two sandwiches.", "eat a sandwich")
    0.6666666666666666

    Raises ValueError for a reference without words.
    """
    words = _stems(reference)
    if not words:
        raise ValueError(f"rouge1_recall: the reference {reference[:60]!r} has no word of a-z and 0-9; compare tokens")
    return unigram_recall(_stems(text), words)


def _stems(text: str) -> list[str]:
    return [porter_stem(word) if len(word) > 3 else word for word in _WORD.findall(text.lower())]


@cache
def porter_stem(word: str) -> str:
    """The stem of a lower-case English word.

    >>> [porter_stem(word) for word in ("caresses", "hopping", "relational", "electricity")]
    ['caress', 'hop', 'relat', 'electr']
    """
    if len(word) <= 2:
        return word
    word = _plural(word)
    word = _past(word)
    if word.endswith("y") and _vowel_in(word[:-1]):
        word = word[:-1] + "i"
    for table, least in ((_DOUBLE, 1), (_SINGLE, 1), (_LAST, 2)):
        word = _replaced(word, table, least)
    if word.endswith("e"):
        stem = word[:-1]
        if _measure(stem) > 1 or (_measure(stem) == 1 and not _short(stem)):
            word = stem
    if word.endswith("ll") and _measure(word[:-1]) > 1:
        word = word[:-1]
    return word


def _plural(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    stem = word[:-2] if word.endswith("ed") else word[:-3] if word.endswith("ing") else None
    if stem is None or not _vowel_in(stem):
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if len(stem) > 1 and stem[-1] == stem[-2] and _consonant(stem, len(stem) - 1) and stem[-1] not in "lsz":
        return stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _short(stem) else stem


def _replaced(word: str, table: dict[str, str], least: int) -> str:
    """The word with the longest suffix of a table replaced, if the stem before it measures `least`."""
    suffix = max((end for end in table if word.endswith(end)), key=len, default=None)
    if suffix is None:
        return word
    stem = word[: -len(suffix)]
    if suffix == "ion" and not stem.endswith(("s", "t")):
        return word
    return stem + table[suffix] if _measure(stem) >= least else word


def _consonant(word: str, i: int) -> bool:
    if word[i] in "aeiou":
        return False
    return word[i] != "y" or i == 0 or not _consonant(word, i - 1)


def _vowel_in(stem: str) -> bool:
    return any(not _consonant(stem, i) for i in range(len(stem)))


def _measure(stem: str) -> int:
    """How often a consonant follows a vowel: m in [C](VC)^m[V]."""
    kinds = [_consonant(stem, i) for i in range(len(stem))]
    return sum(not before and now for before, now in pairwise(kinds))


def _short(stem: str) -> bool:
    """Ends in consonant, vowel, consonant, the last not w, x or y: hop, but not snow."""
    if len(stem) < 3 or stem[-1] in "wxy":
        return False
    end = len(stem) - 1
    return _consonant(stem, end) and not _consonant(stem, end - 1) and _consonant(stem, end - 2)
