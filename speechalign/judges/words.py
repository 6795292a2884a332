"""Transcripts made comparable, and the errors between them."""

import re
from dataclasses import dataclass

import jiwer

UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor"}
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

SIZES = [(10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")]
NUMBER = re.compile(r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<ending>(?:st|nd|rd|th)\b)?")
ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
MOST_DIGITS = 12
"""Longer ones are read digit by digit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordErrors:
    """How a transcript differs from the text."""

    wer: float
    cer: float
    word_errors: int
    words: int


def normalise(text: str) -> str:
    """Return lower-case words: no punctuation, hyphens as spaces, numbers spelt out.

    Titles and numbers are written as LibriSpeech writes them; 1848 is read as a year, 1,848 is not.
    """
    text = text.lower().replace("-", " ").replace("\u2018", "'").replace("\u2019", "'")
    text = NUMBER.sub(_in_words, text)
    words = re.sub(r"[^a-z0-9' ]", " ", text).split()
    bare = [word.strip("'") for word in words]
    return " ".join(TITLES.get(word, word) for word in bare if word)


def word_errors(text: str, transcript: str) -> WordErrors:
    """Compare a transcript with the text; both are normalised first.

    The text must have a word in it; an empty transcript has every word wrong.
    """
    reference, heard = normalise(text), normalise(transcript)
    output = jiwer.process_words(reference, heard)
    errors = output.substitutions + output.deletions + output.insertions
    return WordErrors(
        wer=output.wer,
        cer=jiwer.cer(reference, heard),
        word_errors=errors,
        words=len(reference.split()),
    )


def _in_words(number: re.Match[str]) -> str:
    digits, ending = number["digits"].replace(",", ""), number["ending"]
    if len(digits) > MOST_DIGITS:
        return f" {' '.join(UNITS[int(digit)] for digit in digits)} "
    is_year = "," not in number["digits"] and 1100 <= int(digits) < 2000
    words = _spell_year(int(digits)) if is_year else _spell(int(digits))
    if ending:
        first, last = words[: words.rfind(" ") + 1], words.split()[-1]
        regular = last.removesuffix("y") + ("ieth" if last.endswith("y") else "th")
        words = first + ORDINALS.get(last, regular)
    return f" {words} "


def _spell(number: int) -> str:
    if number < 20:
        return UNITS[number]
    if number < 100:
        tens, unit = divmod(number, 10)
        return TENS[tens - 2] + (f" {UNITS[unit]}" if unit else "")
    size, name = next((size, name) for size, name in SIZES if number >= size)
    count, rest = divmod(number, size)
    return f"{_spell(count)} {name}" + (f" {_spell(rest)}" if rest else "")


def _spell_year(number: int) -> str:
    century, year = divmod(number, 100)
    if year == 0:
        return f"{_spell(century)} hundred"
    return f"{_spell(century)} {'oh ' if year < 10 else ''}{_spell(year)}"
