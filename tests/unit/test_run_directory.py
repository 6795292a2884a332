import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from speechalign.artifacts import committed_folder
from speechalign.config.align import AlignConfig
from speechalign.config.base import Config
from speechalign.config.load import load_config
from speechalign.errors import ConfigError, CorruptArtifact, DataError, RunLocked
from speechalign.pipeline.run_directory import changed_settings, open_run


class Told(Config):
    beta: float = Field(default=0.1)


def write_number(folder: Path) -> None:
    with committed_folder(folder, {}) as partial:
        (partial / "number").write_text("7")


def test_a_finished_stage_is_never_redone(tmp_path: Path):
    calls: list[int] = []

    def produce(folder: Path) -> None:
        calls.append(1)
        write_number(folder)

    for _ in range(2):
        with open_run(tmp_path / "run", Told()) as run:
            run.stage("iteration-1/pairs", produce)
    number = tmp_path / "run" / "iteration-1" / "pairs" / "number"
    assert (len(calls), number.read_text()) == (1, "7")


def test_a_half_written_stage_leaves_nothing_that_looks_finished(tmp_path: Path):
    def die(folder: Path) -> None:
        with committed_folder(folder, {}) as partial:
            (partial / "number").write_text("7")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError), open_run(tmp_path, Told()) as run:
        run.stage("pairs", die)
    with open_run(tmp_path, Told()) as run:
        assert not (tmp_path / "pairs").exists()
        run.stage("pairs", write_number)
    assert (tmp_path / "pairs" / "manifest.json").exists()


def test_a_stage_that_commits_nothing_is_not_finished(tmp_path: Path):
    with open_run(tmp_path, Told()) as run, pytest.raises(DataError, match="no manifest"):
        run.stage("pairs", lambda folder: folder.mkdir())


def test_a_flipped_bit_in_a_finished_stage_is_noticed(tmp_path: Path):
    with open_run(tmp_path, Told()) as run:
        folder = run.stage("pairs", write_number)
        (folder / "number").write_text("8")
        with pytest.raises(CorruptArtifact, match="differs from its manifest"):
            run.stage("pairs", write_number)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path):
    refused = pytest.raises(RunLocked, match=f"process {os.getpid()}")
    with open_run(tmp_path, Told()), refused, open_run(tmp_path, Told()):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path):
    with open_run(tmp_path, Told()):
        mine = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps(mine | {"pid": 2**22 + 1}))
    with open_run(tmp_path, Told()):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


def test_the_fresh_lock_of_another_host_is_respected(tmp_path: Path):
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "job_id": ""}))
    with pytest.raises(RunLocked, match="elsewhere"), open_run(tmp_path, Told()):
        pass


def test_the_silent_lock_of_another_host_is_taken_over(tmp_path: Path):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "job_id": ""}))
    os.utime(lock, (0, 0))
    with open_run(tmp_path, Told()):
        pass


def test_after_a_reboot_a_process_of_the_same_number_does_not_hold_the_lock(tmp_path: Path):
    lock = tmp_path / "lock"
    with open_run(tmp_path, Told()):
        before = json.loads(lock.read_text()) | {"processes": "another boot"}
    lock.write_text(json.dumps(before))
    with pytest.raises(RunLocked), open_run(tmp_path, Told()):  # or in another container
        pass
    os.utime(lock, (0, 0))
    with open_run(tmp_path, Told()):
        pass


def test_another_config_is_refused_with_what_changed(tmp_path: Path):
    with open_run(tmp_path, Told()) as run:
        run.stage("pairs", write_number)
    with pytest.raises(ConfigError) as refused, open_run(tmp_path, Told(beta=0.2)):
        pass
    assert str(refused.value) == (
        f"{tmp_path} was started with another config:\n"
        "  beta: was 0.1, now 0.2\n"
        f"Use the old settings to resume (they are in {tmp_path}/config.yaml), or choose another "
        "run_dir."
    )


def recipe_values(**overrides: object) -> dict[str, Any]:
    """Return a whole recipe with two iterations of the same prompts."""
    chosen = {"pipeline.iterations": 2, "pipeline.prompts": "same"} | overrides
    texts = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
    config = load_config(AlignConfig, Path("jobs/align-embedded-cpu.yaml"), texts)
    return config.model_dump(mode="json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pools.sample.num_actors", 7),
        ("pools.sample.batch_size", 7),
        ("pools.render.num_cpus", 0.7),
        ("pools.render.label_selector", {"zone": "a"}),
        ("judges.0.pool.batch_size", 7),
        ("judges.0.num_threads", 7),
        ("evaluation.judges.1.pool.num_actors", 7),
        ("evaluation.judges.1.num_threads", 7),
        ("engine.num_threads", 7),
        ("engine.kv_cache_mib", 7),
        ("engine.max_num_seqs", 7),
        ("rendering.num_threads", 7),
        ("training.workers.cpus_per_worker", 0.7),
        ("training.workers.gpus_per_worker", 0.7),
        ("training.workers.max_failures", 7),
        ("training.workers.label_selector", {"zone": "a"}),
        ("evaluation.num_players", 7),
        ("pipeline.iterations", 3),
    ],
)
def test_a_run_may_go_on_elsewhere_or_for_longer(key: str, value: object):
    changed = changed_settings(recipe_values(), recipe_values(**{key: value}), is_finished=False)
    assert changed.refused == ()
    assert len(changed.allowed) == 1
    assert changed.allowed[0].startswith(key)


def test_judges_of_heldout_answers_may_have_other_pools_too():
    before, now = (
        {"training": {"heldout": {"judges": [{"kind": "signal", "pool": {"num_cpus": share}}]}}}
        for share in (0.1, 0.2)
    )
    changed = changed_settings(before, now, is_finished=False)
    assert (len(changed.allowed), changed.refused) == (1, ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 7),
        ("sampling.samples_per_prompt", 7),
        ("engine.max_model_len", 777),
        ("engine.dtype", "bf16"),
        ("rendering.num_levels", 2),
        ("judges.0.beam_size", 7),
        ("evaluation.prompts.num_prompts", 7),
        ("training.loss.beta", 0.7),
        ("training.workers.num_workers", 1),
        ("pipeline.iterations", 1),
    ],
)
def test_a_run_does_not_go_on_with_what_would_make_something_else(key: str, value: object):
    changed = changed_settings(recipe_values(), recipe_values(**{key: value}), is_finished=False)
    assert changed.allowed == ()
    assert [line.partition(":")[0] for line in changed.refused] == [key]


def test_an_argument_of_a_users_judge_is_no_placement():
    def values(threads: int) -> dict[str, Any]:
        own = {"kind": "python", "arguments": {"num_threads": threads, "pool": {"x": threads}}}
        return {"judges": [own]}

    changed = changed_settings(values(1), values(2), is_finished=False)
    assert (len(changed.allowed), len(changed.refused)) == (0, 2)


@pytest.mark.parametrize(("prompts", "is_finished"), [("fresh", False), ("same", True)])
def test_iterations_are_not_raised_where_all_were_counted_on(prompts: str, is_finished: bool):
    earlier = recipe_values(**{"pipeline.prompts": prompts})
    now = recipe_values(**{"pipeline.prompts": prompts, "pipeline.iterations": 3})
    changed = changed_settings(earlier, now, is_finished=is_finished)
    assert changed.refused == ("pipeline.iterations: was 2, now 3",)


class Placed(Config):
    beta: float = 0.1
    pools: dict[str, int] = Field(default_factory=dict[str, int])


def test_a_resume_with_smaller_pools_says_so_and_is_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with open_run(tmp_path, Placed(pools={"sample": 4})) as run:
        run.stage("pairs", write_number)
    with caplog.at_level(logging.INFO), open_run(tmp_path, Placed(pools={"sample": 2})):
        pass
    assert "another setting: pools.sample: was 4, now 2" in caplog.text
    assert "sample: 2" in (tmp_path / "config.yaml").read_text()


def test_a_run_with_its_best_policy_counts_as_finished(tmp_path: Path):
    class Turns(Config):
        pipeline: dict[str, Any]

    with open_run(tmp_path, Turns(pipeline={"prompts": "same", "iterations": 1})) as run:
        run.stage("best", write_number)
    more = Turns(pipeline={"prompts": "same", "iterations": 2})
    with pytest.raises(ConfigError, match="iterations: was 1, now 2"), open_run(tmp_path, more):
        pass


def test_a_config_with_which_nothing_was_made_may_be_mended(tmp_path: Path):
    for beta in (0.1, 0.2):
        with open_run(tmp_path, Told(beta=beta)):
            pass
    assert "beta: 0.2" in (tmp_path / "config.yaml").read_text()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(ConfigError, match="cannot be written")
    with refused, open_run(tmp_path / "file" / "run", Told()):
        pass
