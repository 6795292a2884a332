"""How far the representations of synthetic answers are from those of golden ones. Pure.

SpeechAlign (Zhang et al. 2024, section 2, figure 2) shows it by t-SNE. A picture cannot be
compared, so there is a number with it: the AUC of a classifier that tells the two clouds apart,
.5 when it can only guess.

Shapes: P prompts, D size of a representation, R resamples; the rows of all clouds of a run are
the same prompts in the same order.

sklearn takes 2 s of a core to import: only who draws the picture waits for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechalign.evaluation.statistics import Estimate, percentile_estimate, resampled_indices
from speechalign.seeds import derive_seed

NUM_FOLDS = 5
INVERSE_L2 = 0.01
"""Of the classifier. There are about as many dimensions as prompts; on the embedded stack 1e-3 and
0.1 move an AUC by .02 at most, 1 overfits."""
PERPLEXITY = 30.0
MIN_PROMPTS = 4
"""With fewer there is nothing to learn from or nothing to be tested on."""

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """How well a classifier tells one synthetic cloud from the golden one."""

    auc: Estimate
    change: Estimate
    """The AUC less that of the first synthetic cloud, paired over prompts."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Separation":
        """Return what `to_json` was made of."""
        return cls(auc=Estimate(**values["auc"]), change=Estimate(**values["change"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClouds:
    """What is known of the representations of a run's answers."""

    separations: Mapping[str, Separation]
    """By policy, the one before all first."""
    points: Mapping[str, Sequence[tuple[float, float]]]
    """By cloud, golden first: one projection of all; a prompt has the same place in each."""


def separation_lines(clouds: TokenClouds) -> list[str]:
    """Return the numbers in words, a line a policy."""
    lines: list[str] = []
    for number, (name, found) in enumerate(clouds.separations.items()):
        line = f"AUC golden against synthetic tokens, {name}: {found.auc.shown(digits=3)}"
        change = f", change {found.change.shown(digits=3, signed=True)}" if number else ""
        lines.append(line + change)
    return lines


def separate(
    golden_PD: Vectors, synthetic: Mapping[str, Vectors], num_resamples: int
) -> dict[str, Separation]:
    """Return how well each synthetic cloud is told from the golden one, the first as baseline.

    Intervals are over prompts with the classifier's scores as they are: they say what another
    choice of test prompts would change, not what another training of the classifier would.
    """
    aucs: dict[str, tuple[float, Floats]] = {}
    for name, vectors_PD in synthetic.items():
        scores = heldout_scores(golden_PD, vectors_PD)
        aucs[name] = auc(*scores), _resampled_auc(*scores, num_resamples)
    base, base_R = next(iter(aucs.values()))
    return {
        name: Separation(
            auc=percentile_estimate(value, value_R),
            change=percentile_estimate(value - base, value_R - base_R),
        )
        for name, (value, value_R) in aucs.items()
    }


def heldout_scores(golden_PD: Vectors, synthetic_PD: Vectors) -> tuple[Floats, Floats]:
    """Return the scores of the golden and of the synthetic answers, high for synthetic.

    Each is of a logistic regression that has seen neither answer to the prompt.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fold_P = prompt_folds(len(golden_PD))
    golden_P, synthetic_P = np.empty(len(fold_P)), np.empty(len(fold_P))
    for fold in np.unique(fold_P):
        is_held = fold_P == fold
        seen = np.concatenate([golden_PD[~is_held], synthetic_PD[~is_held]])
        is_synthetic = np.arange(len(seen)) >= len(seen) // 2
        classifier = make_pipeline(
            StandardScaler(), LogisticRegression(C=INVERSE_L2, max_iter=1000)
        ).fit(seen, is_synthetic)
        golden_P[is_held] = classifier.decision_function(golden_PD[is_held])
        synthetic_P[is_held] = classifier.decision_function(synthetic_PD[is_held])
    return golden_P, synthetic_P


def prompt_folds(num_prompts: int) -> NDArray[np.int64]:
    """Return fold_P, in sizes that differ by one at most; a prompt's answers share it."""
    rng = np.random.default_rng(derive_seed("folds", num_prompts))
    return rng.permutation(np.arange(num_prompts) % NUM_FOLDS)


def auc(golden_P: Floats, synthetic_P: Floats) -> float:
    """Return how often a synthetic answer scores above a golden one; a tie counts half."""
    return float(_wins(golden_P, synthetic_P).mean())


def project(clouds: Mapping[str, Vectors]) -> dict[str, list[tuple[float, float]]]:
    """Return every cloud in the plane, by one t-SNE (van der Maaten & Hinton 2008) of all."""
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    together = np.concatenate(list(clouds.values()))
    tsne = TSNE(
        perplexity=min(PERPLEXITY, (len(together) - 1) / 3),
        init="pca",
        random_state=derive_seed("projection") % 2**32,
    )
    plane = tsne.fit_transform(StandardScaler().fit_transform(together))
    parts = np.split(plane, len(clouds))
    return {
        name: [(float(x), float(y)) for x, y in part]
        for name, part in zip(clouds, parts, strict=True)
    }


def _wins(golden_P: Floats, synthetic_P: Floats) -> Floats:
    """Return wins_PP: of each synthetic answer (rows) over each golden one."""
    gap_PP = synthetic_P[:, None] - golden_P[None, :]
    return (gap_PP > 0) + 0.5 * (gap_PP == 0)


def _resampled_auc(golden_P: Floats, synthetic_P: Floats, num_resamples: int) -> Floats:
    """Return auc_R over resampled prompts, both answers to a prompt together."""
    size = len(golden_P)
    picked_RP = resampled_indices(size, num_resamples)
    counts_RP = np.stack([np.bincount(picked_P, minlength=size) for picked_P in picked_RP])
    wins_PP = _wins(golden_P, synthetic_P)
    return ((counts_RP @ wins_PP) * counts_RP).sum(1) / size**2
