"""What people type, and what a policy is given."""

import pytest

from speechalign.errors import UnspeakableText
from speechalign.serving.text import sentences


@pytest.mark.parametrize(
    ("typed", "spoken"),
    [
        ("Hello there.", ["Hello there."]),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("line one\nline two", ["line one", "line two"]),
        ("caf\u00e9 na\u00efve", ["cafe naive"]),
        ("\u201cYes,\u201d she said\u2026", ['"Yes," she said...']),
        ("50% of A&B", ["50 percent of A and B"]),
        ("It cost $5.50 today", ["It cost 5.50 dollars today"]),
        ("3.5 is a number", ["3.5 is a number"]),
        ("Well ... ! done", ["Well ...", "done"]),
    ],
)
def test_text_becomes_sentences(typed: str, spoken: list[str]):
    assert sentences(typed, 120) == spoken


def test_long_sentences_are_parted_at_clauses_then_words_then_anywhere():
    assert sentences("alpha beta gamma, delta epsilon zeta", 22) == [
        "alpha beta gamma,",
        "delta epsilon zeta",
    ]
    assert sentences("alpha beta gamma delta epsilon", 20) == ["alpha beta gamma", "delta epsilon"]
    assert sentences("a" * 45, 20) == ["a" * 20, "a" * 20, "a" * 5]


def test_no_part_is_longer_than_the_policy_speaks_at_once_and_no_word_is_lost():
    words = [f"word{number}" for number in range(300)]
    parts = sentences(" ".join(words), 60)
    assert max(map(len, parts)) <= 60
    assert " ".join(parts).split() == words


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("hi \U0001f600", r"U\+1F600 \(grinning face\)"),
        ("\u3053\u3093", r"U\+3053 \(hiragana letter ko\)"),
        ("bell\x07", r"U\+0007 \(a control character\)"),
    ],
)
def test_what_has_no_english_reading_is_refused_by_name(typed: str, named: str):
    with pytest.raises(UnspeakableText, match=named):
        sentences(typed, 120)


@pytest.mark.parametrize("typed", ["", "   ", "... !?", "\n\n"])
def test_a_text_without_a_word_is_refused(typed: str):
    with pytest.raises(UnspeakableText, match="no word"):
        sentences(typed, 120)
