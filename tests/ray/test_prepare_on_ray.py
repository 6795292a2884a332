"""`speechalign prepare` with the shipped codec: sound on disk to golden tokens and a quarantine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from speechalign.config.codec import EmbeddedCodecConfig
from speechalign.config.prepare import PrepareConfig
from speechalign.errors import ConfigError, DataError
from speechalign.pipeline.prepare import run_prepare
from speechalign.rows import GOLDEN, QUARANTINE

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("cluster"),
]

TEXT = "the dog slept"


def write_manifest(folder: Path, rows: list[dict[str, Any]]) -> PrepareConfig:
    lines = [json.dumps({"text": TEXT, "speaker": "s1"} | row) for row in rows]
    (folder / "m.jsonl").write_text("\n".join(lines))
    values = {
        "input": {"kind": "manifest", "path": folder / "m.jsonl"},
        "output": folder / "out",
        "pool": {"num_actors": 2, "num_cpus": 0.5, "batch_size": 2},
    }
    return PrepareConfig.model_validate(values)


def buzz(path: Path, duration_s: float, rate_hz: int) -> None:
    times_N = np.arange(int(duration_s * rate_hz)) / rate_hz
    sf.write(path, 0.3 * np.sign(np.sin(2 * np.pi * 120 * times_N)), rate_hz)


def test_good_rows_become_tokens_and_bad_rows_keep_their_reason(tmp_path: Path):
    buzz(tmp_path / "a.wav", 0.6, 16000)
    buzz(tmp_path / "b.flac", 0.8, 24000)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.wav").write_text("<html>")
    rows = [
        {"path": "a.wav"},
        {"path": "b.flac", "speaker": "s2", "split": "heldout"},
        {"path": "cut.wav"},
        {"path": "page.wav"},
        {"path": "none.wav"},
        {"path": "a.wav", "id": "mute", "text": None},
        {"path": "a.wav", "id": "emoji", "text": "hello \U0001f600"},
        {"path": "a.wav", "id": "long", "text": "dog " * 200},
    ]
    config = write_manifest(tmp_path, rows)
    words = run_prepare(config)

    golden = pq.read_table(config.output / "golden.parquet")
    assert golden.schema.equals(GOLDEN)
    found = {row["clip_id"]: row for row in golden.to_pylist()}
    assert {id_: row["num_frames"] for id_, row in found.items()} == {"a.wav": 30, "b.flac": 40}
    assert {id_: len(row["codes"]) for id_, row in found.items()} == {"a.wav": 240, "b.flac": 320}
    assert found["b.flac"]["split"] == "heldout"
    assert found["a.wav"]["phonemes"]

    quarantine = pq.read_table(config.output / "quarantine.parquet")
    assert quarantine.schema.equals(QUARANTINE)
    reasons = {row["row_id"]: row["reason"] for row in quarantine.to_pylist()}
    expected = {
        "cut.wav": "it was cut",
        "page.wav": "not decodable",
        "none.wav": "no such file",
        "mute": "no word to speak",
        "emoji": "U+1F600",
        "long": "800 characters",
    }
    assert reasons.keys() == expected.keys()
    for id_, reason in expected.items():
        assert reason in reasons[id_]
    assert "2 clips" in words
    assert "6 recordings left out" in words

    assert run_prepare(config) == words
    with pytest.raises(ConfigError, match="another input or with other settings"):
        run_prepare(config.model_copy(update={"heldout_share": 0.5}))


def test_a_corpus_without_one_good_recording_is_an_error_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "page.wav").write_text("<html>")
    config = write_manifest(tmp_path, [{"path": "page.wav"}, {"path": "none.wav"}])
    with pytest.raises(DataError, match="not one of 2 recordings can be used"):
        run_prepare(config)
    assert not config.output.exists()


def test_the_rows_are_in_the_order_of_the_manifest_whichever_actor_is_faster(tmp_path: Path):
    buzz(tmp_path / "long.wav", 29.0, 16000)
    buzz(tmp_path / "short.wav", 0.5, 16000)
    names = ["long.wav", *["short.wav"] * 5]
    rows = [{"path": name, "id": f"c{number}"} for number, name in enumerate(names)]
    config = write_manifest(tmp_path, rows)
    pool = config.pool.model_copy(update={"batch_size": 1})
    run_prepare(config.model_copy(update={"pool": pool}))
    golden = pq.read_table(config.output / "golden.parquet")
    assert golden["clip_id"].to_pylist() == [f"c{number}" for number in range(6)]


def test_what_can_never_work_is_a_config_error(tmp_path: Path):
    buzz(tmp_path / "a.wav", 0.5, 16000)
    config = write_manifest(tmp_path, [{"path": "a.wav"}])
    pool = config.pool.model_copy(update={"num_cpus": 500.0})
    with pytest.raises(ConfigError, match=r"want 1000 CPU \(encode 1000\)"):
        run_prepare(config.model_copy(update={"pool": pool}))
    codec = EmbeddedCodecConfig(path=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="nowhere has no codec"):
        run_prepare(config.model_copy(update={"codec": codec}))
    assert not config.output.exists()
