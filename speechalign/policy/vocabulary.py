"""The words of the policy: special tokens, codec codes, text symbols.

    0..6    PAD EOS SPEAKER TEXT SPEECH GOOD BAD      (7 is free)
    8..     codes, one range of ids per AR level: codec.layout.FrameLayout
    after   text symbols, in the order of `symbols`

Shapes: K codebooks that the AR model predicts (usually 1), T frames, S flat token ids.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from speechalign.codec.layout import FrameLayout
from speechalign.errors import ConfigError, UnspeakableText

PAD_ID, EOS_ID, SPEAKER_ID, TEXT_ID, SPEECH_ID, GOOD_ID, BAD_ID = range(7)
FIRST_CODE_ID = 8
SIZE_MULTIPLE = 64
"""The vocabulary is padded to this, which matrix kernels like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Which id is which; saved beside the weights that learned it."""

    symbols: str
    """The text symbols, each once."""
    num_codebooks: int
    """Of the AR model; the NAR model fills the others."""
    codebook_size: int

    def __post_init__(self) -> None:
        if len(set(self.symbols)) != len(self.symbols):
            raise ConfigError(f"the text symbols {self.symbols!r} repeat one; list each once")

    @property
    def layout(self) -> FrameLayout:
        """How codes and token ids correspond."""
        return FrameLayout(
            first_id=FIRST_CODE_ID,
            num_codebooks=self.num_codebooks,
            codebook_size=self.codebook_size,
        )

    @property
    def code_ids(self) -> range:
        """The ids of all codes."""
        return range(FIRST_CODE_ID, FIRST_CODE_ID + self.num_codebooks * self.codebook_size)

    @property
    def size(self) -> int:
        """The number of ids, padded to a multiple of 64."""
        used = FIRST_CODE_ID + self.num_codebooks * self.codebook_size + len(self.symbols)
        return -(-used // SIZE_MULTIPLE) * SIZE_MULTIPLE

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Return one id per symbol.

        Raises:
            UnspeakableText: a character is not among the symbols, or there is none at all.
        """
        first = FIRST_CODE_ID + self.num_codebooks * self.codebook_size
        ids = {symbol: first + index for index, symbol in enumerate(self.symbols)}
        unknown = sorted(set(text) - ids.keys())
        if unknown:
            names = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown)
            raise UnspeakableText(f"{text!r}: no symbol for {names}; spell the text differently")
        if not text.strip():
            raise UnspeakableText("the text is empty; nothing can be spoken")
        return tuple(ids[symbol] for symbol in text)

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Read JSON."""
        return cls(**json.loads(path.read_text()))
