"""How much of speech a codec keeps, by judges that no reward optimises.

    python -m speechalign.evaluation.codec_quality CORPUS CODEC OUT.json

Held-out clips of known speakers and of a reader never heard are judged as recorded, after the
vocoder alone (the ceiling), and after the codec at 8, 4, 2 and 1 levels.

Shapes: N samples.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from speechalign.codec.embedded import SAMPLE_RATE_HZ, EmbeddedCodec
from speechalign.codec.vocoder import analyse, synthesise
from speechalign.config.judges import (
    DistillMosConfig,
    ListenerConfig,
    RecogniserConfig,
    SpeakerConfig,
)
from speechalign.errors import BudgetExceeded
from speechalign.evaluation.summary import markdown_rows
from speechalign.judges.base import Judge
from speechalign.judges.build import build_judge
from speechalign.types import Clip, Unmeasured

logger = logging.getLogger(__name__)

Wave = NDArray[np.float32]

MEASURES = ("eval_wer", "speaker_similarity", "distillmos")
NUM_LEVELS = (8, 4, 2, 1)
GROUPS = {"hibari-tts": 40, "asterisk-core-sounds-en-g722": 25, "pocketsphinx-testdata": 5}
"""How many held-out clips of each source are judged."""
JUDGES: tuple[ListenerConfig, ...] = (
    RecogniserConfig(model="base", role="eval", beam_size=2),
    SpeakerConfig(),
    DistillMosConfig(),
)


@dataclass(frozen=True, slots=True)
class Spoken:
    """A recording and what is said in it."""

    clip_id: str
    text: str
    wave_N: Wave


def held_out(corpus_dir: Path, source: str, num_clips: int) -> list[Spoken]:
    """Return held-out clips of one source, spread evenly over it."""
    clips = pq.read_table(corpus_dir / "clips.parquet")
    chosen = clips.filter((pc.field("split") == "heldout") & (pc.field("source") == source))
    picked = np.linspace(0, len(chosen) - 1, min(num_clips, len(chosen))).astype(int)
    samples = np.load(corpus_dir / "wave.npy", mmap_mode="r")
    return [
        Spoken(
            row["clip_id"],
            row["text"],
            samples[row["start"] : row["start"] + row["num_samples"]].astype(np.float32) / 32768,
        )
        for row in chosen.take(pa.array(picked.tolist(), pa.int64())).to_pylist()
    ]


def measure_codec(
    codec: EmbeddedCodec, spoken: Sequence[Spoken], judges: Sequence[Judge]
) -> dict[str, dict[str, float]]:
    """Return the measures of every treatment of the clips."""
    codes = [codec.encode(item.wave_N) for item in spoken]
    treatments: dict[str, Callable[[int], Wave]] = {
        "original": lambda i: spoken[i].wave_N,
        "vocoder": lambda i: synthesise(analyse(spoken[i].wave_N)),
    }
    treatments |= {
        f"{levels} levels": lambda i, levels=levels: codec.decode(codes[i][:levels])
        for levels in NUM_LEVELS
    }
    table: dict[str, dict[str, float]] = {}
    for name, treat in treatments.items():
        clips = [_clip(item, treat(index)) for index, item in enumerate(spoken)]
        measured = [_measure(judge, clips) for judge in judges]
        table[name] = {key: value for part in measured for key, value in part.items()}
        logger.info("%s: %s", name, table[name])
    return table


def _clip(item: Spoken, wave_N: Wave) -> Clip:
    return Clip(
        sample_id=item.clip_id,
        text=item.text,
        waveform_N=wave_N,
        reference_waveform_N=item.wave_N,
        sample_rate_hz=SAMPLE_RATE_HZ,
        golden_duration_s=len(item.wave_N) / SAMPLE_RATE_HZ,
    )


def _measure(judge: Judge, clips: Sequence[Clip]) -> dict[str, float]:
    answers: list[Mapping[str, float | str]] = []
    for clip, answer in zip(clips, judge.judge(clips), strict=True):
        if isinstance(answer, Unmeasured):
            raise BudgetExceeded(f"{judge.name} could not judge {clip.sample_id}: {answer.reason}")
        answers.append(answer)
    num_words = np.array([len(clip.text.split()) for clip in clips])
    return {
        name: round(float(np.average(values, weights=_weights(name, num_words))), 4)
        for name in judge.measures
        if name in MEASURES
        for values in [[float(answer[name]) for answer in answers]]
    }


def _weights(name: str, num_words: NDArray[np.int64]) -> NDArray[np.int64]:
    """Weigh errors by words, so that the mean is the error rate of all clips together."""
    return num_words if name.endswith("_wer") else np.ones_like(num_words)


def as_markdown(report: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the report as a table that people read."""
    rows = [["clips", "treatment", *MEASURES]]
    rows += [
        [source, treatment, *(f"{values[name]:.3f}" for name in MEASURES)]
        for source, table in report.items()
        for treatment, values in table.items()
    ]
    return markdown_rows(rows) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Measure the codec that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    corpus_dir, codec_dir, out_file = (Path(argument) for argument in arguments)
    codec = EmbeddedCodec.load(codec_dir)
    judges = [build_judge(config) for config in JUDGES]
    report = {
        source: measure_codec(codec, held_out(corpus_dir, source, num_clips), judges)
        for source, num_clips in GROUPS.items()
    }
    out_file.write_text(json.dumps({"codec": codec.fingerprint, "report": report}, indent=2))
    sys.stdout.write(as_markdown(report))


if __name__ == "__main__":
    main(sys.argv[1:])
