"""Golden tokens that no model can learn from are refused, not misread."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speechalign.errors import ConfigError, DataError
from speechalign.rows import GOLDEN
from speechalign.training.golden import read_golden


def write_golden(path: Path, code: int) -> Path:
    row = {
        "clip_id": "c0", "text": "a", "phonemes": "a", "speaker_id": "s0", "source": "user",
        "kind": "human", "split": "train", "num_frames": 2, "codes": [1, 2, 3, code],
        "codec_fingerprint": "f",
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row], schema=GOLDEN), path)
    return path


def test_codes_that_a_model_has_no_id_for_are_refused(tmp_path: Path):
    (clip,) = read_golden(write_golden(tmp_path / "g.parquet", 1023), "train", min_frames=1).clips
    assert clip.codes_KT.tolist() == [[1, 2], [3, 1023]]
    with pytest.raises(DataError, match="has code 1024, a model learns codes below 1024"):
        read_golden(write_golden(tmp_path / "g.parquet", 1024), "train", min_frames=1)


def test_a_folder_and_a_file_that_is_not_there_are_refused(tmp_path: Path):
    write_golden(tmp_path / "golden.parquet", 4)
    for path in (tmp_path, tmp_path / "no.parquet"):
        with pytest.raises(ConfigError, match=r"are no file; .*golden\.parquet in its output"):
            read_golden(path, "train", min_frames=1)
