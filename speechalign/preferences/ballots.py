"""Which two samples of a prompt people are asked to compare. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from speechalign.seeds import derive_seed
from speechalign.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two samples of one prompt, in the order in which they are heard."""

    first: Sample
    second: Sample


def choose_comparisons(
    samples: Iterable[Sample], count: int, *, seed: int
) -> tuple[Comparison, ...]:
    """Draw two samples from each of so many prompts, in an order that gives nothing away.

    Empty and truncated samples are not asked about, and neither are two of the same tokens.

    Args:
        samples: those of one prompt beside each other.
        count: how many prompts; fewer if there are not so many.
        seed: the same seed asks the same of every listener.
    """
    comparisons: list[Comparison] = []
    for prompt_id, group in groupby(samples, key=lambda sample: sample.prompt_id):
        usable = {s.token_ids: s for s in group if s.token_ids and not s.is_truncated}
        if len(usable) < 2:
            continue
        rng = np.random.default_rng(derive_seed(seed, "ballot", prompt_id))
        first, second = rng.permutation(len(usable))[:2]
        answers = list(usable.values())
        comparisons.append(Comparison(first=answers[first], second=answers[second]))
    order = np.random.default_rng(derive_seed(seed, "ballot")).permutation(len(comparisons))
    return tuple(comparisons[index] for index in order[:count])
