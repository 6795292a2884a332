"""Which curves a training's page shows."""

import re

from speechalign.evaluation.plots import COLOURS, CURVES, training_curves


def titles(row: dict[str, float]) -> list[str]:
    """Return the names of the plots of a training that wrote one row."""
    return re.findall('aria-label="([^"]*) over the updates"', "".join(training_curves([row])))


def test_a_preference_training_shows_no_plot_of_an_online_one():
    row = {
        "step": 1, "loss": 0.7, "accuracy": 0.5, "margin": 0.0, "chosen_logprob": -1.0,
        "rejected_logprob": -2.0, "chosen_drop": 0.1, "kl_k1": 0.2, "chosen_reward": 0.0,
        "rejected_reward": 0.0, "entropy": 2.0, "anchor": 1.0, "grad_norm": 3.0,
        "learning_rate": 1e-4,
    }  # fmt: skip
    assert titles(row) == [
        "loss",
        "accuracy",
        "margin",
        "log-probability a token",
        "moved from the reference, nats a token",
        "implicit reward",
        "entropy, nats a token",
        "gradient norm, before clipping",
        "learning rate",
    ]


def test_every_measure_of_a_judge_has_a_plot_of_both_kinds_of_answers():
    rows = [{"step": 0, "heldout_judge_wer": 0.2}, {"step": 1, "judge_wer": 0.3, "judge_mos": 4.0}]
    mos, wer = training_curves(rows)
    assert "judged: mos" in mos
    assert "judged: wer" in wer
    assert "mean, held out" in wer
    assert "mean, trained on" in wer


def test_what_only_held_out_answers_were_judged_for_has_a_plot():
    row = {"step": 5, "heldout_judge_speaker_similarity": 0.8, "heldout_wer": 0.2}
    assert titles(row) == [
        "word error rate, as another recogniser hears",
        "judged: speaker_similarity",
    ]


def test_no_plot_has_more_curves_than_colours():
    assert all(len(keys) <= len(COLOURS) for _, keys in CURVES)
