"""The registry packages that hold speech, and how to read each.

Debian packages are fetched with `apt-get download` and unpacked into the corpus folder; nothing
is installed, and no root is needed.
"""

import gzip
import logging
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from G722 import G722
from numpy.typing import NDArray

from speechalign.errors import ConfigError
from speechalign.seeds import derive_seed

logger = logging.getLogger(__name__)

SAMPLE_RATE_HZ = 16000
MIN_CLIP_S, MAX_CLIP_S = 1.0, 15.0
MIN_PROMPT_WORDS = 4
SILENCE_FOLDER = "silence"
"""Asterisk ships pauses of one to ten seconds as prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One piece of speech as a source has it."""

    clip_id: str
    text: str
    speaker_id: str
    source: str
    kind: str
    split: str
    waveform_N: NDArray[np.float32]
    """16 kHz, mono."""


def unpack(package: str, folder: Path) -> Path:
    """Return the folder of an unpacked Debian package, fetching it once.

    Raises:
        ConfigError: the package cannot be had.
    """
    target = folder / package
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(
            ["apt-get", "download", package], cwd=folder, check=True, capture_output=True
        )
        (archive,) = folder.glob(f"{package}_*.deb")
        partial = folder / f".{package}.partial"
        subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise ConfigError(
            f"Debian package {package} cannot be had ({error}); run `apt-get update` as root on a "
            "Debian machine, or copy a corpus folder from one"
        ) from None
    partial.replace(target)
    return target


def asterisk_english(folder: Path, num_heldout: int, seed: int) -> Iterator[Recording]:
    """Yield the prompts of one human speaker (CC-BY-SA-3.0), with transcripts.

    `num_heldout` prompts are drawn; those of a length that no clip may have are then left out,
    and so are training prompts that say what a held-out one says.
    """
    root = unpack("asterisk-core-sounds-en-g722", folder)
    texts = _asterisk_texts(unpack("asterisk-core-sounds-en", folder))
    files = sorted(
        path
        for path in root.rglob("*.g722")
        if len(texts.get(path.stem, "").split()) >= MIN_PROMPT_WORDS
    )
    heldout = set(random.Random(derive_seed(seed, "allison")).sample(files, num_heldout))
    for path in speakable(files, heldout, texts):
        wave = _read_g722(path)
        if MIN_CLIP_S <= len(wave) / SAMPLE_RATE_HZ <= MAX_CLIP_S:
            yield Recording(
                clip_id=f"allison/{path.stem}",
                text=texts[path.stem],
                speaker_id="allison",
                source="asterisk-core-sounds-en-g722",
                kind="human",
                split="heldout" if path in heldout else "train",
                waveform_N=wave,
            )


def speakable(files: Sequence[Path], heldout: set[Path], texts: dict[str, str]) -> Iterator[Path]:
    """Yield the files whose transcript is certain and, in training, not a held-out one.

    Transcripts go by file name, so two files of one name cannot be told apart.
    """
    num_files = Counter(path.stem for path in files)
    heldout_words = {_words(texts[path.stem]) for path in heldout}
    for path in files:
        is_certain = num_files[path.stem] == 1
        if is_certain and (path in heldout or _words(texts[path.stem]) not in heldout_words):
            yield path


def asterisk_foreign(folder: Path, language: str, minutes: float, seed: int) -> Iterator[Recording]:
    """Yield human speech of another language, untranscribed: a voice for the codec."""
    package = f"asterisk-core-sounds-{language}-g722"
    root = unpack(package, folder)
    files = sorted(path for path in root.rglob("*.g722") if path.parent.name != SILENCE_FOLDER)
    random.Random(derive_seed(seed, "foreign", language)).shuffle(files)
    left_s = minutes * 60
    for path in files:
        wave = _read_g722(path)
        duration_s = len(wave) / SAMPLE_RATE_HZ
        if left_s <= 0:
            return
        if MIN_CLIP_S <= duration_s <= MAX_CLIP_S:
            left_s -= duration_s
            yield Recording(
                clip_id=f"{language}/{path.parent.name}/{path.stem}",
                text="",
                speaker_id=f"asterisk-{language}",
                source=package,
                kind="human",
                split="train",
                waveform_N=wave,
            )


def librivox(folder: Path) -> Iterator[Recording]:
    """Yield the five sentences of the reader whom nothing here ever trains on."""
    root = unpack("pocketsphinx-testdata", folder)
    (transcription,) = root.rglob("librivox/transcription")
    for line in transcription.read_text().splitlines():
        match = re.fullmatch(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\((.*)\)", line.strip())
        if match is None:
            continue
        (path,) = root.rglob(f"librivox/{match[2]}.wav")
        wave, rate_hz = sf.read(path, dtype="float32")
        yield Recording(
            clip_id=f"librivox/{match[2]}",
            text=match[1],
            speaker_id="librivox",
            source="pocketsphinx-testdata",
            kind="human",
            split="heldout",
            waveform_N=soxr.resample(wave, rate_hz, SAMPLE_RATE_HZ),
        )


def flite(folder: Path, voice: str, texts: Sequence[str]) -> Iterator[Recording]:
    """Yield sentences in a diphone or HMM voice: unlike the neural voice, and free."""
    packages = [unpack(name, folder) for name in ("flite", "libflite1", "libasound2")]
    (program,) = packages[0].rglob("bin/flite")
    libraries = ":".join({str(path.parent) for p in packages[1:] for path in p.rglob("*.so*")})
    environment = os.environ | {"LD_LIBRARY_PATH": libraries}
    path = folder / f"flite-{voice}.wav"
    for index, text in enumerate(texts):
        command = [str(program), "-voice", voice, "-t", text, "-o", str(path)]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        wave, rate_hz = sf.read(path, dtype="float32")
        yield Recording(
            clip_id=f"flite-{voice}/{index:05d}",
            text=text,
            speaker_id=f"flite-{voice}",
            source="flite",
            kind="synthetic",
            split="train",
            waveform_N=soxr.resample(wave, rate_hz, SAMPLE_RATE_HZ),
        )


def _asterisk_texts(root: Path) -> dict[str, str]:
    """Return transcripts by file name, leaving out those with stage directions or digits."""
    (path,) = root.rglob("core-sounds-en.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines()
    entries = (line.partition(":") for line in lines if not line.startswith(";"))
    return {
        Path(name.strip()).name: text.strip()
        for name, _, text in entries
        if text.strip() and not re.search(r"[\[\]<>(){}0-9]", text)
    }


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z']+", text.lower()))


def _read_g722(path: Path) -> NDArray[np.float32]:
    samples = G722(SAMPLE_RATE_HZ, 64000).decode(path.read_bytes())
    return np.asarray(samples, dtype=np.float32) / 32768.0
