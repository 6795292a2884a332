"""What Prometheus learns of the endpoint; Ray exports it beside its own metrics."""

from dataclasses import dataclass, field
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 2.0, 4.0, 8.0]
FACTORS = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0]


def _first_audio() -> Histogram:
    return Histogram(
        "speechalign_first_audio_seconds",
        "From the request to its first sound",
        boundaries=SECONDS,
        tag_keys=("model",),
    )


def _real_time() -> Histogram:
    return Histogram(
        "speechalign_real_time_factor",
        "Seconds of work a second of speech",
        boundaries=FACTORS,
        tag_keys=("model",),
    )


def _rejects() -> Counter:
    return Counter(
        "speechalign_rejects_total", "Requests that were not spoken", tag_keys=("reason",)
    )


def _audio() -> Counter:
    return Counter("speechalign_audio_seconds_total", "Speech sent", tag_keys=("model",))


def _ends() -> Counter:
    keys: Any = ("model", "end")  # annotated as one key, documented as several
    return Counter("speechalign_streams_total", "Streams by how they ended", tag_keys=keys)


def _truncated() -> Counter:
    return Counter(
        "speechalign_truncated_total", "Sentences cut at the length cap", tag_keys=("model",)
    )


def _streams() -> Gauge:
    return Gauge("speechalign_streams", "Streams that are open in this replica")


@dataclass(frozen=True, slots=True)
class Telemetry:
    """The metrics of one replica of the ingress."""

    first_audio: Histogram = field(default_factory=_first_audio)
    real_time: Histogram = field(default_factory=_real_time)
    rejects: Counter = field(default_factory=_rejects)
    audio: Counter = field(default_factory=_audio)
    ends: Counter = field(default_factory=_ends)
    truncated: Counter = field(default_factory=_truncated)
    streams: Gauge = field(default_factory=_streams)
