"""Who can be asked for: speakers of the golden tokens, and voices that people uploaded.

    UPLOADS/NAME/voice.json  codes.npy  manifest.json

An uploaded voice is a committed folder, so every replica that shares the storage sees a whole
voice or none. Names match a pattern that has no separator, so none leaves the folder.

Shapes: K codebooks, T frames.
"""

import io
import json
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile as sf
from numpy.typing import NDArray

from speechalign.artifacts import committed_folder, is_committed, manifest_facts, verify_folder
from speechalign.audio.decode import decode_speech
from speechalign.config.prepare import AudioLimits
from speechalign.config.serving import VoicesConfig
from speechalign.errors import ConfigError, DataError
from speechalign.rows import codes_from_flat

ALLOWED_CONTAINERS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
MIN_PEAK = 1e-2
"""Quieter clips are silence."""
CODES, FACTS = "codes.npy", "voice.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """A voice to continue."""

    name: str
    codes_KT: NDArray[np.int16]
    codec_fingerprint: str
    created: int
    """Seconds since 1970; 0 for a voice that the endpoint came with."""


def golden_voices(config: VoicesConfig) -> dict[str, Voice]:
    """Return the speakers of the golden tokens, each by the recording that is nearest in length.

    The middle of the recording is taken: its ends are silence.

    Raises:
        ConfigError: the file does not exist, has no such speaker, or an alias names nobody.
    """
    if not config.golden.exists():
        raise ConfigError(f"golden tokens {config.golden} do not exist; voices.golden names them")
    columns = ["speaker_id", "num_frames", "codes", "codec_fingerprint", "clip_id"]
    table = pq.read_table(config.golden, columns=columns)
    wanted = config.speaker_frames
    best: dict[str, tuple[int, str, int]] = {}
    names = table.select(["speaker_id", "num_frames", "clip_id"]).to_pylist()
    for index, row in enumerate(names):
        rank = (row["num_frames"] - wanted, row["clip_id"], index)
        speaker = row["speaker_id"]
        if rank[0] >= 0 and rank < best.get(speaker, (1 << 30, "", 0)):
            best[speaker] = rank
    missing = set(config.speakers) - best.keys()
    if missing:
        raise ConfigError(
            f"{config.golden} has no recording of {wanted} frames of {', '.join(sorted(missing))}; "
            f"there are {', '.join(sorted(best))}"
        )
    voices = {
        speaker: _golden_voice(table.slice(index, 1).to_pylist()[0], wanted)
        for speaker, (_, _, index) in sorted(best.items())
        if not config.speakers or speaker in config.speakers
    }
    unknown = {alias for alias, name in config.aliases.items() if name not in voices}
    if unknown:
        raise ConfigError(f"voices.aliases {', '.join(sorted(unknown))} name no voice")
    return voices


def _golden_voice(row: Mapping[str, Any], num_frames: int) -> Voice:
    codes_KT = codes_from_flat(row["codes"], len(row["codes"]) // row["num_frames"])
    start = (codes_KT.shape[1] - num_frames) // 2
    return Voice(
        name=row["speaker_id"],
        codes_KT=np.ascontiguousarray(codes_KT[:, start : start + num_frames]),
        codec_fingerprint=row["codec_fingerprint"],
        created=0,
    )


class Voices:
    """All voices of an endpoint; uploads are looked for on the disk, where replicas share them."""

    def __init__(self, config: VoicesConfig) -> None:
        self._config = config
        self._golden = golden_voices(config)
        self._one_at_a_time = threading.Lock()

    def find(self, name: str) -> Voice | None:
        """Return a voice, an alias's, or none."""
        known = self._golden.get(self._config.aliases.get(name, name))
        return known or self._uploaded(name)

    def names(self) -> list[str]:
        """Return all names, aliases too."""
        return [*self._golden, *self._config.aliases, *self._uploaded_names()]

    def listed(self) -> dict[str, int]:
        """Return when each voice was uploaded, by its name; 0: the endpoint came with it."""
        uploaded: dict[str, int] = {}
        for name in self._uploaded_names():
            with suppress(DataError, OSError):  # deleted meanwhile
                uploaded[name] = manifest_facts(self._folder(name))["created"]
        return uploaded | dict.fromkeys([*self._golden, *self._config.aliases], 0)

    def can_take(self, name: str) -> str:
        """Return why a new voice of a name cannot be stored; empty: it can."""
        if self._config.uploads is None:
            return "this endpoint takes no voices"
        if name in self.names():
            return f"there is a voice {name!r} already"
        if len(self._uploaded_names()) >= self._config.max_uploads:
            return f"there are {self._config.max_uploads} voices already; delete one"
        return ""

    def store(self, name: str, codes_KT: NDArray[np.int16], codec_fingerprint: str) -> Voice:
        """Write a voice, whole or not at all.

        Raises:
            ConfigError: there is one of that name.
        """
        folder = self._folder(name)
        created = int(time.time())
        facts = {"kind": "voice", "codec_fingerprint": codec_fingerprint, "created": created}
        kept_KT = np.ascontiguousarray(codes_KT[:, : self._config.speaker_frames])
        with self._one_at_a_time, committed_folder(folder, facts) as partial:
            if is_committed(folder):
                raise ConfigError(f"there is a voice {name!r} already")
            np.save(partial / CODES, kept_KT, allow_pickle=False)
            (partial / FACTS).write_text(json.dumps({"name": name}) + "\n")
        return Voice(
            name=name, codes_KT=kept_KT, codec_fingerprint=codec_fingerprint, created=created
        )

    def delete(self, name: str) -> bool:
        """Forget an uploaded voice; return whether there was one."""
        if self._config.uploads is None or not is_committed(self._folder(name)):
            return False
        gone = self._folder(f".{name}.deleted")  # at once; names with a dot are not listed
        with self._one_at_a_time:
            shutil.rmtree(gone, ignore_errors=True)
            self._folder(name).replace(gone)
            shutil.rmtree(gone)
        return True

    def _folder(self, name: str) -> Path:
        assert self._config.uploads is not None  # noqa: S101 - callers asked
        return self._config.uploads / name

    def _uploaded(self, name: str) -> Voice | None:
        if self._config.uploads is None or name not in self._uploaded_names():
            return None
        facts = verify_folder(self._folder(name))
        return Voice(
            name=name,
            codes_KT=np.load(self._folder(name) / CODES, allow_pickle=False),
            codec_fingerprint=facts["codec_fingerprint"],
            created=facts["created"],
        )

    def _uploaded_names(self) -> list[str]:
        if self._config.uploads is None or not self._config.uploads.is_dir():
            return []
        folders = sorted(self._config.uploads.iterdir())
        return [f.name for f in folders if is_committed(f) and not f.name.startswith(".")]


def read_clip(data: bytes, sample_rate_hz: int, config: VoicesConfig) -> NDArray[np.float32]:
    """Return the mono waveform of an uploaded clip.

    The header is looked at before the samples: 43 kB of FLAC can hold 57 MB of silence.

    Raises:
        DataError: it is no speech that can be used; the message says why.
    """
    try:
        container = sf.info(io.BytesIO(data)).format
    except sf.LibsndfileError:
        container = ""
    if container not in ALLOWED_CONTAINERS:
        raise DataError("the clip is no WAV, FLAC, OGG or MP3 file that can be decoded")
    limits = AudioLimits(
        min_duration_s=config.min_upload_s,
        max_duration_s=config.max_upload_s,
        max_channels=2,
        min_peak=MIN_PEAK,
    )
    wave_N = decode_speech(io.BytesIO(data), "the clip", sample_rate_hz, limits)
    return np.clip(_without_silent_ends(wave_N), -1.0, 1.0)


def _without_silent_ends(wave_N: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut what is 40 dB below the peak at both ends; a voice should begin with speech."""
    loud = np.flatnonzero(np.abs(wave_N) > 0.01 * np.abs(wave_N).max())
    return wave_N[loud[0] : loud[-1] + 1]
