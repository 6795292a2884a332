"""Sentences of everyday English from a small grammar: few words, 100,000 sentences."""

import random
from collections.abc import Iterator

from speechalign.seeds import derive_seed

PEOPLE = [
    "the teacher",
    "my brother",
    "her sister",
    "the old man",
    "a young woman",
    "the doctor",
    "our neighbor",
    "the small dog",
    "a black cat",
    "the driver",
    "his mother",
    "the farmer",
    "a little girl",
    "the king",
    "the baker",
    "the sailor",
    "a tall boy",
    "my friend",
    "the students",
    "two children",
    "the workers",
    "three women",
]
DEEDS = [
    "found",
    "carried",
    "watched",
    "opened",
    "painted",
    "dropped",
    "moved",
    "cleaned",
    "followed",
    "lost",
    "washed",
    "lifted",
    "wanted",
    "counted",
    "pushed",
    "touched",
    "noticed",
    "covered",
]
THINGS = [
    "the red box",
    "a broken chair",
    "the green door",
    "an old letter",
    "the heavy stone",
    "a silver cup",
    "the kitchen table",
    "a large map",
    "the yellow boat",
    "a wooden bridge",
    "the last page",
    "the long rope",
    "a quiet song",
    "the empty bottle",
    "a warm blanket",
    "the garden gate",
    "the brown basket",
    "a sharp knife",
    "the morning paper",
    "the iron key",
]
PLACES = [
    "near the river",
    "in the garden",
    "behind the house",
    "on the hill",
    "at the station",
    "by the fire",
    "across the street",
    "in the dark forest",
    "at the market",
    "inside the barn",
    "along the beach",
    "in front of the school",
]
TIMES = [
    "last night",
    "this morning",
    "before dinner",
    "after the storm",
    "every day",
    "in the summer",
    "during the winter",
    "for the first time",
    "without a word",
    "with great care",
]
QUALITIES = [
    "cold",
    "bright",
    "quiet",
    "simple",
    "strange",
    "soft",
    "early",
    "warm",
    "deep",
    "clean",
    "narrow",
    "smooth",
]
SUBJECTS = [
    "water",
    "light",
    "wind",
    "music",
    "voice",
    "window",
    "field",
    "lake",
    "table",
    "answer",
]
ACTIONS = [
    "sing", "dance", "sleep", "work", "swim", "travel", "listen", "cook", "play", "walk",
]  # fmt: skip


def sentences(count: int, seed: int) -> list[str]:
    """Return distinct sentences, the same for the same seed."""
    chosen: dict[str, None] = {}
    for sentence in _stream(random.Random(derive_seed(seed, "grammar"))):
        chosen[sentence] = None
        if len(chosen) == count:
            break
    return list(chosen)


def _stream(rng: random.Random) -> Iterator[str]:
    while True:
        words = _phrase(rng)
        yield words[0].upper() + words[1:] + "."


def _phrase(rng: random.Random) -> str:
    pick = rng.choice
    match rng.randrange(7):
        case 0 | 1 | 2:
            return f"{pick(PEOPLE)} {pick(DEEDS)} {pick(THINGS)} {pick(PLACES)}"
        case 3:
            return f"{pick(TIMES)} {pick(PEOPLE)} {pick(DEEDS)} {pick(THINGS)}"
        case 4:
            return (
                f"the {pick(SUBJECTS)} was {pick(QUALITIES)} and "
                f"the {pick(SUBJECTS)} was {pick(QUALITIES)}"
            )
        case 5:
            return f"we could {pick(ACTIONS)} {pick(PLACES)} {pick(TIMES)}"
        case _:
            return f"{pick(PEOPLE)} had to {pick(ACTIONS)} {pick(PLACES)}"
