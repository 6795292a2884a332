"""Text to the symbols that the policy reads: English phonemes from hibari's lexicons."""

import re

from speechalign.errors import UnspeakableText

MAX_CHARACTERS = 400
SPEAKABLE = re.compile(r"[A-Za-z0-9 .,;:!?'\"()\-\u2018\u2019\u201c\u201d\u2013\u2014\n]*")
"""What the English grapheme-to-phoneme rules know; anything else is named and refused."""


class TextFrontend:
    """Loads the lexicons once; then text in, phonemes out."""

    def __init__(self) -> None:
        from hibari import Hibari

        self._phonemize = Hibari().phonemize

    def phonemize(self, text: str) -> str:
        """Return the phonemes of an English text.

        Raises:
            UnspeakableText: the text is empty, too long, has characters of another script, or a
                number without a name.
        """
        check_text(text)
        try:
            phonemes = self._phonemize(text)
        except (IndexError, KeyError) as error:  # a number beyond all names
            raise UnspeakableText(
                f"{text!r} cannot be read aloud; write its numbers in words"
            ) from error
        return phonemes if isinstance(phonemes, str) else "".join(phonemes)


def check_text(text: str) -> None:
    """Raise UnspeakableText for a text that cannot be spoken, saying why."""
    if not re.search(r"[A-Za-z0-9]", text):
        raise UnspeakableText(f"{text!r} has no word to speak")
    if len(text) > MAX_CHARACTERS:
        raise UnspeakableText(
            f"the text has {len(text)} characters, at most {MAX_CHARACTERS} can be spoken at once; "
            "split it into sentences"
        )
    unknown = sorted(set(SPEAKABLE.sub("", text)))
    if unknown:
        names = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown)
        raise UnspeakableText(f"{text!r}: cannot speak {names}; write it in English letters")
