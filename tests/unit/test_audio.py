import errno
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from speechalign.audio.decode import read_speech
from speechalign.audio.manifest import Recording, read_recordings, split_of
from speechalign.config.prepare import AudioLimits, InputConfig
from speechalign.errors import ConfigError, DataError

LIMITS = AudioLimits()


def tone(seconds: float = 0.5, rate_hz: int = 16000) -> np.ndarray:
    return 0.5 * np.sin(np.arange(int(seconds * rate_hz)) * 0.05).astype(np.float32)


def write(
    path: Path, samples: np.ndarray, rate_hz: int = 16000, subtype: str | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, samples, rate_hz, subtype=subtype)
    return path


def test_stereo_at_another_rate_becomes_mono_at_the_codecs_rate(tmp_path: Path):
    stereo = np.stack([tone(1.0, 24000), np.zeros(24000, np.float32)], axis=1)
    wave_N = read_speech(write(tmp_path / "a.flac", stereo, 24000), 16000, LIMITS)
    assert wave_N.shape == (16000,)
    assert np.abs(wave_N).max() == pytest.approx(0.25, abs=0.02)


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "empty.wav").write_bytes(b"")
    (folder / "page.wav").write_text("<html>not found</html>")
    whole = write(folder / "whole.wav", tone(2.0)).read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    flac = write(folder / "whole.flac", tone(2.0)).read_bytes()
    (folder / "cut.flac").write_bytes(flac[: len(flac) // 2])
    nan = tone()
    nan[7] = np.nan
    return {
        "missing": (folder / "nothing.wav", "no such file"),
        "empty": (folder / "empty.wav", "not decodable"),
        "page": (folder / "page.wav", "not decodable"),
        "header only": (write(folder / "head.wav", tone(0.0)), "outside 0.3"),
        "cut wav": (folder / "cut.wav", "it was cut"),
        "cut flac": (folder / "cut.flac", "not decodable|it was cut"),
        "nan": (write(folder / "nan.wav", nan, subtype="FLOAT"), "not finite"),
        "peak": (write(folder / "peak.wav", 90 * tone(), subtype="FLOAT"), "peak 45"),
        "silent": (write(folder / "silent.wav", 0 * tone()), "silence"),
        "slow": (write(folder / "slow.wav", tone(1.0), 4000), "4000 Hz is outside"),
        "fast": (write(folder / "fast.wav", tone(10.0), 384000), "384000 Hz is outside"),
        "long": (write(folder / "long.wav", tone(31.0)), "31.00 s is outside"),
        "wide": (write(folder / "wide.wav", np.stack([tone()] * 9, 1)), "9 channels"),
    }


def test_a_file_that_is_not_usable_speech_is_refused_with_the_reason(tmp_path: Path):
    for path, reason in bad_files(tmp_path).values():
        with pytest.raises(DataError, match=reason):
            read_speech(path, 16000, LIMITS)


ROWS = [
    {"path": "a.wav", "text": "one", "speaker": "s1"},
    {"path": "b.wav", "text": "two", "speaker": "s2"},
]


def test_manifests_of_all_three_formats_read_the_same(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    (tmp_path / "m.csv").write_text("path,text,speaker\na.wav,one,s1\nb.wav,two,s2\n")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "m.parquet")
    expected = [
        Recording(clip_id="a.wav", path=tmp_path / "a.wav", text="one", speaker_id="s1"),
        Recording(clip_id="b.wav", path=tmp_path / "b.wav", text="two", speaker_id="s2"),
    ]
    for name in ("m.jsonl", "m.csv", "m.parquet"):
        found = read_recordings(InputConfig(kind="manifest", path=tmp_path / name))
        assert found == expected


def test_the_corpora_are_read_as_users_have_them(tmp_path: Path):
    def put(path: str, text: str = "") -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    put("libri/19/198/19-198.trans.txt", "19-198-0000 HELLO THERE\n")
    put("tts/19/198/19_198_000001_000000.normalized.txt", "Hello there.")
    put("vctk/txt/p225/p225_001.txt", "Please call Stella.\n")
    put("vctk/wav48_silence_trimmed/p225/p225_001_mic1.flac")
    put("lj/metadata.csv", "LJ001-0001|Printing, 1.|Printing, one.\n")
    found = {
        kind: read_recordings(InputConfig.model_validate({"kind": kind, "path": tmp_path / folder}))
        for kind, folder in (
            ("librispeech", "libri"), ("libritts", "tts"), ("vctk", "vctk"), ("ljspeech", "lj"),
        )
    }  # fmt: skip
    summary = {kind: (r.path.name, r.text, r.speaker_id) for kind, (r,) in found.items()}
    assert summary == {
        "librispeech": ("19-198-0000.flac", "HELLO THERE", "19"),
        "libritts": ("19_198_000001_000000.wav", "Hello there.", "19"),
        "vctk": ("p225_001_mic1.flac", "Please call Stella.", "p225"),
        "ljspeech": ("LJ001-0001.wav", "Printing, one.", "ljspeech"),
    }


def test_mistakes_in_a_manifest_are_named(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"path": "a.wav", "text": "x"}\n')
    with pytest.raises(ConfigError, match="row 1: no speaker"):
        read_recordings(InputConfig(kind="manifest", path=path))
    path.write_text("{oops\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recordings(InputConfig(kind="manifest", path=path))
    path.write_text((json.dumps(ROWS[0]) + "\n") * 2)
    with pytest.raises(DataError, match=r"appear twice, first 'a\.wav'"):
        read_recordings(InputConfig(kind="manifest", path=path))
    with pytest.raises(ConfigError, match="does not exist"):
        read_recordings(InputConfig(kind="manifest", path=tmp_path / "no.jsonl"))


def wav_with_a_chunk_before_the_data(path: Path) -> bytes:
    whole = write(path, tone(2.0)).read_bytes()
    return whole[:36] + b"LIST" + (3).to_bytes(4, "little") + b"abc\0" + whole[36:]


def test_every_kind_of_wav_that_was_cut_is_refused(tmp_path: Path):
    kinds = {
        "float": write(tmp_path / "float.wav", tone(2.0), subtype="FLOAT").read_bytes(),
        "list": wav_with_a_chunk_before_the_data(tmp_path / "list.wav"),
    }
    sf.write(tmp_path / "x.wav", tone(2.0), 16000, format="WAVEX")
    kinds["extensible"] = (tmp_path / "x.wav").read_bytes()
    for name, data in kinds.items():
        path = tmp_path / f"cut-{name}.wav"
        path.write_bytes(data)
        assert read_speech(path, 16000, LIMITS).shape == (32000,)
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(DataError, match="declared bytes; it was cut"):
            read_speech(path, 16000, LIMITS)


def test_a_wav_that_was_streamed_declares_no_length_and_is_read(tmp_path: Path):
    path = write(tmp_path / "a.wav", tone())
    data = bytearray(path.read_bytes())
    data[40:44] = b"\xff" * 4
    path.write_bytes(data)
    assert read_speech(path, 16000, LIMITS).shape == (8000,)


def test_a_constant_offset_is_silence(tmp_path: Path):
    path = write(tmp_path / "a.wav", np.full(16000, 0.5, np.float32))
    with pytest.raises(DataError, match="silence"):
        read_speech(path, 16000, LIMITS)


def test_samples_without_a_header_are_refused_like_any_bad_file(tmp_path: Path):
    (tmp_path / "a.raw").write_bytes(b"ab" * 16000)
    with pytest.raises(DataError, match="without a header"):
        read_speech(tmp_path / "a.raw", 16000, LIMITS)


def test_a_file_that_cannot_be_read_is_a_bad_file_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(DataError, match="x: File name too long"):
        read_speech(tmp_path / ("x" * 300), 16000, LIMITS)
    path = write(tmp_path / "a.wav", tone())

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(DataError, match=r"a\.wav: Input/output error"):
        read_speech(path, 16000, LIMITS)


def manifest(folder: Path, name: str, content: str | bytes) -> list[Recording]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_recordings(InputConfig(kind="manifest", path=path))


def test_a_manifest_may_name_ids_and_splits(tmp_path: Path):
    csv = "id,path,text,speaker,split\nx,a.wav,one,s,heldout\ny,b.wav,two,s,\n"
    first, second = manifest(tmp_path, "m.csv", csv)
    assert (first.clip_id, split_of(first, 9, 0.0, seed=0)) == ("x", "heldout")
    assert (second.clip_id, split_of(second, 9, 0.0, seed=0)) == ("y", "train")


def test_a_manifest_of_a_spreadsheet_with_its_mark_is_read(tmp_path: Path):
    (found,) = manifest(tmp_path, "m.csv", b"\xef\xbb\xbfpath,text,speaker\na.wav,one,s\n")
    assert found.text == "one"


def test_a_line_separator_in_a_text_does_not_end_a_line(tmp_path: Path):
    (found,) = manifest(tmp_path, "m.jsonl", '{"path": "a", "text": "a\u2028b", "speaker": "s"}')
    assert found.text == "a\u2028b"


def test_a_missing_transcript_costs_one_recording_not_the_manifest(tmp_path: Path):
    first = {"path": "a.wav", "text": None, "speaker": "s1"}
    found = manifest(tmp_path, "m.jsonl", json.dumps(first) + "\n" + json.dumps(ROWS[1]))
    assert [recording.text for recording in found] == ["", "two"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("m.csv", "path,text,speaker\na.wav,well, then,s\n", "row 1: more cells than columns"),
        ("m.csv", "path,text,speaker\na.wav,one\n", "row 1: no speaker"),
        ("m.csv", "path,text,speaker,split\na.wav,one,s,dev\n", "split 'dev' is neither"),
        ("m.jsonl", '["a.wav", "one", "s"]', "row 1: not an object"),
        ("m.csv", f"path,text,speaker\na.wav,{'x' * 200_000},s\n", "field larger than field limit"),
    ],
)
def test_a_row_that_is_no_recording_is_named(tmp_path: Path, name: str, content: str, reason: str):
    with pytest.raises(ConfigError, match=reason):
        manifest(tmp_path, name, content)


def test_a_transcript_in_another_encoding_spoils_its_own_line_only(tmp_path: Path):
    folder = tmp_path / "19" / "198"
    folder.mkdir(parents=True)
    (folder / "19-198.trans.txt").write_bytes(b"19-198-0000 PAS\xe9\n\n\n19-198-0001 TEA\n")
    found = read_recordings(InputConfig(kind="librispeech", path=tmp_path))
    assert [recording.text for recording in found] == ["PAS\ufffd", "TEA"]


def test_all_recordings_of_a_speaker_are_on_one_side():
    recordings = [
        Recording(clip_id=str(i), path=Path("x"), text="x", speaker_id=f"s{i % 40}")
        for i in range(400)
    ]
    sides = {(r.speaker_id, split_of(r, 40, 0.25, seed=0)) for r in recordings}
    assert len(sides) == 40
    heldout = sum(side == "heldout" for _, side in sides)
    assert 4 <= heldout <= 16
