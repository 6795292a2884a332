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


@dataclass(frozen=True, slots=True, kw_only=True)
class WordErrors:
    """How a transcript differs from the text."""

    wer: float
    cer: float
    word_errors: int
    words: int


def normalise(text: str) -> str:
    """Return lower-case words: no punctuation, hyphens as spaces, numbers below 100 spelt out.

    Titles are written as LibriSpeech writes them, thousands without a comma.
    """
    text = text.lower().replace("-", " ").replace("\u2018", "'").replace("\u2019", "'")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"\d+", lambda match: _spell(int(match[0])), text)
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


def _spell(number: int) -> str:
    if number >= 100:
        return str(number)
    if number < 20:
        return UNITS[number]
    tens, unit = divmod(number, 10)
    return TENS[tens - 2] + (f" {UNITS[unit]}" if unit else "")
