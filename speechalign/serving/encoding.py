"""Waveforms to the audio formats of the speech API, while they come or as one whole file.

A file whose end is known when its header is written can say how long it is: mp3 and flac need
that for a length that is exact to the sample. Sent while it is made, mp3 carries the encoder's
padding (less than 2,304 samples; its frames have 576), and flac says that its length is unknown,
which libsndfile's one-call readers refuse. aac (ADTS) is padded to whole frames of 1,024 samples
either way.

Shapes: N samples of one channel.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import av
import av.error
import av.filter
import numpy as np
import soxr
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from speechalign.config.serving import AudioFormat
from speechalign.rows import pcm_from_waveform


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """How FFmpeg writes a format."""

    name: str
    codec: str
    media_type: str
    options: Mapping[str, str]
    stream_exactly: bool = True
    """Whether a file that is sent while it is made says how long it is."""


CONTAINERS: Mapping[AudioFormat, Container] = {
    "mp3": Container(name="mp3", codec="libmp3lame", media_type="audio/mpeg", options={}),
    "opus": Container(
        name="ogg", codec="libopus", media_type="audio/ogg", options={"page_duration": "100000"}
    ),
    "aac": Container(name="adts", codec="aac", media_type="audio/aac", options={}),
    "flac": Container(
        name="flac", codec="flac", media_type="audio/flac", options={}, stream_exactly=False
    ),
    "wav": Container(name="wav", codec="pcm_s16le", media_type="audio/wav", options={}),
}


class Encoder(Protocol):
    """Takes sound, gives bytes."""

    def encode(self, wave_N: NDArray[np.float32]) -> bytes:
        """Return the bytes that are ready; often none."""
        ...

    def finish(self) -> bytes:
        """Return the rest; nothing can be encoded after it."""
        ...


def media_type(audio_format: AudioFormat, pcm_sample_rate_hz: int) -> str:
    """Return the Content-Type of a format."""
    if audio_format == "pcm":
        return f"audio/pcm;rate={pcm_sample_rate_hz};channels=1"
    return CONTAINERS[audio_format].media_type


def is_sent_whole(audio_format: AudioFormat, stream: bool | None) -> bool:
    """Whether a client that asked (or did not ask) for streaming gets one whole file."""
    if stream is not None:
        return not stream
    return audio_format != "pcm" and not CONTAINERS[audio_format].stream_exactly


def build_encoder(
    audio_format: AudioFormat, sample_rate_hz: int, *, pcm_sample_rate_hz: int, whole: bool
) -> Encoder:
    """Return an encoder of sound at `sample_rate_hz`.

    Args:
        audio_format: what the client wants.
        sample_rate_hz: of the sound that comes.
        pcm_sample_rate_hz: raw PCM is resampled to it.
        whole: everything is given by `finish`, with a header that knows the length.
    """
    if audio_format == "pcm":
        return _PcmEncoder(sample_rate_hz, pcm_sample_rate_hz)
    return _ContainerEncoder(CONTAINERS[audio_format], sample_rate_hz, whole=whole)


class _PcmEncoder:
    """16-bit little-endian samples without a header."""

    def __init__(self, sample_rate_hz: int, output_rate_hz: int) -> None:
        self._resampler = soxr.ResampleStream(sample_rate_hz, output_rate_hz, 1, dtype="float32")
        self._ratio = output_rate_hz / sample_rate_hz
        self._num_in, self._num_out = 0, 0

    def encode(self, wave_N: NDArray[np.float32]) -> bytes:
        self._num_in += len(wave_N)
        return self._taken(self._resampler.resample_chunk(wave_N, last=False))

    def finish(self) -> bytes:
        rest_N = self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        missing = round(self._num_in * self._ratio) - self._num_out - len(rest_N)
        padded_N = np.pad(rest_N, (0, max(missing, 0)))
        return self._taken(padded_N[: len(padded_N) + min(missing, 0)])

    def _taken(self, samples_N: NDArray[np.float32]) -> bytes:
        self._num_out += len(samples_N)
        return pcm_from_waveform(samples_N)


class _Pipe(io.RawIOBase):
    """What FFmpeg writes into when the bytes leave at once: nobody can go back in it."""

    def __init__(self) -> None:
        self._ready = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._ready += bytes(data)
        return len(data)

    def take(self) -> bytes:
        taken, self._ready = bytes(self._ready), bytearray()
        return taken


class _ContainerEncoder:
    """Any format that FFmpeg knows."""

    def __init__(self, container: Container, sample_rate_hz: int, *, whole: bool) -> None:
        self._sink = io.BytesIO() if whole else _Pipe()
        self._rate_hz, self._position = sample_rate_hz, 0
        options = dict(container.options)
        self._output = av.open(self._sink, "w", format=container.name, container_options=options)
        self._stream: Any = self._output.add_stream(container.codec, rate=sample_rate_hz)
        self._stream.layout = "mono"

    def encode(self, wave_N: NDArray[np.float32]) -> bytes:
        if len(wave_N):
            frame = _frame(wave_N, self._rate_hz, self._position)
            self._position += len(wave_N)
            self._output.mux(self._stream.encode(frame))
        return self._sink.take() if isinstance(self._sink, _Pipe) else b""

    def finish(self) -> bytes:
        if self._position:
            self._output.mux(self._stream.encode(None))
        self._output.close()
        return self._sink.take() if isinstance(self._sink, _Pipe) else self._sink.getvalue()


class Tempo:
    """Speaks faster or slower at the same pitch (FFmpeg's atempo, a phase-aligned overlap-add)."""

    def __init__(self, speed: float, sample_rate_hz: int) -> None:
        self._rate_hz, self._position = sample_rate_hz, 0
        self._graph: Any = None
        if speed != 1.0:
            self._graph = _tempo_graph(speed, sample_rate_hz)
            self._mono = AudioResampler(format="flt", layout="mono", rate=sample_rate_hz)

    def change(self, wave_N: NDArray[np.float32], *, is_last: bool = False) -> NDArray[np.float32]:
        """Return what is ready of the changed sound."""
        if self._graph is None:
            return wave_N
        if len(wave_N):
            self._graph.push(_frame(wave_N, self._rate_hz, self._position))
            self._position += len(wave_N)
        if is_last:
            self._graph.push(None)
        ready = [np.zeros(0, np.float32)]
        while True:
            try:
                frame = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return np.concatenate(ready)
            ready += [part.to_ndarray()[0] for part in self._mono.resample(frame)]


def _tempo_graph(speed: float, sample_rate_hz: int) -> Any:
    graph: Any = av.filter.Graph()
    nodes = [graph.add_abuffer(sample_rate=sample_rate_hz, format="s16", layout="mono")]
    while speed < 0.5:  # the least that one atempo can do
        nodes.append(graph.add("atempo", "0.5"))
        speed /= 0.5
    nodes.append(graph.add("atempo", f"{speed:.6f}"))
    nodes.append(graph.add("abuffersink"))
    graph.link_nodes(*nodes).configure()
    return graph


def _frame(wave_N: NDArray[np.float32], sample_rate_hz: int, position: int) -> Any:
    samples_1N = np.frombuffer(pcm_from_waveform(wave_N), np.int16)[None]
    frame = av.AudioFrame.from_ndarray(samples_1N, format="s16", layout="mono")
    frame.sample_rate = sample_rate_hz
    frame.pts = position
    return frame
