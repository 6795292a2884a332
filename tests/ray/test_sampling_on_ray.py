"""The real stages in real Ray actors, with tiny random models."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray._private.state import state

from speechalign.artifacts import verify_folder
from speechalign.codec.embedded import EmbeddedCodec, save_embedded
from speechalign.codec.embedded_model import EmbeddedModel
from speechalign.config.codec import EmbeddedCodecConfig, EmbeddedModelConfig
from speechalign.config.policy import ArConfig, NarConfig
from speechalign.config.sampling import (
    PoolConfig,
    RenderingConfig,
    SamplingConfig,
    TransformersConfig,
)
from speechalign.errors import ConfigError, DataError, EngineDead
from speechalign.policy.ar import build_ar, save_ar
from speechalign.policy.nar import NarModel, save_nar
from speechalign.policy.vocabulary import Vocabulary
from speechalign.resources import possible_resources
from speechalign.rows import QUARANTINE, RENDERED, prompts_to_table
from speechalign.sampling.pipeline import (
    MAX_RESTARTS,
    Stage,
    check_resources,
    errors_of_actors,
    render_stage,
    sample_and_judge,
    sample_stage,
    stream,
)
from speechalign.types import Prompt

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
]

POOL = PoolConfig(num_cpus=0.5, batch_size=2)
NUM_PROMPTS = 5


class LengthJudge:
    """Seconds of sound, in place of a model that listens."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        sounds: list[Any] = batch["waveform_pcm"].to_pylist()
        seconds = [len(pcm) / 2 / 16_000 for pcm in sounds]
        batch = batch.append_column("length", pa.array(seconds, pa.float32()))
        return batch.append_column("judge_seconds", pa.array([0.5] * len(batch), pa.float32()))


class Fragile:
    """At row 3 its process ends or its engine is dead, once or always."""

    def __init__(self, folder: Path, *, dies: str) -> None:
        self._mark, self._dies = folder / "died", dies

    def __call__(self, batch: pa.Table) -> pa.Table:
        is_due = self._dies == "always" or not (self._dies == "never" or self._mark.exists())
        if is_due and 3 in batch["x"].to_pylist():
            with self._mark.open("a") as file:
                file.write("x")
            if self._dies == "engine":
                raise EngineDead("burnt out")
            os._exit(1)
        return batch


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = EmbeddedModelConfig(hidden_dim=16, latent_dim=8, post_dim=8, codebook_size=48)
    folder = tmp_path_factory.mktemp("codec") / "codec"
    save_embedded(EmbeddedModel(config), folder)
    return folder


def some_prompts(fingerprint: str) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(
            prompt_id=f"p{index}",
            text="ab",
            phonemes="ab",
            speaker_id="s0",
            speaker_codes_KT=rng.integers(0, 48, (8, 10)).astype(np.int16),
            golden_codes_KT=rng.integers(0, 48, (8, 25)).astype(np.int16),
            codec_fingerprint=fingerprint,
        )
        for index in range(NUM_PROMPTS)
    ]


def some_stages(root: Path, codec_folder: Path, *, nar_fingerprint: str | None = None) -> Any:
    torch.manual_seed(0)
    codec = EmbeddedCodec.load(codec_folder)
    vocabulary = Vocabulary(symbols="ab", num_codebooks=1, codebook_size=48)
    facts = {"codec_fingerprint": codec.fingerprint, "policy_version": 4, "prefix_frames": 3}
    ar = build_ar(ArConfig(hidden_size=64, num_layers=1, num_heads=2), vocabulary)
    save_ar(root / "ar", ar, vocabulary, facts)
    nar_config = NarConfig(hidden_size=16, dilations=(1,), num_levels=3, speaker_frames=10)
    nar = NarModel(nar_config, num_codebooks=8, codebook_size=48)
    save_nar(root / "nar", nar, {"codec_fingerprint": nar_fingerprint or codec.fingerprint})
    sampling = SamplingConfig(samples_per_prompt=2, max_new_tokens=4)
    engine = TransformersConfig(max_model_len=64)
    rendering = RenderingConfig(num_levels=3)
    codec_config = EmbeddedCodecConfig(path=codec_folder)
    return [
        sample_stage(root / "ar", engine, sampling, run_seed=0, pool=POOL),
        render_stage(codec_config, root / "ar", root / "nar", rendering, pool=POOL),
        Stage(name="judge", stage=LengthJudge, arguments={}, pool=POOL),
    ]


def test_prompts_become_judged_samples_in_one_committed_folder(
    codec_folder: Path, tmp_path: Path
) -> None:
    stages = some_stages(tmp_path, codec_folder)
    table = prompts_to_table(some_prompts(EmbeddedCodec.load(codec_folder).fingerprint))
    dropped = pa.Table.from_pylist(
        [{"stage": "prompts", "row_id": "x", "reason": "too long"}], schema=QUARANTINE
    )
    scored = tmp_path / "scored"
    facts = sample_and_judge(table, stages, scored, keep_audio=True, quarantine=dropped)
    assert verify_folder(scored) == facts
    rows = pq.read_table(scored / "scored.parquet")
    ids = list(zip(rows["prompt_id"].to_pylist(), rows["sample_index"].to_pylist(), strict=True))
    assert ids == [(f"p{index}", sample) for index in range(NUM_PROMPTS) for sample in (0, 1)]
    assert set(RENDERED.names) <= set(rows.column_names)
    assert set(rows["policy_version"].to_pylist()) == {4}
    assert set(rows["judge_errors"].to_pylist()) == {""}
    for row in rows.to_pylist():
        codes = row["token_ids"][: None if row["is_truncated"] else -1]
        is_speech = all(8 <= token < 8 + 48 for token in codes)
        assert row["length"] == pytest.approx(len(codes) / 50 if is_speech else 0)
        assert row["golden_duration_s"] == 0.5
        assert len(row["reference_pcm"]) == 2 * 10 * 320
    assert (facts["num_rows"], facts["num_dropped"]) == (2 * NUM_PROMPTS, 1)
    assert 0 < facts["num_empty"] < facts["num_rows"]
    assert facts["stage_seconds"]["judge"] == 0.5 * facts["num_rows"]
    assert facts["stage_seconds"]["sample"] > 0
    assert pq.read_table(scored / "quarantine.parquet").to_pylist() == dropped.to_pylist()

    again = tmp_path / "again"
    sample_and_judge(table.slice(3, 1), stages, again, keep_audio=False)
    one = pq.read_table(again / "scored.parquet")
    assert one["token_ids"].to_pylist() == rows["token_ids"].to_pylist()[6:8]
    assert "waveform_pcm" not in one.column_names


def test_what_an_actor_refuses_reaches_the_driver_as_itself(
    codec_folder: Path, tmp_path: Path
) -> None:
    stages = some_stages(tmp_path, codec_folder, nar_fingerprint="other")
    table = prompts_to_table(some_prompts(EmbeddedCodec.load(codec_folder).fingerprint))
    with pytest.raises(DataError, match="the NAR model other"):
        sample_and_judge(table, stages, tmp_path / "scored", keep_audio=False)
    assert not (tmp_path / "scored").exists()


def test_pools_that_can_never_start_are_a_config_error(codec_folder: Path, tmp_path: Path) -> None:
    stages = some_stages(tmp_path, codec_folder)
    check_resources(stages, {"CPU": 1.5})
    with pytest.raises(ConfigError, match=r"want 1.5 CPU \(sample 0.5, render 0.5, judge 0.5\)"):
        check_resources(stages, {"CPU": 1.0})


def test_nodes_that_an_autoscaler_may_add_count(monkeypatch: pytest.MonkeyPatch) -> None:
    most: dict[str, int] | None = {"CPU": 14, "GPU": 3}
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: most)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 20.0, "memory": 1.0})
    assert possible_resources() == {"CPU": 20.0, "GPU": 3.0, "memory": 1.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert possible_resources() == {"CPU": 14.0, "GPU": 3.0}
    most = None
    assert possible_resources() == {"CPU": 2.0}


def through_a_fragile_stage(folder: Path, dies: str) -> list[int]:
    stages = [
        Stage(name=name, stage=Fragile, arguments={"folder": path, "dies": how}, pool=POOL)
        for name, path, how in (("strong", folder.parent, "never"), ("weak", folder, dies))
    ]
    dataset = stream(pa.table({"x": list(range(8))}), stages)
    with errors_of_actors(stages):
        return [row["x"] for row in dataset.take_all()]


@pytest.mark.filterwarnings("error::ray.util.annotations.RayDeprecationWarning")
def test_a_stage_that_dies_once_goes_on_and_one_that_always_dies_is_named(tmp_path: Path) -> None:
    for dies in ("once", "engine", "always"):
        (tmp_path / dies).mkdir()
    assert through_a_fragile_stage(tmp_path / "once", "once") == list(range(8))
    assert through_a_fragile_stage(tmp_path / "engine", "engine") == list(range(8))
    assert (tmp_path / "engine" / "died").read_text() == "x"
    with pytest.raises(EngineDead, match="stage 'weak': its process died"):
        through_a_fragile_stage(tmp_path / "always", "always")
    assert (tmp_path / "always" / "died").read_text() == "x" * (1 + MAX_RESTARTS)
