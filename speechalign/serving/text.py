"""What people type, made into sentences that a policy can speak.

Typographic signs, accents and common symbols are rewritten; what has no English reading (emoji,
other scripts) is refused with its name, never dropped: a listener would not know.
"""

import re
import unicodedata
from collections.abc import Iterator

from speechalign.errors import UnspeakableText
from speechalign.policy.text import SPEAKABLE

SYMBOLS = {
    "&": " and ", "%": " percent ", "+": " plus ", "=": " equals ", "@": " at ", "#": " number ",
    "/": " slash ", "*": " ", "_": " ", "\t": " ", "\r": " ", "\u00b0": " degrees ",
    "\u2026": "... ",
    "[": "(", "]": ")", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    "\u2010": "-", "\u2011": "-", "\u2212": "-",
}  # fmt: skip
CURRENCIES = {"$": "dollars", "\u20ac": "euros", "\u00a3": "pounds"}
MONEY = re.compile(rf"([{''.join(CURRENCIES)}])\s?(\d+(?:[.,]\d+)*)")
SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+|\n+")
CLAUSE_END = re.compile(r"(?<=,)\s+|\s+(?=[-\u2013\u2014(])")


def sentences(text: str, max_characters: int) -> list[str]:
    """Return the sentences of a text, none longer than the policy speaks at once.

    Raises:
        UnspeakableText: a character has no English reading, or there is no word.
    """
    written = _rewritten(text)
    unknown = sorted(set(SPEAKABLE.sub("", written)))
    if unknown:
        names = ", ".join(_named(character) for character in unknown[:5])
        raise UnspeakableText(f"cannot speak {names}; write it in English words")
    parts = [
        " ".join(part.split())
        for sentence in SENTENCE_END.split(written)
        for part in _parted(sentence.strip(), max_characters)
    ]
    spoken = [part for part in parts if re.search(r"[A-Za-z0-9]", part)]
    if not spoken:
        raise UnspeakableText("the text has no word to speak")
    return spoken


def _rewritten(text: str) -> str:
    text = MONEY.sub(lambda found: f"{found[2]} {CURRENCIES[found[1]]}", text)
    decomposed = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in decomposed if not "\u0300" <= c <= "\u036f")
    return "".join(SYMBOLS.get(character, character) for character in plain)


def _named(character: str) -> str:
    name = unicodedata.name(character, "a control character")
    return f"U+{ord(character):04X} ({name.lower()})"


def _parted(sentence: str, most: int) -> Iterator[str]:
    """Part a sentence at its clauses, or else between words, or else anywhere."""
    if len(sentence) <= most:
        yield sentence
        return
    for pattern in (CLAUSE_END, re.compile(r"\s+")):
        ends = [found.start() for found in pattern.finditer(sentence) if found.start() <= most]
        if ends and ends[-1] > 0:
            yield sentence[: ends[-1]].strip()
            yield from _parted(sentence[ends[-1] :].strip(), most)
            return
    yield sentence[:most]
    yield from _parted(sentence[most:], most)
