"""What Prometheus learns of the endpoint; Ray exports it beside its own metrics."""

from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

SECONDS = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 2.0, 4.0, 8.0]
FACTORS = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0]
OF_A_MODEL = ("model",)
OF_AN_END: Any = ("model", "end")  # annotated as one key, documented as several


class Telemetry:
    """The metrics of one replica of the ingress."""

    def __init__(self) -> None:
        self.first_audio = Histogram(
            "speechalign_first_audio_seconds",
            "From the request to its first sound",
            boundaries=SECONDS,
            tag_keys=OF_A_MODEL,
        )
        self.real_time = Histogram(
            "speechalign_real_time_factor",
            "Seconds of work a second of speech",
            boundaries=FACTORS,
            tag_keys=OF_A_MODEL,
        )
        self.rejects = Counter(
            "speechalign_rejects_total", "Requests that were not spoken", tag_keys=("reason",)
        )
        self.audio = Counter("speechalign_audio_seconds_total", "Speech sent", tag_keys=OF_A_MODEL)
        self.ends = Counter(
            "speechalign_streams_total",
            "Streams by how they ended; no model: the client left before its request was whole",
            tag_keys=OF_AN_END,
        )
        self.truncated = Counter(
            "speechalign_truncated_total", "Sentences cut at the length cap", tag_keys=OF_A_MODEL
        )
        self.streams = Gauge("speechalign_streams", "Streams that are open in this replica")
        self.queue = Gauge("speechalign_queue", "Those of them that have no sound yet")
