import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speechalign.artifacts import committed_folder
from speechalign.config.align import AlignConfig
from speechalign.config.judges import (
    HttpJudgeConfig,
    RecogniserConfig,
    RewardModelJudgeConfig,
    SignalConfig,
    SpeakerConfig,
)
from speechalign.evaluation.plots import metric_over_iterations, training_curves
from speechalign.evaluation.report import Listening, Player, ReportInputs, write_report
from speechalign.evaluation.statistics import (
    Estimate,
    ratio_difference,
    ratio_estimate,
    relative_change,
)
from speechalign.evaluation.summary import (
    METRICS,
    Differences,
    Summary,
    compare,
    markdown_table,
    metrics_of,
    relative_error_change,
    summarise,
    table_rows,
    text_table,
)
from speechalign.pipeline.report import machine_facts, write_run_report
from speechalign.sampling.pipeline import SCORED


def judged(errors: list[float | None], *, truncated: int = 0) -> pa.Table:
    count = len(errors)
    return pa.table(
        {
            "prompt_id": [f"p{i}" for i in range(count)],
            "is_truncated": [i < truncated for i in range(count)],
            "eval_word_errors": pa.array(errors, pa.float32()),
            "eval_words": pa.array([4.0] * count, pa.float32()),
        }
    )


def test_a_corpus_error_rate_is_all_errors_over_all_words():
    estimate = ratio_estimate(np.array([1.0, 0.0]), np.array([1.0, 9.0]), 100)
    assert estimate.value == pytest.approx(0.1)  # the mean of the clips' rates would be 0.5
    assert estimate.low <= 0.1 <= estimate.high


def test_an_interval_of_equal_clips_has_no_width():
    estimate = ratio_estimate(np.full(20, 0.5), np.ones(20), 50)
    assert (estimate.low, estimate.high) == (0.5, 0.5)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = rng.normal(3.0, 1.0, 60)
        estimate = ratio_estimate(values, np.ones(60), 300)
        covered += estimate.low <= 3.0 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_paired_difference_is_sharper_than_its_sides():
    rng = np.random.default_rng(1)
    before = rng.normal(0.0, 5.0, 100)
    after = before - 0.5
    difference = ratio_difference((before, np.ones(100)), (after, np.ones(100)), 200)
    assert difference.value == pytest.approx(-0.5)
    assert difference.high == pytest.approx(-0.5)
    assert difference.excludes_zero


def test_a_failed_judgement_is_counted_and_never_a_zero():
    summary = summarise("before", judged([4.0, None, 0.0, 4.0], truncated=1), 50)
    assert summary.estimates["wer"].value == pytest.approx(8 / 12)
    assert (summary.num_prompts, summary.missing["wer"]) == (4, 1)
    assert summary.estimates["stop"].value == pytest.approx(0.75)
    assert "sim" not in summary.estimates


def test_a_measurement_that_is_not_a_number_is_missing():
    summary = summarise("before", judged([4.0, float("nan"), 0.0]), 50)
    assert summary.estimates["wer"].value == pytest.approx(0.5)
    assert summary.missing["wer"] == 1


def test_a_prompt_without_words_has_no_error_rate():
    table = judged([1.0, 0.0]).set_column(3, "eval_words", pa.array([4.0, 0.0], pa.float32()))
    summary = summarise("before", table, 50)
    assert summary.estimates["wer"] == Estimate(value=0.25, low=0.25, high=0.25)
    assert summary.missing["wer"] == 1


def test_samples_of_one_prompt_are_counted_all_and_resampled_together():
    table = judged([4.0, 0.0]).set_column(0, "prompt_id", pa.array(["p", "p"]))
    summary = summarise("before", table, 50)
    assert summary.estimates["wer"] == Estimate(value=0.5, low=0.5, high=0.5)
    assert (summary.num_prompts, summary.missing["wer"]) == (1, 0)


def test_a_relative_change_is_a_share_of_before():
    before, after = judged([2.0, 4.0, 4.0]), judged([1.0, 2.0, 2.0])
    change = relative_error_change(before, after, 50)
    assert change == {"wer": Estimate(value=-0.5, low=-0.5, high=-0.5)}


def test_nothing_is_relative_to_zero():
    none, one = (np.zeros(3), np.ones(3)), (np.ones(3), np.ones(3))
    assert relative_change(none, one, 20) is None
    sparse = (np.array([1.0, 0.0, 0.0]), np.ones(3))
    assert relative_change(sparse, one, 50) is None


def test_before_and_after_are_compared_on_the_prompts_that_both_have():
    difference = compare(judged([4.0, 4.0, None]), judged([2.0, None, 4.0]), 50)
    assert difference["wer"].value == pytest.approx(-0.5)


def test_a_summary_survives_json():
    summary = summarise("before", judged([1.0, 2.0]), 20)
    assert Summary.from_json(summary.to_json()) == summary


def test_the_table_says_what_was_not_measured():
    full = summarise("a", judged([1.0, 1.0]), 20)
    empty = Summary(name="b", num_prompts=2, estimates={}, missing={})
    lost = summarise("c", judged([1.0, None]), 20)
    assert table_rows([lost], {})[1][2] == "25.0 [25.0, 25.0] (1 missing)"
    change = {"wer": Estimate(value=-0.1, low=-0.2, high=0.0)}
    rows = table_rows([full, empty], {"iteration 1": change})
    assert rows[1] == ["a", "2", "25.0 [25.0, 25.0]", "100.0 [100.0, 100.0]"]
    assert rows[2][2] == "not measured"
    assert rows[3] == ["difference (paired)", "", "-10.0 [-20.0, +0.0]", "not measured"]
    two = table_rows([full, empty], {"iteration 1": change, "iteration 2": {}})[3:]
    assert [row[0] for row in two] == [
        "iteration 1, difference (paired)",
        "iteration 2, difference (paired)",
    ]
    assert two[1][2:] == ["not measured", "not measured"]
    assert markdown_table([full], {}).splitlines()[1] == "|---|---|---|---|"
    assert text_table([full], {}).splitlines()[0].startswith("system  prompts  WER %")


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path):
    player = Player(
        label="before",
        pcm=b"\x00\x10" * 1600,
        sample_rate_hz=16000,
        note="WER 7 %",
        heard="the fog & cat",
    )
    summary = summarise("before", judged([1.0, 2.0]), 20)
    inputs = ReportInputs(
        title="A <run>",
        facts={"config": "abc"},
        ceilings=[],
        iterations=[summary, summary],
        differences={},
        verdict=["best: iteration 1, <why>"],
        trainings=[("DPO", [{"step": 1, "loss": 0.7, "margin": 0.0, "accuracy": 0.5}])],
        stage_seconds={"sample": 3.0},
        listening=[Listening(text="the dog & cat", speaker_id="s", players=(player,))],
    )
    write_report(inputs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "A &lt;run&gt;" in page
    assert "<p>Best: iteration 1, &lt;why&gt;.</p>" in page
    assert "the dog &amp; cat" in page
    assert "<q>the fog &amp; cat</q>" in page
    assert page.count("<svg") == page.count('<svg role="img" aria-label="') == 6
    assert '<span class="interval">[' in page
    assert "data:audio/flac;base64," in page
    assert 'src="http' not in page


def test_a_curve_is_drawn_for_the_keys_that_a_training_wrote():
    assert training_curves([{"step": 1, "kl": 0.1}]) == []
    (plot,) = training_curves([{"step": 0, "heldout_loss": 0.7}, {"step": 1, "loss": 0.7}])
    assert "loss, trained on" in plot
    assert "loss, held out" in plot


def test_a_preference_training_shows_what_tells_a_collapse():
    row = {
        "step": 1, "loss": 0.7, "accuracy": 0.5, "margin": 0.0, "chosen_logprob": -1.0,
        "rejected_logprob": -2.0, "chosen_drop": 0.1, "kl_k1": 0.2, "chosen_reward": 0.0,
        "rejected_reward": 0.0, "grad_norm": 3.0, "learning_rate": 1e-4,
    }  # fmt: skip
    page = "".join(training_curves([row]))
    for name in ("chosen, trained on", "rejected, trained on", "chosen lost", "KL (k1)",
                 "implicit reward", "gradient norm", "learning rate"):  # fmt: skip
        assert name in page


def test_silence_is_a_column_of_the_result():
    table = judged([1.0, 1.0]).append_column("silence_ratio", pa.array([0.1, 0.3]))
    assert table_rows([summarise("a", table, 20)], {})[0][-1] == "silence %"
    assert summarise("a", table, 20).estimates["silence"].value == pytest.approx(0.2)


def inputs_of(iterations: list[Summary], differences: Differences) -> ReportInputs:
    return ReportInputs(
        title="t", facts={}, ceilings=[], iterations=iterations, differences=differences,
        verdict=[], trainings=[], stage_seconds={}, listening=[],
    )  # fmt: skip


def test_a_plot_shows_percent_where_its_title_says_percent(tmp_path: Path):
    summary = summarise("before", judged([1.0, 1.0]), 20)
    write_report(inputs_of([summary], {}), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert metric_over_iterations(["before"], [(25.0, 25.0, 25.0)], "WER %") in page


def test_a_judge_that_the_table_does_not_know_has_a_column_and_a_plot_of_its_own(tmp_path: Path):
    judges = [SignalConfig(), HttpJudgeConfig(name="wer", url="http://localhost:1")]
    metrics = metrics_of(judges)
    assert [metric.key for metric in metrics if metric not in METRICS] == ["own_wer"]
    before = judged([1.0, 2.0]).append_column("wer", pa.array([3.0, 4.0]))
    after = judged([1.0, 2.0]).append_column("wer", pa.array([5.0, 7.0]))
    first, second = (summarise(n, t, 20, metrics) for n, t in (("a", before), ("b", after)))
    assert first.estimates["own_wer"].value == pytest.approx(3.5)
    assert first.estimates["wer"].value == pytest.approx(3 / 8)  # a user's judge took no place
    changes = {"b": compare(before, after, 20, metrics)}
    assert changes["b"]["own_wer"].value == pytest.approx(2.5)
    head, *rows = table_rows([first, second], changes)
    assert head == ["system", "prompts", "WER %", "stopped %", "wer"]
    assert [row[-1].partition(" ")[0] for row in rows] == ["3.50", "6.00", "+2.50"]
    write_report(inputs_of([first, second], changes), tmp_path / "report.html")
    assert 'aria-label="wer, system by system"' in (tmp_path / "report.html").read_text()


def test_a_reward_model_and_a_bare_likelihood_are_judges_too():
    judges = [
        RewardModelJudgeConfig(path=Path("rm")),
        RecogniserConfig(model="base", role="eval", transcribe=False),
        SpeakerConfig(),
    ]
    own = [metric.label for metric in metrics_of(judges) if metric not in METRICS]
    assert own == ["reward_model", "eval_text_logprob"]
    transcribing = RecogniserConfig(model="base", role="eval")
    assert metrics_of([transcribing]) == METRICS  # it has its columns there


def test_the_report_of_a_run_shows_the_judges_of_its_recipe(tmp_path: Path):
    judge = {"kind": "http", "name": "far", "url": "http://localhost:1"}
    values = {"run_dir": tmp_path, "evaluation": {"judges": [judge], "num_resamples": 20}}
    values |= dict.fromkeys(("golden", "policy", "nar"), "nowhere")
    values |= {"pairing": {"kinds": ["golden"]}}
    for name, far in (("iteration-0/evaluation", 1.0), ("iteration-1/evaluation", 3.0)):
        table = judged([1.0, 2.0]).append_column("far", pa.array([far, far]))
        with committed_folder(tmp_path / name, {}) as partial:
            pq.write_table(table, partial / SCORED)
    write_run_report(AlignConfig.model_validate(values))
    head, *_, difference = [
        line.split("|") for line in (tmp_path / "result.md").read_text().splitlines()
    ]
    assert head[-2].strip() == "far"
    assert difference[-2].strip() == "+2.00 [+2.00, +2.00]"


def test_a_measurement_says_that_the_code_was_changed_since_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert machine_facts()["commit"] == "not a checkout"
    code = tmp_path / "code.py"
    code.write_text("one = 1\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "code.py"], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], check=True)
    commit = machine_facts()["commit"]
    assert len(commit) == 7
    (tmp_path / "notes.txt").write_text("not of the code")
    assert machine_facts()["commit"] == commit
    code.write_text("one = 2\n")
    assert machine_facts()["commit"] == f"{commit}-dirty"
